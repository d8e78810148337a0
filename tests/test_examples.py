"""The programs in examples/ as a user would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("torch", "monai", "rich", "scipy", "medpy"):
    pytest.importorskip(package)
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_monai_program_runs_unchanged() -> None:
    """The same losses and scores, from our kernels."""
    program = "examples/train_with_monai.py"
    said = [run(*how, program, "32") for how in ((), ("-m", "noisyseg_fast.compat.monai"))]
    theirs, ours = ([float(x) for x in re.findall(r"(?:loss|Dice|HD95) ([\d.]+)", text)] for text in said)
    assert len(theirs) == len(ours) == 6
    assert ours[:4] == pytest.approx(theirs[:4], rel=1e-5)
    assert ours[4:] == pytest.approx(theirs[4:], abs=1e-3)  # after four steps of rounding


def test_drop_ins_agree_with_their_peers() -> None:
    text = run("examples/drop_ins.py", "--quick")
    assert text.count("x ") >= 20 and "not installed" not in text
    for name in ("hd95", "compute_surface_dice", "GeneralizedDiceLoss", "sampling"):
        assert name in text
