"""MONAI's surface and overlap metrics with our kernels: its signatures, answers (NaN and inf included) and errors.

    from noisyseg_fast.compat.monai_metrics import HausdorffDistanceMetric

What our kernels do not do (directed Hausdorff distance, other distances than Euclidean, use_subvoxels, ignore_index,
per_component) is passed on to MONAI.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from monai import metrics as peer
from monai.metrics import hausdorff_distance as _hausdorff
from monai.metrics import meandice as _meandice
from monai.metrics import surface_dice as _surface_dice
from monai.metrics import surface_distance as _surface_distance
from monai.metrics.utils import ignore_background, prepare_spacing
from monai.transforms import utils as _utils

from .. import distance, metrics

# MONAI's own, whatever patch_monai has put in their places.
THEIRS = {
    "compute_hausdorff_distance": _hausdorff.compute_hausdorff_distance,
    "compute_average_surface_distance": _surface_distance.compute_average_surface_distance,
    "compute_surface_dice": _surface_dice.compute_surface_dice,
    "distance_transform_edt": _utils.distance_transform_edt,
}
_monai_dice = _meandice.DiceHelper.__call__


def compute_hausdorff_distance(
    y_pred: Any,
    y: Any,
    include_background: bool = False,
    distance_metric: str = "euclidean",
    percentile: float | None = None,
    directed: bool = False,
    spacing: Any = None,
    ignore_index: int | None = None,
) -> Any:
    """`monai.metrics.compute_hausdorff_distance`: (B, C, *S) one-hot masks -> (B, C) float32.

    One mask empty: inf, NaN with a percentile; both empty: NaN; with MONAI's warnings.
    """
    if directed or distance_metric != "euclidean" or ignore_index is not None:
        return THEIRS["compute_hausdorff_distance"](
            y_pred, y, include_background, distance_metric, percentile, directed, spacing, ignore_index
        )
    if percentile is not None and not 0 <= percentile <= 100:
        raise ValueError(f"percentile should be a value between 0 and 100, get {percentile}.")
    pred, target, sizes = _prepared(y_pred, y, include_background, spacing)
    found = _surface(pred, target, sizes, percentile=percentile or 100)
    values = found.hd_percentile if percentile else found.hd
    return _with_empty(values, pred, target, torch.nan if percentile else torch.inf, include_background)


def compute_average_surface_distance(
    y_pred: Any,
    y: Any,
    include_background: bool = False,
    symmetric: bool = False,
    distance_metric: str = "euclidean",
    spacing: Any = None,
    ignore_index: int | None = None,
) -> Any:
    """`monai.metrics.compute_average_surface_distance`: (B, C, *S) -> (B, C); inf and NaN for empty masks."""
    if distance_metric != "euclidean" or ignore_index is not None:
        return THEIRS["compute_average_surface_distance"](
            y_pred, y, include_background, symmetric, distance_metric, spacing, ignore_index
        )
    pred, target, sizes = _prepared(y_pred, y, include_background, spacing)
    found = _surface(pred, target, sizes)
    return _with_empty(found.assd if symmetric else found.asd, pred, target, torch.inf, include_background)


def compute_surface_dice(
    y_pred: Any,
    y: Any,
    class_thresholds: list[float],
    include_background: bool = False,
    distance_metric: str = "euclidean",
    spacing: Any = None,
    use_subvoxels: bool = False,
    ignore_index: int | None = None,
) -> Any:
    """`monai.metrics.compute_surface_dice`: (B, C, *S) -> (B, C); 0 for one empty mask, NaN for two."""
    classes = y_pred.shape[1] - (not include_background and y_pred.shape[1] > 1)
    usual = (
        distance_metric == "euclidean"
        and not use_subvoxels
        and ignore_index is None
        and isinstance(y_pred, torch.Tensor)
        and isinstance(y, torch.Tensor)
        and y_pred.ndim in (4, 5)
        and y_pred.shape == y.shape
        and classes == len(class_thresholds)
        and all(0 <= t < torch.inf for t in class_thresholds)
    )
    if not usual:  # MONAI's own, and its own errors
        return THEIRS["compute_surface_dice"](
            y_pred,
            y,
            class_thresholds,
            include_background,
            distance_metric,
            spacing,
            use_subvoxels,
            ignore_index,
        )
    pred, target, sizes = _prepared(y_pred, y, include_background, spacing)
    found = _surface(pred, target, sizes, tolerance=[[float(t)] for t in class_thresholds])
    return _with_empty(found.nsd[..., 0], pred, target, 0.0, include_background)


def _prepared(y_pred: Any, y: Any, include_background: bool, spacing: Any) -> tuple[Any, Any, list[Any]]:
    """Boolean masks (B, C, *S) and the spacing of each image."""
    if not include_background:
        y_pred, y = ignore_background(y_pred=y_pred, y=y)
    pred, target = (_bool(x) for x in (y_pred, y))
    if pred.shape != target.shape:
        raise ValueError(f"y_pred and y should have same shapes, got {pred.shape} and {target.shape}.")
    sizes = prepare_spacing(spacing=spacing, batch_size=len(pred), img_dim=pred.ndim - 2)
    return pred, target, list(sizes)


def _bool(x: Any) -> Any:
    x = torch.as_tensor(x)
    x = x.as_tensor() if hasattr(x, "as_tensor") else x  # MONAI's MetaTensor
    return x if x.dtype == torch.bool else x != 0  # of uint8, any() and ~ are no booleans


def _surface(pred: Any, target: Any, sizes: list[Any], **options: Any) -> metrics.SurfaceMetrics:
    """surface_metrics, one image after the other where their spacings differ."""
    dims = pred.ndim - 2
    if all(_same(size, sizes[0]) for size in sizes):
        spacing = sizes[0] if sizes else None
        return metrics.surface_metrics(pred, target, spacing, spatial_dims=dims, **options)
    each = [
        metrics.surface_metrics(pred[i : i + 1], target[i : i + 1], size, spatial_dims=dims, **options)
        for i, size in enumerate(sizes)
    ]
    return metrics.SurfaceMetrics(*(torch.cat(values) for values in zip(*each, strict=True)))


def _same(a: Any, b: Any) -> bool:
    return a is b or (a is not None and b is not None and list(_seq(a)) == list(_seq(b)))


def _seq(x: Any) -> Any:
    return x if hasattr(x, "__len__") else [x]


def _with_empty(
    values: torch.Tensor, pred: torch.Tensor, target: torch.Tensor, one_empty: float, include_background: bool
) -> Any:
    """MONAI's answers, and its warnings, where a mask is empty."""
    no_pred, no_target = (~x.flatten(2).any(2) for x in (pred, target))
    for what, none in (("ground truth", no_target), ("prediction", no_pred)):
        for c in none.any(0).nonzero().flatten().tolist():
            warnings.warn(
                f"the {what} of class {c + (not include_background)} is all 0, this may result in nan/inf distance.",
                stacklevel=3,
            )
    values = values.float().masked_fill(no_pred | no_target, one_empty)
    return values.masked_fill(no_pred & no_target, torch.nan)


def dice_helper(self: Any, y_pred: torch.Tensor, y: torch.Tensor) -> Any:
    """`monai.metrics.DiceHelper.__call__` for one-hot masks (B, C, *S); anything else is MONAI's own."""
    usual = (
        not (self.threshold or self.apply_argmax or self.per_component)
        and self.ignore_index is None
        and self.num_classes is None
        and y_pred.shape == y.shape
        and 3 <= y_pred.ndim <= 5
        and not self.get_not_nans
        and getattr(self.reduction, "value", self.reduction) == "none"
    )
    if not usual:
        return _monai_dice(self, y_pred, y)
    if not self.include_background and y.shape[1] > 1:
        y_pred, y = y_pred[:, 1:], y[:, 1:]
    tp, fp, fn, _ = metrics.confusion(_bool(y_pred), _bool(y), spatial_dims=y.ndim - 2)
    dice = 2.0 * tp / (2 * tp + fp + fn)  # NaN where both masks are empty
    if self.ignore_empty:
        return dice.masked_fill(tp + fn == 0, torch.nan).float()
    return dice.masked_fill(tp + fp + fn == 0, 1.0).float()


def distance_transform_edt(
    img: Any,
    sampling: Any = None,
    return_distances: bool = True,
    return_indices: bool = False,
    distances: Any = None,
    indices: Any = None,
    *,
    block_params: Any = None,
    float64_distances: bool = False,
) -> Any:
    """`monai.transforms.utils.distance_transform_edt`: channels (C, *S), each transformed; arrays of img's kind.

    On the CPU MONAI's results are float64 whatever float64_distances says, and so are these. Indices, and channels
    without any background voxel, are left to MONAI.
    """
    plain = return_distances and not return_indices and distances is None and indices is None
    if not plain or img.ndim not in (3, 4):
        return THEIRS["distance_transform_edt"](
            img,
            sampling,
            return_distances,
            return_indices,
            distances,
            indices,
            block_params=block_params,
            float64_distances=float64_distances,
        )
    tensor = isinstance(img, torch.Tensor)
    mask = _bool(img) if tensor else img != 0
    if bool(mask.reshape(len(mask), -1).all(1).any()):
        return THEIRS["distance_transform_edt"](img, sampling)
    cpu = not tensor or img.device.type == "cpu"
    dtype = "float64" if cpu or float64_distances else "float32"
    return distance.distance_transform_edt(mask, sampling, spatial_dims=img.ndim - 1, dtype=dtype)


class HausdorffDistanceMetric(peer.HausdorffDistanceMetric):  # type: ignore[misc]
    """`monai.metrics.HausdorffDistanceMetric` by `compute_hausdorff_distance` here."""

    def _compute_tensor(self, y_pred: Any, y: Any, **kwargs: Any) -> Any:
        if self.ignore_index is not None:
            values = super()._compute_tensor(y_pred, y, **kwargs)
            return values
        _check_rank(y_pred)
        return compute_hausdorff_distance(
            y_pred,
            y,
            self.include_background,
            self.distance_metric,
            self.percentile,
            self.directed,
            kwargs.get("spacing"),
        )


class SurfaceDistanceMetric(peer.SurfaceDistanceMetric):  # type: ignore[misc]
    """`monai.metrics.SurfaceDistanceMetric` by `compute_average_surface_distance` here."""

    def _compute_tensor(self, y_pred: Any, y: Any, **kwargs: Any) -> Any:
        if self.ignore_index is not None:
            values = super()._compute_tensor(y_pred, y, **kwargs)
            return values
        _check_rank(y_pred)
        return compute_average_surface_distance(
            y_pred, y, self.include_background, self.symmetric, self.distance_metric, kwargs.get("spacing")
        )


class SurfaceDiceMetric(peer.SurfaceDiceMetric):  # type: ignore[misc]
    """`monai.metrics.SurfaceDiceMetric` by `compute_surface_dice` here."""

    def _compute_tensor(self, y_pred: Any, y: Any, **kwargs: Any) -> Any:
        return compute_surface_dice(
            y_pred,
            y,
            self.class_thresholds,
            self.include_background,
            self.distance_metric,
            kwargs.get("spacing"),
            self.use_subvoxels,
            self.ignore_index,
        )


class DiceMetric(peer.DiceMetric):  # type: ignore[misc]
    """`monai.metrics.DiceMetric`, one-hot masks counted by our kernel."""

    def _compute_tensor(self, y_pred: Any, y: Any) -> Any:
        _check_rank(y_pred)
        values = dice_helper(self.dice_helper, y_pred, y)
        return values


def _check_rank(y_pred: Any) -> None:
    if y_pred.ndim < 3:
        raise ValueError(
            f"y_pred should have at least 3 dimensions (batch, channel, spatial), got {y_pred.ndim}."
        )
