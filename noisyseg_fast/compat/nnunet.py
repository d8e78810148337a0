"""Our losses and methods as trainer classes of nnU-Net v2 (2.6 or newer), which finds them by

    export nnUNet_extTrainer=$(python -m noisyseg_fast.compat.nnunet)
    nnUNetv2_train 501 2d 0 -tr nnUNetTrainerNRDice

Prediction needs the variable too. The classes stand in nnunet_trainers/noisyseg_trainers.py; whatever they do not say
is nnU-Net's own: plans, augmentation, optimiser, schedule, deep supervision, checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).with_name("nnunet_trainers")  # what nnUNet_extTrainer names


class Loss(torch.nn.Module):
    """One of our losses, called as nnU-Net calls its own.

    function: (logits, target, *, activation, mask) -> a scalar. ignore_label: nnU-Net's, None for none. forward takes
    logits (B, C, *S) and target: class numbers (B, 1, *S) for softmax; with regions (sigmoid) their masks (B, C, *S),
    and one more channel that is 1 where pixels are ignored if there is an ignore label.
    """

    def __init__(
        self, function: Callable[..., Any], regions: bool = False, ignore_label: int | None = None
    ) -> None:
        super().__init__()
        self.function, self.regions, self.ignore_label = function, regions, ignore_label

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        mask = None
        if self.regions:
            if self.ignore_label is not None:
                target, mask = target[:, :-1], target[:, -1] == 0
            target = target.to(logits.dtype)
        else:
            target = target[:, 0].to(torch.int64)
            if self.ignore_label is not None:
                mask = target != self.ignore_label
                target = torch.where(mask, target, 0)
        activation = "sigmoid" if self.regions else "softmax"
        result: Tensor = self.function(logits, target, activation=activation, mask=mask)
        return result


if __name__ == "__main__":
    print(FOLDER)
