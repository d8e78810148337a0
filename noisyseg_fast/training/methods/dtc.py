"""Dual-task consistency (Luo et al., DTC, AAAI 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from .. import ramps
from ._signed import SignedMethod
from .base import Batch, Losses, register


@dataclass(frozen=True)
class Config:
    """train_la_dtc.py's."""

    distance: float = 0.3  # weight of the mean squared error of the maps
    consistency: float = 1.0
    ramp: float = 1.0  # share of the run over which consistency rises
    k: float = 1500.0  # of the inverse transform
    tested: str = "segmentation"  # distance: by the map, or mean, of both probabilities


@register("dtc")
class DTC(SignedMethod):
    """One network with two heads, segmentation and signed distance map, that shall agree on all images."""

    Config = Config

    def training_step(self, batch: Batch, step: int) -> Losses:
        study = self.study(batch)
        dice, distance = study.dice(), study.distance()
        consistency = study.dual_task(self.config.k).consistency
        weight = self.config.consistency * ramps.gaussian(step, self.config.ramp * self.plan.steps)
        return {
            "loss": dice + self.config.distance * distance + weight * consistency,
            "segmentation": dice,
            "distance": distance,
            "consistency": consistency,
        }
