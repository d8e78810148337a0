"""No operation keeps memory from call to call, and each takes as much as its docstring says."""

from __future__ import annotations

import ctypes
import gc
import importlib
import math
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
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
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]  # fmt: skip


def in_use() -> int:
    """Bytes that malloc has given out, those of C++, torch and NumPy: exact, as RSS is not."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def call_many(operation: Operation, arrays: Any, calls: int) -> None:
    for _ in range(calls):
        operation.call(**arrays)


def growth(operation: Operation, arrays: Any, calls: int, traced: int) -> tuple[float, float]:
    """Bytes that remain of each call: of malloc over `calls`, of Python over `traced`."""
    call_many(operation, arrays, max(traced // 2, 20))  # caches fill
    gc.collect()
    before = in_use()
    call_many(operation, arrays, calls)
    gc.collect()
    native = (in_use() - before) / calls
    tracemalloc.start()
    try:
        call_many(operation, arrays, traced // 4)
        gc.collect()
        start = tracemalloc.get_traced_memory()[0]
        call_many(operation, arrays, traced)
        gc.collect()
        python = (tracemalloc.get_traced_memory()[0] - start) / traced
    finally:
        tracemalloc.stop()
    return native, python


def check_growth(operation: Operation, calls: int, seconds: float) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")
    plain = operation.make(np.random.default_rng(0), 1, (5, 6))
    arrays = operations.tensors(plain) if operation.torch else plain
    operation.call(**arrays)
    start = time.perf_counter()
    operation.call(**arrays)
    each = time.perf_counter() - start
    calls = max(20, min(calls, int(seconds / each)))
    traced = max(10, calls // 10)
    for _ in range(3):  # an interpreter's or a library's own cache may grow once
        native, python = growth(operation, arrays, calls, traced)
        if native * calls < 8192 and python * traced < 8192:
            return
    assert native < 8 and python < 8, f"{native:.1f} bytes of malloc and {python:.1f} of Python stay after each call"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_nothing_stays(operation: Operation) -> None:
    check_growth(operation, 2000, 0.15)


@pytest.mark.soak
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_nothing_stays_of_many_calls(operation: Operation) -> None:
    check_growth(operation, 100_000, math.inf)


def test_a_leak_is_seen() -> None:
    kept: list[Any] = []
    leak = Operation("leak", lambda r, b, s: {"x": np.zeros(s)}, lambda x: kept.append(x.copy()))
    with pytest.raises(AssertionError, match="stay after each call"):
        check_growth(leak, 2000, 0.15)
