"""Co-teaching (Han et al., NeurIPS 2018), on pixels as in PyMIC or on images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...pixels import quantile
from .. import ramps
from .base import Batch, Losses, MakeNetwork, Method, register
from .plain import segmentation_loss
from .several import labelled, mean_over


@dataclass(frozen=True)
class Config:
    forget: float = 0.2  # tau, the share of wrong labels that is expected; PyMIC keeps 0.8
    epochs: int = 10  # T_k: until so many epochs the share left out rises (Han et al.)
    exponent: float = 1.0  # c, of the epoch in that (Han et al.)
    level: str = "pixel"  # PyMIC: pixels of the whole batch; or image, the paper's
    loss: str = "ce"  # at level image any plain one; at level pixel one without Dice


@register("co_teaching")
class CoTeaching(Method):
    """Two networks; each learns from what has a small loss in the other. The first is tested."""

    Config = Config
    sparse = True

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        if config.level not in ("pixel", "image"):
            raise ValueError(f"level must be pixel or image, got {config.level!r}")
        self.second = make_network()

    def training_step(self, batch: Batch, step: int) -> Losses:
        pixels, label = self.config.level == "pixel", batch["label"]
        counts = labelled(label) if pixels else torch.ones_like(batch["index"], dtype=torch.bool)
        losses = [
            segmentation_loss(
                self.config.loss, network(batch["image"]), label, reduction="none" if pixels else "image"
            )
            for network in (self.network, self.second)
        ]
        first, second = (small(loss, counts, self.kept(step)) for loss in losses)
        one, two = mean_over(losses[0], second), mean_over(losses[1], first)
        return {"loss": one + two, "first": one, "second": two}

    def kept(self, step: int) -> float:
        """R(T) = 1 - tau min(T^c / T_k, 1) of epoch T."""
        epoch = step // self.plan.steps_per_epoch
        return 1 - float(self.config.forget) * ramps.linear(epoch**self.config.exponent, self.config.epochs)


def small(loss: Tensor, counts: Tensor, share: float) -> Tensor:
    """Where the loss is among the smallest, that share of those which count; ties with the last are in."""
    loss = loss.detach()
    chosen: Tensor = counts & (loss <= quantile(loss, share, mask=counts))
    return chosen
