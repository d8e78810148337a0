"""Noise-robust Dice loss (Wang et al., COPLE-Net and NR-Dice, IEEE TMI 2020, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

from ... import losses
from .base import Batch, Losses, Method, register


@dataclass(frozen=True)
class Config:
    gamma: float = 1.5  # best of 1.0-2.0 in the paper's Fig. 4; 2 is Dice loss, 1 is MAE-like
    denominator: str = "squared"  # the paper's eq. 3; "linear" is PyMIC's code


@register("nr_dice")
class NRDice(Method):
    """sum |p-g|^gamma / (sum p^2 + sum g^2), averaged over images and foreground classes."""

    Config = Config

    def training_step(self, batch: Batch, step: int) -> Losses:
        loss = losses.nr_dice_loss(
            self(batch["image"]),
            batch["label"],
            gamma=self.config.gamma,
            activation=self.activation,
            denominator=self.config.denominator,
            include_background=self.activation == "sigmoid",  # with one channel there is only foreground
        )
        return {"loss": loss}
