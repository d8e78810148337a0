"""Meta corrupted pixels mining (Wang et al., MICCAI 2020): a mask net weighs each pixel by the losses around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import weight_nets
from ._weighted import Learned, Virtual
from .base import register


@dataclass(frozen=True)
class Config(Virtual):
    """The paper has no code and leaves much open; what follows "ours" is our choice.

    The network's optimiser, its lr (alpha, 1e-4 in the paper) and the schedule are the engine's; Theta's lr falls as
    the engine's does (the paper's fall together, too). Ours: Adam for Theta, whose gradient carries the factor alpha,
    so that eq. 4 as plain descent with beta = 1e-3 would not move it; a meta batch as large as the batch; ReLU, zeros
    around the map, a sigmoid at the output, no normalisation of L or R (sec. 3.2 names none).
    """

    channels: int = 16  # of each of the two convolutions; ours
    meta_lr: float = 1e-3  # beta, sec. 4.2
    meta_weight_decay: float = 0.0  # none is named


@register("mcpm")
class MCPM(Learned):
    """Pixel weights from a small network on the loss map, which learns from clean cases."""

    Config = Config

    def make_weigher(self) -> torch.nn.Module:
        # The network's own convolutions say whether it works on planes or volumes.
        dims = next(p.ndim - 2 for p in self.network.parameters() if p.ndim > 2)
        return weight_nets.MaskNet(dims, self.config.channels)
