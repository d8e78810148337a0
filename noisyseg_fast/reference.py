"""The operations, readable and slow: the definition, the tests' oracle, the benchmark's baseline.

Plain PyTorch; nothing here calls the compiled module. Distances and surfaces are found by comparing all pairs of
voxels, so keep the images small.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

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


def _pixel_weight(
    logits: Tensor, weight: Tensor | None, mask: Tensor | None, target: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """weight where the pixel is in, else 0, and whether it is in: (B, *S)."""
    inside = torch.ones_like(logits[:, 0], dtype=torch.bool) if mask is None else mask != 0
    if ignore_index is not None:
        inside = inside & (target != ignore_index)
    w = torch.ones_like(logits[:, 0]) if weight is None else weight.to(logits.dtype)
    return torch.where(inside, w, torch.zeros_like(w)), inside


def _smooth(g: Tensor, label_smoothing: float) -> Tensor:
    return (1 - label_smoothing) * g + label_smoothing / max(g.shape[1], 2)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    """(B, C) or (C,), (B,), () region losses."""
    if reduction == "image":
        return loss.reshape(loss.shape[0], -1).mean(1)
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": torch.mean,
        "sum": torch.sum,
        "none": lambda x: x,
    }
    return reduce[reduction](loss)


def _sums(maps: Sequence[Tensor], w: Tensor, per_image: bool, include_background: bool) -> list[Tensor]:
    """Weighted sums of (B, C, *S) maps: (B, C), or (C,) over the batch."""
    sums = []
    for x in maps:
        total = torch.where(w[:, None] != 0, w[:, None] * x, torch.zeros_like(x)).flatten(2).sum(2)
        total = total if per_image else total.sum(0)
        sums.append(total[..., 1:] if not include_background and total.shape[-1] > 1 else total)
    return sums


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
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """sum w |p - g|^gamma / (sum w p^2 + sum w g^2 + eps); Wang et al., TMI 2020, eq. 3."""
    w, _ = _pixel_weight(logits, weight, mask, target, ignore_index)
    p, g = _probability(logits, activation), _smooth(_per_class(logits, target), label_smoothing)
    size = (p**2 + g**2) if denominator == "squared" else p + g
    n, d = _sums([(p - g).abs() ** gamma, size], w, per_image, include_background)
    return _reduce(n / (d + eps), reduction)


def _dice(
    logits: Tensor,
    target: Tensor,
    activation: str,
    denominator: str,
    per_image: bool,
    include_background: bool,
    weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
) -> list[Tensor]:
    """sum w 2 p g, sum w (p^2 + g^2) or w (p + g), and sum w g, for each image and class."""
    w, _ = _pixel_weight(logits, weight, mask, target, ignore_index)
    p, g = _probability(logits, activation), _smooth(_per_class(logits, target), label_smoothing)
    size = (p**2 + g**2) if denominator == "squared" else p + g
    return _sums([2 * p * g, size, g], w, per_image, include_background)


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
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """1 - (2 sum w p g + eps) / (sum w p^2 + sum w g^2 + eps)."""
    which = (activation, denominator, per_image, include_background)
    n, d, _ = _dice(logits, target, *which, weight, mask, ignore_index, label_smoothing)
    return _reduce(1 - (n + eps) / (d + eps), reduction)


def focal_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    beta: float = 0.5,
    activation: str = "sigmoid",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """1 - Dice^(1 / beta); Wang et al., TMI 2020, Table I."""
    which = (activation, denominator, per_image, include_background)
    n, d, _ = _dice(logits, target, *which, weight, mask, ignore_index, label_smoothing)
    return _reduce(1 - ((n + eps) / (d + eps)) ** (1 / beta), reduction)


def generalized_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weighting: str = "square",
    activation: str = "softmax",
    denominator: str = "linear",
    per_image: bool = True,
    include_background: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """1 - (sum_c v_c 2 sum w p g + eps) / (sum_c v_c sum w (p + g) + eps); Sudre et al. 2017."""
    which = (activation, denominator, per_image, include_background)
    n, d, volume = _dice(logits, target, *which, weight, mask, ignore_index, label_smoothing)
    power = {"uniform": 0, "simple": 1, "square": 2}[class_weighting]
    there = volume != 0
    v = torch.where(there, torch.where(there, volume, torch.ones_like(volume)) ** -power, 0.0)
    top = v.amax(-1, keepdim=True)
    v = torch.where(there, v, torch.where(top == 0, torch.ones_like(top), top))
    return _reduce(1 - ((v * n).sum(-1) + eps) / ((v * d).sum(-1) + eps), reduction)


def _entropy(g: Tensor) -> Tensor:
    return torch.xlogy(g, g)


def _pixel_terms(logits: Tensor, g: Tensor, kind: str, activation: str, parameter: float) -> Tensor:
    """(B, C, *S): what each class adds to the loss of its pixel."""
    classes = logits.shape[1]
    if activation == "sigmoid":
        p, log_p, log_q = logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)
        f, q = 1 - g, (-logits).sigmoid()
        terms = {
            "ce": lambda: -g * log_p - f * log_q,
            "focal": lambda: -g * q**parameter * log_p - f * p**parameter * log_q,
            "gce": lambda: (g * (1 - p**parameter) + f * (1 - q**parameter)) / parameter,
            "mae": lambda: (p - g).abs(),
            "mse": lambda: (p - g) ** 2,
            "kl": lambda: _entropy(g) + _entropy(f) - g * log_p - f * log_q,
            "boundary": lambda: p * g,
        }
        return terms[kind]() / classes
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    terms = {
        "ce": lambda: -g * log_p,
        "focal": lambda: -g * (1 - p) ** parameter * log_p,
        "gce": lambda: g * (1 - p**parameter) / parameter,
        "mae": lambda: (p - g).abs() / classes,
        "mse": lambda: (p - g) ** 2 / classes,
        "kl": lambda: _entropy(g) - g * log_p,
        "boundary": lambda: p * g / classes,
    }
    return terms[kind]()


def pixel_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: str = "ce",
    activation: str = "softmax",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    class_weight: Sequence[float] | Tensor | None = None,
    q: float = 0.7,
    focal_gamma: float = 2.0,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Loss map times weight; "mean" divides by the pixels that are in (or their labels' class weights)."""
    w, inside = _pixel_weight(logits, weight, mask, target, ignore_index)
    labels = _per_class(logits, target)
    given = [1.0] * logits.shape[1] if class_weight is None else class_weight
    cw = torch.as_tensor(given, dtype=logits.dtype, device=logits.device)
    cw = cw.reshape((1, -1) + (1,) * (logits.ndim - 2))
    g = labels if kind == "boundary" else _smooth(labels, label_smoothing)
    parameter = {"gce": q, "focal": focal_gamma}.get(kind, 0.0)
    loss = (cw * _pixel_terms(logits, g, kind, activation, parameter)).sum(1)
    loss = torch.where(w != 0, w * loss, torch.zeros_like(loss))
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    by_class = activation == "softmax" and target.ndim == logits.ndim - 1 and kind in ("ce", "focal", "gce")
    count = (cw * labels).sum(1) if by_class and class_weight is not None else torch.ones_like(loss)
    count = torch.where(inside, count, torch.zeros_like(count))
    if reduction == "image":
        loss, count = loss.flatten(1).sum(1), count.flatten(1).sum(1)
    else:
        loss, count = loss.sum(), count.sum()
    return loss / torch.where(count == 0, torch.ones_like(count), count)


def dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    activation: str = "softmax",
    class_weight: Sequence[float] | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    kind: str = "ce",
    **dice: Any,
) -> Tensor:
    """dice_weight * dice_loss + ce_weight * pixel_loss."""
    both: dict[str, Any] = {
        "activation": activation,
        "weight": weight,
        "mask": mask,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    pixel = pixel_loss(logits, target, kind=kind, class_weight=class_weight, **both)
    return dice_weight * dice_loss(logits, target, **both, **dice) + ce_weight * pixel


def dice_mae_loss(logits: Tensor, target: Tensor, *, mae_weight: float = 1.0, **options: Any) -> Tensor:
    """dice_weight * dice_loss + mae_weight * pixel_loss(kind="mae")."""
    return dice_ce_loss(logits, target, kind="mae", ce_weight=mae_weight, **options)


def boundary_loss(
    logits: Tensor,
    distance_map: Tensor,
    *,
    activation: str = "sigmoid",
    include_background: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over classes and pixels of w p phi; Kervadec et al., MIDL 2019, eq. 5."""
    classes, cw = logits.shape[1], None
    if not include_background and classes > 1:
        cw = [0.0] + [classes / (classes - 1)] * (classes - 1)
    options: dict[str, Any] = {"activation": activation, "weight": weight, "mask": mask, "class_weight": cw}
    return pixel_loss(logits, distance_map, kind="boundary", reduction=reduction, **options)


def consistency_loss(
    logits: Tensor,
    target_logits: Tensor,
    *,
    kind: str = "mse",
    activation: str = "softmax",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """pixel_loss against the teacher's probabilities."""
    target = _probability(target_logits.to(logits.dtype), activation)
    options: dict[str, Any] = {"activation": activation, "weight": weight, "mask": mask}
    return pixel_loss(logits, target, kind=kind, reduction=reduction, **options)


# ---- losses of several maps -----------------------------------------------------------------------


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0."""
    nothing = whole == 0
    return torch.where(
        nothing, torch.zeros_like(part), part / torch.where(nothing, torch.ones_like(whole), whole)
    )


def _inside(x: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, x, torch.zeros_like(x))


def _keep(logits: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1, *S) bool"""
    if mask is None:
        return torch.ones_like(logits, dtype=torch.bool)
    return (mask != 0).reshape(logits.shape)


def _reduce_images(values: list[Tensor], reduction: str) -> list[Tensor]:
    if reduction == "image":
        return values
    return [v.sum() / (max(len(v), 1) if reduction == "mean" else 1) for v in values]


def uncertainty_weighted_loss(
    logits: Tensor,
    annotations: Tensor,
    uncertainty: Tensor,
    *,
    dice_weight: float = 1.0,
    consistency_weight: float = 1.0,
    raters: Tensor | None = None,
    mask: Tensor | None = None,
    entropy: str = "paper",
    eps: float = 1e-5,
    reduction: str = "mean",
) -> tuple[Tensor, ...]:
    """total, ce, dice, consistency, confidence, agreement; UMA-Net eq. 1-8, for each image."""
    r = torch.ones(annotations.shape[:2]) if raters is None else raters
    r = r.to(logits).reshape(*annotations.shape[:2], *(1,) * (logits.ndim - 2))  # (B, M, 1, ...)
    keep = _keep(logits, mask)
    inside = keep & (r != 0)  # (B, M, *S)
    z, sigma, y = _inside(logits, keep), _inside(uncertainty, inside), _inside(annotations.to(logits), inside)
    count, m = keep.flatten(1).sum(1).to(logits), r.flatten(1).sum(1)

    def total(x: Tensor) -> Tensor:
        return _inside(x, inside).flatten(1).sum(1)

    p = z.sigmoid()
    each = F.binary_cross_entropy_with_logits(z.expand_as(y), y, reduction="none")
    ce = _share(total(r * (each * torch.exp(-sigma) + sigma / 2)), count * m)
    error = _inside(torch.exp(-sigma) * (p - y) ** 2, inside).flatten(2).sum(2)
    square = (_inside(p**2, keep).flatten(2).sum(2) + (y**2).flatten(2).sum(2)) + eps
    dice = _share((r.flatten(1) * _share(error, square)).sum(1), m)
    dice = dice + _share(total(r * sigma / 2), count * m)
    s = (y - sigma).abs()
    ones = m.reshape(-1, *(1,) * (logits.ndim - 1))
    mean = _share((r * s).sum(1, keepdim=True), ones.expand_as(z))
    variance = _share((r * (s - mean) ** 2).sum(1, keepdim=True), ones.expand_as(z))
    variance, star = (_inside(x, keep).flatten(1) for x in (variance, mean))
    consistency = _share(variance.sum(1), count)
    h = -torch.xlogy(star, star) - (torch.xlogy(1 - star, 1 - star) if entropy == "binary" else 0)
    confidence = _share(h.sum(1), count if entropy == "binary" else star.sum(1))
    agreement = _share(4 * variance.sum(1), star.sum(1))
    terms = [ce + dice_weight * dice + consistency_weight * consistency, ce, dice, consistency]
    return *_reduce_images(terms, reduction), confidence.detach(), agreement.detach()


def dual_task_loss(
    logits: Tensor,
    sdf: Tensor,
    target: Tensor,
    *,
    k: float = 1500.0,
    labelled: Tensor | int | None = None,
    routing: str = "own",
    per_image: bool = False,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """seg, mask, consistency; DTML. The sums run over each group: the batch, or with per_image an image."""
    batch = len(logits)
    if labelled is None or isinstance(labelled, int):
        labelled = torch.arange(batch) < (batch if labelled is None else labelled)
    keep = _keep(logits, mask)
    known = keep & (labelled != 0).reshape(-1, *(1,) * (logits.ndim - 1))
    z, d = _inside(logits, keep), _inside(sdf.reshape(logits.shape), keep)
    y = _inside(target.reshape(logits.shape).to(logits), known)
    p, t = z.sigmoid(), (-k * d).sigmoid()

    def total(x: Tensor, where: Tensor) -> Tensor:  # (groups,)
        sums = _inside(x, where).flatten(1).sum(1)
        return sums if per_image else sums.sum(0, keepdim=True)

    def dice(x: Tensor) -> Tensor:
        n, s = total(2 * x * y, known) + eps, total(x**2, known) + total(y**2, known) + eps
        return torch.where(s == 0, torch.zeros_like(s), 1 - _share(n, s))

    count = total(torch.ones_like(z), known)
    ce = _share(total(F.binary_cross_entropy_with_logits(z, y, reduction="none"), known), count)
    seg, of_mask = (_share(x * count, count) for x in ((ce + dice(p)) / 2, dice(t)))
    left, right = (p, t.detach()) if routing == "logits" else (p.detach(), t) if routing == "sdf" else (p, t)
    consistency = _share(total((left - right) ** 2, keep), total(torch.ones_like(z), keep))
    if routing == "shared":
        consistency = 2 * consistency - consistency.detach()
    if reduction == "image":
        return seg, of_mask, consistency
    groups = int((labelled != 0).sum()) if per_image else 1
    a, b, c = (
        seg.sum() / max(groups, 1),
        of_mask.sum() / max(groups, 1),
        consistency.sum() / max(len(consistency), 1),
    )
    return a, b, c


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


# ---- label fusion ---------------------------------------------------------------------------------
# annotations (M, *S), one image: labels 0 to classes - 1, anything else is no vote.


def _one_hot_votes(annotations: Tensor, classes: int) -> Tensor:
    """(M, pixels, classes) float64; all 0 for no vote."""
    flat = annotations.reshape(annotations.shape[0], -1, 1).long()
    return (flat == torch.arange(classes)).double()


def majority_vote(annotations: Tensor, *, tie: int | str = 0, classes: int = 2) -> Tensor:
    """The label with most votes; tie is a label, or "lowest" or "highest" of the tied ones."""
    votes = _one_hot_votes(annotations, classes).sum(0)
    most = votes.amax(1, keepdim=True)
    best = (votes == most) & (most > 0)
    if tie == "lowest":
        label = best.long().argmax(1)
    elif tie == "highest":
        label = torch.where(most[:, 0] > 0, classes - 1 - best.flip(1).long().argmax(1), 0)
    else:
        label = torch.where(best.sum(1) == 1, best.long().argmax(1), int(tie))
    return label.reshape(annotations.shape[1:])


def staple(
    annotations: Tensor,
    *,
    classes: int = 2,
    max_iter: int = 10_000,
    tol: float = 1e-7,
    prior: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, int, bool]:
    """posterior (classes, *S), performance (M, classes, classes) at [m, truth, vote], iterations, converged.

    Warfield, Zou, Wells, IEEE TMI 23(7):903, 2004, with SimpleITK's start, prior and stopping rule.
    """
    d = _one_hot_votes(annotations, classes)
    votes = d.sum((0, 1))
    f = torch.tensor([1.0] + [0.0] * (classes - 1), dtype=torch.float64)
    if prior is not None:
        f = torch.tensor(prior, dtype=torch.float64)
    elif votes.sum() > 0:
        f = votes / votes.sum()
    cast = d.sum((0, 2))[:, None]
    w = torch.where(cast > 0, d.sum(0) / cast.clamp(min=1), f)  # (pixels, classes)
    before, iterations, converged = None, 0, False
    while iterations < max_iter and not converged:
        counts = torch.einsum("pt,mpr->mtr", w, d)
        total = counts.sum(2, keepdim=True)
        theta = torch.where(total > 0, counts / total, torch.eye(classes, dtype=torch.float64))
        given_t = torch.einsum("mpr,mtr->mpt", d, theta)
        given_t = torch.where(d.sum(2, keepdim=True) > 0, given_t, 1.0)
        joint = f * given_t.prod(0)
        evidence = joint.sum(1, keepdim=True)
        w = torch.where(evidence > 0, joint / evidence, f)
        converged = before is not None and bool((theta - before).abs().amax() <= tol)
        before, iterations = theta, iterations + 1
    return w.T.reshape(classes, *annotations.shape[1:]), theta, iterations, converged


def rater_scores(annotations: Tensor, fusion: Tensor, *, classes: int = 2) -> tuple[Tensor, ...]:
    """sensitivity, specificity and Dice (M, classes), as overlap_metrics over the pixels where both have a label."""
    known = (fusion >= 0) & (fusion < classes)
    rows = []
    for mask in annotations:
        both = known & (mask >= 0) & (mask < classes)
        if not both.any():
            rows.append(torch.full((3, classes), math.nan, dtype=torch.float64))
            continue
        of_label = [overlap_metrics(mask[both] == c, fusion[both] == c) for c in range(classes)]
        rows.append(torch.stack([torch.stack([x[i] for x in of_label]) for i in (2, 3, 0)]))
    return tuple(torch.stack(rows, 1))


def simple(
    annotations: Tensor, *, alpha: float = 1.0, max_iter: int = 25, tie: int = 0, classes: int = 2
) -> tuple[Tensor, list[bool]]:
    """The fused labels and which raters were kept; Langerak et al., IEEE TMI 29(12):2000, 2010."""
    d = _one_hot_votes(annotations, classes)

    def vote(weights: list[float]) -> Tensor:
        score = torch.einsum("mpc,m->pc", d, torch.tensor(weights, dtype=torch.float64))
        most = score.amax(1, keepdim=True)
        best = score >= most * (1 - 1e-12)
        single = (best.sum(1) == 1) & (most[:, 0] > 0)
        return torch.where(single, best.long().argmax(1), tie).reshape(annotations.shape[1:])

    kept = [bool(x.any()) for x in d]
    labels = vote([float(k) for k in kept])
    for _ in range(max_iter):
        dice = rater_scores(annotations, labels, classes=classes)[2][:, 1:].mean(1)
        among = dice[torch.tensor(kept)]
        limit = float(among.mean() - alpha * among.std(correction=0)) - 1e-12
        still = [k and float(x) >= limit for k, x in zip(kept, dice, strict=True)]
        weights = [float(x) if k else 0.0 for k, x in zip(still, dice, strict=True)]
        new = vote(weights if any(weights) else [float(k) for k in still])
        done = still == kept and torch.equal(new, labels)
        kept, labels = still, new
        if done:
            break
    return labels, kept


def agreement(annotations: Tensor, *, classes: int = 2) -> tuple[Tensor, float, float]:
    """Dice (M, M, classes), Fleiss' kappa, Krippendorff's alpha for nominal data, from the textbooks' tables."""
    d = _one_hot_votes(annotations, classes)
    voted = d.sum(2)
    raters = len(d)
    dice = torch.full((raters, raters, classes), math.nan, dtype=torch.float64)
    for i, j in itertools.product(range(raters), repeat=2):
        common = (voted[i] * voted[j])[:, None]
        if common.any():
            a, b = d[i] * common, d[j] * common
            size = (a + b).sum(0)
            dice[i, j] = torch.where(size > 0, 2 * (a * b).sum(0) / size, 1.0)
    table = d.sum(0)  # pixels x labels: how many raters chose the label
    table = table[table.sum(1) >= 2]
    if (table.sum(0) > 0).sum() < 2:
        return dice, 1.0, 1.0
    n = table.sum(1)
    share = table.sum(0) / table.sum()
    observed = ((table * (table - 1)).sum(1) / (n * (n - 1))).mean()
    expected = (share**2).sum()
    coincidence = torch.zeros(classes, classes, dtype=torch.float64)
    for row, m in zip(table, n, strict=True):
        coincidence += (row[:, None] * row - torch.diag(row)) / (m - 1)
    total = coincidence.sum(0)
    apart = coincidence.sum() - coincidence.diagonal().sum()
    by_chance = (total.sum() ** 2 - (total**2).sum()) / (total.sum() - 1)
    return dice, float((observed - expected) / (1 - expected)), float(1 - apart / by_chance)


# ---- pixels ---------------------------------------------------------------------------------------


def _image_rows(values: Tensor, mask: Tensor | None, per_image: bool) -> list[Tensor]:
    """Each row's values in ascending order, without NaN and what is masked out; -0 as 0."""
    kept = values if mask is None else torch.where(mask != 0, values, torch.nan)
    rows = kept.reshape(len(kept) if per_image else 1, -1)
    return [(row[~row.isnan()] + 0).sort().values for row in rows]


def quantile(
    values: Tensor,
    q: float | Sequence[float],
    *,
    per_image: bool = False,
    mask: Tensor | None = None,
    interpolation: str = "linear",
) -> Tensor:
    """`pixels.quantile` by sorting."""
    several = isinstance(q, Sequence)
    results = []
    for one in q if isinstance(q, Sequence) else [q]:
        for row in _image_rows(values, mask, per_image):
            if not len(row):
                results.append(math.nan)
                continue
            position = one * (len(row) - 1)
            low, high = (float(row[f(position)]) for f in (math.floor, math.ceil))
            share = {
                "linear": position % 1,
                "lower": 0.0,
                "higher": 1.0,
                "midpoint": 0.5,
                "nearest": round(position) - math.floor(position),
            }[interpolation]
            gap = high - low
            if position % 1 == 0 or low == high:
                results.append(low)
            elif share in (0.0, 1.0):
                results.append((low, high)[int(share)])
            elif not math.isfinite(gap):
                results.append(low * (1 - share) + high * share)
            else:  # as numpy.quantile
                results.append(low + gap * share if share < 0.5 else high - gap * (1 - share))
    shape = ([len(q)] if isinstance(q, Sequence) else []) + ([len(values)] if per_image else [])
    return (
        torch.tensor(results, dtype=torch.float64)
        .reshape(shape if several or per_image else ())
        .to(values.dtype)
    )


def topk_threshold(
    values: Tensor, k: int, *, largest: bool = True, per_image: bool = False, mask: Tensor | None = None
) -> Tensor:
    """`pixels.topk_threshold` by sorting."""
    found = []
    for row in _image_rows(values, mask, per_image):
        order = row.flip(0) if largest else row
        found.append(float(order[min(k, len(row)) - 1]) if len(row) and k > 0 else math.nan)
    return torch.tensor(found, dtype=torch.float64).to(values.dtype).reshape([-1] if per_image else [])


def topk_mask(
    values: Tensor, k: int, *, largest: bool = True, per_image: bool = False, mask: Tensor | None = None
) -> Tensor:
    """`pixels.topk_mask` by a stable sort."""
    kept = values if mask is None else torch.where(mask != 0, values, torch.nan)
    rows = (kept.reshape(len(kept) if per_image else 1, -1)) + 0
    chosen = [largest_of(row if largest else -row, ~row.isnan(), torch.tensor(k)) for row in rows]
    return torch.stack(chosen).view(values.shape) if chosen else torch.zeros_like(values, dtype=torch.bool)


def largest_of(values: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Where the `count` (a scalar) largest values among those are; of equal ones the first."""
    index = among.nonzero()[:, 0]
    first = index[(values[index] + 0).argsort(descending=True, stable=True)[: max(int(count), 0)]]
    return torch.zeros_like(among).scatter(0, first, True)


TOLERANCE = 1e-6  # of probabilities, cleanlab's


def _flat(probabilities: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """p (C, N) in float32 or float64, labels (N,); -1 where the label is no class or a probability is NaN."""
    p = probabilities.detach().movedim(1, 0).flatten(1)
    p = p if p.dtype == torch.float64 else p.float()
    given = label.flatten().long()
    known = (given >= 0) & (given < len(p)) & ~p.isnan().any(0)
    return p, torch.where(known, given, -1)


def _mean(p: Tensor) -> Tensor:
    """The mean of probabilities as whole multiples of 2^-52, which add up alike in any order; NaN of none."""
    scaled = p.clamp(0, 1) * 2**26
    high = scaled.floor()
    low = ((scaled - high) * 2**26).floor()
    return (high.long().sum().double() * 2**-26 + low.long().sum().double() * 2**-52) / len(p)


def confident_joint(probabilities: Tensor, label: Tensor) -> Tensor:
    """`pixels.confident_joint`, of all pixels at once."""
    p, given = _flat(probabilities, label)
    classes = len(p)
    mine = torch.stack([given == i for i in range(classes)])
    threshold = torch.stack([_mean(p[i][mine[i]]) for i in range(classes)])  # NaN, which nothing reaches
    reaches = p >= (threshold.clamp(min=2 * TOLERANCE) - TOLERANCE)[:, None]
    several = reaches.sum(0) > 1
    guess = torch.where(several, p.argmax(0), reaches.int().argmax(0))
    confident = torch.stack([(guess == j) & reaches.any(0) for j in range(classes)])
    counts = torch.stack([(mine[i] & confident).sum(1) for i in range(classes)])
    return torch.maximum(counts, torch.eye(classes, dtype=counts.dtype, device=counts.device))


def label_errors(probabilities: Tensor, label: Tensor, prune: str = "both") -> Tensor:
    """`pixels.label_errors` by sorting."""
    p, given = _flat(probabilities, label)
    classes = len(p)
    mine = torch.stack([given == i for i in range(classes)])
    sizes = mine.sum(1)
    numbers = _numbers_of_errors(confident_joint(probabilities, label), sizes)
    by_rate = torch.zeros_like(given, dtype=torch.bool)
    by_class = torch.zeros_like(by_rate)
    for i in range(classes):
        for j in range(classes):
            if j != i and prune != "class":
                by_rate |= largest_of(p[j] - p[i], mine[i], numbers[i, j])
        if prune != "noise_rate":
            by_class |= largest_of(-p[i], mine[i], sizes[i] - numbers[i, i])
    chosen = {"both": by_rate & by_class, "class": by_class, "noise_rate": by_rate}[prune]
    believed = (
        torch.stack([torch.where(mine[i], p[i] + TOLERANCE, p[i]) for i in range(classes)]).argmax(0) == given
    )
    alone = (mine & (sizes <= 1)[:, None]).any(0)  # cleanlab leaves a class alone that has one pixel
    return (chosen & ~believed & ~alone).view(label.shape)


def _numbers_of_errors(counts: Tensor, sizes: Tensor) -> Tensor:
    """The confident joint as whole numbers whose rows sum to sizes, each class keeping a pixel at least."""
    joint = counts.double() * (sizes.double() / counts.sum(1))[:, None]
    numbers = _round_rows(joint)
    diagonal = numbers.diagonal()
    raised = diagonal.clamp(min=1)
    less = (raised - diagonal) / ((numbers != 0).sum(1) - 1).clamp(min=1)
    numbers = (numbers - less[:, None]).clamp(min=0).floor()
    return numbers.diagonal_scatter(raised).long()


def _round_rows(values: Tensor) -> Tensor:
    """Each row rounded so that its sum is that of the row, rounded: the largest remainders go the other way."""
    whole = values.round()
    lacking = values.sum(1, True).round() - whole.sum(1, True)
    rank = (whole - values).argsort(dim=1, stable=True).argsort(1)
    back = (values - whole).argsort(dim=1, stable=True).argsort(1)
    return whole + (rank < lacking).double() - (back < -lacking).double()


# ---- normalisation --------------------------------------------------------------------------------


def norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "batch",
    groups: int = 1,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: Any = 1.0,
) -> Tensor:
    """`noisyseg_fast.norm_act` in torch's own operations."""
    if norm == "batch":
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    elif norm == "instance":
        y = F.instance_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    else:
        y = F.group_norm(
            x.contiguous(), groups, weight, bias, eps
        )  # forward AD of others fails in torch 2.13
    if isinstance(slope, Tensor):
        return F.prelu(y, slope)
    if slope == 1:
        return y
    return F.relu(y) if slope == 0 else F.leaky_relu(y, slope)


def norm_act_jvp(
    x: Tensor,
    x_dot: Tensor | None = None,
    weight: Tensor | None = None,
    weight_dot: Tensor | None = None,
    bias: Tensor | None = None,
    bias_dot: Tensor | None = None,
    *,
    norm: str = "batch",
    groups: int = 1,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    slope: Any = 1.0,
    slope_dot: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """norm_act and its derivative along the given directions, by the formula that the kernels use.

    With d = x - mean, r = 1 / sqrt(var + eps): the derivative of d r is (x_dot - mean(x_dot)) r - d r^3 mean(d x_dot).
    """
    channels = [1, -1] + [1] * (x.ndim - 2)

    def shaped(v: Tensor | None, otherwise: float) -> Any:
        return otherwise if v is None else v.to(x.dtype).reshape(channels)

    def mean_of(v: Tensor) -> Tensor:
        if norm == "batch":
            return v.mean([0, *range(2, x.ndim)], keepdim=True).expand_as(v)
        parts = v.reshape(v.shape[0], v.shape[1] if norm == "instance" else groups, -1)
        return parts.mean(2, keepdim=True).expand_as(parts).reshape(v.shape)

    x_dot = torch.zeros_like(x) if x_dot is None else x_dot
    if norm != "group" and not training and running_mean is not None:
        d = x - shaped(running_mean, 0)
        r = (shaped(running_var, 1) + eps).rsqrt()
        normed_dot = x_dot * r
    else:
        d = x - mean_of(x)
        r = (mean_of(d * d) + eps).rsqrt()
        normed_dot = (x_dot - mean_of(x_dot)) * r - d * r**3 * mean_of(d * x_dot)
    gamma, s = shaped(weight, 1), slope if not isinstance(slope, Tensor) else slope.reshape(channels)
    before = d * r * gamma + shaped(bias, 0)
    before_dot = normed_dot * gamma + d * r * shaped(weight_dot, 0) + shaped(bias_dot, 0)
    negative_dot = s * before_dot + before * shaped(slope_dot, 0)
    return torch.where(before > 0, before, s * before), torch.where(before > 0, before_dot, negative_dot)


# ---- weight nets ----------------------------------------------------------------------------------


def ce_dual(z: Tensor, zdot: Tensor, y: Tensor, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each pixel and its derivative along zdot, as weight_nets.ce_dual."""
    g = _per_class(z, y[:, 0] if y.ndim == z.ndim and y.shape[1] == 1 < z.shape[1] else y)
    if (activation or ("softmax" if z.shape[1] > 1 else "sigmoid")) == "softmax":
        mean = (z.softmax(1) * zdot).sum(1, keepdim=True)
        return -(g * z.log_softmax(1)).sum(1), (g * (mean - zdot)).sum(1)
    return (F.softplus(z) - g * z).mean(1), ((z.sigmoid() - g) * zdot).mean(1)


def mask_net(loss: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """MCPM's weights of a loss map (B, H, W) or (B, D, H, W), as weight_nets.mask_net."""
    w3, b3, w5, b5, w1, b1 = theta
    conv: Any = F.conv2d if w3.ndim == 3 else F.conv3d
    x = loss.unsqueeze(1)
    h3, h5 = conv(x, w3.unsqueeze(1), b3, padding=1), conv(x, w5.unsqueeze(1), b5, padding=2)
    hidden = torch.cat([h3.relu(), h5.relu(), x], 1)
    logits: Tensor = conv(hidden, w1.reshape(1, -1, *[1] * (w3.ndim - 1)), b1)
    return logits[:, 0].sigmoid()


def mw_net(loss: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """Meta-Weight-Net on each number, as weight_nets.mw_net."""
    w1, b1, w2, b2 = theta
    return ((loss.unsqueeze(-1) * w1 + b1).relu() @ w2 + b2[0]).sigmoid()
