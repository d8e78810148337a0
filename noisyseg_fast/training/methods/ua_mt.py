"""Uncertainty-aware mean teacher (Yu et al., MICCAI 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ramps
from . import mean_teacher
from .base import register


@dataclass(frozen=True)
class Config(mean_teacher.Config):
    passes: int = 8  # of the teacher, for the uncertainty; the paper's T
    start: float = 0.75  # of the largest entropy: where the threshold starts; it ends at 1 (the paper's, too)


@register("ua_mt")
class UAMT(mean_teacher.MeanTeacher):
    """Mean teacher that counts only where several noisy passes of the teacher are certain."""

    Config = Config

    def target(self, image: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        threshold = self.config.start + (1 - self.config.start) * ramps.gaussian(step, self.plan.steps)
        return self.teach(image), self.uncertainty(image, self.config.passes) < threshold
