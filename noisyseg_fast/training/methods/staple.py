"""STAPLE over the raters (Warfield et al., IEEE TMI 2004), then ordinary training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ... import labels
from ..data import MISSING
from ._raters import Fused
from .base import Array, register


@dataclass(frozen=True)
class Config:
    max_iter: int = 10_000  # these two are labels.staple's
    tol: float = 1e-7


@register("staple")
class STAPLE(Fused):
    """The likeliest label by EM over each rater's error rates, of the whole case (the background counts)."""

    Config = Config

    @classmethod
    def fuse(cls, config: Any, raters: Array, classes: int) -> Array:
        estimate = labels.staple(
            raters,
            max_iter=config.max_iter,
            tol=config.tol,
            num_classes=classes,
            missing=MISSING,
            spatial_dims=raters.ndim - 1,
        )
        fused: Array = estimate.labels
        return fused
