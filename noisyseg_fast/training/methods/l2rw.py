"""Learning to reweight examples (Ren et al., ICML 2018): one weight for each image."""

from __future__ import annotations

from torch import Tensor

from .base import register
from .spatial_reweighting import Config, SpatialReweighting


@register("l2rw")
class L2RW(SpatialReweighting):
    """Image weights made anew in each step: those that help clean cases, the others 0."""

    Config = Config

    def pooled(self, gain: Tensor) -> Tensor:
        # The mean over the image, as its loss is: the weights of all images then sum to the pixels of one.
        return gain.flatten(1).mean(1).reshape(-1, *[1] * (gain.ndim - 1)).expand_as(gain)
