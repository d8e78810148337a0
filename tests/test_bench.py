"""The benchmark's own machinery, on tiny inputs: wrong answers are caught, missing peers are named."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
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
    text = (tmp_path / "results.md").read_text()
    assert "missing" in text and "| memory |" in text and "| launches |" not in text
    measured.timings[OURS].launches = 3  # a GPU's
    report.write(tmp_path, machine, [measured])
    assert "| launches | gone |" in (tmp_path / "results.md").read_text()
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
    readme.write_text(f"# A\n{report.BEGIN}\nold\n{report.END}\n{report.BEGIN}\n{report.END}\nB\n")
    report.update_readme(readme, tmp_path / "here")
    report.update_readme(readme, tmp_path / "here")  # again: nothing is doubled
    lines = readme.read_text().splitlines()
    assert lines[0] == "# A" and lines[-1] == "B" and "old" not in lines
    assert sum("twice" in line and "x)" in line for line in lines) == 2


def test_the_readme_holds_the_committed_figures():
    readme = (ROOT / "README.md").read_text()
    runs = report.read(ROOT / "bench" / "results" / "amd-epyc")
    assert report.headlines(runs) in readme
    assert report.slower(runs) in readme


def test_who_is_faster_is_told():
    def row(operation, **p50):
        timed = {name: {"p50": t, "p20": t and 0.9 * t} for name, t in p50.items()}
        return {"operation": operation, "input": "8", "contenders": {**timed, "copy": {"p50": 0.1}}}

    rows = [row("a", ours=1.0, eager=0.5, other=2.0), row("b", ours=1.0, eager=0.93, other=None)]
    assert report.slower({"x": {"cases": rows}}).splitlines()[2:] == ["| a | 8 | 1 s | eager 500 ms | 0.50 |"]
    assert report.slower({"x": {"cases": rows[1:]}}) == "Nobody, on any row."


@pytest.fixture
def small_steps(monkeypatch):
    """bench.methods on batches that nothing else here has, so that no call has been seen before."""
    pytest.importorskip("monai")
    from bench import methods as family

    monkeypatch.setattr(family, "BATCH", 3)
    monkeypatch.setattr(family, "WIDTH", 2)
    family._batch.cache_clear()
    yield family
    family._batch.cache_clear()


def test_every_method_has_its_step_with_and_without_us(small_steps):
    from noisyseg_fast.training.methods import METHODS

    made = [make() for make in small_steps.cases("cpu", quick=False)]
    steps = [case for case in made if case.operation.startswith("step of ")]
    assert {case.operation for case in steps} >= {f"step of {name}" for name in METHODS}
    assert all([c.name for c in case.contenders] == [OURS, report.PLAIN, case.baseline] for case in steps)
    assert all(case.oracle == report.PLAIN and case.contenders[0].error for case in made)
    assert "+ clean" in next(case.input for case in made if case.operation == "step of mcpm")


class KernelCalled(Exception):
    pass


def without_kernels(patch):
    from noisyseg_fast import _core

    def refuse(*arguments, **options):
        raise KernelCalled

    for name, value in vars(_core).items():
        if callable(value) and not name.startswith("_"):
            patch.setattr(_core, name, refuse)


STEPS = [(name, {}) for name in ("boundary", "confident_learning", "coplenet", "dtc", "hausdorff_dt", "l2rw")]
STEPS += [(name, {}) for name in ("mae_dice", "mcpm", "mr_net", "mwnet", "tri_net", "trimmed", "umanet")]
STEPS += [("dtml", {"supervision": "both"}), ("hausdorff_dt", {"field": "soft"})]
STEPS += [("star_shape", {"centre": "deepest"}), ("umanet", {"entropy": "binary"})]


def test_steps_without_us_call_no_kernel_and_give_the_same(small_steps, monkeypatch):
    cases, expected = [small_steps.step_case(*step) for step in STEPS], []
    for case in cases:
        ours, plain, _ = case.contenders
        with monkeypatch.context() as patch:
            without_kernels(patch)
            expected.append(plain.make()())
            with pytest.raises(KernelCalled):
                ours.make()()
    for case, answer in zip(cases, expected, strict=True):
        losses, slope = answer
        assert losses[0] > 0.01 and slope.abs().max() > 1e-6, case.operation
        found = case.contenders[0].make()()
        assert timing.relative_error(found, answer) < case.tolerance, case.operation
    mcpm = timing.measure(next(case for case in cases if "mcpm" in case.operation), 0.01)
    assert {timed.state for timed in mcpm.timings.values()} == {
        "ok"
    }  # later steps leave the first answer alone


def test_labels_without_us_call_no_kernel_and_are_the_same(small_steps, monkeypatch):
    pytest.importorskip("SimpleITK")
    for name in small_steps.FUSED:
        case = small_steps.labels_case(name)
        ours, plain = case.contenders
        with monkeypatch.context() as patch:
            without_kernels(patch)
            expected = plain.make()()
            with pytest.raises(KernelCalled):
                ours.make()()
        assert ours.error(ours.make()(), expected) <= case.tolerance and expected.any()


def test_a_wrong_step_is_reported(small_steps, monkeypatch):
    from bench import plain
    from noisyseg_fast import losses
    from noisyseg_fast.training.methods.plain import LOSSES

    right = plain.PLAIN["losses"]["pixel_loss"]
    monkeypatch.setitem(plain.PLAIN["losses"], "pixel_loss", lambda *a, **k: 1.01 * right(*a, **k))
    plain._places.cache_clear()
    try:
        measured = timing.measure(small_steps.step_case("gce", {}), 0.01)
    finally:
        plain._places.cache_clear()
    assert measured.timings[OURS].state == "wrong" and measured.timings[report.PLAIN].p50
    assert LOSSES["gce"].function is losses.pixel_loss  # ours is back in its place


def test_all_that_training_uses_of_ours_has_a_plain_counterpart():
    import ast
    import importlib

    from bench.plain import PLAIN

    homes = {home: importlib.import_module(f"noisyseg_fast.{home}") for home in PLAIN}
    training = ROOT / "noisyseg_fast" / "training"
    used = set()
    for path in [*(training / "methods").glob("*.py"), training / "history.py", training / "shapes.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > 1 and node.module in homes:
                used |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used |= {(node.value.id, node.attr)} if node.value.id in homes else set()
    ours = {(h, n) for h, n in used if callable(getattr(homes[h], n, None)) and n[0].islower()}
    torch_alone = {("labels", "label_sampling")}
    assert ours - torch_alone == ours & {(h, n) for h, names in PLAIN.items() for n in names}
    assert len(ours) > 15 and ("distance", "signed_distance_map") in ours


@pytest.mark.parametrize("channels", [1, 3])
def test_the_plain_losses_are_ours(channels):
    import torch

    from bench.plain import PLAIN
    from noisyseg_fast import losses

    random = torch.Generator().manual_seed(channels)
    z, other = (torch.randn(2, channels, 9, 11, generator=random) for _ in range(2))
    y = torch.randint(0, max(2, channels), (2, 9, 11), generator=random, dtype=torch.uint8)
    y[:, :2] = 255
    mask = torch.rand(2, 9, 11, generator=random) < 0.8
    labels = {"ignore_index": 255, "mask": mask}
    options = {
        "pixel_loss": [{**labels, "kind": k} for k in ("ce", "focal", "gce", "mae")],
        "dice_loss": [labels, {"denominator": "linear", "per_image": False, **labels}],
        "focal_dice_loss": [{"beta": 0.5, **labels}],
        "nr_dice_loss": [labels, {"gamma": 1.2, "denominator": "linear", **labels}],
        "dice_ce_loss": [{"dice_weight": 0.3, **labels}],
        "dice_mae_loss": [{"mae_weight": 0.3, **labels}],
        "boundary_loss": [{"mask": mask}, {"mask": mask, "include_background": channels == 1}],
        "consistency_loss": [{"kind": k, "mask": mask} for k in ("mse", "mae")],
    }
    assert set(options) == set(PLAIN["losses"])
    for name, several in options.items():
        target = other if name in ("boundary_loss", "consistency_loss") else y
        for one in several:
            for reduction in ("mean", "image") if one.get("per_image", True) else ("mean",):
                given = {
                    "activation": "sigmoid" if channels == 1 else "softmax",
                    "reduction": reduction,
                    **one,
                }
                expected = getattr(losses, name)(z, target, **given)
                assert torch.allclose(PLAIN["losses"][name](z, target, **given), expected, rtol=1e-4), given


def test_a_baseline_is_what_ours_is_a_multiple_of():
    case = {"baseline": "half", "contenders": {"half": {"p50": 1e-3, "state": "ok", "ours_is_faster": 0.5}}}
    assert report._entry(case, "half") == "1 ms (ours 2.00 of it)"


def test_the_steps_of_dtml_agree_whoever_makes_the_targets():
    from bench import steps

    for case in (steps.step_case((32, 32, 16)), steps.targets_case((32, 32, 16))):
        answers = {c.name: c.make()() for c in case.contenders}
        assert list(answers)[:3] == [OURS, "scipy", "scipy, as DTML's code"]
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


# ---- floors, limits, predictions ------------------------------------------------------------------


def test_a_floor_is_the_longest_of_copy_arithmetic_and_autograd(monkeypatch):
    monkeypatch.setattr(timing, "unit_rates", lambda device: {"exp": 1e3, "div": 1e3})
    monkeypatch.setattr(timing, "autograd_floor", lambda device: 0.5)
    monkeypatch.setattr(timing, "new_pages", lambda: 1e-9)
    case = small()
    for changed, kind in (
        (case, "copy"),
        (replace(case, fresh=timing.MAPPED - 1), "copy"),
        (replace(case, fresh=timing.MAPPED), "copy, new pages"),
        (replace(case, autograd=True), "autograd"),
        (replace(case, autograd=True, work={"exp": 1000, "div": 1000}), "arithmetic"),
    ):
        measured = timing.measure(changed, 0.01)
        assert measured.floor_kind == kind
    assert measured.floor_s == pytest.approx(2.0)
    assert measured.took > 0


def test_the_rates_that_floors_come_from_are_measured():
    rates = timing.unit_rates("cpu")
    assert set(rates) == {"exp", "sqrt", "div"} and all(1e6 < rate < 1e13 for rate in rates.values())
    assert 1e-7 < timing.autograd_floor("cpu") < 0.1
    assert 0 <= timing.new_pages() < 1e-6


def test_a_contender_that_is_too_slow_is_skipped_by_name_and_stays_so():
    from bench import __main__ as suite

    case = replace(small(Contender("slow", lambda: lambda: 2 * np.arange(1000.0))), headline=True)
    row = {"operation": "doubling", "input": "1000", "headline": True, "contenders": {"slow": {"p50": 20.0}}}
    last = {"losses": [row]}
    skip = suite.left_out(case, last, suite.FULL)
    assert suite.left_out(case, last, suite.ALL) == {}
    measured = timing.measure(case, 0.01, skip=skip)
    assert measured.timings["slow"].state == "skipped" and "20 s a call" in measured.timings["slow"].note
    again = [report._record(measured)]
    assert suite.left_out(case, {"losses": again}, suite.FULL) == skip


def test_a_case_without_time_left_begins_no_further_peer():
    def slow():
        time.sleep(0.05)
        return 2 * np.arange(1000.0)

    def compile_it():
        raise AssertionError("begun without time for it")

    peers = [Contender("first", lambda: slow), Contender("second", lambda: slow), Contender("gone", missing)]
    case = small(Contender(timing.COMPILED, compile_it), *peers)
    measured = timing.measure(case, 1.0, budget=0.07, compiling=30.0).timings
    assert [measured[n].state for n in (OURS, COPY, "first", "second")] == ["ok", "ok", "ok", "skipped"]
    assert measured["gone"].state == "missing"  # whether or not there is time
    assert measured["first"].runs == 1 and "no time left" in measured["second"].note
    assert "no time left to compile" in measured[timing.COMPILED].note


@pytest.mark.parametrize(("takes", "begun"), [(0.5, 10), (1.5, 10), (4.0, 3)])
def test_a_run_keeps_its_time_whatever_its_cases_take(takes, begun):
    """Each case gets its share of what is left; what cases take beyond it, the later ones do not get."""
    from bench import __main__ as suite

    now, parts = [0.0], []

    def one(case, budget):
        parts.append(budget)
        now[0] += takes if takes != 1.5 else min(takes, budget)

    needed = [1.0] * 10
    assert suite.run([small] * 10, needed, 10.0, one, lambda: now[0]) == begun
    assert now[0] <= 10.0 + takes and parts[0] == pytest.approx(1.0)
    assert sum(needed) == 10 and (takes >= 1 or parts[-1] > 1.0)


def test_what_a_case_needs_comes_from_the_last_results():
    from bench import __main__ as suite

    last = suite.known(ROOT / "nowhere", "cpu")
    assert set(last) >= {"losses", "distance", "methods"}
    last.pop("validation", None)
    work = {"losses": last["losses"], "unheard": [None] * 3, "validation": [None]}
    needed = suite.needs(work, last, suite.FULL)
    assert needed[-4:] == [suite.UNKNOWN] * 3 + [suite.UNKNOWN * suite.LONG["validation"]]
    assert min(needed) > 1
    record = {
        "contenders": {OURS: {"p50": 0.1}, "peer": {"p50": 50.0}, "checks": {"p50": 20.0}},
        "oracle": "checks",
        "headline": True,
    }
    least = suite.FULL.seconds + 0.5 + 0.5 + 20
    assert suite.need(record, suite.FULL) == pytest.approx(least)
    assert suite.need({**record, "took": 90.0, "compiling": 5.0}, suite.FULL) == pytest.approx(90 - 5 - 50)


def test_whole_steps_are_shown_with_what_is_written_without_us():
    def timed(seconds, faster):
        return {"state": "ok", "note": "", "p50": seconds, "ours_is_faster": faster}

    case = {"operation": "step of x", "input": "8", "baseline": "a step of ce"}
    contenders = {OURS: timed(0.2, None), report.PLAIN: timed(0.3, 1.5), "a step of ce": timed(0.1, 0.5)}
    passes = {"operation": "pass", "input": "20 volumes", "baseline": None}
    missing = {"state": "missing", "note": "", "p50": None, "ours_is_faster": None}
    peers = {OURS: timed(1.0, None), "MONAI": timed(9.0, 9.0), "MedPy": missing}
    runs = {
        "methods": {"cases": [{**case, "contenders": contenders}]},
        "validation": {"cases": [{**passes, "contenders": peers}]},
    }
    assert report.whole_steps(runs).splitlines()[2:] == [
        "| step of x | 8 | 200 ms | 300 ms | 1.50x | 2.00 |",
        "| pass | 20 volumes | 1 s | 9 s, MONAI | 9.00x |  |",
        "| pass | 20 volumes | 1 s | missing, MedPy |  |  |",
    ]


def test_floor_tables_have_a_row_for_each_operation():
    runs = report.read(ROOT / "bench" / "results" / "amd-epyc")
    table = report.floors(runs)
    for operation in ("NR-Dice, forward + backward", "distance transform", "STAPLE", "surface metrics"):
        assert sum(line.startswith(f"| {operation} |") for line in table.splitlines()) == 1
    ratios = [float(line.split("|")[-2]) for line in table.splitlines()[2:]]
    assert all(0.5 < ratio < 1e5 for ratio in ratios)


def test_the_performance_page_holds_the_committed_figures():
    page = (ROOT / "docs" / "performance.md").read_text()
    for table in report.performance_tables(ROOT, ROOT / "bench" / "results" / "amd-epyc"):
        assert table in page


def test_tables_go_between_a_pages_marks(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(f"1\n{report.BEGIN}\nx\n{report.END}\n2\n{report.BEGIN}\n{report.END}\n3")
    report.put(page, ["A", "B"])
    report.put(page, ["A", "B"])
    assert page.read_text() == f"1\n{report.BEGIN}\nA\n{report.END}\n2\n{report.BEGIN}\nB\n{report.END}\n3"
    with pytest.raises(ValueError, match="2 places for 1 tables"):
        report.put(page, ["A"])


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "dynamic", "blocks"),
    [
        (32, 0, 256, 0, 8),  # full: 2048 threads
        (64, 0, 256, 0, 4),  # 65536 / 64 / 256
        (65, 0, 256, 0, 3),  # 65 become 72
        (32, 0, 256, 100 * 1024, 2),  # 228 KB, 1 KB of each block reserved
        (16, 0, 32, 0, 32),  # no more blocks than 32
    ],
)
def test_occupancy_on_an_h200(monkeypatch, registers, shared, threads, dynamic, blocks):
    from bench.gpu import predict

    monkeypatch.setattr(predict, "resources", lambda: {"k": {"sm_90": [registers, shared]}})
    assert predict.blocks_resident("k", threads, dynamic) == blocks


def test_predictions_on_file_are_those_of_the_pins():
    from dataclasses import asdict

    from bench.gpu import predict

    on_file = json.loads(predict.PREDICTIONS.read_text())
    assert [asdict(p) for p in predict.cases()] == on_file
    for (
        row
    ) in on_file:  # never quicker than the copy of what must come from memory, half of which L2 may hold
        assert row["device_s"] >= row["megabytes"] * 1e6 / predict.COPY_BANDWIDTH / 2
        assert 0 < row["occupancy"] <= 1


def test_a_gpu_run_is_compared_with_what_was_predicted():
    from bench.gpu import predict

    on_file = json.loads(predict.PREDICTIONS.read_text())
    row = on_file[0]
    case = {
        "operation": row["operation"],
        "input": row["input"],
        "contenders": {OURS: {"p50": 2 * row["call_s"]}},
    }
    runs = {row["family"]: {"cases": [{**case, "device": "cuda"}, {**case, "device": "cpu"}]}}
    compared = predict.compare(on_file, runs)
    assert len(compared) == 1 and compared[0]["ratio"] == pytest.approx(2)
    assert "| 2.00 |" in report.prediction_table(compared)
    assert predict.compare(on_file, {}) == []


def test_the_validation_pass_agrees_with_monai():
    pytest.importorskip("monai")
    pytest.importorskip("medpy")
    from bench import validation

    measured = timing.measure(validation.pass_case(1, (24, 24, 16)), 0.01)
    assert {t.state for t in measured.timings.values()} == {"ok"}, measured.timings


def test_sweeps_cover_size_batch_classes_raters_and_threads():
    from bench import sweeps

    made = list(sweeps.cases("cpu", quick=False))
    assert len(made) > 35 and not list(sweeps.cases("cpu", quick=True))
    case = sweeps._on_threads(lambda: timing.nr_dice_case((1, 1, 64), deadline=0.0), 1)
    assert case.family == "sweeps" and case.input == "1x1x64, 1 thread"
    assert timing.measure(case, 0.01).timings[OURS].state == "ok"


def test_a_peer_of_opposite_sign_can_be_the_oracle():
    """edt.sdf is positive inside; on a mask of one class, and on large volumes, it is what is compared with."""
    pytest.importorskip("edt")
    measured = timing.measure(timing.signed_case(np.ones((1, 5, 6, 7), np.uint8), deadline=0.0), 0.01)
    assert measured.timings[OURS].state == "ok"
