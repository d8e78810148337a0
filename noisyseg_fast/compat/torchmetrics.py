"""Accumulators for torchmetrics: `update(preds, target)` and `compute()`, synchronised over processes by sums."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric

from .. import metrics


class OverlapMetric(Metric):
    """Overlap of a whole data set by class, from its counts of voxels (metrics.OverlapAccumulator).

    Args:
        num_classes: classes C of the label images or logits, or of masks (B, C, *S) with labels=False.
        metric: a field of metrics.OverlapMetrics.
        labels: False where update gets masks (B, C, *S) of integers.
        average: True for the mean over classes, False for one value for each class.
        include_background: False leaves class 0 out.
        spatial_dims, threshold: as in metrics.overlap_metrics.
        kwargs: torchmetrics' own.
    """

    is_differentiable = False
    full_state_update = False
    counts: torch.Tensor  # (C, 4): tp, fp, fn, tn

    def __init__(
        self,
        num_classes: int = 1,
        *,
        metric: str = "dice",
        labels: bool = True,
        average: bool = False,
        include_background: bool = True,
        spatial_dims: int | None = None,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check("metric", metric, metrics.OverlapMetrics._fields)
        self.metric, self.labels, self.average = metric, labels, average
        self.include_background, self.num_classes = include_background, num_classes
        self.options = {"spatial_dims": spatial_dims, "threshold": threshold}
        first = 0 if include_background or not labels else 1
        self.add_state("counts", torch.zeros(num_classes - first, 4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Any, target: Any) -> None:
        """preds: masks, label images or logits, as metrics.overlap_metrics."""
        options: dict[str, Any] = dict(self.options)
        if preds.is_floating_point() or self.labels:
            options["include_background"] = self.include_background
            options["num_classes"] = self.num_classes
        parts = metrics.confusion(preds, target, **options)
        counts = torch.stack(list(parts), -1)
        counts = counts.reshape(-1, counts.shape[-2] if counts.ndim > 1 else 1, 4).sum(0)
        if counts.shape != self.counts.shape:
            raise ValueError(f"the masks have {len(counts)} classes, num_classes says {len(self.counts)}")
        self.counts += counts.to(self.counts.device)

    def compute(self) -> torch.Tensor:
        values = torch.from_numpy(getattr(metrics.overlap_of(self.counts.cpu().numpy()), self.metric).copy())
        values = values.to(self.counts.device)
        return values.mean() if self.average else values


class SurfaceMetric(Metric):
    """The mean over images of one surface metric, by class.

    No image drops out: one of which a mask is missing counts as `empty` says (metrics.surface_metrics), so that
    the mean is inf by default; empty="diagonal" keeps it finite.

    Args:
        metric: a field of metrics.SurfaceMetrics.
        average: True for the mean over classes, False for one value for each class.
        options: of metrics.surface_metrics (one tolerance); torchmetrics' own go in `kwargs`.
    """

    is_differentiable = False
    full_state_update = False
    total: torch.Tensor  # (C,)
    images: torch.Tensor

    def __init__(
        self,
        num_classes: int = 1,
        *,
        metric: str = "hd_percentile",
        average: bool = False,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check("metric", metric, metrics.SurfaceMetrics._fields)
        self.metric, self.average, self.options = metric, average, dict(options or {})
        self.add_state("total", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Any, target: Any) -> None:
        """preds, target: (B, C, *S) masks, or label images with num_classes among the options."""
        values = getattr(metrics.surface_metrics(preds, target, **self.options), self.metric)
        values = values.reshape(-1, values.shape[-1] if values.ndim else 1)
        if values.shape[1:] != self.total.shape:
            raise ValueError(f"the masks have {values.shape[1]} classes, num_classes says {len(self.total)}")
        self.total += values.sum(0).to(self.total.device)
        self.images += len(values)

    def compute(self) -> torch.Tensor:
        if not self.images:
            raise ValueError("nothing to compute: call update first")
        values = self.total / self.images
        return values.mean() if self.average else values


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
