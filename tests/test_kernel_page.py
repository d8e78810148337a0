"""docs/kernel.md's example, followed to the letter in a copy of the checkout: built, tested, run by the emulator."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "kernel.md").read_text()
FILES = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.M | re.S))


def test_the_page_has_every_file_of_its_table() -> None:
    told = {f.replace("FAMILY", "count") for f in re.findall(r"\| \d \| `(\S+FAMILY\S+)`", PAGE)}
    assert set(FILES) == told


@pytest.mark.soak
@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("ninja") is None, reason="needs cmake, ninja"
)
def test_following_the_page_gives_a_kernel(tmp_path: Path) -> None:
    """Alone: the other families are left out, since building them takes minutes."""
    pytest.importorskip("torch")
    pybind11 = pytest.importorskip("pybind11")

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NOISYSEG_CUDA": "0"}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout

    for folder in ("cmake", "csrc", "noisyseg_fast", "tests/emulator"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("_core*.so"))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)

    def edit(name: str, pattern: str, new: str) -> None:
        text = (tmp_path / name if (tmp_path / name).exists() else ROOT / name).read_text()
        changed, times = re.subn(pattern, new, text, flags=re.M)
        assert times
        (tmp_path / name).write_text(changed)

    edit("CMakeLists.txt", r"^set\(families .*\)$", "set(families count)")
    for name in ("CMakeLists.txt", "tests/emulator/CMakeLists.txt"):
        edit(name, r"^list\(APPEND cpu_sources .*losses_exact.cpp\)$", "")
    edit("CMakeLists.txt", r"^set_source_files_properties\(csrc/cpu/noise.cpp .*$", "")
    edit(
        "csrc/python/bind.h",
        r"(?:^void bind_\w+\(py::module_& m\);\n)+",
        "void bind_count(py::module_& m);\n",
    )
    edit("csrc/python/module.cpp", r"(?:^  noisyseg::bind_\w+\(m\);\n)+", "  noisyseg::bind_count(m);\n")

    directory = f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"
    run("cmake", "-S", ".", "-B", "build", "-G", "Ninja", "-DNOISYSEG_CUDA=0", directory)
    run("cmake", "--build", "build", "--parallel", "2")
    run("cmake", "--install", "build", "--prefix", ".")
    said = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_count.py")
    assert "2 passed" in said
    emulator = tmp_path / "emulator"
    run("cmake", "-S", "tests/emulator", "-B", emulator, "-G", "Ninja", "-DSANITIZER=address")
    run("cmake", "--build", emulator, "--parallel", "2", "--target", "count")
    log = tmp_path / "launches"
    os.environ["NOISYSEG_EMULATOR_LOG"] = str(log)
    try:
        run(emulator / "count")
    finally:
        del os.environ["NOISYSEG_EMULATOR_LOG"]
    assert "count_object" in log.read_text()
