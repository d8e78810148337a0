"""Spatially adaptive reweighting (Mirikharaji, Yan and Hamarneh, MIL3ID 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._weighted import Virtual, Weighted
from .base import Batch, Losses, register


@dataclass(frozen=True)
class Config(Virtual):
    """Nothing else to set: the weights are made anew in each step. The released code (zmirikha/noisy-annotation)
    swaps the clean images and labels and trains on its validation set; only the algorithm is followed."""


@register("spatial_reweighting")
class SpatialReweighting(Weighted):
    """Pixel weights made anew in each step: those that help clean cases, the others 0."""

    Config = Config

    def weighted_step(self, batch: Batch) -> Losses:
        ahead = self.look_ahead(batch, None, keep_graph=not self.config.recompute)
        weights = self.weights(ahead.dR)
        return {"loss": (weights * self.loss_map(batch, ahead)).sum(), "clean_loss": ahead.meta_loss}

    def weights(self, dR: Tensor) -> Tensor:
        """max(0, -dR), divided by its sum over the whole batch; 0 where that is 0."""
        gain = self.pooled(-dR).clamp(min=0)
        total = gain.sum()
        return torch.where(total > 0, gain / total, torch.zeros_like(gain))

    def pooled(self, gain: Tensor) -> Tensor:
        """What decides each pixel's weight (B, *S): what that pixel would win."""
        return gain

    def pixel_weights(self, batch: Batch) -> Tensor:
        weights = self.weights(self.look_ahead(batch, None, keep_graph=False).dR)
        return weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
