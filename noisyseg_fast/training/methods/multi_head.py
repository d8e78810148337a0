"""One decoder for each rater (as compared with in Ji et al., MR-Net, CVPR 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..branches import BranchedUNet
from ._raters import present, segmentation_loss
from .base import Batch, Inputs, Losses, MakeNetwork, Method, register


@dataclass(frozen=True)
class Config:
    """Nothing to set."""


@register("multi_head")
class MultiHead(Method):
    """Each decoder learns from its rater's masks alone, the encoder from all; the mean of their probabilities
    predicts.

    The network is a U-Net with the blocks of "unet" and the width of the user's, whatever else that is.
    """

    Config = Config
    sparse = True
    needs: ClassVar[frozenset[str]] = frozenset({"raters"})

    def prepare(self, inputs: Inputs, make_network: MakeNetwork, training: bool) -> None:
        dims, width = inputs.spatial_dims, inputs.width
        self.network = BranchedUNet(dims, inputs.channels, self.channels, width, inputs.raters)

    def training_step(self, batch: Batch, step: int) -> Losses:
        raters, logits = batch["raters"], self.network(batch["image"])
        there = present(raters).flatten()
        each = segmentation_loss(
            logits.flatten(0, 1), raters.flatten(0, 1), self.activation, reduction="image"
        )
        return {"loss": (each * there).sum() / there.sum().clamp(min=1)}

    def forward(self, image: Tensor) -> Tensor:
        logits = self.network(image).float()
        if self.activation == "sigmoid":
            # ln of the mean odds: p and 1 - p each as a logarithm, so that nothing rounds to 0 or 1
            return F.logsigmoid(logits).logsumexp(1) - F.logsigmoid(-logits).logsumexp(1)
        return F.log_softmax(logits, 2).logsumexp(1)
