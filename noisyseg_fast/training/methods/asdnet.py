"""Attention-based semi-supervised deep networks (Nie et al., ASDNet, MICCAI 2018).

There is no public code, and of the paper only the abstract and the review's section 4.4.2 were at hand: a fully
convolutional confidence network tells, pixel by pixel, labels from predictions, and is to be misled; where it takes an
unlabelled image's prediction for a label, the prediction is believed (region attention); images that are hard weigh
more (sample attention). What they leave open follows the twin method with code, AdvSemiSeg (Hung et al., BMVC 2018,
train.py), or is ours: the confidence network gives a map as large as the image, by three strided and three
transposed convolutions; it sees the probabilities alone; the exponent of the sample attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pixels import class_probabilities
from ._adversary import AdversaryMethod
from .base import Batch, Inputs, Losses, MakeNetwork, register
from .plain import segmentation_loss
from .several import hard, labelled, mean_over


@dataclass(frozen=True)
class Config:
    """AdvSemiSeg's, unless it says otherwise."""

    loss: str = "ce_dice"  # any plain one; ours
    attention: float = 1.0  # an image weighs (1 - its Dice)^attention, 0: all alike; ours
    adversarial: float = 0.01  # weight of misleading the confidence network
    semi: float = 0.1  # weight of the unlabelled images' trusted pixels
    start: float = 0.25  # share of the run before which no pixel is trusted: 5000 of 20000 steps
    threshold: float = 0.2  # of the confidence from which a pixel is trusted
    lr: float = 1e-4  # of the confidence network's Adam
    width: int = 64  # of its first level


class ConfidenceNetwork(nn.Module):
    """Logits (B, 1, *S) that the maps (B, C, *S), C class probabilities, are a label there."""

    def __init__(self, spatial_dims: int, classes: int, width: int) -> None:
        super().__init__()
        flat = spatial_dims == 2
        conv: Any = nn.Conv2d if flat else nn.Conv3d
        up: Any = nn.ConvTranspose2d if flat else nn.ConvTranspose3d
        widths = [classes, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [conv(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after in ((4 * width, 2 * width), (2 * width, width)):
            layers += [up(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, up(width, 1, 4, stride=2, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        if any(side % 8 for side in maps.shape[2:]):
            raise ValueError(
                f"asdnet needs patches whose sides are multiples of 8, got {tuple(maps.shape[2:])}"
            )
        logits: Tensor = self.layers(maps)
        return logits


@register("asdnet")
class ASDNet(AdversaryMethod):
    """A confidence network to mislead, which says what of unlabelled images' predictions is to be believed."""

    Config = Config
    wants = frozenset({"unlabelled"})
    sparse = True

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        if not 0 <= config.threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, got {config.threshold}")
        self.shown: tuple[Tensor, Tensor] | None = None  # probabilities of the step just done, and its labels

    def prepare(self, inputs: Inputs, make_network: MakeNetwork, training: bool) -> None:
        if training:
            network = ConfidenceNetwork(inputs.spatial_dims, max(2, self.channels), self.config.width)
            self.oppose(network, self.config.lr)

    def training_step(self, batch: Batch, step: int) -> Losses:
        config, image, label = self.config, batch["image"], batch["label"]
        count = len(image)
        if "unlabelled" in batch:
            image = torch.cat([image, batch["unlabelled"]])
        logits = self.network(image)
        given = segmentation_loss(config.loss, logits[:count], label, reduction="image")
        with torch.no_grad():
            hardness = segmentation_loss("dice", logits[:count], label, reduction="image").clamp(0, 1)
        segmentation = (hardness**config.attention * given).mean()
        probabilities = class_probabilities(logits)
        self.shown = probabilities.detach(), label
        confidence = self.judge(probabilities)
        adversarial = -F.logsigmoid(confidence).mean()
        losses = {
            "loss": segmentation + config.adversarial * adversarial,
            "segmentation": segmentation,
            "adversarial": adversarial,
        }
        if count < len(image) and step >= config.start * self.plan.steps:
            trusted = confidence[count:, 0].detach().sigmoid() >= config.threshold
            believed = hard(logits[count:].detach())
            semi = segmentation_loss(config.loss, logits[count:], believed, mask=trusted)
            losses |= {
                "loss": losses["loss"] + config.semi * semi,
                "semi": semi,
                "trusted": trusted.float().mean(),
            }
        return losses

    def after_step(self, step: int) -> None:
        """The confidence network's step: labels are 1, predictions 0; pixels without a label do not count."""
        assert self.shown is not None
        predicted, label = self.shown
        known = labelled(label)
        classes = predicted.shape[1]
        real = torch.stack([label == c for c in range(classes)], 1).to(predicted.dtype)
        # What has no label is shown as predicted, so that no pixel sees anything strange beside it.
        real = torch.where(known[:, None], real, predicted[: len(label)])
        self.discriminator.train()
        of_labels = -F.logsigmoid(self.discriminator(real))[:, 0]
        of_predictions = -F.logsigmoid(-self.discriminator(predicted))
        self.correct(mean_over(of_labels, known) + of_predictions.mean())
        self.shown = None
