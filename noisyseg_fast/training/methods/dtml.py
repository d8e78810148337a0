"""Dual-task mutual learning (Zhang and Zhang, DTML, PRCV 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import ramps
from ._signed import SignedMethod, choose
from .base import Batch, Losses, MakeNetwork, register


@dataclass(frozen=True)
class Config:
    """The paper's. Its public code has consistency 1 and routing shared: 20 times as much in the end."""

    supervision: str = "mask"  # of the map: mask (the best in Table 1), distance, or both, their sum
    distance: str = "l2"  # sec. 3.2; l1: the code, which computes and never uses it
    convention: str = "dtc"  # of the labels' maps: the code's; boundary: eq. 1, divided by its largest value
    consistency: float = 0.1  # lambda (sec. 3.2)
    # Whose gradient the consistency is: own: each network's own (eq. 5 and 6); shared: twice that (the code, which
    # back-propagates both losses through it); logits, sdf: the segmentation's or the map's network alone.
    routing: str = "own"
    ramp: float = 1.0  # share of the run over which consistency rises; the code: all 6000 steps
    ramp_shape: str = "gaussian"  # the code; exponential: sec. 3.2 as printed, without the square
    k: float = 1500.0  # of the inverse transform (the code; eq. 2 has the other sign)
    tested: str = "segmentation"  # the code; distance: by the map, or mean, of both probabilities


RAMPS = {"gaussian": ramps.gaussian, "exponential": ramps.exponential}


@register("dtml")
class DTML(SignedMethod):
    """Two networks, of the segmentation and of its signed distance map, that teach each other on all images."""

    Config = Config
    heads = 1

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        choose("supervision", config.supervision, ("mask", "distance", "both"))
        choose("distance", config.distance, ("l2", "l1"))
        choose("convention", config.convention, ("dtc", "boundary"))
        choose("routing", config.routing, ("own", "shared", "logits", "sdf"))
        choose("ramp_shape", config.ramp_shape, tuple(RAMPS))
        super().__init__(config, make_network, channels)
        self.map_network = make_network()

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(image), self.map_network(image).float().tanh()

    def training_step(self, batch: Batch, step: int) -> Losses:
        config = self.config
        study = self.study(batch)
        segmentation, mask, consistency = study.dual_task(config.k, config.routing)
        supervised = {"mask": mask} if config.supervision != "distance" else {}
        if config.supervision != "mask":
            supervised["distance"] = study.distance(config.distance, config.convention)
        weight = config.consistency * RAMPS[config.ramp_shape](step, config.ramp * self.plan.steps)
        return {
            "loss": segmentation + sum(supervised.values()) + weight * consistency,
            "segmentation": segmentation,
            **supervised,
            "consistency": consistency,
        }

    def forward(self, image: Tensor) -> Tensor:
        if self.config.tested == "segmentation":
            logits: Tensor = self.network(image)
            return logits
        return super().forward(image)
