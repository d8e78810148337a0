"""Data re-weighting: images with a large loss are left out (Wang et al., IEEE TMI 2020, sec. III-E, after
Xue et al., ISBI 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..history import LossHistory
from .base import Batch, Losses, MakeNetwork, Method, register
from .plain import segmentation_loss


@dataclass(frozen=True)
class Config:
    loss: str = "dice"  # any plain one; the paper's
    percentile: float = 0.9  # of the images' losses (the paper's)
    history: int = 100  # in so many steps; the paper's. Until then all images count


@register("trimmed")
class Trimmed(Method):
    """Images whose loss exceeds a percentile of the last steps' losses are taken for noisy and left out."""

    Config = Config
    sparse = True

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        self.history = LossHistory(config.history)

    def training_step(self, batch: Batch, step: int) -> Losses:
        loss = segmentation_loss(self.config.loss, self(batch["image"]), batch["label"], reduction="image")
        kept = (loss.detach() <= self.history.threshold(self.config.percentile, step)).float()
        self.history.add(loss, step)
        return {"loss": (loss * kept).sum() / kept.sum().clamp(min=1), "kept": kept.mean()}
