"""Any array in, the same kind out: torch, NumPy, CuPy, or whatever speaks DLPack (JAX and others).

A family module asks `of(...)` for the namespace that all its arguments share, allocates its results
there, and hands `view(x)` of each array and `exec` to the compiled module. Nothing is copied.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]
Exec = tuple[int, int, int]

DTYPES = ("uint8", "bool", "int32", "int64", "float16", "bfloat16", "float32", "float64")  # DType in array.h
_CODE = {name: code for code, name in enumerate(DTYPES)}
NUMPY_NAME = {np.dtype(name): name for name in DTYPES if name != "bfloat16"}  # str(dtype) takes microseconds
LABELS = ("uint8", "bool", "int32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
MAX_RANK = 8  # Array::max_rank in array.h
_HUGE = 4 << 20  # results from this size on ask for huge pages, as NumPy's own do: a tenth of the page faults


class Namespace:
    """What the package needs of an array library, for arrays on one device."""

    name: str
    device: int = -1  # CUDA ordinal, -1 for the CPU

    def view(self, x: Any) -> View:
        raise NotImplementedError

    def dtype(self, x: Any) -> str:
        return str(x.dtype)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        raise NotImplementedError

    def empty_like(self, x: Any) -> Any:
        """Shape, dtype and order of x."""
        raise NotImplementedError

    def ones_like(self, x: Any) -> Any:
        raise NotImplementedError

    def back(self, x: Any) -> Any:
        """The result as the caller's own kind of array."""
        return x

    @property
    def exec(self) -> Exec:
        return (-1, 0, threads())


def threads() -> int:
    """CPU threads to use: torch's setting when torch is loaded, otherwise OpenMP's (0)."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None and hasattr(torch, "get_num_threads") else 0


class _Numpy(Namespace):
    name = "numpy"

    def dtype(self, x: np.ndarray[Any, Any]) -> str:
        return NUMPY_NAME.get(x.dtype) or str(x.dtype)

    def view(self, x: np.ndarray[Any, Any]) -> View:
        size = x.itemsize
        return (
            x.__array_interface__["data"][0],
            _code(self.dtype(x)),
            x.shape,
            tuple(s // size for s in x.strides),
        )

    def empty(self, shape: Sequence[int], dtype: str) -> np.ndarray[Any, Any]:
        return np.empty(tuple(shape), dtype)

    def empty_like(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.empty_like(x, subok=False)

    def ones_like(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.ones_like(x, subok=False)


class _Torch(Namespace):
    name = "torch"

    def __init__(self, device: Any) -> None:
        import torch

        self._torch = torch
        self._device = device
        if device.type == "cuda":
            self.device = device.index

    def view(self, x: Any) -> View:
        return (x.data_ptr(), _TORCH_CODE[x.dtype], tuple(x.shape), x.stride())

    def dtype(self, x: Any) -> str:
        return str(x.dtype)[6:]

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        return self._torch.empty(tuple(shape), dtype=getattr(self._torch, dtype), device=self._device)

    def empty_like(self, x: Any) -> Any:
        result = self._torch.empty_like(x)
        if self.device < 0 and result.nbytes >= _HUGE:
            from . import _core

            _core.use_huge_pages(result.data_ptr(), result.nbytes)
        return result

    def ones_like(self, x: Any) -> Any:
        return self._torch.ones_like(x)

    @property
    def exec(self) -> Exec:
        if self.device < 0:
            return (-1, 0, self._torch.get_num_threads())
        return (self.device, self._torch.cuda.current_stream(self.device).cuda_stream, 0)


_TORCH_CODE: dict[Any, int] = {}  # torch.dtype -> code, filled when torch is first met


class _Cupy(Namespace):
    name = "cupy"

    def __init__(self, device: int) -> None:
        import cupy

        self._cupy = cupy
        self.device = device

    def view(self, x: Any) -> View:
        return (x.data.ptr, _code(str(x.dtype)), x.shape, tuple(s // x.itemsize for s in x.strides))

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        with self._cupy.cuda.Device(self.device):
            return self._cupy.empty(tuple(shape), dtype)

    def empty_like(self, x: Any) -> Any:
        with self._cupy.cuda.Device(self.device):
            return self._cupy.empty_like(x)

    def ones_like(self, x: Any) -> Any:
        with self._cupy.cuda.Device(self.device):
            return self._cupy.ones_like(x)

    @property
    def exec(self) -> Exec:
        with self._cupy.cuda.Device(self.device):
            return (self.device, self._cupy.cuda.get_current_stream().ptr, 0)


class Dlpack(Namespace):
    """A foreign CPU array: seen through NumPy, given back through its own from_dlpack, if it has one."""

    name = "dlpack"

    def __init__(self, like: Any) -> None:
        self._numpy = _Numpy()
        self._like = like
        # Keeps alive what an exporter had to copy, and the arrays: another could come to have the same id.
        self.seen: dict[int, tuple[Any, np.ndarray[Any, Any]]] = {}

    def as_numpy(self, x: Any) -> np.ndarray[Any, Any]:
        if isinstance(x, np.ndarray):
            return x
        if id(x) not in self.seen:
            self.seen[id(x)] = (x, np.from_dlpack(x))
        return self.seen[id(x)][1]

    def view(self, x: Any) -> View:
        return self._numpy.view(self.as_numpy(x))

    def dtype(self, x: Any) -> str:
        return str(self.as_numpy(x).dtype)

    def empty(self, shape: Sequence[int], dtype: str) -> np.ndarray[Any, Any]:
        return self._numpy.empty(shape, dtype)

    def empty_like(self, x: Any) -> np.ndarray[Any, Any]:
        return self._numpy.empty_like(self.as_numpy(x))

    def ones_like(self, x: Any) -> np.ndarray[Any, Any]:
        return self._numpy.ones_like(self.as_numpy(x))

    def back(self, x: Any) -> Any:
        own = getattr(self._like, "__array_namespace__", None)
        if own is None or not hasattr(own(), "from_dlpack"):
            return x
        # JAX takes no strides, NumPy gives no read-only arrays, and scalars have no memory to share.
        return own().from_dlpack(np.require(x, requirements=("C", "W")))


_NUMPY = _Numpy()
_TORCH: dict[Any, _Torch] = {}
_CUPY: dict[int, _Cupy] = {}


def _code(dtype: str) -> int:
    try:
        return _CODE[dtype]
    except KeyError:
        raise TypeError(f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}") from None


def _one(x: Any, name: str) -> Namespace:
    torch = sys.modules.get("torch")
    space: Namespace | None
    if torch is not None and isinstance(x, torch.Tensor):
        if x.layout is not torch.strided or x.is_nested:
            kind = "nested" if x.is_nested else f"not dense ({x.layout})"
            raise TypeError(f"{name} is {kind}; pass a dense tensor, as {name}.to_dense()")
        space = _TORCH.get(x.device)
        if space is None:
            if x.device.type not in ("cpu", "cuda"):
                raise TypeError(f"{name} is on device {x.device}; supported are cpu and cuda")
            if not _TORCH_CODE:
                _TORCH_CODE.update({getattr(torch, d): c for d, c in _CODE.items()})
            if x.device.type == "cpu":  # "cpu" and "cpu:0" are one place
                space = _TORCH.setdefault(torch.device("cpu"), _Torch(torch.device("cpu")))
            else:
                space = _Torch(x.device)
            _TORCH[x.device] = space
        if x.dtype not in _TORCH_CODE:
            _check_known(name, x.dtype)
        if not torch.compiler.is_compiling():  # which cannot trace these, and makes no such tensors
            if x.is_neg():  # its memory holds the opposite of its values
                raise TypeError(f"{name} is a lazily negated view; pass {name}.resolve_neg()")
            if not _has_memory(torch, x):
                raise ValueError(
                    f"{name} has no memory of its own (freed, fake or wrapped); pass a plain tensor"
                )
        return space
    if isinstance(x, np.ndarray):
        if x.dtype not in NUMPY_NAME:
            _check_known(name, x.dtype.newbyteorder("="))
        _check_numpy(name, x)
        return _NUMPY
    if type(x).__module__.split(".")[0] == "cupy" and hasattr(x, "data"):
        _check_known(name, x.dtype)
        device = int(x.device.id)
        return _CUPY.setdefault(device, _Cupy(device))
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__") and not isinstance(x, type):
        foreign = Dlpack(x)
        try:
            if int(x.__dlpack_device__()[0]) != 1:
                raise TypeError(f"{name} is a {type(x).__name__} on a GPU; pass torch.from_dlpack({name})")
            if not hasattr(x, "shape"):
                raise TypeError(
                    f"{name} is a {type(x).__name__} without a shape; pass numpy.from_dlpack({name})"
                )
            if str(getattr(x, "dtype", "")) == "bfloat16":
                raise TypeError(
                    f"{name} is of dtype bfloat16, which NumPy lacks; pass {name}.astype('float32')"
                )
            seen = foreign.as_numpy(x)
        except Exception as error:
            if str(error).startswith(f"{name} is"):
                raise
            raise TypeError(f"{name} is a {type(x).__name__} that NumPy cannot take: {error}") from error
        _check_known(name, seen.dtype)
        _check_numpy(name, seen)
        if tuple(x.shape) != seen.shape:
            raise ValueError(
                f"{name} says that its shape is {tuple(x.shape)}, but its DLPack holds {seen.shape}"
            )
        return foreign
    raise TypeError(
        f"{name} must be a torch tensor, a NumPy or CuPy array or a DLPack object, not {type(x).__name__}"
    )


def _has_memory(torch: Any, x: Any) -> bool:
    """Whether x's elements lie where it says: not of storage that was resized to 0, nor of wrapper subclasses.
    What a transform of torch.func wraps has its memory inside, and comes by here once more without the wrapper."""
    try:
        return bool(x.data_ptr()) or not x.numel()
    except RuntimeError:
        return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _check_known(name: str, dtype: Any) -> None:
    if str(dtype) not in _CODE:
        raise TypeError(f"{name} has dtype {dtype}; use one of {', '.join(DTYPES)}")


def _check_numpy(name: str, x: np.ndarray[Any, Any]) -> None:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; pass {name}.filled(0) or another value")
    if not x.dtype.isnative:
        raise ValueError(f"{name} is not in native byte order; pass {name}.astype({x.dtype.name!r})")
    if not x.flags.aligned or any(s % x.itemsize for s in x.strides):
        raise ValueError(f"{name} has misaligned elements; pass {name}.copy()")


def of(**arrays: Any) -> Namespace:
    """The namespace that all given arrays share; None is skipped. The names are for error messages.

    Raises TypeError when an argument is no array, has an unsupported dtype, or when kinds are mixed,
    ValueError when devices are.
    """
    first: Namespace | None = None
    first_name = ""
    for name, x in arrays.items():
        if x is None:
            continue
        space = _one(x, name)
        if first is None:
            first, first_name = space, name
        elif isinstance(space, Dlpack) and isinstance(first, Dlpack):
            first.seen.update(space.seen)  # exported once: a capsule may be good for one use
        elif space is not first:
            if space.name != first.name:
                raise TypeError(
                    f"{first_name} is a {first.name} array and {name} a {space.name} array; "
                    "pass both as one kind"
                )
            raise ValueError(
                f"{first_name} is on device {_device_name(first)} and {name} on {_device_name(space)}; "
                "move them to the same device"
            )
    if first is None:
        raise TypeError(f"{next(iter(arrays))} must be an array, not None")
    if first.device >= 0:
        _need_cuda()
    return first


def given(**arrays: Any) -> Namespace:
    """`of` arrays that all must be there."""
    for name, x in arrays.items():
        if x is None:
            raise TypeError(f"{name} must be an array, not None")
    return of(**arrays)


def indexable(space: Namespace, x: Any) -> Any:
    """x, or what NumPy sees of a DLPack object that is nothing more."""
    return space.as_numpy(x) if isinstance(space, Dlpack) and not hasattr(x, "__getitem__") else x


def of_torch(x: Any) -> Namespace:
    """`of` one tensor that it has seen before: a look-up, where the checks cost as much as a small kernel."""
    return _TORCH.get(x.device) or of(logits=x)


def _device_name(space: Namespace) -> str:
    return "cpu" if space.device < 0 else f"cuda:{space.device}"


def _need_cuda() -> None:
    from . import _core

    if _core.build_info()["cuda"] is None:
        raise RuntimeError(
            "this build of noisyseg_fast has no CUDA kernels; reinstall with nvcc on PATH and FORCE_CUDA=1 "
            "(pip install --no-binary :all: noisyseg-fast), or pass CPU arrays"
        )


def check_dtype(name: str, dtype: str, allowed: Sequence[str]) -> None:
    if dtype not in allowed:
        raise TypeError(f"{name} has dtype {dtype}; use one of {', '.join(allowed)}")


def check_rank(name: str, x: Any) -> None:
    if len(x.shape) > MAX_RANK:
        raise ValueError(f"{name} has {len(x.shape)} dimensions; at most {MAX_RANK} are supported")


def spacing_per_axis(spacing: float | Sequence[float] | None, spatial_dims: int) -> tuple[float, ...]:
    """spacing as one positive finite float for each spatial axis; None is 1."""
    if spacing is None:
        return (1.0,) * spatial_dims
    try:
        if isinstance(spacing, str):
            raise TypeError
        given: Any = spacing
        one = not isinstance(given, (tuple, list)) and np.ndim(given) == 0
        values = (float(given),) * spatial_dims if one else tuple(map(float, given))
    except (TypeError, ValueError):
        raise TypeError(f"spacing must be a number or one for each spatial axis, got {spacing!r}") from None
    if len(values) != spatial_dims:
        raise ValueError(f"spacing has {len(values)} values for {spatial_dims} spatial axes")
    if not all(0 < s < float("inf") for s in values):
        raise ValueError(f"spacing must be positive and finite, got {values}")
    return values
