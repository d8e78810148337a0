"""What the methods with several networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import MISSING


def ensemble(logits: Sequence[Tensor]) -> Tensor:
    """Logits (B, C, *S) of the mean of the networks' probabilities."""
    stacked = torch.stack(list(logits)).float()
    if stacked.shape[2] == 1:
        return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)
    return stacked.log_softmax(2).logsumexp(0)


def hard(logits: Tensor) -> Tensor:
    """The label map (B, *S) uint8."""
    return (logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0).to(torch.uint8)


def labelled(label: Tensor) -> Tensor:
    """The pixels (B, *S) that have a label."""
    return label != MISSING


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values; 0 when there are none."""
    return torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)


def each_class(label: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Of each foreground class: where the label is that class (B, F, *S) uint8, and where there is a label (B, F, *S)
    bool. channels: of the network, 1 for two classes."""
    target = torch.stack([label == c for c in range(1, max(2, channels))], 1).to(torch.uint8)
    return target, labelled(label)[:, None].expand_as(target)
