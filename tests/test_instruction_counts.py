"""The key kernels take no more instructions than tests/instruction_counts.json says, counted by callgrind in the
compiled module itself: a count repeats where a time does not.

`python tests/test_instruction_counts.py --update` counts the pins anew, for the compiler of the module that is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import noisyseg_fast

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tests" / "instruction_counts.json"
ISAS = ("baseline", "avx2")  # valgrind knows no AVX-512
ALLOWED = 1.10


def compiler() -> str:
    """As in "GNU 12": counts are a compiler's own."""
    name, version = noisyseg_fast.build_info()["compiler"].split()[:2]
    return f"{name} {version.split('.')[0]}"


def missing() -> str | None:
    if not shutil.which("valgrind"):
        return "no valgrind on PATH (apt-get install valgrind): instructions are not counted"
    if not shutil.which("cc"):
        return "no C compiler to build the marks with"
    return None


def counted(isa: str, folder: Path) -> dict[str, int]:
    """kernel -> instructions of one call."""
    mark, out = folder / "mark.so", folder / f"{isa}.out"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", ROOT / "tests/callgrind/mark.c", "-o", mark], check=True)
    environment = {
        **os.environ,
        "NOISYSEG_ISA": isa,
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(Path(noisyseg_fast.__file__).parent.parent),
    }
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
    script = [sys.executable, "-S", ROOT / "tests/callgrind/kernels.py", mark]
    done = subprocess.run([*valgrind, *script], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for file in sorted(folder.glob(f"{isa}.out*")):
        text = file.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
        if name and total:
            found[name[1]] = int(total[1])
    assert found, "callgrind's files were not understood"
    return found


@pytest.mark.parametrize("isa", ISAS)
def test_no_kernel_grows(isa: str, tmp_path: Path) -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
    if isa not in noisyseg_fast.build_info()["instruction_sets"]:
        pytest.skip(f"this module has no {isa} kernels")
    if "avx2" not in Path("/proc/cpuinfo").read_text() and isa == "avx2":
        pytest.skip("this CPU has no AVX2")
    pins = json.loads(PINS.read_text())
    if compiler() not in pins:
        pytest.skip(f"the pins are for {', '.join(pins)} and this module was built by {compiler()}")
    then, now = pins[compiler()][isa], counted(isa, tmp_path)
    problems = [f"{name}: gone" for name in then.keys() - now.keys()]
    for name, n in now.items():
        if name not in then:
            problems.append(f"{name}: not pinned")
        elif n > ALLOWED * then[name]:
            problems.append(f"{name}: {n} instructions, pinned {then[name]} ({n / then[name] - 1:+.0%})")
    assert not problems, "\n".join(
        [*problems, "if that is meant: python tests/test_instruction_counts.py --update"]
    )


def update() -> None:
    reason = missing()
    if reason:
        sys.exit(reason)
    pins = json.loads(PINS.read_text()) if PINS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        pins[compiler()] = {isa: counted(isa, Path(folder)) for isa in ISAS}
    PINS.write_text(json.dumps(pins, indent=1) + "\n")
    print(f"{PINS}: {compiler()}, {sum(map(len, pins[compiler()].values()))} counts")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    update()
