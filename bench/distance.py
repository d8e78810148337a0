"""Distance transforms and signed maps on the cases of PEERS.md and on masks made to be hard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from noisyseg_fast.timing import (
    Call,
    Case,
    Contender,
    blobs,
    each,
    edt_case,
    joined,
    signed_case,
    threads,
)

Mask = np.ndarray[Any, Any]

BLOBS = [(128, 64, 64), (4, 112, 112, 80), (32, 256, 256), (1, 512, 512, 300)]
QUICK = BLOBS[:3]


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    for shape in QUICK if quick else BLOBS:
        yield lambda shape=shape: unsigned(blobs(shape), device=device, headline=True)
        yield lambda shape=shape: signed(blobs(shape), device=device, headline=True)
        inner = (
            shape if math.prod(shape) < 1 << 25 else (1, 256, 256, 150)
        )  # its peers take half a minute there
        yield lambda shape=inner: signed(blobs(shape), device=device, convention="boundary")
    if quick:
        return
    yield lambda: unsigned(blobs((4, 112, 112, 80)), spacing=(3, 1, 1), device=device)
    yield lambda: signed(blobs((4, 112, 112, 80)), spacing=(3, 1, 1), device=device)
    for shape in ((32, 256, 256), (4, 112, 112, 80)):
        for name, make in HARD.items():
            one_class = make in (
                empty,
                full,
            )  # judged by edt, on the CPU; no peer's signed map is defined there
            if device == "cpu" or not one_class:
                yield lambda shape=shape, name=name, make=make: unsigned(make(shape), name, device=device)
            if not one_class:
                yield lambda shape=shape, name=name, make=make: signed(make(shape), name, device=device)


def one_hole(shape: Sequence[int]) -> Mask:
    """All object but one corner voxel: the longest distances there are."""
    mask = np.ones(shape, np.uint8)
    mask[(slice(None), *[0] * (len(shape) - 1))] = 0
    return mask


def speck(shape: Sequence[int]) -> Mask:
    """One object voxel in the middle."""
    mask = np.zeros(shape, np.uint8)
    mask[(slice(None), *(n // 2 for n in shape[1:]))] = 1
    return mask


def checkerboard(shape: Sequence[int]) -> Mask:
    return (np.indices(shape[1:]).sum(0) % 2).astype(np.uint8)[None].repeat(shape[0], 0)


def sparse_holes(shape: Sequence[int]) -> Mask:
    """A background voxel in ten thousand."""
    return (np.random.default_rng(0).random(shape) > 1e-4).astype(np.uint8)


def coin_flips(shape: Sequence[int]) -> Mask:
    return np.random.default_rng(0).integers(0, 2, shape, np.uint8)


def stripes(shape: Sequence[int]) -> Mask:
    """8 voxels wide, along the contiguous axis."""
    return (np.indices(shape[1:])[-1] // 8 % 2).astype(np.uint8)[None].repeat(shape[0], 0)


def diagonal(shape: Sequence[int]) -> Mask:
    """All object but a diagonal line."""
    mask = np.ones(shape, np.uint8)
    mask[(slice(None), *[np.arange(min(shape[1:]))] * (len(shape) - 1))] = 0
    return mask


def specks(shape: Sequence[int]) -> Mask:
    return (np.random.default_rng(0).random(shape) < 0.01).astype(np.uint8)


def holes(shape: Sequence[int]) -> Mask:
    return (np.random.default_rng(0).random(shape) < 0.99).astype(np.uint8)


def ball(shape: Sequence[int]) -> Mask:
    """A ball that fills the image: many sites at nearly the same distance."""
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[1:]), indexing="ij"))
    return ((place**2).sum(0) < 0.98).astype(np.uint8)[None].repeat(shape[0], 0)


def empty(shape: Sequence[int]) -> Mask:
    return np.zeros(shape, np.uint8)


def full(shape: Sequence[int]) -> Mask:
    return np.ones(shape, np.uint8)


HARD: dict[str, Callable[[Sequence[int]], Mask]] = {
    "one hole": one_hole,
    "one voxel": speck,
    "checkerboard": checkerboard,
    "sparse holes": sparse_holes,
    "coin flips": coin_flips,
    "stripes": stripes,
    "diagonal": diagonal,
    "1 %": specks,
    "99 %": holes,
    "ball": ball,
    "empty": empty,
    "full": full,
}


def unsigned(mask: Mask, what: str = "", *, spacing: Any = None, device: str, headline: bool = False) -> Case:
    more = _cuda(mask, spacing) if device == "cuda" else []
    if device == "cpu" and mask.ndim == 3 and spacing is None:
        more = [Contender("OpenCV", partial(_opencv, mask), joined)]
    return edt_case(
        mask, what, spacing=spacing, device=device, more=more, deadline=_deadline(what), headline=headline
    )


def signed(
    mask: Mask,
    what: str = "",
    *,
    convention: str = "two_sided",
    spacing: Any = None,
    device: str,
    headline: bool = False,
) -> Case:
    # SimpleITK's zero is the object's contour, as in our convention "boundary", but it counts other voxels to it:
    # its answers differ by a part of a voxel, so its time is shown and its answer not judged.
    itk = device == "cpu" and convention == "boundary"
    return signed_case(
        mask,
        what,
        convention=convention,
        spacing=spacing,
        device=device,
        more=[Contender("SimpleITK", partial(_simpleitk, mask, spacing), None)] if itk else [],
        deadline=_deadline(what),
        headline=headline,
    )


def _deadline(what: str) -> float:
    """PyTorch's own transform costs the same whatever the mask holds: it is timed on the blobs alone."""
    return 0.0 if what else float("inf")


def _opencv(mask: Mask) -> Call:
    import cv2

    cv2.setNumThreads(threads())
    return each(lambda m: cv2.distanceTransform(m, cv2.DIST_L2, cv2.DIST_MASK_PRECISE), mask)


def _simpleitk(mask: Mask, spacing: Sequence[float] | None) -> Call:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads())
    images = [sitk.GetImageFromArray(m) for m in mask]
    for image in images:
        image.SetSpacing([float(s) for s in reversed(spacing or (1.0,) * (mask.ndim - 1))])

    def one(image: Any) -> Any:
        result = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
        return sitk.GetArrayViewFromImage(result).copy()

    return each(one, images)


def _cuda(mask: Mask, spacing: Sequence[float] | None) -> list[Contender]:
    def cupy() -> Call:
        import cupy
        from cupyx.scipy.ndimage import distance_transform_edt

        return each(
            partial(distance_transform_edt, sampling=spacing, float64_distances=False), cupy.asarray(mask)
        )

    def cucim() -> Call:
        import cupy
        from cucim.core.operations.morphology import distance_transform_edt

        return each(partial(distance_transform_edt, sampling=spacing), cupy.asarray(mask))

    return [Contender("CuPy", cupy, joined), Contender("cuCIM", cucim, joined)]
