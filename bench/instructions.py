"""What the CPU kernels are made of: instructions for each element and how wide they are: python -m bench.instructions

Runs each operation once under valgrind's callgrind on NumPy arrays, one thread, and looks up every executed instruction
of the compiled module with objdump. Writes bench/results/instructions.json. Counts repeat exactly; they are of the AVX2
code, the widest that valgrind runs. Takes minutes; needs valgrind and objdump.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "instructions.json"

# name: what an element is, how many, and the code that makes `run`
CASES: dict[str, tuple[str, int, str]] = {
    "NR-Dice, forward + backward": (
        "pixel",
        1 << 18,
        "z = r.standard_normal((1, 1, n), np.float32); y = (r.random((1, n)) < 0.3).astype(np.uint8)\n"
        "run = lambda: losses.nr_dice_loss(z, y, return_grad=True)",
    ),
    "weighted CE, C = 4, forward + backward": (
        "pixel",
        1 << 18,
        "z = r.standard_normal((1, 4, n), np.float32); y = r.integers(0, 4, (1, n)).astype(np.uint8)\n"
        "w = r.random((1, n), np.float32)\nrun = lambda: losses.pixel_loss(z, y, weight=w, return_grad=True)",
    ),
    "distance transform, blobs of 64x64x64": (
        "voxel",
        1 << 18,
        "m = timing.blobs((1, 64, 64, 64))\nrun = lambda: distance.distance_transform_edt(m, spatial_dims=3)",
    ),
    "surface metrics, blobs of 64x64x64": (
        "voxel",
        1 << 18,
        "p, t = timing.pair((1, 64, 64, 64))\nrun = lambda: metrics.surface_metrics(p, t, spatial_dims=3)",
    ),
    "STAPLE, 5 raters of 64x64x64": (
        "voxel",
        1 << 18,
        "m = np.stack([timing.blobs((1, 64, 64, 64), k // 2) for k in range(5)], 1)\n"
        "run = lambda: labels.staple(m, spatial_dims=3)",
    ),
    "quantile 0.9": (
        "value",
        1 << 18,
        "x = r.standard_normal(n, np.float32)\nrun = lambda: pixels.quantile(x, 0.9)",
    ),
    "cross-entropy and its tangent, C = 2": (
        "pixel",
        1 << 18,
        "z, d = (r.standard_normal((1, 2, n), np.float32) for _ in range(2))\n"
        "y = r.integers(0, 2, (1, n)).astype(np.uint8)\nrun = lambda: weight_nets.ce_dual(z, d, y)",
    ),
    "elastic deformation, 512x512": (
        "pixel",
        1 << 18,
        "m = timing.blobs((1, 512, 512))\nrun = lambda: noise.elastic_deform(m, seed=0)",
    ),
}

DRIVER = """
import sys; sys.modules["torch"] = None  # NumPy alone: it would be most of what valgrind sees
import numpy as np
from noisyseg_fast import MODULES, timing
r, n = np.random.default_rng(0), {n}
{code}
{runs}
"""

LINE = re.compile(r"^\s*([0-9a-f]+):\t(\S+)\s*(.*)$")


def disassembly(module: Path) -> dict[int, tuple[str, str]]:
    """address -> (mnemonic, operands)"""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", module], capture_output=True, text=True, check=True
    ).stdout
    return {int(m[1], 16): (m[2], m[3]) for m in map(LINE.match, text.splitlines()) if m}


def executed(profile: Path, module: str) -> Counter[int]:
    """How often each instruction of that object ran."""
    counts: Counter[int] = Counter()
    inside = called = False
    for line in profile.read_text().splitlines():
        if line.startswith("ob="):
            inside = module in line
        elif line.startswith("calls="):
            called = True  # the next line is the callee's cost
        elif line.startswith("0x"):
            if inside and not called:
                address, *_, cost = line.split()
                counts[int(address, 16)] += int(cost)
            called = False
    return counts


def kind(mnemonic: str, operands: str) -> str:
    """What an instruction is to the mix."""
    if "%zmm" in operands or "%ymm" in operands:
        return "256 bits"
    if re.match(r"v?(div|sqrt)[ps]|i?div", mnemonic):
        return (
            "scalar divisions and roots"
            if mnemonic.endswith(("ss", "sd")) or mnemonic[-3:] == "div"
            else "128 bits"
        )
    if "%xmm" in operands:
        return "scalar float" if mnemonic.endswith(("ss", "sd")) else "128 bits"
    if mnemonic.startswith("j") or mnemonic in ("call", "ret"):
        return "jumps"
    return "integer, addresses and loads"


def measure(name: str, module: Path, code: dict[int, tuple[str, str]]) -> dict[str, Any]:
    """Of the second of two runs: the difference of a profile with two and one with one."""
    element, n, body = CASES[name]
    totals = []
    with tempfile.TemporaryDirectory() as folder:
        for runs in (1, 2):
            profile = Path(folder) / f"{runs}.out"
            names = ["distance", "labels", "losses", "metrics", "noise", "pixels", "weight_nets"]
            used = ", ".join(x for x in names if f"{x}." in body)
            driver = DRIVER.replace("MODULES", used).format(n=n, code=body, runs="run()\n" * runs)
            tool = [
                "valgrind",
                "--tool=callgrind",
                "--dump-instr=yes",
                "--compress-strings=no",
                "--compress-pos=no",
            ]
            command = [*tool, f"--callgrind-out-file={profile}", sys.executable, "-c", driver]
            environment = {
                "PATH": "/usr/bin:/bin",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "HOME": folder,
            }
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            totals.append(executed(profile, module.name))
    once = totals[1] - totals[0]
    mix: Counter[str] = Counter()
    for address, count in once.items():
        mix[kind(*code.get(address, ("?", "")))] += count
    total = sum(mix.values())
    return {
        "operation": name,
        "element": element,
        "elements": n,
        "instructions_per_element": total / n,
        "divisions_and_roots_per_element": sum(
            c for a, c in once.items() if re.match(r"v?(div|sqrt)|i?div", code.get(a, ("?", ""))[0])
        )
        / n,
        "mix": {k: v / total for k, v in mix.most_common()},
    }


def main() -> int:
    missing = [tool for tool in ("valgrind", "objdump") if not shutil.which(tool)]
    if missing:
        print(f"bench.instructions: {' and '.join(missing)} not found", file=sys.stderr)
        return 2
    from noisyseg_fast import _core

    module = Path(_core.__file__)
    code = disassembly(module)
    rows = []
    for name in CASES:
        rows.append(measure(name, module, code))
        print(json.dumps(rows[-1]), flush=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
