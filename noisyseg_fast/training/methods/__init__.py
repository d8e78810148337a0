"""Training methods, one short file each; importing this package registers them.

A method's file holds its configuration, a dataclass whose defaults are the paper's, each with its source, and
a Method: the networks it trains and `training_step(batch, step) -> losses`. It knows nothing of devices,
files or loops; engine.py knows nothing of methods.
"""

from __future__ import annotations

import importlib
import pkgutil

from .base import METHODS, Batch, Inputs, Losses, MakeNetwork, Method, Plan, Seen, configure, create, get

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)

__all__ = [
    "METHODS",
    "Batch",
    "Inputs",
    "Losses",
    "MakeNetwork",
    "Method",
    "Plan",
    "Seen",
    "configure",
    "create",
    "get",
]
