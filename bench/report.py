"""What a run of the benchmarks says: the machine, tables, JSON and the plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from noisyseg_fast import build_info
from noisyseg_fast.timing import COPY, OURS, Measurement, duration, entry

PACKAGES = ("torch", "numpy", "scipy", "monai", "edt", "medpy", "SimpleITK")
PACKAGES += ("opencv-python-headless", "cupy-cuda13x", "cucim-cu13")


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and build_info()["cuda"] is not None else "cpu"


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, system, versions, commit and date; never the machine's name."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = _cpu()
    result: dict[str, Any] = {
        "processor": cpu,
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        result["processor"] = torch.cuda.get_device_name()
        result["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        result["cuda"] = torch.version.cuda
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError, AttributeError):
        system = platform.system()
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    result |= {
        "system": f"{system}, {platform.release().split('-')[0]}, {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "build": build_info(),
        "commit": commit + (" with changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "load": os.getloadavg()[0] / cores,
    }
    return result


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def _size(n: int | None) -> str:
    return "" if n is None else f"{n / 1e6:.3g} MB"


def table(measured: Measurement) -> Table:
    """All that was measured of one case."""
    case, fraction = measured.case, measured.of_copy()
    title = f"{case.operation}, {case.input}: moves {_size(case.moved)}"
    if fraction:
        title += f", {fraction:.0%} of the copy bandwidth"
    result = Table("contender", title=title, title_justify="left")
    for name in ("p20", "p50", "p80", "ours faster", "memory", "launches", "runs"):
        result.add_column(name, justify="right")
    for name, t in measured.timings.items():
        if t.p50 is None:
            result.add_row(name, "", t.state, "", t.note)
            continue
        faster = measured.speedup(name) if name not in (OURS, COPY) else None
        result.add_row(
            name,
            *(duration(p) for p in (t.p20, t.p50, t.p80) if p is not None),
            f"{faster:.2f}x" if faster else "",
            _size(t.extra),
            "" if t.launches is None else str(t.launches),
            str(t.runs),
        )
    return result


def write(out: Path, machine: dict[str, Any], done: list[Measurement]) -> None:
    """results.json, results.md and speedups.png in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    cases = [
        {
            "family": m.case.family,
            "operation": m.case.operation,
            "input": m.case.input,
            "device": m.case.device,
            "bytes_moved": m.case.moved,
            "fraction_of_copy_bandwidth": m.of_copy(),
            "contenders": {
                name: asdict(t) | {"ours_is_faster": m.speedup(name)} for name, t in m.timings.items()
            },
        }
        for m in done
    ]
    text = json.dumps({"machine": machine, "cases": cases}, indent=1)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    (out / "results.md").write_text(markdown(machine, done), encoding="utf-8")
    plot(out / "speedups.png", machine, done)


def markdown(machine: dict[str, Any], done: list[Measurement]) -> str:
    """One table for each family: medians, and in brackets how many times faster ours is."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    lines = [
        f"# {machine['processor']}, {machine['cores']} CPU cores, {machine['threads']} threads",
        "",
        f"{machine['date']}, commit {machine['commit']}, {machine['system']}, Python {machine['python']}; "
        f"{versions}. Load per core at the start: {machine['load']:.2f}.",
        "",
        "Medians; in brackets how many times faster ours is. Copy: the fraction that ours reaches of the bandwidth "
        "of a plain copy of as many bytes. Memory: the peak beyond the inputs, the result included. "
        "p20, p80 and the peers' memory are in results.json.",
    ]
    for family in dict.fromkeys(m.case.family for m in done):
        members = [m for m in done if m.case.family == family]
        names = list(dict.fromkeys(n for m in members for n in m.timings if n not in (OURS, COPY)))
        head = ["operation", "input", "ours", "moved", "copy", "memory", *names]
        lines += ["", f"## {family}", "", _line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
        for m in members:
            fraction = m.of_copy()
            cells = [m.case.operation, m.case.input, entry(m, OURS), _size(m.case.moved)]
            cells += [f"{fraction:.0%}" if fraction else "", _size(m.timings[OURS].extra)]
            lines.append(_line([*cells, *(entry(m, n) if n in m.timings else "" for n in names)]))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(c.replace('|', '/') for c in cells)} |"


def plot(path: Path, machine: dict[str, Any], done: list[Measurement]) -> None:
    """Bars of the speed-ups in the headline cases, for a README 900 pixels wide; no file without any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [m for m in done if m.case.headline and m.timings[OURS].p50]
    bars = [(m, [(n, s) for n in m.timings if n not in (OURS, COPY) and (s := m.speedup(n))]) for m in chosen]
    bars = [(m, b) for m, b in bars if b]
    if not bars:
        return
    names = list(dict.fromkeys(n for _, b in bars for n, _ in b))
    colours = dict(zip(names, pyplot.get_cmap("tab20").colors, strict=False))
    rows = sum(len(b) + 1 for _, b in bars)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.2 * rows), layout="constrained")
    y, ticks, labels = 0.0, [], []
    for m, b in bars:
        ticks.append(y + (len(b) - 1) / 2)
        labels.append(f"{m.case.operation.replace(', ', chr(10))}\n{m.case.input}")
        for name, faster in b:
            axes.barh(y, faster - 1, left=1, height=0.9, color=colours[name])
            axes.text(max(faster, 1) * 1.04, y, f"{name}  {faster:.3g}x", va="center", fontsize=8)
            y += 1
        y += 1
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *(s for _, b in bars for _, s in b)), 4 * max(s for _, b in bars for _, s in b))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("how many times faster noisyseg-fast is (1: as fast)")
    axes.set_title(
        f"{machine['processor']}, {machine['threads']} CPU threads, {machine['date']}", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
