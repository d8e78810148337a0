"""Label update: an ensemble trained on the given labels makes new ones (Wang et al., IEEE TMI 2020, sec. III-E,
after Karimi et al., Medical Image Analysis 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..pixels import class_probabilities
from .base import Batch, Losses, MakeNetwork, Method, register
from .plain import segmentation_loss
from .several import ensemble, hard


@dataclass(frozen=True)
class Config:
    loss: str = "dice"  # any plain one; the paper's
    members: int = 5  # the paper's
    share: float = 0.5  # of the run for the ensemble; the paper does not say
    soft: bool = False  # probabilities as new labels; the paper does not say


@register("label_update")
class LabelUpdate(Method):
    """In the first part of the run several networks learn the labels; in the rest a new one learns theirs."""

    Config = Config
    sparse = True

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        if config.members < 1:
            raise ValueError(f"members must be at least 1, got {config.members}")
        self.members = nn.ModuleList([make_network() for _ in range(config.members)])

    def training_step(self, batch: Batch, step: int) -> Losses:
        image = batch["image"]
        if not self.mature(step):
            parts = [segmentation_loss(self.config.loss, m(image), batch["label"]) for m in self.members]
            return {"loss": torch.stack(parts).sum()}
        with torch.no_grad():
            self.members.eval()
            votes = ensemble([member(image) for member in self.members])
        label = hard(votes)
        if self.config.soft:
            label = class_probabilities(votes)[:, -votes.shape[1] :]
        return {"loss": segmentation_loss(self.config.loss, self.network(image), label)}

    def mature(self, step: int) -> bool:
        return bool(step >= self.config.share * self.plan.steps)
