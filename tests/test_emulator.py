"""The CUDA kernels on the CPU, under ThreadSanitizer and AddressSanitizer (tests/emulator)."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = re.search(r"^set\(families (.*)\)$", (ROOT / "CMakeLists.txt").read_text(), re.M)[1].split()
SANITIZERS = ("thread", "address")
REPORT = re.compile(r"WARNING: ThreadSanitizer|ERROR: (Address|Leak)Sanitizer|runtime error:|emulator:")


@functools.cache
def built(sanitizer: str) -> Path:
    """The folder of the executables for one sanitizer, kept between runs."""
    folder = ROOT / "build" / "emulator" / sanitizer
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "Makefile").exists() else []
    for command in (
        ["cmake", "-S", ROOT / "tests" / "emulator", "-B", folder, f"-DSANITIZER={sanitizer}", *generator],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{command} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return folder


def run(sanitizer: str, program: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [str(built(sanitizer) / program), *arguments]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("NOISYSEG_")},
        **{f"NOISYSEG_EMULATOR_{k}": v for k, v in settings.items()},
        "TSAN_OPTIONS": "atexit_sleep_ms=0:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if "unexpected memory mapping" in done.stderr:  # a Linux that spreads addresses wider than GCC 12 knows
        command = ["setarch", "--addr-no-randomize", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return done


def kernels(family: str) -> set[str]:
    """The names of the kernels in the family's .cu file and in the headers beside it that it includes."""
    text = (ROOT / "csrc" / "cuda" / f"{family}.cu").read_text()
    for header in re.findall(r'#include "(?:cuda/)?(\w+\.cuh)"', text):
        text += (ROOT / "csrc" / "cuda" / header).read_text()
    text = re.sub(r"//[^\n]*|__launch_bounds__\s*\([^)]*\)", "", text)
    return set(re.findall(r"__global__[^;{(]*?\b(\w+)\s*\(", text))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("program", ["selftest", "planes", *FAMILIES])
def test_kernels_are_clean(program: str, sanitizer: str, tmp_path: Path) -> None:
    """In both orders of blocks and threads (the race checker needs one: it knows what is ordered by what); and every
    kernel of the family runs."""
    assert (ROOT / f"tests/emulator/{program}.cpp").exists(), f"write the driver tests/emulator/{program}.cpp"
    log = tmp_path / "launches"
    for settings in ({"LOG": str(log)}, {"REVERSE": "1"})[: 1 if sanitizer == "thread" else 2]:
        done = run(sanitizer, program, **settings)
        said = f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[:6000]}"
        assert done.returncode == 0, said
        assert not REPORT.search(done.stderr), said
    if program in FAMILIES:
        ran = set(re.findall(r"\w+", log.read_text() if log.exists() else ""))
        assert kernels(program) <= ran, f"the driver does not run {sorted(kernels(program) - ran)}"


@pytest.mark.parametrize(
    ("sanitizer", "bug", "report"),
    [
        ("thread", "race", "data race.*block_sum"),
        ("thread", "warp-race", "data race.*warp_exchange"),
        ("thread", "block-race", "data race.*all_write"),
        ("address", "shared-overrun", "heap-buffer-overflow.*shared_write"),
        ("address", "static-overrun", "index 8 out of bounds.*static_write"),
        ("address", "global-overrun", "heap-buffer-overflow.*all_write"),
        ("thread", "diverge", "threads wait at different barriers"),
        ("thread", "exit", r"\[0 to 39 wait at the barrier of line \d+\] \[40 to 63 have ended\]"),
        ("thread", "lanes", r"\[32 to 39 wait at the warp intrinsic of line \d+\] \[40 to 63 have ended\]"),
        ("thread", "limit", "more dynamic shared memory"),
    ],
)
def test_planted_bug_is_reported(sanitizer: str, bug: str, report: str) -> None:
    done = run(sanitizer, "selftest", bug)
    assert done.returncode != 0
    assert re.search(report, done.stderr, re.S), done.stderr[:6000]
