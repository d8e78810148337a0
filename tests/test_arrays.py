"""noisyseg_fast._arrays: any array in, the same kind out, what cannot be taken refused by name."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from noisyseg_fast import _arrays

torch = pytest.importorskip("torch")

NUMPY_DTYPES = [d for d in _arrays.DTYPES if d != "bfloat16"]


class Foreign:
    """A CPU array of a library that shares nothing but DLPack and a shape."""

    def __init__(self, array: Any) -> None:
        self._array, self.shape = array, array.shape

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class OnGpu(Foreign):
    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


# ---- kinds, dtypes, strides ------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", _arrays.DTYPES)
def test_torch(dtype: str) -> None:
    x = torch.zeros((2, 3, 4), dtype=getattr(torch, dtype)).transpose(0, 2)
    space = _arrays.of(x=x)
    assert (space.name, space.device, space.dtype(x)) == ("torch", -1, dtype)
    assert space.view(x) == (x.data_ptr(), _arrays.DTYPES.index(dtype), (4, 3, 2), (1, 4, 12))
    made = space.empty((5, 0), dtype)
    assert isinstance(made, torch.Tensor)
    assert (made.dtype, made.shape, made.device) == (x.dtype, (5, 0), x.device)
    assert space.back(made) is made


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy(dtype: str) -> None:
    x = np.zeros((2, 3, 4), dtype).transpose(2, 1, 0)
    space = _arrays.of(x=x)
    assert (space.name, space.device, space.dtype(x)) == ("numpy", -1, dtype)
    assert space.view(x) == (x.ctypes.data, _arrays.DTYPES.index(dtype), (4, 3, 2), (1, 4, 12))
    made = space.empty([5, 0], dtype)
    assert (type(made), str(made.dtype), made.shape) == (np.ndarray, dtype, (5, 0))
    assert space.back(made) is made


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_dlpack_object(dtype: str) -> None:
    inner = np.zeros((2, 3), dtype)
    x = Foreign(inner)
    space = _arrays.of(x=x, y=Foreign(inner))
    assert (space.name, space.dtype(x)) == ("dlpack", dtype)
    assert space.view(x) == (inner.ctypes.data, _arrays.DTYPES.index(dtype), (2, 3), (3, 1))
    made = space.empty((2,), dtype)
    assert space.view(made)[0] == made.ctypes.data
    assert space.back(made) is made  # it has no from_dlpack of its own


def test_dlpack_result_is_of_the_callers_library() -> None:
    class Library:
        @staticmethod
        def from_dlpack(x: Any) -> Foreign:
            return Foreign(np.from_dlpack(x))

    x = Foreign(np.zeros(3))
    x.__array_namespace__ = lambda: Library
    result = _arrays.of(x=x).back(np.arange(2.0))
    assert isinstance(result, Foreign)
    assert result._array.tolist() == [0, 1]


def test_dlpack_copy_lives_as_long_as_the_call() -> None:
    """An exporter that must copy would otherwise leave an address of freed memory."""

    class Copying(Foreign):
        def __dlpack__(self, **options: Any) -> Any:
            return self._array.copy().__dlpack__()

    x, y = Copying(np.arange(1e5)), Copying(np.arange(1e5))
    space = _arrays.of(x=x, y=y)
    views = [space.view(x)[0], space.view(y)[0]]
    junk = [np.full(100_000, -1.0) for _ in range(4)]
    assert views == [space.view(x)[0], space.view(y)[0]]
    assert not {j.ctypes.data for j in junk} & set(views)


class CupyArray:
    """What _arrays reads of a CuPy array, with memory of NumPy's."""

    __module__ = "cupy"

    def __init__(self, array: np.ndarray[Any, Any], device: int = 1) -> None:
        self.array, self.shape, self.strides = array, array.shape, array.strides
        self.dtype, self.itemsize = array.dtype, array.itemsize
        self.data = SimpleNamespace(ptr=array.ctypes.data)
        self.device = SimpleNamespace(id=device)


def test_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins: no GPU. Allocations and the stream are asked for on the array's own device."""
    current = [0]

    @contextlib.contextmanager
    def device(number: int) -> Any:
        before, current[0] = current[0], number
        yield
        current[0] = before

    def empty(shape: Any, dtype: str) -> CupyArray:
        return CupyArray(np.empty(shape, dtype), current[0])

    cupy = SimpleNamespace(
        cuda=SimpleNamespace(
            Device=device, get_current_stream=lambda: SimpleNamespace(ptr=1000 + current[0])
        ),
        empty=empty,
        empty_like=lambda x: empty(x.shape, x.dtype),
        ones_like=lambda x: CupyArray(np.ones_like(x.array), current[0]),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(_arrays, "_CUPY", {})
    monkeypatch.setattr(_arrays, "_need_cuda", lambda: None)
    x = CupyArray(np.zeros((2, 3), np.float32).T)
    space = _arrays.of(x=x)
    assert (space.name, space.device, space.dtype(x)) == ("cupy", 1, "float32")
    assert space.view(x) == (x.array.ctypes.data, _arrays.DTYPES.index("float32"), (3, 2), (1, 3))
    assert space.exec == (1, 1001, 0)
    for made in (space.empty((4,), "int64"), space.empty_like(x), space.ones_like(x)):
        assert isinstance(made, CupyArray) and made.device.id == 1
        assert space.back(made) is made
    assert current == [0]
    with pytest.raises(TypeError, match="mask has dtype complex64"):
        _arrays.of(mask=CupyArray(np.zeros(2, "complex64")))
    with pytest.raises(TypeError, match="a is a cupy array and b a numpy array"):
        _arrays.of(a=x, b=np.zeros(2))
    with pytest.raises(ValueError, match="a is on device cuda:1 and b on cuda:0"):
        _arrays.of(a=x, b=CupyArray(np.zeros(2), 0))


def test_strides_negative_zero_transposed() -> None:
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    for x, strides in (
        (base[::-1, ::2], (-6, 2)),
        (np.broadcast_to(base[0], (3, 6)), (0, 1)),
        (base.T, (1, 6)),
        (base[:, 3], (6,)),
        (np.array(5, np.int32), ()),
    ):
        address, _, shape, given = _arrays.of(x=x).view(x)
        assert (address, shape, given) == (x.ctypes.data, x.shape, strides)
    y = torch.arange(6).expand(3, 6)
    assert _arrays.of(y=y).view(y)[3] == (0, 1)


def test_read_only_array_is_taken() -> None:
    x = np.zeros(3)
    x.flags.writeable = False
    assert _arrays.of(x=x).view(x)[0] == x.ctypes.data


def test_tensor_subclass_is_taken() -> None:
    """As MONAI's MetaTensor."""

    class Meta(torch.Tensor):
        pass

    x = torch.zeros(3).as_subclass(Meta)
    assert _arrays.of(x=x).view(x)[0] == x.data_ptr()


def test_none_is_skipped() -> None:
    assert _arrays.of(weight=None, x=np.zeros(1)).name == "numpy"


def test_cpu_and_cpu_0_are_one_place() -> None:
    assert _arrays.of(a=torch.zeros(1), b=torch.zeros(1, device="cpu:0")).device == -1
    assert _arrays.of(a=torch.zeros(1, device="cpu:0"), b=torch.zeros(1)).device == -1


# ---- refused ---------------------------------------------------------------------------------------
def packed() -> np.ndarray[Any, Any]:
    return np.zeros(4, np.dtype([("flag", "u1"), ("value", "f4")]))["value"]


SUPPORTED = "use one of uint8, bool, int32, int64, float16, bfloat16, float32, float64"


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            [1, 2],
            TypeError,
            "mask must be a torch tensor, a NumPy or CuPy array or a DLPack object, not list",
        ),
        (3.0, TypeError, "mask must be a torch tensor, .*, not float"),
        (np.zeros(2, "complex64"), TypeError, f"mask has dtype complex64; {SUPPORTED}"),
        (np.zeros(2, "U3"), TypeError, "mask has dtype <U3; use one of"),
        (np.zeros(2, "int8"), TypeError, "mask has dtype int8; use one of"),
        (torch.zeros(2, dtype=torch.int16), TypeError, f"mask has dtype torch.int16; {SUPPORTED}"),
        (Foreign(np.zeros(2, "complex64")), TypeError, f"mask has dtype complex64; {SUPPORTED}"),
        (np.zeros(2, ">f4"), ValueError, r"mask is not in native byte order; pass mask.astype\('float32'\)"),
        (packed(), ValueError, r"mask has misaligned elements; pass mask.copy\(\)"),
        (np.ma.zeros(2), TypeError, r"mask is a masked array; pass mask.filled\(0\)"),
        (
            torch.zeros(2, 2).to_sparse(),
            TypeError,
            r"mask is not dense \(torch.sparse_coo\); .*mask.to_dense\(\)",
        ),
        (torch.zeros(2, device="meta"), TypeError, "mask is on device meta; supported are cpu and cuda"),
        (torch.zeros(2, dtype=torch.complex64).conj().imag, TypeError, "mask.resolve_neg"),
        (OnGpu(np.zeros(2)), TypeError, r"mask is a OnGpu on a GPU; pass torch.from_dlpack\(mask\)"),
        (
            Foreign(torch.zeros(2, dtype=torch.bfloat16)),
            TypeError,
            "mask is a Foreign that NumPy cannot take: ",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, (str, type)) else None,
)
def test_refused(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _arrays.of(image=None, mask=x)


def test_nested_tensor_is_refused() -> None:
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)
        with pytest.raises(TypeError, match="mask is nested"):
            _arrays.of(mask=x)


def test_dlpack_without_shape_is_refused() -> None:
    x = Foreign(np.zeros(2))
    del x.shape
    with pytest.raises(TypeError, match=r"mask is a Foreign without a shape; pass numpy.from_dlpack\(mask\)"):
        _arrays.of(mask=x)


def test_mixed_kinds() -> None:
    with pytest.raises(TypeError, match="a is a numpy array and b a torch array; pass both as one kind"):
        _arrays.of(a=np.zeros(1), b=torch.zeros(1))
    with pytest.raises(TypeError, match="a is a dlpack array and b a numpy array"):
        _arrays.of(a=Foreign(np.zeros(1)), b=np.zeros(1))


def test_mixed_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of arrays that say where they are; real ones are in tests/gpu."""
    places = {"a": torch.device("cpu"), "b": torch.device("cuda:1")}
    monkeypatch.setattr(_arrays, "_one", lambda x, name: _arrays._Torch(places[name]))
    with pytest.raises(ValueError, match="a is on device cpu and b on cuda:1; move them to the same device"):
        _arrays.of(a=1, b=1)


def test_cuda_array_with_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from noisyseg_fast import _core

    monkeypatch.setattr(_arrays, "_one", lambda x, name: _arrays._Torch(torch.device("cuda:0")))
    monkeypatch.setattr(_core, "build_info", lambda: {"cuda": None})
    with pytest.raises(
        RuntimeError, match="has no CUDA kernels; reinstall with nvcc on PATH and FORCE_CUDA=1"
    ):
        _arrays.of(a=1)


def test_no_array() -> None:
    with pytest.raises(TypeError, match="a must be an array, not None"):
        _arrays.of(a=None)


def test_checks_of_dtype_and_rank() -> None:
    with pytest.raises(TypeError, match="target has dtype float32; use one of uint8, bool, int32, int64"):
        _arrays.check_dtype("target", "float32", _arrays.LABELS)
    _arrays.check_rank("x", np.zeros((1,) * 8))
    with pytest.raises(ValueError, match="x has 9 dimensions; at most 8 are supported"):
        _arrays.check_rank("x", np.zeros((1,) * 9))


# ---- threads and spacing ---------------------------------------------------------------------------
def test_threads_follow_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _arrays.threads() == 1
        assert _arrays.of(x=torch.zeros(1)).exec == (-1, 0, 1)
        assert _arrays.of(x=np.zeros(1)).exec == (-1, 0, 1)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert _arrays.threads() == 0
    assert _arrays.of(x=np.zeros(1)).exec == (-1, 0, 0)


@pytest.mark.parametrize(
    ("spacing", "result"),
    [
        (None, (1.0, 1.0)),
        (2, (2.0, 2.0)),
        (np.float32(0.5), (0.5, 0.5)),
        (np.array(0.5), (0.5, 0.5)),
        ((1, 2.5), (1.0, 2.5)),
        ([1, 2], (1.0, 2.0)),
        (np.array([1, 2], np.float32), (1.0, 2.0)),
        (torch.tensor([1.0, 2.0]), (1.0, 2.0)),
    ],
)
def test_spacing(spacing: Any, result: tuple[float, ...]) -> None:
    assert _arrays.spacing_per_axis(spacing, 2) == result


@pytest.mark.parametrize(
    ("spacing", "error", "message"),
    [
        ((1.0,), ValueError, "spacing has 1 values for 2 spatial axes"),
        ((1.0, 0.0), ValueError, r"spacing must be positive and finite, got \(1.0, 0.0\)"),
        (-1, ValueError, "spacing must be positive and finite"),
        (float("inf"), ValueError, "spacing must be positive and finite"),
        ((1.0, float("nan")), ValueError, "spacing must be positive and finite"),
        ("12", TypeError, "spacing must be a number or one for each spatial axis, got '12'"),
        (("a", 1.0), TypeError, "spacing must be a number or one for each spatial axis"),
        (object(), TypeError, "spacing must be a number or one for each spatial axis"),
        ([[1, 2], [3, 4]], TypeError, "spacing must be a number or one for each spatial axis"),
    ],
)
def test_bad_spacing(spacing: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _arrays.spacing_per_axis(spacing, 2)
