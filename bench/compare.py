"""What became slower from one run of the benchmark to another: python -m bench.compare BEFORE AFTER

Each is a JSON file that `python -m bench` wrote, or a folder of them. A row is slower where ours takes longer than
before by more than the spread of both runs and by more than 5 %: its quickest fifth now (p20) is above the slowest
fifth then (p80). Faster is the reverse. On another machine, or where the machine's speed has changed (the copies tell),
times cannot be compared; the report says so, and --by-peer compares ours' ratio to its peers instead.
Exit code: 0, 1 where a row is slower, wrong now or gone, 2 for files that cannot be read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from noisyseg_fast.timing import COPY, OURS, duration

LEAST = 0.05  # a difference below this is none, however narrow the spread
Row = tuple[str, str, str]  # family, operation, input
STATES = ("slower", "wrong", "gone", "missing", "faster", "new", "same")
BAD = ("slower", "wrong", "gone")


def read(path: Path) -> tuple[dict[Row, dict[str, Any]], set[str]]:
    """Cases by row, and the processors that they ran on."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    rows: dict[Row, dict[str, Any]] = {}
    processors = set()
    for file in files:
        run = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(run, dict) or not {"machine", "cases"} <= set(run):
            raise ValueError(f"{file} is no result of python -m bench")
        processors.add(f"{run['machine']['processor']}, {run['machine']['threads']} threads")
        for case in run["cases"]:
            rows[file.stem, case["operation"], case["input"]] = case
    if not rows:
        raise ValueError(f"{path} holds no results")
    return rows, processors


def _scale(case: dict[str, Any], by_peer: bool) -> float:
    """What the times of ours are divided by: the quickest other contender's median, or nothing."""
    if not by_peer:
        return 1.0
    others = [
        t["p50"] for n, t in case["contenders"].items() if not n.startswith(OURS) and n != COPY and t["p50"]
    ]
    return min(others, default=1.0)


def compare(
    before: dict[str, Any] | None, after: dict[str, Any] | None, by_peer: bool = False
) -> tuple[str, str]:
    """(state, why) of one row."""
    if after is None:
        return "gone", "measured before, not now"
    now = after["contenders"][OURS]
    if now["state"] == "wrong":
        return "wrong", now["note"]
    if now["p50"] is None:
        return "gone", f"{now['state']}: {now['note']}"
    if before is None or before["contenders"][OURS]["p50"] is None:
        return "new", duration(now["p50"])
    then = before["contenders"][OURS]
    a, b = _scale(before, by_peer), _scale(after, by_peer)
    ratio = (now["p50"] / b) / (then["p50"] / a)
    text = f"{duration(then['p50'])} -> {duration(now['p50'])}, {ratio:.2f} of it"
    if now["p20"] / b > then["p80"] / a and ratio > 1 + LEAST:
        return "slower", text
    if now["p80"] / b < then["p20"] / a and ratio < 1 / (1 + LEAST):
        return "faster", text
    return "same", text


def missing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Peers that were timed before and are not now, or answer wrongly now, with the reason."""
    names = [n for n, t in before["contenders"].items() if t["p50"] and n not in (OURS, COPY)]
    absent: dict[str, Any] = {"state": "not run", "note": "", "p50": None}
    now = {n: after["contenders"].get(n, absent) for n in names}
    return [f"{n}: {t['state']} {t['note']}".strip() for n, t in now.items() if t["p50"] is None]


def report(first: Path, second: Path, by_peer: bool = False) -> tuple[list[str], int]:
    """The lines to print and the exit code."""
    before, old = read(first)
    after, new = read(second)
    families = {family for family, *_ in after}  # a file against a folder: only what both could hold
    before = {row: case for row, case in before.items() if row[0] in families}
    lines = []
    if old != new:
        lines.append(f"The machines differ: {'; '.join(sorted(old))} and {'; '.join(sorted(new))}.")
    both = [row for row in before if row in after]
    copies = [
        after[r]["contenders"][COPY]["p50"] / before[r]["contenders"][COPY]["p50"]
        for r in both
        if all(x[r]["contenders"].get(COPY, {}).get("p50") for x in (before, after))
    ]
    if copies:
        moved = statistics.median(copies)
        lines.append(f"Plain copies take {moved:.2f} of their time before (median of {len(copies)}).")
        if not by_peer and not 1 / 1.15 < moved < 1.15:
            lines.append("The machine's own speed has changed: compare with --by-peer.")
    found: dict[str, list[str]] = {state: [] for state in STATES}
    for row in dict.fromkeys([*before, *after]):
        state, why = compare(before.get(row), after.get(row), by_peer)
        found[state].append(f"{row[0]}: {row[1]}, {row[2]}: {why}")
        if row in before and row in after:
            found["missing"] += [
                f"{row[0]}: {row[1]}, {row[2]}: {m}" for m in missing(before[row], after[row])
            ]
    for state in STATES:
        if found[state]:
            lines.append(f"{state} ({len(found[state])})" + (":" if state != "same" else ""))
            lines += [f"  {line}" for line in found[state] if state != "same"]
    return lines, int(any(found[state] for state in BAD))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--by-peer", action="store_true", help="compare ours' ratio to the quickest peer")
    options = parser.parse_args()
    try:
        lines, code = report(options.before, options.after, options.by_peer)
    except (OSError, ValueError, KeyError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
