"""The peers' own test files against our drop-ins, taken from the installed packages.

Of those that we replace, SciPy's wheel alone ships its tests; MedPy's, MONAI's and torchmetrics' hold none, and neither
do their source archives (0.5.2, 1.6.1, 1.9.0). What they do ship are the examples in their docstrings. docs/drop-ins.md
has the counts; tests/test_compat*.py compares with these packages on much more.
"""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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


# ---- the examples in the peers' docstrings ----------------------------------------------------------
# Each docstring runs twice, the second time with ours in the place of theirs, and both must print the same: some of
# MedPy's and MONAI's examples do not give what they say.
Swap = Callable[[pytest.MonkeyPatch], None]


def monai_classes(patch: pytest.MonkeyPatch) -> None:
    from noisyseg_fast.compat import monai as ours

    for module, name in (
        ("monai.losses.dice", "DiceLoss"),
        ("monai.losses", "FocalLoss"),
        ("monai.losses.hausdorff_loss", "HausdorffDTLoss"),
    ):
        patch.setattr(importlib.import_module(module), name, getattr(ours, name))


def scipy_function(patch: pytest.MonkeyPatch) -> None:
    from noisyseg_fast.compat.scipy import distance_transform_edt

    patch.setattr("scipy.ndimage.distance_transform_edt", distance_transform_edt)


def medpy_functions(patch: pytest.MonkeyPatch) -> None:
    from noisyseg_fast.compat import medpy as ours

    for name in ("asd", "ravd"):
        patch.setattr(f"medpy.metric.binary.{name}", getattr(ours, name))


def torchmetrics_functions(patch: pytest.MonkeyPatch) -> None:
    """What one writes with our functions, in torchmetrics' signatures."""
    import noisyseg_fast
    from noisyseg_fast.compat.scipy import distance_transform_edt

    def hausdorff_distance(preds: Any, target: Any, num_classes: int) -> Any:
        return noisyseg_fast.surface_metrics(preds[:, 1:], target[:, 1:], spatial_dims=2).hd.float()

    def dice_score(preds: Any, target: Any, num_classes: int, average: str, **more: str) -> Any:
        labels = {"num_classes": num_classes} if more.get("input_format") == "index" else {}
        tp, fp, fn, _ = noisyseg_fast.confusion(preds, target, spatial_dims=2, **labels)
        if more.get("aggregation_level") == "global":
            tp, fp, fn = (x.sum(0, keepdim=True) for x in (tp, fp, fn))
        if average == "micro":
            tp, fp, fn = (x.sum(1) for x in (tp, fp, fn))
        dice = 2 * tp / (2 * tp + fp + fn)
        return dice.mean(1) if average == "macro" else dice

    module = "torchmetrics.functional.segmentation"
    patch.setattr(f"{module}.hausdorff_distance", hausdorff_distance)
    patch.setattr(f"{module}.dice_score", dice_score)
    patch.setattr(
        f"{module}.utils.distance_transform", lambda x: distance_transform_edt(x, float64_distances=False)
    )


def torchmetrics_classes(patch: pytest.MonkeyPatch) -> None:
    from noisyseg_fast.compat.torchmetrics import SurfaceMetric

    class HausdorffDistance(SurfaceMetric):
        def __init__(self, num_classes: int, distance_metric: str) -> None:
            super().__init__(num_classes - 1, metric="hd", average=True, options={"spatial_dims": 2})

        def forward(self, preds: Any, target: Any) -> Any:
            return super().forward(preds[:, 1:], target[:, 1:]).float()

    patch.setattr("torchmetrics.segmentation.HausdorffDistance", HausdorffDistance)


def said(owner: Any, torch: Any) -> list[str]:
    """What each of a docstring's examples prints, errors included."""
    found: list[str] = []

    class Runner(doctest.DocTestRunner):
        def report_success(self, out: Any, test: Any, example: Any, got: str) -> None:
            found.append(re.sub(r"np\.float64\((.*?)\)", r"\1", got))

        def report_failure(self, out: Any, test: Any, example: Any, got: str) -> None:
            self.report_success(out, test, example, got)

        def report_unexpected_exception(self, out: Any, test: Any, example: Any, info: Any) -> None:
            self.report_success(out, test, example, f"{info[0].__name__}: {info[1]}")

    torch.manual_seed(42)
    Runner().run(parsed(owner), clear_globs=False)
    return found


def parsed(owner: Any) -> doctest.DocTest:
    names = {**vars(sys.modules[owner.__module__]), "np": np}
    return doctest.DocTestParser().get_doctest(owner.__doc__, names, owner.__qualname__, None, 0)


def both(module: str, name: str, swap: Swap) -> tuple[list[str], list[str], int]:
    """Theirs, ours, and how many of the examples say what must come out."""
    torch = pytest.importorskip("torch")
    owner: Any = pytest.importorskip(module)
    for part in name.split("."):
        owner = getattr(owner, part)
    theirs = said(owner, torch)
    with pytest.MonkeyPatch.context() as patch:
        swap(patch)
        ours = said(owner, torch)
    return theirs, ours, sum(bool(e.want) or "assert" in e.source for e in parsed(owner).examples)


@pytest.mark.parametrize(
    ("module", "name", "swap", "checks"),
    [
        ("scipy.ndimage", "distance_transform_edt", scipy_function, 5),
        ("medpy.metric.binary", "asd", medpy_functions, 4),
        ("medpy.metric.binary", "ravd", medpy_functions, 5),
        ("monai.losses", "HausdorffDTLoss.forward", monai_classes, 1),
        ("torchmetrics.functional.segmentation", "hausdorff_distance", torchmetrics_functions, 1),
        ("torchmetrics.functional.segmentation", "dice_score", torchmetrics_functions, 6),
        ("torchmetrics.functional.segmentation.utils", "distance_transform", torchmetrics_functions, 1),
        ("torchmetrics.segmentation", "HausdorffDistance", torchmetrics_classes, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_examples_of_the_peers(module: str, name: str, swap: Swap, checks: int) -> None:
    theirs, ours, checked = both(module, name, swap)
    assert ours == theirs
    assert checked == checks
    # MONAI's example asks for one value for each pixel and class, and gets one for each class, from MONAI too.
    assert bool([text for text in ours if "Error" in text]) == (name == "HausdorffDTLoss.forward")


@pytest.mark.parametrize(("name", "checks"), [("DiceLoss.forward", 1), ("FocalLoss", 2)])
def test_monais_examples_with_what_ours_refuses(name: str, checks: int) -> None:
    """The class of ours says so; under patch_monai they run."""
    from noisyseg_fast.compat.monai import patch_monai

    theirs, ours, checked = both("monai.losses", name, monai_classes)
    refused = next(b for a, b in zip(theirs, ours, strict=True) if a != b)
    assert refused.startswith("NotImplementedError") and "use monai.losses" in refused
    with patch_monai():
        theirs, patched, _ = both("monai.losses", name, lambda patch: None)
    assert patched == theirs and checked == checks
    assert not [text for text in theirs if "Error" in text]


def test_a_wrong_answer_would_be_seen() -> None:
    def wrong(patch: pytest.MonkeyPatch) -> None:
        patch.setattr("medpy.metric.binary.ravd", lambda a, b: 0.25)

    theirs, ours, _ = both("medpy.metric.binary", "ravd", wrong)
    assert ours != theirs
