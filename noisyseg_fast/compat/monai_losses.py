"""MONAI's loss classes with our kernels: the constructors' arguments, shapes, answers and errors are MONAI's.

Each class is a subclass of MONAI's, so it can stand wherever that stands. A combination of arguments that our
kernels cannot honour raises NotImplementedError in the constructor, and says which; under
`noisyseg_fast.compat.monai.patch_monai` such a loss is computed by MONAI. The loss is float32 for half-precision input.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from monai import losses as peer
from monai.networks import one_hot

from .. import distance, losses


class _Ours:
    """Checks in the constructor what MONAI's class has been told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        reason = unhonoured(self)
        if reason:
            raise NotImplementedError(
                f"{type(self).__name__}: {reason}; use monai.losses.{type(self).__name__}"
            )

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Any:
        return compute(self, input, target)


class DiceLoss(_Ours, peer.DiceLoss):  # type: ignore[misc]
    """`monai.losses.DiceLoss` with sigmoid or softmax; not: other_act, jaccard, soft_label, smooth_nr != smooth_dr."""


class DiceCELoss(_Ours, peer.DiceCELoss):  # type: ignore[misc]
    """`monai.losses.DiceCELoss`, as `DiceLoss`; not: weight with a single channel."""


class DiceFocalLoss(_Ours, peer.DiceFocalLoss):  # type: ignore[misc]
    """`monai.losses.DiceFocalLoss`, as `DiceLoss`; not: alpha, reduction "none"."""


class GeneralizedDiceLoss(_Ours, peer.GeneralizedDiceLoss):  # type: ignore[misc]
    """`monai.losses.GeneralizedDiceLoss`, as `DiceLoss`."""


class FocalLoss(_Ours, peer.FocalLoss):  # type: ignore[misc]
    """`monai.losses.FocalLoss`; not: alpha, ignore_index, reduction "none", softmax without background."""


class HausdorffDTLoss(_Ours, peer.HausdorffDTLoss):  # type: ignore[misc]
    """`monai.losses.HausdorffDTLoss`: its distance fields from one batched transform."""


NAMES = ("DiceLoss", "DiceCELoss", "DiceFocalLoss", "GeneralizedDiceLoss", "FocalLoss", "HausdorffDTLoss")


def unhonoured(loss: Any) -> str | None:
    """Why our kernels cannot compute what this MONAI loss has been told to; None when they can."""
    if isinstance(loss, peer.HausdorffDTLoss):
        return None
    if isinstance(loss, peer.FocalLoss):
        for name in ("alpha", "ignore_index"):
            if getattr(loss, name) is not None:
                return f"{name} is not supported"
        if loss.reduction == "none":
            return 'reduction "none" is not supported'
        if loss.use_softmax and not loss.include_background:
            return "use_softmax=True without background is not supported"
        return None
    if isinstance(loss, peer.DiceFocalLoss):
        if loss.dice.reduction == "none":
            return 'reduction "none" is not supported'
        return unhonoured(loss.dice) or unhonoured(loss.focal)
    if isinstance(loss, peer.DiceCELoss):
        return unhonoured(loss.dice)
    if not isinstance(loss, (peer.DiceLoss, peer.GeneralizedDiceLoss)):
        return f"{type(loss).__name__} is not among {', '.join(NAMES)}"
    if not loss.sigmoid and not loss.softmax:
        return "needs sigmoid=True or softmax=True"
    for name in ("jaccard", "soft_label"):
        if getattr(loss, name, False):
            return f"{name}=True is not supported"
    if loss.smooth_nr != loss.smooth_dr:
        return f"smooth_nr must equal smooth_dr, got {loss.smooth_nr} and {loss.smooth_dr}"
    if loss.smooth_nr < 0:
        return f"smooth_nr must not be negative, got {loss.smooth_nr}"
    return None


def fits(loss: Any, input: torch.Tensor) -> bool:
    """Whether the loss can be computed for this input: MONAI leaves the activation of one softmax channel out."""
    dice = getattr(loss, "dice", loss)
    return not (getattr(dice, "softmax", False) and input.shape[1] == 1) and not (
        isinstance(loss, peer.DiceCELoss)
        and input.shape[1] == 1
        and loss.binary_cross_entropy.pos_weight is not None
    )


def compute(loss: Any, input: torch.Tensor, target: torch.Tensor) -> Any:
    """The value of a MONAI loss, by our kernels. ValueError, AssertionError for shapes, as MONAI's."""
    if not fits(loss, input):
        raise ValueError(
            "input has a single channel: use sigmoid=True, and no weight; MONAI's own class leaves softmax out"
        )
    if isinstance(loss, peer.DiceCELoss):
        return _dice_ce(loss, input, target)
    if isinstance(loss, peer.DiceFocalLoss):
        _same_rank(input, target)
        labels = _labels(input, target, loss.to_onehot_y)
        dice = _dice(loss.dice, input, labels)
        return loss.lambda_dice * dice + loss.lambda_focal * _focal(loss.focal, input, labels)
    if isinstance(loss, peer.HausdorffDTLoss):
        return _hausdorff(loss, input, target)
    labels = _labels(input, target, loss.to_onehot_y)
    if isinstance(loss, peer.FocalLoss):
        return _focal(loss, input, labels)
    if isinstance(loss, peer.GeneralizedDiceLoss):
        return _generalized(loss, input, labels)
    return _dice(loss, input, labels)


def _labels(input: torch.Tensor, target: torch.Tensor, to_onehot_y: bool) -> Any:
    """The target as our losses take it: (B, *S) labels, or (B, C, *S)."""
    channels = input.shape[1]
    if to_onehot_y and channels == 1:
        warnings.warn("single channel prediction, `to_onehot_y=True` ignored.", stacklevel=4)
    if to_onehot_y and channels > 1:
        expected = (input.shape[0], 1, *input.shape[2:])
        if tuple(target.shape) != expected:
            raise AssertionError(f"labels should have a channel with length equal to one: {expected}")
        return _integers(target[:, 0])
    if target.shape != input.shape:
        raise AssertionError(f"ground truth has different shape ({target.shape}) from input ({input.shape})")
    return target


def _integers(labels: torch.Tensor) -> Any:
    whole = labels.dtype in (torch.uint8, torch.bool, torch.int32, torch.int64)
    return labels if whole else labels.to(torch.int32)


def _same_rank(input: torch.Tensor, target: torch.Tensor) -> None:
    if input.dim() != target.dim():
        raise ValueError(
            f"the number of dimensions for input and target should be the same, got shape {input.shape} "
            f"and {target.shape}; a target of labels has the shape B1H[WD]"
        )
    if target.shape[1] not in (1, input.shape[1]):
        raise ValueError(
            "number of channels for target is neither 1 (without one-hot encoding) nor the same as input, "
            f"got shape {input.shape} and {target.shape}"
        )


def _region(loss: Any, input: torch.Tensor) -> dict[str, Any]:
    if not loss.include_background and input.shape[1] == 1:
        warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=5)
    return {
        "activation": "sigmoid" if loss.sigmoid else "softmax",
        "denominator": "squared" if getattr(loss, "squared_pred", False) else "linear",
        "per_image": not loss.batch,
        "include_background": loss.include_background,
        "eps": loss.smooth_nr,
    }


def _dice(loss: Any, input: torch.Tensor, target: torch.Tensor) -> Any:
    options = _region(loss, input)
    if loss.ignore_index is not None:
        labels = target if target.ndim < input.ndim else target[:, 0]
        if target.ndim == input.ndim and input.shape[1] > 1:
            raise ValueError("ignore_index needs labels (B, 1, *S) and to_onehot_y=True")
        options["mask"] = labels != loss.ignore_index
    weight = loss.class_weight
    classes = input.shape[1] - (not loss.include_background and input.shape[1] > 1)
    if weight is None or classes == 1:
        if loss.reduction != "none":
            return losses.dice_loss(input, target, reduction=loss.reduction, **options)
        return _broadcastable(losses.dice_loss(input, target, reduction="none", **options), input)
    if weight.ndim and len(weight) != classes:
        raise ValueError(
            "The length of the `weight` sequence should be the same as the number of classes. "
            "If `include_background=False`, the weight should not include the background category class 0."
        )
    if weight.min() < 0:
        raise ValueError("the value/values of the `weight` should be no less than 0.")
    by_class = losses.dice_loss(input, target, reduction="none", **options) * weight.to(input.device)
    return _reduced(by_class, loss.reduction, input)


def _generalized(loss: Any, input: torch.Tensor, target: torch.Tensor) -> Any:
    options = _region(loss, input)
    value = losses.generalized_dice_loss(
        input, target, class_weighting=str(loss.w_type).lower(), reduction="none", **options
    )
    # Where no class is there, MONAI's weights are 0, and so are its loss and gradient.
    labels = target != 0
    if target.ndim == input.ndim and not loss.include_background and input.shape[1] > 1:
        labels = labels[:, 1:]
    if target.ndim == input.ndim or not loss.include_background:
        value = value * (labels.any() if loss.batch else labels.flatten(1).any(1))
    return _reduced(value.reshape(-1) if loss.batch else value[:, None], loss.reduction, input)


def _reduced(by_class: torch.Tensor, reduction: str, input: torch.Tensor) -> Any:
    if reduction == "mean":
        return by_class.mean()
    return by_class.sum() if reduction == "sum" else _broadcastable(by_class, input)


def _broadcastable(by_class: torch.Tensor, input: torch.Tensor) -> Any:
    return by_class.view(list(by_class.shape[:2]) + [1] * (input.ndim - 2))


def _dice_ce(loss: Any, input: torch.Tensor, target: torch.Tensor) -> Any:
    _same_rank(input, target)
    dice, ce = loss.dice, loss.cross_entropy
    binary = input.shape[1] == 1
    labels = _labels(input, target, dice.to_onehot_y)
    classes = _integers(target[:, 0]) if target.shape[1] == 1 and not binary else target
    one_pass = (
        dice.class_weight is None
        and classes.ndim == labels.ndim
        and (dice.sigmoid if binary else dice.softmax)
        and (binary or ce.label_smoothing == 0)
        and dice.reduction == "mean"
    )
    if one_pass:
        weights = {"dice_weight": loss.lambda_dice, "ce_weight": loss.lambda_ce}
        return losses.dice_ce_loss(input, labels, **weights, **_region(dice, input))
    cross_entropy = losses.pixel_loss(
        input,
        classes,
        activation="sigmoid" if binary else "softmax",
        class_weight=None if binary else ce.weight,
        label_smoothing=0.0 if binary else ce.label_smoothing,
        reduction=ce.reduction,
    )
    return loss.lambda_dice * _dice(dice, input, labels) + loss.lambda_ce * cross_entropy


def _focal(loss: Any, input: torch.Tensor, target: torch.Tensor) -> Any:
    channels, pixels = input.shape[1], input[0, 0].numel()
    kept = channels - (not loss.include_background and channels > 1)
    weight = loss.class_weight
    if weight is not None:
        if weight.ndim and kept == 1:
            raise ValueError("Per-class class_weight is not supported for single-channel outputs.")
        if weight.ndim and len(weight) != kept:
            raise ValueError(
                f"The number of class_weight ({len(weight)}) must match the number of output channels ({kept})."
            )
        if (weight < 0).any():
            raise ValueError("class_weight values must be non-negative.")
    by_class = torch.ones(kept) if weight is None else weight.float().cpu() * torch.ones(kept)
    by_class = torch.cat([torch.zeros(channels - kept), by_class])
    # Ours: the mean over pixels of the sum over classes (softmax) or of the mean over channels (sigmoid).
    scale = 1 / kept if loss.use_softmax else channels / kept
    total = losses.pixel_loss(
        input,
        target,
        kind="focal",
        activation="softmax" if loss.use_softmax else "sigmoid",
        focal_gamma=loss.gamma,
        class_weight=by_class.tolist(),
        reduction="sum",
    )
    mean = total * (scale / (len(input) * pixels))
    return mean if loss.reduction == "mean" else mean * (len(input) * kept)


def _hausdorff(loss: Any, input: torch.Tensor, target: torch.Tensor) -> Any:
    if input.dim() not in (4, 5):
        raise ValueError("Only 2D (NCHW) and 3D (NCHWD) supported")
    channels = input.shape[1]
    if loss.sigmoid:
        input = input.sigmoid()
    elif loss.softmax and channels > 1:
        input = input.softmax(1)
    elif loss.softmax:
        warnings.warn("single channel prediction, `softmax=True` ignored.", stacklevel=3)
    elif loss.other_act is not None:
        input = loss.other_act(input)
    if loss.to_onehot_y and channels > 1:
        target = one_hot(target, num_classes=channels)
    elif loss.to_onehot_y:
        warnings.warn("single channel prediction, `to_onehot_y=True` ignored.", stacklevel=3)
    if not loss.include_background and channels > 1:
        input, target = input[:, 1:], target[:, 1:]
    elif not loss.include_background:
        warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=3)
    if target.shape != input.shape:
        raise AssertionError(f"ground truth has different shape ({target.shape}) from input ({input.shape})")
    weight = _field(input.detach()) ** loss.alpha + _field(target.detach()) ** loss.alpha
    axes = [0, *range(2, input.ndim)] if loss.batch else list(range(2, input.ndim))
    by_class = ((input - target) ** 2 * weight).mean(axes, keepdim=True)
    if loss.reduction == "none":
        return by_class
    return by_class.mean() if loss.reduction == "mean" else by_class.sum()


def _field(x: torch.Tensor) -> Any:
    """Distance of each pixel to the boundary x = 0.5, of both sides; 0 where there is no boundary."""
    signed = distance.signed_distance_map(
        x > 0.5, spatial_dims=x.ndim - 2, convention="two_sided", no_site=0.0
    )
    field: torch.Tensor = signed.abs_()
    return field
