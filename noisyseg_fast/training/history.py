"""The losses of the last steps, kept on the device and in the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..pixels import quantile


class LossHistory(nn.Module):
    """The losses of the last `steps` steps: one for each step, or one for each image of its batch."""

    values: Tensor  # (steps, most losses of a step), NaN where there is none

    def __init__(self, steps: int) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"history must be at least 1 step, got {steps}")
        self.steps = steps
        self.register_buffer("values", torch.full((steps, 1), torch.nan))

    def add(self, losses: Tensor, step: int) -> None:
        """losses: scalar or (B,), in place of those of `steps` steps ago."""
        losses = losses.detach().float().reshape(-1)
        if len(losses) > self.values.shape[1]:
            wider = (0, len(losses) - self.values.shape[1])
            self.values = nn.functional.pad(self.values, wider, value=torch.nan)
        row = self.values[step % self.steps]
        row.fill_(torch.nan)
        row[: len(losses)] = losses

    def threshold(self, q: float, step: int) -> Tensor:
        """The q-quantile of the losses kept; infinity before there are `steps` steps of them."""
        if step < self.steps:
            return self.values.new_full((), torch.inf)
        found: Tensor = quantile(self.values, q)
        return found

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state.get(prefix + "values")
        if saved is not None and saved.shape[0] == self.steps:  # as wide as the batches were
            self.values = self.values.new_full(saved.shape, torch.nan)
        super()._load_from_state_dict(state, prefix, *args)
