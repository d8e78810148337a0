"""Statistics over all pixels of a batch: quantiles, the k largest values, and which labels are wrong. CPU or CUDA.

Nothing is sorted and nothing copied. An order statistic is found digit by digit: a pass over the values counts their
leading digits, the wanted one is looked up, the next pass counts the next digit of what begins so; three passes find
any float32, six any float64. So there may be any number of values, the extra memory is at most 70 kB for each
image (on the CPU 130 kB for each thread too), and the same bits come out of any number of threads and of the GPU.

Arrays are torch, NumPy, CuPy or DLPack, of any strides that leave at most three separate axes (any contiguous,
channels_last or sliced image). With CUDA arrays nothing waits for the device. Results are new arrays of the same kind,
on the same device, without gradients. Definitions: `noisyseg_fast.reference`.

Raises TypeError for dtypes and kinds of arrays, ValueError for shapes and options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import _arrays, _core

_RULES = (
    "linear",
    "lower",
    "higher",
    "midpoint",
    "nearest",
)  # Interpolation in csrc/include/noisyseg/pixels.h
_PRUNE = ("both", "class", "noise_rate")  # Prune, there
_AT_ONCE = 8  # Quantiles::most, there
MAX_CLASSES = 255


# ---- order statistics -----------------------------------------------------------------------------


def quantile(
    values: Any,
    q: float | Sequence[float],
    *,
    per_image: bool = False,
    mask: Any = None,
    interpolation: str = "linear",
) -> Any:
    """The q-quantiles of all values, or with per_image of each image's, in the values' dtype.

    values: any shape and number (torch.quantile refuses more than 16 million), float16, bfloat16, float32 or float64;
    with per_image (B, *S). NaN is left out, and so are values where mask (the same shape, any dtype) is 0; of none the
    result is NaN. q: a number or several between 0 and 1. interpolation: between the two neighbours, "linear",
    "lower", "higher", "midpoint" or "nearest" (to even), as numpy.quantile; computed in double precision.

    Returns shape () or (len(q),); with per_image (B,) or (len(q), B).

    Extra memory: 0 bytes per value.

    >>> quantile(loss, 0.9, mask=label != 255)
    """
    space, view, inside, rows = _rows(values, mask, per_image)
    if interpolation not in _RULES:
        raise ValueError(f"interpolation must be one of {', '.join(_RULES)}, got {interpolation!r}")
    several = not isinstance(q, (int, float)) and hasattr(q, "__len__")
    wanted = [float(x) for x in q] if several else [float(q)]  # type: ignore[union-attr, arg-type]
    if not wanted:
        raise ValueError("q must be a number or several, got none")
    for x in wanted:
        if not 0 <= x <= 1:
            raise ValueError(f"q must lie in [0, 1], got {x:g}")
    out = space.empty((len(wanted), rows), space.dtype(values))
    if _size(view) == 0:
        out[...] = math.nan
    else:
        for i in range(0, len(wanted), _AT_ONCE):
            part = wanted[i : i + _AT_ONCE]
            work = space.empty((_core.selection_workspace(view, 2 * len(part), space.exec),), "uint8")
            _core.quantile(
                view,
                inside,
                part,
                _RULES.index(interpolation),
                space.view(out[i:]),
                space.view(work),
                space.exec,
            )
    shape = ((len(wanted),) if several else ()) + ((rows,) if per_image else ())
    return space.back(out.reshape(shape))


def topk_threshold(
    values: Any, k: Any, *, largest: bool = True, per_image: bool = False, mask: Any = None
) -> Any:
    """The k-th largest value (with largest=False smallest), or with per_image each image's, in the values' dtype.

    values, mask: as in `quantile`. k: an integer of at least 1, or an int64 array of shape (), with per_image (B,), on
    the values' device. Where there are fewer than k values, the last of them; NaN where there is none or k < 1.

    Returns shape (), with per_image (B,).

    Extra memory: 0 bytes per value.
    """
    space, view, inside, rows = _rows(values, mask, per_image)
    number, counts = _k(space, k, rows, per_image, 1)
    out = space.empty((rows,), space.dtype(values))
    if _size(view) == 0:
        out[...] = math.nan
    else:
        _top_k(space, view, inside, counts, number, largest, space.view(out), None)
    return space.back(out.reshape((rows,) if per_image else ()))


def topk_mask(values: Any, k: Any, *, largest: bool = True, per_image: bool = False, mask: Any = None) -> Any:
    """Where the k largest values (with largest=False smallest) lie, over all or with per_image of each image: bool.

    values, k, mask: as in `topk_threshold`, but k may be 0. Exactly k are chosen: of values that tie with the last,
    those that come first in the order of the axes. All (but NaN) where there are fewer. -0 and 0 tie.

    Extra memory: 1 byte per value, the result's.

    >>> hard = topk_mask(loss, loss[0].numel() // 10, per_image=True)
    """
    space, view, inside, rows = _rows(values, mask, per_image)
    number, counts = _k(space, k, rows, per_image, 0)
    out = space.empty(tuple(values.shape), "bool")
    if _size(view):
        _top_k(space, view, inside, counts, number, largest, None, space.view(out))
    return space.back(out)


def _top_k(
    space: _arrays.Namespace,
    view: _arrays.View,
    inside: _arrays.View | None,
    counts: _arrays.View | None,
    number: int,
    largest: bool,
    threshold: _arrays.View | None,
    chosen: _arrays.View | None,
) -> None:
    work = space.empty((_core.selection_workspace(view, 1, space.exec),), "uint8")
    _core.top_k(view, inside, counts, number, bool(largest), threshold, chosen, space.view(work), space.exec)


# ---- confident learning ---------------------------------------------------------------------------


def confident_joint(probabilities: Any, label: Any) -> Any:
    """How many pixels with the given label i are confidently of class j: counts (C, C) int64 (Northcutt et al.,
    JAIR 2021, eq. 1), as cleanlab 2.9's compute_confident_joint(calibrate=False).

    probabilities (B, C, *S), C from 2 to 255, floating point (half precision is computed in float32); label (B, *S)
    class numbers of uint8, bool, int32 or int64. Pixels with other labels (255) or with a NaN are left out. A pixel is
    confidently of class j if p_j reaches the mean p_j of the pixels labelled j; of the most probable class if that
    holds for several; of none, and counted nowhere, if for none. A class without labels has no such pixels. Every
    diagonal count is at least 1.

    The means are those of whole multiples of 2^-52, which add up alike in any order.

    Extra memory: 0 bytes per pixel.
    """
    space, p, given, classes = _labelled(probabilities, label)
    out = space.empty((classes, classes), "int64")
    if _size(p) == 0:
        for i in range(classes):
            out[i] = 0
            out[i, i] = 1
    else:
        work = space.empty((_core.confident_workspace(p, space.exec),), "uint8")
        _core.confident_joint(p, given, space.view(out), space.view(work), space.exec)
    return space.back(out)


def label_errors(probabilities: Any, label: Any, prune: str = "both") -> Any:
    """Where confident learning takes the label for wrong: (B, *S) bool, as cleanlab 2.9's find_label_issues with
    filter_by="both", "prune_by_class" or "prune_by_noise_rate" on pixels in a row.

    probabilities, label: as in `confident_joint`. From the joint, scaled so that each row sums to the number of pixels
    with that label, come the numbers n_ij of pixels labelled i that are of class j.  prune="noise_rate": for each i
    and j the n_ij pixels labelled i with the largest p_j - p_i; "class": for each i the sum_j n_ij pixels labelled i
    with the smallest p_i; "both": those in both. Never a pixel whose label is its most probable class. Of pixels that
    tie, the first ones are taken. Equal to cleanlab for two classes; for more, n_ij may differ by 1, as it rounds
    twice.

    The pixels are read seven times or so (twice for the joint, once for each digit, once to write), nothing is kept of
    them: the memory beside the result is 70 kB for two classes, 11 MB for 255 (on the CPU half as much more for each
    thread).

    Extra memory: 1 byte per pixel, the result's.
    """
    if prune not in _PRUNE:
        raise ValueError(f"prune must be both, class or noise_rate, got {prune!r}")
    space, p, given, _ = _labelled(probabilities, label)
    out = space.empty(tuple(label.shape), "bool")
    if _size(p):
        work = space.empty((_core.confident_workspace(p, space.exec),), "uint8")
        _core.label_errors(p, given, _PRUNE.index(prune), space.view(out), space.view(work), space.exec)
    return space.back(out)


# ---- arguments ------------------------------------------------------------------------------------


def _rows(
    values: Any, mask: Any, per_image: bool
) -> tuple[_arrays.Namespace, _arrays.View, _arrays.View | None, int]:
    """values and mask as (rows, 1, *S): of all values one row."""
    _arrays.given(values=values)
    space = _arrays.of(values=values, mask=mask)
    _arrays.check_dtype("values", space.dtype(values), _arrays.FLOATS)
    shape = tuple(values.shape)
    if per_image and not shape:
        raise ValueError("values has no axes; with per_image it must be (B, *S)")
    if len(shape) > _arrays.MAX_RANK - 2 + per_image:
        raise ValueError(
            f"values has {len(shape)} dimensions; at most {_arrays.MAX_RANK - 2 + per_image} are supported"
        )
    if mask is not None and tuple(mask.shape) != shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be that of values, {shape}")

    def row_view(x: Any) -> _arrays.View:
        address, code, sizes, strides = space.view(x)
        if per_image:
            return address, code, (sizes[0], 1, *sizes[1:]), (strides[0], 0, *strides[1:])
        return address, code, (1, 1, *sizes), (0, 0, *strides)

    inside = None if mask is None else row_view(mask)
    return space, row_view(values), inside, shape[0] if per_image else 1


def _k(
    space: _arrays.Namespace, k: Any, rows: int, per_image: bool, least: int
) -> tuple[int, _arrays.View | None]:
    """k as a number, or as the view of an array of them."""
    if hasattr(k, "dtype") and hasattr(k, "shape"):
        wanted = (rows,) if per_image else ()
        if _arrays.of(k=k) is not space:
            raise TypeError("k must be an integer, or an int64 array of the values' kind and on their device")
        if space.dtype(k) != "int64" or tuple(k.shape) != wanted:
            raise ValueError(
                f"k must be int64 of shape {wanted}, got {space.dtype(k)} of shape {tuple(k.shape)}"
            )
        address, code, _, strides = space.view(k)
        return 0, (address, code, (rows,), strides or (1,))
    if isinstance(k, bool) or not isinstance(k, int) or not least <= k < 2**63:
        raise ValueError(f"k must be an integer of at least {least}, got {k!r}")
    return k, None


def _labelled(probabilities: Any, label: Any) -> tuple[_arrays.Namespace, _arrays.View, _arrays.View, int]:
    space = _arrays.given(probabilities=probabilities, label=label)
    _arrays.check_dtype("probabilities", space.dtype(probabilities), _arrays.FLOATS)
    _arrays.check_dtype("label", space.dtype(label), _arrays.LABELS)
    _arrays.check_rank("probabilities", probabilities)
    shape = tuple(probabilities.shape)
    if len(shape) < 2 or not 2 <= shape[1] <= MAX_CLASSES:
        raise ValueError(
            f"probabilities must be (B, C, *S) with C from 2 to {MAX_CLASSES}, got shape {shape}"
        )
    expected = (shape[0], *shape[2:])
    if tuple(label.shape) != expected:
        raise ValueError(
            f"label has shape {tuple(label.shape)}; for probabilities of shape {shape} it must be {expected}"
        )
    return space, space.view(probabilities), space.view(label), shape[1]


def _size(view: _arrays.View) -> int:
    return math.prod(view[2])
