"""Label noise beside SciPy, OpenCV and elasticdeform."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from noisyseg_fast import noise
from noisyseg_fast.timing import OURS, Call, Case, Contender, blobs, each, joined, on_device, threads

Mask = np.ndarray[Any, Any]

SHAPES = [(128, 64, 64), (32, 256, 256), (4, 112, 112, 80)]
LARGE = (1, 512, 512, 300)


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    for shape in SHAPES if quick else [*SHAPES, LARGE]:
        yield lambda shape=shape: dilation(inner_blobs(shape), 3, device)
        if not quick and shape != LARGE:
            yield lambda shape=shape: dilation(inner_blobs(shape), 10, device)
        if shape != LARGE and not (quick and len(shape) == 4):  # minutes, or 10 s, for each peer
            yield lambda shape=shape: deformation(inner_blobs(shape), device)
        yield lambda shape=shape: components(inner_blobs(shape), device)
        if len(shape) == 3:
            yield lambda shape=shape: polygons(inner_blobs(shape), device)


def inner_blobs(shape: Sequence[int]) -> Mask:
    """Blobs that do not touch the image's edge, where the peers' conventions differ."""
    mask = blobs(shape)
    for axis in range(1, mask.ndim):
        for end in (0, -1):
            np.moveaxis(mask, axis, 0)[end] = 0
    return mask


def _case(
    operation: str, mask: Mask, device: str, contenders: list[Contender], moved: int, oracle: Any
) -> Case:
    return Case(
        family="noise",
        operation=operation,
        input="x".join(map(str, mask.shape)),
        contenders=contenders,
        oracle=oracle,
        tolerance=1e-5,
        moved=moved * mask.size,
        device=device,
    )


def _differing(answer: Any, expected: Any) -> float:
    """The share of pixels that differ: a place halfway between two pixels may be rounded either way."""
    got = np.asarray(answer.cpu() if hasattr(answer, "cpu") else answer)
    return float(np.mean(got != np.asarray(expected)))


def dilation(mask: Mask, radius: int, device: str) -> Case:
    dims = mask.ndim - 1

    def ours() -> Call:
        x = on_device(mask, device)
        return lambda: noise.dilate(x, radius, spatial_dims=dims)

    def disk() -> Any:
        return sum(np.square(np.indices((2 * radius + 1,) * dims) - radius)) <= radius**2

    def scipy() -> Call:
        from scipy.ndimage import binary_dilation

        return each(lambda m: binary_dilation(m, disk()).astype(m.dtype), mask)

    def scipy_edt() -> Call:
        from scipy.ndimage import distance_transform_edt

        return each(lambda m: (distance_transform_edt(m == 0) <= radius).astype(m.dtype), mask)

    def edt() -> Call:
        import edt as package

        one = partial(package.edt, parallel=threads())
        return each(lambda m: (one(m == 0) <= radius).astype(m.dtype), mask)

    def opencv() -> Call:
        import cv2

        return each(lambda m: cv2.dilate(m, disk().astype(np.uint8)), mask)

    contenders = [
        Contender(OURS, ours, joined),
        Contender("SciPy, disk", scipy, joined),
        Contender("SciPy, distance", scipy_edt, joined),
        Contender("edt", edt, joined),
    ]
    if dims == 2:
        contenders.append(Contender("OpenCV", opencv, joined))
    oracle = "edt" if mask.size > 1 << 25 else "SciPy, distance"  # which takes half a minute
    return _case(f"dilate by {radius}", mask, device, contenders, 2, oracle)


def deformation(mask: Mask, device: str) -> Case:
    dims = mask.ndim - 1
    grid = np.random.default_rng(0).normal(0, 3, (len(mask), dims, *(3,) * dims))

    def ours() -> Call:
        x = on_device(mask, device)
        return lambda: noise.deform(x, grid, spatial_dims=dims)

    def elasticdeform() -> Call:
        from elasticdeform import deform_grid

        return lambda: np.stack([deform_grid(m, g, order=0) for m, g in zip(mask, grid, strict=True)])

    def scipy() -> Call:
        from scipy.ndimage import map_coordinates

        index = np.indices(mask.shape[1:]).astype(float)
        steps = [(3 - 1) / (n - 1) for n in mask.shape[1:]]
        places = np.stack([i * step for i, step in zip(index, steps, strict=True)])

        def one(m: Mask, g: Mask) -> Mask:
            u = np.stack([map_coordinates(d, places, order=3, mode="mirror") for d in g])
            return np.asarray(map_coordinates(m, index + u, order=0, mode="grid-constant"))

        return lambda: np.stack([one(m, g) for m, g in zip(mask, grid, strict=True)])

    contenders = [
        Contender(OURS, ours, _differing),
        Contender("elasticdeform", elasticdeform, _differing),
        Contender("SciPy", scipy, _differing),
    ]
    return _case("elastic deformation, 3 points, nearest", mask, device, contenders, 2, "SciPy")


def components(mask: Mask, device: str) -> Case:
    dims = mask.ndim - 1
    size = mask[0].size

    def ours() -> Call:
        x = on_device(mask, device)
        return lambda: noise.connected_components(x, spatial_dims=dims)

    def scipy() -> Call:
        from scipy.ndimage import label

        structure = np.ones((3,) * dims)
        return each(lambda m: label(m, structure)[0], mask)

    def opencv() -> Call:
        import cv2

        return each(lambda m: cv2.connectedComponents(m, connectivity=8)[1], mask)

    def first_pixels(labels: Any) -> Mask:
        """Any numbering as ours."""
        rows = []
        for item in np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels).reshape(len(mask), size):
            names, first, number = np.unique(item, return_index=True, return_inverse=True)
            rows.append(np.where(names == 0, 0, first + 1)[number])
        return np.stack(rows)

    def error(answer: Any, expected: Any) -> float:
        return float(np.mean(first_pixels(answer) != first_pixels(expected)))

    contenders = [Contender(OURS, ours, error), Contender("SciPy", scipy, error)]
    if dims == 2:
        contenders.append(Contender("OpenCV", opencv, error))
    return _case("connected components", mask, device, contenders, 5, "SciPy")


def polygons(mask: Mask, device: str) -> Case:
    n = 8

    def ours() -> Call:
        x = on_device(mask, device)
        return lambda: noise.polygonize(x, n, spatial_dims=2)

    def opencv() -> Call:
        import cv2

        def one(m: Mask) -> Mask:
            out = np.zeros_like(m)
            found, _ = cv2.findContours(m, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            for contour in found:
                steps = np.linalg.norm(np.diff(contour[:, 0], axis=0, append=contour[:1, 0]), axis=1)
                length = np.cumsum(steps)
                at = np.searchsorted(length, np.arange(n) * length[-1] / n, side="right")
                cv2.fillPoly(out, [contour[np.minimum(at, len(contour) - 1)]], 1)
            return out

        return each(one, mask)

    # OpenCV starts elsewhere on some contours: its time is shown and its answer not judged.
    contenders = [Contender(OURS, ours, _differing), Contender("OpenCV", opencv, None)]
    return _case(
        f"polygons of {n} vertices",
        mask,
        device,
        contenders,
        2,
        partial(noise.polygonize, mask, n, spatial_dims=2),
    )
