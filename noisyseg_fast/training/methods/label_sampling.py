"""Label sampling (Jensen et al., MICCAI 2019): each image is learned from one rater at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ... import labels
from ..data import MISSING
from ._raters import present, segmentation_loss
from .base import Batch, Losses, Method, register


@dataclass(frozen=True)
class Config:
    """Nothing to set."""


@register("label_sampling")
class LabelSampling(Method):
    """At every step one rater is drawn for each image, with equal chances among those that drew."""

    Config = Config
    sparse = True
    needs: ClassVar[frozenset[str]] = frozenset({"raters"})

    def training_step(self, batch: Batch, step: int) -> Losses:
        raters = batch["raters"]
        there = present(raters)
        # torch's own generator on that device, whose state checkpoints keep
        generator = torch.default_generator
        if raters.is_cuda:
            generator = torch.cuda.default_generators[raters.get_device()]
        label = labels.label_sampling(raters, generator, present=there, spatial_dims=raters.ndim - 2)
        nobody = ~there.any(1)
        label = label.masked_fill(nobody.reshape(-1, *[1] * (label.ndim - 1)), MISSING)
        return {"loss": segmentation_loss(self(batch["image"]), label, self.activation)}
