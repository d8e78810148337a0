"""Simulated annotation noise: what a hurried or cautious rater does to a mask. Seeded; writes no input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distance import distance_transform_edt


def dilate(mask: Any, radius: float | Sequence[float], *, spatial_dims: int | None = None) -> Any:
    """The mask grown by a Euclidean disk (ball) of `radius` pixels.

    mask: (..., *S), nonzero = object; leading dimensions are a batch. radius: one for all, or one for each
    mask of a one-dimensional batch. spatial_dims: number of trailing spatial axes (default: all).
    Returns 0 and 1 in the mask's shape and dtype: 1 where the distance to the nearest object pixel is
    at most radius. An empty mask stays empty. Raises ValueError for a negative or non-finite radius.
    """
    dims = mask.ndim if spatial_dims is None else spatial_dims
    if not 1 <= dims <= mask.ndim:
        raise ValueError(
            f"spatial_dims must be 1 to {mask.ndim} for a mask of shape {tuple(mask.shape)}, got {dims}"
        )
    radii = [float(r) for r in np.atleast_1d(np.asarray(radius, dtype=np.float64))]
    if not all(0 <= r < float("inf") for r in radii):
        raise ValueError(f"radius must be finite and not negative, got {radius}")
    if len(radii) > 1:
        if mask.ndim != dims + 1 or len(mask) != len(radii):
            raise ValueError(
                f"radius has {len(radii)} values for a mask of shape {tuple(mask.shape)} "
                f"with {dims} spatial axes"
            )
        grown = mask != 0
        for i, r in enumerate(radii):
            grown[i] = _grown(mask[i] != 0, r, dims)
    else:
        grown = _grown(mask != 0, radii[0], dims)
    return grown.astype(mask.dtype) if hasattr(grown, "astype") else grown.to(mask.dtype)


def _grown(inside: Any, radius: float, dims: int) -> Any:
    distance = distance_transform_edt(inside == 0, spatial_dims=dims)
    lead = inside.shape[: inside.ndim - dims]
    any_inside = inside.reshape((*lead, -1)).any(-1).reshape((*lead, *(1,) * dims))
    return (distance <= radius) & any_inside  # without any object there is no distance to it


def corruption_radii(count: int, rate: float, max_radius: int, seed: int) -> NDArray[np.int64]:
    """The dilation of each of `count` masks in pixels, 0 for those left alone; (count,) int64.

    round(rate * count) masks are drawn without replacement, and for each an integer from 0 to max_radius,
    both ends included (MCPM, sec. 4.1: "randomly drawn from [0, 6]"); so 1 in max_radius + 1 of them keeps
    its mask.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"noise rate must be between 0 and 1, got {rate}")
    if max_radius < 0:
        raise ValueError(f"max_radius must not be negative, got {max_radius}")
    generator = np.random.default_rng([seed, 0x6E6F6973])  # a stream of its own: "nois"
    radii = np.zeros(count, dtype=np.int64)
    chosen = generator.permutation(count)[: round(rate * count)]
    radii[chosen] = generator.integers(0, max_radius, size=len(chosen), endpoint=True)
    return radii


def corrupt(
    masks: Any, rate: float, max_radius: int = 6, *, seed: int, spatial_dims: int | None = None
) -> tuple[Any, NDArray[np.int64]]:
    """Masks loosely enclosing their objects, as MCPM makes its training noise (sec. 4.1, "Dilation").

    masks: (N, *S). Returns the corrupted masks, 0 and 1 in the same shape and dtype, and the radii (N,) in
    pixels. The paper does not name the structuring element; here it is the Euclidean disk of `dilate`.
    """
    if not len(masks):
        raise ValueError(f"masks must hold at least one mask, got shape {tuple(masks.shape)}")
    radii = corruption_radii(len(masks), rate, max_radius, seed)
    dims = masks.ndim - 1 if spatial_dims is None else spatial_dims
    return dilate(masks, [float(r) for r in radii], spatial_dims=dims), radii


def dilate_labels(labels: Any, radius: float) -> Any:
    """`dilate` for a label map (*S): each class grows over background only, smaller labels first."""
    if radius == 0:
        return labels
    grown = labels * 1  # a copy, whatever the array's kind
    for label in range(1, int(labels.max()) + 1):
        new = (dilate(labels == label, radius) != 0) & (grown == 0)
        grown[new] = label
    return grown
