"""Self-learning with pseudo-labels (Bai et al., MICCAI 2017), without their conditional random field: MONAI's
needs a compiled extension that its packages do not hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ema, ramps
from ..data import MISSING
from .base import Batch, Losses, MakeNetwork, Method, register
from .plain import segmentation_loss
from .several import hard, labelled


@dataclass(frozen=True)
class Config:
    loss: str = "ce"  # any plain one; ours
    rounds: int = 3  # of new pseudo-labels, in equal parts of the run after the start; ours
    start: float = 0.25  # share of the run with the given labels alone; the paper trains until convergence
    weight: float = 1.0  # of the pixels with pseudo-labels; ours


@register("self_learning")
class SelfLearning(Method):
    """The network of the round before labels the unlabelled images, and the unlabelled pixels of the others."""

    Config = Config
    wants = frozenset({"unlabelled"})

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        self.labeller = ema.teacher_of(self.network)

    def training_step(self, batch: Batch, step: int) -> Losses:
        image, label = batch["image"], batch["label"]
        if self.round(step) == 0:
            return {"loss": segmentation_loss(self.config.loss, self.network(image), label)}
        if "unlabelled" in batch:
            image = torch.cat([image, batch["unlabelled"]])
            label = torch.cat([label, torch.full_like(label, MISSING)[: len(batch["unlabelled"])]])
        with torch.no_grad():
            self.labeller.eval()
            pseudo = hard(self.labeller(image))
        given = labelled(label)
        logits = self.network(image)
        weight = torch.where(given, 1.0, self.config.weight)
        loss = segmentation_loss(self.config.loss, logits, torch.where(given, label, pseudo), weight=weight)
        return {"loss": loss}

    def round(self, step: int) -> int:
        """0: the given labels alone; 1 to rounds."""
        begin, rounds = self.config.start * self.plan.steps, int(self.config.rounds)
        if step < begin:
            return 0
        return 1 + min(int(rounds * ramps.linear(step - begin, self.plan.steps - begin)), rounds - 1)

    def after_step(self, step: int) -> None:
        if self.round(step + 1) != self.round(step):
            self.labeller.load_state_dict(self.network.state_dict())
