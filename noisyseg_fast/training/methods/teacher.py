"""What the methods with a teacher share: the teacher, the noise on its input, and whom to test."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ema
from ..pixels import class_probabilities
from .base import Batch, Losses, MakeNetwork, Method
from .plain import segmentation_loss


class TeacherMethod(Method):
    """A student, the network, and a teacher, the moving average of its parameters.

    The configuration has: loss, decay, noise, clip, tested.
    """

    sparse = True
    everywhere: ClassVar[bool] = False  # whether the teacher is asked about labelled images, too

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        if config.tested not in ("student", "teacher"):
            raise ValueError(f"tested must be student or teacher, got {config.tested!r}")
        self.teacher = ema.teacher_of(self.network)

    def noisy(self, image: Tensor) -> Tensor:
        """With Gaussian noise, clipped."""
        noise = (torch.randn_like(image) * self.config.noise).clamp(-self.config.clip, self.config.clip)
        result: Tensor = image + noise
        return result

    @torch.no_grad()
    def teach(self, image: Tensor) -> Tensor:
        """The teacher's logits of the image with noise."""
        logits: Tensor = self.teacher(self.noisy(image))
        return logits

    @torch.no_grad()
    def uncertainty(self, image: Tensor, passes: int) -> Tensor:
        """Entropy (B, *S) of the mean of several noisy passes of the teacher, divided by its largest value.
        Dropout is on where the network has any."""
        return entropy(torch.stack([class_probabilities(self.teach(image)) for _ in range(passes)]).mean(0))

    def study(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the labelled images, and the images that the teacher is asked about, with the student's
        logits: all of them, or the unlabelled ones alone where there are any and `everywhere` is not set."""
        image, label = batch["image"], batch["label"]
        alone = "unlabelled" in batch and not self.everywhere
        if "unlabelled" in batch:
            image = torch.cat([image, batch["unlabelled"]])
        logits = self.network(image)
        loss = segmentation_loss(self.config.loss, logits[: len(label)], label)
        return (loss, image[len(label) :], logits[len(label) :]) if alone else (loss, image, logits)

    def training_step(self, batch: Batch, step: int) -> Losses:
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        ema.update(self.teacher, self.network, ema.decay_at(step, self.config.decay))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = (self.network if self.config.tested == "student" else self.teacher)(image)
        return logits


def entropy(probabilities: Tensor) -> Tensor:
    """(B, *S) of (B, C, *S), divided by its largest value ln C (UA-MT's code and SSL4MIS keep ln 2 for any C)."""
    result: Tensor = torch.special.entr(probabilities).sum(1)
    return result / math.log(probabilities.shape[1])
