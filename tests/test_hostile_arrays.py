"""Every public operation with arrays that nobody means to pass: a right answer (that of the contiguous native copy) or
a TypeError or ValueError of one line that names the argument; never a crash, never garbage, never a written input."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import operations
import pytest
from operations import Operation, flat

torch = pytest.importorskip("torch")
pytest.importorskip("monai")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]
OPERATIONS = operations.operations()
SIZE = (5, 6)
# Two networks' worth of code that is the user's own or PyTorch's runs on these: its errors are its own.
OF_TORCH = (
    "meta.",
    "compat.monai_losses",
    "compat.monai_metrics",
    "compat.torchmetrics",
    "compat.nnunet",
    "dual_norms.",
)


def ids(operation: Operation) -> str:
    return operation.name


def test_every_public_operation_is_here() -> None:
    assert operations.public() == {
        name for name in (o.name.split(",")[0] for o in OPERATIONS) if name.rsplit(".")[-1][0].islower()
    } - {"noise.Noise"}


# ---- NumPy -----------------------------------------------------------------------------------------


def spaced(x: Any) -> Any:
    """Every second element along every axis, the rest a trap."""
    trap = np.full(
        [2 * n for n in x.shape],
        77 if x.dtype.kind in "ui" else np.nan if x.dtype.kind == "f" else 1,
        x.dtype,
    )
    view = trap[tuple(slice(1, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def overlapping(x: Any) -> Any:
    """Rows that begin one element after the other, in the same memory."""
    line = np.resize(x.reshape(-1), x.shape[-1] + sum(x.shape[:-1]))
    return np.lib.stride_tricks.as_strided(line, x.shape, (x.itemsize,) * x.ndim)


def misaligned(x: Any) -> Any:
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = np.frombuffer(memory.data, x.dtype, x.size, offset=1).reshape(x.shape)
    memory[1:] = np.frombuffer(x.tobytes(), np.uint8)
    return view


def read_only(x: Any) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


class Kin(np.ndarray):  # type: ignore[type-arg]
    """A subclass that says nothing of itself."""


def backwards(x: Any) -> Any:
    turn = (slice(None, None, -1),) * x.ndim
    return x[turn].copy()[turn]


def structured(x: Any) -> Any:
    return np.zeros(x.shape, [("a", x.dtype), ("b", "u1")])


# The same values (or, where the values become others, those): these must be taken.
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "backwards": backwards,
    "spaced": spaced,
    "fortran": np.asfortranarray,
    "read only": read_only,
    "broadcast": lambda x: np.broadcast_to(x[..., :1], x.shape),
    "overlapping": overlapping,
    "subclass": lambda x: x.view(Kin),
}
# The same values in another form: taken rightly, or refused.
FORMS: dict[str, Callable[[Any], Any]] = {
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "misaligned": misaligned,
    "int8": lambda x: x.astype(np.int8) if x.dtype.kind == "u" else x.astype(np.longdouble),
    "uint16": lambda x: x.astype(np.uint16) if x.dtype.kind == "u" else x.astype(np.longdouble),
    "complex": lambda x: x.astype(np.complex64),
    "object": lambda x: x.astype(object),
    "list": lambda x: x.tolist(),
    "memoryview": lambda x: memoryview(x),
}
# What has no right answer.
WRONG: dict[str, Callable[[Any], Any]] = {
    "strings": lambda x: x.astype("U3"),
    "bytes": lambda x: x.astype("S3"),
    "structured": structured,
    "dates": lambda x: x.astype(np.int64).view("datetime64[s]"),
    "masked": lambda x: np.ma.masked_array(x, x == x.flat[0]),
    "0-d": lambda x: x.reshape(-1)[0].copy().reshape(()),
    "a string": lambda x: "array",
    "a number": lambda x: 3,
    "a type": lambda x: np.ndarray,
    "a dictionary": lambda x: {"x": x},
    "a generator": lambda x: iter(x),
}
EITHER_SHAPE = {
    "too many axes": lambda x: x.reshape(x.shape + (1,) * 20),
    "one more axis": lambda x: x[None],
    "first axis only": lambda x: x.reshape(len(x), -1)[:, 0],
}


def attempt(operation: Operation, arrays: Any) -> tuple[str, Any]:
    """("taken", arrays) or ("refused", the message); anything else is an exception of the test."""
    try:
        return "taken", flat(operation.call(**arrays))
    except (TypeError, ValueError) as error:
        return "refused", f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        if "does not contain any binary object" not in str(error):  # MedPy's own answer
            raise
        return "refused", f"{type(error).__name__}: {error}"


def complaint(operation: Operation, name: str, message: str) -> str | None:
    """What is wrong with a refusal."""
    text = message.split(": ", 1)[1]
    if "\n" in text:
        return f"a message of several lines: {text!r}"
    names = {name.replace("theta_", "theta."), "spatial_dims", "spatial axes"}
    if "shape" in text or "dimensions" in text:  # of two that differ either may be named
        names |= set(operation.make(np.random.default_rng(0), 1, SIZE))
    if operation.name.startswith("noise."):
        names.add(name.removesuffix("s"))  # dilate and erode say "mask"
    if not any(n in text for n in names) and not operation.name.startswith(OF_TORCH):
        return f"a message that does not name {name}: {text!r}"
    return None


def equal(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape
        and np.allclose(x.astype(float), y.astype(float), rtol=2e-5, atol=2e-6, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def bytes_of(arrays: Any) -> dict[str, bytes]:
    return {k: x.tobytes() for k, x in arrays.items() if isinstance(x, np.ndarray) and not x.dtype.hasobject}


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if not o.torch], ids=ids)
def test_numpy(operation: Operation) -> None:
    plain = operation.make(np.random.default_rng(5), 2, SIZE)
    _, right = attempt(operation, plain)
    problems = []
    for name, x in plain.items():
        for kind, table in (("layout", LAYOUTS), ("form", FORMS), ("wrong", WRONG), ("either", EITHER_SHAPE)):
            for what, change in table.items():
                hostile = change(x)
                given = {**plain, name: hostile}
                before = bytes_of(given)
                where = f"{name}, {what}: "
                try:
                    said, result = attempt(operation, given)
                except Exception as error:
                    problems.append(f"{where}{type(error).__name__}: {error}"[:400])
                    continue
                if before != bytes_of(given):
                    problems.append(where + "an input was written to")
                if said == "refused":
                    wish = "should be taken, but " if kind == "layout" and x.size else ""
                    bad = wish + result if wish else complaint(operation, name, result)
                    problems += [where + bad] if bad else []
                    continue
                if kind == "wrong" and not accepts(operation, name, what):
                    problems.append(where + "is taken")
                if kind in ("layout", "form"):
                    native = {
                        **plain,
                        name: np.ascontiguousarray(hostile).view(np.ndarray) if kind == "layout" else x,
                    }
                    if not equal(result, attempt(operation, native)[1]):
                        problems.append(where + "another answer than that of the native copy")
    assert not problems, "\n".join(problems)
    assert equal(attempt(operation, plain)[1], right)


def accepts(operation: Operation, name: str, what: str) -> bool:
    """Of things that are wrong for most: who takes them, and means it."""
    function = operation.name.split(",")[0].rsplit(".")[-1]
    return (
        (what == "0-d" and function in ("quantile", "topk_threshold", "topk_mask"))
        or (what in ("0-d", "a number") and operation.name.startswith(("compat.scipy", "compat.medpy")))
        or (what in ("0-d", "a number") and function == "dual_task_loss" and name == "labelled")
    )


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if not o.torch], ids=ids)
def test_none(operation: Operation) -> None:
    plain = operation.make(np.random.default_rng(5), 2, SIZE)
    optional = {"weight", "mask", "class_weight", "sites", "raters", "labelled"}
    if operation.name.startswith(("distance.d", "distance.signed", "noise.")):
        optional.discard("mask")
    for name in plain:
        said, result = attempt(operation, {**plain, name: None})
        if name in optional:
            assert said == "taken", result
        else:
            assert said == "refused", f"{name}=None is taken"
            assert complaint(operation, name, result) is None, complaint(operation, name, result)


# ---- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=ids)
def test_zero_size(operation: Operation, kind: str) -> None:
    """The same answer twice, with other memory in between: none is left unwritten."""
    if operation.torch and kind == "numpy":
        pytest.skip("takes torch tensors alone")
    for batch, size in ((0, SIZE), (2, (0, 6)), (2, (5, 0)), (0, (0, 0)), (2, (0,)), (1, (1, 1)), (2, (1,))):
        arrays = operation.make(np.random.default_rng(5), batch, size)
        given = arrays if kind == "numpy" else operations.tensors(arrays)
        answers = []
        for fill in (3.0, -5.0):
            junk = [np.full(n, fill, np.float32) for n in (1, 4, 16, 64, 256, 1024) for _ in range(8)]
            del junk
            try:
                answers.append(attempt(operation, given))
            except Exception as error:
                if not operation.name.startswith(OF_TORCH):
                    raise AssertionError(
                        f"batch {batch}, size {size}: {type(error).__name__}: {error}"
                    ) from error
                answers.append(("refused", f"{type(error).__name__}: of torch"))
        (said, first), (again, second) = answers
        assert said == again
        if said == "taken":
            assert equal(first, second), f"batch {batch}, size {size}: {first} and {second}"
        else:
            assert "\n" not in first, first


# ---- torch -----------------------------------------------------------------------------------------


class Sub(torch.Tensor):
    """As MONAI's MetaTensor."""


def torch_spaced(x: Any) -> Any:
    trap = torch.full([2 * n for n in x.shape], 77 if not x.is_floating_point() else float("nan")).to(x.dtype)
    view = trap[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def inference(x: Any) -> Any:
    with torch.inference_mode():
        return x.clone()


def freed(x: Any) -> Any:
    """As FSDP leaves a parameter between uses."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def fake(x: Any) -> Any:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as DTensor."""

    @staticmethod
    def __new__(cls, x: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError("this tensor computes nothing")


TORCH_LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "spaced": torch_spaced,
    "transposed": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "overlapping": lambda x: x.reshape(-1).repeat(3).as_strided(x.shape, (1,) * x.dim()),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "subclass": lambda x: x.clone().as_subclass(Sub),
    "inference": inference,
    "parameter": lambda x: torch.nn.Parameter(x.clone(), requires_grad=False),
}
TORCH_FORMS: dict[str, Callable[[Any], Any]] = {
    "requires grad": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    "negated view": lambda x: (
        torch.complex(torch.zeros_like(x), -x).conj().imag if x.is_floating_point() else x
    ),
    "int16": lambda x: x.to(torch.int16) if not x.is_floating_point() else x,
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    "float8": lambda x: x.float().to(torch.float8_e4m3fn),
    "list": lambda x: x.tolist(),
    "NumPy": lambda x: x.numpy(),
}
TORCH_WRONG: dict[str, Callable[[Any], Any]] = {
    "meta": lambda x: x.to("meta"),
    "fake": fake,
    "wrapper": Wrapper,
    "freed": freed,
    "nested": lambda x: torch.nested.nested_tensor([x.reshape(-1), x.reshape(-1)[:1]]),
    "0-d": lambda x: x.reshape(-1)[0].clone(),
    "a string": lambda x: "tensor",
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=ids)
def test_torch(operation: Operation) -> None:
    plain = operations.tensors(operation.make(np.random.default_rng(5), 2, SIZE))
    problems = []
    for name, x in plain.items():
        for kind, table in (("layout", TORCH_LAYOUTS), ("form", TORCH_FORMS), ("wrong", TORCH_WRONG)):
            for what, change in table.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    hostile = change(x)
                # What PyTorch or the user's own code computes on memory that is gone is not ours to catch.
                gone = what in ("freed", "fake", "wrapper") and operation.name.startswith(OF_TORCH)
                if gone or hostile is x or (what == "NumPy" and len(plain) == 1):
                    continue
                where = f"{name}, {what}: "
                try:
                    said, result = attempt(operation, {**plain, name: hostile})
                except Exception as error:
                    if not operation.name.startswith(OF_TORCH):
                        problems.append(f"{where}{type(error).__name__}: {error}"[:400])
                    continue
                if said == "refused":
                    wish = "should be taken, but " if kind == "layout" else ""
                    bad = wish + result if wish else complaint(operation, name, result)
                    problems += [where + bad] if bad else []
                    continue
                if (
                    kind == "wrong"
                    and not accepts(operation, name, what)
                    and not operation.name.startswith(OF_TORCH)
                ):
                    problems.append(where + "is taken")
                if kind in ("layout", "form"):
                    native = {
                        **plain,
                        name: x
                        if kind == "form"
                        else hostile.detach()
                        .clone(memory_format=torch.contiguous_format)
                        .as_subclass(torch.Tensor),
                    }
                    if not equal(result, attempt(operation, native)[1]):
                        problems.append(where + "another answer than that of the native copy")
    assert not problems, "\n".join(problems)


# ---- DLPack ----------------------------------------------------------------------------------------


class Export:
    """A producer that shares nothing but DLPack, honest unless told otherwise."""

    def __init__(self, x: Any, shape: Any = None, device: Any = (1, 0), capsule: Any = None) -> None:
        self._x, self.shape, self._device, self._capsule = x, shape or x.shape, device, capsule

    def __dlpack__(self, **options: Any) -> Any:
        return self._x.__dlpack__() if self._capsule is None else self._capsule(self._x)

    def __dlpack_device__(self) -> Any:
        return self._device


def raises(x: Any) -> Any:
    raise RuntimeError("gone")


class Once(Export):
    """The same capsule each time, of which NumPy takes one."""

    def __dlpack__(self, **options: Any) -> Any:
        if self._capsule is None:
            self._capsule = self._x.__dlpack__()
        return self._capsule


def used(x: Any) -> Any:
    liar = Once(x)
    np.from_dlpack(liar)
    return liar


LIARS: dict[str, Callable[[Any], Any]] = {
    "a larger shape": lambda x: Export(x, tuple(2 * n for n in x.shape)),
    "a smaller shape": lambda x: Export(x, tuple(n - 1 for n in x.shape)),
    "another rank": lambda x: Export(x, (*x.shape, 1)),
    "a shape of text": lambda x: Export(x, "ab"),
    "no capsule": lambda x: Export(x, capsule=lambda y: None),
    "another object": lambda x: Export(x, capsule=lambda y: object()),
    "a used capsule": used,
    "an error": lambda x: Export(x, capsule=raises),
    "a strange device": lambda x: Export(x, device=(99, 0)),
    "no device": lambda x: Export(x, device=None),
    "complex": lambda x: Export(x.astype("complex64")),
}


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if not o.torch], ids=ids)
def test_dlpack(operation: Operation) -> None:
    """Honest producers are taken, also with one capsule; liars are refused by name."""
    plain = operation.make(np.random.default_rng(5), 2, SIZE)
    _, right = attempt(operation, plain)
    problems = []
    for kind in (Export, Once):
        try:
            said, result = attempt(operation, {k: kind(x) for k, x in plain.items()})
        except AttributeError:  # they call methods of the array: for arrays that have some
            assert operation.name in ("noise.each_label", "noise.dilate_labels", "noise.calibrate"), (
                operation.name
            )
            continue
        if said == "refused" and kind is Once:
            problems += [] if any(name in result for name in plain) or "mask is" in result else [result]
        elif said == "refused" or not equal(result, right):
            problems.append(f"{kind.__name__}: {result}")
    for name, x in plain.items():
        for what, lie in LIARS.items():
            given = {k: Export(y) for k, y in plain.items()}
            try:
                said, result = attempt(operation, {**given, name: lie(x)})
            except Exception as error:
                problems.append(f"{name}, {what}: {type(error).__name__}: {error}")
                continue
            if said == "taken":
                problems.append(f"{name}, {what}: is taken")
            elif complaint(operation, name, result):
                problems.append(f"{name}, {what}: {complaint(operation, name, result)}")
    assert not problems, "\n".join(problems)


# ---- over 2^31 elements ----------------------------------------------------------------------------

# Arrays of one element repeated: no memory of their own. A result of their size does not fit, and that is said.
HUGE = """
import resource, sys
import numpy as np, torch
import noisyseg_fast as ns
from noisyseg_fast import noise
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
size = (1 << 20, 1 << 22)

def images(dtype, *lead, kind):
    x = np.broadcast_to(np.ones((), dtype), (*lead, *size))
    return x if kind == "numpy" else torch.ones((), dtype=getattr(torch, dtype)).expand(*lead, *size)

def logits(kind): return images("float32", 1, 2, kind=kind)
def labels(kind): return images("uint8", 1, kind=kind)

calls = {
    "distance": lambda k: ns.distance_transform_edt(labels(k), spatial_dims=2),
    "signed": lambda k: ns.signed_distance_map(labels(k), spatial_dims=2),
    "sampled": lambda k: ns.sampled_distance(images("float32", kind=k)),
    "surface": lambda k: ns.surface_metrics(labels(k), labels(k), spatial_dims=2),
    "vote": lambda k: ns.majority_vote(images("uint8", 3, kind=k), spatial_dims=2),
    "staple": lambda k: ns.staple(images("uint8", 3, kind=k), spatial_dims=2),
    "average": lambda k: ns.soft_average(images("float32", 3, kind=k), spatial_dims=2),
    "loss": lambda k: ns.dice_loss(logits(k), labels(k), return_grad=True),
    "map": lambda k: ns.pixel_loss(logits(k), labels(k), reduction="none"),
    "mask": lambda k: ns.topk_mask(images("float32", kind=k), 5),
    "ce_dual": lambda k: ns.ce_dual(logits(k), logits(k), labels(k)),
    "mw_net": lambda k: ns.mw_net(images("float32", 1, kind=k), [images("float32", kind=k)[0, :1]] * 4),
    "noise": lambda k: noise.dilate(labels(k), 2, spatial_dims=2),
    "components": lambda k: noise.connected_components(labels(k), spatial_dims=2),
}
for name, call in calls.items():
    for kind in ("numpy", "torch"):
        try:
            call(kind)
            print(name, kind, "is taken")
        except (MemoryError, ValueError) as error:
            pass
        except RuntimeError as error:
            if "memory" not in str(error):
                print(name, kind, type(error).__name__, error)
        except TypeError as error:
            print(name, kind, error)
print("done")
"""


def test_a_result_that_cannot_fit_is_refused() -> None:
    """2^42 elements; a crash or a loop over them would end the other process."""
    command = [sys.executable, "-X", "faulthandler", "-c", HUGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stdout + done.stderr[-3000:]


@pytest.mark.soak
def test_more_than_2_31_elements() -> None:
    """Reductions over one repeated element, counted in 64 bits."""
    import noisyseg_fast as ns

    size = (2, 1 << 15, (1 << 15) + 64)
    count = int(np.prod(size))
    assert count > 2**31
    one, half = np.broadcast_to(np.uint8(1), size), np.broadcast_to(np.float32(0.5), size)
    assert [int(n) for n in ns.confusion(one, one)] == [count, 0, 0, 0]
    assert ns.quantile(half, 0.5) == 0.5
    assert ns.topk_threshold(half, count) == 0.5
    assert ns.confident_joint(np.broadcast_to(np.float32(0.5), (1, 2, *size)), one[None]).sum() >= count
    loss = ns.pixel_loss(np.broadcast_to(np.float32(0), (1, 2, *size)), one[None])
    assert np.isclose(loss, np.log(2))
    loss = ns.dice_loss(np.broadcast_to(np.float32(0), (1, 1, *size)), one[None], eps=0.0)
    assert np.isclose(loss, 1 - 2 * 0.5 / 1.25)
