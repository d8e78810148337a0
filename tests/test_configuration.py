"""What a run is told, by the command line and by files: each setting must reach the training."""

import csv
import json
import re
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
for _needed in ("monai", "lightning", "nibabel", "typer", "rich"):
    pytest.importorskip(_needed)

from folders import nifti_folder  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from noisyseg_fast import cli  # noqa: E402
from noisyseg_fast.training import engine, evaluate, model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return nifti_folder(tmp_path_factory.mktemp("data") / "set", cases=6, raters=1)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in ("train", *arguments)])


def works(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def saved(out):
    return json.loads((out / "config.json").read_text())


def history(out):
    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


def state(out, name="last.pt"):
    return model.read_checkpoint(out / name)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


TINY = ("--width", 4, "--batch-size", 4, "--device", "cpu")


# ---- files of settings ----------------------------------------------------------------------------


def test_config_and_set(data, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {data}\nmethod: coplenet\nnetwork: unet\nwidth: 4\nepochs: 3\nbatch_size: 4\ndevice: cpu\n"
        "options: {decay: 0.5, percentile: 0.7}\npatch: [32, 16]\n"
    )
    works("--config", file, "--out", tmp_path / "a", "--epochs", 1)
    found = saved(tmp_path / "a")
    assert (found["config"]["method"], found["config"]["epochs"]) == ("coplenet", 1)  # the option goes first
    assert (found["method_options"]["decay"], found["method_options"]["percentile"]) == (0.5, 0.7)
    assert found["model"]["patch"] == [32, 16]
    works("--config", file, "--out", tmp_path / "b", "--epochs", 1, "--set", "decay=0.9", "--set", "late=0.5")
    options = saved(tmp_path / "b")["method_options"]
    # --set changes those that it names, and leaves the file's others.
    assert (options["decay"], options["late"], options["percentile"]) == (0.9, 0.5, 0.7)
    assert not same(state(tmp_path / "a")["method"], state(tmp_path / "b")["method"])
    works("--config", file, "--out", tmp_path / "c", "--epochs", 1, "--method", "gce", "--set", "q=0.5")
    assert saved(tmp_path / "c")["method_options"] == {"q": 0.5}  # another method has other options
    works("--config", file, "--out", tmp_path / "d", "--epochs", 1, "--method", "ce")
    assert saved(tmp_path / "d")["method_options"] == {}


def test_a_saved_configuration_repeats_the_run_to_the_bit(data, tmp_path):
    works(
        "--data", data, "--method", "mean_teacher", "--set", "decay=0.9", "--noise-rate", 0.5, "--epochs", 2,
        "--schedule", "constant", "--seed", 3, "--out", tmp_path / "a", *TINY,
    )  # fmt: skip
    works("--config", tmp_path / "a" / "config.json", "--out", tmp_path / "b")
    a, b = (saved(tmp_path / name) for name in "ab")
    assert a["config"].pop("out") != b["config"].pop("out")
    assert a["method_options"] == b["method_options"]
    for part in ("config", "model"):  # as given, and all of them
        assert a[part].pop("options") == {"decay": "0.9"} and b[part].pop("options") == b["method_options"]
    assert a == b
    for name in ("last.pt", "best.pt"):
        assert same(state(tmp_path / "a", name)["method"], state(tmp_path / "b", name)["method"])
    assert str(state(tmp_path / "a")["optimizer"]) == str(state(tmp_path / "b")["optimizer"])
    assert (tmp_path / "a" / "test.csv").read_text() == (tmp_path / "b" / "test.csv").read_text()
    rows = [[{**row, "seconds": None} for row in history(tmp_path / name)] for name in "ab"]
    assert rows[0] == rows[1]
    works("--config", tmp_path / "a" / "config.json", "--seed", 4, "--out", tmp_path / "c")
    assert not same(state(tmp_path / "a")["method"], state(tmp_path / "c")["method"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methode: gce", "is no configuration ("),
        ("[1, 2]", "is no configuration ("),
        ("a: b: c", "is no configuration ("),
        ("", "is no configuration ("),
    ],
)
def test_bad_files_of_settings(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    result = run("--config", file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert re.match(f"noisyseg: {re.escape(str(file))}: {re.escape(message)}", result.stderr)
    assert len(result.stderr.splitlines()) == 1
    missing = run("--config", tmp_path / "none.yaml")
    assert (
        missing.stderr == f"noisyseg: {tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n"
    )


# ---- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("poly", [1, 0.75**0.9, 0.5**0.9, 0.25**0.9]),
        ("constant", [1, 1, 1, 1]),
        ("halve", [1, 0.5, 0.25, 0.125]),
    ],
)
def test_schedule(data, tmp_path, monkeypatch, schedule, expected):
    """The rates that Adam has in each step; 4 training cases are one step an epoch."""
    rates, step = [], torch.optim.Adam.step

    def watched(self, *arguments, **more):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **more)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    (tmp_path / "run.yaml").write_text("halve_every: 1\n")
    works(
        "--data", data, "--config", tmp_path / "run.yaml", "--schedule", schedule, "--epochs", 4, "--lr", 0.01,
        "--out", tmp_path / "run", *TINY,
    )  # fmt: skip
    assert rates == pytest.approx([0.01 * share for share in expected])
    assert [float(row["lr"]) for row in history(tmp_path / "run")] == pytest.approx(rates, abs=1e-6)


def test_halving_counts_steps_and_not_epochs():
    config = engine.Config(schedule="halve", halve_every=10_000)
    found = [config.decay(t, 7) for t in (0, 9_999, 10_000, 19_999, 20_000, 50_000)]
    assert found == [1, 1, 0.5, 0.5, 0.25, 1 / 32]
    assert [replace(config, epochs=epochs).decay(10_000, 7) for epochs in (1, 9)] == [0.5, 0.5]


def test_unknown_schedule(tmp_path):
    result = run("--schedule", "step", "--out", tmp_path / "run")
    assert result.stderr == "noisyseg: unknown schedule 'step'; choose from poly, constant, halve, tenth\n"


# ---- early stopping -------------------------------------------------------------------------------


def scores(monkeypatch, dice):
    """Validation gives these Dice scores, epoch by epoch."""
    values = iter(dice)
    real = engine._Loop._scores

    def given(self, cases):
        return (
            [evaluate.Score("a", 1, next(values), 0.5, 1.0, 1.0, 1.0, 1.0, "")]
            if cases is self.data.validation
            else real(cases)
        )

    monkeypatch.setattr(engine._Loop, "_scores", given)


@pytest.mark.parametrize(
    ("patience", "dice", "epochs", "best"),
    [
        (2, [0.5, 0.6, 0.6, 0.4, 0.9, 0.9, 0.9], 4, 1),  # an equal score is no gain
        (3, [0.5, 0.6, 0.6, 0.4, 0.9, 0.8, 0.7, 0.6], 8, 4),  # a gain in time starts the count again
        (1, [0.1, 0.2, 0.3, 0.2], 4, 2),
        (None, [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1], 9, 0),
    ],
)
def test_patience(data, tmp_path, monkeypatch, patience, dice, epochs, best):
    scores(monkeypatch, dice)
    wish = () if patience is None else ("--patience", patience)
    works("--data", data, "--epochs", 9, *wish, "--out", tmp_path / "run", *TINY)
    assert len(history(tmp_path / "run")) == epochs
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_epoch"] == best
    assert state(tmp_path / "run", "best.pt")["epoch"] == best + 1


def test_patience_waits_until_the_method_is_mature(data, tmp_path, monkeypatch):
    """label_update's network is untrained in the first half, where no score counts."""
    scores(monkeypatch, [0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2])
    config = engine.Config(
        data=str(data), method="label_update", options={"members": 1}, width=4, batch_size=4, epochs=10,
        patience=2, device="cpu", out=str(tmp_path / "run"),
    )  # fmt: skip
    result = engine.train(config, report=False)
    assert (len(result.history), result.best_epoch) == (8, 5)


def test_bad_patience(tmp_path):
    assert (
        run("--patience", 0, "--out", tmp_path / "a").stderr
        == "noisyseg: patience must be at least 1, got 0\n"
    )
