"""Every operation against its peers on this machine: python -m bench

Writes a JSON file for each family, results.md and speedups.png. On the CPU unless a CUDA device is found and our
build has its kernels (or --device says otherwise). A full run is to end within 15 minutes on 2 cores, --quick within 2:
a peer whose call took longer than a limit in this machine's last results is left out, and the tables say so (--all runs
it), and so is torch.compile once its share of the time is used up.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from noisyseg_fast.timing import COMPILED, Case, duration, measure

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
    peer: float  # seconds of a peer's call, from the last results, above which it is left out
    seconds: float  # of timing for a case
    slow: float  # a call longer than this is made once


FULL, QUICK = Limits(12, 2.0, 0.8, 2.0), Limits(1.4, 0.5, 0.3, 0.3)
ALL = Limits(math.inf, math.inf, 3.0, 8.0)


def known(out: Path, device: str) -> dict[str, list[dict[str, Any]]]:
    """The cases of each family in the last results here, or those of another machine that are committed."""
    folders = [out, *sorted(p for p in (Path(__file__).parent / "results").iterdir() if p.is_dir())]
    for folder in folders:
        runs = report.read(folder) if folder.is_dir() else {}
        if runs and all(c["device"] == device for run in runs.values() for c in run["cases"]):
            return {family: run["cases"] for family, run in runs.items()}
    return {}


def left_out(case: Case, last: Mapping[str, Any], limits: Limits, late: bool) -> dict[str, tuple[str, float]]:
    """Contenders without a place in this run: why, and about how many seconds a call takes."""
    reasons = {COMPILED: ("no time left to compile; --all runs it", 0.0)} if late else {}
    for c in last.get(case.family, ()):
        if (c["operation"], c["input"]) == (case.operation, case.input):
            for name, timed in c["contenders"].items():
                about = timed["p50"] or timed.get("about") or 0
                if about > limits.peer:
                    reasons[name] = (f"{duration(about)} a call in the last results; --all runs it", about)
    return reasons


def expected(cases: Sequence[Mapping[str, Any]], limits: Limits) -> float:
    """Seconds that a family took last, or may take, within these limits."""
    total = 0.0
    for c in cases:
        calls = [t["p50"] or 0 for t in c["contenders"].values()]
        compiling = 8.0 if (c["contenders"].get(COMPILED) or {}).get("p50") else 0.0
        total += c.get("took") or limits.seconds + 1 + compiling + 2 * sum(
            t for t in calls if t <= limits.peer
        )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few shapes, short measurements: under 2 minutes"
    )
    parser.add_argument("--all", action="store_true", help="leave out no peer, however slow: about an hour")
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
    work = {
        name: list(FAMILIES[name].cases(device, options.quick))
        for name in dict.fromkeys(options.family or FAMILIES)
    }
    count = sum(map(len, work.values()))
    likely = {name: 4.0 * len(makers) for name, makers in work.items()}
    if not options.quick:
        likely |= {name: expected(last[name], limits) for name in work if name in last}
    minutes = min(sum(likely.values()) / 60, limits.minutes)
    most = "no limit" if options.all else f"{15 if limits is FULL else 2} at most"
    print(f"bench: {count} cases, about {minutes:.0f} minutes by the last results, {most}", flush=True)
    begin, scale = time.perf_counter(), limits.minutes * 60 / sum(likely.values())
    plan = [  # each case with the time by which it should be done, if the families share all of it as they need it
        (make, scale * (sum(list(likely.values())[:f]) + likely[name] * (i + 1) / len(makers)))
        for f, (name, makers) in enumerate(work.items())
        for i, make in enumerate(makers)
    ]
    done = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=count)
        for make, by in plan:
            case = make()
            progress.update(task, description=f"{case.operation} {case.input}")
            late = time.perf_counter() - begin > by
            skip = left_out(case, last, limits, late)
            done.append(measure(case, limits.seconds / (3 if late else 1), limits.slow, skip))
            del case
            console.print(report.table(done[-1]))
            progress.advance(task)
    report.write(out, machine, done)
    took = time.perf_counter() - begin
    absent = sorted({f"{n} ({t.note})" for m in done for n, t in m.timings.items() if t.state == "missing"})
    print(
        f"bench: {len(done)} cases in {took / 60:.1f} minutes; missing peers: {', '.join(absent) or 'none'}"
    )
    console.print(f"results: {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
