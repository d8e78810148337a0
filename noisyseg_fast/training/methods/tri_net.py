"""Tri-network (Zhang et al., MICCAI 2020), as in PyMIC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import ramps
from .base import Batch, Losses, MakeNetwork, Method, register
from .co_teaching import small
from .plain import segmentation_loss
from .several import ensemble, labelled, mean_over


@dataclass(frozen=True)
class Config:
    select: float = 0.9  # share of the pixels that a network is confident of (PyMIC)
    ramp: float = 0.25  # over this share of the run it falls from 1 to that, linearly; PyMIC has steps


@register("tri_net")
class TriNet(Method):
    """Three networks; each learns from the pixels that the other two have a small loss on. The mean is tested."""

    Config = Config
    sparse = True

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        self.others = nn.ModuleList([make_network(), make_network()])

    def training_step(self, batch: Batch, step: int) -> Losses:
        label = batch["label"]
        losses = [
            segmentation_loss("ce", network(batch["image"]), label, reduction="none")
            for network in (self.network, *self.others)
        ]
        ramp = ramps.linear(step, self.config.ramp * self.plan.steps)
        share = 1 - (1 - self.config.select) * ramp
        a, b, c = (small(loss, labelled(label), share) for loss in losses)
        # The others may agree on nothing: mean_over is 0 then, PyMIC's mean NaN.
        parts = [mean_over(loss, chosen) for loss, chosen in zip(losses, (b & c, a & c, a & b), strict=True)]
        return {"loss": parts[0] + parts[1] + parts[2]}

    def forward(self, image: Tensor) -> Tensor:
        return ensemble([network(image) for network in (self.network, *self.others)])
