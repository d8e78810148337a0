"""Accumulators for MONAI: called on batches, then aggregate(); gathered over processes by MONAI.

Batches are masks (B, C, *S), floats of 0 and 1 among them, or, with num_classes among the options, label images
(B, *S) without a channel axis.

    hd95 = SurfaceMetric("hd_percentile", spacing=(1, 1, 2.5), empty="diagonal")
    for pred, target in cases: hd95(pred, target)
    hd95.aggregate(), hd95.reset()
"""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction

from .. import metrics


class SurfaceMetric(CumulativeIterationMetric):  # type: ignore[misc]
    """One surface metric of each image and class; aggregate() reduces them as MONAI's metrics do.

    Where MONAI's own metrics give NaN, and so drop the image from their means, this gives what `empty` says.

    Args:
        metric: a field of metrics.SurfaceMetrics.
        reduction: MONAI's: "none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel".
        options: of metrics.surface_metrics (one tolerance).
    """

    def __init__(self, metric: str = "hd_percentile", reduction: str = "mean", **options: Any) -> None:
        super().__init__()
        if metric not in metrics.SurfaceMetrics._fields:
            raise ValueError(
                f"metric must be one of {', '.join(metrics.SurfaceMetrics._fields)}, got {metric!r}"
            )
        self.metric, self.reduction, self.options = metric, reduction, options

    def _compute_tensor(self, y_pred: Any, y: Any = None, **kwargs: Any) -> torch.Tensor:
        pred, target = _integers(y_pred, self.options), _integers(y, self.options)
        values: torch.Tensor = getattr(metrics.surface_metrics(pred, target, **self.options), self.metric)
        return values

    def aggregate(self, reduction: str | None = None) -> torch.Tensor:
        values = self.get_buffer()
        if not isinstance(values, torch.Tensor):
            raise ValueError("nothing to aggregate: call the metric first")
        reduced: torch.Tensor = do_metric_reduction(values, reduction or self.reduction)[0]
        return reduced


class OverlapMetric(CumulativeIterationMetric):  # type: ignore[misc]
    """Overlap of a whole data set by class, from its counts of voxels (metrics.OverlapAccumulator).

    Args:
        metric: a field of metrics.OverlapMetrics.
        logits: y_pred holds logits or probabilities (B, C, *S).
        options: of metrics.overlap_metrics.
    """

    def __init__(self, metric: str = "dice", *, logits: bool = False, **options: Any) -> None:
        super().__init__()
        if metric not in metrics.OverlapMetrics._fields:
            raise ValueError(
                f"metric must be one of {', '.join(metrics.OverlapMetrics._fields)}, got {metric!r}"
            )
        self.metric, self.logits, self.options = metric, logits, options

    def _compute_tensor(self, y_pred: Any, y: Any = None, **kwargs: Any) -> torch.Tensor:
        pair = (y_pred if self.logits else _integers(y_pred, self.options), _integers(y, self.options))
        return torch.stack(list(metrics.confusion(*pair, **self.options)), -1)

    def aggregate(self) -> torch.Tensor:
        """(C,), one value for each class."""
        counts = self.get_buffer()
        if not isinstance(counts, torch.Tensor):
            raise ValueError("nothing to aggregate: call the metric first")
        total = counts.sum(0).cpu().numpy()
        return torch.from_numpy(getattr(metrics.overlap_of(total), self.metric).copy())


def _integers(x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """MONAI's masks and label images are often floats."""
    if not x.is_floating_point():
        return x
    return x != 0 if options.get("num_classes") is None else x.long()
