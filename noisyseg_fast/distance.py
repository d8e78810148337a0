"""Exact Euclidean distance transforms and signed distance maps, batched, on the array's own device.

mask: (..., *S), bool or any integer dtype, any strides; whatever is not 0 is object. The last `spatial_dims`
axes (1 to 3) are space, those before them a batch; by default all axes are space. spacing: one positive number, or
one for each spatial axis, or (*batch, spatial_dims) of them, in the unit that the result shall have; None is 1.
With a spacing for each item, items are computed one after the other. Results are float32, or computed and given in
float64 with dtype="float64", contiguous, of the same kind and on the same device as the mask. With unit spacing
squared distances are exact integers up to 2^24 (2^53 in float64); otherwise the relative error is below 1e-6
(1e-14). Scratch memory: per CPU thread a few lines; on CUDA one float for each voxel of a volume too large for
shared memory. Definitions: `noisyseg_fast.reference`.

border=True: the voxels just outside the image are background. no_site: the value (0 or more) for items that hold
nothing to measure the distance to, in place of inf.

Raises TypeError for dtypes and kinds of arrays, ValueError for shapes, spacing and options.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import _arrays, _core

CONVENTIONS = ("boundary", "two_sided", "kervadec", "dtc")  # SignedMap in csrc/include/noisyseg/distance.h
INTEGERS = (*_arrays.LABELS, "int8", "int16", "uint16", "uint32", "uint64")
_SAME_BITS = {"int8": "uint8", "uint32": "int32", "uint64": "int64"}  # alike in what is 0 and what is equal
_WIDER = {"int8": "int32", "int16": "int32", "uint16": "int32", "uint32": "int64"}


def distance_transform_edt(
    mask: Any,
    spacing: Any = None,
    *,
    spatial_dims: int | None = None,
    squared: bool = False,
    return_indices: bool = False,
    multi_label: bool = False,
    border: bool = False,
    no_site: float = math.inf,
    dtype: Any = "float32",
) -> Any:
    """Distance of every object voxel to the nearest background voxel; 0 in the background.

    `scipy.ndimage.distance_transform_edt`, batched and in float32. An item without any background voxel gets
    no_site (SciPy measures from a voxel that does not exist). multi_label=True: distance of every voxel whose
    label is not 0 to the nearest voxel of another label, 0 included (the package edt's definition).
    return_indices=True returns (distances, indices): int32 (..., spatial_dims, *S), the position of that nearest
    voxel, -1 where there is none; of several nearest voxels any one (this path is slower; scratch memory per voxel:
    8 bytes of one item on the CPU, 16 to 20 of the batch on CUDA). It cannot be had with border=True, where the
    nearest may lie outside.

    Extra memory: 4 bytes per voxel, the result's (8 in float64); with indices see above.

    >>> distance_transform_edt(numpy.array([[0, 1, 1, 1]], numpy.uint8), spacing=(1, 0.5))
    array([[0. , 0.5, 1. , 1.5]], dtype=float32)
    """
    mask, space, dims = _check(mask, spatial_dims, False)
    batch = tuple(mask.shape)[: len(mask.shape) - dims]
    sizes = _spacings(spacing, dims, batch)
    fp64 = _precision(dtype) == "float64"
    options = (border, _no_site(no_site), squared, multi_label, CONVENTIONS.index("two_sided"), False, 0)
    if border and return_indices:
        raise ValueError(
            "return_indices=True needs border=False: the nearest voxel may lie outside the image"
        )
    if return_indices:
        _check_another_axis(mask, "return_indices")
    labels = _narrow(mask, space) if multi_label and space.device < 0 else mask
    shape = tuple(mask.shape)
    out = space.empty(shape, _precision(dtype))
    indices = space.empty((*batch, dims, *shape[len(batch) :]), "int32") if return_indices else None
    if 0 not in shape:
        memory = None
        views = (
            _arrays.of(mask=labels).view(labels),
            space.view(out),
            None if indices is None else space.view(indices),
        )
        for size, (view, to, sites) in _items(views, sizes, batch):
            if memory is None:
                memory = _memory(
                    space, _core.distance_workspace(view, dims, options, return_indices, fp64, space.exec)
                )
            _core.distance_transform_edt(
                view, dims, size, options, to, sites, space.view(memory)[0], space.exec
            )
    return (space.back(out), space.back(indices)) if return_indices else space.back(out)


def signed_distance_map(
    mask: Any,
    spacing: Any = None,
    *,
    spatial_dims: int | None = None,
    convention: str = "boundary",
    normalize: bool = False,
    num_classes: int | None = None,
    border: bool = False,
    no_site: float = math.inf,
    dtype: Any = "float32",
) -> Any:
    """Signed distance to the object's boundary: negative inside, positive outside. One transform, not two.

    convention:
      "boundary"   distance to the inner contour (object voxels with a face neighbour outside the object), 0 on it;
                   DTML eq. 1 (Zhang et al. 2021).
      "two_sided"  edt(background) outside, -edt(object) inside: never 0, the boundary lies between the voxels.
      "kervadec"   edt outside, -(edt - 1) inside (Kervadec et al. 2019, boundary loss); an item with only one class
                   is all 0.
      "dtc"        outside divided by its maximum, inside by its own, 0 on the inner contour: in [-1, 1], the target
                   of DTC, SASSNet and the DTML code.
    The image's edge is no boundary unless border=True. An item that is empty is +no_site, a full one -no_site, and
    +1 or -1 with normalize=True (which divides each item by its largest absolute value) or "dtc" (where the public
    code gives 0 for empty and NaN for full items). num_classes=C: mask holds labels, the result is (..., C, *S), for
    each class c the map of mask == c; other labels are of no class.

    Extra memory: 5 bytes per voxel: the result's 4 (8 in float64, for each class) and 1 for the inner contour.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise ValueError(f"num_classes must be a positive integer or None, got {num_classes!r}")
    mask, space, dims = _check(mask, spatial_dims, num_classes is not None)
    shape = tuple(mask.shape)
    if num_classes is not None:
        _check_another_axis(mask, "num_classes")
    batch = shape[: len(shape) - dims]
    sizes = _spacings(spacing, dims, batch)
    classes = () if num_classes is None else (num_classes,)
    options = (
        border,
        _no_site(no_site),
        False,
        False,
        CONVENTIONS.index(convention),
        normalize,
        num_classes or 0,
    )
    out = space.empty((*batch, *classes, *shape[len(batch) :]), _precision(dtype))
    if 0 not in shape:
        memory = None
        for size, (view, to) in _items((space.view(mask), space.view(out)), sizes, batch):
            if memory is None:
                fp64 = _precision(dtype) == "float64"
                memory = _memory(
                    space, _core.distance_workspace(view, dims, options, False, fp64, space.exec)
                )
            _core.signed_distance_map(view, dims, size, options, to, space.view(memory)[0], space.exec)
    return space.back(out)


def sampled_distance(
    values: Any,
    sites: Any = None,
    spacing: Any = None,
    *,
    spatial_dims: int | None = None,
) -> Any:
    """The distance transform of a sampled function: min over q of values[q] + |p - q|^2, for every voxel p.

    Felzenszwalb and Huttenlocher (2012). values: (..., *S) float32 or float64, finite, or inf where nothing was
    sampled; sites: a mask of that shape, not 0 where values count (None: everywhere). The result is like values; inf
    in an item without any site. With values 0 it is the squared distance to the nearest site; the values are in
    squared units of the spacing. For torch tensors it is differentiable with respect to values: each voxel's gradient
    goes to the site that its minimum comes from, summed in a fixed order, the same bits on every run (4 bytes for
    each voxel and spatial axis are kept for that). First derivatives only.

    Extra memory: 12 bytes per pixel in 2D: the result's in float32, and 4 for each spatial axis.

    >>> sampled_distance(numpy.array([0., 9, 9, 1]))
    array([0., 1., 2., 1.])
    """
    _arrays.given(values=values)
    space = _arrays.of(values=values, sites=sites)
    _arrays.check_dtype("values", space.dtype(values), ("float32", "float64"))
    shape = tuple(values.shape)
    dims = _dims("values", values, spatial_dims)
    if sites is not None:
        sites = _plain(sites, False)
        _arrays.check_dtype("sites", space.dtype(sites), _arrays.LABELS)
        if tuple(sites.shape) != shape:
            raise ValueError(f"sites has shape {tuple(sites.shape)}, values {shape}; they must be alike")
    sizes = _spacings(spacing, dims, shape[: len(shape) - dims])
    if space.name == "torch":
        from . import _sampled

        return _sampled.apply(values, sites, sizes, dims)
    return space.back(sampled_forward(space, values, sites, sizes, dims)[0])


Spacing = tuple[float, float, float]  # of the spatial axes, and ones


def sampled_forward(
    space: _arrays.Namespace, values: Any, sites: Any, sizes: Sequence[Spacing], dims: int
) -> tuple[Any, Any]:
    """(distances, apexes): int32 (*batch, spatial_dims, *S), or (spatial_dims, *values' shape) if the batch has one
    spacing; what sampled_backward needs."""
    shape = tuple(values.shape)
    batch = shape[: len(shape) - dims]
    out = space.empty(shape, space.dtype(values))
    apexes = space.empty(_apex_shape(shape, dims, sizes), "int32")
    if 0 not in shape:
        memory = None
        views = (
            space.view(values),
            None if sites is None else space.view(sites),
            space.view(out),
            space.view(apexes),
        )
        for size, (view, mask, to, at) in _items(views, sizes, batch):
            if memory is None:
                memory = _memory(space, _core.sampled_distance_workspace(view, dims, space.exec))
            _core.sampled_distance(view, mask, dims, size, to, at, space.view(memory)[0], space.exec)
    return out, apexes


def sampled_backward(
    space: _arrays.Namespace, grad: Any, apexes: Any, sizes: Sequence[Spacing], dims: int
) -> Any:
    """The gradient with respect to values, from a contiguous gradient with respect to the distances."""
    shape = tuple(grad.shape)
    batch = shape[: len(shape) - dims]
    out = space.empty(shape, space.dtype(grad))
    if 0 not in shape:
        memory = None
        for _, (view, at, to) in _items(
            (space.view(grad), space.view(apexes), space.view(out)), sizes, batch
        ):
            if memory is None:
                memory = _memory(space, _core.sampled_distance_workspace(view, dims, space.exec))
            _core.sampled_distance_backward(view, at, dims, to, space.view(memory)[0], space.exec)
    return out


def _apex_shape(shape: Sequence[int], dims: int, sizes: Sequence[Spacing]) -> tuple[int, ...]:
    batch = len(shape) - dims
    return (dims, *shape) if len(sizes) == 1 else (*shape[:batch], dims, *shape[batch:])


def _check(mask: Any, spatial_dims: int | None, ordered: bool) -> tuple[Any, _arrays.Namespace, int]:
    mask = _plain(mask, ordered)
    space = _arrays.of(mask=mask)
    if space.dtype(mask) not in _arrays.LABELS:
        _arrays.check_dtype("mask", space.dtype(mask), INTEGERS)
    return mask, space, _dims("mask", mask, spatial_dims)


def _check_another_axis(mask: Any, because: str) -> None:
    if len(mask.shape) == _arrays.MAX_RANK:
        raise ValueError(
            f"mask has {len(mask.shape)} dimensions; with {because} at most {_arrays.MAX_RANK - 1} are supported"
        )


def _dims(name: str, x: Any, spatial_dims: int | None) -> int:
    _arrays.check_rank(name, x)
    shape = tuple(x.shape)
    dims = len(shape) if spatial_dims is None else spatial_dims
    if not 1 <= dims <= 3:
        hint = "" if spatial_dims is not None else "; pass spatial_dims, the axes before them are a batch"
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {dims} for {name} of shape {shape}{hint}")
    if dims > len(shape):
        raise ValueError(f"{name} has shape {shape}, too few axes for spatial_dims={dims}")
    if 0 in shape[len(shape) - dims :]:
        raise ValueError(f"{name} has a spatial axis of size 0: shape {shape}")
    return dims


def _plain(mask: Any, ordered: bool) -> Any:
    """Integers of the other dtypes as one of _arrays.LABELS; ordered: with the values kept, not only what is equal."""
    if isinstance(mask, np.ndarray) and mask.dtype in _arrays.NUMPY_NAME:
        return mask
    name = str(getattr(mask, "dtype", "")).removeprefix("torch.")
    to = _SAME_BITS.get(name)
    if to and not (ordered and name in _WIDER) and hasattr(mask, "view"):
        return mask.view(_dtype(mask, to))
    to = _WIDER.get(name)
    if to is None:
        return mask
    return mask.to(_dtype(mask, to)) if hasattr(mask, "to") else mask.astype(to)


def _dtype(like: Any, name: str) -> Any:
    """The dtype of that name in the library of `like`."""
    if type(like.dtype).__module__.startswith("torch"):
        import torch

        return getattr(torch, name)
    return name


def _narrow(mask: Any, space: _arrays.Namespace) -> Any:
    """int64 labels that the CPU's int32 does not hold, numbered anew; 0 stays 0."""
    if space.dtype(mask) != "int64" or 0 in mask.shape:
        return mask
    values = space.as_numpy(mask) if isinstance(space, _arrays.Dlpack) else np.asarray(mask)
    if values.min() >= -(2**31) and values.max() < 2**31:
        return mask
    found, number = np.unique(values, return_inverse=True)
    zero = np.searchsorted(found, 0)
    number = number.reshape(values.shape) - zero
    return number if zero < len(found) and found[zero] == 0 else number + (number >= 0)


def _precision(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if isinstance(dtype, type):  # numpy.float64
        name = dtype.__name__
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
    return name


def _no_site(value: float) -> float:
    if not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"no_site must be a number from 0 to inf, got {value!r}")
    return float(value)


def _spacings(spacing: Any, dims: int, batch: Sequence[int]) -> list[Spacing]:
    """One spacing, or one for each item of the batch."""
    nested = isinstance(spacing, (tuple, list)) and any(hasattr(row, "__len__") for row in spacing)
    each = nested or getattr(spacing, "ndim", 1) > 1
    if not each:
        return [_padded(spacing, dims)]
    try:
        table = np.asarray(spacing, float)
    except (TypeError, ValueError):
        raise TypeError(
            f"spacing must be a number, one for each spatial axis or a full table, got {spacing!r}"
        ) from None
    if table.shape != (*batch, dims):
        raise ValueError(
            f"spacing has shape {table.shape}; for each item of this batch it would be {(*batch, dims)}"
        )
    return [_padded(row, dims) for row in table.reshape(-1, dims).tolist()]


def _padded(spacing: Any, dims: int) -> Spacing:
    a, b, c = (*_arrays.spacing_per_axis(spacing, dims), 1.0, 1.0)[:3]
    return a, b, c


View = _arrays.View | None


def _items(
    views: Sequence[View], sizes: Sequence[Spacing], batch: Sequence[int]
) -> Iterator[tuple[Spacing, Sequence[View]]]:
    """The whole arrays with their one spacing, or item by item with its own."""
    if len(sizes) == 1:
        yield sizes[0], views
        return
    for size, index in zip(sizes, np.ndindex(*batch), strict=True):
        yield size, [view and _item(view, index) for view in views]


def _item(view: _arrays.View, index: Sequence[int]) -> _arrays.View:
    address, code, shape, strides = view
    n = len(index)
    offset = sum(i * s for i, s in zip(index, strides[:n], strict=True))
    return address + offset * _BYTES[_arrays.DTYPES[code]], code, shape[n:], strides[n:]


_BYTES = dict(zip(_arrays.DTYPES, (1, 1, 4, 8, 2, 2, 4, 8), strict=True))


def _memory(space: _arrays.Namespace, size: int) -> Any:
    return space.empty((size // 8 + 1,), "float64")
