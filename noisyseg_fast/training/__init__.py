"""Training segmentation networks on noisy, scarce or disagreeing masks (needs the extra `train`).

    from noisyseg_fast.training import Config, train
    result = train(Config(data="sample", method="nr_dice", noise_rate=0.4, out="runs/nr_dice"))
    print(result.test["dice"])

networks.py, data.py, engine.py, evaluate.py, report.py; methods/ holds one file for each method.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"Config": "engine", "train": "engine", "Result": "engine", "evaluate": "evaluate", "predict": "evaluate"}

__all__ = ["Config", "Result", "evaluate", "predict", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
