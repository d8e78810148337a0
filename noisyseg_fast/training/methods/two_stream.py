"""Two streams that learn where they disagree (Min et al. 2018, as the review's section 4.4.2
describes it; without attention modules)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .base import Batch, Losses, MakeNetwork, Method, register
from .plain import segmentation_loss
from .several import ensemble, hard, labelled, mean_over


@dataclass(frozen=True)
class Config:
    warm_up: float = (
        0.1  # share of the run with all pixels, or both would agree on background from the start; ours
    )


@register("two_stream")
class TwoStream(Method):
    """Two networks; pixels on which both predict the same class are left out. Their mean is tested."""

    Config = Config
    sparse = True

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        self.second = make_network()

    def training_step(self, batch: Batch, step: int) -> Losses:
        label = batch["label"]
        logits = [network(batch["image"]) for network in (self.network, self.second)]
        counts = labelled(label)
        if step >= self.config.warm_up * self.plan.steps:
            counts = counts & (hard(logits[0]) != hard(logits[1]))
        one, two = (mean_over(segmentation_loss("ce", z, label, reduction="none"), counts) for z in logits)
        return {"loss": one + two, "disagreement": counts.float().mean()}

    def forward(self, image: Tensor) -> Tensor:
        return ensemble([self.network(image), self.second(image)])
