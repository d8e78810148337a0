"""A conditional random field that refines probabilities by the image: mean field over a window around each pixel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def mean_field(
    probabilities: Tensor,
    image: Tensor,
    *,
    spacing: Sequence[float] | None = None,
    iterations: int = 5,
    radius: int | None = None,
    appearance: float = 3.0,
    sigma_space: float = 4.0,
    sigma_intensity: float = 0.5,
    smoothness: float = 1.0,
    sigma_smooth: float = 1.5,
) -> Tensor:
    """The marginals (B, C, *S) float32 of Kraehenbuehl and Koltun's dense CRF (NIPS 2011, eq. 1-3, algorithm 1)
    with Potts compatibility, truncated: pixels interact within `radius` pixels along each axis, no further.

    Q_i(l) is softmax over l of log p_i(l) + sum_j k_ij Q_j(l), where with distance d and intensity difference v

        k_ij = appearance / A exp(-d^2 / (2 sigma_space^2) - v^2 / (2 sigma_intensity^2))
             + smoothness / M exp(-d^2 / (2 sigma_smooth^2)).

    A and M are the sums of the spatial Gaussians over the window, so that a weight is the most that all neighbours
    together can add, whatever the window and the dimensions; the paper's kernels are not divided.

    probabilities: (B, C, *S), S of 2 or 3 axes; image: (B, channels, *S). spacing: of a pixel along each axis, in
    the unit of sigma_space and sigma_smooth; None: 1. radius: None: 5 in 2D, 2 in 3D. The defaults are ours, for
    z-scored images. Memory: half the window's pixels times an image in float32. Nothing waits for the device.

    ValueError for arguments out of range.
    """
    dims = probabilities.ndim - 2
    if dims not in (2, 3) or image.ndim != dims + 2 or image.shape[2:] != probabilities.shape[2:]:
        raise ValueError(
            "probabilities (B, C, *S) and image (B, channels, *S) must have the same 2 or 3 axes S, got "
            f"{tuple(probabilities.shape)} and {tuple(image.shape)}"
        )
    radius = (5 if dims == 2 else 2) if radius is None else radius
    if radius < 1 or iterations < 0:
        raise ValueError(
            f"radius must be at least 1 and iterations at least 0, got {radius} and {iterations}"
        )
    steps = (1.0,) * dims if spacing is None else tuple(float(s) for s in spacing)
    if len(steps) != dims or not all(0 < s < math.inf for s in steps):
        raise ValueError(f"spacing must be {dims} positive numbers, got {spacing}")
    for name, value in (("appearance", appearance), ("smoothness", smoothness)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    for name, value in (
        ("sigma_space", sigma_space), ("sigma_intensity", sigma_intensity), ("sigma_smooth", sigma_smooth)
    ):  # fmt: skip
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")

    window = list(itertools.product(range(-radius, radius + 1), repeat=dims))
    half = window[len(window) // 2 + 1 :]  # one of each pair d, -d: k is symmetric
    half = [d for d in half if all(abs(a) < n for a, n in zip(d, image.shape[2:], strict=True))]

    def gauss(offset: Sequence[int], sigma: float) -> float:
        squared = sum((a * s) ** 2 for a, s in zip(offset, steps, strict=True))
        return math.exp(-squared / (2 * sigma**2))

    of_space = appearance / (sum(gauss(d, sigma_space) for d in window) - 1)
    of_smooth = smoothness / (sum(gauss(d, sigma_smooth) for d in window) - 1)
    image = image.float()
    pairs = []  # the two views of every pair of pixels d apart, and k between them
    for offset in half:
        here, there = _views(offset)
        difference = (image[here] - image[there]).square_().sum(1, keepdim=True)
        k = difference.mul_(-0.5 / sigma_intensity**2).exp_().mul_(of_space * gauss(offset, sigma_space))
        pairs.append((here, there, k.add_(of_smooth * gauss(offset, sigma_smooth))))
    unary = probabilities.float().clamp(min=1e-6).log()
    q = unary.softmax(1)
    for _ in range(iterations):
        total = unary.clone()
        for here, there, k in pairs:
            total[here].addcmul_(k, q[there])
            total[there].addcmul_(k, q[here])
        q = total.softmax(1)
    return q


def _views(offset: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Indices of (B, C, *S) such that x[second] holds what lies `offset` from x[first]."""
    whole = (slice(None), slice(None))
    first = tuple(slice(max(0, -a), -a if a > 0 else None) for a in offset)
    second = tuple(slice(max(0, a), a if a < 0 else None) for a in offset)
    return (*whole, *first), (*whole, *second)
