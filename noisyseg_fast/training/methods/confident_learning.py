"""MTCL: a mean teacher finds wrong labels by confident learning and corrects them (Xu et al., MICCAI 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import losses
from ...pixels import label_errors
from .. import ramps
from ..pixels import class_probabilities
from . import mean_teacher
from .base import Batch, Losses, MakeNetwork, register
from .plain import segmentation_loss
from .several import labelled


@dataclass(frozen=True)
class Config(mean_teacher.Config):
    prune: str = "both"  # which pixels are flagged: both, class or noise_rate (their code)
    correction: str = "hard"  # or smooth, or uncertainty (their code)
    smooth: float = 0.8  # how far smooth corrects (their code)
    passes: int = 6  # of the teacher, for the uncertainty (their code)
    corrected: float = 5.0  # weight of the corrected labels, times the consistency's (their code)


@register("confident_learning")
class ConfidentLearning(mean_teacher.MeanTeacher):
    """Mean teacher whose predictions find and correct wrong labels, beside clean cases where there are any.

    The supervised loss is that of the clean cases (the batch's "meta"). Without any, which the paper does not
    treat, it is that of the given labels, and gives way to the corrected ones as those gain weight.
    """

    Config = Config
    wants = frozenset({"meta"})

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        if config.correction not in ("hard", "smooth", "uncertainty"):
            raise ValueError(f"correction must be hard, smooth or uncertainty, got {config.correction!r}")

    def training_step(self, batch: Batch, step: int) -> Losses:
        config, image, label = self.config, batch["image"], batch["label"]
        clean = batch.get("meta")
        logits = self.network(image if clean is None else torch.cat([image, clean["image"]]))
        noisy = logits[: len(image)]
        ramp = ramps.gaussian(step, config.ramp * self.plan.steps)
        if clean is None:
            given = (1 - ramp) * segmentation_loss(config.loss, noisy, label)
        else:
            given = segmentation_loss(config.loss, logits[len(image) :], clean["label"])
        consistency = losses.consistency_loss(
            noisy, self.teach(image), kind="mse", activation=self.activation
        )
        target, wrong = self.correct(image, label)
        corrected = segmentation_loss(config.loss, noisy, target, mask=labelled(label))
        # Theirs: supervised + consistency weight * (consistency + 5 * corrected), each loss times 0.5.
        weight = config.consistency * ramp
        share = ramp if clean is None else weight * config.corrected
        return {
            "loss": config.loss_weight * (given + share * corrected) + weight * consistency,
            "given": given,
            "corrected": corrected,
            "consistency": consistency,
            "wrong": wrong.float().mean(),
        }

    @torch.no_grad()
    def correct(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The target, labels (B, *S) when hard, else probabilities (B, channels, *S), and the pixels (B, *S)
        whose label was taken for wrong: these move to the teacher's next likely class."""
        p = class_probabilities(self.teacher(image))
        wrong = label_errors(p, label, self.config.prune)
        classes = p.shape[1]
        mine = torch.stack([label == c for c in range(classes)], 1)
        other = torch.where(mine, -1.0, p).argmax(1)
        if self.config.correction == "hard":
            return torch.where(wrong, other.to(label.dtype), label), wrong
        if self.config.correction == "smooth":
            moved = wrong * self.config.smooth
        else:
            moved = wrong * (1 - self.uncertainty(image, self.config.passes))
        other_mine = torch.stack([other == c for c in range(classes)], 1)
        # Their code makes whole numbers of these again, which undoes the correction.
        target = torch.lerp(mine.float(), other_mine.float(), moved[:, None].float())
        return target[:, -1:] if self.activation == "sigmoid" else target, wrong
