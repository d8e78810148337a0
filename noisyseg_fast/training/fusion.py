"""One mask from the files of several raters: what `noisyseg fuse` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import labels
from .data import Array, DataError, Raw, check_geometry, read, suffix, whole_numbers
from .predict import write_nifti, write_png

METHODS = ("staple", "majority", "simple", "mean")


class Fusion(NamedTuple):
    """Rates with several labels are means over the labels but 0."""

    against: str  # what the scores compare with
    scores: Array  # (M, 3): sensitivity, specificity, Dice of each rater
    dice: float  # mean over the pairs of raters
    kappa: float
    alpha: float


def fuse(
    paths: Sequence[Path],
    out: Path,
    *,
    method: str = "staple",
    tie: str | None = None,
    posterior: Path | None = None,
    classes: int | None = None,
) -> Fusion:
    """Write the fused mask, uint8 in the first file's geometry (for "mean" the fractions, float32), and with
    "staple" the posterior, float32 (several labels: as the last axis). Scores of "mean" are against its half.

    paths: masks of one shape and affine; without `classes` whatever is not 0 is object ("mean" takes soft masks from
    0 to 1 too). Everything is read and checked before anything is written. DataError for bad files, ValueError for
    options.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if classes is not None and not 2 <= classes <= labels.MAX_CLASSES:
        raise ValueError(f"--classes must be 2 to {labels.MAX_CLASSES}, got {classes}")
    if len(paths) < 2:
        raise ValueError(f"fuse needs the masks of at least 2 raters, got {len(paths)}")
    if tie is not None and method not in ("majority", "simple"):
        raise ValueError(f"--tie is for majority and simple; {method} has no ties")
    if posterior is not None and method != "staple":
        raise ValueError(f"--posterior is for staple, got method {method!r}")
    rule = _tie(tie, classes)
    png = suffix(paths[0]) == ".png"
    for name, path in (("--out", out), ("--posterior", posterior)):
        if path is None:
            continue
        if any(path.resolve() == p.resolve() for p in paths):
            raise DataError(f"{path}: would replace a rater's mask; choose another {name}")
        if png and (method == "mean" or name == "--posterior"):
            raise DataError(f"{path}: PNG masks have no fractions; use NIfTI for {method} or --posterior")
        if (suffix(path) == ".png") != png:
            wish = ".png" if png else ".nii.gz or .nii"
            raise DataError(f"{path}: must be {wish}, as the masks")
    masks = _read(paths, classes, soft=method == "mean")
    dims = masks.ndim - 1
    soft = masks.dtype == np.float32
    fused: Array
    if method == "staple":
        estimate = labels.staple(masks, num_classes=classes, spatial_dims=dims)
        fused = estimate.labels
    elif method == "majority":
        fused = labels.majority_vote(masks, tie=rule, num_classes=classes, spatial_dims=dims)
    elif method == "simple":
        fused = labels.simple(masks, tie=rule, num_classes=classes, spatial_dims=dims).labels
    else:
        fused = labels.soft_average(masks, num_classes=classes, spatial_dims=dims)
    votes = masks >= 0.5 if soft else masks
    mask = fused
    if method == "mean":
        mask = (fused >= 0.5 if classes is None else fused.argmax(0)).astype(np.uint8)
    scores = np.stack(labels.rater_scores(votes, mask, num_classes=classes, spatial_dims=dims), -1)
    against = f"the fused mask ({method})" + (" >= 0.5" if method == "mean" and classes is None else "")
    if method == "staple":
        scores[..., 0], scores[..., 1] = estimate.sensitivity, estimate.specificity
        against = "the estimated truth (STAPLE); Dice: against the fused mask"
    agreed = labels.agreement(votes, num_classes=classes, spatial_dims=dims)
    pairs = agreed.dice[np.triu_indices(len(paths), 1)]
    if classes is not None:
        scores, pairs = scores[:, 1:].mean(1), pairs[:, 1:]

    if posterior is not None:
        _write(posterior, estimate.posterior, paths[0], classes is not None)
    if png:
        write_png(out, fused * np.uint8(255) if classes is None else fused)
    else:
        _write(out, fused, paths[0], classes is not None and method == "mean")
    return Fusion(
        against, scores, float(pairs.mean()), float(agreed.fleiss_kappa), float(agreed.krippendorff_alpha)
    )


def _tie(tie: str | None, classes: int | None) -> int | str:
    if tie in (None, "lowest", "highest"):
        return tie or 0
    most = 255 if classes is not None else 1
    if not str(tie).isdecimal() or int(str(tie)) > most:
        raise ValueError(f"--tie must be a label from 0 to {most}, lowest or highest, got {tie!r}")
    return int(str(tie))


def _read(paths: Sequence[Path], classes: int | None, soft: bool) -> Array:
    """uint8 (M, *S), masks as 0 and 1; float32 where `soft` and some values are no whole numbers."""
    first: Raw | None = None
    masks = []
    for path in paths:
        raw = read(path, "label")
        if first is None:
            first = raw
        elif (raw.affine is None) != (first.affine is None):
            raise DataError(f"{path}: is {suffix(path)}, but {paths[0]} is {suffix(paths[0])}; use one kind")
        else:
            check_geometry(path, raw, paths[0], first, "the first mask")
        values = raw.array
        fractions = soft and classes is None and values.dtype.kind == "f"
        if fractions and not np.isfinite(values).all():
            raise DataError(f"{path}: soft masks must be finite, replace NaN and infinity")
        whole = not fractions or np.array_equal(values, np.floor(values))
        if whole:
            values = whole_numbers(path, raw)
        low, high = values.min(), values.max()
        if classes is not None and not 0 <= low <= high < classes:
            bad = int(high if high >= classes else low)
            raise DataError(f"{path}: label {bad} is out of range 0..{classes - 1}")
        if not whole and not 0 <= low <= high <= 1:
            raise DataError(f"{path}: soft masks must lie between 0 and 1, found {low:g} to {high:g}")
        if not whole:
            masks.append(values.astype(np.float32))
        else:
            masks.append(values.astype(np.uint8) if classes is not None else (values != 0).astype(np.uint8))
    return np.stack(masks)


def _write(path: Path, array: Array, like: Path, channels: bool) -> None:
    write_nifti(path, np.moveaxis(array, 0, -1) if channels else array, like)
