"""Fused noise-robust losses: value and gradient in two reads of the inputs and one write.

Shapes: logits (B, C, *S), float16, bfloat16, float32 or float64; target (B, *S) or (B, 1, *S) class numbers
(uint8, bool, int32, int64), or (B, C, *S) one map for each class, hard or soft, of any dtype. Labels are
never expanded to one-hot: uint8 is the cheapest. weight (B, *S) or (B, 1, *S) floats multiply each pixel's
part; mask, same shape, any dtype, leaves out the pixels where it is 0 (they may even hold NaN). Any strides.

With torch tensors the loss is differentiable once with respect to logits, eagerly and under torch.compile.
With NumPy or CuPy arrays the functions return the value. float64 logits are computed in float64, all others
in float32, and so is the loss. Definitions: `noisyseg_fast.reference`.

Raises TypeError for wrong dtypes or mixed kinds of arrays, ValueError for shapes, devices, options and
labels out of range (on CUDA, where looking would mean waiting for the device, such a loss is NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _arrays, _core

if TYPE_CHECKING:
    from torch import nn

    Module = nn.Module
else:
    try:
        from torch.nn import Module
    except ImportError:  # NumPy and CuPy users need no torch; only the module twins do
        Module = object

_KINDS = ("nr_dice", "dice")
_ACTIVATIONS = ("sigmoid", "softmax")
_DENOMINATORS = ("linear", "squared")
_REDUCTIONS = ("mean", "sum", "none")
_PIXEL_KINDS = ("ce",)


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
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Any:
    """Noise-robust Dice: sum |p - g|^gamma / (sum p^2 + sum g^2 + eps), Wang et al., TMI 2020, eq. 3.

    gamma in [1, 2]: 2 is Milletari's Dice loss, 1 weighs all errors alike; the paper's best is 1.5. At gamma 1
    the derivative at p = g is 0. denominator="linear" (sum p + sum g) is what PyMIC computes; its
    `NoiseRobustDiceLoss` also takes per_image=False and softmax. Sums run over each image and class, or over
    the batch for each class with per_image=False. include_background=False leaves channel 0 out when C > 1.

    reduction: "mean" over images and classes, "sum", or "none": (B, C'), or (C',) with per_image=False.
    An image with every pixel masked has loss 0, an empty batch too.

    >>> loss = nr_dice_loss(logits, labels)          # (B, 1, H, W) float, (B, H, W) uint8
    >>> loss.backward()
    """
    if not 1 <= gamma <= 2:
        raise ValueError(f"gamma must lie in [1, 2], got {gamma}")
    options = (
        _KINDS.index("nr_dice"),
        _index("activation", activation, _ACTIVATIONS),
        float(gamma),
        bool(_index("denominator", denominator, _DENOMINATORS)),
        per_image,
        include_background,
        float(eps),
    )
    return _region(logits, target, weight, mask, options, reduction)


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
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Any:
    """Soft Dice loss: 1 - (2 sum p g + eps) / (sum p^2 + sum g^2 + eps).

    denominator="squared": Milletari et al. 2016 (Wang et al. eq. 1); "linear": sum p + sum g, Soerensen,
    equal to MONAI's DiceLoss(sigmoid=True, smooth_nr=eps, smooth_dr=eps). The rest as in `nr_dice_loss`.
    """
    options = (
        _KINDS.index("dice"),
        _index("activation", activation, _ACTIVATIONS),
        1.0,
        bool(_index("denominator", denominator, _DENOMINATORS)),
        per_image,
        include_background,
        float(eps),
    )
    return _region(logits, target, weight, mask, options, reduction)


def pixel_loss(
    logits: Any,
    target: Any,
    *,
    kind: str = "ce",
    activation: str = "softmax",
    weight: Any = None,
    mask: Any = None,
    class_weight: Any = None,
    reduction: str = "mean",
) -> Any:
    """Weighted cross-entropy of each pixel. kind="ce" is the only kind so far.

    activation="softmax": -sum_c cw_c g_c log softmax(z)_c. "sigmoid": the mean over channels of the binary
    cross-entropies, each times cw_c. class_weight: C floats, a sequence or a 1D array on the same device.

    reduction="mean" divides sum w m L by the number of pixels in the mask (with softmax, labels and
    class_weight: by the sum of their class weights, as torch does); `weight` multiplies and does not
    normalise, as in MCPM eq. 1. "none" gives the loss map (B, *S), weighted.
    """
    _index("kind", kind, _PIXEL_KINDS)
    act = _index("activation", activation, _ACTIVATIONS)
    red = _index("reduction", reduction, _REDUCTIONS)
    space = _arrays.of(logits=logits, target=target, weight=weight, mask=mask)
    target, weight, mask = _check(space, logits, target, weight, mask, act)
    if class_weight is not None:
        class_weight = _class_weight(space, logits, class_weight)
    if space.name == "torch":
        from . import _autograd

        return _autograd.pixel_loss(space, logits, target, weight, mask, class_weight, act, red)
    return space.back(pixel_forward(space, logits, target, weight, mask, class_weight, act, red)[0])


class NRDiceLoss(Module):
    """`nr_dice_loss` as a module: the keyword arguments go to the constructor.

    >>> loss = NRDiceLoss(gamma=1.5, activation="softmax", include_background=False)(logits, labels)
    """

    _function: Any = staticmethod(nr_dice_loss)

    def __init__(self, **options: Any) -> None:
        if Module is object:
            raise ImportError("the loss modules need torch: pip install 'noisyseg-fast[torch]'")
        super().__init__()
        allowed = set(self._function.__kwdefaults__ or ()) - {"weight", "mask"}
        unknown = sorted(set(options) - allowed)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no argument {unknown[0]!r}; it takes {sorted(allowed)}"
            )
        self.options = options

    def forward(self, logits: Any, target: Any, weight: Any = None, mask: Any = None) -> Any:
        return self._function(logits, target, weight=weight, mask=mask, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DiceLoss(NRDiceLoss):
    """`dice_loss` as a module."""

    _function = staticmethod(dice_loss)


class PixelLoss(NRDiceLoss):
    """`pixel_loss` as a module."""

    _function = staticmethod(pixel_loss)


# ---- checks ---------------------------------------------------------------------------------------


def _index(name: str, value: str, allowed: Sequence[str]) -> int:
    try:
        return allowed.index(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}") from None


def _check(
    space: _arrays.Namespace, logits: Any, target: Any, weight: Any, mask: Any, activation: int
) -> tuple[Any, Any, Any]:
    """Checks what the kernels rely on; target, weight and mask come back as (B, *S) or (B, C, *S) views."""
    for name, x in (("logits", logits), ("target", target)):
        if x is None:
            raise TypeError(f"{name} must be an array, not None")
    shape = tuple(logits.shape)
    if not 2 <= len(shape) <= _arrays.MAX_RANK:
        raise ValueError(
            f"logits must be (B, C, *S) with 2 to {_arrays.MAX_RANK} dimensions, got shape {shape}"
        )
    _arrays.check_dtype("logits", space.dtype(logits), _arrays.FLOATS)
    channels = shape[1]
    if channels < 1 or channels > 1024:
        raise ValueError(f"logits must have 1 to 1024 channels, got shape {shape}")
    if activation == 1 and channels == 1:
        raise ValueError("activation 'softmax' over one channel is constant; use activation='sigmoid'")
    pixels = (shape[0], *shape[2:])
    with_channel = (shape[0], 1, *shape[2:])
    given = tuple(target.shape)
    if given == with_channel and (channels > 1 or space.dtype(target) in _arrays.LABELS):
        target, given = target[:, 0], pixels
    if given == pixels and not (channels == 1 and given == shape):
        if space.dtype(target) not in _arrays.LABELS:
            if channels > 1:
                raise TypeError(
                    f"target has dtype {space.dtype(target)} for class numbers of shape {given}; "
                    f"use one of {', '.join(_arrays.LABELS)}, or soft labels of shape {shape}"
                )
            target = target[:, None]
    elif given != shape:
        raise ValueError(
            f"target has shape {given}; for logits of shape {shape} it must be {pixels} (class numbers) or {shape}"
        )
    checked = []
    for name, x in (("weight", weight), ("mask", mask)):
        if x is not None:
            if tuple(x.shape) == with_channel:
                x = x[:, 0]
            if tuple(x.shape) != pixels:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; for logits of shape {shape} it must be {pixels}"
                )
            if name == "weight":
                _arrays.check_dtype(name, space.dtype(x), _arrays.FLOATS)
        checked.append(x)
    return target, checked[0], checked[1]


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


def _out_of_range(logits: Any) -> ValueError:
    top = max(int(logits.shape[1]) - 1, 1)
    return ValueError(f"target holds a label outside 0..{top}, the classes that logits have channels for")


# ---- calls of the compiled module -----------------------------------------------------------------


def _region(
    logits: Any, target: Any, weight: Any, mask: Any, options: tuple[Any, ...], reduction: str
) -> Any:
    red = _index("reduction", reduction, _REDUCTIONS)
    if not options[-1] >= 0:
        raise ValueError(f"eps must not be negative, got {options[-1]}")
    space = _arrays.of(logits=logits, target=target, weight=weight, mask=mask)
    target, weight, mask = _check(space, logits, target, weight, mask, options[1])
    if space.name == "torch":
        from . import _autograd

        return _autograd.region_loss(space, logits, target, weight, mask, options, red)
    return space.back(region_forward(space, logits, target, weight, mask, options, red)[0])


def _view(space: _arrays.Namespace, x: Any) -> _arrays.View | None:
    return None if x is None else space.view(x)


def _workspace(space: _arrays.Namespace, logits: _arrays.View, exec_: _arrays.Exec) -> tuple[Any, int]:
    memory = space.empty((_core.loss_workspace(logits, exec_) // 8,), "float64")
    return memory, space.view(memory)[0]


def loss_dtype(logits_dtype: str) -> str:
    return "float64" if logits_dtype == "float64" else "float32"


def region_shape(logits_shape: Sequence[int], options: tuple[Any, ...], reduction: int) -> tuple[int, ...]:
    if reduction != 2:
        return ()
    classes = logits_shape[1] - (logits_shape[1] > 1 and not options[5])
    return (logits_shape[0], classes) if options[4] else (classes,)


def region_forward(
    space: _arrays.Namespace,
    logits: Any,
    target: Any,
    weight: Any,
    mask: Any,
    options: tuple[Any, ...],
    reduction: int,
) -> tuple[Any, Any]:
    """(loss, sums): sums (B, C, 2) float64 is what the backward call needs besides the inputs."""
    shape, view, exec_ = tuple(logits.shape), space.view(logits), space.exec
    loss = space.empty(region_shape(shape, options, reduction), loss_dtype(space.dtype(logits)))
    sums = space.empty((shape[0], shape[1], 2), "float64")
    memory, address = _workspace(space, view, exec_)
    good = _core.region_loss_forward(
        view,
        space.view(target),
        _view(space, weight),
        _view(space, mask),
        options,
        reduction,
        space.view(loss),
        space.view(sums),
        address,
        exec_,
    )
    del memory
    if not good:
        raise _out_of_range(logits)
    return loss, sums


def pixel_forward(
    space: _arrays.Namespace,
    logits: Any,
    target: Any,
    weight: Any,
    mask: Any,
    class_weight: Any,
    activation: int,
    reduction: int,
) -> tuple[Any, Any]:
    """(loss, sums): sums (2,) float64, the weighted sum and what "mean" divides by."""
    shape, view, exec_ = tuple(logits.shape), space.view(logits), space.exec
    loss = space.empty((shape[0], *shape[2:]) if reduction == 2 else (), loss_dtype(space.dtype(logits)))
    sums = space.empty((2,), "float64")
    memory, address = _workspace(space, view, exec_)
    good = _core.pixel_loss_forward(
        view,
        space.view(target),
        _view(space, weight),
        _view(space, mask),
        _view(space, class_weight),
        activation,
        reduction,
        space.view(loss),
        space.view(sums),
        address,
        exec_,
    )
    del memory
    if not good:
        raise _out_of_range(logits)
    return loss, sums
