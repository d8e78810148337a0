"""A run that is interrupted and resumed, for the tests of what must come out the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from noisyseg_fast.training import engine, model


def whole_and_cut(run, folder, monkeypatch, after=2):
    """The run as a whole, in folder/whole, and stopped after so many epochs and resumed, in folder/cut.

    Returns the first one's Result, and both method states of last.pt.
    """
    whole = engine.train(replace(run, out=str(folder / "whole")), report=False)
    save = engine._Loop.save_last

    def save_and_stop(self):
        save(self)
        if self.epoch == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._Loop, "save_last", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            engine.train(replace(run, out=str(folder / "cut")), report=False)
    engine.train(engine.read_config(folder / "cut"), resume=True, report=False)
    return whole, *(model.read_checkpoint(folder / part / "last.pt")["method"] for part in ("whole", "cut"))
