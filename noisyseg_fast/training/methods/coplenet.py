"""Adaptive self-ensembling with NR-Dice loss, for COPLE-Net (Wang et al., IEEE TMI 2020, eq. 4-7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import losses
from .. import ema
from ..history import LossHistory
from .base import Batch, Losses, MakeNetwork, register
from .plain import segmentation_loss
from .teacher import TeacherMethod


@dataclass(frozen=True)
class Config:
    loss: str = "nr_dice"  # any plain one; the paper's (eq. 3)
    decay: float = 0.99  # of the teacher, early (sec. III-A)
    decay_late: float = 0.999  # and late (sec. III-A)
    late: float = 0.25  # from this share of the run on; the paper does not say
    percentile: float = 0.9  # beta: of the student's losses (sec. III-A)
    history: int = 100  # in so many steps (K, sec. III-A); until then the teacher always follows
    consistency: float = 0.1  # lambda' (sec. III-A)
    suppressed: float = 0.01  # lambda'' = 0.1 lambda' (sec. III-A)
    adaptive_teacher: bool = True  # eq. 6; False, both: a plain mean teacher (Table III)
    adaptive_student: bool = True  # eq. 7
    as_printed: bool = False  # eq. 7 as printed has the weights of the text the wrong way round
    per_image: bool = False  # decide for each image, not for the batch as eq. 6 and 7 read
    noise: float = 0.1  # standard deviation at both inputs; the paper does not say: UA-MT's
    clip: float = 0.2  # the same
    tested: str = "student"  # which the teacher serves (sec. I); or teacher


@register("coplenet")
class AdaptiveSelfEnsembling(TeacherMethod):
    """NR-Dice, a teacher that skips the student's bad steps, and a student that heeds it only where better."""

    Config = Config
    network_default = ("coplenet", 32)

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        self.history = LossHistory(config.history)
        self.follows: Tensor  # how far the teacher follows the step just done, 0 to 1

    def training_step(self, batch: Batch, step: int) -> Losses:
        config, image, label = self.config, batch["image"], batch["label"]
        student, teacher = self.network(self.noisy(image)), self.teach(image)
        loss = segmentation_loss(config.loss, student, label, reduction="image")
        difference = losses.consistency_loss(
            student, teacher, kind="mae", activation=self.activation, reduction="image"
        )
        with torch.no_grad():
            of_student = loss.detach()
            of_teacher = segmentation_loss(config.loss, teacher, label, reduction="image")
            if not config.per_image:
                of_student, of_teacher = of_student.mean(0, True), of_teacher.mean(0, True)
            # With several decisions, 1 - alpha' in proportion to the images below the threshold.
            below = of_student < self.history.threshold(config.percentile, step)
            self.follows = (below if config.adaptive_teacher else torch.ones_like(below)).float().mean()
            self.history.add(of_student, step)
            heed = of_teacher > of_student if config.as_printed else of_teacher < of_student
            weight = torch.where(heed, config.consistency, config.suppressed)
            if not config.adaptive_student:
                weight = torch.full_like(weight, config.consistency)
        segmentation = loss.mean()
        return {
            "loss": segmentation + (weight * difference).mean(),
            "segmentation": segmentation,
            "consistency": difference.mean(),
            "weight": weight.mean(),
            "follows": self.follows,
        }

    def after_step(self, step: int) -> None:
        config = self.config
        late = step >= config.late * self.plan.steps
        most = ema.decay_at(step, config.decay_late if late else config.decay)
        ema.update(self.teacher, self.network, 1 - (1 - most) * self.follows)
