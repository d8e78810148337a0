"""Meta-Weight-Net (Shu et al., NeurIPS 2019) as published for classification: one weight for each image."""

from __future__ import annotations

from torch import Tensor

from .base import register
from .mwnet import Config, MWNet


@register("mwnet_image")
class MWNetImage(MWNet):
    """Image weights from a function of each image's mean loss, which learns from clean cases."""

    Config = Config

    def weigh(self, loss_map: Tensor) -> Tensor:
        of_image: Tensor = self.weigher(loss_map.detach().flatten(1).mean(1))
        return of_image.reshape(-1, *[1] * (loss_map.ndim - 1)).expand_as(loss_map)
