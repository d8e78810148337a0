"""What the methods ask of a network's answer at each pixel."""

from __future__ import annotations

import torch
from torch import Tensor


def class_probabilities(logits: Tensor) -> Tensor:
    """(B, C, *S) probabilities; of one channel (sigmoid) those of background and foreground, C = 2."""
    logits = logits.float()
    if logits.shape[1] == 1:
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], 1)
    return logits.softmax(1)
