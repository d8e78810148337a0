"""Surface-distance and overlap metrics of pairs of masks, label images or logits, batched, on the CPU or a CUDA GPU.

What packages call HD95 or surface Dice differs in five rules, each an argument of `surface_metrics` here:

    surface        "face": the object's voxels with one of 4 (2D) or 6 (3D) face neighbours outside it; "full": with
                   one of all 8 or 26 neighbours outside it; "cells": the cells of 2x2(x2) voxels that the object's
                   contour cuts, each weighted by the length or area of its marching-squares or -cubes element
    percentile_rule  "max": the larger of the two directed percentiles; "pooled": of all distances together
    interpolation  "linear": between order statistics, as numpy.percentile; "inverted_cdf": the smallest distance
                   that the wanted share of the weight does not exceed (numpy's name; cells have no other)
    average        of ASSD and NSD. "pooled": over all elements of both surfaces; "mean": of the two directions
    border         True: what lies outside the image is background, so an object's voxels on the image's edge are
                   surface; False: it repeats the edge, which then is none

A definition is a bundle of them, named after the package whose numbers it gives:

    definition           surface  percentile_rule  interpolation   average
    "monai"              face     max              linear          pooled
    "medpy"              face     pooled           linear          pooled
    "deepmind"           cells    max              inverted_cdf    pooled
    "panoptica"          face     pooled           linear          mean
    "metrics_reloaded"   face     max              linear          pooled

(MONAI 1.6, MedPy 0.5, DeepMind's surface-distance 0.1, panoptica 2.1, MetricsReloaded 0.1; border is True in all.)
None of them agrees with another on empty masks; here the answer is the same under every definition, see `empty`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _arrays, _core

_RULES: dict[str, tuple[Any, ...]] = {  # the values an argument takes
    "surface": ("face", "full", "cells"),
    "percentile_rule": ("max", "pooled"),
    "interpolation": ("linear", "inverted_cdf"),
    "average": ("pooled", "mean"),
    "border": (True, False),
}
_PRESETS: dict[str, tuple[Any, ...]] = {  # in the order of _RULES
    "monai": ("face", "max", "linear", "pooled", True),
    "medpy": ("face", "pooled", "linear", "pooled", True),
    "deepmind": ("cells", "max", "inverted_cdf", "pooled", True),
    "panoptica": ("face", "pooled", "linear", "mean", True),
    "metrics_reloaded": ("face", "max", "linear", "pooled", True),
}
DEFINITIONS = tuple(_PRESETS)
MAX_TOLERANCES = 128  # SurfaceOptions in csrc/include/noisyseg/surface.h
MAX_CLASSES = 256  # OverlapOptions there
_MEMORY = {False: 1 << 28, True: 1 << 25}  # bytes of bit masks in one call, on the CPU and on CUDA
_CUDA_ITEMS = 65535


class SurfaceMetrics(NamedTuple):
    """Distances are in the units of spacing; nsd is in [0, 1]."""

    hd: Any
    hd_percentile: Any
    asd: Any  # from pred's surface to target's
    assd: Any
    nsd: Any
    asd_target: Any  # from target's surface to pred's


class OverlapMetrics(NamedTuple):
    """All but volume_error are in [0, 1]."""

    dice: Any
    jaccard: Any
    sensitivity: Any
    specificity: Any
    precision: Any
    volume_error: Any


class Confusion(NamedTuple):
    """Numbers of voxels, int64."""

    tp: Any
    fp: Any
    fn: Any
    tn: Any


def surface_metrics(
    pred: Any,
    target: Any,
    spacing: float | Sequence[float] | None = None,
    *,
    spatial_dims: int | None = None,
    definition: str = "monai",
    percentile: float = 95,
    tolerance: float | Sequence[float] | Sequence[Sequence[float]] = 1.0,
    num_classes: int | None = None,
    include_background: bool = True,
    surface: str | None = None,
    percentile_rule: str | None = None,
    interpolation: str | None = None,
    average: str | None = None,
    border: bool | None = None,
    empty: str | float = "inf",
) -> SurfaceMetrics:
    """Hausdorff and average surface distances and the normalised surface Dice of each pair of masks.

    Everything comes from one extraction of the two surfaces and one search for nearest surface elements.

    Extra memory: at most 1 byte per voxel where objects are smooth; more follows the surfaces' size.

    Args:
        pred, target: masks of one shape (..., *S), nonzero is object; bool, uint8, int32 or int64, any
            strides; torch, NumPy, CuPy or DLPack. With num_classes: images of labels (..., *S).
        spacing: voxel size along each spatial axis, or one number for all; None is 1.
        spatial_dims: how many of the last axes are spatial (1 to 3), the others are a batch. None: arrays
            of up to 3 dimensions are one mask or label image, others are masks (B, C, *S) or, with
            num_classes, 3D label images (B, *S).
        definition: a bundle of the five rules, see the module.
        percentile: of hd_percentile, 0 to 100.
        tolerance: of nsd, in the units of spacing: one, several, or rows of several, one row for each class (the last
            leading axis of the result); at most 128 in all. Compared in single precision, as MONAI does.
        num_classes: of label images: classes are 0 to num_classes - 1, other labels belong to none.
        include_background: False leaves class 0 of label images out.
        surface, percentile_rule, interpolation, average, border: rules that differ from the definition's.
        empty: all distances where one of two surfaces is missing: "inf", "diagonal" (of the image, edge to edge:
            a finite penalty) or a number.

    Returns:
        float64 arrays of the masks' kind, on their device, of the shape of the leading axes: (B, C) for
        (B, C, *S) and for label images (B, *S), and for a single mask 0-d arrays (NumPy's are numpy.float64).
        hd: Hausdorff distance. asd: mean distance from pred's surface to target's, asd_target: from
        target's to pred's. assd: mean over both. nsd: share of both surfaces within the tolerance of the
        other surface, with a last axis for several tolerances.
        One mask empty: all distances `empty`, nsd 0. Both empty: all distances 0, nsd 1. Never NaN. (With
        border=False a full mask has no surface either; full against empty counts as one missing.)

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or options other than these.
    """
    space, dims, lead = _check(pred, target, spatial_dims, num_classes)
    sizes = _arrays.spacing_per_axis(spacing, dims)
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be between 0 and 100, got {percentile}")
    options = _rules(definition, surface, percentile_rule, interpolation, average, border)
    options.update(
        spacing=sizes,
        percentile=float(percentile),
        missing=_missing(empty, pred.shape[len(pred.shape) - dims :], sizes),
    )
    if num_classes is not None:
        options.update(_classes(num_classes, include_background))
        lead = (*lead, options["classes"])
    table, one = _tolerances(tolerance, lead)
    options["tolerance"] = table
    p, t, place = space.view(pred), space.view(target), space.exec
    out = space.empty((5 + len(table[0]), *lead), "float64")
    items, cuda = math.prod(lead), place[0] >= 0
    each = _core.surface_extract_workspace(p, dims, {**options, "count": 1}, place)
    step = min(items, max(1, _MEMORY[cuda] // each), _CUDA_ITEMS if cuda else items)
    surfaces = space.empty((step * each,), "uint8")
    for first in range(0, items, step):
        part = {**options, "first": first, "count": min(step, items - first)}
        s = space.view(surfaces)
        workspace = space.empty((_core.surface_extract(p, t, dims, part, s, place),), "uint8")
        _core.surface_metrics(p, dims, part, s, space.view(workspace), space.view(out), place)
    hd, high, asd, assd, back = (space.back(out[i]) for i in range(5))
    nsd = out[5] if one else _last(out[5:])
    return SurfaceMetrics(hd, high, asd, assd, space.back(nsd), back)


def overlap_metrics(
    pred: Any,
    target: Any,
    *,
    spatial_dims: int | None = None,
    num_classes: int | None = None,
    include_background: bool = True,
    threshold: float | None = None,
) -> OverlapMetrics:
    """Overlap of each pair of masks, classes or predictions, from one pass that counts voxels in 64-bit integers.

    Extra memory: 0 bytes per voxel.

    Args:
        pred: masks or, with num_classes, label images as in surface_metrics; or logits or probabilities (B, C, *S),
            float16, bfloat16, float32 or float64, which are turned into classes as they are read: the largest wins
            (the first of equals; one channel: object where above 0).
        target: masks of pred's shape; label images (B, *S) for label images and logits.
        spatial_dims, num_classes, include_background: as in surface_metrics; logits have C classes. At most 256.
        threshold: each channel of logits counts on its own, where it is above this (0.5 for probabilities).

    Returns:
        float64 arrays of shape (B, C), as in surface_metrics: dice = 2 tp / (2 tp + fp + fn),
        jaccard = tp / (tp + fp + fn), sensitivity = tp / (tp + fn), specificity = tn / (tn + fp),
        precision = tp / (tp + fp), volume_error = (|pred| - |target|) / |target|. 0/0 counts as 1 where the
        two masks are equal (both empty: dice = 1) and as 0 where they differ (sensitivity for an empty
        target); volume_error is 0 for two empty masks and inf where only the target is empty. Never NaN.

    Raises:
        ValueError, TypeError: as surface_metrics.
    """
    space, _, out, _ = _overlap(pred, target, spatial_dims, num_classes, include_background, threshold)
    return OverlapMetrics(*(space.back(out[i]) for i in range(6)))


def confusion(
    pred: Any,
    target: Any,
    *,
    spatial_dims: int | None = None,
    num_classes: int | None = None,
    include_background: bool = True,
    threshold: float | None = None,
) -> Confusion:
    """The voxels that overlap_metrics counts: true and false positives and negatives of each pair and class.

    Arguments, shapes and errors are those of overlap_metrics; the results int64. They add up over images: see
    OverlapAccumulator.

    Extra memory: 0 bytes per voxel.
    """
    space, counts, _, size = _overlap(pred, target, spatial_dims, num_classes, include_background, threshold)
    p, t, both = counts[..., 0], counts[..., 1], counts[..., 2]
    return Confusion(*(space.back(x) for x in (both, p - both, t - both, size - p - t + both)))


class OverlapAccumulator:
    """Overlap over a whole data set, by class: counts of all voxels, added up, then the ratios.

    Takes the options of overlap_metrics. Large images weigh more than small ones, and a class missing from an image
    does no harm. Counts are exact 64-bit integers on the host (update waits for the device), so the order of updates
    and merges does not matter. For torchmetrics and MONAI: noisyseg_fast.compat.

    >>> total = OverlapAccumulator(num_classes=3)
    >>> for pred, target in cases: total.update(pred, target)
    >>> total.compute().dice                        # shape (3,), one for each class
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        spatial_dims: int | None = None,
        include_background: bool = True,
        threshold: float | None = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "num_classes": num_classes,
            "spatial_dims": spatial_dims,
            "include_background": include_background,
            "threshold": threshold,
        }
        self.reset()

    def reset(self) -> None:
        self.counts: np.ndarray[Any, Any] | None = None  # int64 (C, 4): tp, fp, fn, tn

    def update(self, pred: Any, target: Any) -> None:
        """Adds a batch; the last leading axis counts classes, as in the result of overlap_metrics."""
        self.add(sum_by_class(confusion(pred, target, **self._options)))

    def add(self, counts: np.ndarray[Any, Any]) -> None:
        """Adds counts (C, 4), as another process's `counts`."""
        if self.counts is not None and self.counts.shape != counts.shape:
            raise ValueError(f"counts have {len(counts)} classes, those before {len(self.counts)}")
        self.counts = counts.copy() if self.counts is None else self.counts + counts

    def compute(self) -> OverlapMetrics:
        """float64 arrays (C,); 0/0 as in overlap_metrics."""
        if self.counts is None:
            raise ValueError("nothing to compute: call update first")
        return overlap_of(self.counts)


def sum_by_class(counts: Confusion) -> np.ndarray[Any, Any]:
    """A batch's confusion (..., C) or () as NumPy int64 (C, 4)."""

    def total(x: Any) -> Any:
        host = x.cpu().numpy() if hasattr(x, "cpu") else x.get() if hasattr(x, "get") else np.asarray(x)
        return host.reshape(-1, host.shape[-1] if host.ndim else 1).sum(0)

    return np.stack([total(x) for x in counts], -1).astype(np.int64)


def overlap_of(counts: np.ndarray[Any, Any]) -> OverlapMetrics:
    """The metrics (C,) of counts (C, 4): tp, fp, fn, tn."""
    rows = [
        _core.overlap_result(tp + fp, tp + fn, tp, tp + fp + fn + tn) for tp, fp, fn, tn in counts.tolist()
    ]
    return OverlapMetrics(*np.array(rows, np.float64).reshape(-1, 6).T)


def _overlap(
    pred: Any,
    target: Any,
    spatial_dims: int | None,
    num_classes: int | None,
    include_background: bool,
    threshold: float | None,
) -> tuple[_arrays.Namespace, Any, Any, int]:
    """The namespace, counts (*lead, 3), results (6, *lead), and voxels of a mask."""
    space = _arrays.given(pred=pred, target=target)
    options: dict[str, Any] = {}
    if space.dtype(pred) in _arrays.FLOATS:
        dims, lead, options = _check_logits(
            space, pred, target, spatial_dims, num_classes, include_background
        )
        channels = int(pred.shape[len(pred.shape) - dims - 1])
        if threshold is None and channels > 1:
            options["pred"] = "argmax"
        else:
            options.update(pred="above", threshold=0.0 if threshold is None else float(threshold))
    else:
        if threshold is not None:
            raise ValueError("threshold is for logits or probabilities; pred holds integers")
        space, dims, lead = _check(pred, target, spatial_dims, num_classes)
        if num_classes is not None:
            if num_classes > MAX_CLASSES:
                raise ValueError(f"num_classes must be at most {MAX_CLASSES}, got {num_classes}")
            options = {**_classes(num_classes, include_background), "target_labels": True}
            lead = (*lead, options["classes"])
    counts = space.empty((*lead, 3), "int64")
    out = space.empty((6, *lead), "float64")
    views = (space.view(x) for x in (pred, target))
    _core.overlap_metrics(*views, dims, options, space.view(counts), space.view(out), space.exec)
    return space, counts, out, math.prod(int(n) for n in pred.shape[len(pred.shape) - dims :])


def _check(
    pred: Any, target: Any, spatial_dims: int | None, num_classes: int | None = None
) -> tuple[_arrays.Namespace, int, tuple[int, ...]]:
    """The masks' namespace, number of spatial axes and leading shape."""
    space = _arrays.given(pred=pred, target=target)
    for name, x in (("pred", pred), ("target", target)):
        _arrays.check_dtype(name, space.dtype(x), _arrays.LABELS)
        _arrays.check_rank(name, x)
    shape = tuple(int(n) for n in pred.shape)
    if shape != tuple(target.shape):
        raise ValueError(f"pred has shape {shape} and target {tuple(target.shape)}; they must be the same")
    if 0 in shape:
        raise ValueError(f"pred and target have shape {shape}; at least one mask of one voxel is needed")
    if spatial_dims is None:
        batch = 2 if num_classes is None else 1
        dims = len(shape) if len(shape) <= 3 else len(shape) - batch
        kind = "one mask nor (B, C, *S)" if num_classes is None else "one label image nor (B, *S)"
        if not 1 <= dims <= 3:
            wish = "pass spatial_dims (1, 2 or 3)"
            raise ValueError(f"pred has {len(shape)} dimensions, neither {kind}; {wish}")
    else:
        dims = spatial_dims
        if dims not in (1, 2, 3) or dims > len(shape):
            raise ValueError(
                f"spatial_dims must be 1, 2 or 3 and at most the masks' {len(shape)} dimensions, got {dims}"
            )
    return space, dims, shape[: len(shape) - dims]


def _check_logits(
    space: _arrays.Namespace,
    pred: Any,
    target: Any,
    spatial_dims: int | None,
    num_classes: int | None,
    include_background: bool,
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """The number of spatial axes, leading shape, and options of logits (B, C, *S) and their target."""
    for name, x in (("pred", pred), ("target", target)):
        _arrays.check_rank(name, x)
    _arrays.check_dtype("target", space.dtype(target), _arrays.LABELS)
    shape = tuple(int(n) for n in pred.shape)
    dims = len(shape) - 2 if spatial_dims is None else spatial_dims
    if dims not in (1, 2, 3) or dims >= len(shape):
        raise ValueError(f"logits must be (B, C, *S) with 1 to 3 spatial axes, got pred of shape {shape}")
    lead, classes, size = shape[: -dims - 1], shape[-dims - 1], shape[-dims:]
    labels = tuple(target.shape) == lead + size
    if not labels and tuple(target.shape) != shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; for logits of shape {shape} it must be {lead + size} or the same"
        )
    if 0 in shape:
        raise ValueError(f"pred has shape {shape}; at least one mask of one voxel is needed")
    if num_classes not in (None, classes):
        raise ValueError(f"num_classes is {num_classes}, but pred has {classes} channels")
    if classes > MAX_CLASSES:
        raise ValueError(f"pred must have at most {MAX_CLASSES} channels, got {classes}")
    options = {**_classes(classes, include_background), "target_labels": labels}
    return dims, (*lead, options["classes"]), options


def _classes(num_classes: int, include_background: bool) -> dict[str, Any]:
    first = 0 if include_background else 1
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes <= first:
        least = f"an integer of at least {first + 1}"
        raise ValueError(
            f"num_classes must be {least} (include_background={include_background}), got {num_classes!r}"
        )
    return {"classes": num_classes - first, "first_label": first}


def _rules(definition: str, *given: Any) -> dict[str, Any]:
    """The rules of the compiled module: the definition's, or those given in the order of _RULES."""
    if definition not in _PRESETS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}, got {definition!r}")
    rules = {}
    for (name, values), rule, preset in zip(_RULES.items(), given, _PRESETS[definition], strict=True):
        rules[name] = preset if rule is None else rule
        if rules[name] not in values:
            raise ValueError(f"{name} must be one of {', '.join(map(str, values))}, got {rule!r}")
    if rules["surface"] == "cells" and rules["interpolation"] == "linear":
        raise ValueError(
            "interpolation must be 'inverted_cdf' for surface='cells': their percentiles are weighted by area"
        )
    return {
        "surface": rules["surface"],
        "border": bool(rules["border"]),
        "pooled": rules["percentile_rule"] == "pooled",
        "interpolate": rules["interpolation"] == "linear",
        "mean_of_two": rules["average"] == "mean",
    }


def _missing(empty: str | float, size: Sequence[int], spacing: Sequence[float]) -> float:
    if empty == "inf":
        return math.inf
    if empty == "diagonal":
        return math.sqrt(sum((int(n) * s) ** 2 for n, s in zip(size, spacing, strict=True)))
    if isinstance(empty, str | bool) or not empty >= 0:
        raise ValueError(f"empty must be 'inf', 'diagonal' or a number that is not negative, got {empty!r}")
    return float(empty)


def _tolerances(tolerance: Any, lead: Sequence[int]) -> tuple[list[list[float]], bool]:
    """The tolerances by class (one row: the same for all), and whether it is a single number."""
    try:
        table = np.asarray(tolerance, np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"tolerance must be a number, a sequence, or one of equal length for each class, got {tolerance!r}"
        ) from None
    if table.size == 0 or not (np.isfinite(table) & (table >= 0)).all():
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
    if table.ndim > 2 or (table.ndim == 2 and len(table) != (lead[-1] if lead else 1)):
        raise ValueError(
            f"tolerance has shape {table.shape}; for each class it must be ({lead[-1] if lead else 1}, tolerances)"
        )
    if table.size > MAX_TOLERANCES:
        raise ValueError(f"tolerance has {table.size} values; at most {MAX_TOLERANCES} are supported")
    return table.reshape(-1, table.shape[-1] if table.ndim else 1).tolist(), table.ndim == 0


def _last(x: Any) -> Any:
    """x with its first axis last."""
    axes = (*range(1, x.ndim), 0)
    return x.permute(axes) if hasattr(x, "permute") else x.transpose(axes)
