"""Simulated annotation noise: what a hurried, cautious or careless rater does to a mask.

masks: (..., *S), nonzero = object; torch, NumPy, CuPy or DLPack; the last `spatial_dims` axes (default: all) are
space, those before them a batch of items. Results are of the same kind, dtype and shape, on the same device, with
values 0 and 1; no input is written. Label maps of several classes are refused with a ValueError, except by `shift`
and `elastic_deform`, which move any values; `each_label` applies the others to one class after the other.

seed: an integer, a numpy or torch Generator (which gives one integer), or one integer for each item. Item i of an
integer seed has a random stream of its own, (seed, i): the same seed gives the same bits on the CPU and on CUDA,
whatever the threads, and an item's noise does not depend on how many follow it; with one integer for each item (a
case's number, say) it does not depend on their order either.

Operators by name, with their parameters: `Noise("shift", offset=5)`; `mixture` and `calibrate` work with those.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _arrays, _core
from .distance import _plain, _spacings, distance_transform_edt, sampled_distance, signed_distance_map

Pair = tuple[float, float]
Array = np.ndarray[Any, Any]


# ---- growing and shrinking ------------------------------------------------------------------------


def dilate(
    mask: Any,
    radius: float | Sequence[float],
    spacing: float | Sequence[float] | None = None,
    *,
    spatial_dims: int | None = None,
) -> Any:
    """The mask grown by a Euclidean disk (ball): 1 where the distance to the nearest object pixel is <= radius.

    radius: one for all, or one for each mask of a one-dimensional batch, in pixels, or in the unit of `spacing`
    (one for each spatial axis). An empty mask stays empty. Raises ValueError for a negative or non-finite radius.

    Extra memory: 1 byte per pixel of uint8 masks; 6 where a distance transform is quicker, as in 3D from radius 18 on.
    """
    batch = _batch(mask, spatial_dims, "mask")
    return _result(batch, _grown(batch, _object(batch), radius, spacing))


def erode(
    mask: Any,
    radius: float | Sequence[float],
    spacing: float | Sequence[float] | None = None,
    *,
    spatial_dims: int | None = None,
) -> Any:
    """The mask shrunk by a disk (ball): 1 where the distance to the nearest background pixel is > radius.

    The dual of `dilate`: the background is dilated. The image's edge is no background, so a full mask stays full.

    Extra memory: 1 byte per pixel of uint8 masks; 6 where a distance transform is quicker, as in 3D from radius 18 on.
    """
    batch = _batch(mask, spatial_dims, "mask")
    return _result(batch, _grown(batch, _object(batch), radius, spacing, erode=True))


def _grown(batch: _Batch, inside: Any, radius: Any, spacing: Any, erode: bool = False) -> Any:
    """bool: `inside` (bool, contiguous) dilated or eroded. On the CPU by joining rows of bits where few rows lie within
    the radius, otherwise by comparing distances: the same bits either way."""
    radii = _radii(radius, batch)
    sizes = _spacings(spacing, batch.dims, (batch.size,))
    if batch.space.device < 0 and batch.size and len(sizes) == 1:
        lead = (1,) * (3 - batch.dims)
        shape = (batch.size, *lead, *batch.spatial)
        most = np.finfo(np.float32).max
        each = np.minimum(np.atleast_1d(np.asarray(radius, np.float64)), most).astype(np.float32)
        given = (
            batch.space.view(inside.reshape(shape)),
            _arrays.of(radius=each).view(each),
            (*lead, *sizes[0])[:3],
        )
        size = _core.dilate_workspace(*given, batch.space.exec)
        if size:
            out = batch.space.empty((batch.size, *batch.spatial), "bool")
            memory = batch.space.empty((size // 8 + 1,), "float64")
            work = batch.space.view(memory)[0]
            _core.dilate(*given, erode, batch.space.view(out.reshape(shape)), work, batch.space.exec)
            return out
    if erode:
        return distance_transform_edt(inside, spacing, spatial_dims=batch.dims) > radii
    return distance_transform_edt(inside == 0, spacing, spatial_dims=batch.dims) <= radii


def erode_or_dilate(
    masks: Any,
    radius: float | Pair,
    spacing: float | Sequence[float] | None = None,
    *,
    dilation: float = 0.5,
    seed: Any,
    spatial_dims: int | None = None,
) -> Any:
    """Each mask dilated with probability `dilation`, otherwise eroded, by a radius or one drawn from (low, high).

    Extra memory: 7 bytes per pixel of uint8 masks.
    """
    low, high = _range("radius", radius)
    _probability("dilation", dilation)
    batch = _batch(masks, spatial_dims)
    signed = []
    for random in _generators(seed, batch.size):
        grow, r = random.random() < dilation, low + (high - low) * random.random()
        signed.append(r if grow else -r)
    return _result(batch, _offset(batch, signed, spacing))


def rater_bias(
    masks: Any,
    bias: Sequence[float],
    spread: float = 0.0,
    spacing: float | Sequence[float] | None = None,
    *,
    seed: Any,
    spatial_dims: int | None = None,
) -> Any:
    """What raters with habits draw: rater k over- (bias > 0) or under-segments (< 0) by bias[k] in every image.

    bias: (K,) in pixels or in the unit of spacing; to each item's a normal number times `spread` is added. Returns
    (..., K, *S). One distance transform serves all raters.

    Extra memory: 10 bytes per pixel of uint8 masks and two raters.
    """
    biases = np.atleast_1d(np.asarray(bias, np.float64))
    if biases.ndim != 1 or not len(biases) or not np.isfinite(biases).all():
        raise ValueError(f"bias must be one finite number for each rater, got {bias!r}")
    if not 0 <= spread < math.inf:
        raise ValueError(f"spread must be finite and not negative, got {spread}")
    batch = _batch(masks, spatial_dims)
    signed = [
        biases + spread * random.standard_normal(len(biases)) for random in _generators(seed, batch.size)
    ]
    drawn = _offset(batch, np.reshape(signed, (batch.size, len(biases))), spacing)
    return _result(batch, drawn, (len(biases),))


def _offset(batch: _Batch, radii: Any, spacing: Any) -> Any:
    """Items dilated by radii >= 0 and eroded by -radii < 0. radii: (B,) or (B, K), for a result (B, K, *S)."""
    distance = signed_distance_map(_object(batch), spacing, spatial_dims=batch.dims, convention="two_sided")
    r = np.asarray(radii, np.float32)
    if r.ndim == 2:
        distance = distance.reshape((batch.size, 1, *batch.spatial))
    limit = _device(batch, r.reshape((*r.shape, *(1,) * batch.dims)))
    return ((distance <= limit) & (limit >= 0)) | ((distance < limit) & (limit < 0))


# ---- moving ---------------------------------------------------------------------------------------


def shift(masks: Any, offset: int | Sequence[int], *, spatial_dims: int | None = None) -> Any:
    """Values moved by whole pixels, zeros where none come from.

    offset: one integer for each spatial axis, positive towards larger indices; a single one moves along the last
    axis, to the right. Any dtype and values.

    Extra memory: 1 byte per pixel of uint8 masks, the result's.
    """
    batch = _batch(masks, spatial_dims)
    steps: list[Any] = [0] * (batch.dims - 1) + [offset]
    if isinstance(offset, (tuple, list, np.ndarray)):
        steps = list(offset)
    if len(steps) != batch.dims or any(int(s) != s for s in steps):
        raise ValueError(f"offset must be one integer, or one for each of {batch.dims} axes, got {offset!r}")
    out = _library(batch).zeros_like(batch.items)
    to, source = [slice(None)], [slice(None)]
    for step, n in zip([int(s) for s in steps], batch.spatial, strict=True):
        to.append(slice(max(step, 0), max(n + min(step, 0), 0)))
        source.append(slice(max(-step, 0), max(n - max(step, 0), 0)))
    out[tuple(to)] = batch.items[tuple(source)]
    return _restore(batch, out)


def elastic_deform(
    masks: Any,
    sigma: float = 5.0,
    points: int | Sequence[int] = 3,
    order: int = 0,
    *,
    rotation: float = 0.0,
    translation: float = 0.0,
    scaling: float = 0.0,
    fill: float = 0.0,
    seed: Any,
    spatial_dims: int | None = None,
) -> Any:
    """Random displacements at a coarse grid, interpolated by cubic B-splines, as elasticdeform's deform_random_grid.

    sigma: standard deviation of the displacements in pixels (elasticdeform's default, 25, is far too much for small
    images). points: of the grid, for each axis or one number, 2 to 64. order: 0 takes the nearest pixel (any dtype,
    any labels), 1 interpolates linearly (a soft result: float32, or float64 of float64). In the same resampling:
    rotation by up to +-`rotation` degrees about the centre (3D: about each axis), translation by up to
    +-`translation` pixels along each axis, scaling by a factor from 1 - `scaling` to 1 + `scaling`, all uniform.
    fill: what lies outside the image.

    Extra memory: 1 byte per pixel of uint8 masks, the result's.
    """
    for name, value in (("sigma", sigma), ("rotation", rotation), ("translation", translation)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if not 0 <= scaling < 1:
        raise ValueError(f"scaling must be from 0 to below 1, got {scaling}")
    batch = _batch(masks, spatial_dims)
    dims = batch.dims
    grid = (points,) * dims if isinstance(points, (int, np.integer)) else tuple(points)
    if len(grid) != dims or not all(2 <= p <= 64 for p in grid):
        raise ValueError(f"points must be 2 to 64, one number or one for each of {dims} axes, got {points!r}")
    displacement = np.zeros((batch.size, dims, *grid))
    affine = np.zeros((batch.size, dims, dims + 1))
    centre = (np.array(batch.spatial) - 1) / 2
    for i, random in enumerate(_generators(seed, batch.size)):
        displacement[i] = sigma * random.standard_normal((dims, *grid))
        turn = np.eye(dims)
        for a, b in [(0, 1), (0, 2), (1, 2)][: dims * (dims - 1) // 2]:
            angle = np.deg2rad(rotation * random.uniform(-1, 1))
            one = np.eye(dims)
            one[a, a] = one[b, b] = np.cos(angle)
            one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
            turn = turn @ one
        turn /= 1 + scaling * random.uniform(-1, 1)
        move = translation * random.uniform(-1, 1, dims)
        affine[i, :, :dims], affine[i, :, dims] = turn, centre - turn @ (centre + move)
    return deform(masks, displacement, order, affine=affine, fill=fill, spatial_dims=dims)


def deform(
    masks: Any,
    displacement: Array,
    order: int = 0,
    *,
    affine: Array | None = None,
    fill: float = 0.0,
    spatial_dims: int | None = None,
) -> Any:
    """out(x) = masks(affine (x, 1) + u(x)), where the cubic B-spline u takes the displacements at the grid's points.

    The points span the image from corner to corner, and the spline is mirrored there, as in elasticdeform's
    deform_grid; what lies outside the image is `fill`, of a pixel partly outside that part (SciPy's mode
    "grid-constant"). displacement: NumPy (dims, *points), or (B, dims, *points), in pixels. affine: NumPy
    (dims, dims + 1) or (B, dims, dims + 1). order, fill: see elastic_deform.

    Extra memory: 1 byte per pixel of uint8 masks, the result's.
    """
    if order not in (0, 1):
        raise ValueError(f"order must be 0 (nearest) or 1 (linear), got {order!r}")
    batch = _batch(masks, spatial_dims)
    dims, count, lead = batch.dims, batch.size, (1,) * (3 - batch.dims)
    grid = np.asarray(displacement, np.float64)
    grid = grid[None] if grid.ndim == dims + 1 else grid
    if (
        grid.ndim != dims + 2
        or grid.shape[0] not in (1, count)
        or grid.shape[1] != dims
        or not all(2 <= p <= 64 for p in grid.shape[2:])
    ):
        raise ValueError(
            f"displacement must be ({dims}, *points), or that for each of {count} items, with 2 to 64 points "
            f"along each axis, got {np.shape(displacement)}"
        )
    matrix: Array = np.asarray(np.eye(dims, dims + 1) if affine is None else affine, np.float64)
    matrix = matrix[None] if matrix.ndim == 2 else matrix
    if matrix.shape[1:] != (dims, dims + 1) or matrix.shape[0] not in (1, count):
        raise ValueError(f"affine must be ({dims}, {dims + 1}), or that for each item, got {matrix.shape}")
    if not (np.isfinite(grid).all() and np.isfinite(matrix).all()):
        raise ValueError("displacement and affine must be finite")
    coefficients = np.zeros((count, 3, *lead, *grid.shape[2:]))
    coefficients[:, 3 - dims :] = _spline_coefficients(grid).reshape((-1, dims, *lead, *grid.shape[2:]))
    full = np.tile(np.eye(3, 4), (count, 1, 1))
    full[:, 3 - dims :, 3 - dims :] = matrix
    items = _plain(batch.items, True)
    if order == 1 and batch.space.dtype(items) not in ("float32", "float64"):
        items = _cast(batch, items, "float32")
    image = _contiguous(items).reshape((count, *lead, *batch.spatial))
    space = batch.space
    out = space.empty(tuple(image.shape), space.dtype(image))
    if count:
        given = (image, _device(batch, coefficients), _device(batch, full), order == 1, float(fill), out)
        _run(_core.deform, space, *given)
    if items is not batch.items and order == 0:  # another integer dtype than the kernels'
        dtype = batch.items.dtype
        out = out.to(dtype) if hasattr(out, "to") else out.astype(dtype)
    return _restore(batch, out.reshape((count, *batch.spatial)))


def _spline_coefficients(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the cubic B-splines through values (B, dims, *points), mirrored at the ends."""
    for axis in range(2, values.ndim):
        n = values.shape[axis]
        matrix = (np.diag(np.full(n, 4.0)) + np.eye(n, k=1) + np.eye(n, k=-1)) / 6
        matrix[0, 1] = matrix[-1, -2] = 2 / 6
        values = np.moveaxis(np.moveaxis(values, axis, -1) @ np.linalg.inv(matrix).T, -1, axis)
    return values


# ---- mistakes -------------------------------------------------------------------------------------


def flip_square(masks: Any, size: int | Sequence[int], *, seed: Any, spatial_dims: int | None = None) -> Any:
    """The labels reversed in a square (cube) at a random place inside each image: UMA-Net's "label reversal".

    size: its side in pixels, or one for each axis; at most the image's.

    Extra memory: 1 byte per pixel of uint8 masks.
    """
    batch = _batch(masks, spatial_dims)
    sides = [size] * batch.dims if isinstance(size, (int, float, np.number)) else list(size)
    if len(sides) != batch.dims or not all(s >= 0 and int(s) == s for s in sides):
        raise ValueError(f"size must be an integer >= 0, or one for each of {batch.dims} axes, got {size!r}")
    out = _object(batch) != 0
    for i, random in enumerate(_generators(seed, batch.size)):
        square: list[Any] = [i]
        for side, n in zip(sides, batch.spatial, strict=True):
            side = min(int(side), n)
            low = int(random.random() * (n - side + 1))
            square.append(slice(low, low + side))
        out[tuple(square)] ^= True
    return _result(batch, out)


def erase_component(
    masks: Any,
    probability: float = 1.0,
    *,
    which: str = "random",
    connectivity: str = "full",
    seed: Any,
    spatial_dims: int | None = None,
) -> Any:
    """One connected component of each mask overlooked, with a probability; a mask without any stays as it is.

    which: "random" (each as likely), "largest" or "smallest" (of equals the first). connectivity: "full" (8 or 26
    neighbours) or "face" (4 or 6).

    Extra memory: at most 9 bytes per pixel of uint8 masks.
    """
    _probability("probability", probability)
    if which not in ("random", "largest", "smallest"):
        raise ValueError(f"which must be random, largest or smallest, got {which!r}")
    batch = _batch(masks, spatial_dims)
    found = _object(batch)
    labels = _components(batch, found, connectivity)
    roots = _roots(batch, labels)
    out = found != 0
    for i, random in enumerate(_generators(seed, batch.size)):
        hit, place = random.random() < probability, random.random()
        if not hit or not len(roots[i]):
            continue
        number = int(place * len(roots[i]))
        if which != "random":
            sizes = _sizes(batch, labels[i], roots[i])
            number = int(sizes.argmin() if which == "smallest" else sizes.argmax())
        out[i] &= labels[i] != int(roots[i][number]) + 1
    return _result(batch, out)


def connected_components(masks: Any, *, connectivity: str = "full", spatial_dims: int | None = None) -> Any:
    """int32 labels: 0 for background, else 1 + the index within the item of the component's first pixel.

    Not numbered in turn, so that no pass over the image is needed for it. connectivity: see erase_component.

    Extra memory: 4 bytes per pixel of uint8 masks.
    """
    batch = _batch(masks, spatial_dims)
    return _restore(batch, _components(batch, _object(batch, "masks", True), connectivity))


def polygonize(
    masks: Any,
    vertices: int,
    *,
    edges: str = "straight",
    components: str = "all",
    seed: Any = None,
    spatial_dims: int | None = None,
) -> Any:
    """Each component replaced by a polygon with `vertices` pixels of its outer contour, at equal arc length.

    vertices: 3 (the extreme) or more. edges: "straight", or "spline", the closed cubic spline through the vertices.
    components: "all", or "largest". The first vertex lies at the contour's first pixel in reading order, or with a
    seed at a random place. Pixels whose centre is inside or on the polygon are set, so holes are filled, and an
    object too small for a polygon keeps its vertices. In 3D slice by slice along the first spatial axis.

    Extra memory: 7 bytes per pixel of uint8 masks.
    """
    if not isinstance(vertices, (int, np.integer)) or vertices < 3:
        raise ValueError(f"vertices must be an integer of 3 or more, got {vertices!r}")
    if edges not in ("straight", "spline"):
        raise ValueError(f"edges must be straight or spline, got {edges!r}")
    if components not in ("all", "largest"):
        raise ValueError(f"components must be all or largest, got {components!r}")
    whole = _batch(masks, spatial_dims)
    if whole.dims == 1:
        raise ValueError("polygonize needs 2 or 3 spatial axes, got 1")
    slices = whole.spatial[0] if whole.dims == 3 else 1
    flat = _object(whole).reshape((whole.size * slices, *whole.spatial[-2:]))
    batch = whole._replace(items=flat, size=len(flat), dims=2, spatial=whole.spatial[-2:])
    phase = np.zeros((whole.size, slices))
    if seed is not None:
        for i, random in enumerate(_generators(seed, whole.size)):
            phase[i] = random.random(slices)
    points, first, owner = _vertices(batch, flat, int(vertices), phase.reshape(-1), components == "largest")
    space = batch.space
    out = space.empty(tuple(flat.shape), "uint8")
    out[...] = 0
    if len(owner):
        line = _spline(points) if edges == "spline" else points * 256
        memory = space.empty((_run(_core.fill_workspace, space, out) // 8 + 1,), "float64")
        given = (_device(batch, line.astype(np.int32)), _device(batch, first), out)
        _run(_core.fill_polygons, space, *given, space.view(memory)[0])
    return _result(whole, out.reshape((whole.size, *whole.spatial)) != 0)


def _vertices(
    batch: _Batch, found: Any, n: int, phase: NDArray[np.float64], largest: bool
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """(P, n, 2) rows and columns of the vertices, the (B + 1,) first polygon of each item, the (P,) items."""
    labels = _components(batch, found, "full")
    roots = _roots(batch, labels)
    if largest:
        roots = [
            r[[_sizes(batch, x, r).argmax()]] if len(r) else r for r, x in zip(roots, labels, strict=True)
        ]
    counts = [len(r) for r in roots]
    first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    owner = np.repeat(np.arange(batch.size), counts)
    if not len(owner):
        return np.zeros((0, n, 2), np.int32), first, owner
    starts = np.concatenate(roots) + owner * math.prod(batch.spatial)
    space = batch.space
    out = space.empty((len(owner), n, 2), "int32")
    given = (labels, _device(batch, starts.astype(np.int64)), _device(batch, phase[owner]))
    _run(_core.contour_vertices, space, *given, out)
    return _host(out), first, owner


def _spline(points: NDArray[np.int32], parts: int = 16) -> NDArray[np.int64]:
    """Closed cubic splines through points (P, n, 2), `parts` straight pieces for each edge, in 1/256 pixel."""
    n = points.shape[1]
    p = points.astype(np.float64)
    after = np.roll(p, -1, 1)
    # Second derivatives M of the periodic spline with unit steps: M[i-1] + 4 M[i] + M[i+1] = 6 p''[i].
    matrix = 4 * np.eye(n) + np.roll(np.eye(n), 1, 1) + np.roll(np.eye(n), -1, 1)
    bend = np.einsum("ij,pjk->pik", np.linalg.inv(matrix), 6 * (after - 2 * p + np.roll(p, 1, 1)))
    t = np.arange(parts).reshape(1, 1, -1, 1) / parts
    a, b, m, k = (x[:, :, None] for x in (p, after, bend, np.roll(bend, -1, 1)))
    curve = (1 - t) * a + t * b + (((1 - t) ** 3 - (1 - t)) * m + (t**3 - t) * k) / 6
    return np.rint(curve.reshape(len(p), n * parts, 2) * 256).astype(np.int64)


def distort_boundary(
    masks: Any,
    radius: int | tuple[int, int] = (6, 12),
    share: float = 0.1,
    *,
    seed: Any,
    spatial_dims: int | None = None,
) -> Any:
    """Disks (balls) around random contour pixels added, then others removed: PyMIC's "edge distortion" (JSRT).

    share: of the contour's pixels that become the centre of a disk to add, and the same for one to remove. radius: in
    pixels, one integer or (least, most), drawn for each disk. The contour is the object's pixels with a face
    neighbour in the background. All disks are made by one distance transform, whatever their number and size.

    Extra memory: at most 20 bytes per pixel of uint8 masks.
    """
    low, high = (round(r) for r in _range("radius", radius))
    _probability("share", share)
    batch = _batch(masks, spatial_dims)
    found = _object(batch)
    if not batch.size:
        return _result(batch, found)
    contour = distance_transform_edt(found, spatial_dims=batch.dims, squared=True) == 1
    keys = [int(random.integers(2**63)) for random in _generators(seed, batch.size)]
    out = found != 0
    for turn in (0, 1):
        chosen = contour & (_uniforms(batch, keys, 2 * turn) < share)
        r = (_uniforms(batch, keys, 2 * turn + 1) * (high - low + 1)) // 1 + low
        if low == high:  # takes less time than a transform of a function
            disks = _grown(batch, chosen, low, None)
        else:
            depth = _where(batch, chosen, -(r * r), math.inf)
            disks = sampled_distance(depth, spatial_dims=batch.dims) <= 0
        out = out & ~disks if turn else out | disks
    return _result(batch, out)


# ---- combinations ---------------------------------------------------------------------------------

OPERATORS: dict[str, Callable[..., Any]] = {
    "dilate": dilate,
    "erode": erode,
    "erode_or_dilate": erode_or_dilate,
    "elastic_deform": elastic_deform,
    "shift": shift,
    "flip_square": flip_square,
    "polygonize": polygonize,
    "erase_component": erase_component,
    "distort_boundary": distort_boundary,
}


def options_of(name: str) -> dict[str, Any]:
    """The parameters of an operator and their defaults (inspect.Parameter.empty where there is none)."""
    if name not in OPERATORS:
        raise ValueError(f"unknown noise {name!r}; choose from {', '.join(OPERATORS)}")
    parameters = list(inspect.signature(OPERATORS[name]).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.name not in ("seed", "spatial_dims")}


class Noise:
    """An operator with its parameters: Noise("dilate", radius=3)(masks, seed=0, spatial_dims=2)."""

    def __init__(self, name: str, **options: Any) -> None:
        known = options_of(name)
        for option in options:
            if option not in known:
                raise ValueError(f"{name} has no option {option!r}; it takes {', '.join(known)}")
        self.name, self.options = name, options
        self._seeded = "seed" in inspect.signature(OPERATORS[name]).parameters

    def __repr__(self) -> str:
        return f"Noise({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self.options.items())])})"

    def __call__(self, masks: Any, *, seed: Any = 0, spatial_dims: int | None = None) -> Any:
        more = {"seed": seed} if self._seeded else {}
        return OPERATORS[self.name](masks, **self.options, **more, spatial_dims=spatial_dims)


def mixture(
    masks: Any,
    noises: Sequence[Callable[..., Any] | None],
    probabilities: Sequence[float] | None = None,
    *,
    seed: Any,
    spatial_dims: int | None = None,
) -> Any:
    """Each item gets one of the noises, drawn with the probabilities (default: equal); None leaves it alone.

    noises: `Noise`, `Calibration` or anything called as noise(masks, seed=[...], spatial_dims=...). Probabilities may
    sum up to less than 1; the rest stays clean. Every result is in the masks' dtype.

    Extra memory: 2 bytes per pixel of uint8 masks, and the operator's own.
    """
    chances = (
        [1 / len(noises)] * len(noises) if probabilities is None and noises else list(probabilities or ())
    )
    if len(chances) != len(noises) or not noises:
        raise ValueError(f"probabilities must be one for each of {len(noises)} noises, got {len(chances)}")
    if not all(p >= 0 for p in chances) or sum(chances) > 1 + 1e-9:
        raise ValueError(f"probabilities must not be negative and sum up to at most 1, got {probabilities}")
    batch = _batch(masks, spatial_dims)
    bounds = np.cumsum(chances)
    random = _generators(seed, batch.size, _MIXTURE)
    kind = [
        int(np.searchsorted(bounds, r.random() * (1 if bounds[-1] <= 1 else bounds[-1]), "right"))
        for r in random
    ]
    seeds = [int(r.integers(2**63)) for r in random]
    out = batch.items.clone() if hasattr(batch.items, "clone") else batch.items.copy()
    for number, noise in enumerate(noises):
        items = [i for i, k in enumerate(kind) if k == number]
        if noise is None or not items:
            continue
        out[items] = noise(batch.items[items], seed=[seeds[i] for i in items], spatial_dims=batch.dims)
    return _restore(batch, out)


def each_label(
    noise: Callable[..., Any], labels: Any, *, seed: Any = 0, spatial_dims: int | None = None
) -> Any:
    """A label map after `noise` on one class after the other, all with the same seed.

    Where the results overlap the smaller label stays. labels: integers >= 0.

    Extra memory: 4 bytes per pixel of uint8 labels, most of it the operator's own.
    """
    batch = _batch(labels, spatial_dims, "labels")
    out = _library(batch).zeros_like(batch.items)
    for label in range(1, (int(batch.items.max()) if batch.size else 0) + 1):
        one = batch.items == label
        if bool(one.any()):
            out[(noise(one, seed=seed, spatial_dims=batch.dims) != 0) & (out == 0)] = label
    return _restore(batch, out)


class _Amount(NamedTuple):
    """How an operator's strength follows from a number: its bounds for an image's shape, and its options."""

    bounds: Callable[[Sequence[int]], Pair]
    options: Callable[[float], dict[str, Any]]


def _half(shape: Sequence[int]) -> Pair:
    return 0.0, max(shape) / 2


_RADIUS = _Amount(_half, lambda m: {"radius": m})
_AMOUNT = {
    "dilate": _RADIUS,
    "erode": _RADIUS,
    "erode_or_dilate": _RADIUS,
    "elastic_deform": _Amount(_half, lambda m: {"sigma": m}),
    "shift": _Amount(lambda shape: (0.0, float(shape[-1])), lambda m: {"offset": round(m)}),
    "flip_square": _Amount(lambda shape: (0.0, float(max(shape))), lambda m: {"size": round(m)}),
    "polygonize": _Amount(lambda shape: (0.0, 1.0), lambda m: {"vertices": round(64 * (3 / 64) ** m)}),
    "erase_component": _Amount(lambda shape: (0.0, 1.0), lambda m: {"probability": m}),
    "distort_boundary": _Amount(_half, lambda m: {"radius": round(m)}),
}


@dataclass(frozen=True)
class Calibration:
    """Noise of a strength that was found by `calibrate`; called as a `Noise` is.

    Items have the magnitude `low`, and with probability `share` the magnitude `high`, next to it, where the mean Dice
    jumps from above the target to below it. dice: the mean on the masks of the search.
    """

    noise: Callable[..., Any] = field(repr=False)
    name: str
    low: float
    high: float
    share: float
    dice: float

    def __call__(self, masks: Any, *, seed: Any = 0, spatial_dims: int | None = None) -> Any:
        batch = _batch(masks, spatial_dims)
        weak = self.noise(masks, self.low, seed=seed, spatial_dims=batch.dims)
        if self.share <= 0:
            return weak
        strong = self.noise(masks, self.high, seed=seed, spatial_dims=batch.dims)
        more = np.array([u < self.share for u in _lots(seed, batch.size)], bool)
        shape = (*batch.shape[: len(batch.shape) - batch.dims], *(1,) * batch.dims)
        chosen = _device(batch, more.reshape(shape))
        return batch.given.back(_library(batch).where(chosen, strong, weak))


def calibrate(
    noise: str | Noise | Callable[..., Any],
    masks: Any,
    target_dice: float,
    *,
    bounds: Pair | None = None,
    tolerance: float = 0.002,
    unreachable: str = "error",
    seed: Any = 0,
    spatial_dims: int | None = None,
) -> Calibration:
    """The strength of a noise at which the mean Dice of noisy against clean masks is target_dice, by bisection.

    noise: an operator's name, a `Noise` with its other parameters, or a function
    noise(masks, magnitude, seed=..., spatial_dims=...) that keeps the masks' shape. The magnitude of an operator is
    its radius (dilate, erode, erode_or_dilate, distort_boundary), sigma (elastic_deform), offset (shift), size
    (flip_square), probability (erase_component), and for polygonize 0 (64 vertices) to 1 (3). bounds: of the
    magnitude; needed for a function. masks: (B, *S), or spatial_dims says; or a list of masks (*S) of any sizes, with
    one seed for each. The empty ones have no Dice and do not count. Where the mean Dice jumps over the target (whole
    pixels), a share of the items takes the next magnitude. unreachable: "error", or "closest": take the bound that
    comes nearest; `dice` says what it gives.

    Extra memory: 3 bytes per pixel of uint8 masks, most of it the operator's own.

    >>> calibrate("dilate", masks, 0.8)(masks, seed=1)  # UMA-Net's low noise; 0.7 is its high noise
    """
    if not 0 < target_dice < 1:
        raise ValueError(f"target_dice must be between 0 and 1, got {target_dice}")
    if unreachable not in ("error", "closest"):
        raise ValueError(f"unreachable must be error or closest, got {unreachable!r}")
    if isinstance(masks, (list, tuple)):
        _arrays.of(**{f"masks[{i}]": _plain(m, False) for i, m in enumerate(masks)})
        batches = [_batch(m[None], len(m.shape)) for m in masks]
        seeds: list[Any] = [[r] for r in seed] if isinstance(seed, (list, tuple, np.ndarray)) else []
        if len(seeds) != len(masks) or not masks:
            raise ValueError(f"a list of {len(masks)} masks needs as many seeds, at least one")
    else:
        _arrays.of(masks=_plain(masks, False))
        batches = [_batch(masks, len(masks.shape) - 1 if spatial_dims is None else spatial_dims)]
        seeds = [seed if isinstance(seed, (list, tuple, np.ndarray)) else _one_seed(seed)]
    longest = [max(sides) for sides in zip(*(b.spatial for b in batches), strict=True)]
    name, apply, default = _strength(noise, longest)
    if bounds is None:
        if default is None:
            raise ValueError("bounds are needed for a function: the least and the largest magnitude")
        bounds = default
    low, high = map(float, bounds)
    if not low < high:
        raise ValueError(f"bounds must be rising, got {bounds}")
    keep = np.concatenate(
        [_host((b.items != 0).reshape((b.size, -1)).any(1)) for b in batches if b.size] or [[]]
    )
    if not keep.any():
        raise ValueError("masks hold no object: there is no Dice to reach")

    def dice(magnitude: float) -> Any:
        scores = []
        for b, s in zip(batches, seeds, strict=True):
            noisy = apply(b.items, magnitude, seed=s, spatial_dims=b.dims)
            scores.append(dice_of(noisy, b.items, spatial_dims=b.dims))
        return np.concatenate(scores)[keep]

    weak, strong = dice(low), dice(high)
    if not strong.mean() <= target_dice <= weak.mean():
        if unreachable == "error":
            raise ValueError(
                f"{name} gives a mean Dice from {weak.mean():.3f} (magnitude {low:g}) to {strong.mean():.3f} "
                f"({high:g}); target_dice {target_dice:g} is outside"
            )
        best, answer = min(((low, weak), (high, strong)), key=lambda x: abs(x[1].mean() - target_dice))
        return Calibration(apply, name, best, best, 0.0, float(answer.mean()))
    width = high - low
    while high - low > 1e-4 * width:
        middle = (low + high) / 2
        answer = dice(middle)
        if abs(answer.mean() - target_dice) <= tolerance:
            return Calibration(apply, name, middle, middle, 0.0, float(answer.mean()))
        if answer.mean() > target_dice:
            low, weak = middle, answer
        else:
            high, strong = middle, answer
    lots = np.concatenate([_lots(s, b.size) for b, s in zip(batches, seeds, strict=True)])[keep]
    order = np.argsort(lots, kind="stable")
    means = (weak.sum() + np.concatenate([[0.0], np.cumsum((strong - weak)[order])])) / len(weak)
    k = int(np.abs(means - target_dice).argmin())
    edges = np.concatenate([[0.0], lots[order], [1.0]])
    return Calibration(
        apply, name, low, high, float((edges[k] + edges[k + 1]) / 2) if k else 0.0, float(means[k])
    )


def _strength(noise: Any, shape: Sequence[int]) -> tuple[str, Callable[..., Any], Pair | None]:
    """Name, noise(masks, magnitude, ...) and bounds of what calibrate takes."""
    name, given = (noise.name, noise.options) if isinstance(noise, Noise) else (noise, {})
    if not isinstance(name, str):
        if not callable(noise):
            raise TypeError(f"noise must be a name, a Noise or a function, not {type(noise).__name__}")
        return getattr(noise, "__name__", type(noise).__name__), noise, None
    options_of(name)
    amount = _AMOUNT[name]
    return name, partial(_of_strength, name, given), amount.bounds(shape)


def _of_strength(
    name: str,
    options: Mapping[str, Any],
    masks: Any,
    magnitude: float,
    *,
    seed: Any,
    spatial_dims: int | None,
) -> Any:
    return Noise(name, **{**options, **_AMOUNT[name].options(magnitude)})(
        masks, seed=seed, spatial_dims=spatial_dims
    )


def dice_of(noisy: Any, clean: Any, *, spatial_dims: int | None = None) -> NDArray[np.float64]:
    """Dice of each noisy mask against the clean one, (B,); 1 where both are empty. Nonzero is object.

    Extra memory: 2 bytes per pixel.
    """
    from .metrics import overlap_metrics

    _arrays.given(noisy=_plain(noisy, False), clean=_plain(clean, False))
    if tuple(noisy.shape) != tuple(clean.shape):
        raise ValueError(
            f"noisy has shape {tuple(noisy.shape)} and clean {tuple(clean.shape)}; they must be the same"
        )
    batch, other = _batch(clean, spatial_dims, "clean"), _batch(noisy, spatial_dims, "noisy")
    if not batch.size:
        return np.zeros(0)
    pair = (other.items != 0, batch.items != 0)
    scores = overlap_metrics(*pair, spatial_dims=batch.dims).dice
    return np.asarray(_host(scores), np.float64).reshape(-1)


class Raters(NamedTuple):
    """annotations: (..., 5, *S), in the order of the calibrations, which say each rater's noise and mean Dice."""

    annotations: Any
    calibrations: tuple[Calibration, ...]


RATERS: tuple[Noise, ...] = (
    Noise("erode_or_dilate"),
    Noise("shift"),
    Noise("flip_square"),
    Noise("polygonize", edges="spline"),
    Noise("erase_component"),
)


def simulate_raters(
    masks: Any,
    target_dice: float = 0.8,
    *,
    noises: Sequence[Noise | str] = RATERS,
    seed: Any,
    spatial_dims: int | None = None,
) -> Raters:
    """UMA-Net's five simulated annotations of each image, one from each operator.

    Erosion or dilation, constant shift to the right, label reversal in a random square, polygons joined by a cubic
    spline, and an erased component, each with the strength that gives the mean Dice target_dice (0.8: the paper's
    low noise, 0.7: high noise; it states no other parameter). An operator that cannot come as far (a spline through
    three points of a round object) goes as far as it can: see `calibrations[k].dice`. masks: (B, *S).

    Extra memory: 3 bytes per pixel of uint8 masks and one rater, and the operator's own.
    """
    _arrays.of(masks=_plain(masks, False))
    batch = _batch(masks, len(masks.shape) - 1 if spatial_dims is None else spatial_dims)
    random = _generators(seed, batch.size, _RATERS)
    drawn, calibrations = [], []
    for noise in noises:
        seeds = [int(r.integers(2**63)) for r in random]
        found = calibrate(
            noise, batch.items, target_dice, seed=seeds, spatial_dims=batch.dims, unreachable="closest"
        )
        calibrations.append(found)
        drawn.append(found(batch.items, seed=seeds, spatial_dims=batch.dims))
    stacked = _library(batch).stack(drawn, 1)
    return Raters(_restore(batch, stacked, (len(drawn),)), tuple(calibrations))


# ---- training noise -------------------------------------------------------------------------------


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

    Extra memory: 1 byte per pixel of uint8 masks.
    """
    _arrays.of(masks=_plain(masks, False))
    if not masks.shape or not masks.shape[0]:
        raise ValueError(f"masks must hold at least one mask, got shape {tuple(masks.shape)}")
    radii = corruption_radii(masks.shape[0], rate, max_radius, seed)
    dims = len(masks.shape) - 1 if spatial_dims is None else spatial_dims
    return dilate(masks, [float(r) for r in radii], spatial_dims=dims), radii


def dilate_labels(labels: Any, radius: float) -> Any:
    """`dilate` for a label map (*S): each class grows over background only, smaller labels first.

    Extra memory: 4 bytes per pixel of uint8 labels.
    """
    batch = _batch(labels, None, "labels")
    if radius == 0:
        return labels
    batch = _batch(labels, len(labels.shape), "labels")
    items = batch.items[0]
    grown = items * 1  # a copy, whatever the array's kind
    for label in range(1, int(items.max()) + 1):
        new = (dilate(items == label, radius) != 0) & (grown == 0)
        grown[new] = label
    return _restore(batch, grown)


# ---- arrays and random streams --------------------------------------------------------------------


class _Batch(NamedTuple):
    items: Any  # (B, *S)
    size: int  # B
    spatial: tuple[int, ...]
    dims: int
    shape: tuple[int, ...]  # as given
    space: _arrays.Namespace  # of the items
    given: _arrays.Namespace  # of the caller's array
    dtype: Any  # of the caller's array


def _batch(masks: Any, spatial_dims: int | None, name: str = "masks") -> _Batch:
    given = _arrays.of(**{name: _plain(masks, False)})
    if isinstance(given, _arrays.Dlpack):
        masks = given.as_numpy(masks)
    space = _arrays.of(**{name: _plain(masks, False)})
    shape = tuple(masks.shape)
    dims = len(shape) if spatial_dims is None else spatial_dims
    if not 1 <= dims <= len(shape):
        raise ValueError(f"spatial_dims must be 1 to {len(shape)} for {name} of shape {shape}, got {dims}")
    if dims > 3:
        raise ValueError(
            f"{name} has shape {shape}: pass spatial_dims (at most 3), the axes before them are a batch"
        )
    spatial = shape[len(shape) - dims :]
    if 0 in spatial:
        raise ValueError(f"{name} has a spatial axis of size 0: shape {shape}")
    count = math.prod(shape[: len(shape) - dims])
    dtype = masks.dtype
    if str(dtype) in ("torch.uint16", "torch.uint32", "torch.uint64"):  # of which torch can do little
        masks = _plain(masks, True)
    return _Batch(masks.reshape((count, *spatial)), count, spatial, dims, shape, space, given, dtype)


def _object(batch: _Batch, name: str = "masks", any_labels: bool = False) -> Any:
    """Nonzero as bool, contiguous; ValueError for more than one label."""
    items = batch.items
    dtype = str(items.dtype).removeprefix("torch.")
    if dtype.startswith(("float", "bfloat", "complex")):
        raise TypeError(f"{name} has dtype {dtype}; pass labels: bool or an integer dtype")
    if dtype == "bool":
        return _contiguous(items)
    dense = items.is_contiguous() if hasattr(items, "is_contiguous") else items.flags.c_contiguous
    if dtype == "uint8" and batch.size and dense and items.max() <= 1:  # with memory of its own, so it ends
        return _as(batch, items, "bool")
    inside = items != 0
    if not any_labels and batch.size:
        items = _plain(items, False)
        top = items.max()
        top = top if top != 0 else items.min()
        if bool((inside & (items != top)).any()):
            raise ValueError(
                f"{name} holds more labels than 0 and {int(top)}; use noise.each_label, or pass one class"
            )
    return _contiguous(inside)


def _restore(batch: _Batch, out: Any, more: tuple[int, ...] = ()) -> Any:
    """(B, *more, *S) as the caller's kind of array and batch axes."""
    lead = batch.shape[: len(batch.shape) - batch.dims]
    if out.dtype == batch.items.dtype != batch.dtype:
        out = out.to(batch.dtype)
    return batch.given.back(out.reshape((*lead, *more, *batch.spatial)))


def _result(batch: _Batch, inside: Any, more: tuple[int, ...] = ()) -> Any:
    """_restore of a bool array, in the masks' dtype."""
    dtype = batch.dtype
    if str(dtype).removeprefix("torch.") == "uint8":
        return _restore(batch, _as(batch, inside, "uint8"), more)
    return _restore(batch, inside.astype(dtype) if hasattr(inside, "astype") else inside.to(dtype), more)


def _as(batch: _Batch, x: Any, dtype: str) -> Any:
    """x of bool or of uint8 0 and 1 as the other, in the same memory."""
    name = "bool_" if dtype == "bool" and batch.space.name != "torch" else dtype
    return x.view(getattr(_library(batch), name))


def _contiguous(x: Any) -> Any:
    if hasattr(x, "contiguous"):
        return x.contiguous()
    return x if x.flags.c_contiguous else x.copy()


def _cast(batch: _Batch, x: Any, dtype: str) -> Any:
    return x.to(getattr(_library(batch), dtype)) if hasattr(x, "to") else x.astype(dtype)


def _library(batch: _Batch) -> Any:
    """numpy, torch or cupy: the functions of that name that are alike in all."""
    import importlib

    return importlib.import_module(batch.space.name)


def _device(batch: _Batch, x: Array) -> Any:
    """A NumPy array as one of the batch's kind, on its device."""
    if batch.space.name == "numpy":
        return np.ascontiguousarray(x)
    if batch.space.name == "torch":
        return _library(batch).from_numpy(np.ascontiguousarray(x)).to(batch.items.device)
    with batch.items.device:
        return _library(batch).asarray(np.ascontiguousarray(x))


def _host(x: Any) -> Any:
    if hasattr(x, "detach"):
        return x.detach().cpu().numpy()
    return x.get() if hasattr(x, "get") else np.asarray(x)


def _run(function: Callable[..., Any], space: _arrays.Namespace, *arguments: Any) -> Any:
    """A function of the compiled module, with the views of the arrays, which live as long as the call."""
    return function(*(space.view(a) if hasattr(a, "shape") else a for a in arguments), space.exec)


def _where(batch: _Batch, condition: Any, yes: Any, no: float) -> Any:
    out = yes * 1
    out[~condition] = no
    return out


def _radii(radius: float | Sequence[float], batch: _Batch) -> Any:
    """One radius, or (B, 1, ...) of them on the device, to compare float32 distances with."""
    radii = np.atleast_1d(np.asarray(radius, dtype=np.float64))
    if radii.ndim != 1 or not len(radii) or not all(0 <= r < float("inf") for r in radii):
        raise ValueError(f"radius must be finite and not negative, got {radius}")
    if len(radii) == 1:
        return float(radii[0])
    if len(batch.shape) != batch.dims + 1 or batch.size != len(radii):
        raise ValueError(
            f"radius has {len(radii)} values for a mask of shape {batch.shape} with {batch.dims} spatial axes"
        )
    return _device(batch, radii.astype(np.float32).reshape((-1, *(1,) * batch.dims)))


def _range(name: str, value: Any) -> Pair:
    low, high = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    try:
        low, high = float(low), float(high)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or (low, high), got {value!r}") from None
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"{name} must be finite, not negative and rising, got {value!r}")
    return low, high


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")


def _components(batch: _Batch, found: Any, connectivity: str) -> Any:
    if connectivity not in ("full", "face"):
        raise ValueError(f"connectivity must be full or face, got {connectivity!r}")
    space = batch.space
    labels = space.empty((batch.size, *batch.spatial), "int32")
    if batch.size:
        shape = (batch.size, *(1,) * (3 - batch.dims), *batch.spatial)
        given = (found.reshape(shape), connectivity == "full", labels.reshape(shape))
        _run(_core.connected_components, space, *given)
    return labels


def _roots(batch: _Batch, labels: Any) -> list[NDArray[np.int64]]:
    """Of each item the index of every component's first pixel, rising."""
    size = math.prod(batch.spatial)
    flat = labels.reshape((batch.size, size))
    found = _host(_library(batch).argwhere(flat == _device(batch, np.arange(1, size + 1, dtype=np.int32))))
    return np.split(found[:, 1], np.searchsorted(found[:, 0], np.arange(1, batch.size)))


def _sizes(batch: _Batch, labels: Any, roots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pixels of each component of one item."""
    counts: NDArray[np.int64] = _host(_library(batch).bincount(labels.reshape(-1)))
    return counts[roots + 1]


def _uniforms(batch: _Batch, keys: Sequence[int], stream: int) -> Any:
    """(B, *S) float32 in [0, 1), the same bits everywhere."""
    space = batch.space
    out = space.empty((batch.size, math.prod(batch.spatial)), "float32")
    _run(_core.uniforms, space, _device(batch, np.array(keys, np.int64)), stream, out)
    return out.reshape((batch.size, *batch.spatial))


_MIXTURE, _LOTS, _RATERS = 1, 2, 3  # streams beside the operators' own


def _generators(seed: Any, count: int, purpose: int = 0) -> list[np.random.Generator]:
    """One random stream for each item."""
    if isinstance(seed, (list, tuple, np.ndarray)):
        if len(seed) != count:
            raise ValueError(f"seed has {len(seed)} values for {count} items")
        keys = [(_integer(s), 0) for s in seed]
    else:
        first = _one_seed(seed)
        keys = [(first, i) for i in range(count)]
    return [
        np.random.Generator(np.random.Philox(key=np.array([s, i + (purpose << 48)], np.uint64)))
        for s, i in keys
    ]


def _one_seed(seed: Any) -> int:
    """An integer, or the next one of a generator."""
    if isinstance(seed, np.random.Generator):
        seed = seed.integers(2**63)
    elif hasattr(seed, "initial_seed") and hasattr(seed, "device"):  # torch.Generator
        import torch

        seed = torch.randint(2**63 - 1, (), generator=seed, device=seed.device).item()
    return _integer(seed)


def _integer(seed: Any) -> int:
    if isinstance(seed, (bool, np.bool_)) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise TypeError(
            f"seed must be an integer from 0 to 2^64 - 1, a Generator, or one integer for each item, got {seed!r}"
        )
    return int(seed)


def _lots(seed: Any, count: int) -> NDArray[np.float64]:
    return np.array([random.random() for random in _generators(seed, count, _LOTS)])
