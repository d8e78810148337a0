"""Losses of the shape of what is predicted: the star-shape prior and the Hausdorff distance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distance import sampled_distance, signed_distance_map

CENTRES = ("centroid", "deepest")
FIELDS = ("hard", "soft")


def star_shape_loss(
    probability: Tensor,
    target: Tensor,
    *,
    steps: int = 6,
    centre: str = "centroid",
    mask: Tensor | None = None,
) -> Tensor:
    """The star-shape prior (Mirikharaji and Hamarneh, MICCAI 2018): mean over pixels p of

        |y_p - s_p| sum_q B_pq |s_p - s_q|,

    q the next `steps` pixels from p towards the object's centre, B_pq 1 where their labels y are alike: between the
    centre and an interior point all shall be interior.

    probability s: (B, F, *S), of F foreground classes; target y: the same shape, 1 inside; mask (B, F, *S) bool: pixels
    that count. 2D or 3D. After the authors' code (star_loss.py, reg_conv.py; the paper's text was not at hand): rays of
    8 directions, in 3D 26, and 6 steps. Theirs go on beyond the centre, and differences of opposite sign cancel in
    |sum_q (s_p - s_q)|; here they end there, and each counts.
    centre: of each image and class, "centroid" (find_center.py: rounded down) or "deepest", the inner point farthest
    from the boundary, which lies inside whatever the shape. An item without the class has no centre and no loss.
    """
    dims, shape = target.ndim - 2, target.shape[2:]
    middle = _centre(target, centre)
    towards = [
        middle[..., a].view(*target.shape[:2], *(1,) * dims)
        - torch.arange(n, device=target.device).view(-1, *(1,) * (dims - 1 - a))
        for a, n in enumerate(shape)
    ]
    length = _largest(towards)  # in steps to a neighbour, diagonal ones too
    # -1, 0 or 1 along each axis: octants of 45 degrees in 2D.
    way = [torch.where(v.abs() > math.tan(math.pi / 8) * length, v.sign(), 0) for v in towards]
    directions = [d for d in itertools.product((-1, 0, 1), repeat=dims) if any(d)]
    taken = [reduce(torch.logical_and, (w == x for w, x in zip(way, d, strict=True))) for d in directions]
    labels = target if mask is None else torch.where(mask, target, _NONE)
    pad = [steps] * (2 * dims)
    wide, wide_labels = F.pad(probability, pad), F.pad(labels, pad, value=_NONE)
    total = torch.zeros_like(probability)
    for step in range(1, steps + 1):
        s, y = probability, labels
        for direction, here in zip(directions, taken, strict=True):
            starts = [steps + step * d for d in direction]
            window: Any = (..., *(slice(a, a + n) for a, n in zip(starts, shape, strict=True)))
            s = torch.where(here, wide[window], s)
            y = torch.where(here, wide_labels[window], y)
        total = total + torch.where((y == labels) & (step <= length), (probability - s).abs(), 0)
    has_centre = (target != 0).flatten(2).any(2).view(*target.shape[:2], *(1,) * dims)
    loss = torch.where(has_centre, (target - probability).abs() * total, 0)
    return _mean(loss, mask)


_NONE = 2  # in a target: no label here


def _largest(vector: Sequence[Tensor]) -> Tensor:
    """Of the components' absolute values."""
    return reduce(torch.maximum, (v.abs() for v in vector))


def _mean(loss: Tensor, mask: Tensor | None) -> Tensor:
    return loss.mean() if mask is None else torch.where(mask, loss, 0).sum() / mask.sum().clamp(min=1)


def _centre(target: Tensor, kind: str) -> Tensor:
    """(B, F, dims) int64, in pixels."""
    shape = target.shape[2:]
    if kind == "deepest":
        depth = signed_distance_map(
            target, spatial_dims=len(shape), convention="two_sided", no_site=0.0, border=True
        )
        flat = depth.flatten(2).argmin(2)
        return torch.stack(torch.unravel_index(flat, shape), -1)
    inside = target.to(torch.float64)
    size = inside.flatten(2).sum(2).clamp(min=1)
    sums = []
    for a in range(len(shape)):
        rest = [2 + b for b in range(len(shape)) if b != a]
        place = torch.arange(shape[a], device=target.device, dtype=torch.float64)
        sums.append((inside.sum(rest) * place).sum(2) / size)
    return torch.stack(sums, -1).floor().long()


def hausdorff_dt_loss(
    probability: Tensor,
    target: Tensor,
    *,
    alpha: float = 2.0,
    field: str = "hard",
    mask: Tensor | None = None,
) -> Tensor:
    """Distance-transform loss of the Hausdorff distance (Karimi and Salcudean, IEEE TMI 2020): mean over pixels of

        (s - y)^2 (d_s^alpha + d_y^alpha),

    d_y and d_s the distance in pixels to the boundary of the target y and of the prediction s > 0.5, 0 where there is
    none. probability s, target y, mask: as for `star_shape_loss`. field="hard": no gradient through d_s, the paper's
    (and MONAI's HausdorffDTLoss). "soft": d_s^2 is the smallest of |p - q|^2 - ln s_q over the predicted side's q
    (`sampled_distance`; 1 - s for the other side), so that an error also pulls at the boundary nearest to it; ours.
    """
    dims = target.ndim - 2
    weight = _distance(target, dims) ** alpha
    if field == "hard":
        weight = weight + _distance(probability.detach() > 0.5, dims) ** alpha
    else:
        square = _soft_square(probability, dims)
        some = square > 0  # where there is no boundary, a root would have no derivative
        weight = weight + torch.where(some, torch.where(some, square, 1) ** (alpha / 2), 0)
    loss = (probability - target).square() * weight
    return _mean(loss, mask)


def _distance(inside: Tensor, dims: int) -> Tensor:
    """Of each pixel to the other side, 0 where there is none."""
    signed: Tensor = signed_distance_map(inside, spatial_dims=dims, convention="two_sided", no_site=0.0)
    return signed.abs()


def _soft_square(probability: Tensor, dims: int) -> Tensor:
    """The squared distance of each pixel to the other side, whose uncertain pixels are farther away."""
    inside = probability.detach() > 0.5
    total = torch.zeros_like(probability)
    for side, p in ((inside, probability), (~inside, 1 - probability)):
        values = torch.where(side, -p.clamp(min=0.5).log(), 0)
        square = sampled_distance(values, side, spatial_dims=dims)
        total = total + torch.where(side | square.isinf(), 0, square)
    return total
