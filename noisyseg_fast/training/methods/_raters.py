"""What the methods have in common that learn from several raters' masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import losses
from ..data import MISSING
from .base import Batch, Inputs, Losses, MakeNetwork, Method


def present(raters: Tensor) -> Tensor:
    """(B, M) bool: who drew. raters (B, M, *S) uint8; who did not is MISSING all over."""
    return (raters != MISSING).flatten(2).any(2)


def segmentation_loss(logits: Tensor, label: Tensor, activation: str, **options: Any) -> Tensor:
    """Cross-entropy + Dice, UMA-Net's terms without uncertainty (its eq. 1, 2 and 8), so that what is compared is
    the way from several masks to one. logits (B, C, *S), label (B, *S), MISSING where it does not count, or
    (B, C, *S) soft."""
    loss: Tensor = losses.dice_ce_loss(
        logits,
        label,
        activation=activation,
        include_background=activation == "sigmoid",
        ignore_index=None if label.is_floating_point() else MISSING,
        **options,
    )
    return loss


class Fused(Method):
    """Training on one label that is made of the raters' masks beforehand."""

    needs: ClassVar[frozenset[str]] = frozenset({"raters"})
    sparse = True

    def training_step(self, batch: Batch, step: int) -> Losses:
        return {"loss": segmentation_loss(self(batch["image"]), batch["label"], self.activation)}


class OwnNetwork(Method):
    """A method whose network is its own and knows the raters: `make` with the blocks of "unet" and the width of the
    user's network, whatever else that is."""

    needs: ClassVar[frozenset[str]] = frozenset({"raters"})
    make: ClassVar[type[nn.Module]]  # (spatial_dims, image channels, outputs, width, raters)

    def prepare(self, inputs: Inputs, make_network: MakeNetwork, training: bool) -> None:
        self.count = inputs.raters
        self.network = self.make(
            inputs.spatial_dims, inputs.channels, self.channels, inputs.width, inputs.raters
        )


def one_vs_rest(logits: Tensor) -> Tensor:
    """(B, K, *S): for each foreground class the logit against all others, so that its sigmoid is the class's
    probability: of (B, 1, *S) itself, of C = K + 1 softmax channels z_k - log sum_(j != k) exp z_j."""
    channels = logits.shape[1]
    if channels == 1:
        return logits
    z = logits.float()
    rest = [
        z[:, [j for j in range(channels) if j != k]].logsumexp(1, keepdim=True) for k in range(1, channels)
    ]
    return z[:, 1:] - torch.cat(rest, 1)


def masks(raters: Tensor, classes: int) -> Tensor:
    """(B, K, M, *S) uint8: each rater's mask of each foreground class; 0 where one did not draw."""
    return torch.stack([raters == k for k in range(1, classes + 1)], 1).to(torch.uint8)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, gradients go through the module to what it was given, and not to its parameters."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
