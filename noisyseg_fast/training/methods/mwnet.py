"""Meta-Weight-Net (Shu et al., NeurIPS 2019), pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import weight_nets
from ._weighted import Learned, Virtual
from .base import register


@dataclass(frozen=True)
class Config(Virtual):
    """The values of the authors' MW-Net.py, whose weights are not normalised."""

    hidden: int = 100  # MW-Net.py and the paper's sec. 3
    meta_lr: float = 1e-3  # Adam, MW-Net.py:274
    meta_weight_decay: float = 1e-4  # MW-Net.py:274


@register("mwnet")
class MWNet(Learned):
    """Pixel weights from a function of each pixel's loss alone, which learns from clean cases."""

    Config = Config

    def make_weigher(self) -> torch.nn.Module:
        return weight_nets.MWNet(self.config.hidden)
