"""The operations, readable and slow: the definition, the tests' oracle, the benchmark's baseline.

Plain PyTorch; nothing here calls the compiled module. Distances and surfaces are found by comparing all pairs of
voxels, so keep the images small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# ---- losses ---------------------------------------------------------------------------------------


def _probability(logits: Tensor, activation: str) -> Tensor:
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(1)


def _per_class(logits: Tensor, target: Tensor) -> Tensor:
    """Labels (B, *S) as one map for each class (B, C, *S) in the logits' dtype; such maps as they are."""
    if target.shape == logits.shape:
        return target.to(logits.dtype)
    classes = logits.shape[1]
    if classes == 1:
        return target.to(logits.dtype).unsqueeze(1)
    return F.one_hot(target.long(), classes).movedim(-1, 1).to(logits.dtype)


def _pixel_weight(logits: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B, 1, *S): weight where mask is not 0, else 0."""
    w = torch.ones_like(logits[:, :1]) if weight is None else weight.to(logits.dtype).unsqueeze(1)
    return w if mask is None else torch.where(mask.unsqueeze(1) != 0, w, torch.zeros_like(w))


def _ratio_loss(
    numerator: Tensor,
    denominator: Tensor,
    *,
    dice: bool,
    per_image: bool,
    include_background: bool,
    eps: float,
    reduction: str,
) -> Tensor:
    """The loss from (B, C, *S) maps whose sums are the numerator and the denominator."""
    n, d = (x.flatten(2).sum(2) for x in (numerator, denominator))
    if not per_image:
        n, d = n.sum(0), d.sum(0)
    if not include_background and n.shape[-1] > 1:
        n, d = n[..., 1:], d[..., 1:]
    loss = 1 - (n + eps) / (d + eps) if dice else n / (d + eps)
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": torch.mean,
        "sum": torch.sum,
        "none": lambda x: x,
    }
    return reduce[reduction](loss)


def nr_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    activation: str = "sigmoid",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """sum w |p - g|^gamma / (sum w p^2 + sum w g^2 + eps); Wang et al., TMI 2020, eq. 3."""
    p, g = _probability(logits, activation), _per_class(logits, target)
    w = _pixel_weight(logits, weight, mask)
    d = p**2 + g**2 if denominator == "squared" else p + g
    return _ratio_loss(
        w * (p - g).abs() ** gamma,
        w * d,
        dice=False,
        per_image=per_image,
        include_background=include_background,
        eps=eps,
        reduction=reduction,
    )


def dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str = "sigmoid",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """1 - (2 sum w p g + eps) / (sum w p^2 + sum w g^2 + eps)."""
    p, g = _probability(logits, activation), _per_class(logits, target)
    w = _pixel_weight(logits, weight, mask)
    d = p**2 + g**2 if denominator == "squared" else p + g
    return _ratio_loss(
        w * 2 * p * g,
        w * d,
        dice=True,
        per_image=per_image,
        include_background=include_background,
        eps=eps,
        reduction=reduction,
    )


def pixel_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: str = "ce",
    activation: str = "softmax",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy map times weight; "mean" divides by the pixels in the mask (or their class weights)."""
    if kind != "ce":
        raise ValueError(f"kind must be ce, got {kind!r}")
    g = _per_class(logits, target)
    shape = (1, -1) + (1,) * (logits.ndim - 2)
    cw = torch.ones(logits.shape[1]) if class_weight is None else torch.as_tensor(class_weight)
    cw = cw.to(logits).reshape(shape)
    labels = target.ndim == logits.ndim - 1
    if activation == "softmax":
        loss = -(cw * g * logits.log_softmax(1)).sum(1)
        count = (cw * g).sum(1) if labels else torch.ones_like(loss)
    else:
        loss = (cw * F.binary_cross_entropy_with_logits(logits, g, reduction="none")).mean(1)
        count = torch.ones_like(loss)
    inside = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask != 0
    loss = torch.where(inside, _pixel_weight(logits, weight, mask)[:, 0] * loss, torch.zeros_like(loss))
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = torch.where(inside, count, torch.zeros_like(count)).sum()
    return loss.sum() / torch.where(total == 0, torch.ones_like(total), total)


# ---- distances ------------------------------------------------------------------------------------


def _distance_to(sites: Tensor, spacing: Sequence[float] | None) -> Tensor:
    """Distance of every voxel of one item (*S) to the nearest True one, float64; inf without any."""
    scale = torch.ones(sites.ndim) if spacing is None else torch.as_tensor(spacing, dtype=torch.float64)
    grid = (
        torch.cartesian_prod(*(torch.arange(n) for n in sites.shape)).reshape(-1, sites.ndim) * scale.double()
    )
    targets = grid[sites.flatten()]
    if not len(targets):
        return torch.full(sites.shape, math.inf, dtype=torch.float64)
    distance = torch.cdist(grid, targets, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.amin(1).reshape(sites.shape)


def _to_outside(shape: Sequence[int], spacing: Sequence[float] | None) -> Tensor:
    """Distance of every voxel to the nearest of those just outside the image."""
    result = torch.full(tuple(shape), math.inf, dtype=torch.float64)
    for axis, n in enumerate(shape):
        i = torch.arange(n)
        along = torch.minimum(i + 1, n - i).double() * (1.0 if spacing is None else float(spacing[axis]))
        result = torch.minimum(result, along.reshape(-1, *(1,) * (len(shape) - axis - 1)))
    return result


def inner_contour(mask: Tensor, border: bool = False) -> Tensor:
    """Object voxels of one item (*S) with a face neighbour, inside the image, that is background; with border, also
    those with a face neighbour outside."""
    mask = mask != 0
    edge = torch.zeros_like(mask)
    for axis in range(mask.ndim):
        n = mask.shape[axis]
        edge.narrow(axis, 1, n - 1).logical_or_(~mask.narrow(axis, 0, n - 1))
        edge.narrow(axis, 0, n - 1).logical_or_(~mask.narrow(axis, 1, n - 1))
        if border:
            edge.select(axis, 0).fill_(True)
            edge.select(axis, n - 1).fill_(True)
    return mask & edge


def distance_transform_edt(
    mask: Tensor,
    spacing: Sequence[float] | None = None,
    *,
    multi_label: bool = False,
    border: bool = False,
) -> Tensor:
    """One item (*S): distance of every object voxel to the nearest background voxel, or voxel of another label."""
    result = torch.zeros(mask.shape, dtype=torch.float64)
    labels = mask if multi_label else mask != 0
    for label in labels.unique():
        if label != 0:
            result = torch.where(labels == label, _distance_to(labels != label, spacing), result)
    if border:
        result = torch.minimum(result, _to_outside(mask.shape, spacing))
    return result


def sampled_distance(
    values: Tensor, sites: Tensor | None = None, spacing: Sequence[float] | None = None
) -> Tensor:
    """One item (*S): min over the sites q of values[q] + |p - q|^2, differentiable; every item needs a site."""
    scale = torch.ones(values.ndim) if spacing is None else torch.as_tensor(spacing, dtype=torch.float64)
    grid = (
        torch.cartesian_prod(*(torch.arange(n) for n in values.shape)).reshape(-1, values.ndim)
        * scale.double()
    )
    squared = ((grid[:, None] - grid[None]) ** 2).sum(-1)
    sampled = values if sites is None else torch.where(sites != 0, values, math.inf)
    return (squared + sampled.flatten()).min(1).values.reshape(values.shape)


def signed_distance_map(
    mask: Tensor,
    spacing: Sequence[float] | None = None,
    *,
    convention: str = "boundary",
    normalize: bool = False,
    border: bool = False,
) -> Tensor:
    """One item (*S): negative inside; the conventions of `noisyseg_fast.signed_distance_map`."""
    mask = mask != 0
    outside, inside = _distance_to(mask, spacing), _distance_to(~mask, spacing)
    if border:
        inside = torch.minimum(inside, _to_outside(mask.shape, spacing))
    one_class = bool((torch.where(mask, inside, outside) == math.inf).any())
    contour = inner_contour(mask, border)
    if convention == "boundary":
        phi = torch.where(mask, -1.0, 1.0) * _distance_to(contour, spacing)
    elif convention == "two_sided":
        phi = torch.where(mask, -inside, outside)
    elif convention == "kervadec":
        phi = torch.zeros_like(outside) if one_class else torch.where(mask, 1 - inside, outside)
    elif one_class:
        phi = torch.where(mask, -1.0, 1.0)
    else:
        far_inside, far_outside = (
            torch.where(m, d, 0.0).max() for m, d in ((mask, inside), (~mask, outside))
        )
        phi = torch.where(mask, -inside / far_inside, outside / far_outside)
        phi = torch.where(contour, 0.0, phi)
    top = phi.abs().max()
    if normalize and top > 0:
        phi = phi.sign() if top == math.inf else phi / top
    return phi


# ---- metrics --------------------------------------------------------------------------------------

# A mask of rank n as in metrics.py; leading axes are a batch. Results are tuples in the order of
# metrics.SurfaceMetrics and metrics.OverlapMetrics, each a float64 tensor of the leading shape.


def mask_surface(mask: torch.Tensor) -> torch.Tensor:
    """mask (*S) without its erosion by the face-connected cross; outside the image is background."""
    mask = mask != 0
    inner = mask.clone()
    for axis in range(mask.ndim):
        along = inner.new_zeros([n + 2 if i == axis else n for i, n in enumerate(mask.shape)])
        along.narrow(axis, 1, mask.shape[axis]).copy_(mask)
        inner &= along.narrow(axis, 0, mask.shape[axis]) & along.narrow(axis, 2, mask.shape[axis])
    return mask & ~inner


def surface_metrics(
    pred: torch.Tensor,
    target: torch.Tensor,
    spacing: Sequence[float] | None = None,
    *,
    spatial_dims: int | None = None,
    definition: str = "monai",
    percentile: float = 95,
    tolerance: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """hd, hd_percentile, asd, assd, nsd as metrics.surface_metrics defines them, by comparing all pairs."""

    def one(p: torch.Tensor, t: torch.Tensor) -> list[float]:
        size = torch.tensor(spacing or [1.0] * p.ndim, dtype=torch.float64)
        a, b = mask_surface(p).nonzero() * size, mask_surface(t).nonzero() * size
        if not len(a) or not len(b):
            return [math.inf] * 4 + [0.0] if len(a) or len(b) else [0.0] * 4 + [1.0]
        squared = torch.zeros(len(a), len(b), dtype=torch.float64)
        for axis in range(p.ndim):
            squared += (a[:, None, axis] - b[None, :, axis]) ** 2
        to_target, to_pred = squared.amin(1).sqrt(), squared.amin(0).sqrt()
        both = torch.cat([to_target, to_pred])
        q = percentile / 100
        directed = torch.maximum(to_target.quantile(q), to_pred.quantile(q))
        near = (both.float() <= torch.tensor(tolerance, dtype=torch.float32)).double()
        high = directed if definition == "monai" else both.quantile(q)
        return [float(x) for x in (both.max(), high, to_target.mean(), both.mean(), near.mean())]

    return _per_mask(one, pred, target, spatial_dims)


def overlap_metrics(
    pred: torch.Tensor, target: torch.Tensor, *, spatial_dims: int | None = None
) -> tuple[torch.Tensor, ...]:
    """dice, jaccard, sensitivity, specificity, precision, volume_error as metrics.overlap_metrics."""

    def one(p: torch.Tensor, t: torch.Tensor) -> list[float]:
        p, t = p != 0, t != 0
        tp, fp, fn, tn = (int(x.sum()) for x in (p & t, p & ~t, ~p & t, ~p & ~t))
        agree = 0.0 if fp or fn else 1.0

        def share(part: int, whole: int) -> float:
            return part / whole if whole else agree

        error = (fp - fn) / (tp + fn) if tp + fn else (math.inf if fp else 0.0)
        return [
            share(2 * tp, 2 * tp + fp + fn),
            share(tp, tp + fp + fn),
            share(tp, tp + fn),
            share(tn, tn + fp),
            share(tp, tp + fp),
            error,
        ]

    return _per_mask(one, pred, target, spatial_dims)


def _per_mask(
    one: Callable[[torch.Tensor, torch.Tensor], list[float]],
    pred: torch.Tensor,
    target: torch.Tensor,
    spatial_dims: int | None,
) -> tuple[torch.Tensor, ...]:
    dims = spatial_dims or (pred.ndim if pred.ndim <= 3 else pred.ndim - 2)
    lead = pred.shape[: pred.ndim - dims]
    masks = pred.reshape(-1, *pred.shape[len(lead) :]), target.reshape(-1, *pred.shape[len(lead) :])
    rows = torch.tensor([one(p, t) for p, t in zip(*masks, strict=True)], dtype=torch.float64)
    return tuple(column.reshape(lead) for column in rows.T)
