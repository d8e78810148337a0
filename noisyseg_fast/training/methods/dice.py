"""Dice loss (Milletari et al., V-Net, 3DV 2016; COPLE-Net paper eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

from ... import losses
from .base import Batch, Losses, Method, register


@dataclass(frozen=True)
class Config:
    denominator: str = "squared"  # Milletari's: sum p^2 + sum g^2; "linear" is Sorensen's


@register("dice")
class Dice(Method):
    """1 - Dice overlap, averaged over images and foreground classes."""

    Config = Config

    def training_step(self, batch: Batch, step: int) -> Losses:
        loss = losses.dice_loss(
            self(batch["image"]),
            batch["label"],
            activation=self.activation,
            denominator=self.config.denominator,
            include_background=self.activation == "sigmoid",  # with one channel there is only foreground
        )
        return {"loss": loss}
