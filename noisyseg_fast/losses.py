"""Fused noise-robust losses: value and gradient in two reads of the inputs and one write, often one read.

Shapes: logits (B, C, *S), float16, bfloat16, float32 or float64; target (B, *S) or (B, 1, *S) class numbers
(uint8, bool, int32, int64), or (B, C, *S) one map for each class, hard or soft, of any dtype. Labels are
never expanded to one-hot: uint8 is the cheapest. Any strides. What most functions take besides:

- activation: "sigmoid" (each channel for itself; one channel is the foreground) or "softmax".
- weight (B, *S) or (B, 1, *S) floats: multiplies each pixel's part.
- mask, same shape, any dtype: leaves out the pixels where it is 0 (they may even hold NaN).
- ignore_index: leaves out the pixels with this label, which need not be a class.
- label_smoothing s in [0, 1]: targets g become (1 - s) g + s / C (one channel: + s / 2).
- reduction: "mean", "sum", "none", or "image": one value for each image, (B,), for methods that rank samples.
- return_grad=True: gives (loss, gradient of loss.sum() with respect to logits) at once, outside autograd: for
  NumPy and CuPy arrays, for CUDA graphs, for loops of one's own.

With torch tensors the loss is differentiable with respect to logits: eagerly twice and in forward mode
(torch.func.grad, jvp and vmap included), under torch.compile once. With NumPy or CuPy arrays the functions
return the value. float64 logits and all derivatives along a direction are computed in float64, all others in
float32, and so is the loss. Memory: the gradient, in the forward pass already for a float32 pixel loss, and nothing
of image size besides. Definitions: `noisyseg_fast.reference`.

Raises TypeError for wrong dtypes or mixed kinds of arrays, ValueError for shapes, devices, options and
labels out of range (on CUDA, where looking would mean waiting for the device, such a loss is NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from . import _arrays, _core
from ._module import LossModule
from .task_losses import (  # noqa: F401  # looked for here
    DualTaskLoss,
    UncertaintyWeightedLoss,
    dual_task_loss,
    uncertainty_weighted_loss,
)

ACTIVATIONS = ("sigmoid", "softmax")
REGION_KINDS = ("none", "nr_dice", "dice", "focal_dice", "generalized_dice")
PIXEL_KINDS = ("none", "ce", "focal", "mae", "gce", "mse", "kl", "boundary")
DENOMINATORS = ("linear", "squared")
CLASS_WEIGHTS = ("uniform", "simple", "square")  # of generalized Dice: 1 / volume to the power 0, 1, 2
REDUCTIONS = ("mean", "sum", "none", "image")


Arrays = tuple[Any, Any, Any, Any, Any]  # logits, target, weight, mask, class_weight; None: not given


class Options(NamedTuple):
    """What the kernels are told (csrc/include/noisyseg/losses.h), all numbers."""

    activation: int
    region: int = 0
    region_scale: float = 1.0
    gamma: float = 1.5
    dice_power: float = 1.0
    volume_power: int = 2
    squared: bool = True
    per_image: bool = True
    include_background: bool = True
    eps: float = 1e-5
    pixel: int = 0
    pixel_scale: float = 1.0
    parameter: float = 0.0
    label_smoothing: float = 0.0
    has_ignore: bool = False
    ignore: int = 0
    target_is_logits: bool = False


def nr_dice_loss(
    logits: Any,
    target: Any,
    *,
    gamma: float = 1.5,
    activation: str = "sigmoid",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Any = None,
    mask: Any = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """Noise-robust Dice: sum |p - g|^gamma / (sum p^2 + sum g^2 + eps), Wang et al., TMI 2020, eq. 3.

    gamma in [1, 2]: 2 is Milletari's Dice loss, 1 weighs all errors alike; the paper's best is 1.5. At gamma 1
    the derivative at p = g is 0, and so is every second derivative of |p - g|^gamma there. denominator="linear"
    (sum p + sum g) is what PyMIC computes; its `NoiseRobustDiceLoss` also takes per_image=False and softmax.
    Sums run over each image and class, or over the batch for each class with per_image=False.
    include_background=False leaves channel 0 out when C > 1.

    reduction: "mean" over images and classes, "sum", "image" (mean over classes), or "none": (B, C'), or (C',)
    with per_image=False. An image with every pixel masked has loss 0, an empty batch too. The rest: module.

    Extra memory: 0 bytes per pixel, with return_grad or a backward pass as much as logits.

    >>> loss = nr_dice_loss(logits, labels)          # (B, 1, H, W) float, (B, H, W) uint8
    >>> loss.backward()
    """
    if not 1 <= gamma <= 2:
        raise ValueError(f"gamma must lie in [1, 2], got {gamma}")
    options = _region_options(
        "nr_dice", activation, denominator, per_image, include_background, label_smoothing, eps, gamma
    )
    return _loss((logits, target, weight, mask, None), options, ignore_index, reduction, return_grad)


def dice_loss(
    logits: Any,
    target: Any,
    *,
    activation: str = "sigmoid",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Any = None,
    mask: Any = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """Soft Dice loss: 1 - (2 sum p g + eps) / (sum p^2 + sum g^2 + eps).

    denominator="squared": Milletari et al. 2016 (Wang et al. eq. 1); "linear": sum p + sum g, Soerensen,
    equal to MONAI's DiceLoss(sigmoid=True, smooth_nr=eps, smooth_dr=eps). The rest as in `nr_dice_loss`.

    Extra memory: 0 bytes per pixel, with return_grad or a backward pass as much as logits.
    """
    options = _region_options(
        "dice", activation, denominator, per_image, include_background, label_smoothing, eps
    )
    return _loss((logits, target, weight, mask, None), options, ignore_index, reduction, return_grad)


def focal_dice_loss(
    logits: Any,
    target: Any,
    *,
    beta: float = 0.5,
    activation: str = "sigmoid",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Any = None,
    mask: Any = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """1 - Dice^(1/beta), Wang et al., TMI 2020, Table I with beta 0.5 (Dice squared); Dice as in `dice_loss`.

    beta > 0; PyMIC's `FocalDiceLoss` asks for beta >= 1, denominator="linear", softmax and per_image=False. A
    Dice of exactly 0 (eps = 0, no overlap) has slope 0. The rest as in `nr_dice_loss`.

    Extra memory: 0 bytes per pixel, with return_grad or a backward pass as much as logits.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive, got {beta}")
    options = _region_options(
        "focal_dice",
        activation,
        denominator,
        per_image,
        include_background,
        label_smoothing,
        eps,
        1.5,
        1.0 / beta,
    )
    return _loss((logits, target, weight, mask, None), options, ignore_index, reduction, return_grad)


def generalized_dice_loss(
    logits: Any,
    target: Any,
    *,
    class_weighting: str = "square",
    activation: str = "softmax",
    denominator: str = "linear",
    per_image: bool = True,
    include_background: bool = True,
    weight: Any = None,
    mask: Any = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """1 - (2 sum_c v_c sum p g + eps) / (sum_c v_c sum (p + g) + eps), Sudre et al. 2017.

    v_c = 1 / (sum g)^2 of the class ("square"), 1 / sum g ("simple") or 1 ("uniform"); a class that is absent
    gets the largest of the others' v, as in MONAI's GeneralizedDiceLoss, to which this is equal (smooth_nr =
    smooth_dr = eps; batch=True is per_image=False). Where all classes are absent (include_background=False)
    every v is 1, where MONAI has 0 and no gradient. reduction="none": (B,), or () with per_image=False. No
    gradient flows through v, since it depends on the target alone. The rest as in `nr_dice_loss`.

    Extra memory: 0 bytes per pixel, with return_grad or a backward pass as much as logits.
    """
    options = _region_options(
        "generalized_dice",
        activation,
        denominator,
        per_image,
        include_background,
        label_smoothing,
        eps,
        1.5,
        1.0,
        _index("class_weighting", class_weighting, CLASS_WEIGHTS),
    )
    return _loss((logits, target, weight, mask, None), options, ignore_index, reduction, return_grad)


def pixel_loss(
    logits: Any,
    target: Any,
    *,
    kind: str = "ce",
    activation: str = "softmax",
    weight: Any = None,
    mask: Any = None,
    class_weight: Any = None,
    q: float = 0.7,
    focal_gamma: float = 2.0,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """A loss of each pixel. p_c: probabilities, g_c: targets, y: a hard label, cw_c: class weights (1 if none).

    kind, for softmax (Wang et al., TMI 2020, Table I):
    "ce"     -sum_c cw_c g_c ln p_c
    "focal"  -sum_c cw_c g_c (1 - p_c)^focal_gamma ln p_c, focal_gamma >= 0 (Lin et al. 2017); the modulator has
             a gradient; finite at p = 1 for every gamma
    "gce"    sum_c cw_c g_c (1 - p_c^q) / q, 0 < q <= 1 (Zhang and Sabuncu 2018; q = 0.7)
    "mae"    mean_c cw_c |p_c - g_c| (eq. 2 there; PyMIC's MAELoss)
    "mse"    mean_c cw_c (p_c - g_c)^2
    "kl"     sum_c cw_c g_c ln(g_c / p_c), 0 where g_c is 0
    For sigmoid: the mean over channels of cw_c times the same of the two classes "c" and "not c" (ce, focal,
    gce, kl: their sum; mae, mse: of one of them).

    class_weight: C floats, a sequence or a 1D float32 or float64 array on the same device.

    reduction="mean" divides sum w m L by the number of pixels in the mask (ce, focal and gce with softmax,
    labels and class_weight: by the sum of their class weights, as torch does); `weight` multiplies and does
    not normalise, as in MCPM eq. 1. "image" the same for each image. "none" gives the loss map (B, *S),
    weighted. The rest: module.

    Extra memory: 0 bytes per pixel (the map's with reduction="none"), with return_grad or a backward pass
    as much as logits.

    >>> loss_map = pixel_loss(logits, labels, kind="gce", q=0.7, reduction="none")
    """
    if kind == "boundary":
        raise ValueError("kind 'boundary' is boundary_loss(logits, distance_map)")
    options = _only_pixel_options(kind, activation, q, focal_gamma, label_smoothing)
    return _loss((logits, target, weight, mask, class_weight), options, ignore_index, reduction, return_grad)


def dice_ce_loss(
    logits: Any,
    target: Any,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    activation: str = "softmax",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Any = None,
    mask: Any = None,
    class_weight: Any = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """dice_weight * `dice_loss` + ce_weight * `pixel_loss(kind="ce")`, both from one reading of the inputs.

    The plain sum is Wang et al., TMI 2020, Table I; UA-MT, DTML and SSL4MIS take 0.5 of each. class_weight and
    include_background=False concern one part alone: CE and Dice. reduction: "mean", "sum" or "image".

    Extra memory: 0 bytes per pixel, with return_grad or a backward pass as much as logits.
    """
    return _dice_and(
        "ce",
        (dice_weight, ce_weight),
        ("dice_weight", "ce_weight"),
        _region_options("dice", activation, denominator, per_image, include_background, label_smoothing, eps),
        (logits, target, weight, mask, class_weight),
        ignore_index,
        reduction,
        return_grad,
    )


def dice_mae_loss(
    logits: Any,
    target: Any,
    *,
    dice_weight: float = 1.0,
    mae_weight: float = 1.0,
    activation: str = "softmax",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Any = None,
    mask: Any = None,
    class_weight: Any = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """dice_weight * `dice_loss` + mae_weight * `pixel_loss(kind="mae")` from one reading; see `dice_ce_loss`.

    Extra memory: 0 bytes per pixel, with return_grad or a backward pass as much as logits.
    """
    return _dice_and(
        "mae",
        (dice_weight, mae_weight),
        ("dice_weight", "mae_weight"),
        _region_options("dice", activation, denominator, per_image, include_background, label_smoothing, eps),
        (logits, target, weight, mask, class_weight),
        ignore_index,
        reduction,
        return_grad,
    )


def boundary_loss(
    logits: Any,
    distance_map: Any,
    *,
    activation: str = "sigmoid",
    include_background: bool = True,
    weight: Any = None,
    mask: Any = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """Mean over images, classes and pixels of p * phi (Kervadec et al., MIDL 2019, eq. 5); may be negative.

    distance_map phi (B, C, *S), any dtype, negative inside each class:
    `signed_distance_map(masks, convention="kervadec")`. With one channel also (B, *S). include_background=False
    leaves channel 0 out, of the mean too. weight, mask, reduction ("none": the map (B, *S)): as `pixel_loss`.

    Extra memory: 0 bytes per pixel (the map's with reduction="none"), with return_grad or a backward pass
    as much as logits.
    """
    options = Options(_index("activation", activation, ACTIVATIONS), pixel=PIXEL_KINDS.index("boundary"))
    _arrays.given(logits=logits, distance_map=distance_map)
    shape = tuple(logits.shape)
    if len(shape) > 1 and tuple(distance_map.shape) == (shape[0], *shape[2:]) != shape and shape[1] == 1:
        distance_map = distance_map[:, None]
    if tuple(distance_map.shape) != shape:
        raise ValueError(
            f"distance_map has shape {tuple(distance_map.shape)}; it must be that of logits, {shape}"
        )
    chosen = None
    if not include_background and shape[1] > 1:
        chosen = [0.0] + [shape[1] / (shape[1] - 1)] * (shape[1] - 1)
    return _loss((logits, distance_map, weight, mask, chosen), options, None, reduction, return_grad)


def consistency_loss(
    logits: Any,
    target_logits: Any,
    *,
    kind: str = "mse",
    activation: str = "softmax",
    weight: Any = None,
    mask: Any = None,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """How far the probabilities of logits are from those of target_logits, a teacher's: no gradient for it.

    Both (B, C, *S), of any float dtypes. kind "mse" (mean teacher, UA-MT: mean over classes), "mae" (Wang et
    al., TMI 2020, eq. 4) or "kl" (sum over classes of t ln(t / p), t the teacher's); definitions and the other
    arguments as in `pixel_loss`. UA-MT's certainty mask goes to mask, and the mean is then over its pixels.

    Extra memory: 0 bytes per pixel (the map's with reduction="none"), with return_grad or a backward pass
    as much as logits.
    """
    if kind not in ("mse", "mae", "kl"):
        raise ValueError(f"kind must be one of mse, mae, kl, got {kind!r}")
    options = Options(
        _index("activation", activation, ACTIVATIONS), **_pixel_options(kind, 1, 0), target_is_logits=True
    )
    _arrays.given(logits=logits, target_logits=target_logits)
    if tuple(target_logits.shape) != tuple(logits.shape):
        raise ValueError(
            f"target_logits has shape {tuple(target_logits.shape)}; it must be that of logits, "
            f"{tuple(logits.shape)}"
        )
    return _loss((logits, target_logits, weight, mask, None), options, None, reduction, return_grad)


class NRDiceLoss(LossModule):
    """`nr_dice_loss` as a module: the keyword arguments go to the constructor.

    >>> loss = NRDiceLoss(gamma=1.5, activation="softmax", include_background=False)(logits, labels)
    """

    _function = staticmethod(nr_dice_loss)


class DiceLoss(LossModule):
    """`dice_loss` as a module."""

    _function = staticmethod(dice_loss)


class FocalDiceLoss(LossModule):
    """`focal_dice_loss` as a module."""

    _function = staticmethod(focal_dice_loss)


class GeneralizedDiceLoss(LossModule):
    """`generalized_dice_loss` as a module."""

    _function = staticmethod(generalized_dice_loss)


class PixelLoss(LossModule):
    """`pixel_loss` as a module."""

    _function = staticmethod(pixel_loss)


class DiceCELoss(LossModule):
    """`dice_ce_loss` as a module."""

    _function = staticmethod(dice_ce_loss)


class DiceMAELoss(LossModule):
    """`dice_mae_loss` as a module."""

    _function = staticmethod(dice_mae_loss)


class BoundaryLoss(LossModule):
    """`boundary_loss` as a module."""

    _function = staticmethod(boundary_loss)


class ConsistencyLoss(LossModule):
    """`consistency_loss` as a module."""

    _function = staticmethod(consistency_loss)


# ---- options --------------------------------------------------------------------------------------

eager: Any = (
    None  # the module _autograd once torch is in use: importing it at each call costs as much as a check
)
_known: dict[Any, Any] = {}  # the calls that were checked before, by their signature
_MOST_KNOWN = 1024  # a caller with more at work pays for the checks again
_PLAIN = frozenset((bool, float, int, str, Options))  # an option may also be an array, whose value can change
_Made = TypeVar("_Made")


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known[key] = value


def _looked_up(make: Callable[..., _Made]) -> Callable[..., _Made]:
    """make(*values), which costs several times as much as finding what it gave before."""
    known: dict[Any, _Made] = {}

    def look_up(*values: Any) -> _Made:
        # a compiler would follow the dict's contents
        if eager is None or eager.compiling() or not _PLAIN.issuperset(map(type, values)):
            return make(*values)
        made = known.get(values)
        if made is None:
            made = make(*values)
            _remember(known, values, made)
        return made

    return look_up


def _index(name: str, value: str, allowed: Sequence[str]) -> int:
    try:
        return allowed.index(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}") from None


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return float(value)


@_looked_up
def _region_options(
    kind: str,
    activation: str,
    denominator: str,
    per_image: bool,
    include_background: bool,
    label_smoothing: float,
    eps: float,
    gamma: float = 1.5,
    dice_power: float = 1.0,
    volume_power: int = 2,
) -> Options:
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must not be negative, got {eps}")
    return Options(
        _index("activation", activation, ACTIVATIONS),
        region=REGION_KINDS.index(kind),
        gamma=float(gamma),
        dice_power=float(dice_power),
        volume_power=volume_power,
        squared=bool(_index("denominator", denominator, DENOMINATORS)),
        per_image=bool(per_image),
        include_background=bool(include_background),
        eps=float(eps),
        label_smoothing=_fraction("label_smoothing", label_smoothing),
    )


@_looked_up
def _only_pixel_options(
    kind: str, activation: str, q: float, focal_gamma: float, label_smoothing: float
) -> Options:
    return Options(
        _index("activation", activation, ACTIVATIONS),
        **_pixel_options(kind, q, focal_gamma),
        label_smoothing=_fraction("label_smoothing", label_smoothing),
    )


def _pixel_options(kind: str, q: float, focal_gamma: float) -> dict[str, Any]:
    index = _index("kind", kind, PIXEL_KINDS[1:-1]) + 1
    if kind == "gce" and not 0 < q <= 1:
        raise ValueError(f"q must lie in (0, 1], got {q}")
    if kind == "focal" and not 0 <= focal_gamma < float("inf"):
        raise ValueError(f"focal_gamma must not be negative, got {focal_gamma}")
    if kind == "focal" and focal_gamma == 0:
        index = PIXEL_KINDS.index("ce")
    return {"pixel": index, "parameter": float({"gce": q, "focal": focal_gamma}.get(kind, 0))}


def _dice_and(
    pixel: str,
    scales: tuple[float, float],
    names: tuple[str, str],
    options: Options,
    arrays: Arrays,
    ignore_index: int | None,
    reduction: str,
    return_grad: bool,
) -> Any:
    for name, scale in zip(names, scales, strict=True):
        if not abs(scale) < float("inf"):
            raise ValueError(f"{name} must be finite, got {scale}")
    if reduction == "none":
        raise ValueError("reduction 'none' has no meaning for a sum of two losses; use mean, sum or image")
    options = _with_pixel(options, pixel, *scales)
    return _loss(arrays, options, ignore_index, reduction, return_grad)


@_looked_up
def _with_pixel(options: Options, kind: str, region_scale: float, pixel_scale: float) -> Options:
    return options._replace(
        region_scale=float(region_scale), pixel_scale=float(pixel_scale), **_pixel_options(kind, 1, 0)
    )


# ---- checks ---------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What the checks found, the same for all calls whose arguments have the same shapes, dtypes and options."""

    space: _arrays.Namespace
    options: Options
    reduction: int
    axes: tuple[
        Any, Any, Any
    ]  # index that takes target, weight, mask to (B, *S) or (B, C, *S); None: as it is
    class_weight: Any  # the array made of a sequence

    def arrays(self, arrays: Arrays) -> Arrays:
        """As the kernels take them."""
        logits, target, weight, mask, class_weight = arrays
        axes = self.axes
        if axes[0] is not None:
            target = _arrays.indexable(self.space, target)[axes[0]]
        if axes[1] is not None:
            weight = _arrays.indexable(self.space, weight)[axes[1]]
        if axes[2] is not None:
            mask = _arrays.indexable(self.space, mask)[axes[2]]
        return logits, target, weight, mask, class_weight if self.class_weight is None else self.class_weight


_WITHOUT, _WITH = (slice(None), 0), (slice(None), None)  # the channel axis


def _plan(arrays: Arrays, options: Options, ignore_index: int | None, reduction: str) -> Plan:
    """Checks what the kernels rely on."""
    red = _index("reduction", reduction, REDUCTIONS)
    if red == 3 and options.region and not options.per_image:
        raise ValueError("reduction 'image' needs per_image=True")
    if ignore_index is not None:
        if int(ignore_index) != ignore_index or abs(ignore_index) > 2**53:
            raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")
        options = options._replace(has_ignore=True, ignore=int(ignore_index))
    logits, target, weight, mask, class_weight = arrays
    if logits is None or target is None:
        _arrays.given(logits=logits, target=target)
    space = _arrays.of(logits=logits, target=target, weight=weight, mask=mask)
    shape = tuple(logits.shape)
    if not 2 <= len(shape) <= _arrays.MAX_RANK:
        raise ValueError(
            f"logits must be (B, C, *S) with 2 to {_arrays.MAX_RANK} dimensions, got shape {shape}"
        )
    _arrays.check_dtype("logits", space.dtype(logits), _arrays.FLOATS)
    channels = shape[1]
    if channels < 1 or channels > 1024:
        raise ValueError(f"logits must have 1 to 1024 channels, got shape {shape}")
    if options.activation == 1 and channels == 1:
        raise ValueError("activation 'softmax' over one channel is constant; use activation='sigmoid'")
    pixels = (shape[0], *shape[2:])
    with_channel = (shape[0], 1, *shape[2:])
    given, labels = tuple(target.shape), space.dtype(target) in _arrays.LABELS
    axes: list[Any] = [None, None, None]
    rank = len(given)
    if given == with_channel and (channels > 1 or labels):
        axes[0], given, rank = _WITHOUT, pixels, rank - 1
    if given == pixels and not (channels == 1 and given == shape):
        if not labels:
            if channels > 1:
                raise TypeError(
                    f"target has dtype {space.dtype(target)} for class numbers of shape {given}; "
                    f"use one of {', '.join(_arrays.LABELS)}, or soft labels of shape {shape}"
                )
            axes[0], rank = _WITH, rank + 1
    elif given != shape:
        raise ValueError(
            f"target has shape {given}; for logits of shape {shape} it must be {pixels} (class numbers) or {shape}"
        )
    if options.has_ignore and rank == len(shape):
        raise ValueError(
            f"ignore_index is a label, but target has shape {given}, one map for each class; use mask"
        )
    for i, (name, x) in enumerate((("weight", weight), ("mask", mask)), start=1):
        if x is not None:
            if tuple(x.shape) == with_channel:
                axes[i] = _WITHOUT
            elif tuple(x.shape) != pixels:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; for logits of shape {shape} it must be {pixels}"
                )
            if name == "weight":
                _arrays.check_dtype(name, space.dtype(x), _arrays.FLOATS)
    made = None if class_weight is None else _class_weight(space, logits, class_weight)
    return Plan(space, options, red, (axes[0], axes[1], axes[2]), None if made is class_weight else made)


def _class_weight(space: _arrays.Namespace, logits: Any, class_weight: Any) -> Any:
    channels = int(logits.shape[1])
    if isinstance(class_weight, (list, tuple)):
        values = [float(w) for w in class_weight]
        if space.name == "torch":
            import torch

            class_weight = logits.new_tensor(values, dtype=torch.float64)
        else:
            class_weight = space.empty((len(values),), "float64")
            for i, value in enumerate(values):
                class_weight[i] = value
    _arrays.of(logits=logits, class_weight=class_weight)
    if tuple(class_weight.shape) != (channels,):
        raise ValueError(f"class_weight has shape {tuple(class_weight.shape)}; it must be ({channels},)")
    _arrays.check_dtype("class_weight", space.dtype(class_weight), ("float32", "float64"))
    return class_weight


# ---- calls of the compiled module -----------------------------------------------------------------


def _loss(
    arrays: Arrays,
    options: Options,
    ignore_index: int | None,
    reduction: str,
    return_grad: bool,
) -> Any:
    key = None
    if eager is not None:
        key = eager.signature(arrays, options, ignore_index, reduction)
        known = None if key is None else _known.get(key)
        if known is not None:
            return known.value_and_grad(arrays) if return_grad else known(arrays)
    plan = _plan(arrays, options, ignore_index, reduction)
    space, given = plan.space, plan.arrays(arrays)
    if space.name == "torch":
        from . import _autograd

        if key is not None:
            _remember(_known, key, _autograd.Known(plan, given))
        if not return_grad:
            return _autograd.loss(given, plan.options, plan.reduction)
    if return_grad:
        loss, grad = value_and_grad(space, given, plan.options, plan.reduction)
        return space.back(loss), space.back(grad)
    return space.back(forward(space, given, plan.options, plan.reduction)[0])


def _view(space: _arrays.Namespace, x: Any) -> _arrays.View | None:
    return None if x is None else space.view(x)


def _views(space: _arrays.Namespace, arrays: tuple[Any, ...]) -> list[_arrays.View | None]:
    return [_view(space, x) for x in arrays]


def loss_dtype(logits_dtype: str) -> str:
    return "float64" if logits_dtype == "float64" else "float32"


def loss_shape(logits_shape: Sequence[int], options: Options, reduction: int) -> tuple[int, ...]:
    batch, channels = logits_shape[:2]
    if reduction == 3:
        return (batch,)
    if reduction != 2:
        return ()
    if not options.region:
        return (batch, *logits_shape[2:])
    classes = channels - (channels > 1 and not options.include_background)
    joint = options.region == REGION_KINDS.index("generalized_dice")
    return (*((batch,) if options.per_image else ()), *(() if joint else (classes,)))


def sums_shape(logits_shape: Sequence[int]) -> tuple[int, ...]:
    return (logits_shape[0], logits_shape[1] + 1, 5)


def _workspace(space: _arrays.Namespace, logits: _arrays.View) -> tuple[Any, int]:
    memory = space.empty((_core.loss_workspace(logits, space.exec) // 8,), "float64")
    return memory, space.view(memory)[0]


def forward(
    space: _arrays.Namespace,
    arrays: Arrays,
    options: Options,
    reduction: int,
    keep: Any = None,
) -> tuple[Any, Any, bool]:
    """(loss, sums, kept): sums float64 is what the backward call needs besides the inputs.

    keep: like logits, or None; memory for the gradient; `kept` says whether it holds that of the loss itself.
    """
    logits = arrays[0]
    shape, views = tuple(logits.shape), _views(space, arrays)
    loss = space.empty(loss_shape(shape, options, reduction), loss_dtype(space.dtype(logits)))
    sums = space.empty(sums_shape(shape), "float64")
    memory, address = _workspace(space, views[0])  # type: ignore[arg-type]
    in_range, kept = _core.loss_forward(
        *views,
        options,
        reduction,
        space.view(loss),
        space.view(sums),
        _view(space, keep),
        address,
        space.exec,
    )
    del memory
    if not in_range:
        raise bad_label(shape[1])
    return loss, sums, kept


def bad_label(channels: int) -> ValueError:
    return ValueError(
        f"target holds a label outside 0..{max(channels - 1, 1)}, the classes that logits have channels for"
    )


def backward(
    space: _arrays.Namespace,
    arrays: Arrays,
    options: Options,
    reduction: int,
    grad_loss: Any,
    sums: Any,
    grad: Any = None,
    kept: bool = False,
) -> Any:
    """The gradient, like logits, into grad if given. kept: the forward call has filled grad. sums: or a bytearray."""
    if grad is None:
        grad = space.empty_like(arrays[0])
    _core.loss_backward(
        *_views(space, arrays),
        options,
        reduction,
        space.view(grad_loss),
        sums if isinstance(sums, bytearray) else space.view(sums),
        space.view(grad),
        kept,
        space.exec,
    )
    return grad


def value_and_grad(
    space: _arrays.Namespace,
    arrays: Arrays,
    options: Options,
    reduction: int,
) -> tuple[Any, Any]:
    """(loss, gradient of its sum)."""
    grad = space.empty_like(arrays[0])
    loss, sums, kept = forward(space, arrays, options, reduction, grad)
    ones = space.ones_like(loss)
    return loss, backward(space, arrays, options, reduction, ones, sums, grad, kept)


def tangent(
    space: _arrays.Namespace,
    arrays: Arrays,
    options: Options,
    reduction: int,
    logits_dot: Any,
) -> tuple[Any, Any]:
    """(loss_dot, sums): the derivative of the loss along logits_dot, and what backward_tangent needs."""
    logits = arrays[0]
    shape, view = tuple(logits.shape), space.view(logits)
    loss_dot = space.empty(loss_shape(shape, options, reduction), loss_dtype(space.dtype(logits)))
    sums = space.empty((*sums_shape(shape), 2), "float64")
    memory, address = _workspace(space, view)
    _core.loss_tangent(
        view,
        space.view(logits_dot),
        *_views(space, arrays[1:]),
        options,
        reduction,
        space.view(loss_dot),
        space.view(sums),
        address,
        space.exec,
    )
    del memory
    return loss_dot, sums


def backward_tangent(
    space: _arrays.Namespace,
    arrays: Arrays,
    options: Options,
    reduction: int,
    logits_dot: Any,
    grad_loss: Any,
    grad_loss_dot: Any,
    sums: Any,
) -> Any:
    """The derivative of the gradient along (logits_dot, grad_loss_dot); grad_loss_dot may be None."""
    grad_dot = space.empty_like(arrays[0])
    _core.loss_backward_tangent(
        space.view(arrays[0]),
        space.view(logits_dot),
        *_views(space, arrays[1:]),
        options,
        reduction,
        space.view(grad_loss),
        _view(space, grad_loss_dot),
        space.view(sums),
        space.view(grad_dot),
        space.exec,
    )
    return grad_dot
