"""Training segmentation networks on noisy, scarce or disagreeing masks (needs the extra `train`).

    from noisyseg_fast.training import Config, train
    result = train(Config(data="sample", method="nr_dice", noise_rate=0.4, out="runs/nr_dice"))
    print(result.test.dice)

data.py reads, networks.py and methods/ (one file each) are what is trained, engine.py trains, model.py keeps
and runs the result, evaluate.py, predict.py (with windows.py) and report.py use it.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Config", "Result", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # loaded at first use: it imports torch, MONAI and Lightning
        return getattr(importlib.import_module(".engine", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
