"""Every operation against its peers on this machine: python -m bench

Writes a JSON file for each family, results.md and speedups.png. On the CPU unless a CUDA device is found and our
build has its kernels (or --device says otherwise).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from noisyseg_fast.timing import measure

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
)
FAMILIES = {name: importlib.import_module(f".{name}", __package__) for name in NAMES}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few shapes, short measurements: under 90 s")
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
    work = [
        (family, make)
        for family in options.family or FAMILIES
        for make in FAMILIES[family].cases(device, options.quick)
    ]
    done = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(work))
        for _, make in work:
            case = make()
            progress.update(task, description=f"{case.operation} {case.input}")
            done.append(measure(case, 0.6 if options.quick else 3.0, slow=1.0 if options.quick else 8.0))
            del case
            console.print(report.table(done[-1]))
            progress.advance(task)
    report.write(out, machine, done)
    console.print(f"results: {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
