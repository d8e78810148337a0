"""What the methods have in common that weigh each label by what a step on it would do to clean cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import meta
from .base import Batch, Losses, MakeNetwork, Method

VIRTUAL = ("sgd", "real")


@dataclass(frozen=True)
class Virtual:
    """The step that is tried before the real one."""

    # "sgd": plain, with the engine's current lr (MCPM eq. 3 and Mirikharaji et al. as printed; MW-Net.py:204-211);
    # "real": the engine's own, with its moments: the step that will in fact be made.
    virtual: str = "sgd"
    warmup: int = 0  # steps of plain cross-entropy before any weighing; the papers have none
    recompute: bool = False  # a second forward pass, in place of the memory that the first one's graph takes

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")
        if self.virtual not in VIRTUAL:
            raise ValueError(f"unknown virtual {self.virtual!r}; choose from {', '.join(VIRTUAL)}")


class Weighted(Method):
    """Training on weighted pixels: L (B, *S) the cross-entropy of each pixel, R (B, *S) its weight."""

    needs: ClassVar[frozenset[str]] = frozenset({"meta"})

    def look_ahead(self, batch: Batch, R: Any, keep_graph: bool) -> meta.MetaGradient:
        """The gradient of the clean cases' mean cross-entropy after the virtual step with respect to each weight.

        R: a function of L, or None: at R = 0.
        """
        optimizer = self.plan.optimizer
        update: Any = optimizer.param_groups[0]["lr"] if self.config.virtual == "sgd" else optimizer
        clean = batch["meta"]
        return meta.pixel_meta_gradient(
            self.network,
            batch["image"],
            batch["label"],
            R,
            clean["image"],
            clean["label"],
            update,
            keep_graph=keep_graph,
        )

    def training_step(self, batch: Batch, step: int) -> Losses:
        if step < self.config.warmup:
            plain = meta.cross_entropy_map(self(batch["image"]), batch["label"]).mean()
            return {"loss": plain}
        return self.weighted_step(batch)

    def weighted_step(self, batch: Batch) -> Losses:
        """The losses of a step after the warm-up."""
        raise NotImplementedError

    def loss_map(self, batch: Batch, ahead: meta.MetaGradient) -> Tensor:
        """L with its graph, for the real step."""
        if not self.config.recompute:
            kept: Tensor = ahead.loss_map
            return kept
        return meta.cross_entropy_map(self(batch["image"]), batch["label"])


class Learned(Weighted):
    """R = V(L; Theta), where Theta follows the meta-gradient. One step (MCPM eq. 3-5, MWNet's Algorithm 1): R of
    the present Theta, Theta's step, R of the new Theta, the network's step."""

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        super().__init__(config, make_network, channels)
        self.weigher = self.make_weigher()
        self.optimizers["weigher"] = torch.optim.Adam(
            self.weigher.parameters(), lr=config.meta_lr, weight_decay=config.meta_weight_decay
        )

    def make_weigher(self) -> torch.nn.Module:
        """V"""
        raise NotImplementedError

    def weigh(self, loss_map: Tensor) -> Tensor:
        """R (B, *S) of L (B, *S). L's own gradient ends here: R is a constant to the network (MCPM eq. 3)."""
        weights: Tensor = self.weigher(loss_map.detach())
        return weights

    def weighted_step(self, batch: Batch) -> Losses:
        ahead = self.look_ahead(batch, self.weigh, keep_graph=not self.config.recompute)
        optimizer = self.optimizers["weigher"]
        optimizer.zero_grad()
        assert ahead.objective is not None
        ahead.objective.backward()
        optimizer.step()
        L = self.loss_map(batch, ahead)
        with torch.no_grad():
            R = self.weigh(L)
        return {"loss": (R * L).mean(), "clean_loss": ahead.meta_loss, "mean_weight": R.mean()}

    @torch.no_grad()
    def pixel_weights(self, batch: Batch) -> Tensor:
        return self.weigh(meta.cross_entropy_map(self(batch["image"]), batch["label"]))
