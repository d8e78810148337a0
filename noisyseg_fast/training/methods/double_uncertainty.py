"""Double-uncertainty weighted consistency (Wang et al., MICCAI 2020, arXiv 2010.09298).

There is no public code, and of the paper only the abstract was at hand: a mean teacher with dropout gives the
uncertainty of its segmentation and of its features, among channels; both weigh what student and teacher disagree in,
on labelled and unlabelled images; the consistency loss holds the uncertainty too, which training shall reduce. Ours:

- segmentation: entropy u of the mean of the teacher's passes over its largest value, as UA-MT's; the pixel weighs
  exp(-u), the weight of a Gaussian likelihood (Kendall and Gal 2017);
- features: those that the head makes the segmentation of, before dropout; u_k is the variance of channel k over the
  passes, divided by its mean square, in [0, 1]; the channel weighs exp(-u_k), its squared difference is divided by
  that mean square;
- the uncertainty in the loss is the student's: a teacher that is an average has no gradient to reduce its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import losses
from .. import networks, parallel
from ..pixels import class_probabilities
from . import mean_teacher
from .base import Batch, Losses, register
from .several import ensemble
from .teacher import entropy


@dataclass(frozen=True)
class Config(mean_teacher.Config):
    """UA-MT's."""

    passes: int = 8  # of the teacher; UA-MT
    features: float = 0.1  # weight of the features' consistency beside the segmentation's; ours
    reduction: float = 0.1  # weight of the student's entropy beside it; ours

    def __post_init__(self) -> None:
        if self.passes < 2:
            raise ValueError(f"passes must be at least 2, got {self.passes}")


@register("double_uncertainty")
class DoubleUncertainty(mean_teacher.MeanTeacher):
    """Mean teacher whose word weighs less where its passes, or a channel of its features, vary."""

    Config = Config
    network_default = (
        "vnet",
        16,
    )  # it has dropout; without, the teacher varies by the noise on its input alone
    everywhere = True

    def study(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with last_features(self.network) as seen:
            result = super().study(batch)
        self.seen = seen[-1].float()
        return result

    def compare(self, image: Tensor, logits: Tensor, step: int) -> Losses:
        config, features = self.config, self.seen
        del self.seen  # keeps the graph
        target, mean, square = self.passes(image)
        known = entropy(class_probabilities(target))
        consistency = losses.consistency_loss(
            logits, target, kind="mse", activation=self.activation, weight=(-known).exp()
        )
        axes = tuple(range(2, features.ndim))
        size = square.mean(axes).clamp(min=1e-12)
        uncertain = (square - mean.square()).clamp(min=0).mean(axes) / size
        apart = (features - mean).square().mean(axes) / size
        return {
            "consistency": consistency,
            "features": config.features * ((-uncertain).exp() * apart).mean(),
            "uncertainty": config.reduction * entropy(class_probabilities(logits)).mean(),
        }

    @torch.no_grad()
    def passes(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of several noisy passes of the teacher: logits of the mean probabilities, the mean of the features and
        that of their squares."""
        logits, mean, square = [], torch.zeros(()), torch.zeros(())
        with last_features(self.teacher) as seen:
            for _ in range(self.config.passes):
                logits.append(self.teach(image))
                features = seen.pop().float()
                seen.clear()
                mean, square = mean + features, square + features.square()
        return ensemble(logits), mean / len(logits), square / len(logits)


@contextmanager
def last_features(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what networks.before_head(network) is given while it lasts; the last one are the features."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(parallel.whole(given[0]))

    hook = networks.before_head(network).register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
