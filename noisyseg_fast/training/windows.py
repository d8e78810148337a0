"""Inference window by window, with the memory of one row of windows however long the image is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

PIXELS = 1 << 20  # that go through the network at once, unless one window has more


def label_planes(
    predictor: Callable[[Tensor], Tensor],
    read: Callable[[int, int], Tensor],
    shape: Sequence[int],
    patch: Sequence[int],
    *,
    overlap: float = 0.5,
    flips: bool = False,
    first: int = 0,
) -> Iterator[Tensor]:
    """Label maps (B, *S[:-1], n) uint8 on the CPU of images (B, channels, *S), n planes across the last axis at a
    time: those that no later window changes. Together they are the planes from `first` on.

    predictor: windows (N, channels, *patch) -> logits (N, outputs, *patch), on their device. read(low, high): the
    planes low..high of the images, (B, channels, *S[:-1], high - low) float32, on the predictor's device. overlap:
    share of a window that the next one covers too. flips: average the probabilities over the window's 2^dims flips,
    with one pass for each.

    Windows lie where MONAI's sliding_window_inference puts them; logits (with flips, probabilities) are summed with
    its Gaussian weights. An image smaller than a window is padded with 0. Planes come out the same, to the bit,
    whatever `first` is: to go on at a plane, the windows that reach into it are done again.

    Memory: (4 channels + 8 outputs + 1) bytes for each of B * S[:-1] * patch[-1] pixels, and what the network takes
    for max(PIXELS, B windows).
    """
    from monai.data.utils import compute_importance_map

    lacking = [max(0, p - n) for n, p in zip(shape, patch, strict=True)]
    before = [n // 2 for n in lacking]
    padded = [n + extra for n, extra in zip(shape, lacking, strict=True)]
    *across, along = (_starts(n, p, overlap) for n, p in zip(padded, patch, strict=True))
    corners = list(itertools.product(*across))
    inside = [slice(b, b + n) for b, n in zip(before[:-1], shape[:-1], strict=True)]
    depth, ends = patch[-1], [*along[1:], padded[-1]]
    weight = sums = None
    for z, end in zip(along, ends, strict=True):
        if z + depth <= first + before[-1]:
            continue
        low, high = max(0, z - before[-1]), min(shape[-1], z + depth - before[-1])
        slab = read(low, high)
        batch = windows_at_once(patch, len(slab))
        if any(lacking):
            slab = _pad(slab, before, lacking)
        for some in (corners[i : i + batch] for i in range(0, len(corners), batch)):
            places: list[Any] = [
                (..., *(slice(c, c + p) for c, p in zip(corner, patch[:-1], strict=True)), slice(None))
                for corner in some
            ]
            values = _scores(predictor, torch.cat([slab[place] for place in places]), flips)
            if sums is None or weight is None:
                sums = values.new_zeros((len(slab), values.shape[1], *padded[:-1], depth))
                single = list(padded) == list(patch)
                weight = (
                    1.0 if single else compute_importance_map(tuple(patch), "gaussian", device=slab.device)
                )
            for place, value in zip(places, values.split(len(slab)), strict=True):
                sums[place] += weight * value
        assert sums is not None
        del slab
        start, stop = max(first + before[-1], z) - z, min(end, shape[-1] + before[-1]) - z
        if stop > start:
            finished: Any = (..., *inside, slice(start, stop))
            yield _labels(sums[finished]).cpu()
        kept = sums[..., end - z :].clone()
        sums[..., : kept.shape[-1]] = kept
        sums[..., kept.shape[-1] :] = 0


def windows_at_once(patch: Sequence[int], images: int = 1) -> int:
    """How many windows of each image go through the network together."""
    return max(1, PIXELS // (math.prod(patch) * images))


def _starts(size: int, window: int, overlap: float) -> list[int]:
    from monai.data.utils import dense_patch_slices

    step = max(1, int(window * (1 - overlap)))
    return [int(place.start) for (place,) in dense_patch_slices((size,), (window,), (step,))]


def _pad(slab: Tensor, before: Sequence[int], lacking: Sequence[int]) -> Tensor:
    sides = [(b, extra - b) for b, extra in zip(before, lacking, strict=True)]
    return torch.nn.functional.pad(slab, [n for side in reversed(sides) for n in side])


def _scores(predictor: Callable[[Tensor], Tensor], windows: Tensor, flips: bool) -> Tensor:
    """(N, outputs, *patch) float32: one output is above 0 where there is foreground, the largest of several wins."""
    with torch.no_grad():
        if not flips:
            return predictor(windows).float()
        axes = range(2, windows.ndim)
        subsets = [s for count in range(len(axes) + 1) for s in itertools.combinations(axes, count)]
        total: Tensor | None = None
        for subset in subsets:
            logits = predictor(windows.flip(subset)).float()
            share = (logits.sigmoid() - 0.5 if logits.shape[1] == 1 else logits.softmax(1)).flip(subset)
            total = share if total is None else total + share
        assert total is not None
        return total / len(subsets)


def _labels(scores: Tensor) -> Tensor:
    """(B, *S) uint8 of scores (B, outputs, *S)."""
    if scores.shape[1] == 1:
        return (scores[:, 0] > 0).to(torch.uint8)
    result = torch.empty((len(scores), *scores.shape[2:]), dtype=torch.uint8, device=scores.device)
    for i in range(scores.shape[2]):  # argmax gives int64
        result[:, i] = scores[:, :, i].argmax(1)
    return result
