"""The benchmark's own machinery, on tiny inputs: wrong answers are caught, missing peers are named."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from bench import report
from noisyseg_fast import timing
from noisyseg_fast.timing import COPY, OURS, Case, Contender

ROOT = Path(__file__).parents[1]


def small(*contenders: Contender) -> Case:
    x = np.arange(1000.0)
    ours = Contender(OURS, lambda: lambda: 2 * x)
    return Case("losses", "doubling", "1000", [ours, *contenders], lambda: x + x, 1e-6, 16000)


def missing():
    import no_such_package_anywhere  # noqa: F401


def broken():
    raise RuntimeError("no\nluck")


def test_a_wrong_contender_is_reported_and_not_timed():
    x = np.arange(1000.0)
    measured = timing.measure(small(Contender("hasty", lambda: lambda: x)), 0.01)
    assert measured.timings["hasty"].state == "wrong"
    assert measured.timings["hasty"].p50 is None
    assert measured.speedup("hasty") is None
    assert timing.entry(measured, "hasty").startswith("wrong: off by")
    assert measured.timings[OURS].p50 > 0


def test_missing_and_broken_peers_are_named():
    measured = timing.measure(small(Contender("gone", missing), Contender("bad", broken)), 0.01)
    assert timing.row(measured)["gone"] == "not installed"
    assert measured.timings["gone"].note == "no_such_package_anywhere is not installed"
    assert timing.row(measured)["bad"] == "failed: RuntimeError: no luck"


def test_without_its_oracle_nothing_is_timed_as_right():
    case = replace(small(Contender("gone", missing)), oracle="gone")
    measured = timing.measure(case, 0.01)
    assert measured.timings[OURS].state == "skipped"
    assert "gone" in measured.timings[OURS].note


@pytest.mark.parametrize(
    ("answer", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([1.0, np.inf], [1.0, np.inf], 0),
        ([1.0, np.nan], [1.0, 2.0], np.inf),
        ([1.0], [1.0, 2.0], np.inf),
    ],
)
def test_relative_error(answer, expected, error):
    assert timing.relative_error(np.array(answer), np.array(expected)) == pytest.approx(error)


def test_the_real_cases_agree_with_their_oracles():
    for case in (
        timing.nr_dice_case((2, 1, 9, 11), deadline=0.0),
        timing.weighted_ce_case((2, 3, 9, 11), deadline=0.0),
        timing.edt_case(timing.blobs((2, 16, 20)), deadline=0.0),
        timing.signed_case(timing.blobs((2, 16, 20)), deadline=0.0),
        timing.signed_case(timing.blobs((2, 16, 20)), convention="boundary", deadline=0.0),
        timing.surface_case((1, 20, 24), deadline=0.0),
    ):
        measured = timing.measure(case, 0.01)
        wrong = {n: t.note for n, t in measured.timings.items() if t.state in ("wrong", "failed")}
        assert not wrong, (case.operation, wrong)
        assert COPY in measured.timings


def test_results_are_written(tmp_path):
    measured = timing.measure(replace(small(Contender("gone", missing)), headline=True), 0.01)
    machine = report.machine("cpu")
    report.write(tmp_path, machine, [measured])
    saved = json.loads((tmp_path / "losses.json").read_text())
    assert saved["cases"][0]["contenders"]["gone"]["state"] == "missing"
    assert "missing" in (tmp_path / "results.md").read_text()
    assert report.slug("AMD EPYC(TM) 7763") == "amd-epyc-7763"


def test_families_measured_apart_end_in_one_report(tmp_path):
    x = np.arange(1000.0)
    case = replace(small(Contender("eager", lambda: lambda: x + x)), headline=True)
    for family in ("losses", "distance"):
        done = timing.measure(replace(case, family=family, operation=f"{family} twice"), 0.01)
        report.write(tmp_path / "here", report.machine("cpu"), [done])
    assert (tmp_path / "here" / "speedups.png").is_file()
    text = (tmp_path / "here" / "results.md").read_text()
    assert "losses twice" in text and "distance twice" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n{report.BEGIN}\nold\n{report.END}\nB\n")
    report.update_readme(readme, tmp_path / "here")
    report.update_readme(readme, tmp_path / "here")  # again: nothing is doubled
    lines = readme.read_text().splitlines()
    assert lines[0] == "# A" and lines[-1] == "B" and "old" not in lines
    rows = [line for line in lines if "twice" in line]
    assert len(rows) == 2 and all("x)" in row for row in rows)


def test_the_readme_holds_the_committed_figures():
    readme = (ROOT / "README.md").read_text()
    assert report.headlines(report.read(ROOT / "bench" / "results" / "amd-epyc")) in readme


def test_every_method_has_its_step_time(monkeypatch):
    pytest.importorskip("monai")
    from bench import methods as family
    from noisyseg_fast.training.methods import METHODS

    monkeypatch.setattr(family, "BATCH", 2)
    monkeypatch.setattr(family, "WIDTH", 2)
    family._batch.cache_clear()
    made = [make() for make in family.cases("cpu", quick=False)]
    assert {case.operation for case in made} >= {f"step of {name}" for name in METHODS}
    assert all(case.contenders[1].name == case.baseline for case in made)
    for name in ("ce", "mean_teacher", "mcpm", "umanet"):  # a step with each kind of companions
        next(case for case in made if case.operation == f"step of {name}").contenders[0].make()()
    assert "+ clean" in next(case.input for case in made if case.operation == "step of mcpm")
    family._batch.cache_clear()


def test_a_baseline_is_what_ours_is_a_multiple_of():
    case = {"baseline": "half", "contenders": {"half": {"p50": 1e-3, "state": "ok", "ours_is_faster": 0.5}}}
    assert report._entry(case, "half") == "1 ms (ours 2.00 of it)"


def test_the_steps_of_dtml_agree_whoever_makes_the_targets():
    from bench import steps

    for case in (steps.step_case((32, 32, 16)), steps.targets_case((32, 32, 16))):
        answers = {c.name: c.make()() for c in case.contenders}
        assert list(answers) == [OURS, "scipy", "scipy, as DTML's code"]
        for answer in answers.values():
            assert timing.relative_error(answer, answers[case.oracle]) < case.tolerance


# ---- comparing two runs ---------------------------------------------------------------------------


def run_of(*times: float, operation: str = "doubling", peer: float | None = 4.0, state: str = "ok") -> dict:
    """A result file of one case; times are p20, p50, p80 of ours."""
    p20, p50, p80 = times if state == "ok" else (None, None, None)
    note = "" if state == "ok" else "off by 1"
    contenders = {OURS: {"state": state, "note": note, "p20": p20, "p50": p50, "p80": p80}}
    contenders["peer"] = {
        "state": "ok" if peer else "missing",
        "note": "",
        "p20": peer,
        "p50": peer,
        "p80": peer,
    }
    contenders[COPY] = {"state": "ok", "note": "", "p20": 1.0, "p50": 1.0, "p80": 1.0}
    case = {"operation": operation, "input": "1000", "contenders": contenders}
    return {"machine": {"processor": "A", "threads": 2}, "cases": [case]}


@pytest.mark.parametrize(
    ("before", "after", "state", "code"),
    [
        (run_of(1.0, 1.1, 1.2), run_of(1.3, 1.4, 1.5), "slower", 1),
        (run_of(1.0, 1.1, 1.2), run_of(1.15, 1.4, 1.5), "same", 0),  # within the spread
        (run_of(1.0, 1.001, 1.002), run_of(1.01, 1.011, 1.012), "same", 0),  # beyond it, but by 1 %
        (run_of(1.3, 1.4, 1.5), run_of(1.0, 1.1, 1.2), "faster", 0),
        (run_of(1.0, 1.1, 1.2), run_of(1.0, 1.1, 1.2, state="wrong"), "wrong", 1),
        (run_of(1.0, 1.1, 1.2), run_of(1.0, 1.1, 1.2, peer=None), "missing", 0),
    ],
)
def test_compare_tells_slower_from_spread(tmp_path, before, after, state, code):
    from bench import compare

    for name, run in (("a", before), ("b", after)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "losses.json").write_text(json.dumps(run))
    lines, got = compare.report(tmp_path / "a", tmp_path / "b" / "losses.json")
    assert got == code
    assert any(line.startswith(f"{state} (1)") for line in lines), lines


def test_compare_names_rows_that_are_gone_and_other_machines(tmp_path):
    from bench import compare

    a, b = run_of(1, 1, 1), run_of(1, 1, 1, operation="tripling")
    b["machine"]["processor"] = "B"
    for name, run in (("a.json", a), ("b.json", b)):
        (tmp_path / name.replace(".json", "")).mkdir()
        (tmp_path / name.replace(".json", "") / "losses.json").write_text(json.dumps(run))
    lines, code = compare.report(tmp_path / "a", tmp_path / "b")
    assert code == 1 and any("machines differ" in line for line in lines)
    assert any(line.startswith("gone (1)") for line in lines) and any(
        line.startswith("new (1)") for line in lines
    )


def test_compare_by_peer_is_blind_to_the_machines_speed(tmp_path):
    from bench import compare

    a = run_of(1.0, 1.1, 1.2)
    b = copy.deepcopy(a)
    for timed in b["cases"][0]["contenders"].values():
        timed.update({p: 2 * timed[p] for p in ("p20", "p50", "p80")})
    for name, run in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(run))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").rename(tmp_path / name / "losses.json")
    assert compare.report(tmp_path / "a", tmp_path / "b")[1] == 1
    assert compare.report(tmp_path / "a", tmp_path / "b", by_peer=True)[1] == 0


def test_compare_as_a_command():
    results = ROOT / "bench" / "results" / "amd-epyc"
    command = [sys.executable, "-m", "bench.compare"]
    same = subprocess.run([*command, results, results], cwd=ROOT, capture_output=True, text=True)
    assert same.returncode == 0 and same.stdout.splitlines()[-1].startswith("same (")
    none = subprocess.run([*command, results, "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert none.returncode == 2 and none.stderr.startswith("compare: ")
