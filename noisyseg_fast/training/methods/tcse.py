"""Transformation-consistent self-ensembling (Li et al., arXiv 1903.00348; IEEE TNNLS 2021, "TCSM v2").

Of the authors' code only a copy of the training script was at hand (train_tcsm_mean.py). The same flips and quarter
turns; scaling by linear interpolation about the centre, and pixels that come from outside the image do not count
(there: cv2, and such pixels are 0 in both). The teacher alone sees transformed images, as there; what is compared is
T(student(x)) with teacher(T(x)), so that nothing is transformed back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ... import losses
from . import mean_teacher
from .base import Losses, register


@dataclass(frozen=True)
class Config(mean_teacher.Config):
    """The script's, and for the segmentation loss mean_teacher's: its class weights are those of skin lesions."""

    consistency: float = 1.0
    ramp: float = 0.75  # 600 of 800 epochs
    decay: float = 0.999
    noise: float = 0.01  # 0.5 grey levels of 255, on images of a standard deviation near 50
    zoom: float = (
        0.1  # scales from 1 - zoom to 1 + zoom; of a derived transforms_for_scale; the paper's is not at hand
    )

    def __post_init__(self) -> None:
        if not 0 <= self.zoom < 1:
            raise ValueError(f"zoom must be at least 0 and below 1, got {self.zoom}")


class Motion(NamedTuple):
    """A transformation T of each image of a batch: flips, then a quarter turn of the first two axes, then a scale."""

    flips: Tensor  # (B, dims) bool
    turn: Tensor  # (B,) bool; images whose first two sides differ are not turned
    scale: Tensor | None  # (B,), about the centre

    def __call__(self, x: Tensor) -> Tensor:
        """T of (B, C, *S), differentiable; 0 comes in from outside."""
        ones = (1,) * (x.ndim - 1)
        for axis in range(x.ndim - 2):
            x = torch.where(self.flips[:, axis].view(-1, *ones), x.flip(2 + axis), x)
        if x.shape[2] == x.shape[3]:
            x = torch.where(self.turn.view(-1, *ones), x.rot90(1, (2, 3)), x)
        return x if self.scale is None else scaled(x, self.scale)

    def inside(self, image: Tensor) -> Tensor | None:
        """The pixels (B, *S) of T(image) that come from within the image; None for all."""
        if self.scale is None:
            return None
        return scaled(torch.ones_like(image[:, :1]), self.scale)[:, 0] > 0.999


def random_motion(image: Tensor, zoom: float) -> Motion:
    """Any of the 8 (in 3D 16) orientations alike, and scales uniform in 1 - zoom to 1 + zoom."""
    count, dims = len(image), image.ndim - 2
    bits = torch.rand(count, dims + 2, device=image.device)
    return Motion(
        bits[:, :dims] < 0.5, bits[:, dims] < 0.5, 1 + zoom * (2 * bits[:, -1] - 1) if zoom else None
    )


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """(B, C, *S) enlarged by scale (B,) about the centre, linearly interpolated. As products with one matrix for each
    axis, whose derivative, unlike torch's interpolation on CUDA, is the same bits on every run."""
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        place = torch.arange(n, device=x.device, dtype=scale.dtype)
        source = (place - (n - 1) / 2) / scale[:, None] + (n - 1) / 2
        weights = (1 - (source[:, :, None] - place).abs()).clamp(min=0)  # (B, to, from)
        moved = x.movedim(axis, -1)
        flat = moved.reshape(len(x), -1, n) @ weights.to(x.dtype).mT
        x = flat.view(moved.shape).movedim(-1, axis)
    return x


@register("tcse")
class TCSE(mean_teacher.MeanTeacher):
    """Mean teacher that sees each image flipped, turned and scaled: the prediction must move with the image."""

    Config = Config
    everywhere = True  # the loss is of labelled and unlabelled images (abstract)

    def compare(self, image: Tensor, logits: Tensor, step: int) -> Losses:
        move = random_motion(image, self.config.zoom)
        return {
            "consistency": losses.consistency_loss(
                move(logits),
                self.teach(move(image)),
                kind="mse",
                activation=self.activation,
                mask=move.inside(image),
            )
        }
