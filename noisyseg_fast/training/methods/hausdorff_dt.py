"""Hausdorff distance by distance transforms (Karimi and Salcudean, IEEE TMI 2020).

The paper's text was not at hand: alpha and the balance of both losses are as it is cited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..pixels import class_probabilities
from ..shapes import FIELDS, hausdorff_dt_loss
from ._signed import choose
from .base import Batch, Losses, MakeNetwork, Method, register
from .plain import segmentation_loss
from .several import each_class


@dataclass(frozen=True)
class Config:
    loss: str = "dice"  # of the region, any plain one; the paper's
    alpha: float = 2.0  # of the distances; the paper's best
    field: str = "hard"  # the paper's; soft: the prediction's distances have a gradient, too
    weight: float = 1.0  # of the Hausdorff loss: beside the region's once they are balanced
    # balance: the Hausdorff loss is divided by how many times larger than the region's it was in the epoch before (the
    # paper multiplies the region's by that); in the first epoch, in the step itself (ours). constant: by nothing.
    schedule: str = "balance"

    def __post_init__(self) -> None:
        choose("field", self.field, FIELDS)
        choose("schedule", self.schedule, ("balance", "constant"))
        if not self.alpha >= 1:
            raise ValueError(f"alpha must be at least 1, got {self.alpha}")


@register("hausdorff_dt")
class HausdorffDT(Method):
    """A region loss, and errors weighed by how far they are from the boundaries of label and prediction."""

    Config = Config
    sparse = True

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        self.register_buffer("sums", torch.zeros(2))  # of both losses in this epoch: Hausdorff, region
        self.register_buffer("before", torch.zeros(2))  # in the last one
        self.sums: torch.Tensor
        self.before: torch.Tensor

    def training_step(self, batch: Batch, step: int) -> Losses:
        logits, label, config = self(batch["image"]), batch["label"], self.config
        region = segmentation_loss(config.loss, logits, label)
        target, known = each_class(label, logits.shape[1])
        hausdorff = hausdorff_dt_loss(
            class_probabilities(logits)[:, 1:], target, alpha=config.alpha, field=config.field, mask=known
        )
        weight = config.weight
        if config.schedule == "balance":
            now = torch.stack([hausdorff, region]).detach()
            if step % self.plan.steps_per_epoch == 0:
                self.before.copy_(self.sums)
                self.sums.zero_()
            self.sums += now
            large, small = now if step < self.plan.steps_per_epoch else self.before.clone()
            weight = weight * small / large.clamp(min=1e-6)
        return {"loss": region + weight * hausdorff, "region": region, "hausdorff": hausdorff}
