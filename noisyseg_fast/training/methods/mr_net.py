"""MR-Net: Ji, Yu, Wu, Ma, Bian, Bi, Li, Liu, Cheng and Zheng, "Learning Calibrated Medical Image Segmentation via
Multi-rater Agreement Modeling", CVPR 2021; public code: github.com/jiwei0921/MRNet.

Three modules. EIM (expertise-aware inferring): a vector of the raters' expertness, summing to 1, enters a U-Net at its
deepest level as the state of a convolutional LSTM of one step; the coarse prediction learns the raters' masks averaged
by that vector, which is drawn anew in training: one rater alone, at random, and all alike (terms 1 : 2 : 3). MRM
(multi-rater reconstruction): from image and coarse prediction a second network, with the same vector, reconstructs each
rater's mask; and the coarse prediction is to look to its encoder like the averaged masks. MPM (multi-rater perception):
the spread of the reconstructed masks, an uncertainty map, and the coarse prediction attend to the features that make
the final prediction. Prediction is of the vector in which all raters count alike.

The paper's text was not at hand: the above is from its public code. Ours [OURS]: the networks (theirs: ResNet-34 and
VGG-16 of an ImageNet's width), one optimiser for what they train by three, with gradients stopped at the same places,
cross-entropy and Dice as in all methods compared here (theirs: cross-entropy, `dice_weight=0`), a mean square as the
encoder's distance. Their code stops the gradient of that distance before it reaches anything; here it teaches the
coarse prediction's network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..branches import BranchedUNet, cut, pad
from ._raters import OwnNetwork, frozen, masks, one_vs_rest, present, segmentation_loss
from .base import Batch, Losses, register

KINDS = (3 / 6, 2 / 6, 1 / 6)  # weights of the losses under the three vectors: all alike, random, one rater


@dataclass(frozen=True)
class Config:
    reconstruction: float = 0.3  # weight of the encoder's distance; the coarse prediction's loss has the rest
    dice_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.reconstruction < 1:
            raise ValueError(f"reconstruction must be at least 0 and below 1, got {self.reconstruction}")
        if not 0 <= self.dice_weight < math.inf:
            raise ValueError(f"dice_weight must be finite and not negative, got {self.dice_weight}")


class Parts(NamedTuple):
    coarse: Tensor  # (B, C, *S) logits
    raters: Tensor  # (B, M, C, *S) logits of each rater's mask
    final: Tensor  # (B, C, *S) logits


def _convolution(dims: int, inputs: int, outputs: int) -> nn.Module:
    kind: Any = nn.Conv2d if dims == 2 else nn.Conv3d
    module: nn.Module = kind(inputs, outputs, 3, padding=1)
    return module


class Expertness(nn.Module):
    """EIM's cell: features (B, C, *s) become the new state of a convolutional LSTM that knew the expertness (B, M)."""

    def __init__(self, dims: int, channels: int, raters: int) -> None:
        super().__init__()
        self.state = _convolution(dims, raters, channels)
        self.gates = _convolution(dims, 2 * channels, 4 * channels)

    def forward(self, features: Tensor, expertness: Tensor) -> Tensor:
        spread = expertness.reshape(*expertness.shape, *(1,) * (features.ndim - 2))
        state = self.state(spread.expand(-1, -1, *features.shape[2:]))
        take, keep, show, new = self.gates(torch.cat([features, state], 1)).chunk(4, 1)
        cell = keep.sigmoid() * state + take.sigmoid() * new.tanh()
        shown: Tensor = show.sigmoid() * cell.tanh()
        return shown


class Perception(nn.Module):
    """MPM: attention maps (B, 2 K, *S) in [0, 1] on features (B, 2 width, *S/2) -> logits (B, C, *S)."""

    gauss: Tensor

    def __init__(self, dims: int, width: int, maps: int, outputs: int) -> None:
        from monai.networks.blocks import Convolution
        from monai.networks.layers import gaussian_1d

        super().__init__()
        self.features = nn.Sequential(
            Convolution(dims, 2 * width, width, strides=2, is_transposed=True),
            Convolution(dims, width, width),
            Convolution(dims, width, width),
        )
        # About theirs: 31 pixels are 8 standard deviations. Made once: MONAI's GaussianFilter makes it in each step.
        self.register_buffer("gauss", gaussian_1d(torch.tensor(4.0), truncated=4.0), persistent=False)
        self.dims = dims
        self.last = _convolution(dims, maps * width, outputs)

    def forward(self, features: Tensor, maps: Tensor) -> Tensor:
        fine = self.features(features)
        blurred, convolve = maps, F.conv2d if self.dims == 2 else F.conv3d
        for axis in range(self.dims):  # MONAI's separable_filtering copies numbers from the host
            shape = [1] * self.dims
            shape[axis] = -1
            weight = self.gauss.to(maps.dtype).view(1, 1, *shape).expand(maps.shape[1], 1, *(-1,) * self.dims)
            blurred = convolve(blurred, weight, padding="same", groups=maps.shape[1])
        flat = blurred.flatten(2)
        low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
        scaled = ((flat - low) / (high - low + 1e-8)).reshape(maps.shape)
        attention = torch.maximum(scaled, maps)
        seen = [fine * (1 + attention[:, i : i + 1]) for i in range(maps.shape[1])]
        logits: Tensor = self.last(torch.cat(seen, 1))
        return logits


class Network(nn.Module):
    def __init__(self, dims: int, inputs: int, outputs: int, width: int, raters: int) -> None:
        super().__init__()
        classes = max(1, outputs - 1)
        deepest = width << 4
        self.coarse = BranchedUNet(dims, inputs, outputs, width, 1)
        self.coarse_expertness = Expertness(dims, deepest, raters)
        self.raters = BranchedUNet(dims, inputs + classes, outputs, width, raters)
        self.raters_expertness = Expertness(dims, deepest, raters)
        self.perception = Perception(dims, width, 2 * classes, outputs)

    def predictors(self) -> list[nn.Module]:
        return [self.coarse, self.raters, self.perception]

    def forward(self, image: Tensor, expertness: Tensor) -> Parts:
        """image (B, channels, *S), expertness (B, M) summing to 1. No gradient crosses from one module to another."""
        levels = self.coarse.encode(image)
        levels = [*levels[:-1], self.coarse_expertness(levels[-1], expertness)]
        features = self.coarse.features(levels)
        last: Any = self.coarse.decoders[0]
        coarse = cut(last[-1](features), image)
        found = one_vs_rest(coarse).float().sigmoid().detach()  # (B, K, *S)
        below = self.raters.encode(torch.cat([image, found], 1))
        drawn = cut(self.raters.decode([*below[:-1], self.raters_expertness(below[-1], expertness)]), image)
        each = one_vs_rest(drawn.detach().flatten(0, 1)).float().sigmoid().unflatten(0, drawn.shape[:2])
        spread = each.std(1, correction=0)  # theirs divides by M - 1
        final = cut(self.perception(features.detach(), pad(torch.cat([found, spread], 1))), image)
        return Parts(coarse, drawn, final)


@register("mr_net")
class MRNet(OwnNetwork):
    """A vector of the raters' expertness steers a U-Net; what they disagree on is looked at again.

    Raters who did not draw
    an image have no expertness there, and their reconstructed masks learn nothing [OURS; theirs always has six].
    """

    Config = Config
    make = Network
    network: Network

    def vectors(self, there: Tensor) -> Tensor:
        """(3, B, M): the expertness of all alike, at random, and of one rater; 0 for those who did not draw (B, M)."""
        # From torch's own generator, whose state checkpoints keep, wherever the images are.
        random = (
            torch.randint(1, 11, there.shape).to(there.device, torch.float32) * there
        )  # 1 to 10: their code
        one = torch.rand(there.shape).to(there.device).masked_fill(~there, -1).argmax(1)
        three = torch.stack(
            [there.float(), random, (torch.arange(there.shape[1], device=one.device) == one[:, None]).float()]
        )
        return three / three.sum(2, keepdim=True)

    def training_step(self, batch: Batch, step: int) -> Losses:
        image, raters = batch["image"], batch["raters"]
        there, classes = present(raters), max(1, self.channels - 1)
        drawn = masks(raters, classes).to(image.dtype)  # (B, K, M, *S)
        vectors = self.vectors(there)
        weight = vectors.reshape(*vectors.shape[:2], 1, -1, *(1,) * (image.ndim - 2))
        averaged = (weight * drawn).sum(3).flatten(0, 1)  # (3 B, K, *S)
        found = self.network(image.repeat(3, *(1,) * (image.ndim - 1)), vectors.flatten(0, 1))

        def averaged_loss(logits: Tensor) -> Tensor:
            each = self._loss(logits, averaged).reshape(3, -1).mean(1)
            return torch.stack([k * e for k, e in zip(KINDS, each.unbind(), strict=True)]).sum()

        coarse, final = averaged_loss(found.coarse), averaged_loss(found.final)
        own = drawn.transpose(1, 2).repeat(3, *(1,) * (drawn.ndim - 1))
        each = self._loss(found.raters.flatten(0, 1), own.flatten(0, 1))
        counted = there.repeat(3, 1).flatten()
        reconstructed = (each * counted).sum() / counted.sum()
        alike = slice(len(image))
        distance = self.distance(image, found.coarse[alike], averaged[alike])
        share = self.config.reconstruction
        loss = (1 - share) * coarse + share * distance + reconstructed + final
        parts = {"coarse": coarse, "distance": distance, "raters": reconstructed, "final": final}
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def distance(self, image: Tensor, coarse: Tensor, averaged: Tensor) -> Tensor:
        """How differently the reconstruction's encoder sees the coarse prediction and the averaged masks; it learns
        nothing by it."""
        with frozen(self.network.raters.encoder):
            pairs = zip(
                self.network.raters.encode(torch.cat([image, one_vs_rest(coarse).sigmoid()], 1)),
                self.network.raters.encode(torch.cat([image, averaged], 1)),
                strict=True,
            )
            return torch.stack([(a - b).square().mean() for a, b in pairs]).mean()

    def _loss(self, logits: Tensor, soft: Tensor) -> Tensor:
        """(B,): logits (B, C, *S) against soft masks (B, K, *S)."""
        return segmentation_loss(
            one_vs_rest(logits), soft, "sigmoid", dice_weight=self.config.dice_weight, reduction="image"
        )

    def forward(self, image: Tensor) -> Tensor:
        alike = image.new_full((len(image), self.count), 1 / self.count)
        final: Tensor = self.network(image, alike).final
        return final
