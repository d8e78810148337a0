"""Training on a GPU: no step of any method makes the host wait."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
sys.path.insert(0, str(Path(__file__).parents[1]))

from steps import build, everything, step  # noqa: E402

from noisyseg_fast.training import methods  # noqa: E402


def synchronisations(work):
    """The messages of the synchronising calls that CUDA sees in work()."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in seen if "synchroniz" in str(w.message)]


def test_synchronisations_are_seen():
    x = torch.ones(3, device="cuda")
    assert len(synchronisations(lambda: x.sum().item())) == 1
    assert not synchronisations(lambda: x.sum() * 2)


@pytest.mark.parametrize("name", methods.METHODS)
@pytest.mark.parametrize("classes", [2, 3])
def test_no_step_waits_for_the_device(name, classes):
    batch, method = everything("cuda", classes), build(name, "cuda", classes)
    for number in (0, 1, 12, 19):  # cuDNN's and our own first times
        step(method, batch, number)
    for number in (2, 12, 19):
        found = synchronisations(lambda: step(method, batch, number))  # noqa: B023
        assert not found, f"{name}, step {number}: {len(found)}, first {found[0]}"
