"""MedPy's `medpy.metric.binary`: its signatures, answers and errors.

    from noisyseg_fast.compat.medpy import hd95, assd, dc

MedPy's HD95 is the 95th percentile of the two directed distance sets pooled, its ASSD their pooled mean. Deliberate
differences: 1 to 3 axes; connectivity is 1 or the number of axes; 0/0 gives the number that MedPy means to give (under
NumPy 2 its own answer is NaN); torch and CuPy masks are taken as well. MedPy itself is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _arrays, metrics
from .scipy import as_mask

Spacing = float | Sequence[float] | None


def hd(result: Any, reference: Any, voxelspacing: Spacing = None, connectivity: int = 1) -> float:
    """Hausdorff distance, in the units of voxelspacing. RuntimeError when a mask is empty, as in MedPy."""
    return float(_surface(result, reference, voxelspacing, connectivity).hd)


def hd95(result: Any, reference: Any, voxelspacing: Spacing = None, connectivity: int = 1) -> float:
    """95th percentile of the surface distances of both directions pooled. RuntimeError for empty masks."""
    return float(_surface(result, reference, voxelspacing, connectivity).hd_percentile)


def assd(result: Any, reference: Any, voxelspacing: Spacing = None, connectivity: int = 1) -> float:
    """Average symmetric surface distance: the mean of both directions pooled. RuntimeError for empty masks."""
    return float(_surface(result, reference, voxelspacing, connectivity).assd)


def asd(result: Any, reference: Any, voxelspacing: Spacing = None, connectivity: int = 1) -> float:
    """Average distance from result's surface to reference's. RuntimeError for empty masks."""
    return float(_surface(result, reference, voxelspacing, connectivity).asd)


def dc(result: Any, reference: Any) -> float:
    """Dice coefficient; 1 when both masks are empty."""
    tp, fp, fn, _ = _counts(result, reference)
    return _ratio(2 * tp, 2 * tp + fp + fn, 1.0)


def jc(result: Any, reference: Any) -> float:
    """Jaccard coefficient; 1 when both masks are empty."""
    tp, fp, fn, _ = _counts(result, reference)
    return _ratio(tp, tp + fp + fn, 1.0)


def precision(result: Any, reference: Any) -> float:
    """tp / (tp + fp); 0 when result is empty."""
    tp, fp, _, _ = _counts(result, reference)
    return _ratio(tp, tp + fp, 0.0)


def sensitivity(result: Any, reference: Any) -> float:
    """tp / (tp + fn); 0 when reference is empty."""
    tp, _, fn, _ = _counts(result, reference)
    return _ratio(tp, tp + fn, 0.0)


def specificity(result: Any, reference: Any) -> float:
    """tn / (tn + fp); 0 when reference is full."""
    _, fp, _, tn = _counts(result, reference)
    return _ratio(tn, tn + fp, 0.0)


def ravd(result: Any, reference: Any) -> float:
    """Relative volume difference (|result| - |reference|) / |reference|. RuntimeError for an empty reference."""
    small = _small(result, reference)
    if small:
        size, whole = (int(np.count_nonzero(x)) for x in small)
    else:
        tp, fp, fn, _ = _counts(result, reference)
        size, whole = tp + fp, tp + fn
    if whole == 0:
        raise RuntimeError(_EMPTY.format("second"))
    return (size - whole) / whole


recall = true_positive_rate = sensitivity
true_negative_rate = specificity
positive_predictive_value = precision

_SMALL = 1 << 20  # voxels
_EMPTY = "The {} supplied array does not contain any binary object."


def _surface(result: Any, reference: Any, spacing: Spacing, connectivity: int) -> metrics.SurfaceMetrics:
    masks = _masks(result, reference)
    rank = len(masks[0].shape)
    if rank > 3:
        raise ValueError(f"result must have 1 to 3 axes, got shape {tuple(masks[0].shape)}")
    if connectivity not in (1, rank):
        raise ValueError(f"connectivity must be 1 or {rank}, the number of axes, got {connectivity}")
    tp, fp, fn, _ = _counts(*masks)
    for count, which in ((tp + fp, "first"), (tp + fn, "second")):
        if not count:
            raise RuntimeError(_EMPTY.format(which))
    surface = "face" if connectivity == 1 else "full"
    return metrics.surface_metrics(*masks, spacing, spatial_dims=rank, definition="medpy", surface=surface)


def _masks(result: Any, reference: Any) -> tuple[Any, Any]:
    masks = as_mask(result, _arrays.LABELS, "result"), as_mask(reference, _arrays.LABELS, "reference")
    _arrays.of(result=masks[0], reference=masks[1])
    shapes = [tuple(x.shape) for x in masks]
    if shapes[0] != shapes[1]:
        raise ValueError(f"result has shape {shapes[0]} and reference {shapes[1]}; they must be the same")
    return masks


def _small(result: Any, reference: Any) -> tuple[Any, Any] | None:
    """As bool, where NumPy has counted the voxels before our kernel is called."""
    if not type(result) is type(reference) is np.ndarray or result.shape != reference.shape:
        return None
    if result.size >= _SMALL or not {result.dtype.kind, reference.dtype.kind} <= set("buif"):
        return None
    return result.astype(bool, copy=False), reference.astype(bool, copy=False)


def _counts(result: Any, reference: Any) -> tuple[int, ...]:
    """True and false positives and negatives."""
    small = _small(result, reference)
    if small:
        p, t, both = (int(np.count_nonzero(x)) for x in (*small, small[0] & small[1]))
        return both, p - both, t - both, result.size - p - t + both
    masks = _masks(result, reference)
    if len(masks[0].shape) > 3:
        masks = masks[0].reshape(-1), masks[1].reshape(-1)
    return tuple(int(n) for n in metrics.confusion(*masks, spatial_dims=len(masks[0].shape)))


def _ratio(part: int, whole: int, otherwise: float) -> float:
    return part / whole if whole else otherwise
