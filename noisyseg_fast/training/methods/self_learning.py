"""Self-learning with pseudo-labels (Bai et al., MICCAI 2017), with or without a conditional random field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ema, ramps
from ..crf import mean_field
from ..data import MISSING
from ..pixels import class_probabilities
from .base import Batch, Losses, MakeNetwork, Method, register
from .plain import segmentation_loss
from .several import hard, labelled


@dataclass(frozen=True)
class Config:
    loss: str = "ce"  # any plain one; ours
    rounds: int = 3  # of new pseudo-labels, in equal parts of the run after the start; ours
    start: float = 0.25  # share of the run with the given labels alone; the paper trains until convergence
    weight: float = 1.0  # of the pixels with pseudo-labels; ours
    crf: bool = False  # refine the pseudo-labels by the image, as the paper does
    # The CRF's, as crf.mean_field has them. Ours: the paper's is not truncated, and its image not z-scored.
    crf_iterations: int = 5
    crf_radius: int = 0  # of the window, in pixels; 0: 5 in 2D, 2 in 3D
    crf_appearance: float = 3.0  # weight of neighbours of like intensity
    crf_sigma_space: float = 4.0  # how near, in pixels,
    crf_sigma_intensity: float = 0.5  # and how like they are
    crf_smoothness: float = 1.0  # weight of neighbours of any intensity
    crf_sigma_smooth: float = 1.5  # how near those are, in pixels

    def __post_init__(self) -> None:
        try:
            mean_field(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), **self.crf_options())
        except ValueError as error:
            raise ValueError(f"crf_{error}") from None

    def crf_options(self) -> dict[str, Any]:
        """As crf.mean_field names them."""
        values = {name[4:]: value for name, value in vars(self).items() if name.startswith("crf_")}
        return {**values, "radius": self.crf_radius or None}


@register("self_learning")
class SelfLearning(Method):
    """The network of the round before labels the unlabelled images, and the unlabelled pixels of the others."""

    Config = Config
    sparse = True
    wants = frozenset({"unlabelled"})

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        self.labeller = ema.teacher_of(self.network)

    def training_step(self, batch: Batch, step: int) -> Losses:
        image, label = batch["image"], batch["label"]
        if self.round(step) == 0:
            return {"loss": segmentation_loss(self.config.loss, self.network(image), label)}
        if "unlabelled" in batch:
            image = torch.cat([image, batch["unlabelled"]])
            label = torch.cat([label, torch.full_like(label, MISSING)[: len(batch["unlabelled"])]])
        pseudo, given = self.pseudo(image), labelled(label)
        logits = self.network(image)
        weight = torch.where(given, 1.0, self.config.weight)
        loss = segmentation_loss(self.config.loss, logits, torch.where(given, label, pseudo), weight=weight)
        return {"loss": loss}

    @torch.no_grad()
    def pseudo(self, image: Tensor) -> Tensor:
        """The pseudo-labels (B, *S) uint8 of this round."""
        config, logits = self.config, self.labeller.eval()(image)
        if not config.crf:
            return hard(logits)
        refined = mean_field(class_probabilities(logits), image, **config.crf_options())
        return refined.argmax(1).to(torch.uint8)

    def round(self, step: int) -> int:
        """0: the given labels alone; 1 to rounds."""
        begin, rounds = self.config.start * self.plan.steps, int(self.config.rounds)
        if step < begin:
            return 0
        return 1 + min(int(rounds * ramps.linear(step - begin, self.plan.steps - begin)), rounds - 1)

    def after_step(self, step: int) -> None:
        if self.round(step + 1) != self.round(step):
            self.labeller.load_state_dict(self.network.state_dict())
