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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np

OURS = "ours"
AT_ONCE = "ours, return_grad"
COMPILED = "torch.compile"
LATER = "--all runs it"  # ends the note of what was left out for want of time
COPY = "copy"  # a plain copy that moves as many bytes as the operation must: the floor of its time

Call = Callable[[], Any]


# ---- comparing answers ----------------------------------------------------------------------------


def relative_error(answer: Any, expected: Any) -> float:
    """max |answer - expected| / max |expected|, the largest over a tuple's arrays.

    inf for a wrong number of elements or where infinities and NaN do not stand in the same places.
    """
    got, want = _arrays(answer), _arrays(expected)
    if len(got) != len(want) or any(a.size != b.size for a, b in zip(got, want, strict=True)):
        return math.inf
    return max(map(_array_error, got, want))


def _array_error(answer: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    off, scale, step = 0.0, 0.0, 1 << 22
    a, b = answer.ravel(), expected.ravel()
    for i in range(0, b.size, step):  # in pieces: volumes of hundreds of MB come by here
        x, y = a[i : i + step].astype(np.float64), b[i : i + step].astype(np.float64)
        finite = np.isfinite(y)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(x[finite]).all():
            return math.inf
        off = max(off, float(np.abs(x[finite] - y[finite]).max(initial=0)))
        scale = max(scale, float(np.abs(y[finite]).max(initial=0)))
    return off / scale if scale else off


def _arrays(x: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(x, (tuple, list)):
        return [a for item in x for a in _arrays(item)]
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    elif hasattr(x, "get"):  # CuPy
        x = x.get()
    return [np.asarray(x)]


# ---- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """make() imports and prepares, and returns the call to time; ImportError means "not installed".

    error(answer, oracle's answer): how wrong it is; None where the peer defines the quantity otherwise.
    """

    name: str
    make: Callable[[], Call]
    error: Callable[[Any, Any], float] | None = relative_error


@dataclass(frozen=True)
class Case:
    """One operation on one input.

    oracle: gives the right answer, or names the contender whose answer is right. tolerance: the relative
    error allowed. moved: the bytes that must be read and written at least. work: how many exponentials, square roots
    and divisions must be made at least. autograd: whether a call is a forward and a backward. fresh: bytes of the
    result in memory that is new to the process at each call. device: "cpu" or "cuda".
    headline: one of the few cases to draw. baseline: a contender that ours is more than, whose time ours is given in.
    """

    family: str
    operation: str
    input: str
    contenders: Sequence[Contender]
    oracle: Call | str
    tolerance: float
    moved: int
    device: str = "cpu"
    headline: bool = False
    baseline: str | None = None
    work: Mapping[str, float] = field(default_factory=dict)
    autograd: bool = False
    fresh: int = 0


@dataclass
class Timing:
    """One contender's result; note says why it was not timed. Times in seconds for one call."""

    state: str  # "ok", "wrong", "missing", "skipped", "failed"
    note: str = ""
    error: float | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    runs: int = 0
    extra: int | None = None  # peak bytes beyond the inputs during a call, the result included
    launches: int | None = None  # CUDA kernels of a call
    about: float | None = None  # seconds of a call in an earlier run, where it was skipped for that


@dataclass
class Measurement:
    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)  # in the order of the contenders, the copy last
    took: float = 0.0  # seconds of the whole measurement: imports, compilations, checks and runs
    compiling: float | None = None  # of that, torch.compile's
    floor_s: float | None = None  # no implementation on this machine can be quicker
    floor_kind: str = ""  # what says so: "copy", "copy, new pages", "arithmetic" or "autograd"

    def speedup(self, name: str) -> float | None:
        """How many times faster ours is than `name`."""
        ours, other = self.timings[OURS].p50, self.timings[name].p50
        return other / ours if ours and other else None

    def of_copy(self) -> float | None:
        """The fraction of the copy bandwidth, at this number of bytes and in this run, that ours reaches."""
        ours, copy = self.timings[OURS].p50, self.timings[COPY].p50
        return copy / ours if ours and copy else None


class Skipped(Exception):
    """Raised by Contender.make when there is no time for it."""


# ---- floors ---------------------------------------------------------------------------------------


@cache
def unit_rates(device: str) -> dict[str, float]:
    """Exponentials, square roots and divisions a second, of float32 in the cache, on all threads: PyTorch's vectorised
    ones, in place on 2^16 numbers a thread (2^24 on a GPU). The best of many runs."""
    import torch

    n = 1 << 24 if device == "cuda" else (1 << 16) * threads()
    x = torch.full((n,), 0.5, device=device)
    out, ones = torch.empty_like(x), torch.ones_like(x)
    calls: dict[str, Call] = {
        "exp": partial(torch.exp, x, out=out),
        "sqrt": partial(torch.sqrt, x, out=out),
        "div": partial(torch.div, ones, x, out=out),
    }
    return {name: n / min(_elapsed(call, 20, device) / 20 for _ in range(15)) for name, call in calls.items()}


@cache
def autograd_floor(device: str) -> float:
    """Seconds of a forward and a backward through an autograd.Function that computes nothing, in PyTorch's own Python:
    the best of many runs."""
    import torch

    x = torch.zeros(2, 4096, device=device, requires_grad=True)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.new_empty(())

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return torch.empty_like(x)

    apply: Any = Nothing.apply

    def call() -> Any:
        return torch.autograd.grad(apply(x), x)

    return min(_elapsed(call, 50, device) / 50 for _ in range(20))


MAPPED = 1 << 25  # malloc hands memory of this size back to the system, and new pages come at each call


@cache
def new_pages() -> float:
    """Seconds a byte that writing to new memory takes longer than writing to it again: the system clears each page.
    With huge pages, as our results ask for; the best of several runs on 128 MB."""
    import torch

    from . import _arrays

    like = torch.empty(1 << 25)
    space, best = _arrays.of(x=like), math.inf
    for _ in range(5):
        begin = time.perf_counter()
        x = space.empty_like(like).fill_(1.0)
        middle = time.perf_counter()
        x.fill_(2.0)
        best = min(best, 2 * middle - begin - time.perf_counter())
        del x
    return max(best, 0.0) / like.nbytes


def _floor(measured: Measurement) -> None:
    """The longest of: a copy of the bytes, into new memory where the result is large, the arithmetic at the units'
    rates, PyTorch's own cost of the call."""
    case, copy = measured.case, measured.timings[COPY].p50
    floors = {"copy": copy} if copy else {}
    if copy and case.device == "cpu" and case.fresh >= MAPPED:
        floors["copy, new pages"] = copy + case.fresh * new_pages()
    if case.work:
        rates = unit_rates(case.device)
        floors["arithmetic"] = sum(n / rates[name] for name, n in case.work.items())
    if case.autograd:
        floors["autograd"] = autograd_floor(case.device)
    if floors:
        measured.floor_kind = max(floors, key=lambda k: floors[k])
        measured.floor_s = floors[measured.floor_kind]


# ---- measuring ------------------------------------------------------------------------------------


def measure(
    case: Case,
    seconds: float = 2.0,
    slow: float = 8.0,
    skip: Mapping[str, tuple[str, float]] | None = None,
    budget: float = math.inf,
    compiling: float = 0.0,
) -> Measurement:
    """Check all contenders of a case, then time the right ones in turn, for about `seconds` in all.

    A call that takes longer than `slow` seconds is made once, and that run counts. skip: contenders to leave out,
    why, and about how many seconds a call of theirs takes; never ours nor the oracle.
    budget: seconds for all of it. Once they are over, no further peer is begun; torch.compile not either unless
    `compiling` seconds are left for it. A peer of which five calls would take more than an equal share is not run
    in turn: its second call counts. So only what had begun, ours and the oracle can take it beyond the budget.
    """
    begin, skip = time.perf_counter(), skip or {}
    end = begin + budget
    contenders = [*case.contenders, Contender(COPY, partial(_copy, case.moved, case.device), error=None)]
    result = Measurement(case, {c.name: Timing("failed") for c in contenders})
    expected = None if isinstance(case.oracle, str) else case.oracle()
    calls: dict[str, Call] = {}
    cost: dict[str, float] = {}
    order = (case.oracle, OURS, COPY)
    for contender in sorted(contenders, key=lambda c: order.index(c.name) if c.name in order else len(order)):
        name, start = contender.name, time.perf_counter()
        try:
            if name in skip and name not in (OURS, case.oracle):
                raise Skipped(skip[name][0])
            if name == COMPILED and start + compiling > end:
                raise Skipped(f"no time left to compile; {LATER}")
            call = contender.make()  # without time, too: what is not installed is named
            if time.perf_counter() > end and name not in (*order, COMPILED):
                raise Skipped(f"no time left in this run; {LATER}")
            answer, cost[name], extra = _first(call, case.device)
            if name == COMPILED:
                result.compiling = time.perf_counter() - start
            if name == case.oracle:
                expected = answer
            if contender.error and expected is None:
                raise Skipped(f"no {case.oracle} to check the answer against")
            error = contender.error(answer, expected) if contender.error else None
            del answer
            if cost[name] < slow:  # again, now warm
                answer, cost[name], extra = _first(call, case.device)
                del answer
            good = error is None or error <= case.tolerance
            note = "" if good else f"off by {error:.1g} of the largest value, allowed {case.tolerance:.1g}"
            result.timings[name] = Timing("ok" if good else "wrong", note, error, extra=extra)
            if good:
                calls[name] = call
                result.timings[name].launches = _launches(call, case.device)
        except ImportError as missing:
            result.timings[name] = Timing("missing", f"{missing.name or missing} is not installed")
        except Skipped as reason:
            about = skip[name][1] if name in skip else 0.0
            result.timings[name] = Timing("skipped", str(reason), about=about or None)
        except Exception as failure:  # a peer's failure is a result too
            result.timings[name] = Timing("failed", _why(failure))
    once = min(slow, budget / (5 * len(contenders)))
    times = {n: [cost[n]] for n in calls if cost[n] >= (slow if n == OURS else once)}
    seconds = max(min(seconds, end - time.perf_counter()), 0.0)
    times |= _alternate({n: c for n, c in calls.items() if n not in times}, cost, seconds, case.device)
    for name, of_name in times.items():
        timing = result.timings[name]
        timing.p20, timing.p50, timing.p80 = (float(np.percentile(of_name, p)) for p in (20, 50, 80))
        timing.runs = len(of_name)
    _floor(result)
    result.took = time.perf_counter() - begin
    return result


def _why(failure: Exception) -> str:
    text = " ".join(str(failure).split())
    if "C++ compiler" in text or "InvalidCxxCompiler" in text:
        return "no C++ compiler"
    return f"{type(failure).__name__}: {text}"[:160]


def _first(call: Call, device: str) -> tuple[Any, float, int | None]:
    """Answer, seconds and peak extra memory of one call."""
    answer: list[Any] = []
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = time.perf_counter()
        answer.append(call())
        _wait(device)
        seconds = time.perf_counter() - start

    extra = peak_extra(timed, device)
    return answer[0], seconds, extra


def _alternate(
    calls: dict[str, Call], cost: dict[str, float], seconds: float, device: str
) -> dict[str, list[float]]:
    """Seconds per call of each contender: three runs in turn at least, then until its share is used up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    # Quick calls are timed in groups of about half a millisecond, far above the clock's own cost.
    group = {name: max(1, math.ceil(5e-4 / max(cost[name], 1e-7))) for name in calls}
    share = seconds / max(len(calls), 1)
    for turn in itertools.count():
        names = [n for n in calls if len(times[n]) < 3 or (spent[n] < share and len(times[n]) < 300)]
        if not names:
            break
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            elapsed = _elapsed(calls[name], group[name], device)
            spent[name] += elapsed
            times[name].append(elapsed / group[name])
    return times


def _elapsed(call: Call, repeats: int, device: str) -> float:
    if device == "cuda":
        import torch

        cuda: Any = torch.cuda
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
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


def _launches(call: Call, device: str) -> int | None:
    if device != "cuda":
        return None
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() or () if str(e.device_type).endswith("CUDA")]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)


def _copy(moved: int, device: str) -> Call:
    import torch

    source = torch.ones(max(moved // 8, 1), device=device)
    target = torch.zeros_like(source)
    return partial(target.copy_, source)


def peak_extra(call: Call, device: str = "cpu") -> int | None:
    """Peak memory in bytes that a call takes beyond what was in use before it; None where unknown.

    CPU: growth of the process's resident peak (Linux). CUDA: of torch's allocator, so CuPy's is not seen.
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
            file.write("5")  # VmHWM, the peak, starts again
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        call()
        return None
    call()
    return max(_resident("VmHWM") - before, 0)


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


# ---- inputs ---------------------------------------------------------------------------------------


def blobs(shape: Sequence[int], seed: int = 0, share: float = 0.3) -> np.ndarray[Any, Any]:
    """Smooth random masks (B, *S), uint8; about `share` of the pixels are 1.

    A random field on a grid with a twelfth of the pixels along each axis, interpolated, cut at its quantile.
    """
    batch, *spatial = shape
    random = np.random.default_rng(seed)
    noise = random.standard_normal((batch, *(max(3, n // 12) for n in spatial)), np.float32)
    for axis, n in enumerate(spatial, start=1):
        place = np.linspace(0, noise.shape[axis] - 1, n)
        low = np.minimum(place.astype(int), noise.shape[axis] - 2)
        t = (place - low).astype(np.float32).reshape((-1,) + (1,) * (noise.ndim - 1 - axis))
        noise = np.take(noise, low, axis) * (1 - t) + np.take(noise, low + 1, axis) * t
    sample = noise.reshape(-1)[:: max(1, noise.size // 1_000_000)]
    return (noise > np.quantile(sample, 1 - share)).astype(np.uint8)


def _name(shape: Sequence[object]) -> str:
    return "x".join(map(str, shape))


# ---- losses ---------------------------------------------------------------------------------------


def value_and_grad(function: Callable[..., Any], logits: Any, *args: Any) -> Call:
    """A call that gives (loss, d loss / d logits)."""
    import torch

    def call() -> Any:
        loss = function(logits, *args)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    return call


@cache
def _for_all_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    return torch.compile(function, dynamic=True)


def compiled(
    function: Callable[..., Any],
    prepare: Callable[[Callable[..., Any]], Call],
    deadline: float = math.inf,
    shared: bool = False,
) -> Contender:
    """prepare(torch.compile(function)), compiled before timing; skipped if time.perf_counter() > deadline.

    shared: one compilation for all shapes, for the sweeps."""

    def make() -> Call:
        import torch

        if time.perf_counter() > deadline:
            raise Skipped("no time left to compile")
        if shared:
            call = prepare(_for_all_shapes(function))
        else:
            torch._dynamo.reset()  # otherwise the ninth shape silently runs eagerly
            call = prepare(torch.compile(function, dynamic=False))
        call()
        return call

    return Contender(COMPILED, make)


def loss_contenders(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    logits: Any,
    *args: Any,
    deadline: float = math.inf,
    shared: bool = False,
) -> list[Contender]:
    """Forward and backward of ours and of `plain`, which is the same as one writes it in PyTorch; of few logits also
    ours without autograd, whose own calls take most of the time there."""

    def prepare(function: Callable[..., Any]) -> Call:
        return value_and_grad(function, logits, *args)

    contenders = [
        Contender(OURS, partial(prepare, ours)),
        Contender("eager", partial(prepare, plain)),
        compiled(plain, prepare, deadline, shared),
    ]
    if logits.numel() <= 4096:
        at_once = partial(ours, logits.detach(), *args, return_grad=True)
        contenders.append(Contender(AT_ONCE, lambda: at_once))
    return contenders


def random_logits(shape: Sequence[int], device: str) -> Any:
    import torch

    random = torch.Generator().manual_seed(0)
    return (2 * torch.randn(*shape, generator=random)).to(device).requires_grad_()


def in_double(function: Callable[..., Any], logits: Any, *args: Any) -> Call:
    """The oracle of a loss: the reference in float64."""
    wide = logits.detach().double().requires_grad_()
    return value_and_grad(function, wide, *(a.double() if a.is_floating_point() else a for a in args))


def torch_nr_dice(logits: Any, target: Any) -> Any:
    """nr_dice_loss for labels as one writes it in PyTorch: quicker than the reference, which has weights."""
    from torch.nn.functional import one_hot

    p, channels = logits.sigmoid(), logits.shape[1]
    g = target.unsqueeze(1) if channels == 1 else one_hot(target.long(), channels).movedim(-1, 1)
    g = g.to(p.dtype)
    return torch_nr_dice_of(p, g, lambda x: x.flatten(2).sum(2)).mean()


def torch_nr_dice_of(
    p: Any, g: Any, total: Callable[..., Any], gamma: float = 1.5, denominator: str = "squared"
) -> Any:
    """Of each image and class, for probabilities p and targets g (B, C, *S); total sums maps over pixels."""
    size = p + g if denominator == "linear" else p**2 + g**2
    return total((p - g).abs() ** gamma) / (total(size) + 1e-5)


def torch_weighted_ce(logits: Any, target: Any, weight: Any) -> Any:
    """Cross-entropy times a weight for each pixel, as one writes it in PyTorch."""
    from torch.nn.functional import cross_entropy

    return (weight * cross_entropy(logits, target.long(), reduction="none")).mean()


def nr_dice_case(
    shape: Sequence[int],
    device: str = "cpu",
    *,
    deadline: float = math.inf,
    headline: bool = False,
    shared: bool = False,
) -> Case:
    """nr_dice_loss forward + backward; logits (B, C, *S) float32, labels (B, *S) uint8."""
    import torch

    from . import losses, reference

    logits = random_logits(shape, device)
    target = torch.from_numpy(blobs((shape[0], *shape[2:]))).to(device)
    return Case(
        family="losses",
        operation="NR-Dice, forward + backward",
        input=_name(shape),
        contenders=loss_contenders(
            losses.nr_dice_loss, torch_nr_dice, logits, target, deadline=deadline, shared=shared
        ),
        oracle=in_double(reference.nr_dice_loss, logits, target),
        tolerance=1e-5,
        moved=12 * logits.numel() + 2 * target.numel(),  # logits twice and their gradient; labels twice
        work=dict.fromkeys(("exp", "div", "sqrt"), 2 * logits.numel()),  # in both passes
        fresh=logits.nbytes,
        autograd=True,
        device=device,
        headline=headline,
    )


def weighted_ce_case(
    shape: Sequence[int],
    device: str = "cpu",
    *,
    deadline: float = math.inf,
    headline: bool = False,
    shared: bool = False,
) -> Case:
    """pixel_loss forward + backward; logits (B, C, *S) float32, labels uint8, a weight for each pixel."""
    import torch

    from . import losses, reference

    random = torch.Generator().manual_seed(1)
    pixels = (shape[0], *shape[2:])
    logits = random_logits(shape, device)
    target = torch.randint(0, shape[1], pixels, generator=random, dtype=torch.uint8).to(device)
    weight = torch.rand(pixels, generator=random).to(device)

    def ours(logits: Any, target: Any, weight: Any, **options: Any) -> Any:
        return losses.pixel_loss(logits, target, weight=weight, **options)

    def exact(logits: Any, target: Any, weight: Any) -> Any:
        return reference.pixel_loss(logits, target, weight=weight)

    return Case(
        family="losses",
        operation="weighted CE, forward + backward",
        input=_name(shape),
        contenders=loss_contenders(
            ours, torch_weighted_ce, logits, target, weight, deadline=deadline, shared=shared
        ),
        oracle=in_double(exact, logits, target, weight),
        tolerance=1e-5,
        moved=8 * logits.numel() + 5 * target.numel(),  # logits, labels and weights once, the gradient
        # an exponential fewer than classes, and a logarithm, which costs no less
        work={"exp": logits.numel(), "div": target.numel()},
        fresh=logits.nbytes,
        autograd=True,
        device=device,
        headline=headline,
    )


# ---- distances ------------------------------------------------------------------------------------


def each(function: Callable[..., Any], masks: Any) -> Call:
    """A call of function on each mask of a batch (B, *S), for peers that take one at a time."""
    return lambda: [function(mask) for mask in masks]


def joined(answer: Any, expected: Any) -> float:
    """relative_error of two batches, each one array or a list of them."""
    a, b = (np.concatenate([x.ravel() for x in _arrays(y)]) for y in (answer, expected))
    return relative_error(a, b)


def negative(answer: Any, expected: Any) -> float:
    """`joined` for a peer that is positive inside."""
    return joined([-x for x in _arrays(answer)], expected)


def on_device(mask: np.ndarray[Any, Any], device: str) -> Any:
    """The mask as our CPU contenders take it, NumPy, or as a CUDA tensor."""
    import torch

    return mask if device == "cpu" else torch.from_numpy(mask).to(device)


def threads() -> int:
    import torch

    return torch.get_num_threads()


def torch_edt(mask: Any, spacing: Sequence[float] | None = None) -> Any:
    """Exact distance transform of (B, *S) as one writes it in PyTorch: a minimum over each line, by axis.

    Eager PyTorch holds n times the volume for a line of n; torch.compile fuses that away.
    """
    import torch

    return torch_lower_envelope(torch.where(mask != 0, math.inf, 0.0), spacing).sqrt()


def torch_lower_envelope(values: Any, spacing: Sequence[float] | None = None) -> Any:
    """min over q of values[q] + |p - q|^2, of (B, *S)."""
    import torch

    for axis in range(1, values.ndim):
        place = torch.arange(values.shape[axis], device=values.device) * (
            spacing[axis - 1] if spacing else 1.0
        )
        cost = (place[:, None] - place) ** 2
        values = (values.movedim(axis, -1).unsqueeze(-2) + cost).amin(-1).movedim(-1, axis)
    return values


def torch_contenders(
    plain: Callable[..., Any],
    batches: Sequence[np.ndarray[Any, Any]],
    device: str,
    error: Callable[[Any, Any], float],
    deadline: float,
    together: bool = True,
) -> list[Contender]:
    """`plain` on batches (B, *S), eager and compiled; nothing when deadline is 0.

    together=False: one item at a time; so goes eager PyTorch where a batch would take too much memory.
    """
    import torch

    shape = batches[0].shape
    held = math.prod(shape[1:]) * max(shape[1:])  # floats that torch_edt holds for an item

    def prepare(function: Callable[..., Any], step: int) -> Call:
        if held > 1 << 28:
            raise Skipped("takes too much memory and time")
        arrays: list[Any] = [torch.from_numpy(x).to(device) for x in batches]
        parts = list(zip(*(x.split(step) for x in arrays), strict=True))
        return lambda: [function(*part) for part in parts]

    if deadline <= 0:
        return []
    eager = partial(prepare, plain, max(1, (1 << 25) // held) if together else 1)
    whole = compiled(plain, partial(prepare, step=shape[0] if together else 1), deadline)
    return [Contender("eager", eager, error), replace(whole, error=error)]


def edt_case(
    mask: np.ndarray[Any, Any],
    what: str = "",
    *,
    spacing: Sequence[float] | None = None,
    device: str = "cpu",
    more: Sequence[Contender] = (),
    deadline: float = math.inf,
    headline: bool = False,
) -> Case:
    """distance_transform_edt of masks (B, *S); `what` describes them, `more` are further contenders."""
    from . import distance

    def ours() -> Call:
        x = on_device(mask, device)
        return lambda: distance.distance_transform_edt(x, spacing, spatial_dims=mask.ndim - 1)

    def scipy() -> Call:
        from scipy.ndimage import distance_transform_edt

        return each(partial(distance_transform_edt, sampling=spacing), mask)

    def edt() -> Call:
        import edt as package

        return each(partial(package.edt, anisotropy=spacing, parallel=threads()), mask)

    def monai() -> Call:
        from monai.transforms.utils import distance_transform_edt

        x = on_device(mask, device)  # MONAI takes (C, *S); so the batch is its channels
        return lambda: distance_transform_edt(x, sampling=spacing)

    peers = torch_contenders(partial(torch_edt, spacing=spacing), [mask], device, joined, deadline)
    peers.append(Contender("scipy", scipy, joined))
    if device == "cpu":
        peers.append(Contender("edt", edt, joined))
    return _distance_case(
        "distance transform",
        mask,
        what,
        spacing,
        [Contender(OURS, ours, joined), *peers, Contender("MONAI", monai, joined), *more],
        device,
        headline,
    )


def scipy_signed_map(mask: Any, convention: str, spacing: Sequence[float] | None = None) -> Any:
    """signed_distance_map of a mask (*S) with both classes, "two_sided", "boundary" or "kervadec", by SciPy."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    edt = partial(distance_transform_edt, sampling=spacing)
    if convention == "boundary":
        return np.where(mask, -1, 1) * edt((mask == 0) | binary_erosion(mask, border_value=1))
    inside, outside = edt(mask), edt(mask == 0)
    return outside - inside + (mask != 0 if convention == "kervadec" else 0)


def signed_case(
    mask: np.ndarray[Any, Any],
    what: str = "",
    *,
    convention: str = "two_sided",
    spacing: Sequence[float] | None = None,
    device: str = "cpu",
    more: Sequence[Contender] = (),
    deadline: float = math.inf,
    headline: bool = False,
) -> Case:
    """signed_distance_map of masks (B, *S), "two_sided" or "boundary"; the rest as in edt_case."""
    from . import distance

    def ours() -> Call:
        x, dims = on_device(mask, device), mask.ndim - 1
        return lambda: distance.signed_distance_map(x, spacing, spatial_dims=dims, convention=convention)

    def scipy() -> Call:
        return each(partial(scipy_signed_map, convention=convention, spacing=spacing), mask)

    def edt() -> Call:
        import edt as package

        return each(partial(package.sdf, anisotropy=spacing, parallel=threads()), mask)

    def plain(x: Any) -> Any:
        return torch_edt(x == 0, spacing) - torch_edt(x, spacing)

    peers = [Contender("scipy", scipy, joined)]
    if convention == "two_sided":
        peers = [*torch_contenders(plain, [mask], device, joined, deadline), *peers]
        if device == "cpu":
            peers.append(Contender("edt", edt, negative))
    return _distance_case(
        f"signed distance map, {convention}",
        mask,
        what,
        spacing,
        [Contender(OURS, ours, joined), *peers, *more],
        device,
        headline,
    )


def _distance_case(
    operation: str,
    mask: np.ndarray[Any, Any],
    what: str,
    spacing: Sequence[float] | None,
    contenders: Sequence[Contender],
    device: str,
    headline: bool,
) -> Case:
    spaced = f", spacing {'x'.join(f'{s:g}' for s in spacing)}" if spacing else ""
    # SciPy measures to a voxel that does not exist where there is only one class; edt says inf, as we do. On large
    # volumes SciPy takes a minute; edt agrees with it on the smaller ones of the same run.
    by_edt = (
        not mask.any() or mask.all() or (mask.size > 1 << 25 and any(c.name == "edt" for c in contenders))
    )
    oracle: Any = "edt" if by_edt else "scipy"
    for c in contenders:
        if by_edt and c.name == "edt" and c.error is negative:  # its sign is not the right answer's
            oracle = lambda make=c.make: [-x for x in _arrays(make()())]  # noqa: E731
    return Case(
        family="distance",
        operation=operation,
        input=_name(mask.shape) + (f" {what}" if what else "") + spaced,
        contenders=contenders,
        oracle=oracle,
        tolerance=1e-6,
        moved=5 * mask.size,  # a byte read, a float written
        fresh=4 * mask.size,
        device=device,
        headline=headline,
    )


# ---- metrics --------------------------------------------------------------------------------------


def pair(shape: Sequence[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Masks (B, *S), and the same moved by two pixels along each axis, with a speck of 4 pixels far away."""
    target = blobs(shape, share=0.1)
    axes = tuple(range(1, target.ndim))
    target[(slice(None), *[slice(0, 8)] * len(axes))] = 0
    pred = np.roll(target, (2,) * len(axes), axes)
    pred[(slice(None), *[slice(2, 6)] * len(axes))] = 1
    return pred, target


def torch_surface_metrics(pred: Any, target: Any) -> Any:
    """hd, hd95, asd, assd, nsd of a pair (1, *S) as one writes them in PyTorch."""
    import torch

    def surface(mask: Any) -> Any:
        pad = torch.nn.functional.pad(mask != 0, (1, 1) * (mask.ndim - 1))
        inner = mask != 0
        for axis in range(1, mask.ndim):
            others = [slice(None)] + [slice(1, -1)] * (mask.ndim - 1)
            for shift in (slice(0, -2), slice(2, None)):
                inner = inner & pad[tuple(shift if i == axis else x for i, x in enumerate(others))]
        return (mask != 0) & ~inner

    p, t = surface(pred), surface(target)
    to_target, to_pred = torch_edt(~t)[p], torch_edt(~p)[t]
    both = torch.cat([to_target, to_pred])
    high = torch.maximum(to_target.quantile(0.95), to_pred.quantile(0.95))
    return both.max(), high, to_target.mean(), both.mean(), (both <= 1.0).float().mean()


def crop_surface_metrics(edt: Callable[[Any], Any], pred: Any, target: Any) -> Any:
    """The same with NumPy, SciPy and a distance transform, on the box that holds both masks."""
    from scipy.ndimage import binary_erosion, find_objects

    box = find_objects((pred | target).astype(np.int8))[0]
    pred, target = pred[box] != 0, target[box] != 0
    p, t = (x & ~binary_erosion(x) for x in (pred, target))
    to_target, to_pred = edt(~t)[p], edt(~p)[t]
    both = np.concatenate([to_target, to_pred])
    high = max(np.percentile(to_target, 95), np.percentile(to_pred, 95))
    return both.max(), high, to_target.mean(dtype=float), both.mean(dtype=float), (both <= 1.0).mean()


def surface_case(
    shape: Sequence[int],
    device: str = "cpu",
    *,
    deadline: float = math.inf,
    headline: bool = False,
) -> Case:
    """surface_metrics of pairs of masks (B, *S) in MONAI's definition: hd, hd95, asd, assd, nsd within 1.

    The oracle is MONAI. MedPy pools the two directions for its HD95, so its share is the ASSD.
    """
    import torch

    from . import metrics

    pred, target = pair(shape)

    def tensors() -> list[Any]:
        return [torch.from_numpy(x).unsqueeze(1).to(device) for x in (pred, target)]

    def ours() -> Call:
        p, t = tensors()
        return lambda: tuple(metrics.surface_metrics(p, t, spatial_dims=pred.ndim - 1, tolerance=1.0))[:5]

    def monai() -> Call:
        from monai import metrics as peer

        p, t = tensors()

        def call() -> Any:
            return (
                peer.compute_hausdorff_distance(p, t, True),
                peer.compute_hausdorff_distance(p, t, True, percentile=95),
                peer.compute_average_surface_distance(p, t, True),
                peer.compute_average_surface_distance(p, t, True, symmetric=True),
                peer.compute_surface_dice(p, t, [1.0], True),
            )

        return call

    def monai_hd95() -> Call:
        from monai.metrics import compute_hausdorff_distance

        p, t = tensors()
        return lambda: compute_hausdorff_distance(p, t, True, percentile=95)

    def medpy() -> Call:
        from medpy.metric import binary

        return lambda: [binary.assd(p, t) for p, t in zip(pred, target, strict=True)]

    def pairs(function: Callable[..., Any]) -> Call:
        """By metric, as the others' answers go."""

        def call() -> Any:
            found = [_numbers(function(p, t)) for p, t in zip(pred, target, strict=True)]
            return tuple(np.array(found).reshape(-1, 5).T)

        return call

    def crop_edt() -> Call:
        import edt as package

        return pairs(partial(crop_surface_metrics, partial(package.edt, parallel=threads())))

    def crop_scipy() -> Call:
        from scipy.ndimage import distance_transform_edt

        return pairs(partial(crop_surface_metrics, distance_transform_edt))

    def by_pair(answer: Any, expected: Any) -> float:
        """relative_error of [(hd, ...), ...] by pair; MONAI's answer goes by metric."""
        return relative_error(tuple(np.array(_numbers(answer)).reshape(-1, 5).T), expected)

    contenders = [
        Contender(OURS, ours),
        *torch_contenders(torch_surface_metrics, [pred, target], device, by_pair, deadline, together=False),
        Contender("MONAI", monai),
        Contender("MONAI, HD95 only", monai_hd95, lambda answer, e: relative_error(answer, e[1])),
    ]
    if device == "cpu":
        contenders += [
            Contender("scipy, cropped", crop_scipy),
            Contender("edt, cropped", crop_edt),
            Contender("MedPy, ASSD only", medpy, lambda answer, e: joined(answer, e[3])),
        ]
    return Case(
        family="metrics",
        operation="surface metrics",
        input=_name(shape),
        contenders=contenders,
        oracle="edt, cropped"
        if device == "cpu" and pred.size > 1 << 25
        else "MONAI",  # which takes half a minute
        tolerance=1e-5,  # of float32 means
        moved=2 * pred.size,
        device=device,
        headline=headline,
    )


def _numbers(x: Any) -> list[float]:
    return [float(a) for a in _arrays(x)]


# ---- the demo's table -----------------------------------------------------------------------------


def demo_table(budget_s: float = 40.0) -> list[dict[str, str]]:
    """A small table of times on this machine: one row for each operation, one text for each contender.

    It takes about budget_s seconds, most of which go to torch.compile; it is left out when less than 20 s are
    given or when two thirds of the budget are gone.
    """
    deadline = time.perf_counter() + budget_s * 2 / 3 if budget_s >= 20 else 0.0
    cases: list[Callable[[], Case]] = [
        partial(nr_dice_case, (4, 1, 112, 112, 80), deadline=deadline),
        partial(nr_dice_case, (128, 1, 64, 64), deadline=deadline),
        partial(weighted_ce_case, (4, 4, 112, 112, 20), deadline=deadline),
        lambda: edt_case(blobs((128, 64, 64)), deadline=deadline),
        lambda: edt_case(blobs((4, 112, 112, 80)), deadline=0.0),
        lambda: signed_case(blobs((128, 64, 64)), deadline=0.0),
        lambda: signed_case(blobs((4, 112, 112, 80)), deadline=0.0),
        partial(surface_case, (1, 112, 112, 80), deadline=0.0),
    ]
    return [row(measure(make(), budget_s / 5 / len(cases), slow=budget_s / 40)) for make in cases]


def row(measured: Measurement) -> dict[str, str]:
    """One text for each contender: its time, and how many times faster ours is."""
    result = {"operation": measured.case.operation, "input": measured.case.input}
    return result | {name: entry(measured, name) for name in measured.timings if name != COPY}


def entry(measured: Measurement, name: str) -> str:
    timing = measured.timings[name]
    if timing.p50 is None:
        return "not installed" if timing.state == "missing" else f"{timing.state}: {timing.note}"
    faster = measured.speedup(name) if name != OURS else None
    return duration(timing.p50) + (f" ({faster:.1f}x)" if faster else "")


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Print `demo_table`'s rows with Rich: the operations stand in columns, so that it fits a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("operation", "input", "contender", title="Time here, and how many times faster ours is")
    table.add_column("time", justify="right")
    for line in rows:
        names = [name for name in line if name not in ("operation", "input")]
        for i, name in enumerate(names):
            head = (line["operation"], line["input"]) if i == 0 else ("", "")
            table.add_row(*head, name, line[name], end_section=i == len(names) - 1)
    Console().print(table)
