"""The operations, readable and slow: the definition, the tests' oracle, the benchmark's baseline.

Plain PyTorch (and SciPy-free NumPy for the distances); nothing here calls the compiled module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

# ---- losses ---------------------------------------------------------------------------------------

# ---- distances ------------------------------------------------------------------------------------

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
