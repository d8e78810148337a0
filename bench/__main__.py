"""Every operation against its peers on this machine: python -m bench

Writes a JSON file for each family, results.md and speedups.png. On the CPU unless a CUDA device is found and our
build has its kernels (or --device says otherwise). A full run ends within 15 minutes, --quick within 2: the time that
is left is divided over the cases that are left, by what they took in the last results, and a case begins no further
peer once its part is over (`timing.measure`). A peer whose call took longer than a limit in the last results is left
out from the start. The tables name whatever is left out, with the reason; --all runs it.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from noisyseg_fast.timing import COMPILED, LATER, OURS, Case, Measurement, duration, measure

from . import report

# Each a module here with cases(device, quick), in the order in which they are run.
NAMES = (
    "losses",
    "task_losses",
    "distance",
    "metrics",
    "labels",
    "noise",
    "pixels",
    "weight_nets",
    "norms",
    "meta",
    "methods",
    "steps",
    "validation",
    "sweeps",
)
FAMILIES = {name: importlib.import_module(f".{name}", __package__) for name in NAMES}


class Limits(NamedTuple):
    """Of one run."""

    minutes: float  # for all cases
    peer: float  # seconds of a peer's call, from the last results, above which it is left out (headlines: 4 times that)
    seconds: float  # of timing for a case
    slow: float  # a call longer than this is made once or twice


FULL, QUICK = Limits(13, 2.0, 0.5, 2.0), Limits(1.5, 0.5, 0.2, 0.3)
ALL = Limits(math.inf, math.inf, 3.0, 8.0)
COMPILING = 8.0  # seconds that torch.compile takes for a case, until this run knows better,
NETWORKS = {"U-Net forward-mode pass": 240.0}  # and for whole networks
UNKNOWN = 2.0  # seconds of a case of which there are no results,
LONG = {"losses": 10, "meta": 3, "steps": 4, "validation": 12}  # and how many times that in some families


def known(out: Path, device: str) -> dict[str, list[dict[str, Any]]]:
    """The cases of each family in the last results here, or those of another machine that are committed."""
    folders = [out, *sorted(p for p in (Path(__file__).parent / "results").iterdir() if p.is_dir())]
    for folder in folders:
        runs = report.read(folder) if folder.is_dir() else {}
        if runs and all(c["device"] == device for run in runs.values() for c in run["cases"]):
            return {family: run["cases"] for family, run in runs.items()}
    return {}


def left_out(case: Case, last: Mapping[str, Any], limits: Limits) -> dict[str, tuple[str, float]]:
    """Contenders that are too slow for this run: why, and about how many seconds a call takes."""
    reasons = {}
    for c in last.get(case.family, ()):
        if (c["operation"], c["input"]) == (case.operation, case.input):
            for name, timed in c["contenders"].items():
                about = timed["p50"] or timed.get("about") or 0
                if about > longest(c, limits) and name != report.PLAIN:
                    reasons[name] = (f"{duration(about)} a call in the last results; {LATER}", about)
    return reasons


def longest(case: Mapping[str, Any], limits: Limits) -> float:
    """Seconds that a peer's call may take."""
    return limits.peer * (4 if case["headline"] else 1)


def need(case: Mapping[str, Any], limits: Limits) -> float:
    """Seconds that a case of the last results may take within these limits; torch.compile's apart."""
    calls, left = [], 0.0
    for name, timed in case["contenders"].items():
        about = timed["p50"] or 0.0
        if about > longest(case, limits) and name not in (OURS, report.PLAIN, case.get("oracle")):
            left += about
        else:
            calls.append(about)
    took = (case.get("took") or 0.0) - (case.get("compiling") or 0.0) - left
    return max(took, limits.seconds + 0.5 + sum(t if t > limits.slow else 5 * t for t in calls))


def needs(work: Mapping[str, Sequence[Any]], last: Mapping[str, Any], limits: Limits) -> list[float]:
    """Parts of the time, one for each case of `work`, by family: the seconds that it needs, three times as many for a
    headline, so that these keep their peers where there is not enough for all."""
    result: list[float] = []
    for name, makers in work.items():
        each = []
        for c in last.get(name, ()):
            timed = c["contenders"].get(COMPILED, {"p50": None, "note": ""})
            compiles = timed["p50"] or timed["note"].endswith(LATER)
            compiling = COMPILING if compiles and name != "sweeps" else 0.0  # which share what is compiled
            each.append((need(c, limits) + compiling) * (3 if c["headline"] else 1))
        if len(each) != len(makers):
            each = [float(np.mean(each)) if each else UNKNOWN * LONG.get(name, 1)] * len(makers)
        result += each
    return result


def run(
    makers: Sequence[Callable[[], Case]],
    needed: Sequence[float],
    seconds: float,
    one: Callable[[Case, float], object],
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Call one(case, its seconds) for each case: of the time that is left its part, by `needed`, of the cases that are
    left. Returns how many cases there was time for: those after that are not begun."""
    end = clock() + seconds
    for i, make in enumerate(makers):
        left = end - clock()
        if left <= 0:
            return i
        one(make(), left if math.isinf(left) else left * needed[i] / sum(needed[i:]))
    return len(makers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few shapes, short measurements: under 2 minutes"
    )
    parser.add_argument("--all", action="store_true", help="leave out no peer, however slow: about an hour")
    parser.add_argument(
        "--minutes", type=float, help="for all of it; default: 13, with --quick 1.5, no limit with --all"
    )
    parser.add_argument(
        "--seconds", type=float, help="of timing for each case; default: 0.5, with --quick 0.2, with --all 3"
    )
    parser.add_argument("--family", choices=FAMILIES, action="append", help="repeatable; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where it can be used")
    parser.add_argument("--out", type=Path, help="folder for the results; default: bench/results/<processor>")
    options = parser.parse_args()
    device = options.device or report.default_device()
    machine = report.machine(device)
    out = options.out or Path(__file__).parent / "results" / report.slug(machine["processor"])
    console = Console()
    if machine["load"] > 0.5:
        print(f"bench: this machine is busy (load {machine['load']:.1f}); times will be off", file=sys.stderr)
    last = known(out, device)
    limits = QUICK if options.quick else ALL if options.all else FULL
    for name in ("minutes", "seconds"):
        value = getattr(options, name)
        if value is not None:
            if not value > 0:
                parser.error(f"--{name} must be positive, got {value:g}")
            limits = limits._replace(**{name: value})
    work = {
        name: list(FAMILIES[name].cases(device, options.quick))
        for name in dict.fromkeys(options.family or FAMILIES)
    }
    makers = [make for group in work.values() for make in group]
    needed = needs(work, {} if options.quick else last, limits)  # --quick has other inputs
    most = "" if math.isinf(limits.minutes) else f" in {limits.minutes:g} minutes at most"
    print(f"bench: {len(makers)} cases{most}", flush=True)
    begin, done, compiling = time.perf_counter(), list[Measurement](), [COMPILING]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(makers))

        def one(case: Case, budget: float) -> None:
            progress.update(task, description=f"{case.operation} {case.input}")
            usual = NETWORKS.get(case.operation, min(compiling[-5:]))  # the first one loads the compiler, too
            skip = left_out(case, last, limits)
            done.append(measure(case, limits.seconds, limits.slow, skip, budget, usual))
            if done[-1].compiling is not None:
                compiling.append(done[-1].compiling)
            console.print(report.table(done[-1]))
            progress.advance(task)

        begun = run(makers, needed, limits.minutes * 60, one)
    if begun < len(makers):
        families = [name for name, group in work.items() for _ in group][begun:]
        print(f"bench: no time for {len(families)} cases of {', '.join(dict.fromkeys(families))}")
    report.write(out, machine, done)
    took = time.perf_counter() - begin
    absent = sorted({f"{n} ({t.note})" for m in done for n, t in m.timings.items() if t.state == "missing"})
    print(
        f"bench: {len(done)} cases in {took / 60:.1f} minutes; missing peers: {', '.join(absent) or 'none'}"
    )
    console.print(f"results: {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
