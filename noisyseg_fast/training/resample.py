"""To another voxel spacing and back: images linearly, labels by the class whose linearly resampled share is largest.

The outer edges of the volume stay where they are, so the new spacing is the wanted one up to the rounding of the
size; `spacing_of` says what it is. There is no filter before a reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

Array = np.ndarray[Any, Any]
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def size_of(size: Sequence[int], spacing: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...]:
    """The size (*S) at the wanted spacing, at least 1 along each axis. ValueError unless one value is wanted for each
    axis, and all are positive and finite."""
    if len(wanted) != len(size):
        raise ValueError(f"spacing must have {len(size)} values, one for each axis, got {tuple(wanted)}")
    check(wanted)
    return tuple(max(1, round(n * s / w)) for n, s, w in zip(size, spacing, wanted, strict=True))


def check(wanted: Sequence[float]) -> None:
    """ValueError unless all are positive and finite."""
    if not len(wanted) or not all(0 < w < float("inf") for w in wanted):
        raise ValueError(f"spacing must be positive and finite, got {tuple(wanted)}")


def spacing_of(size: Sequence[int], spacing: Sequence[float], new: Sequence[int]) -> tuple[float, ...]:
    """The spacing of a volume of that size and spacing once it has the size `new`."""
    return tuple(s * n / m for n, s, m in zip(size, spacing, new, strict=True))


def resample_image(image: Array, size: Sequence[int]) -> Array:
    """(channels, *S) of any real dtype -> (channels, *size) float32, linearly."""
    if image.shape[1:] == tuple(size):
        return image.astype(np.float32, copy=False)
    x = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    resampled: Array = F.interpolate(
        x[None], tuple(size), mode=MODES[image.ndim - 1], align_corners=False
    ).numpy()[0]
    return resampled


def resample_label(label: Array, size: Sequence[int], missing: int = 255) -> Array:
    """(*S) class numbers below 256 -> (*size) uint8: of each voxel the class with the largest share, the lowest of
    equal ones. `missing`, where nobody drew, is a class like the others."""
    if label.shape == tuple(size):
        return label.astype(np.uint8, copy=False)
    best = np.zeros(tuple(size), np.float32)
    result = np.full(tuple(size), label.flat[0], np.uint8)
    present = np.flatnonzero(np.bincount(label.ravel(), minlength=missing + 1))
    if len(present) < 2:
        return result
    for value in present:
        share = resample_image((label == value)[None], size)[0]
        more = share > best
        result[more], best[more] = value, share[more]
    return result
