"""What the methods share in which a second network judges the first one's predictions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Method


class AdversaryMethod(Method):
    """Has a discriminator, which trains by its own Adam in `after_step`, and which prediction does without."""

    discriminator: nn.Module

    def oppose(self, discriminator: nn.Module, lr: float) -> None:
        """For `prepare`."""
        self.discriminator = discriminator
        adam = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=(0.9, 0.99))
        self.optimizers["discriminator"] = adam

    def judge(self, *inputs: Tensor) -> Tensor:
        """What the discriminator says, without dropout; the gradient flows to the inputs alone."""
        self.discriminator.eval().requires_grad_(False)
        said: Tensor = self.discriminator(*inputs)
        self.discriminator.requires_grad_(True)
        return said

    def correct(self, loss: Tensor) -> None:
        """The discriminator's step."""
        optimizer = self.optimizers["discriminator"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def exported(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith("network.")}
