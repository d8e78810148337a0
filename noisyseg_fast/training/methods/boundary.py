"""Boundary loss (Kervadec et al., MIDL 2019; Medical Image Analysis 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...distance import signed_distance_map
from ...losses import boundary_loss
from ._signed import choose
from .base import Batch, Losses, MakeNetwork, Method, register
from .plain import segmentation_loss
from .several import labelled


@dataclass(frozen=True)
class Config:
    loss: str = "dice"  # of the region, any plain one; the paper has generalised Dice
    weight: float = 0.01  # alpha, of the boundary loss in the first epoch; theirs
    rise: float = 0.01  # of alpha in each epoch; theirs
    schedule: str = "rebalance"  # 1 - alpha for the region; increase: always 1; constant: 1 and `weight`
    floor: float = 0.1  # the region's least weight (scheduler.py, StealWeight)


@register("boundary")
class Boundary(Method):
    """A region loss, and more and more of the boundary loss: probability times distance to the label's boundary."""

    Config = Config

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        choose("schedule", config.schedule, ("rebalance", "increase", "constant"))
        super().__init__(config, make_network, channels)

    def weights(self, step: int) -> tuple[float, float]:
        """Of the region and of the boundary loss."""
        config = self.config
        rise = 0.0 if config.schedule == "constant" else step // self.plan.steps_per_epoch * config.rise
        fall = config.weight + rise if config.schedule == "rebalance" else 0.0
        return max(config.floor, 1 - fall), config.weight + rise

    def training_step(self, batch: Batch, step: int) -> Losses:
        logits, label = self(batch["image"]), batch["label"]
        region = segmentation_loss(self.config.loss, logits, label)
        boundary = boundary_loss(
            logits,
            distances(label, logits.shape[1]),
            activation=self.activation,
            include_background=self.activation == "sigmoid",
            mask=labelled(label),
        )
        of_region, of_boundary = self.weights(step)
        return {
            "loss": of_region * region + of_boundary * boundary,
            "region": region,
            "boundary": boundary,
        }


def distances(label: Tensor, channels: int) -> Tensor:
    """(B, channels, *S) in pixels, negative inside each class; 0 where an image has one class alone."""
    result: Tensor = signed_distance_map(
        label if channels > 1 else (label == 1)[:, None],
        spatial_dims=label.ndim - 1,
        convention="kervadec",
        num_classes=channels if channels > 1 else None,
    )
    return result
