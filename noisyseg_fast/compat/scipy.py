"""`scipy.ndimage.distance_transform_edt` (and `cupyx.scipy.ndimage`'s): its signature, answers and errors.

    from noisyseg_fast.compat.scipy import distance_transform_edt

Deliberate differences: 1 to 3 axes; of several nearest background elements `indices` names any one, not SciPy's;
torch and CuPy arrays are taken as well, and answered in kind on their own device. SciPy itself is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _arrays, distance


def distance_transform_edt(
    input: Any,
    sampling: float | Sequence[float] | None = None,
    return_distances: bool = True,
    return_indices: bool = False,
    distances: Any = None,
    indices: Any = None,
    *,
    block_params: Any = None,
    float64_distances: bool = True,
) -> Any:
    """Exact Euclidean distance of every element that is not 0 to the nearest that is.

    input: (*S), any dtype; lists and scalars too. sampling: spacing along each axis. distances: a float64 array (*S)
    and indices: an int32 array (rank, *S) to be filled instead of returned. Without any 0 in the input, distances
    are to the element (-1, 0, ...), as SciPy's. The last two arguments are CuPy's: block_params is not needed,
    float64_distances=False gives float32. Returns distances, indices, both as a tuple, or None.
    Raises RuntimeError as SciPy does, ValueError for more than 3 axes or a sampling of another length.
    """
    wrong = []
    if not return_distances and not return_indices:
        wrong.append("at least one of return_distances/return_indices must be True")
    if distances is not None and not return_distances:
        wrong.append("return_distances must be True if distances is supplied")
    if indices is not None and not return_indices:
        wrong.append("return_indices must be True if indices is supplied")
    if wrong:
        raise RuntimeError(", ".join(wrong))
    mask = as_mask(input, distance.INTEGERS, "input")
    back = _arrays.Dlpack(input).back if _foreign(input) else lambda x: x
    shape, rank = tuple(mask.shape), len(mask.shape)
    if rank > 3:
        raise ValueError(
            f"input must have 1 to 3 axes, got shape {shape}; for a batch use noisyseg_fast's own"
        )
    _check_out("indices", indices, (rank, *shape), "int32")
    _check_out("distances", distances, shape, "float64" if float64_distances else "float32")
    dtype = "float64" if float64_distances else "float32"
    found = distance.distance_transform_edt(
        mask, sampling, spatial_dims=rank, return_indices=return_indices, dtype=dtype
    )
    dist, index = found if return_indices else (found, None)
    if 0 not in shape and bool((mask != 0).all()):
        dist, index = _to_phantom(dist, index, sampling)
    result = []
    for wanted, out, value in ((return_distances, distances, dist), (return_indices, indices, index)):
        if wanted and out is not None:
            out[...] = value
        elif wanted:
            result.append(back(value))
    return (tuple(result) if len(result) == 2 else result[0]) if result else None


def as_mask(x: Any, dtypes: Sequence[str], name: str) -> Any:
    """x as an array of one of those dtypes with at least one axis: itself, or where it is not 0.

    Raises TypeError for what has no numbers: None, text, dates, records; and for arrays of unknown devices."""
    if isinstance(x, type) or (not hasattr(x, "__dlpack__") and not hasattr(x, "__cuda_array_interface__")):
        x = np.asarray(x)
    if _foreign(x):
        space = _arrays.of(**{name: x})
        assert isinstance(space, _arrays.Dlpack)
        x = space.as_numpy(x)
    if isinstance(x, np.ndarray) and (x.dtype.kind in "SUVMm" or (x.dtype.hasobject and not _numbers(x))):
        raise TypeError(f"{name} must be an array of numbers, got dtype {x.dtype}")
    if type(x).__module__.split(".")[0] == "torch" and (str(x.layout) != "torch.strided" or x.is_nested):
        _arrays.of(**{name: x})  # says why not
    if len(x.shape) == 0:
        x = x.reshape(1)
    known = str(x.dtype).removeprefix("torch.") in dtypes and not (
        isinstance(x, np.ndarray) and not x.dtype.isnative
    )
    mask = x if known else x != 0
    if str(mask.dtype).removeprefix("torch.") in _arrays.LABELS:
        _arrays.of(**{name: mask})
    return mask


def _numbers(x: np.ndarray[Any, Any]) -> bool:
    return all(isinstance(v, (bool, int, float, complex, np.number, np.bool_)) for v in x.flat)


def _foreign(x: Any) -> bool:
    """An array of neither NumPy, torch nor CuPy: all that is known of it is that it speaks DLPack."""
    return (
        hasattr(x, "__dlpack__")
        and not isinstance(x, np.ndarray)
        and not hasattr(x, "new_tensor")
        and not hasattr(x, "__cuda_array_interface__")
    )


def _check_out(name: str, out: Any, shape: tuple[int, ...], dtype: str) -> None:
    if out is None:
        return
    if tuple(out.shape) != shape:
        raise RuntimeError(f"{name} array has wrong shape")
    if _arrays.of(**{name: out}).dtype(out) != dtype:
        raise RuntimeError(f"{name} array must be {dtype}")


def _to_phantom(dist: Any, index: Any, sampling: Any) -> tuple[Any, Any]:
    """Everything is object: SciPy measures from the element (-1, 0, ...), which does not exist."""
    shape = tuple(dist.shape)
    steps = np.broadcast_to(np.asarray(1.0 if sampling is None else sampling, np.float64), len(shape))
    square = np.zeros(shape)
    for axis, (n, step) in enumerate(zip(shape, steps, strict=True)):
        along = (np.arange(n) + (axis == 0)) * step
        square += (along**2).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    if index is not None:
        index[...] = 0
        index[0] = -1
    return _like(np.sqrt(square), dist), index


def _like(values: np.ndarray[Any, Any], example: Any) -> Any:
    """values as an array of the example's kind, dtype and device."""
    if isinstance(example, np.ndarray):
        return values.astype(example.dtype)
    if hasattr(example, "new_tensor"):
        return example.new_tensor(values)
    import cupy

    return cupy.asarray(values, example.dtype)
