"""Mean teacher (Tarvainen and Valpola, NeurIPS 2017), as UA-MT and SSL4MIS have it for segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ... import losses
from .. import ramps
from .base import Batch, Losses, register
from .teacher import TeacherMethod


@dataclass(frozen=True)
class Config:
    loss: str = "ce_dice"  # any plain one; UA-MT, SSL4MIS
    loss_weight: float = 0.5  # 0.5 (CE + Dice), the same
    consistency: float = 0.1  # the same
    ramp: float = 1.0  # share of the run over which consistency rises; UA-MT: all 6000 steps
    decay: float = 0.99  # of the teacher; the same
    noise: float = 0.1  # standard deviation of the teacher's input noise; the same
    clip: float = 0.2  # it is clipped there; the same
    tested: str = "student"  # or teacher; UA-MT tests the student


@register("mean_teacher")
class MeanTeacher(TeacherMethod):
    """Agree with a moving average of oneself: squared error of the probabilities, on unlabelled images."""

    Config = Config
    wants = frozenset({"unlabelled"})

    def training_step(self, batch: Batch, step: int) -> Losses:
        loss, image, logits = self.study(batch)
        terms = self.compare(image, logits, step)
        weight = self.config.consistency * ramps.gaussian(step, self.config.ramp * self.plan.steps)
        total = self.config.loss_weight * loss + weight * sum(terms.values())
        return {"loss": total, "segmentation": loss, **terms}

    def compare(self, image: Tensor, logits: Tensor, step: int) -> Losses:
        """What the student's logits of the images must agree in with the teacher, and how far they do not."""
        target, certain = self.target(image, step)
        return {
            "consistency": losses.consistency_loss(
                logits, target, kind="mse", activation=self.activation, mask=certain
            )
        }

    def target(self, image: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits, and the pixels (B, *S) where they count, None for all."""
        return self.teach(image), None
