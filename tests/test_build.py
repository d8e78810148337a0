"""What the build promises: no torch and no CUDA runtime to link, one portable binary, clear refusals."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import noisyseg_fast
from noisyseg_fast import _core

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(noisyseg_fast.__file__).parent
SYSTEM_LIBRARIES = {"gomp", "stdc++", "m", "gcc_s", "c", "pthread", "dl", "rt"}

# With CUDA or without as the module beside us: a compiler's cache, where there is one, has it all.
CUDA = noisyseg_fast.build_info()["cuda"] is not None and (shutil.which("nvcc") or os.environ.get("CUDACXX"))
AS_INSTALLED = {k: os.environ[k] for k in ("CUDACXX", "TORCH_CUDA_ARCH_LIST") if CUDA and k in os.environ}
AS_INSTALLED["NOISYSEG_CUDA"] = "1" if CUDA else "0"

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
on_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="instruction sets of x86-64")


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """CMake's configuration of the library alone, with none of the caller's own switches but `environment`."""
    switches = ("NOISYSEG_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME", "CUDA_PATH")
    kept = {k: v for k, v in os.environ.items() if k not in switches}
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DNOISYSEG_PYTHON=OFF", *options]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True)


# ---- the compiled module --------------------------------------------------------------------------
@on_linux
def test_no_symbol_of_torch_or_the_cuda_runtime_is_missing() -> None:
    """flash-attention#1832, #723: undefined symbols after an upgrade of torch."""
    symbols = output("nm", "-D", "--undefined-only", "--demangle", _core.__file__).splitlines()
    assert symbols
    foreign = [s for s in symbols if re.search(r"torch|c10|\bat::|\b_*cuda[A-Z]|\bcu[A-Z]", s)]
    assert not foreign


@on_linux
def test_only_system_libraries_are_needed() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", output("readelf", "-d", _core.__file__))
    assert needed
    names = {n: re.match(r"lib(.+?)\.so|(ld-linux)", n) for n in needed}
    assert not [n for n, m in names.items() if not m or not (m[2] or m[1] in SYSTEM_LIBRARIES)]


def test_build_info_tells_what_is_inside() -> None:
    info = noisyseg_fast.build_info()
    assert set(info) >= {
        "version",
        "compiler",
        "cuda",
        "cuda_architectures",
        "instruction_sets",
        "instruction_set_in_use",
        "openmp_max_threads",
    }
    assert info["version"] == noisyseg_fast.__version__
    assert info["instruction_set_in_use"] in info["instruction_sets"].split()
    assert info["openmp_max_threads"] >= 1
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)


@on_linux
@on_x86
@pytest.mark.parametrize("wish", ["baseline", "avx2"])
def test_noisyseg_isa_chooses_the_instruction_set(wish: str) -> None:
    code = "import noisyseg_fast as n; print(n.build_info()['instruction_set_in_use'])"
    done = python(code, NOISYSEG_ISA=wish)
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    assert done.stdout.strip() == (wish if wish in flags else "baseline"), done.stderr


@on_linux
@on_x86
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_code_for_newer_processors_stays_to_itself() -> None:
    """The linker keeps one copy of a weak function for everybody: it must not be the AVX-512 one.

    Weak data (type information, personality references) holds no instructions and may be shared.
    """
    folder = ROOT / "build" / "isa"
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "Makefile").exists() else []
    done = configure(folder, *generator, **AS_INSTALLED)
    assert done.returncode == 0, done.stderr
    output("cmake", "--build", folder, "--parallel", "2", "--target", "noisyseg_avx2", "noisyseg_avx512")
    for isa in ("avx2", "avx512"):
        objects = sorted(folder.glob(f"CMakeFiles/noisyseg_{isa}.dir/**/*.o"))
        assert objects
        for file in objects:
            for line in output("nm", "--defined-only", "--extern-only", file).splitlines():
                _, kind, name = line.split()[-3:]
                assert kind not in "Ww", f"{file.name} for {isa} has the weak function {name}"
                assert kind != "T" or name.startswith(f"_ZN8noisyseg{len(isa)}{isa}"), f"{file.name}: {name}"


@on_linux
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_another_cpp_project_finds_the_library(tmp_path: Path) -> None:
    """examples/cpp is built against an installed library, run, and agrees with Python."""
    library = ROOT / "build" / "isa"  # built already for the test above
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (library / "Makefile").exists() else []
    done = configure(library, *generator, **AS_INSTALLED)
    assert done.returncode == 0, done.stderr
    output("cmake", "--build", library, "--parallel", "2")
    output("cmake", "--install", library, "--prefix", tmp_path / "installed")
    example = tmp_path / "example"
    output(
        "cmake", "-S", ROOT / "examples/cpp", "-B", example, f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}"
    )
    output("cmake", "--build", example)
    masks = np.random.default_rng(0).random((2, 7, 9, 11)) < 0.2
    files = [tmp_path / "pred.raw", tmp_path / "target.raw"]
    for mask, file in zip(masks, files, strict=True):
        file.write_bytes(mask.tobytes())
    said = output(example / "volume", "7", "9", "11", *files)
    scores = noisyseg_fast.surface_metrics(*masks)
    names = ("HD", "HD95", "ASSD", "NSD")
    values = (scores.hd, scores.hd_percentile, scores.assd, scores.nsd)
    assert said.split() == [w for n, v in zip(names, values, strict=True) for w in (n, f"{v:.6f}")]
    written = np.fromfile(tmp_path / "target.raw.sdf", np.float32).reshape(7, 9, 11)
    np.testing.assert_array_equal(written, noisyseg_fast.signed_distance_map(masks[1]))
    short = subprocess.run([example / "volume", "8", "9", "11", *files], capture_output=True, text=True)
    assert short.returncode == 1 and "holds fewer than 792 bytes" in short.stderr


@on_linux
@pytest.mark.soak
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("nvcc")), reason="needs cmake and nvcc")
def test_another_cpp_project_finds_the_library_with_cuda(tmp_path: Path) -> None:
    """examples/cpp's CUDA program is compiled and linked against a library with CUDA, and run, here on the CPU."""
    library = ROOT / "build" / "cuda"
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (library / "Makefile").exists() else []
    done = configure(library, *generator, NOISYSEG_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert done.returncode == 0, done.stderr
    output("cmake", "--build", library, "--parallel", "2")
    output("cmake", "--install", library, "--prefix", tmp_path / "installed")
    example = tmp_path / "example"
    output("cmake", "-S", ROOT / "examples/cpp", "-B", example, f"-DCMAKE_PREFIX_PATH={tmp_path}/installed")
    output("cmake", "--build", example)
    mask = np.random.default_rng(0).random((7, 9, 11)) < 0.2
    (tmp_path / "mask.raw").write_bytes(mask.tobytes())
    assert output(example / "signed_map", "7", "9", "11", tmp_path / "mask.raw") in ("CPU\n", "GPU\n")
    written = np.fromfile(tmp_path / "mask.raw.sdf", np.float32).reshape(7, 9, 11)
    np.testing.assert_allclose(written, noisyseg_fast.signed_distance_map(mask), rtol=1e-6)
    # Neither the library nor the program asks for CUDA's own to be installed.
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", output("readelf", "-d", example / "signed_map"))
    assert not [n for n in needed if "cuda" in n]


# ---- Python without torch -------------------------------------------------------------------------
def test_works_without_torch() -> None:
    """flash-attention#246: No module named torch."""
    done = python(
        "import sys; sys.modules['torch'] = None\n"
        "import numpy, noisyseg_fast, noisyseg_fast.distance, noisyseg_fast.metrics\n"
        "print(noisyseg_fast.distance_transform_edt(numpy.array([0, 1, 1, 1], bool)).tolist())"
    )
    assert done.stdout.strip() == "[0.0, 1.0, 2.0, 3.0]", done.stderr


def test_metadata_asks_for_no_torch() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    assert not [n for n in needed if "torch" in n]
    assert "torch" not in (ROOT / "setup.py").read_text()


def test_the_pinned_versions_take_the_oldest_python() -> None:
    """Debian 12 has 3.11.2; a release that asks for a later 3.11 cannot be installed there."""
    specifiers = pytest.importorskip("packaging.specifiers")
    asks = {}
    for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another Python
            asks[name] = importlib.metadata.metadata(name)["Requires-Python"] or ""
    assert len(asks) > 50
    assert {
        name: ask for name, ask in asks.items() if not specifiers.SpecifierSet(ask).contains("3.11.0")
    } == {}


def test_nothing_is_compiled_at_first_use() -> None:
    """gsplat#249, #539."""
    for file in PACKAGE.rglob("*.py"):
        assert not re.search(r"cpp_extension|load_inline|RawKernel|nvrtc", file.read_text()), file


# ---- CMake's switches -----------------------------------------------------------------------------
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


@needs_cmake
@pytest.mark.parametrize("switch", ["FORCE_CUDA", "NOISYSEG_CUDA"])
def test_asking_for_cuda_without_nvcc_fails(switch: str, tmp_path: Path) -> None:
    """FastGeodis#35: silently built without CUDA."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    make = shutil.which("make") or shutil.which("ninja")
    done = configure(
        tmp_path,
        "-G",
        "Unix Makefiles" if make and make.endswith("make") else "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={make}",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DCMAKE_FIND_ROOT_PATH={tmp_path}",  # where find_program looks for nvcc, and there is none
        "-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=ONLY",
        **{switch: "1"},
    )
    assert done.returncode != 0
    text = " ".join(done.stderr.split())
    assert "CUDA was asked for (FORCE_CUDA=1 or NOISYSEG_CUDA=1), but no nvcc was found." in text
    assert "Put nvcc on PATH or set CUDA_HOME or CUDACXX." in text


@needs_cmake
def test_cuda_can_be_left_out(tmp_path: Path) -> None:
    done = configure(tmp_path, NOISYSEG_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "CUDA OFF" in done.stdout


def architectures(folder: Path, known: str, **environment: str) -> tuple[str, str]:
    """What cmake/cuda_architectures.cmake chooses for an nvcc that knows these, and its error."""
    compiler = folder / "nvcc"
    compiler.write_text("#!/bin/sh\n" + "".join(f"echo sm_{k}\n" for k in known.split()))
    compiler.chmod(0o755)
    script = folder / "list.cmake"
    script.write_text(
        f'set(CMAKE_CUDA_COMPILER "{compiler}")\ninclude("{ROOT}/cmake/cuda_architectures.cmake")\n'
        'message("${CMAKE_CUDA_ARCHITECTURES}")\n'
    )
    environment = {**{k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}, **environment}
    done = subprocess.run(["cmake", "-P", script], env=environment, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode == 0 else "", done.stderr


@needs_cmake
@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ("75 80 86 87 89 90 90a 100 120 121", "75 80 86 89 90 100 120 PTX 120"),
        ("52 60 70 75 80 86 89 90", "75 80 86 89 90 PTX 90"),
    ],
)
def test_default_architectures_are_those_that_nvcc_knows(known: str, chosen: str, tmp_path: Path) -> None:
    """mamba#40: a missing architecture."""
    real, virtual = chosen.split(" PTX ")
    assert architectures(tmp_path, known)[0] == ";".join(
        [f"{a}-real" for a in real.split()] + [f"{virtual}-virtual"]
    )


@needs_cmake
def test_torch_cuda_arch_list_is_honoured(tmp_path: Path) -> None:
    chosen, _ = architectures(tmp_path, "75", TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX")
    assert chosen == "80-real;90a-real;90a-virtual"
    assert architectures(tmp_path, "75", TORCH_CUDA_ARCH_LIST="7.5 8.6")[0] == "75-real;86-real"


@needs_cmake
def test_bad_torch_cuda_arch_list_is_refused(tmp_path: Path) -> None:
    chosen, error = architectures(tmp_path, "75", TORCH_CUDA_ARCH_LIST="8.0;Hopper")
    assert not chosen
    assert "TORCH_CUDA_ARCH_LIST has 'Hopper'; entries look like 8.0 or 9.0+PTX." in " ".join(error.split())
