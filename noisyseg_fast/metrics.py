"""Surface-distance and overlap metrics of pairs of binary masks, batched, on the CPU or a CUDA GPU.

The surface of a mask is the mask without its erosion by the face-connected cross (4 neighbours in 2D,
6 in 3D); what lies outside the image is background, so an object's voxels on the border are surface.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import _arrays, _core

DEFINITIONS = ("monai", "medpy")


class SurfaceMetrics(NamedTuple):
    """Distances are in the units of spacing; nsd is in [0, 1]."""

    hd: Any
    hd_percentile: Any
    asd: Any
    assd: Any
    nsd: Any


class OverlapMetrics(NamedTuple):
    """All but volume_error are in [0, 1]."""

    dice: Any
    jaccard: Any
    sensitivity: Any
    specificity: Any
    precision: Any
    volume_error: Any


def surface_metrics(
    pred: Any,
    target: Any,
    spacing: float | Sequence[float] | None = None,
    *,
    spatial_dims: int | None = None,
    definition: str = "monai",
    percentile: float = 95,
    tolerance: float = 1.0,
) -> SurfaceMetrics:
    """Hausdorff and average surface distances and the normalised surface Dice of each pair of masks.

    Everything comes from one extraction of the two surfaces and one search for nearest surface voxels.

    Args:
        pred, target: masks of one shape (..., *S), nonzero is object; bool, uint8, int32 or int64, any
            strides; torch, NumPy, CuPy or DLPack.
        spacing: voxel size along each spatial axis, or one number for all; None is 1.
        spatial_dims: how many of the last axes are spatial (1 to 3), the others are a batch. None: arrays
            of up to 3 dimensions are one mask, others are (B, C, *S).
        definition: "monai" (1.6.1): hd_percentile is the larger of the two directed percentiles;
            "medpy" (0.5.2): it is the percentile of the pooled directed distances.
        percentile: of hd_percentile, 0 to 100, with linear interpolation.
        tolerance: of nsd, in the units of spacing; compared in single precision, as MONAI does.

    Returns:
        float64 arrays of the masks' kind, on their device, of the shape of the leading axes: (B, C) for
        (B, C, *S), and for a single mask 0-d arrays (NumPy's are numpy.float64).
        hd: Hausdorff distance. asd: mean distance from pred's surface to target's. assd: mean over both
        surfaces, pooled. nsd: share of both surfaces' voxels within the tolerance of the other surface.
        One mask empty: all distances inf, nsd 0. Both empty: all distances 0, nsd 1. Never NaN.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or options other than these.
    """
    space, dims, lead = _check(pred, target, spatial_dims)
    sizes = _arrays.spacing_per_axis(spacing, dims)
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}, got {definition!r}")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be between 0 and 100, got {percentile}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
    options = (definition, sizes + (1.0,) * (3 - dims), float(percentile), float(tolerance))
    p, t, place = space.view(pred), space.view(target), space.exec
    surfaces = space.empty((_core.surface_extract_workspace(p, dims, place),), "uint8")
    s = space.view(surfaces)
    workspace = space.empty((_core.surface_extract(p, t, dims, *options, s, place),), "uint8")
    out = space.empty((5, *lead), "float64")
    _core.surface_metrics(p, dims, *options, s, space.view(workspace), space.view(out), place)
    return SurfaceMetrics(*(space.back(out[i]) for i in range(5)))


def overlap_metrics(pred: Any, target: Any, *, spatial_dims: int | None = None) -> OverlapMetrics:
    """Overlap of each pair of masks, from one pass that counts voxels in 64-bit integers.

    Args:
        pred, target, spatial_dims: as in surface_metrics.

    Returns:
        float64 arrays as in surface_metrics: dice = 2 tp / (2 tp + fp + fn), jaccard = tp / (tp + fp + fn),
        sensitivity = tp / (tp + fn), specificity = tn / (tn + fp), precision = tp / (tp + fp),
        volume_error = (|pred| - |target|) / |target|. 0/0 counts as 1 where the two masks are equal (both
        empty: dice = 1) and as 0 where they differ (sensitivity for an empty target); volume_error is 0
        for two empty masks and inf where only the target is empty. Never NaN.

    Raises:
        ValueError, TypeError: as surface_metrics.
    """
    space, dims, lead = _check(pred, target, spatial_dims)
    p, t, place = space.view(pred), space.view(target), space.exec
    workspace = space.empty((_core.overlap_metrics_workspace(p, dims, place),), "uint8")
    out = space.empty((6, *lead), "float64")
    _core.overlap_metrics(p, t, dims, space.view(workspace), space.view(out), place)
    return OverlapMetrics(*(space.back(out[i]) for i in range(6)))


def _check(
    pred: Any, target: Any, spatial_dims: int | None
) -> tuple[_arrays.Namespace, int, tuple[int, ...]]:
    """The masks' namespace, number of spatial axes and leading shape."""
    space = _arrays.of(pred=pred, target=target)
    for name, x in (("pred", pred), ("target", target)):
        _arrays.check_dtype(name, space.dtype(x), _arrays.LABELS)
        _arrays.check_rank(name, x)
    shape = tuple(int(n) for n in pred.shape)
    if shape != tuple(target.shape):
        raise ValueError(f"pred has shape {shape} and target {tuple(target.shape)}; they must be the same")
    if 0 in shape:
        raise ValueError(f"pred and target have shape {shape}; at least one mask of one voxel is needed")
    if spatial_dims is None:
        dims = len(shape) if len(shape) <= 3 else len(shape) - 2
        wish = "pass spatial_dims (1, 2 or 3)"
        if not 1 <= dims <= 3:
            raise ValueError(f"pred has {len(shape)} dimensions, neither one mask nor (B, C, *S); {wish}")
    else:
        dims = spatial_dims
        if dims not in (1, 2, 3) or dims > len(shape):
            raise ValueError(
                f"spatial_dims must be 1, 2 or 3 and at most the masks' {len(shape)} dimensions, got {dims}"
            )
    return space, dims, shape[: len(shape) - dims]
