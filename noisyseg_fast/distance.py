"""Exact Euclidean distance transforms and signed distance maps, batched, on the array's own device.

mask: (..., *S), bool, uint8, int32 or int64, any strides; whatever is not 0 is object. The last `spatial_dims`
axes (1 to 3) are space, those before them a batch; by default all axes are space. spacing: one positive number,
or one for each spatial axis, in the unit that the result shall have; None is 1. Results are float32, contiguous,
of the same kind and on the same device as the mask. With unit spacing squared distances are exact integers up to
2^24; otherwise the relative error is below 1e-6. Scratch memory: per CPU thread a few lines; on CUDA one float for
each voxel of a volume too large for shared memory. Definitions: `noisyseg_fast.reference`.

Raises TypeError for dtypes and kinds of arrays, ValueError for shapes, spacing and options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _arrays, _core

CONVENTIONS = ("boundary", "two_sided", "kervadec", "dtc")  # SignedMap in csrc/include/noisyseg/distance.h


def distance_transform_edt(
    mask: Any,
    spacing: float | Sequence[float] | None = None,
    *,
    spatial_dims: int | None = None,
    squared: bool = False,
    return_indices: bool = False,
) -> Any:
    """Distance of every object voxel to the nearest background voxel; 0 in the background.

    `scipy.ndimage.distance_transform_edt`, batched and in float32. An item without any background voxel gets inf
    (SciPy measures from a voxel that does not exist). return_indices=True returns (distances, indices): int32
    (..., spatial_dims, *S), the position of that nearest voxel, -1 where there is none; of several nearest voxels
    any one (this path is slower and takes 8 bytes of scratch for each voxel and thread; CPU only).

    >>> distance_transform_edt(numpy.array([[0, 1, 1, 1]], numpy.uint8), spacing=(1, 0.5))
    array([[0. , 0.5, 1. , 1.5]], dtype=float32)
    """
    space, dims, sizes = _check(mask, spacing, spatial_dims)
    shape = tuple(mask.shape)
    out = space.empty(shape, "float32")
    indices = None
    if return_indices:
        if space.device >= 0:
            raise ValueError("return_indices=True needs a CPU array; pass mask.cpu()")
        lead = len(shape) - dims
        indices = space.empty((*shape[:lead], dims, *shape[lead:]), "int32")
    if _size(shape):
        view, exec_ = space.view(mask), space.exec
        memory = _workspace(space, view, dims, return_indices, False, exec_)
        _core.distance_transform_edt(
            view,
            dims,
            sizes,
            squared,
            space.view(out),
            None if indices is None else space.view(indices),
            space.view(memory)[0],
            exec_,
        )
    return (space.back(out), space.back(indices)) if return_indices else space.back(out)


def signed_distance_map(
    mask: Any,
    spacing: float | Sequence[float] | None = None,
    *,
    spatial_dims: int | None = None,
    convention: str = "boundary",
    normalize: bool = False,
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
    The image's edge is no boundary. An item that is empty is +inf, a full one -inf, and +1 or -1 with
    normalize=True (which divides each item by its largest absolute value) or "dtc" (where the public code gives 0
    for empty and NaN for full items).
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    space, dims, sizes = _check(mask, spacing, spatial_dims)
    out = space.empty(tuple(mask.shape), "float32")
    if _size(out.shape):
        view, exec_ = space.view(mask), space.exec
        memory = _workspace(space, view, dims, False, convention == "boundary", exec_)
        _core.signed_distance_map(
            view,
            dims,
            sizes,
            CONVENTIONS.index(convention),
            normalize,
            space.view(out),
            space.view(memory)[0],
            exec_,
        )
    return space.back(out)


def _check(
    mask: Any, spacing: float | Sequence[float] | None, spatial_dims: int | None
) -> tuple[_arrays.Namespace, int, tuple[float, ...]]:
    space = _arrays.of(mask=mask)
    _arrays.check_dtype("mask", space.dtype(mask), _arrays.LABELS)
    _arrays.check_rank("mask", mask)
    shape = tuple(mask.shape)
    dims = len(shape) if spatial_dims is None else spatial_dims
    if not 1 <= dims <= 3:
        hint = "" if spatial_dims is not None else "; pass spatial_dims, the axes before them are a batch"
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {dims} for a mask of shape {shape}{hint}")
    if dims > len(shape):
        raise ValueError(f"mask has shape {shape}, too few axes for spatial_dims={dims}")
    if 0 in shape[len(shape) - dims :]:
        raise ValueError(f"mask has a spatial axis of size 0: shape {shape}")
    sizes = _arrays.spacing_per_axis(spacing, dims)
    return space, dims, (*sizes, 1.0, 1.0)[:3]


def _size(shape: Sequence[int]) -> bool:
    return 0 not in shape


def _workspace(
    space: _arrays.Namespace, mask: _arrays.View, dims: int, indices: bool, contour: bool, exec_: _arrays.Exec
) -> Any:
    return space.empty((_core.distance_workspace(mask, dims, indices, contour, exec_) // 8 + 1,), "float64")
