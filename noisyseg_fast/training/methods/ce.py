"""Cross-entropy, the baseline: every pixel's label is believed."""

from __future__ import annotations

from dataclasses import dataclass

from ... import losses
from .base import Batch, Losses, Method, register


@dataclass(frozen=True)
class Config:
    """Nothing to set."""


@register("ce")
class CE(Method):
    """Mean cross-entropy over pixels (binary with one output channel)."""

    Config = Config

    def training_step(self, batch: Batch, step: int) -> Losses:
        logits = self(batch["image"])
        return {"loss": losses.pixel_loss(logits, batch["label"], kind="ce", activation=self.activation)}
