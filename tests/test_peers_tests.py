"""The peers' own test files against our drop-ins, taken from the installed packages.

Of those that we replace, SciPy's wheel alone ships its tests; MedPy's, MONAI's and torchmetrics' hold none, so
nothing of theirs can be run here. tests/test_compat*.py compares with these packages instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
ROOT = Path(__file__).resolve().parent.parent

# Tests of SciPy's that ours does not pass, and why; see compat/scipy.py. Empty: all pass.
DIFFERENT: dict[str, str] = {}

PLUGIN = """
import scipy.ndimage
import scipy._lib._array_api as array_api
from noisyseg_fast.compat import scipy as compat

theirs, calls = scipy.ndimage.distance_transform_edt, []

def distance_transform_edt(*args, **kwargs):
    calls.append(1)
    return OURS

table = getattr(array_api, "xp_capabilities_table", {})
if theirs in table:  # what SciPy's own decorators look the function up in
    table[distance_transform_edt] = table[theirs]
scipy.ndimage.distance_transform_edt = distance_transform_edt

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"calls of ours: {len(calls)}")
"""


def run_scipys(folder: Path, ours: str) -> tuple[dict[str, int], set[str], str]:
    """Outcomes of SciPy's distance_transform_edt tests, the names that failed, what was printed."""
    (folder / "ours_for_scipys.py").write_text(PLUGIN.replace("OURS", ours))
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = (
        "-m pytest -q -rf -p no:cacheprovider -p no:xdist -p ours_for_scipys --pyargs "
        "scipy.ndimage.tests.test_morphology -k distance_transform_edt"
    )
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if "file or directory not found" in done.stderr or "not found" in done.stderr.split("\n")[0]:
        pytest.skip("this SciPy came without its tests")
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = set(re.findall(r"^FAILED \S*::(\w+)", done.stdout, re.M))
    return counts, failed, done.stdout + done.stderr


def test_scipys_tests_of_the_distance_transform(tmp_path: Path) -> None:
    counts, failed, text = run_scipys(tmp_path, "compat.distance_transform_edt(*args, **kwargs)")
    assert failed == set(DIFFERENT), text[-3000:]
    assert counts.get("passed", 0) >= 30 and "error" not in counts, text[-3000:]
    assert int(re.findall(r"calls of ours: (\d+)", text)[0]) >= 40, text[-2000:]


def test_a_wrong_transform_would_fail(tmp_path: Path) -> None:
    _, failed, text = run_scipys(tmp_path, "theirs(*args, **{**kwargs, 'sampling': 3.0})")
    assert len(failed) >= 3, text[-2000:]
