"""Majority vote over the raters, then ordinary training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ... import labels
from ..data import MISSING
from ._raters import Fused
from .base import Array, register


@dataclass(frozen=True)
class Config:
    # Where several labels have most votes: the "highest", as in the consensus that results are scored against, or
    # the "lowest": foreground where the mean is above 0.5. The papers do not say.
    tie: str = "highest"

    def __post_init__(self) -> None:
        if self.tie not in ("lowest", "highest"):
            raise ValueError(f"tie must be lowest or highest, got {self.tie!r}")


@register("majority_vote")
class MajorityVote(Fused):
    """Each pixel has the label that most raters gave it."""

    Config = Config

    @classmethod
    def fuse(cls, config: Any, raters: Array, classes: int) -> Array:
        fused: Array = labels.majority_vote(
            raters, tie=config.tie, num_classes=classes, missing=MISSING, spatial_dims=raters.ndim - 1
        )
        return fused
