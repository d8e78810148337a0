"""What the methods with signed distance maps share: the maps of labels, the inverse transform, whom to test.

Two classes have one channel, as in the papers. With more, each foreground class has its own map and is taken
against the rest, by the log-odds of its probability. Pixels without a label (255) count in no term.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...distance import signed_distance_map
from ...losses import dice_loss
from ...task_losses import DualTaskTerms, dual_task_loss
from ..networks import TwoHeads
from .base import Batch, MakeNetwork, Method
from .several import each_class, ensemble, mean_over

TESTED = ("segmentation", "distance", "mean")


def choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless the value is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


class Study(NamedTuple):
    """A batch, its unlabelled images last; F foreground classes."""

    images: Tensor  # (B + U, channels, *S)
    odds: Tensor  # (B + U, F, *S) logits of each class against the rest
    maps: Tensor  # (B + U, F, *S) signed distance, negative inside
    target: Tensor  # (B, F, *S) uint8, 1 where the label is that class
    known: Tensor  # (B, F, *S) bool, where there is a label

    def labelled(self, x: Tensor) -> Tensor:
        return x[: len(self.target)]

    def dual_task(self, k: float, routing: str = "own") -> DualTaskTerms:
        """The segmentation and mask losses of the labelled images, the consistency of all."""
        one = (0, 0) * (self.target.ndim - 1)
        rest = len(self.odds) - len(self.target)
        terms: DualTaskTerms = dual_task_loss(
            _fold(self.odds),
            _fold(self.maps),
            F.pad(self.target, (*one, 0, rest)).flatten(0, 1),
            k=k,
            labelled=self.target.shape[0] * self.target.shape[1],
            routing=routing,
            mask=F.pad(self.known, (*one, 0, rest), value=True).flatten(0, 1),
        )
        return terms

    def dice(self) -> Tensor:
        """The Dice loss of the labelled images, its sums over the batch as in the public code."""
        target, known = self.target.flatten(0, 1), self.known.flatten(0, 1)
        loss: Tensor = dice_loss(_fold(self.labelled(self.odds)), target, per_image=False, mask=known)
        return loss

    def distance(self, kind: str = "l2", convention: str = "dtc") -> Tensor:
        """How far the labelled images' maps are from those of their labels: mean squared or absolute difference.

        convention: of `signed_distance_map`. Where an image has none of a class its map is 1, where it has nothing
        else -1.

        The labels' maps are made anew in each step. Maps kept for each case would have to be flipped and turned as the
        image was, where the crop is the whole image, which takes a third of the time of making them; and that is
        under 0.5 % of a step: 0.12 s of 26 s for 2 crops of 112x112x80 and a V-Net of width 4 on one busy core.
        """
        expected = signed_distance_map(
            self.target,
            spatial_dims=self.target.ndim - 2,
            convention=convention,
            normalize=convention != "dtc",
        )
        difference = self.labelled(self.maps) - expected
        return mean_over(difference.square() if kind == "l2" else difference.abs(), self.known)


def _fold(x: Tensor) -> Tensor:
    """(B, F, *S) as (B F, 1, *S)."""
    return x.flatten(0, 1)[:, None]


def odds(logits: Tensor) -> Tensor:
    """(B, F, *S) logits of each foreground class against the rest."""
    channels = logits.shape[1]
    if channels == 1:
        return logits
    others = [torch.cat([logits[:, :c], logits[:, c + 1 :]], 1).logsumexp(1) for c in range(1, channels)]
    return logits[:, 1:] - torch.stack(others, 1)


class SignedMethod(Method):
    """One network with two heads, for the segmentation and for the map.

    The configuration has: k, of the inverse transform sigmoid(-k z), and tested.
    """

    wants = frozenset({"unlabelled"})
    network_default = ("vnet", 16)
    heads = 2

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        choose("tested", config.tested, TESTED)
        if not config.k > 0:
            raise ValueError(f"k must be positive, got {config.k}")
        make = make_network if self.heads == 1 else lambda: TwoHeads(make_network(2))
        super().__init__(config, make, channels)

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and maps (B, channels, *S)."""
        logits, maps = self.network(image)
        return logits, maps

    def study(self, batch: Batch) -> Study:
        image, label = batch["image"], batch["label"]
        images = torch.cat([image, batch["unlabelled"]]) if "unlabelled" in batch else image
        logits, maps = self.both(images)
        first = int(logits.shape[1] > 1)  # the background's map is not used
        target, known = each_class(label, logits.shape[1])
        return Study(images, odds(logits), maps[:, first:], target, known)

    def forward(self, image: Tensor) -> Tensor:
        logits, maps = self.both(image)
        if self.config.tested == "segmentation":
            return logits
        of_maps = -self.config.k * maps
        if of_maps.shape[1] > 1:
            of_maps = torch.cat([torch.zeros_like(of_maps[:, :1]), of_maps[:, 1:]], 1)
        return of_maps if self.config.tested == "distance" else ensemble([logits, of_maps])
