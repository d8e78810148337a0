"""Times operations against their peers: what the demo's table and the benchmark suite (bench/) measure with.

A `Case` is one operation on one input, with its contenders: ours first. `measure` checks every contender's
answer against the case's oracle, then runs them in turn, so that all see the same state of the machine.
A contender that answers wrongly is reported as wrong and not timed; one that is missing is named.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from . import reference

OURS = "ours"
COPY = "copy"  # a plain copy that moves as many bytes as the operation must: the floor of its time


@dataclass(frozen=True)
class Contender:
    """make() imports and prepares, and returns the call to time; ImportError means "not installed"."""

    name: str
    make: Callable[[], Callable[[], Any]]
    exact: bool = True  # False: defines the quantity otherwise, so its answer is not compared


@dataclass(frozen=True)
class Case:
    """One operation on one input.

    oracle() gives the right answer: an array, a number, or a tuple of them, as the contenders give it.
    A contender is right when max |answer - oracle| <= tolerance * max |oracle|, with NaN equal to NaN.
    moved: the bytes that must be read and written at least. device: "cpu" or "cuda", where it runs.
    """

    family: str
    operation: str
    input: str
    contenders: Sequence[Contender]
    oracle: Callable[[], Any]
    tolerance: float
    moved: int
    device: str = "cpu"


@dataclass
class Timing:
    """One contender's result; note says what is wrong unless state is "ok". Times in seconds, memory in bytes."""

    state: str  # "ok", "wrong", "missing", "failed"
    note: str = ""
    error: float | None = None  # relative to the oracle
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    runs: int = 0
    extra: int | None = None  # peak memory beyond the inputs during one call, the result included


@dataclass
class Measurement:
    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)

    def speedup(self, name: str) -> float | None:
        """How many times faster ours is than `name`."""
        ours, other = self.timings[OURS].p50, self.timings[name].p50
        return other / ours if ours and other else None

    def of_copy(self) -> float | None:
        """The fraction of the copy bandwidth that ours reaches."""
        ours, copy = self.timings[OURS].p50, self.timings[COPY].p50
        return copy / ours if ours and copy else None


# ---- measuring ------------------------------------------------------------------------------------


def measure(case: Case, seconds: float = 2.0, memory: bool = True) -> Measurement:
    """Check, then time all contenders of a case in turn, about `seconds` in all; at least one run of each."""
    result = Measurement(case)
    expected = case.oracle()
    calls: dict[str, Callable[[], Any]] = {}
    cost: dict[str, float] = {}
    for contender in [*case.contenders, Contender(COPY, partial(_copy, case.moved, case.device), exact=False)]:
        try:
            call = contender.make()
            call_, start = call(), time.perf_counter()
            del call_
            call_ = call()
            _wait(case.device)
            cost[contender.name] = time.perf_counter() - start
            error = _error(call_, expected) if contender.exact else None
            del call_
            extra = peak_extra(call, case.device) if memory else None
        except ImportError as missing:
            result.timings[contender.name] = Timing("missing", f"{missing.name or missing} is not installed")
            continue
        except Exception as failure:  # a peer's failure is a result too
            text = " ".join(str(failure).split())
            result.timings[contender.name] = Timing("failed", f"{type(failure).__name__}: {text}"[:200])
            continue
        good = error is None or error <= case.tolerance
        note = "" if good else f"answer off by {error:.2g} relative, allowed is {case.tolerance:.2g}"
        result.timings[contender.name] = Timing("ok" if good else "wrong", note, error, extra=extra)
        if good:
            calls[contender.name] = call
    for name, times in _alternate(calls, cost, seconds, case.device).items():
        timing = result.timings[name]
        timing.p20, timing.p50, timing.p80 = (float(np.percentile(times, p)) for p in (20, 50, 80))
        timing.runs = len(times)
    return result


def _alternate(
    calls: dict[str, Callable[[], Any]], cost: dict[str, float], seconds: float, device: str
) -> dict[str, list[float]]:
    """Seconds per call of each contender, run in turn; a contender stops when its share of time is used up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    # Quick calls are timed in groups of about half a millisecond, well above the clock's own cost.
    group = {name: max(1, math.ceil(5e-4 / max(cost[name], 1e-7))) for name in calls}
    share = seconds / max(len(calls), 1)
    for turn in itertools.count():
        names = [n for n in calls if not times[n] or (spent[n] + cost[n] < share and len(times[n]) < 300)]
        if not names:
            return times
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            elapsed = _elapsed(calls[name], group[name], device)
            spent[name] += elapsed
            times[name].append(elapsed / group[name])
    raise AssertionError


def _elapsed(call: Callable[[], Any], repeats: int, device: str) -> float:
    if device == "cuda":
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _copy(moved: int, device: str) -> Callable[[], Any]:
    import torch

    source = torch.ones(max(moved // 8, 1), device=device)
    target = torch.empty_like(source)
    return partial(target.copy_, source)


def peak_extra(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Peak memory in bytes that one call takes beyond what was in use before it; None where unknown.

    CPU: the growth of the process's resident peak (Linux). CUDA: of torch's allocator.
    """
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for later would hide growth
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM
        before = _status("VmRSS")
        result = call()
        del result
        return max(_status("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def _arrays(x: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(x, (tuple, list)):
        return [a for item in x for a in _arrays(item)]
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    elif hasattr(x, "get"):  # CuPy
        x = x.get()
    return [np.asarray(x, np.float64)]


def _error(answer: Any, expected: Any) -> float:
    """max |answer - expected| / max |expected|, the largest of the arrays; inf for a wrong shape."""
    got, want = _arrays(answer), _arrays(expected)
    if len(got) != len(want):
        return math.inf
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.size != b.size or not np.array_equal(np.isfinite(a.ravel()), np.isfinite(b.ravel())):
            return math.inf
        a, b = (x.ravel()[np.isfinite(b.ravel())] for x in (a, b))
        if b.size:
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(float).tiny)))
    return worst


# ---- inputs ---------------------------------------------------------------------------------------


def blobs(shape: Sequence[int], seed: int = 0, share: float = 0.3) -> np.ndarray[Any, Any]:
    """Smooth random masks, uint8: shape (B, *S); about `share` of the pixels are 1.

    A random field on a grid of about a sixth of the extent, interpolated linearly, cut at its quantile.
    """
    batch, *spatial = shape
    field_ = np.random.default_rng(seed).standard_normal((batch, *(max(3, n // 12) for n in spatial)), np.float32)
    for axis, n in enumerate(spatial, start=1):
        place = np.linspace(0, field_.shape[axis] - 1, n)
        low = np.minimum(place.astype(int), field_.shape[axis] - 2)
        t = (place - low).astype(np.float32).reshape((-1,) + (1,) * (field_.ndim - 1 - axis))
        field_ = np.take(field_, low, axis) * (1 - t) + np.take(field_, low + 1, axis) * t
    threshold = np.quantile(field_.reshape(-1)[:: max(1, field_.size // 1_000_000)], 1 - share)
    return (field_ > threshold).astype(np.uint8)


# ---- losses ---------------------------------------------------------------------------------------


def value_and_grad(function: Callable[..., Any], logits: Any, *args: Any) -> Callable[[], Any]:
    """A call that gives (loss, d loss / d logits)."""
    import torch

    def call() -> Any:
        loss = function(logits, *args)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for these shapes alone."""
    import torch

    result: Callable[..., Any] = torch.compile(function, dynamic=False)
    return result


def loss_contenders(
    ours: Callable[..., Any], plain: Callable[..., Any], logits: Any, *args: Any
) -> list[Contender]:
    """Ours, and `plain`, the same in PyTorch, eager and compiled: forward and backward."""
    return [
        Contender(OURS, lambda: value_and_grad(ours, logits, *args)),
        Contender("eager", lambda: value_and_grad(plain, logits, *args)),
        Contender("torch.compile", lambda: value_and_grad(compiled(plain), logits, *args)),
    ]


def nr_dice_case(shape: Sequence[int], device: str = "cpu") -> Case:
    """nr_dice_loss forward + backward; logits (B, 1, *S) float32, labels (B, *S) uint8."""
    import torch

    from . import losses

    batch, _, *spatial = shape
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(*shape, generator=generator)).to(device).requires_grad_()
    target = torch.from_numpy(blobs((batch, *spatial))).to(device)
    return Case(
        family="losses",
        operation="NR-Dice, forward + backward",
        input="x".join(map(str, shape)),
        contenders=loss_contenders(losses.nr_dice_loss, reference.nr_dice_loss, logits, target),
        oracle=_in_double(reference.nr_dice_loss, logits, target),
        tolerance=1e-5,
        moved=logits.numel() * (2 * (4 + 1) + 4),  # logits and labels twice, the gradient once
        device=device,
    )


def weighted_ce_case(shape: Sequence[int], device: str = "cpu") -> Case:
    """pixel_loss forward + backward; logits (B, C, *S) float32, labels uint8, a weight for each pixel."""
    import torch

    from . import losses

    batch, classes, *spatial = shape
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(*shape, generator=generator)).to(device).requires_grad_()
    target = torch.randint(0, classes, (batch, *spatial), generator=generator, dtype=torch.uint8).to(device)
    weight = torch.rand(batch, *spatial, generator=generator).to(device)
    pixels = weight.numel()
    return Case(
        family="losses",
        operation="weighted CE, forward + backward",
        input="x".join(map(str, shape)),
        contenders=loss_contenders(_weighted(losses.pixel_loss), torch_weighted_ce, logits, target, weight),
        oracle=_in_double(_weighted(reference.pixel_loss), logits, target, weight),
        tolerance=1e-5,
        moved=logits.numel() * 3 * 4 + pixels * 2 * (1 + 4),  # logits twice, gradient; labels and weights twice
        device=device,
    )


def torch_weighted_ce(logits: Any, target: Any, weight: Any) -> Any:
    """As one writes it in PyTorch."""
    from torch.nn.functional import cross_entropy

    return (weight * cross_entropy(logits, target.long(), reduction="none")).mean()


def _weighted(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, target, weight: function(logits, target, weight=weight)


def _in_double(function: Callable[..., Any], logits: Any, *args: Any) -> Callable[[], Any]:
    """The oracle: the reference in float64."""
    wide = logits.detach().double().requires_grad_()
    return value_and_grad(function, wide, *(a.double() if a.is_floating_point() else a for a in args))


# ---- the demo's table -----------------------------------------------------------------------------


def demo_table(budget_s: float = 40.0) -> list[dict[str, str]]:
    """A small table of times on this machine: one row for each operation, one text for each contender.

    It takes about budget_s seconds, of which torch.compile needs the most.
    """
    cases = [
        partial(nr_dice_case, (4, 1, 112, 112, 80)),
        partial(nr_dice_case, (128, 1, 64, 64)),
        partial(weighted_ce_case, (4, 4, 112, 112, 20)),
    ]
    return [row(measure(make(), budget_s / 3 / len(cases), memory=False)) for make in cases]


def row(measured: Measurement) -> dict[str, str]:
    """One line of text for each contender: its time, and how many times faster ours is."""
    result = {"operation": measured.case.operation, "input": measured.case.input}
    for name, timing in measured.timings.items():
        if name == COPY:
            continue
        if timing.p50 is None:
            result[name] = "not installed" if timing.state == "missing" else f"{timing.state}: {timing.note}"
        else:
            faster = measured.speedup(name) if name != OURS else None
            result[name] = duration(timing.p50) + (f" ({faster:.1f}x)" if faster else "")
    return result


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Print `demo_table`'s rows with Rich."""
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for line in rows for name in line))
    table = Table(title="Time on this machine, and how many times faster ours is")
    for name in columns:
        table.add_column(name, justify="left" if name in ("operation", "input") else "right")
    for line in rows:
        table.add_row(*(line.get(name, "") for name in columns))
    Console().print(table)
