"""No operation keeps memory from call to call, and each takes as much as its docstring says."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
import tracemalloc
import warnings
from typing import Any

import numpy as np
import operations
import pytest
from operations import Operation

torch = pytest.importorskip("torch")
pytest.importorskip("monai")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
OPERATIONS = operations.operations()


# ---- growth ----------------------------------------------------------------------------------------


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def in_use() -> int:
    """Bytes that malloc has given out, those of C++, torch and NumPy: exact, as RSS is not."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def call_many(operation: Operation, arrays: Any, calls: int) -> None:
    for _ in range(calls):
        operation.call(**arrays)


def collect() -> None:
    """Also empties the interpreter's cache of attributes: it keeps the names that torch makes anew at every look-up,
    up to 4096 of some 60 bytes, and so grows for thousands of calls."""
    (getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache)()
    gc.collect()


def growth(operation: Operation, arrays: Any, calls: int, traced: int) -> tuple[float, float]:
    """Bytes that remain of each call: of malloc over `calls`, of Python over `traced`."""
    call_many(operation, arrays, max(traced // 2, 20))  # caches fill
    collect()
    before = in_use()
    call_many(operation, arrays, calls)
    collect()
    native = (in_use() - before) / calls
    tracemalloc.start()
    try:
        call_many(operation, arrays, traced // 4)
        collect()
        start = tracemalloc.get_traced_memory()[0]
        call_many(operation, arrays, traced)
        collect()
        python = (tracemalloc.get_traced_memory()[0] - start) / traced
    finally:
        tracemalloc.stop()
    return native, python


SLACK = 1 << 15  # bytes that may stay of all calls together: free lists, of which some grow late


def check_growth(operation: Operation, calls: int, seconds: float) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")
    plain = operation.make(np.random.default_rng(0), 1, (5, 6))
    arrays = operations.tensors(plain) if operation.torch else plain
    operation.call(**arrays)
    start = time.perf_counter()
    operation.call(**arrays)
    each = time.perf_counter() - start
    calls = max(20, int(min(calls, seconds / each)))
    traced = max(10, calls // 10)
    gc.freeze()  # so that a collection need not look at all that the process has imported
    try:
        for _ in range(3):  # an interpreter's or a library's own cache may grow once
            native, python = growth(operation, arrays, calls, traced)
            if native * calls < SLACK and python * traced < SLACK:
                return
    finally:
        gc.unfreeze()
    assert native < 8 and python < 8, (
        f"{native:.1f} bytes of malloc and {python:.1f} of Python stay after each call"
    )


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_nothing_stays(operation: Operation) -> None:
    check_growth(operation, 2000, 0.1)


@pytest.mark.soak
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_nothing_stays_of_many_calls(operation: Operation) -> None:
    check_growth(operation, 100_000, math.inf)


def test_a_leak_is_seen() -> None:
    kept: list[Any] = []
    leak = Operation("leak", lambda r, b, s: {"x": np.zeros(s)}, lambda x: kept.append(x.copy()))
    with pytest.raises(AssertionError, match="stay after each call"):
        check_growth(leak, 2000, 0.15)


# ---- peaks -----------------------------------------------------------------------------------------

# "Extra memory: 4 bytes per voxel", "Extra memory: at most 1 byte per voxel", and "with return_grad as much as logits".
STATED = re.compile(
    r"Extra memory: (?P<bound>at most )?(?P<bytes>[\d.]+) bytes? per \w+(?P<rest>[^\n]*(?:\n[^\n]+)?)"
)
LIKE = re.compile(r"as much as (\w+)(?: and (\w+))?")
PEAK = (768, 1024)
# Other than arrays in and arrays out: networks of the user's, and the drop-ins, which call what is stated here.
UNSTATED = ("meta.", "compat.", "noise.Noise", "metrics.OverlapAccumulator")


def stated(operation: Operation, arrays: Any) -> tuple[float, bool]:
    """(bytes, whether it is a bound) that the docstring names for these arrays."""
    module, function = operation.name.split(",")[0].rsplit(".", 1)
    text = getattr(importlib.import_module(f"noisyseg_fast.{module}"), function).__doc__
    found = STATED.search(text)
    assert found, f"the docstring of {operation.name} does not say how much extra memory it takes"
    pixels = 2 * math.prod(PEAK) if function != "dilate_labels" else math.prod(PEAK)
    like = LIKE.search(found["rest"])
    own = operation.name.endswith(", value")
    if like and not own:
        return sum(arrays[name].nbytes for name in like.groups() if name), False
    return float(found["bytes"]) * pixels, bool(found["bound"])


def filled(operation: Operation) -> Any:
    """The operation's arrays in a size to measure, their masks of large pieces."""
    r = np.random.default_rng(0)
    arrays = operation.make(r, 2, PEAK)
    for name, x in arrays.items():
        if x.dtype == np.uint8 and x.shape[-2:] == PEAK:
            coarse = r.integers(0, 2, (*x.shape[:-2], *(n // 64 for n in PEAK)), np.uint8)
            arrays[name] = coarse.repeat(64, -1).repeat(64, -2)
    return operations.tensors(arrays) if operation.torch else arrays


MEASURED = [
    o
    for o in OPERATIONS
    if not o.name.startswith(UNSTATED) and (", " not in o.name or o.name.endswith(", value"))
]


def peaks_of(operation: Operation) -> list[int | None]:
    from noisyseg_fast import timing

    small = operation.make(np.random.default_rng(0), 2, (16, 16))
    operation.call(**(operations.tensors(small) if operation.torch else small))
    arrays = filled(operation)
    return [timing.peak_extra(lambda: operation.call(**arrays)) for _ in range(5)]


@pytest.fixture(scope="module")
def peaks() -> dict[str, list[int | None]]:
    """Of every operation, from a process of its own: one that has freed large arrays puts others in a heap with gaps,
    whose pages stay."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[int | None]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("operation", MEASURED, ids=lambda o: o.name)
def test_peak_is_as_stated(operation: Operation, peaks: dict[str, list[int | None]]) -> None:
    measured = [peak for peak in peaks[operation.name] if peak is not None]
    if not measured:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    wanted, bound = stated(operation, filled(operation))
    pixels = 2 * math.prod(PEAK)
    least, most = (0 if bound else 0.9 * wanted - 0.15 * pixels), 1.1 * wanted + 0.25 * pixels
    low, high = min(measured), max(measured)  # they vary by when threads hold their part
    found = f"{low / pixels:.2f} to {high / pixels:.2f} bytes per pixel; stated {wanted / pixels:.2f}"
    assert least <= high and low <= most, found


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 2 MB would round each array up
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps({operation.name: peaks_of(operation) for operation in MEASURED}))
