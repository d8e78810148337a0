# make demo    install everything into .venv and run `noisyseg demo`: trains on real noisy masks, times the kernels
# make test    install what the tests need too, and run them
# make soak    the long versions of the tests of docs/reliability.md: hours of kills, fuzzing and repetition
# make bench   every operation against its peers on this machine; results under bench/results/
# make docs    the documentation, site/index.html; warnings are errors
# make lint    ruff, mypy, clang-format        make clean    remove what was built and installed
#
# PYTHON  the interpreter, 3.11 or newer       VENV  where to install
# TORCH   another torch, as pip takes it:      make demo TORCH="torch==2.9.1 --index-url URL"
# NOISYSEG_CUDA=0 leaves the CUDA kernels out where nvcc is found.
PYTHON ?= python3
VENV ?= .venv

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check install -qq
sources := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test soak bench docs lint clean check FORCE
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(bin)/noisyseg demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.test
	PATH="$(abspath $(bin)):$$PATH" OMP_WAIT_POLICY=passive python -m pytest -n auto --dist loadfile --no-loadscope-reorder

soak: $(VENV)/.test
	PATH="$(abspath $(bin)):$$PATH" OMP_WAIT_POLICY=passive python -m pytest -m soak

bench: $(VENV)/.test
	$(bin)/python -m bench

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(bin)/python -m mkdocs build --strict -q

lint: $(VENV)/.test
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $$(find csrc tests/emulator tests/fuzz examples -name '*.h' -o -name '*.c[pu]*')

clean:
	rm -rf $(VENV) build site noisyseg_fast/_core*.so *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache

# The package is installed in place: the command, pytest and `python -m` all run the checkout's code.
$(VENV)/.demo: $(VENV)/.tools $(sources)
	$(pip) -c $(VENV)/constraints.txt --no-build-isolation -e '.[train]' scipy
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(pip) -c $(VENV)/constraints.txt --no-binary elasticdeform 'noisyseg-fast[bench,la,dev,docs]'  # wheels: for NumPy 1
	$(pip) -c $(VENV)/constraints.txt --no-deps PYMIC  # its losses need torch alone
	touch $@

# torch first and its pin then left out, so that nothing replaces the one that was chosen.
$(VENV)/.tools: constraints.txt $(wildcard $(VENV)/torch) | check
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(pip) $$(cat $(VENV)/torch 2>/dev/null || grep '^torch==' constraints.txt)
	$(pip) -c $(VENV)/constraints.txt setuptools scikit-build-core pybind11 cmake ninja
	touch $@

ifdef TORCH  # is remembered
$(VENV)/.tools: $(VENV)/torch
$(VENV)/torch: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
endif

check:
	@missing=; \
	$(PYTHON) -c 'import sys; sys.exit(3 * (sys.version_info < (3, 11)))' 2>/dev/null; \
	case $$? in \
	  0) ;; \
	  3) echo "$(PYTHON) is older than 3.11; choose another, as make demo PYTHON=python3.12" >&2; exit 1 ;; \
	  *) missing=" python3" ;; \
	esac; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null \
	  || missing="$$missing python3-dev"; \
	command -v $(CXX) >/dev/null || missing="$$missing g++"; \
	test -z "$$missing" || { echo "Missing:$$missing. On Debian: apt-get install$$missing" >&2; exit 1; }
