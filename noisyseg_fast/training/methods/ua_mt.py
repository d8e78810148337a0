"""Uncertainty-aware mean teacher (Yu et al., MICCAI 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ramps
from ..pixels import class_probabilities
from . import mean_teacher
from .base import register


@dataclass(frozen=True)
class Config(mean_teacher.Config):
    passes: int = 8  # of the teacher, for the uncertainty; the paper's T
    start: float = 0.75  # of the largest entropy: where the threshold starts; it ends at 1


@register("ua_mt")
class UAMT(mean_teacher.MeanTeacher):
    """Mean teacher that counts only where several noisy passes of the teacher are certain."""

    Config = Config

    def target(self, image: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        threshold = self.config.start + (1 - self.config.start) * ramps.gaussian(step, self.plan.steps)
        return self.teach(image), self.uncertainty(image) < threshold

    @torch.no_grad()
    def uncertainty(self, image: Tensor) -> Tensor:
        """Entropy (B, *S) of the mean prediction, divided by its largest value ln C (UA-MT's code and
        SSL4MIS keep ln 2 for any C). Dropout is on where the network has any."""
        passes = (class_probabilities(self.teach(image)) for _ in range(self.config.passes))
        mean = torch.stack(list(passes)).mean(0)
        return torch.special.entr(mean).sum(1) / math.log(mean.shape[1])
