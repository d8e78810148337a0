#!/usr/bin/env python3
"""Random small arrays into the public operations, NumPy and torch: any shape, strides, byte order, alignment and dtype.

Each call must end as that with contiguous native copies does: the same numbers, or also refused, by a TypeError or
ValueError of one line. What was read is compared with what it was before.

    python scripts/fuzz_arrays.py --executions 1000000 --seed 1
    python scripts/fuzz_arrays.py --atheris --seconds 600       steered by coverage, where atheris is installed
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

with contextlib.ExitStack() as instrumented:
    if "--atheris" in sys.argv:
        import atheris

        instrumented.enter_context(atheris.instrument_imports(include=["noisyseg_fast"]))
    import operations
    from operations import Operation, flat

    operations.operations()  # imports the package's modules

SLOW = (
    "calibrate",
    "simulate_raters",
    "many raters",
    "meta.",
    "compat.monai",
    "compat.torchmetrics",
    "compat.nnunet",
)
KINDS = (
    "uint8",
    "bool",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "uint64",
    "complex64",
    "object",
    "U2",
    "longdouble",
)


def chosen() -> list[Operation]:
    return [o for o in operations.operations() if not any(word in o.name for word in SLOW)]


class Bytes:
    """What is drawn below of numpy.random.Generator, from a fuzzer's bytes, which it can change one by one."""

    def __init__(self, content: bytes) -> None:
        self.left = atheris.FuzzedDataProvider(content)

    def integers(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        return int(self.left.ConsumeIntInRange(low, high - 1))

    def random(self) -> float:
        return float(self.left.ConsumeProbability())

    def choice(self, options: Any, p: Any = None, size: int | None = None) -> Any:
        chosen = [options[self.integers(len(options))] for _ in range(1 if size is None else size)]
        return chosen[0] if size is None else chosen

    def permutation(self, n: int) -> Any:
        return np.argsort([self.integers(256) for _ in range(n)], kind="stable")


Draws = np.random.Generator | Bytes


def laid_out(x: Any, r: Draws) -> Any:
    """The same values with other strides, order, alignment or byte order."""
    kind = r.integers(10)
    if x.ndim == 0 or x.dtype.hasobject:
        return x.copy()
    if kind == 0:
        return np.asfortranarray(x)
    if kind == 1:
        axes = r.permutation(x.ndim)
        return np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))
    if kind in (2, 3):
        steps = [int(r.choice([1, 1, 2, 3, -1, -2])) for _ in x.shape]
        room = np.empty([max(n * abs(s), 1) for n, s in zip(x.shape, steps, strict=True)], x.dtype)
        room.reshape(-1).view(np.uint8)[...] = r.integers(256) if x.dtype != bool else 0
        view = room[tuple(slice(None, None, s) for s in steps)]
        view = view[tuple(slice(0, n) for n in x.shape)]
        view[...] = x
        return view
    if kind == 4:
        x = x.copy()
        x.flags.writeable = False
        return x
    if kind == 5 and x.dtype.kind in "uif":
        return x.astype(x.dtype.newbyteorder(">"))
    if kind == 6 and not x.dtype.hasobject:
        room = np.zeros(x.nbytes + 8, np.uint8)
        at = int(r.integers(1, 8))
        room[at : at + x.nbytes] = np.frombuffer(x.tobytes(), np.uint8)
        return np.frombuffer(room.data, x.dtype, x.size, offset=at).reshape(x.shape)
    return x


def reshaped(x: Any, r: Draws) -> Any:
    """Another shape, mostly wrong."""
    kind = r.integers(6)
    if kind == 0:
        return x[None]
    if kind == 1 and x.ndim:
        return x[..., 0] if x.shape[-1] else x.reshape(-1)
    if kind == 2:
        return x.reshape(-1)
    if kind == 3 and x.ndim:
        return x[:0]
    if kind == 4 and x.ndim:
        return np.concatenate([x, x])
    return x[(..., *[None] * int(r.integers(1, 6)))]


def answer(operation: Operation, arrays: Any) -> tuple[str, Any]:
    try:
        return "taken", flat(operation.call(**arrays))
    except (TypeError, ValueError) as error:
        return "refused", str(error)
    except RuntimeError as error:  # MedPy's answer, and PyTorch's own, which norm_act leaves to it
        if "binary object" not in str(error) and not operation.name.startswith("dual_norms"):
            raise
        return "refused", str(error).split("\n")[0]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape
        and np.allclose(
            np.asarray(x, float),
            np.asarray(y, float),
            rtol=1e-3 if x.dtype == np.float16 else 3e-5,
            atol=1e-5,
            equal_nan=True,
        )
        for x, y in zip(a, b, strict=True)
    )


def execute(operation: Operation, r: Draws, values: np.random.Generator, counts: Counter[str]) -> None:
    """One draw, r, its arrays' values, and its two calls; AssertionError for what must not be."""
    batch = int(r.choice([0, 1, 2, 3], p=[0.05, 0.35, 0.4, 0.2]))
    size = tuple(
        int(n)
        for n in r.choice([0, 1, 2, 3, 4, 6], p=[0.03, 0.17, 0.2, 0.2, 0.2, 0.2], size=r.integers(1, 4))
    )
    plain = operation.make(values, batch, size)
    for name in plain:
        spoil = r.random()
        if spoil < 0.06:
            kind = str(r.choice(KINDS))
            with np.errstate(all="ignore"):
                plain[name] = plain[name].astype(kind)
        elif spoil < 0.12:
            plain[name] = reshaped(plain[name], r)
        elif spoil < 0.15 and plain[name].dtype.kind == "f" and plain[name].size:
            plain[name].flat[r.integers(plain[name].size)] = r.choice([np.nan, np.inf, -np.inf, 1e30])
    given: dict[str, Any] = {name: laid_out(x, r) for name, x in plain.items()}
    before = {name: x.tobytes() for name, x in given.items() if not x.dtype.hasobject}
    swapped = any(not x.dtype.isnative or not x.flags.aligned for x in given.values())
    torch_too = operation.torch or r.random() < 0.4
    if torch_too:
        import torch

        try:
            native: Any = {name: torch.from_numpy(np.array(x, order="C")) for name, x in plain.items()}
            given = {
                name: torch.from_numpy(
                    x if all(s >= 0 for s in x.strides) and x.flags.writeable else x.copy()
                )
                if x.dtype.isnative and x.flags.aligned
                else native[name]
                for name, x in given.items()
            }
        except TypeError:  # a dtype that torch has not
            counts["no torch dtype"] += 1
            return
        swapped = False
    else:
        native = {name: np.array(x, order="C") for name, x in plain.items()}
    said, result = answer(operation, given)
    right, expected = answer(operation, native)
    counts[said] += 1
    if said == "refused":
        assert "\n" not in result, f"a message of several lines: {result}"
        assert right == "refused" or swapped or "separate" in result, f"only the strides differ: {result}"
    elif right == "refused":
        raise AssertionError(f"taken, though of contiguous copies: {expected}")
    else:
        assert same(result, expected), f"{result} and {expected}"
    if not torch_too:
        assert before == {n: x.tobytes() for n, x in given.items() if not x.dtype.hasobject}, (
            "an input was written to"
        )


def execute_draw(operation: Operation, seed: int, index: int, counts: Counter[str]) -> None:
    r = np.random.default_rng([seed, index])
    execute(operation, r, r, counts)


def by_atheris(every: list[Operation], executions: int, seconds: float) -> None:
    """Does not return: libFuzzer ends the process."""
    counts: Counter[str] = Counter()

    def one(content: bytes) -> None:
        r = Bytes(content)
        operation, values = every[r.integers(len(every))], np.random.default_rng(r.integers(1 << 16))
        execute(operation, r, values, counts)

    options = [f"-runs={executions}", f"-max_total_time={int(seconds)}", "-max_len=256", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=4096"], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--executions", type=int, default=1_000_000, help="draws")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first draw, to repeat one")
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="with --atheris, at most")
    parser.add_argument("--only", default="", help="operations whose name holds this")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    import torch

    torch.set_num_threads(1)
    every = [o for o in chosen() if options.only in o.name]
    if options.atheris:
        by_atheris(every, options.executions, options.seconds)
    counts: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    start = time.perf_counter()
    for index in range(options.first, options.first + options.executions):
        operation = every[index % len(every)]
        try:
            execute_draw(operation, options.seed, index, counts)
        except Exception as error:
            failed[operation.name] += 1
            if failed[operation.name] <= 3:
                text = " ".join(f"{type(error).__name__}: {error}".split())[:600]
                print(f"draw {index}, {operation.name}: {text}", flush=True)
        if (index + 1) % 50_000 == 0:
            took = time.perf_counter() - start
            print(f"{index + 1} draws, {dict(counts)}, {failed.total()} failed, {took:.0f} s", flush=True)
    made = f"{options.executions} draws of {len(every)} operations from seed {options.seed}"
    print(f"{made}: {dict(counts)}, {failed.total()} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
