"""Losses that join several maps, fused: UMA-Net's for several raters, DTML's for two networks.

One reading of the inputs gives every term, a second one every gradient; nothing of image size is kept in
between. Any strides; float64 inputs are computed in float64, all others in float32, and so are the terms.
With torch tensors the terms are differentiable twice with respect to both floating-point inputs, in reverse and
forward mode, under torch.func and torch.compile (forward mode and second derivatives: eagerly). With NumPy or CuPy
arrays the functions return values. Definitions: `noisyseg_fast.reference`.

Annotations and labels: uint8 (the cheapest), bool, int32 and int64, 0 or 1, or floats in [0, 1]. mask (B, *S) or
(B, 1, *S) of any dtype leaves out the pixels where it is 0: they may even hold NaN. Images of which nothing is left
have loss 0 and gradient 0, and so has an empty batch.

Raises TypeError for wrong dtypes or mixed kinds of arrays, ValueError for shapes, devices, options and values out of
range (on CUDA, where looking would mean waiting for the device, the terms are NaN instead).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _arrays, _core
from ._module import LossModule

_REDUCTIONS = ("mean", "sum", "image")
_ENTROPIES = ("paper", "binary")
_ROUTINGS = ("own", "shared", "logits", "sdf")
_MAX_RATERS = 512  # max_raters in task_losses.h


class UncertaintyTerms(NamedTuple):
    """total, ce, dice, consistency: scalars, or (B,) with reduction="image"; confidence, agreement: (B,)."""

    total: Any
    ce: Any
    dice: Any
    consistency: Any
    confidence: Any
    agreement: Any


class DualTaskTerms(NamedTuple):
    """seg, mask, consistency: scalars, or (B,) with reduction="image"."""

    seg: Any
    mask: Any
    consistency: Any


def uncertainty_weighted_loss(
    logits: Any,
    annotations: Any,
    uncertainty: Any,
    *,
    dice_weight: float = 1.0,
    consistency_weight: float = 1.0,
    raters: Any = None,
    mask: Any = None,
    entropy: str = "paper",
    eps: float = 1e-5,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """Loss and quality scores of images with M annotations each; Wang et al. (UMA-Net), eq. 1-8.

    logits (B, 1, *S); annotations (B, M, *S) labels or soft labels y; uncertainty (B, M, *S) floats sigma in (0, 1),
    both ends allowed. With p = sigmoid(logits), N pixels and s^m = |y^m - sigma^m|, s* their mean, for each image

    - ce = 1/(N M) sum exp(-sigma) CE(p, y) + sigma/2 (eq. 1)
    - dice = 1/M sum_m [sum exp(-sigma) (p - y)^2 / (sum p^2 + sum y^2 + eps)] + mean of sigma/2 (eq. 3; there eps = 0)
    - consistency = 1/(N M) sum (s^m - s*)^2 (eq. 5)
    - total = ce + dice_weight dice + consistency_weight consistency (eq. 8)
    - confidence = -sum s* ln s* / sum s* (eq. 6). It grows without bound for small objects; entropy="binary" gives the
      mean of -s* ln s* - (1-s*) ln(1-s*) instead, at most ln 2
    - agreement = 4 M sum Var_m(s^m) / sum s^m (eq. 7, population variance): 0 for raters that agree, up to 4 (1 - 1/M)

    High quality is confidence and agreement below thresholds; the two are not differentiable.

    raters (B, M) of any dtype: which maps exist, or their weights >= 0, in place of M above; maps of weight 0 are
    never read. reduction: "mean" or "sum" over the images, or "image": terms of shape (B,), so that images can be
    routed to different heads, as in `(terms.total * high).sum() / high.sum().clamp(min=1)`. return_grad=True gives
    (terms, gradients of total.sum() with respect to logits and to uncertainty) at once, outside autograd.

    Extra memory: 0 bytes per pixel, with return_grad or a backward pass as much as logits and uncertainty.

    >>> terms = uncertainty_weighted_loss(logits, annotations, uncertainty)   # (B, 1, H, W), twice (B, 4, H, W)
    >>> terms.total.backward()
    """
    space, tensors, options = _uncertainty_arguments(
        logits,
        annotations,
        uncertainty,
        dice_weight,
        consistency_weight,
        raters,
        mask,
        entropy,
        eps,
        reduction,
    )
    if return_grad:
        terms, scores, *grads = _value_and_grad("uncertainty", space, tensors, options, (1.0, 0.0, 0.0, 0.0))
        return UncertaintyTerms(*terms, *scores), *grads
    terms, scores = _terms("uncertainty", space, tensors, options)
    return UncertaintyTerms(*terms, *scores)


def dual_task_loss(
    logits: Any,
    sdf: Any,
    target: Any,
    *,
    k: float = 1500.0,
    labelled: Any = None,
    routing: str = "own",
    per_image: bool = False,
    mask: Any = None,
    eps: float = 1e-5,
    reduction: str = "mean",
    return_grad: bool = False,
    grad_weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> Any:
    """The losses of a segmentation and a distance-map network that teach each other; Zhang and Zhang (DTML) 2021.

    logits (B, 1, *S) of the one; sdf (B, 1, *S) or (B, *S) of the other, negative inside, in [-1, 1]; target (B, *S)
    or (B, 1, *S). With p = sigmoid(logits), t = sigmoid(-k sdf) (eq. 2 as the public code has it; its k is 1500)

    - seg = (mean CE(p, y) + Dice(p, y)) / 2 and mask = Dice(t, y), over the labelled images; Dice = 1 - (2 sum p y +
      eps) / (sum p^2 + sum y^2 + eps)
    - consistency = mean (p - t)^2 over all images

    Half-precision inputs are brought to float32 before the multiplication with k.

    labelled: (B,) array of any dtype, not 0 for a labelled image, or the number of labelled images at the front of
    the batch; None: all. The other images' target is never read. per_image=False takes all sums over the batch, as
    the code does (train_la_dtml.py); True means terms over images. reduction="image" (with per_image=True) gives (B,)
    terms, 0 for seg and mask of unlabelled images.

    routing, of the consistency term's gradient (its value is always the same): "own": each network its own, as in
    eq. 6; "shared": twice that, which is what the public code does, because it back-propagates both networks' losses
    through the one undetached term (train_la_dtml.py:188-189); "logits" or "sdf": only that input learns from it.

    return_grad=True gives (terms, gradients with respect to logits and to sdf) at once, outside autograd: of the sum
    of the terms times grad_weights.

    Extra memory: 0 bytes per pixel, with return_grad or a backward pass as much as logits and sdf.

    >>> seg, mask, consistency = dual_task_loss(logits, sdf, labels, labelled=2)
    >>> (seg + mask + 0.1 * consistency).backward()
    """
    space, tensors, options = _dual_task_arguments(
        logits, sdf, target, k, labelled, routing, per_image, mask, eps, reduction
    )
    if return_grad:
        terms, _, by_logits, by_sdf = _value_and_grad(
            "dual_task", space, tensors, options, _three(grad_weights)
        )
        return (
            DualTaskTerms(*terms),
            by_logits,
            by_sdf if len(sdf.shape) == len(logits.shape) else by_sdf[:, 0],
        )
    return DualTaskTerms(*_terms("dual_task", space, tensors, options)[0])


class UncertaintyWeightedLoss(LossModule):
    """`uncertainty_weighted_loss` as a module: the keyword arguments go to the constructor.

    >>> terms = UncertaintyWeightedLoss(consistency_weight=0.5)(logits, annotations, uncertainty)
    """

    _function = staticmethod(uncertainty_weighted_loss)
    _per_call = ("raters", "mask", "return_grad")

    def forward(  # type: ignore[override]
        self, logits: Any, annotations: Any, uncertainty: Any, raters: Any = None, mask: Any = None
    ) -> Any:
        return self._function(logits, annotations, uncertainty, raters=raters, mask=mask, **self.options)


class DualTaskLoss(LossModule):
    """`dual_task_loss` as a module: `labelled` and `mask` go to the call, the other options to the constructor."""

    _function = staticmethod(dual_task_loss)
    _per_call = ("labelled", "mask", "return_grad", "grad_weights")

    def forward(  # type: ignore[override]
        self, logits: Any, sdf: Any, target: Any, labelled: Any = None, mask: Any = None
    ) -> Any:
        return self._function(logits, sdf, target, labelled=labelled, mask=mask, **self.options)


# ---- checks ---------------------------------------------------------------------------------------

# Both kinds of loss come to the same five arrays: logits, the other differentiable input, the labels, weights of maps
# or images, the mask; and to their options as numbers, in the order of the structs in task_losses.h.
Tensors = tuple[Any, Any, Any, Any, Any]
Options = tuple[float, ...]
TERMS = {"uncertainty": 4, "dual_task": 3}
_LABELS_NAME = {"uncertainty": "annotations", "dual_task": "target"}


def _index(name: str, value: str, allowed: Sequence[str]) -> int:
    try:
        return allowed.index(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}") from None


def _finite(name: str, value: float, *, above: float = -math.inf, or_equal: bool = True) -> float:
    given = float(value)
    if not (math.isfinite(given) and (given >= above if or_equal else given > above)):
        bound = "finite" if above == -math.inf else f"finite and {'>=' if or_equal else '>'} {above:g}"
        raise ValueError(f"{name} must be {bound}, got {value}")
    return given


def _check_logits(space: _arrays.Namespace, logits: Any) -> tuple[int, ...]:
    shape = tuple(logits.shape)
    if not 2 <= len(shape) <= _arrays.MAX_RANK or shape[1] != 1:
        raise ValueError(
            f"logits must be (B, 1, *S) with 2 to {_arrays.MAX_RANK} dimensions, got shape {shape}"
        )
    _arrays.check_dtype("logits", space.dtype(logits), _arrays.FLOATS)
    return shape


def _three(grad_weights: Sequence[float]) -> tuple[float, ...]:
    try:
        seg, mask, consistency = (float(w) for w in grad_weights)
    except (TypeError, ValueError):
        raise ValueError(
            f"grad_weights must be three numbers, of seg, mask and consistency; got {grad_weights!r}"
        ) from None
    return seg, mask, consistency


def _check_mask(mask: Any, shape: tuple[int, ...]) -> Any:
    """(B, *S), from that or (B, 1, *S)."""
    if mask is None:
        return None
    given, pixels = tuple(mask.shape), (shape[0], *shape[2:])
    if given == shape:
        return mask[:, 0]
    if given != pixels:
        raise ValueError(f"mask has shape {given}; for logits of shape {shape} it must be {pixels}")
    return mask


def _uncertainty_arguments(
    logits: Any,
    annotations: Any,
    uncertainty: Any,
    dice_weight: float,
    consistency_weight: float,
    raters: Any,
    mask: Any,
    entropy: str,
    eps: float,
    reduction: str,
) -> tuple[_arrays.Namespace, Tensors, Options]:
    options = (
        _finite("dice_weight", dice_weight),
        _finite("consistency_weight", consistency_weight),
        float(_index("entropy", entropy, _ENTROPIES)),
        _finite("eps", eps, above=0),
        float(_index("reduction", reduction, _REDUCTIONS)),
    )
    _arrays.given(logits=logits, annotations=annotations, uncertainty=uncertainty)
    space = _arrays.of(
        logits=logits, annotations=annotations, uncertainty=uncertainty, raters=raters, mask=mask
    )
    shape = _check_logits(space, logits)
    given = tuple(annotations.shape)
    if len(given) != len(shape) or (given[0], *given[2:]) != (shape[0], *shape[2:]) or given[1] < 1:
        raise ValueError(
            f"annotations has shape {given}; for logits of shape {shape} it must be "
            f"{(shape[0], 'M', *shape[2:])} with M >= 1".replace("'", "")
        )
    if given[1] > _MAX_RATERS:
        raise ValueError(f"annotations has {given[1]} maps; at most {_MAX_RATERS} are supported")
    if tuple(uncertainty.shape) != given:
        raise ValueError(
            f"uncertainty has shape {tuple(uncertainty.shape)}; it must be {given}, as annotations"
        )
    _arrays.check_dtype("uncertainty", space.dtype(uncertainty), _arrays.FLOATS)
    if raters is not None and tuple(raters.shape) != given[:2]:
        raise ValueError(f"raters has shape {tuple(raters.shape)}; it must be (B, M) = {given[:2]}")
    return space, (logits, uncertainty, annotations, raters, _check_mask(mask, shape)), options


def _dual_task_arguments(
    logits: Any,
    sdf: Any,
    target: Any,
    k: float,
    labelled: Any,
    routing: str,
    per_image: bool,
    mask: Any,
    eps: float,
    reduction: str,
) -> tuple[_arrays.Namespace, Tensors, Options]:
    _index("reduction", reduction, ("mean", "image"))
    if reduction == "image" and not per_image:
        raise ValueError("reduction 'image' needs per_image=True: the sums run over the batch otherwise")
    _arrays.given(logits=logits, sdf=sdf, target=target)
    # bool is an int, but "labelled=True" would mean one image
    counted = isinstance(labelled, (int, np.integer)) and not isinstance(labelled, bool)
    count = int(labelled) if counted else None
    chosen = None if count is not None else labelled
    space = _arrays.of(logits=logits, sdf=sdf, target=target, labelled=chosen, mask=mask)
    shape = _check_logits(space, logits)
    pixels = (shape[0], *shape[2:])
    if count is not None and not 0 <= count <= shape[0]:
        raise ValueError(f"labelled must lie in 0..{shape[0]}, the number of images, got {count}")
    if chosen is not None and tuple(chosen.shape) != shape[:1]:
        raise ValueError(
            f"labelled has shape {tuple(chosen.shape)}; it must be {shape[:1]}, or a number of images"
        )
    options = (
        _finite("k", k, above=0, or_equal=False),
        _finite("eps", eps, above=0),
        float(_index("routing", routing, _ROUTINGS)),
        float(bool(per_image)),
        float(_REDUCTIONS.index(reduction)),
        float(shape[0] if count is None else count),
    )
    checked = []
    for name, x in (("sdf", sdf), ("target", target)):
        x = _arrays.indexable(space, x)
        if tuple(x.shape) == pixels:
            x = x[:, None]
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; for logits of shape {shape} it must be {pixels} or {shape}"
            )
        checked.append(x)
    _arrays.check_dtype("sdf", space.dtype(sdf), _arrays.FLOATS)
    return space, (logits, checked[0], checked[1], chosen, _check_mask(mask, shape)), options


# ---- calls of the compiled module -----------------------------------------------------------------


def _terms(kind: str, space: _arrays.Namespace, tensors: Tensors, options: Options) -> tuple[Any, Any]:
    if space.name == "torch":
        from . import _task_autograd

        return _task_autograd.terms(kind, tensors, options)
    terms, scores, _ = forward(kind, space, tensors, options)
    return _rows(space, terms), _rows(space, scores)


def _rows(space: _arrays.Namespace, x: Any) -> tuple[Any, ...]:
    return tuple(space.back(x[i, ...]) for i in range(int(x.shape[0])))


def _value_and_grad(
    kind: str, space: _arrays.Namespace, tensors: Tensors, options: Options, weights: Sequence[float]
) -> tuple[Any, ...]:
    terms, scores, sums = forward(kind, space, tensors, options)
    upstream = space.empty(tuple(terms.shape), space.dtype(terms))
    for i, w in enumerate(weights):
        upstream[i] = w
    grads = [space.empty_like(x) for x in tensors[:2]]
    backward(kind, space, tensors, options, upstream, None, sums, (grads[0], grads[1]))
    return _rows(space, terms), _rows(space, scores), *map(space.back, grads)


def wide(space: _arrays.Namespace, tensors: Tensors) -> str:
    """The dtype of the terms."""
    return "float64" if "float64" in (space.dtype(tensors[0]), space.dtype(tensors[1])) else "float32"


def shapes(kind: str, tensors: Tensors, options: Options) -> tuple[tuple[int, ...], ...]:
    """Of terms, scores and sums."""
    batch = int(tensors[0].shape[0])
    terms = (TERMS[kind], batch) if int(options[4]) == 2 else (TERMS[kind],)
    if kind == "uncertainty":
        return terms, (2, batch), (batch, 7 + 2 * int(tensors[2].shape[1]))
    return terms, (0, batch), (batch, 10)


def _views(space: _arrays.Namespace, tensors: Sequence[Any]) -> tuple[_arrays.View | None, ...]:
    return tuple(None if x is None else space.view(x) for x in tensors)


def forward(
    kind: str,
    space: _arrays.Namespace,
    tensors: Tensors,
    options: Options,
    direction: tuple[Any, Any] = (None, None),
) -> tuple[Any, Any, Any]:
    """(terms, scores, sums); along a direction, of logits and the other input, their derivatives."""
    of_terms, of_scores, of_sums = shapes(kind, tensors, options)
    along = direction[0] is not None or direction[1] is not None
    dtype = wide(space, tensors)
    terms, scores = space.empty(of_terms, dtype), space.empty(of_scores, dtype)
    sums = space.empty((*of_sums, 2) if along else of_sums, "float64")
    inputs, exec_ = _views(space, (*tensors, *direction)), space.exec
    memory = space.empty((getattr(_core, f"{kind}_workspace")(inputs, exec_) // 8,), "float64")
    results = [space.view(terms), space.view(sums), space.view(memory)[0], exec_]
    if kind == "uncertainty":
        results.insert(1, None if along else space.view(scores))
    fault = getattr(_core, f"{kind}_forward")(inputs, options, *results)
    del memory
    if fault == 1:
        raise ValueError(
            f"{_LABELS_NAME[kind]} holds integers other than 0 and 1; leave such pixels out by mask"
        )
    if fault == 2:
        raise ValueError("raters holds a negative or infinite weight or NaN; use weights >= 0")
    return terms, scores, sums


def backward(
    kind: str,
    space: _arrays.Namespace,
    tensors: Tensors,
    options: Options,
    grad_terms: Any,
    grad_terms_dot: Any,
    sums: Any,
    grads: tuple[Any, Any],
    direction: tuple[Any, Any] = (None, None),
) -> None:
    """Fills grads: with respect to logits and the other input, each may be None."""
    getattr(_core, f"{kind}_backward")(
        _views(space, (*tensors, *direction)),
        options,
        *_views(space, (grad_terms, grad_terms_dot, sums, *grads)),
        space.exec,
    )
