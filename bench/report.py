"""What the benchmarks say: the machine, tables, JSON and the plot.

A machine's folder holds one JSON for each family, as its last run left it; results.md, speedups.png, the README's
table and those of docs/performance.md are made from those, so that no figure is typed by hand.
"""

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
from noisyseg_fast.timing import AT_ONCE, COPY, OURS, Measurement, duration

PLAIN = "plain PyTorch + SciPy"  # the contender of plain.py
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
    """FAMILY.json of each family that was measured, then results.md and speedups.png of all in the folder."""
    out.mkdir(parents=True, exist_ok=True)
    for family in dict.fromkeys(m.case.family for m in done):
        cases = [_record(m) for m in done if m.case.family == family]
        text = json.dumps({"machine": machine, "cases": cases}, indent=1)
        (out / f"{family}.json").write_text(text + "\n", encoding="utf-8")
    runs = read(out)
    (out / "results.md").write_text(markdown(runs), encoding="utf-8")
    plot(out / "speedups.png", runs)


def _record(measured: Measurement) -> dict[str, Any]:
    case = measured.case
    return {
        "operation": case.operation,
        "input": case.input,
        "device": case.device,
        "headline": case.headline,
        "baseline": case.baseline,
        "oracle": case.oracle if isinstance(case.oracle, str) else None,
        "bytes_moved": case.moved,
        "fraction_of_copy_bandwidth": measured.of_copy(),
        "floor_s": measured.floor_s,
        "floor_kind": measured.floor_kind,
        "took": measured.took,
        "compiling": measured.compiling,
        "contenders": {
            name: asdict(t) | {"ours_is_faster": measured.speedup(name)}
            for name, t in measured.timings.items()
        },
    }


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The last run of each family: {"losses": {"machine": ..., "cases": [...]}, ...}."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def markdown(runs: dict[str, dict[str, Any]]) -> str:
    """One table for each family: medians, and in brackets how many times faster ours is."""
    lines = [
        "Medians; in brackets how many times faster ours is. Copy: the fraction that ours reaches of the bandwidth "
        "of a plain copy of as many bytes. Memory: the peak beyond the inputs, the result included. Launches: of CUDA "
        "kernels, in runs on a GPU. "
        "p20, p80 and the peers' memory are in the JSON files.",
    ]
    for family, run in runs.items():
        machine, cases = run["machine"], run["cases"]
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        names = list(dict.fromkeys(n for c in cases for n in c["contenders"] if n not in (OURS, COPY)))
        counted = any(c["contenders"][OURS].get("launches") is not None for c in cases)
        head = ["operation", "input", "ours", "moved", "copy", "memory", *["launches"] * counted, *names]
        lines += [
            "",
            f"## {family}",
            "",
            f"{machine['processor']}, {machine['cores']} CPU cores, {machine['threads']} threads, "
            f"{machine['date']}, commit {machine['commit']}, {machine['system']}, Python {machine['python']}; "
            f"{versions}. Load per core at the start: {machine['load']:.2f}.",
            "",
            _line(head),
            _line(["---"] * 2 + ["---:"] * (len(head) - 2)),
        ]
        for case in cases:
            fraction, contenders = case["fraction_of_copy_bandwidth"], case["contenders"]
            cells = [case["operation"], case["input"], _entry(case, OURS), _size(case["bytes_moved"])]
            cells += [f"{fraction:.0%}" if fraction else "", _size(contenders[OURS]["extra"])]
            cells += [str(contenders[OURS].get("launches"))] * counted
            lines.append(_line([*cells, *(_entry(case, n) if n in contenders else "" for n in names)]))
    return "\n".join(lines) + "\n"


def headlines(runs: dict[str, dict[str, Any]]) -> str:
    """The README's table: the headline cases, with the fastest of the peers in the last column."""
    lines = [_line(["operation", "input", "ours", "eager PyTorch", "torch.compile", "best of the others"])]
    lines.append(_line(["---", "---", *["---:"] * 4]))
    for case in (c for run in runs.values() for c in run["cases"] if c["headline"]):
        contenders = case["contenders"]
        others = [n for n in contenders if n not in (COPY, "eager", "torch.compile") and not _own(n)]
        timed = sorted((n for n in others if contenders[n]["p50"]), key=lambda n: contenders[n]["p50"])
        best = f"{timed[0]} {_entry(case, timed[0])}" if timed else ""
        own = [_entry(case, n) if n in contenders else "" for n in (OURS, "eager", "torch.compile")]
        lines.append(_line([case["operation"], case["input"], *own, best]))
    return "\n".join(lines)


def slower(runs: dict[str, dict[str, Any]]) -> str:
    """Where somebody else is faster: every row in which a peer's median is below ours by more than 5 % and below the
    fastest fifth of ours."""
    lines = [_line(["operation", "input", "ours", "faster", "of ours"]), _line(["---"] * 2 + ["---:"] * 3)]
    for case in (c for run in runs.values() for c in run["cases"]):
        ours = case["contenders"][OURS]
        for name, other in case["contenders"].items():
            if name in (COPY, case.get("baseline")) or _own(name) or not (ours["p50"] and other["p50"]):
                continue
            if other["p50"] < min(0.95 * ours["p50"], ours["p20"]):
                cells = [duration(ours["p50"]), f"{name} {duration(other['p50'])}"]
                lines.append(
                    _line([case["operation"], case["input"], *cells, f"{other['p50'] / ours['p50']:.2f}"])
                )
    return "\n".join(lines) if len(lines) > 2 else "Nobody, on any row."


def floor_of(case: dict[str, Any]) -> tuple[float, str] | None:
    """(seconds, what says so); results from before floors were kept have that of the copy."""
    if case.get("floor_s"):
        return case["floor_s"], case["floor_kind"]
    copy = case["contenders"].get(COPY, {}).get("p50")
    return (copy, COPY) if copy else None


def _floor_rows(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        _line(["operation", "input", "floor", "by", "measured", "ratio"]),
        _line(["---"] * 2 + ["---:"] * 4),
    ]
    for case in cases:
        floor, measured = floor_of(case), case["contenders"][OURS]["p50"]
        if floor and measured:
            cells = [case["operation"], case["input"], duration(floor[0]), floor[1]]
            lines.append(_line([*cells, duration(measured), f"{measured / floor[0]:.1f}"]))
    return lines


WHOLE = ("training step", "U-Net forward")  # in the names of operations that run networks


def floors(runs: dict[str, dict[str, Any]]) -> str:
    """Each operation's largest input: the floor, what was measured and their ratio."""
    largest: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        for case in run["cases"]:
            whole = name in ("meta", "methods") or any(x in case["operation"] for x in WHOLE)
            if whole or name == "sweeps":
                continue  # nothing says what is the least for a network's step
            found = largest.setdefault(case["operation"], case)
            if case["bytes_moved"] > found["bytes_moved"]:
                largest[case["operation"]] = case
    return "\n".join(_floor_rows(list(largest.values())))


# DESIGN section 8, on a CPU with 2 cores: operation, inputs (none: the headline ones), peer (none: the quickest), how
# many times faster ours is to be.
LARGE = ("32x1x256x256", "4x1x112x112x80", "30x2x512x512", "1x1x512x512x300")
TARGETS: list[tuple[str, tuple[str, ...], str | None, float]] = [
    ("NR-Dice, forward + backward", LARGE, "eager", 10),
    ("NR-Dice, forward + backward", LARGE, "torch.compile", 4),
    ("NR-Dice, forward + backward", ("128x1x64x64",), "eager", 6),
    ("NR-Dice, forward + backward", ("128x1x64x64",), "torch.compile", 3),
    ("NR-Dice, forward + backward", ("8x1x64x64", "1x1x1024", "1x1x4096"), "eager", 1),
    ("weighted CE, forward + backward", (), "eager", 5),
    ("weighted CE, forward + backward", (), "torch.compile", 2),
    ("UMA-Net loss, M = 4, forward + backward", (), "eager", 10),
    ("dual-task loss, forward + backward", (), "eager", 10),
    ("distance transform", (), None, 4),
    ("signed distance map, two_sided", (), None, 6),
    ("surface metrics", (), "MONAI, HD95 only", 4),
    ("surface metrics", (), "edt, cropped", 4),
    ("STAPLE", (), "SimpleITK", 20),
    ("MCPM iteration, 2D U-Net 32..256", (), "unroll", 1 / 0.6),
    ("MCPM iteration, 3D U-Net 8..64", (), "unroll", 1 / 0.6),
]


def targets(runs: dict[str, dict[str, Any]]) -> str:
    """What the design asks for and what was measured."""
    lines = [_line(["operation", "input", "against", "asked for", "measured", ""])]
    lines.append(_line(["---", "---", "---", "---:", "---:", "---"]))
    cases = [c for run in runs.values() for c in run["cases"]]
    for operation, inputs, peer, factor in TARGETS:
        for case in cases:
            if case["operation"] != operation or not (
                case["input"] in inputs if inputs else case["headline"]
            ):
                continue
            contenders = case["contenders"]
            names = [n for n in contenders if not _own(n) and n not in (COPY, "eager", "torch.compile")]
            names = [n for n in ([peer] if peer else names) if contenders.get(n, {}).get("p50")]
            if not names:
                lines.append(
                    _line(
                        [operation, case["input"], peer or "exact peers", f"{factor:.3g}x", "not timed", ""]
                    )
                )
                continue
            best = min(names, key=lambda n: contenders[n]["p50"])
            faster = contenders[best]["ours_is_faster"]
            met = "" if faster >= factor else "missed"
            lines.append(_line([operation, case["input"], best, f"{factor:.3g}x", f"{faster:.3g}x", met]))
    return "\n".join(lines)


# What stands in our place in each of the families that time whole steps.
WITHOUT_US = {
    "methods": (PLAIN,),
    "steps": (PLAIN, "scipy"),
    "meta": ("unroll",),
    "validation": ("MONAI", "MedPy"),
}


def whole_steps(runs: dict[str, dict[str, Any]]) -> str:
    """End to end: training steps and validation passes with ours and without; and how many steps of plain
    cross-entropy, which is what an iteration costs anyway, each of ours takes."""
    lines = [_line(["step", "input", "ours", "without us", "ratio", "of a step of ce"])]
    lines.append(_line(["---", "---", *["---:"] * 4]))
    for family, names in WITHOUT_US.items():
        for case in runs.get(family, {}).get("cases", ()):
            timed = case["contenders"]
            base = timed.get(case.get("baseline"), {}).get("ours_is_faster")
            for name in (n for n in names if n in timed):
                other, faster = timed[name], timed[name]["ours_is_faster"]
                cells = [duration(other["p50"]) if other["p50"] else _entry(case, name)]
                cells[0] += "" if name == PLAIN else f", {name}"
                cells += [f"{faster:.2f}x" if faster else "", f"{1 / base:.2f}" if base else ""]
                lines.append(_line([case["operation"], case["input"], _entry(case, OURS), *cells]))
    return "\n".join(lines)


SMALL = 4096 * 18  # bytes that a loss over 4,096 pixels moves, about


def small_calls(runs: dict[str, dict[str, Any]]) -> str:
    """The losses on a few thousand pixels, where PyTorch's own calls are most of the time."""
    among = [c for name in ("losses", "sweeps") for c in runs.get(name, {}).get("cases", ())]
    found = [c for c in among if c["bytes_moved"] <= SMALL and "forward + backward" in c["operation"]]
    names = [OURS, AT_ONCE, "eager", "torch.compile"]
    lines = [_line(["operation", "input", "floor", *names]), _line(["---"] * 2 + ["---:"] * 5)]
    for case in found:
        floor, timed = floor_of(case), case["contenders"]
        cells = [_entry(case, n) if n in timed else "" for n in names]
        lines.append(_line([case["operation"], case["input"], duration(floor[0]) if floor else "", *cells]))
    return "\n".join(lines)


def instructions(root: Path) -> str:
    """What bench/instructions.py counted."""
    rows = json.loads((root / "bench" / "results" / "instructions.json").read_text(encoding="utf-8"))
    names = [
        "operation",
        "instructions",
        "for each",
        "256 bits",
        "128 bits",
        "scalar float",
        "the rest",
        "divisions, roots",
    ]
    lines = [_line(names), _line(["---"] + ["---:"] * (len(names) - 1))]
    for row in rows:
        mix = row["mix"]
        wide = [mix.get(k, 0.0) for k in ("256 bits", "128 bits", "scalar float")]
        cells = [row["operation"], f"{row['instructions_per_element']:.1f}", row["element"]]
        cells += [
            *(f"{x:.0%}" for x in (*wide, 1 - sum(wide))),
            f"{row['divisions_and_roots_per_element']:.2f}",
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def prediction_table(rows: list[dict[str, Any]]) -> str:
    """Of bench/gpu/predict.py: with what was measured and the ratio, where there is a run."""
    names = ["operation", "input", "launches", "occupancy", "moved", "device", "call", "bound by"]
    measured = any("measured_s" in row for row in rows)
    names += ["measured", "of predicted"] if measured else []
    lines = [_line(names), _line(["---"] * 2 + ["---:"] * (len(names) - 2))]
    for row in rows:
        cells = [row["operation"], row["input"], str(row["launches"]), f"{row['occupancy']:.0%}"]
        cells += [
            _size(row["megabytes"] * 1e6),
            duration(row["device_s"]),
            duration(row["call_s"]),
            row["bound"],
        ]
        if measured:
            cells += [duration(row["measured_s"]), f"{row['ratio']:.2f}"]
        lines.append(_line(cells))
    return "\n".join(lines)


def predictions(root: Path) -> str:
    """The predictions on file; compared, where bench/results holds a GPU's run."""
    from bench.gpu import predict

    rows = json.loads(predict.PREDICTIONS.read_text(encoding="utf-8"))
    for folder in sorted((root / "bench" / "results").glob("nvidia-*")):
        compared = predict.compare(rows, read(folder))
        if compared:
            return prediction_table(compared)
    return prediction_table(rows)


BEGIN, END = "<!-- made by python -m bench.report -->", "<!-- end -->"


def put(page: Path, tables: list[str]) -> None:
    """The tables between the page's marks, one after another."""
    first, *parts = page.read_text(encoding="utf-8").split(BEGIN)
    if len(parts) != len(tables):
        raise ValueError(f"{page} has {len(parts)} places for {len(tables)} tables")
    text = first
    for table, part in zip(tables, parts, strict=True):
        text += f"{BEGIN}\n{table}\n{END}" + part.split(END, 1)[1]
    page.write_text(text, encoding="utf-8")


def update_readme(readme: Path, folder: Path) -> None:
    """Put that machine's headlines, and where others are faster, between the README's marks."""
    runs = read(folder)
    put(readme, [headlines(runs), slower(runs)])


def performance_tables(root: Path, folder: Path) -> list[str]:
    """Those of docs/performance.md."""
    runs = read(folder)
    tables = [targets(runs), whole_steps(runs), small_calls(runs), floors(runs)]
    return [*tables, instructions(root), predictions(root)]


def _own(name: str) -> bool:
    """Ours, or another way of using it, as "ours, graph kept"."""
    return name == OURS or name.startswith(f"{OURS},")


def _entry(case: dict[str, Any], name: str) -> str:
    """As timing.entry, from the JSON; why a contender was not timed stands there."""
    timed = case["contenders"][name]
    if timed["p50"] is None:
        return f"wrong: {timed['note']}" if timed["state"] == "wrong" else timed["state"]
    faster = timed["ours_is_faster"]
    if faster and name == case.get("baseline"):
        return f"{duration(timed['p50'])} (ours {1 / faster:.2f} of it)"
    return duration(timed["p50"]) + (f" ({faster:.1f}x)" if not _own(name) and faster else "")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(c.replace('|', '/') for c in cells)} |"


def plot(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Bars of the speed-ups in the headline cases, for a README 900 pixels wide; no file without any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = []
    for case in (c for run in runs.values() for c in run["cases"] if c["headline"]):
        speedups = [
            (name, timed["ours_is_faster"])
            for name, timed in case["contenders"].items()
            if name != COPY and not _own(name) and timed["ours_is_faster"]
        ]
        if speedups:
            bars.append((case, speedups))
    if not bars:
        return
    names = list(dict.fromkeys(n for _, b in bars for n, _ in b))
    colours = dict(zip(names, pyplot.get_cmap("tab20").colors, strict=False))
    rows = sum(len(b) + 1 for _, b in bars)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.2 * rows), layout="constrained")
    y, ticks, labels = 0.0, [], []
    for case, b in bars:
        ticks.append(y + (len(b) - 1) / 2)
        labels.append(f"{case['operation'].replace(', ', chr(10))}\n{case['input']}")
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
    dates = sorted({run["machine"]["date"] for run in runs.values()})
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    machine = next(iter(runs.values()))["machine"]
    axes.set_title(
        f"{machine['processor']}, {machine['threads']} CPU threads, {days}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    results = root / "bench" / "results" / slug(machine("cpu")["processor"])
    update_readme(root / "README.md", results)
    put(root / "docs" / "performance.md", performance_tables(root, results))
