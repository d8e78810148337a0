"""`noisyseg reproduce`: the grid of runs, going on after an interruption, tables and what they say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from folders import blob  # noqa: E402

from noisyseg_fast.training import engine  # noqa: E402
from noisyseg_fast.training import reproduce as R  # noqa: E402


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """32 patches of 32x32, 16 patients, one patch without any object."""
    path = tmp_path_factory.mktemp("study") / "patches.npz"
    pairs = [blob((32, 32), i) for i in range(32)]
    image, mask = (np.stack(a) for a in zip(*pairs, strict=True))
    mask[5] = 0
    np.savez(
        path,
        image=image,
        mask=mask,
        patient=np.repeat([f"p{i}" for i in range(16)], 2),
        pixel_mm=np.full(32, 2.0),
    )
    return str(path)


ARMS = ("ce", "ce_clean", "mcpm")


def go(out, source, **more):
    settings = {"data": source, "seeds": 1, "budget": 2, "arms": ARMS, "quick": True, **more}
    return R.reproduce("mcpm", out, **settings)


def test_interrupted_in_a_run_it_goes_on_and_ends_the_same(source, tmp_path, monkeypatch):
    whole = go(tmp_path / "whole", source)
    assert [row["key"] for row in whole] == [
        "ce-r=0.4-seed0", "ce-r=0.8-seed0", "ce_clean-seed0", "mcpm-r=0.4-seed0", "mcpm-r=0.8-seed0",
    ]  # fmt: skip
    assert {row["steps"] for row in whole} == {2}
    save, saved = engine._Loop.save_last, []

    def save_and_stop(self):
        save(self)
        saved.append(self.config.out)
        if len(saved) == 7:  # the first epoch of the fourth run
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._Loop, "save_last", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "b", source)
    assert len(json.loads((tmp_path / "b" / "results.json").read_text())) == 3
    assert (tmp_path / "b" / "results.md").is_file()
    rows = go(tmp_path / "b", source)
    assert [row["resumed"] for row in rows] == [False, False, False, True, False]
    for name in ("dice", "hd95", "weights"):
        assert [row[name] for row in rows] == [row[name] for row in whole]
    assert rows[-1]["weights"]["auroc"] is not None and rows[0]["weights"] is None

    def never(*args, **kwargs):
        raise AssertionError("is finished already")

    monkeypatch.setattr(R, "train", never)
    assert go(tmp_path / "b", source) == rows
    with pytest.raises(
        ValueError, match=re.escape("was begun with other settings; take them, or another folder")
    ):
        go(tmp_path / "b", source, budget=4)
    # A folder of a version that did not have one of the settings.
    asked = json.loads((tmp_path / "b" / "study.json").read_text())
    del asked["settings"]["weight_decay"]
    (tmp_path / "b" / "study.json").write_text(json.dumps(asked))
    assert go(tmp_path / "b", source) == rows
    text = (tmp_path / "b" / "results.md").read_text()
    assert "| MCPM | " in text and "AUROC" in text and "Order by Dice" in text
    assert (tmp_path / "b" / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_the_data_of_the_mcpm_study(source):
    study = R.get("mcpm")
    settings = R.replace(study.settings, data=source)
    data = study.data(settings)
    assert data.unit == "px"
    assert {case.spacing for case in data.split("all")} == {(1.0, 1.0)}
    assert len(data.split("all")) == 31  # one has no consensus
    assert data.meta and not {c.patient for c in data.meta} & {c.patient for c in data.training}
    assert [c.id for c in study.data(R.replace(settings, seed=3)).test] == [c.id for c in data.test]


def test_all_arms_have_the_same_budget_and_differ_as_they_say():
    study = R.get("mcpm")
    settings = R.replace(study.settings, epochs=5, epoch_batches=100)
    runs = R.plan(study, settings, study.arms, 3, Path("out"))
    assert len({run.key for run in runs}) == len(runs)
    budget = {
        (run.config.epochs, run.config.epoch_batches, run.config.batch_size, run.config.lr) for run in runs
    }
    assert budget == {(5, 100, 8, 3e-3)}
    assert {run.config.seed for run in runs} == {0, 1, 2}
    for run in runs:
        run.config.check()
        assert run.config.noise_rate == (0.0 if study.arms[run.arm].everywhere else float(run.condition[-3:]))
    assert set(study.default_arms) <= set(study.arms)
    assert len(R.plan(study, settings, study.default_arms, 3, Path("out"))) == 36


def row(arm, condition, seed, dice, **more):
    figures = {
        "dice": dice,
        "iou": dice - 0.1,
        "hd95": 3.0,
        "empty_predictions": 0,
        "seconds": 1.0,
        "weights": None,
    }
    return {"arm": arm, "condition": condition, "seed": seed, **figures, **more}


def test_tables_and_what_they_say(tmp_path):
    study = R.get("mcpm")
    rows = [row("ce", "r = 0.4", s, 0.5 + 0.1 * s) for s in range(2)]
    rows += [row("mcpm", "r = 0.4", s, 0.6) for s in range(2)]
    rows += [row("ce_clean", "", s, 0.9) for s in range(2)]
    found = {"auroc": 0.9, "average_precision": 0.5, "share": 0.1, "weight_wrong": 0.2, "weight_right": 0.8}
    rows[2]["weights"] = rows[3]["weights"] = found
    R.write(study, rows, R.replace(study.settings, epochs=5, epoch_batches=10), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert (
        "| U-Net, noisy and clean labels | 0.5500 ± 0.0707 | 0.4500 ± 0.0707 | 3.00 ± 0.00 | 2 | 0.7556 |"
        in text
    )
    assert "Order by Dice: ce_clean > mcpm > ce." in text
    assert "- mcpm minus ce: 0.0500 ± 0.0707 Dice, ahead in 1 of 2 seeds." in text
    assert (
        "Dice: another order as in the paper: here ce_clean > mcpm > ce; there mcpm > ce_clean > ce." in text
    )
    assert "| r = 0.4 | MCPM | 0.900 ± 0.000 | 0.500 ± 0.000 |" in text
    assert "50 iterations of batch 8" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"arms": ("cee",)}, "unknown arm 'cee' of study mcpm; choose from ce, ce_meta, ce_clean"),
    ],
)
def test_bad_requests(source, tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        go(tmp_path / "out", source, **change)
    assert not (tmp_path / "out").exists()


def test_unknown_study_and_folder_in_use(source, tmp_path):
    with pytest.raises(ValueError, match="unknown study 'mcmp'; choose from mcpm"):
        R.reproduce("mcmp", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no study; choose another folder"):
        go(tmp_path, source)


def test_command(source, tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from noisyseg_fast import cli

    arguments = ["reproduce", "mcpm", "--quick", "--seeds", "1", "--budget", "2", "--arm", "ce_clean"]
    result = CliRunner().invoke(cli.app, [*arguments, "--data", source, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "results.md" in result.output
    assert "Example: noisyseg reproduce" in CliRunner().invoke(cli.app, ["reproduce", "--help"]).output
    bad = CliRunner().invoke(cli.app, ["reproduce", "none"])
    known = ", ".join(R.STUDIES)
    assert bad.exit_code == 2 and bad.stderr == f"noisyseg: unknown study 'none'; choose from {known}\n"


def test_one_rater_each_in_the_coplenet_study(tmp_path):
    image, mask = (np.stack(a) for a in zip(*[blob((32, 32), i) for i in range(24)], strict=True))
    raters = np.stack([mask, np.roll(mask, 1, 1), np.zeros_like(mask), np.roll(mask, 2, 2)], 1)
    path = tmp_path / "raters.npz"
    np.savez(path, image=image, mask=raters, patient=[f"p{i}" for i in range(24)], pixel_mm=np.ones(24))
    study = R.get("coplenet")
    data = study.data(R.replace(study.settings, data=str(path)))
    drawn = study.under(data, "one rater")
    assert drawn.test == data.test and study.under(data, "r = 0.4") is data
    kinds = set()
    for before, after in zip(data.training, drawn.training, strict=True):
        assert after.labels.shape == (1, 32, 32) and after.labels.any()
        same = [k for k in (0, 1, 3) if np.array_equal(after.labels[0], before.labels[k])]
        assert same
        kinds.update(same)
    assert kinds == {0, 1, 3}  # one of those who marked something, not always the same
    again = study.under(data, "one rater").training
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(drawn.training, again, strict=True))


def test_arms_of_one_condition_only():
    study = R.get("coplenet")
    settings = R.replace(study.settings, epochs=5, epoch_batches=100)
    runs = R.plan(study, settings, study.default_arms, 1, Path("out"))
    assert [r.condition for r in runs if r.arm == "mae"] == ["one rater"]
    assert [r.condition for r in runs if r.arm == "nr_dice"] == ["one rater", "r = 0.4"]
    assert [r.condition for r in runs if r.arm == "clean"] == [""]
