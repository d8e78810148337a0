"""Runs that are stopped, killed, or that meet a full disk, a vanished file or a loss that is not finite."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

for package in ("monai", "lightning", "nibabel", "typer"):
    pytest.importorskip(package)
torch = pytest.importorskip("torch")

from folders import nifti_folder  # noqa: E402
from steps import SHORT  # noqa: E402

from noisyseg_fast.training import engine, evaluate, methods, model, signals  # noqa: E402
from noisyseg_fast.training.engine import Config, train  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """8 small images with two raters each, and 2 without labels."""
    root = nifti_folder(tmp_path_factory.mktemp("data") / "set", cases=10, shape=(16, 32))
    (root / "imagesUn").mkdir()
    for i in (8, 9):
        (root / "imagesTr" / f"case{i}_0000.nii.gz").rename(root / "imagesUn" / f"case{i}_0000.nii.gz")
        for path in root.glob(f"labelsTr/case{i}_*"):
            path.unlink()
    return root


@pytest.fixture(scope="module")
def tiny(folder):
    """2 epochs of 3 steps."""
    return Config(
        data=str(folder), width=4, epochs=2, batch_size=2, epoch_batches=3, device="cpu", lr=3e-3,
        meta_fraction=0.2, noise_rate=0.5, network="unet",
    )  # fmt: skip


def of(tiny, name, out):
    return replace(tiny, method=name, options=SHORT.get(name, {}), out=str(out))


def same(a, b, where=""):
    """Equal to the bit, whatever it is made of; else where it is not."""
    if isinstance(a, torch.Tensor):
        assert (
            torch.equal(a, b)
            or (a.isnan() == b.isnan()).all()
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        ), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            same(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}.{i}")
    else:
        assert a == b or a != a and b != b, where


def end(out, name="last.pt"):
    """What a checkpoint holds, but for the times and the folder."""
    state = model.read_checkpoint(Path(out) / name)
    for row in state.get("history", ()):
        del row["seconds"]
    del state["config"]
    state.pop("seconds", None)
    return state


def whole(folder):
    """Every file of a run's folder loads, and nothing is left half written."""
    import csv
    import json

    for path in folder.rglob("*"):
        assert not path.name.startswith(".tmp"), path
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            rows = list(csv.reader(path.read_text().splitlines()))
            assert {len(row) for row in rows} == {len(rows[0])}, path


def signal_in(monkeypatch, number, step, where="_step"):
    """A real signal during that step, or, with "_unless_stopping", at that case of a validation."""
    calls, before = [], getattr(engine._Loop, where)

    def sent(self, *arguments):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return before(self, *arguments)

    monkeypatch.setattr(engine._Loop, where, sent)


# ---- stopped and resumed ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.METHODS)
def test_stopped_within_an_epoch_and_resumed_is_the_same_to_the_bit(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(engine._Loop, "finish", lambda self, *_: None)
    train(of(tiny, name, tmp_path / "whole"), report=False)
    cut = of(tiny, name, tmp_path / "cut")
    for number, step, at in ((signal.SIGTERM, 2, 2), (signal.SIGINT, 3, 2)):  # step 2 and, of those left, 3
        with monkeypatch.context() as patch:
            signal_in(patch, number, step)
            with pytest.raises(signals.Interrupted) as stop:
                train(cut, resume=step > 2, report=False)
        assert stop.value.code == 128 + number
        assert end(tmp_path / "cut")["at"] == at
    torch.rand(7)  # other use of the global generators in between must not matter
    train(engine.read_config(tmp_path / "cut"), resume=True, report=False)
    same(end(tmp_path / "whole"), end(tmp_path / "cut"))
    same(end(tmp_path / "whole", "best.pt"), end(tmp_path / "cut", "best.pt"))
    rows = [(tmp_path / run / "metrics.csv").read_text().splitlines() for run in ("whole", "cut")]
    assert [r.rsplit(",", 1)[0] for r in rows[0]] == [r.rsplit(",", 1)[0] for r in rows[1]]
