"""Star-shape prior (Mirikharaji and Hamarneh, MICCAI 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from .. import ramps
from ..pixels import class_probabilities
from ..shapes import CENTRES, star_shape_loss
from ._signed import choose
from .base import Batch, Losses, Method, register
from .plain import segmentation_loss
from .several import each_class


@dataclass(frozen=True)
class Config:
    """The authors' code's (star_loss.py, reg_conv.py, find_center.py)."""

    loss: str = "ce"  # any plain one
    weight: float = 40.0  # beta, of the prior
    # Share of the run over which the weight rises; ours. From an untrained network the whole weight leads to a constant
    # prediction, for which the prior is 0, too: measured on 16x16 patches, where a weight of 1 would have fitted them.
    ramp: float = 1.0
    steps: int = 6  # m, pixels towards the centre
    centre: str = "centroid"  # or deepest, for shapes that do not hold their centroid; ours

    def __post_init__(self) -> None:
        choose("centre", self.centre, CENTRES)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@register("star_shape")
class StarShape(Method):
    """A plain loss, and a penalty where the way from an object's pixel to its centre leaves the prediction."""

    Config = Config
    sparse = True

    def training_step(self, batch: Batch, step: int) -> Losses:
        logits, label, config = self(batch["image"]), batch["label"], self.config
        given = segmentation_loss(config.loss, logits, label)
        target, known = each_class(label, logits.shape[1])
        prior = star_shape_loss(
            class_probabilities(logits)[:, 1:], target, steps=config.steps, centre=config.centre, mask=known
        )
        weight = config.weight * ramps.gaussian(step, config.ramp * self.plan.steps)
        return {"loss": given + weight * prior, "given": given, "star": prior}
