"""Shape-aware semi-supervised segmentation (Li et al., SASSNet, MICCAI 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ramps
from ._adversary import AdversaryMethod
from ._signed import SignedMethod
from .base import Batch, Inputs, Losses, MakeNetwork, register


@dataclass(frozen=True)
class Config:
    """train_gan_sdfloss.py's."""

    distance: float = 0.3  # beta, weight of the mean squared error of the maps
    adversarial: float = 0.01  # largest weight of the adversarial loss
    ramp: float = 1.0  # share of the run over which it rises
    lr: float = 1e-4  # of the discriminator's Adam
    width: int = 64  # of the discriminator's first level
    k: float = 1500.0  # of the inverse transform, to test by
    tested: str = "segmentation"  # distance: by the map, or mean, of both probabilities


class Discriminator(nn.Module):
    """Logits (B, 2) of unlabelled and labelled, for maps (B, F, *S) and their images (B, channels, *S).

    networks/discriminator.py; its average pooling covers what is left of the LA scripts' patch, here of any.
    """

    def __init__(self, spatial_dims: int, maps: int, channels: int, width: int) -> None:
        super().__init__()
        conv: Any = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        dropout: Any = nn.Dropout2d if spatial_dims == 2 else nn.Dropout3d
        self.of_maps = conv(maps, width, 4, stride=2, padding=1)
        self.of_images = conv(channels, width, 4, stride=2, padding=1)
        self.rest = nn.Sequential(
            nn.LeakyReLU(0.2),
            dropout(0.5),
            conv(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            dropout(0.5),
            conv(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            dropout(0.5),
            conv(4 * width, 8 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.classifier = nn.Linear(8 * width, 2)

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < 16:
            raise ValueError(
                f"sassnet needs patches of at least 16 in every direction, got {tuple(images.shape[2:])}"
            )
        x = self.rest(self.of_maps(maps) + self.of_images(images))
        logits: Tensor = self.classifier(x.flatten(2).mean(2))
        return logits


@register("sassnet")
class SASSNet(SignedMethod, AdversaryMethod):
    """A signed distance map beside the segmentation, and a discriminator that tells unlabelled images' maps."""

    Config = Config

    def prepare(self, inputs: Inputs, make_network: MakeNetwork, training: bool) -> None:
        self.images: tuple[Tensor, int] | None = None  # of the step just done, and how many have labels
        if training:
            maps = max(1, self.channels - 1)
            told = Discriminator(inputs.spatial_dims, maps, inputs.channels, self.config.width)
            self.oppose(told, self.config.lr)

    def training_step(self, batch: Batch, step: int) -> Losses:
        study = self.study(batch)
        dice, distance = study.dice(), study.distance()
        losses = {
            "loss": dice + self.config.distance * distance,
            "segmentation": dice,
            "distance": distance,
        }
        count = len(study.target)
        self.images = (study.images, count) if len(study.images) > count else None
        if self.images is not None:
            taken = self.judge(study.maps[count:], study.images[count:])
            adversarial = F.cross_entropy(taken, torch.ones_like(taken[:, 0], dtype=torch.long))
            weight = self.config.adversarial * ramps.gaussian(step, self.config.ramp * self.plan.steps)
            losses |= {"loss": losses["loss"] + weight * adversarial, "adversarial": adversarial}
        return losses

    def after_step(self, step: int) -> None:
        """The discriminator's step, on the maps that the network now gives without dropout."""
        if self.images is None:
            return
        images, count = self.images
        self.network.eval()
        with torch.no_grad():
            maps = self.both(images)[1]
        self.network.train()
        self.discriminator.train()
        has_label = (torch.arange(len(images), device=images.device) < count).long()
        said = self.discriminator(maps[:, int(maps.shape[1] > 1) :], images)
        self.correct(F.cross_entropy(said, has_label))
        self.images = None
