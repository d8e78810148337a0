"""Self-Calib: Wu, Fang, Wang, Yang, Yang, Shang, Zhou and Xu, "Learning self-calibrated optic disc and cup segmentation
from multi-rater annotations", MICCAI 2022 (arXiv 2206.05092).

Two networks in turn, three times for each image. The converging model (ConM) segments the image, given maps of each
rater's expertness, at first all alike. The diverging model (DivM) sees the image and that segmentation and says which
rater to believe where: maps p_m in (0, 1), the expertness p_m / sum p. The raters' masks fused by the expertness are
what ConM learns next time, and DivM learns to make them what ConM found, so that segmentation and expertness calibrate
each other. Prediction needs no rater: it runs the same turns and gives ConM's last answer.

The paper's text was not at hand beyond its abstract: the above is from the code published for it and its successor
(github.com/WuJunde/MrPrism), as are three turns and where gradients stop. Ours [OURS]:
- the losses (theirs: SSIM of logits, by a module that is not part of it): cross-entropy and Dice for ConM, as in all
  methods compared here; for DivM, UMA-Net's eq. 2, a Dice loss, against ConM's answer as 0 and 1: as probabilities, it
  is what the raters' average gives already, and nothing is calibrated;
- a warm-up; one optimiser step after the three turns (theirs: one after each);
- both U-Nets, and how expertness enters ConM: its features on each level are multiplied by 1 + a convolution of the
  maps (theirs attends to them on each level of the decoder).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..branches import LEVELS, BranchedUNet, cut, pad
from ._raters import OwnNetwork, masks, one_vs_rest, present, segmentation_loss
from .base import Batch, Losses, register


@dataclass(frozen=True)
class Config:
    turns: int = 3
    # Share of the run in which ConM learns the raters' average in every turn [OURS]: what DivM makes of a segmentation
    # that has not yet found the object leads both away from it.
    warmup: float = 0.3
    # Weight of a loss that makes p_m follow rater m's masks; their code: 0.3. It turns the expertness to whoever draws
    # the object: a rater who draws it everywhere came out as the expert of the background.
    shuffle: float = 0.0

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ValueError(f"turns must be at least 1, got {self.turns}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a share between 0 and 1, got {self.warmup}")
        if not 0 <= self.shuffle < math.inf:
            raise ValueError(f"shuffle must be finite and not negative, got {self.shuffle}")


class Network(nn.Module):
    rowwise = ("converge", "diverge")  # parallel.py

    def __init__(self, dims: int, inputs: int, outputs: int, width: int, raters: int) -> None:
        super().__init__()
        convolution: Any = nn.Conv2d if dims == 2 else nn.Conv3d
        classes = max(1, outputs - 1)
        self.converging = BranchedUNet(dims, inputs, outputs, width, 1)
        self.expertness = nn.ModuleList(
            convolution(classes * raters, width << level, 3, padding=1) for level in range(LEVELS)
        )
        self.diverging = BranchedUNet(dims, inputs + classes, outputs, width, raters)

    def predictors(self) -> list[nn.Module]:
        return [self.converging, self.diverging]

    def converge(self, levels: list[Tensor], expertness: Tensor) -> Tensor:
        """ConM: the encoder's features and expertness (B, K, M, *S) -> logits (B, C, *S)."""
        maps = pad(expertness.flatten(1, 2))
        pool: Any = F.adaptive_avg_pool2d if maps.ndim == 4 else F.adaptive_avg_pool3d
        seen = [
            level * (1 + part(pool(maps, level.shape[2:])))
            for level, part in zip(levels, self.expertness, strict=True)
        ]
        return cut(self.converging.decode(seen)[:, 0], expertness[:, 0])

    def diverge(self, image: Tensor, found: Tensor) -> Tensor:
        """DivM: image and segmentation (B, K, *S) in (0, 1) -> ln p (B, K, M, *S)."""
        logits = self.diverging(torch.cat([image, found], 1))  # (B, M, C, *S)
        each = F.logsigmoid(one_vs_rest(logits.flatten(0, 1)).float())
        result: Tensor = each.unflatten(0, logits.shape[:2]).transpose(1, 2)
        return result


@register("self_calib")
class SelfCalib(OwnNetwork):
    """One network segments by the raters' expertness, the other finds their expertness by the segmentation.

    Raters who did not draw
    an image have no part in its fused masks [OURS].
    """

    Config = Config
    make = Network
    network: Network

    def alike(self, image: Tensor) -> Tensor:
        """The expertness (B, K, M, *S) that one begins with."""
        shape = (len(image), max(1, self.channels - 1), self.count, *image.shape[2:])
        return image.new_full(shape, 1 / self.count)

    def training_step(self, batch: Batch, step: int) -> Losses:
        image, raters = batch["image"], batch["raters"]
        drawn = masks(raters, max(1, self.channels - 1)).to(image.dtype)  # (B, K, M, *S)
        there = present(raters).reshape(len(raters), 1, -1, *(1,) * (raters.ndim - 2))
        levels, given = self.network.converging.encode(image), self.alike(image)
        wanted = drawn.sum(2) / there.sum(2)
        converging, diverging, shuffled = [], [], []
        for _ in range(self.config.turns):
            logits = one_vs_rest(self.network.converge(levels, given))
            converging.append(segmentation_loss(logits, wanted, "sigmoid"))
            found = logits.float().sigmoid().detach()
            log_p = self.network.diverge(image, found)
            share = log_p.masked_fill(~there, -math.inf).softmax(2)  # p / sum p
            fused = (share * drawn).sum(2)
            diverging.append(_dice(fused, (found > 0.5).to(fused)))
            shuffled.append(self._shuffled(log_p, share, drawn, there))
            given = expertness(log_p).detach()
            if step >= self.config.warmup * self.plan.steps:
                wanted = fused.detach()
        con, div, shuffle = (torch.stack(terms).mean() for terms in (converging, diverging, shuffled))
        parts = {"converging": con, "diverging": div, "shuffled": shuffle}
        loss = con + div + self.config.shuffle * shuffle
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def _shuffled(self, log_p: Tensor, share: Tensor, drawn: Tensor, there: Tensor) -> Tensor:
        """The cross-entropy of p and the masks, both in another order of the raters and times the expertness."""
        order = torch.randperm(self.count).to(
            log_p.device
        )  # torch's own generator, whose state checkpoints keep
        log_p, drawn = log_p[:, :, order], drawn[:, :, order]
        product, wanted = log_p.exp() * share, drawn * share.detach()
        log_product = log_p + share.clamp(min=1e-30).log()
        each = -wanted * log_product - (1 - wanted) * torch.log1p(-product.clamp(max=1 - 1e-6))
        both = (there & there[:, :, order]).expand_as(each)
        return (each * both).sum() / both.sum().clamp(min=1)

    def forward(self, image: Tensor) -> Tensor:
        levels, given = self.network.converging.encode(image), self.alike(image)
        for turn in range(self.config.turns):
            logits = self.network.converge(levels, given)
            if turn + 1 < self.config.turns:
                given = expertness(self.network.diverge(image, one_vs_rest(logits).float().sigmoid()))
        return logits


def expertness(log_p: Tensor) -> Tensor:
    """What ConM is given of ln p (B, K, M, *S): p times p / sum p."""
    return log_p.exp() * log_p.softmax(2)


def _dice(a: Tensor, b: Tensor) -> Tensor:
    """UMA-Net's eq. 2 between maps (B, K, *S)."""
    a, b = a.flatten(2), b.flatten(2)
    apart = (a - b).square().sum(2) / (a.square().sum(2) + b.square().sum(2) + 1e-5)
    return apart.mean()
