"""MONAI: its losses and metrics with our kernels, `patch_monai` for programs that were written for MONAI alone, and
accumulators for what MONAI has no metric for.

    from noisyseg_fast.compat.monai import DiceCELoss, HausdorffDistanceMetric     # monai_losses, monai_metrics

    with patch_monai():  # every MONAI loss and metric in here is ours, where ours can do what it has been told to
        train()

The accumulators are called on batches, then aggregate(); gathered over processes by MONAI. Batches are masks
(B, C, *S), floats of 0 and 1 among them, or, with num_classes among the options, label images (B, *S) without a
channel axis.

    hd95 = SurfaceMetric("hd_percentile", spacing=(1, 1, 2.5), empty="diagonal")
    for pred, target in cases: hd95(pred, target)
    hd95.aggregate(), hd95.reset()
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from monai import losses as monai_losses_peer
from monai.metrics import CumulativeIterationMetric
from monai.metrics import meandice as _meandice
from monai.metrics.utils import do_metric_reduction

from .. import metrics
from . import monai_losses, monai_metrics
from .monai_losses import (
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    HausdorffDTLoss,
)
from .monai_metrics import (
    DiceMetric,
    HausdorffDistanceMetric,
    SurfaceDiceMetric,
    SurfaceDistanceMetric,
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
    distance_transform_edt,
)

__all__ = [
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "DiceMetric",
    "FocalLoss",
    "GeneralizedDiceLoss",
    "HausdorffDTLoss",
    "HausdorffDistanceMetric",
    "OverlapMetric",
    "SurfaceDiceMetric",
    "SurfaceDistanceMetric",
    "SurfaceMetric",
    "compute_average_surface_distance",
    "compute_hausdorff_distance",
    "compute_surface_dice",
    "distance_transform_edt",
    "patch_monai",
]

_FUNCTIONS = (
    "compute_hausdorff_distance",
    "compute_average_surface_distance",
    "compute_surface_dice",
    "distance_transform_edt",
)


@contextlib.contextmanager
def patch_monai() -> Iterator[None]:
    """Within it, MONAI's losses and metrics are computed by our kernels; afterwards by MONAI again.

    Losses: the classes in monai_losses.NAMES, objects made before included; what ours cannot honour stays MONAI's.
    Metrics: HausdorffDistanceMetric, SurfaceDistanceMetric, SurfaceDiceMetric, DiceMetric and their functions,
    `distance_transform_edt`, in every module that has imported them from MONAI. Not for several threads that
    want different things: MONAI's classes are changed for the whole process.

    >>> with patch_monai():
    ...     runpy.run_path("train_with_monai.py", run_name="__main__")
    """
    undo = contextlib.ExitStack()

    def swap(owner: Any, name: str, value: Any) -> None:
        before = owner.__dict__[name]
        setattr(owner, name, value)
        undo.callback(setattr, owner, name, before)

    def loss_forward(theirs: Any) -> Any:
        @functools.wraps(theirs)
        def forward(self: Any, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            ours = not monai_losses.unhonoured(self) and monai_losses.fits(self, input)
            value: torch.Tensor = (monai_losses.compute if ours else theirs)(self, input, target)
            return value

        return forward

    with undo:
        for name in monai_losses.NAMES:
            kind = getattr(monai_losses_peer, name)
            swap(kind, "forward", loss_forward(kind.forward))
        swap(_meandice.DiceHelper, "__call__", monai_metrics.dice_helper)
        for name in _FUNCTIONS:
            theirs = monai_metrics.THEIRS[name]
            for module in list(sys.modules.values()):
                if module is not monai_metrics and getattr(module, "__dict__", {}).get(name) is theirs:
                    swap(module, name, getattr(monai_metrics, name))
        yield


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


def main() -> None:
    """`python -m noisyseg_fast.compat.monai PROGRAM [ARGUMENTS]`: runs a MONAI program under patch_monai."""
    import runpy

    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m noisyseg_fast.compat.monai PROGRAM [ARGUMENTS]")
    del sys.argv[0]
    with patch_monai():
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
