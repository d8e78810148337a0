"""Selective loss for sparse labels, as dots, lines or some slices (Cicek et al., MICCAI 2016; Bokhorst et al.,
MIDL 2019). Unlabelled pixels are 255 in the masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Batch, Losses, Method, register
from .plain import segmentation_loss
from .several import labelled


@dataclass(frozen=True)
class Config:
    balance: str = (
        "batch"  # classes weigh 1 / their pixels in the batch (Bokhorst: better), "image", or "none"
    )


@register("selective")
class Selective(Method):
    """Cross-entropy of the labelled pixels alone, every class with the same say."""

    Config = Config
    sparse = True

    def training_step(self, batch: Batch, step: int) -> Losses:
        logits, label = self(batch["image"]), batch["label"]
        weight = None
        if self.config.balance != "none":
            weight = class_balance(label, max(2, logits.shape[1]), self.config.balance == "image")
        return {"loss": segmentation_loss("ce", logits, label, weight=weight)}


def class_balance(label: Tensor, classes: int, per_image: bool) -> Tensor:
    """Weights (B, *S) that are inversely proportional to the class's labelled pixels in the batch or the image,
    with mean 1 over all the labelled pixels; 0 elsewhere."""
    axes = tuple(range(1, label.dim())) if per_image else tuple(range(label.dim()))
    weight = torch.zeros(label.shape, device=label.device)
    for k in range(classes):
        mine = label == k
        weight = torch.where(mine, 1 / mine.sum(axes, keepdim=True).clamp(min=1), weight)
    return weight * (labelled(label).sum() / weight.sum().clamp(min=1e-30))
