"""Random calls of the C++ API under sanitizers (tests/fuzz) and of the operations (scripts/fuzz_arrays.py): short
versions here, a million executions each in `make soak`."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
FAMILIES = re.search(r"^set\(families (.*)\)$", (ROOT / "CMakeLists.txt").read_text(), re.M)[1].split()
REPORT = re.compile(r"ERROR: \w+Sanitizer|runtime error:|an input was written to|ERROR: libFuzzer")


@functools.cache
def built(kind: str) -> Path:
    """The fuzzer: "clang" is libFuzzer's, with AddressSanitizer and UndefinedBehaviorSanitizer; otherwise the default
    compiler's with one of them, "address" or "undefined", which compiles in a third of the time."""
    folder = ROOT / "build" / "fuzz" / kind
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "Makefile").exists() else []
    chosen = ["-DCMAKE_CXX_COMPILER=clang++"] if kind == "clang" else [f"-DSANITIZERS={kind}"]
    for command in (
        ["cmake", "-S", ROOT / "tests/fuzz", "-B", folder, *chosen, *generator],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return folder / "calls"


def run(*command: object, family: str = "") -> None:
    environment = {
        **os.environ,
        "NOISYSEG_FUZZ_FAMILY": family,
        "OMP_NUM_THREADS": "1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not REPORT.search(done.stderr), done.stderr[-6000:]


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


@needs_cmake
def test_every_family_has_calls() -> None:
    text = (ROOT / "tests/fuzz/calls.cpp").read_text()
    assert set(re.findall(r'\{"(\w+)", \w+_family\}', text)) == set(FAMILIES)


@needs_cmake
@pytest.mark.soak  # for the minutes that the compiler takes
@pytest.mark.parametrize("sanitizer", ["address", "undefined"])
def test_cpp(sanitizer: str) -> None:
    run(built(sanitizer), 1_000_000, 9)


@needs_cmake
def test_an_overrun_is_seen(tmp_path: Path) -> None:
    """The sanitizer is at work: one byte behind a Tensor's memory."""
    source = tmp_path / "overrun.cpp"
    source.write_text(
        '#include "emulator/tensors.h"\n'
        "int main() { Tensor t({3}, DType::u8); return static_cast<unsigned char*>(t.array().data)[t.view.size()]; }\n"
    )
    command = ["c++", "-std=c++17", "-fsanitize=address", "-w", source, "-o", tmp_path / "overrun"]
    command += [f"-I{ROOT / folder}" for folder in ("tests", "csrc", "csrc/include")]
    subprocess.run(command, check=True)
    assert (
        "heap-buffer-overflow"
        in subprocess.run([tmp_path / "overrun"], capture_output=True, text=True).stderr
    )


@needs_cmake
@pytest.mark.soak
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++ for libFuzzer")
@pytest.mark.parametrize("family", FAMILIES)
def test_cpp_with_libfuzzer(family: str, tmp_path: Path) -> None:
    """A ninth of a million executions, 10^6 in all."""
    options = [
        "-runs=112000",
        "-max_len=256",
        "-len_control=0",
        "-timeout=60",
        f"-artifact_prefix={tmp_path}/",
    ]
    run(built("clang"), *options, family=family)


@pytest.fixture
def arrays() -> object:
    torch = pytest.importorskip("torch")
    pytest.importorskip("monai")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield pytest.importorskip("fuzz_arrays")
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
def test_arrays(arrays: object) -> None:
    every = arrays.chosen()
    for index in range(2000):
        operation = every[index % len(every)]
        try:
            arrays.execute_draw(operation, 1, index, Counter())
        except Exception as error:
            raise AssertionError(f"draw {index}, {operation.name}: {error}") from error


@pytest.mark.filterwarnings("ignore")
def test_arrays_by_hypothesis(arrays: object) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies

    every = arrays.chosen()

    @hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @hypothesis.given(
        strategies.sampled_from(every), strategies.integers(0, 2**31), strategies.integers(0, 2**31)
    )
    def check(operation: object, seed: int, index: int) -> None:
        arrays.execute_draw(operation, seed, index, Counter())

    check()


@pytest.mark.soak
def test_arrays_a_million_times() -> None:
    pytest.importorskip("monai")
    done = subprocess.run([sys.executable, ROOT / "scripts/fuzz_arrays.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
