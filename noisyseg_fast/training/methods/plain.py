"""Training by one loss and nothing else, and the table of these losses, which other methods use by name.

Wang et al. 2020 is COPLE-Net and NR-Dice, IEEE TMI, Table I of which compares most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, field, make_dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ... import losses
from ..data import MISSING
from .base import Batch, Losses, Method, register


class Loss(NamedTuple):
    summary: str
    function: Callable[..., Any]
    fixed: Mapping[str, Any]  # what makes it this loss
    options: Mapping[str, Any]  # with their defaults


LOSSES: dict[str, Loss] = {
    "ce": Loss(
        "Cross-entropy, the baseline: every pixel's label is believed.", losses.pixel_loss, {"kind": "ce"}, {}
    ),
    "focal": Loss(
        "Focal cross-entropy (Lin et al., ICCV 2017): confident pixels weigh less.",
        losses.pixel_loss,
        {"kind": "focal"},
        {"focal_gamma": 2.0},  # Wang et al. 2020 compare 2 and 0.5
    ),
    "mae": Loss(
        "Mean absolute error of the probabilities (Ghosh et al., AAAI 2017; Wang et al. 2020, eq. 2).",
        losses.pixel_loss,
        {"kind": "mae"},
        {},
    ),
    "gce": Loss(
        "Generalised cross-entropy (1 - p^q) / q (Zhang and Sabuncu, NeurIPS 2018).",
        losses.pixel_loss,
        {"kind": "gce"},
        {"q": 0.7},  # Wang et al. 2020; PyMIC's default is 0.5
    ),
    "dice": Loss(
        "Dice loss with squared sums (Milletari et al., V-Net, 3DV 2016; Wang et al. 2020, eq. 1).",
        losses.dice_loss,
        {},
        {"denominator": "squared"},  # "linear" is Sorensen's
    ),
    "sorensen_dice": Loss(
        "Dice loss with plain sums (Sorensen; PyMIC's DiceLoss).",
        losses.dice_loss,
        {"denominator": "linear"},
        {},
    ),
    "focal_dice": Loss(
        "1 - Dice^(1/beta) (Wang and Chung, BrainLes 2018).",
        losses.focal_dice_loss,
        {},
        {"beta": 0.5},  # Wang et al. 2020
    ),
    "ce_dice": Loss(
        "Cross-entropy and Dice loss, summed (Wang et al. 2020, Table I).",
        losses.dice_ce_loss,
        {},
        {"ce_weight": 1.0, "dice_weight": 1.0},  # UA-MT, DTML and SSL4MIS: 0.5 each
    ),
    "mae_dice": Loss(
        "Mean absolute error and Dice loss, summed (Wang et al. 2020, Table I).",
        losses.dice_mae_loss,
        {},
        {"mae_weight": 1.0, "dice_weight": 1.0},
    ),
    "nr_dice": Loss(
        "Noise-robust Dice: sum |p-g|^gamma / (sum p^2 + sum g^2) (Wang et al., TMI 2020, eq. 3).",
        losses.nr_dice_loss,
        {},
        {
            "gamma": 1.5,  # best of 1.0-2.0 in Wang et al. 2020, Fig. 4; 2 is Dice loss, 1 is MAE-like
            "denominator": "squared",  # Wang et al. 2020, eq. 3; "linear" is PyMIC's code
        },
    ),
}


def segmentation_loss(
    name: str,
    logits: Tensor,
    target: Tensor,
    *,
    options: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of that name. Region losses are of each image, and of the foreground classes alone.

    logits (B, C, *S), C = 1 for sigmoid; target (B, *S) class numbers, where the unlabelled pixels (255) are
    left out, or (B, C, *S) soft; reduction "mean", "image" (one value each) or, of pixel losses, "none".
    ValueError for an unknown name.
    """
    try:
        loss = LOSSES[name]
    except KeyError:
        raise ValueError(f"unknown loss {name!r}; choose from {', '.join(LOSSES)}") from None
    activation = "sigmoid" if logits.shape[1] == 1 else "softmax"
    arguments: dict[str, Any] = {**loss.options, **(options or {}), **loss.fixed, "activation": activation}
    if loss.function is not losses.pixel_loss:
        arguments["include_background"] = activation == "sigmoid"  # one channel is foreground alone
    if not target.is_floating_point():
        arguments["ignore_index"] = MISSING
    result: Tensor = loss.function(logits, target, mask=mask, weight=weight, reduction=reduction, **arguments)
    return result


class Plain(Method):
    """One of LOSSES, averaged over pixels, or over images and foreground classes."""

    sparse = True

    def training_step(self, batch: Batch, step: int) -> Losses:
        logits = self(batch["image"])
        return {"loss": segmentation_loss(self.name, logits, batch["label"], options=asdict(self.config))}


for _name, _loss in LOSSES.items():
    _fields = [(key, type(value), field(default=value)) for key, value in _loss.options.items()]
    _parts = {"Config": make_dataclass("Config", _fields, frozen=True), "__doc__": _loss.summary}
    register(_name)(type(_name, (Plain,), _parts))
