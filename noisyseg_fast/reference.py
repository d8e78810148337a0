"""The operations, readable and slow: the definition, the tests' oracle, the benchmark's baseline.

Plain PyTorch; nothing here calls the compiled module. Distances and surfaces are found by comparing all pairs of
voxels, so keep the images small.
"""

from __future__ import annotations

import itertools
import math
import operator
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
    scale = torch.ones(sites.ndim) if spacing is None else torch.as_tensor(spacing)
    grid = (
        torch.cartesian_prod(*(torch.arange(n) for n in sites.shape)).reshape(-1, sites.ndim) * scale.double()
    )
    targets = grid[sites.flatten()]
    if not len(targets):
        return torch.full(sites.shape, math.inf, dtype=torch.float64)
    distance = torch.cdist(grid, targets, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.amin(1).reshape(sites.shape)


def inner_contour(mask: Tensor) -> Tensor:
    """Object voxels of one item (*S) with a face neighbour, inside the image, that is background."""
    mask = mask != 0
    edge = torch.zeros_like(mask)
    for axis in range(mask.ndim):
        n = mask.shape[axis]
        edge.narrow(axis, 1, n - 1).logical_or_(~mask.narrow(axis, 0, n - 1))
        edge.narrow(axis, 0, n - 1).logical_or_(~mask.narrow(axis, 1, n - 1))
    return mask & edge


def distance_transform_edt(mask: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
    """One item (*S): distance of every object voxel to the nearest background voxel."""
    return torch.where(mask != 0, _distance_to(mask == 0, spacing), 0.0)


def signed_distance_map(
    mask: Tensor,
    spacing: Sequence[float] | None = None,
    *,
    convention: str = "boundary",
    normalize: bool = False,
) -> Tensor:
    """One item (*S): negative inside; the conventions of `noisyseg_fast.signed_distance_map`."""
    mask = mask != 0
    one_class = bool(mask.all() or not mask.any())
    outside, inside = _distance_to(mask, spacing), _distance_to(~mask, spacing)
    contour = inner_contour(mask)
    if convention == "boundary":
        phi = torch.where(mask, -1.0, 1.0) * _distance_to(contour, spacing)
    elif convention == "two_sided":
        phi = torch.where(mask, -inside, outside)
    elif convention == "kervadec":
        phi = torch.zeros_like(outside) if one_class else torch.where(mask, 1 - inside, outside)
    elif one_class:
        phi = torch.where(mask, -1.0, 1.0)
    else:
        phi = torch.where(mask, -inside / inside[mask].max(), outside / outside[~mask].max())
        phi = torch.where(contour, 0.0, phi)
    top = phi.abs().max()
    if normalize and top > 0:
        phi = phi.sign() if top == math.inf else phi / top
    return phi


# ---- metrics --------------------------------------------------------------------------------------

# A mask of rank n as in metrics.py; leading axes are a batch. Results are tuples in the order of
# metrics.SurfaceMetrics and metrics.OverlapMetrics, each a float64 tensor of the leading shape.


def mask_surface(mask: torch.Tensor, surface: str = "face", border: bool = True) -> torch.Tensor:
    """mask (*S) without its erosion by the face-connected ("face") or full ("full") neighbourhood; "cells": bool
    (*S + 1), the cells between voxel centres that hold both object and background. Outside the image is background
    (border) or a repetition of its edge."""
    mask = mask != 0
    grown = _grown(mask, border)
    if surface == "cells":
        corners = torch.stack([_shifted(grown, s, 1) for s in itertools.product((0, 1), repeat=mask.ndim)])
        return corners.any(0) & ~corners.all(0)
    inner = mask.clone()
    for shift in itertools.product((0, 1, 2), repeat=mask.ndim):
        if surface == "full" or sum(s != 1 for s in shift) == 1:
            inner &= _shifted(grown, shift, 2)
    return mask & ~inner


def cell_weights(mask: torch.Tensor, spacing: Sequence[float], border: bool = True) -> torch.Tensor:
    """Length (2D) or area (3D) of the marching-squares or -cubes contour in each of the cells (*S + 1)."""
    axes = mask.ndim
    grown = _grown(mask != 0, border)
    sizes = (*spacing, 1.0, 1.0)[:3]
    code = sum(
        _shifted(grown, corner[:axes], 1).long() << i  # lower dimensions: prisms of length 1
        for i, corner in enumerate(itertools.product((0, 1), repeat=3))
    )
    assert isinstance(code, torch.Tensor)
    area = {c: contour_area(c, sizes) for c in code.unique().tolist()}
    return torch.tensor([area[c] for c in code.flatten().tolist()], dtype=torch.float64).reshape(code.shape)


def contour_area(code: int, spacing: Sequence[float]) -> float:
    """Area of marching cubes' polygons in a cell; bit 4 z + 2 y + x of code tells whether that corner is object.

    The fewer corners (object's or background's) are cut off from the others, each group of them that hangs together
    along the cube's edges on its own, through the middles of the edges that leave the group.
    """
    sides = {c for i, c in enumerate(itertools.product((0, 1), repeat=3)) if code >> i & 1}
    left = sides if len(sides) <= 4 else set(itertools.product((0, 1), repeat=3)) - sides
    z, y, x = spacing
    faces = (y * x, z * x, z * y)
    corner = math.hypot(*faces) / 8  # the triangle that cuts off one corner
    strip = [math.hypot(*(f for i, f in enumerate(faces) if i != axis)) / 2 for axis in range(3)]
    area = 0.0
    while left:
        group, grown = set[tuple[int, ...]](), {min(left)}
        while grown != group:
            group = grown
            grown = {c for c in left if any(sum(map(operator.ne, c, g)) <= 1 for g in group)}
        left = left - group
        edges = [(a, b) for a, b in itertools.combinations(group, 2) if sum(map(operator.ne, a, b)) == 1]
        along = [next(i for i in range(3) if a[i] != b[i]) for a, b in edges]
        degree = {c: sum(c in edge for edge in edges) for c in group}
        ends = [axis for edge, axis in zip(edges, along, strict=True) for c in edge if degree[c] == 1]
        if len(group) == 1:
            area += corner
        elif len(group) == 2:
            area += strip[along[0]]
        elif len(group) == 3:  # half of the face they lie in, and a trapezoid
            area += faces[3 - sum(along)] / 2 + 3 * corner
        elif len(edges) == 4:
            area += faces[3 - sum(set(along))]
        elif len(ends) == 3:  # a corner with its neighbours: a hexagon
            area += 6 * corner
        else:  # a path along three axes
            area += 4 * corner + sum(strip[axis] for axis in ends) / 2
    return area


def _grown(mask: torch.Tensor, border: bool) -> torch.Tensor:
    """A bool mask with one more voxel on every side, background or a repetition of its edge."""
    for axis in range(mask.ndim):
        first, last = mask.narrow(axis, 0, 1), mask.narrow(axis, mask.shape[axis] - 1, 1)
        ends = (torch.zeros_like(first), torch.zeros_like(last)) if border else (first, last)
        mask = torch.cat([ends[0], mask, ends[1]], axis)
    return mask


def _shifted(grown: torch.Tensor, start: Sequence[int], less: int) -> torch.Tensor:
    """The part of a grown mask that begins at start, `less` voxels smaller along each axis."""
    for axis, s in enumerate(start):
        grown = grown.narrow(axis, s, grown.shape[axis] - less)
    return grown


def surface_metrics(
    pred: torch.Tensor,
    target: torch.Tensor,
    spacing: Sequence[float] | None = None,
    *,
    spatial_dims: int | None = None,
    percentile: float = 95,
    tolerance: float | Sequence[float] = 1.0,
    surface: str = "face",
    percentile_rule: str = "max",
    interpolation: str = "linear",
    average: str = "pooled",
    border: bool = True,
    missing: float = math.inf,
) -> tuple[torch.Tensor, ...]:
    """hd, hd_percentile, asd, assd, asd_target, nsd at each tolerance as metrics.surface_metrics defines them for one
    bundle of rules, by comparing all pairs."""
    tolerances = [tolerance] if isinstance(tolerance, int | float) else list(tolerance)

    def one(p: torch.Tensor, t: torch.Tensor) -> list[float]:
        size = torch.tensor(spacing or [1.0] * p.ndim, dtype=torch.float64)
        places = [mask_surface(m, surface, border) for m in (p, t)]
        if not all(x.any() for x in places):
            agree = torch.equal(p != 0, t != 0)
            return [0.0 if agree else missing] * 5 + [float(agree)] * len(tolerances)
        a, b = (x.nonzero() * size for x in places)
        weights = [torch.ones(len(x), dtype=torch.float64) for x in (a, b)]
        if surface == "cells":
            weights = [cell_weights(m, size.tolist(), border)[x] for m, x in zip((p, t), places, strict=True)]
        squared = torch.zeros(len(a), len(b), dtype=torch.float64)
        for axis in range(p.ndim):
            squared += (a[:, None, axis] - b[None, :, axis]) ** 2
        directed = [squared.amin(1).sqrt(), squared.amin(0).sqrt()]
        both, weight = torch.cat(directed), torch.cat(weights)

        def mean(x: list[torch.Tensor]) -> list[float]:
            """From pred, from target, and of both."""
            parts = [float((w * v).sum() / w.sum()) for w, v in zip(weights, x, strict=True)]
            pooled = float((weight * torch.cat(x)).sum() / weight.sum())
            return [*parts, sum(parts) / 2 if average == "mean" else pooled]

        def quantile(d: torch.Tensor, w: torch.Tensor) -> float:
            if interpolation == "linear":
                return float(d.quantile(percentile / 100))
            d, order = d.sort()
            reached = w[order].cumsum(0) >= percentile / 100 * w.sum() * (1 - 1e-9)
            return float(d[reached][0]) if reached.any() else float(d[-1])

        high = quantile(both, weight)
        if percentile_rule == "max":
            high = max(quantile(d, w) for d, w in zip(directed, weights, strict=True))
        asd, back, assd = mean(directed)
        limits = [torch.tensor(x, dtype=torch.float32) for x in tolerances]
        nsd = [mean([(d.float() <= limit).double() for d in directed])[2] for limit in limits]
        return [float(both.max()), high, asd, assd, back, *nsd]

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
