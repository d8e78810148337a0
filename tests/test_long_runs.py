"""Runs that are stopped, killed, or that meet a full disk, a vanished file or a loss that is not finite."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

for package in ("monai", "lightning", "nibabel", "typer"):
    pytest.importorskip(package)
torch = pytest.importorskip("torch")

from folders import nifti_folder  # noqa: E402
from steps import SHORT  # noqa: E402

from noisyseg_fast.training import engine, methods, model, signals  # noqa: E402
from noisyseg_fast.training.engine import Config, train  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
STORE = engine.Store
ROOT = Path(__file__).resolve().parent.parent


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """8 small images with two raters each, and 2 without labels."""
    root = nifti_folder(tmp_path_factory.mktemp("data") / "set", cases=10, shape=(16, 32))
    (root / "imagesUn").mkdir()
    for i in (8, 9):
        (root / "imagesTr" / f"case{i}_0000.nii.gz").rename(root / "imagesUn" / f"case{i}_0000.nii.gz")
        for path in root.glob(f"labelsTr/case{i}_*"):
            path.unlink()
    return root


@pytest.fixture(scope="module")
def tiny(folder):
    """2 epochs of 3 steps."""
    return Config(
        data=str(folder), width=4, epochs=2, batch_size=2, epoch_batches=3, device="cpu", lr=3e-3,
        meta_fraction=0.2, noise_rate=0.5, network="unet",
    )  # fmt: skip


def of(tiny, name, out):
    return replace(tiny, method=name, options=SHORT.get(name, {}), out=str(out))


def same(a, b, where=""):
    """Equal to the bit, whatever it is made of; else where it is not."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.isnan(), b.isnan()), where  # a history of losses has some
        assert torch.equal(a[~a.isnan()], b[~b.isnan()]), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            same(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}.{i}")
    else:
        assert a == b or (a != a and b != b), where


def end(out, name="last.pt"):
    """What a checkpoint holds, but for the times and the folder."""
    state = model.read_checkpoint(Path(out) / name)
    for row in state.get("history", ()):
        del row["seconds"]
    del state["config"], state["file"]
    state.pop("seconds", None)
    return state


def whole(folder):
    """Every file of a run's folder loads, and nothing is left half written."""
    import csv
    import json

    for path in folder.rglob("*"):
        assert not path.name.startswith(".tmp"), path
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            rows = list(csv.reader(path.read_text().splitlines()))
            assert {len(row) for row in rows} == {len(rows[0])}, path


def signal_in(monkeypatch, number, step, where="_step"):
    """A real signal during that step, or, with "_unless_stopping", at that case of a validation."""
    calls, before = [], getattr(engine._Loop, where)

    def sent(self, *arguments):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return before(self, *arguments)

    monkeypatch.setattr(engine._Loop, where, sent)


# ---- stopped and resumed ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read_once():
    """The same loaded images for all runs."""
    return cache(lambda classes, *_, raters, spacing, **__: STORE(classes, raters=raters, spacing=spacing))


@pytest.mark.parametrize("name", methods.METHODS)
def test_stopped_within_an_epoch_and_resumed_is_the_same_to_the_bit(
    name, tiny, read_once, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine._Loop, "finish", lambda self, *_: None)
    monkeypatch.setattr(engine, "Store", read_once)
    number = (signal.SIGTERM, signal.SIGINT)[list(methods.METHODS).index(name) % 2]
    train(of(tiny, name, tmp_path / "whole"), report=False)
    with monkeypatch.context() as patch:
        signal_in(patch, number, step=4)
        with pytest.raises(signals.Interrupted) as stop:
            train(of(tiny, name, tmp_path / "cut"), report=False)
    assert stop.value.code == 128 + number
    state = end(tmp_path / "cut")
    assert (state["epoch"], state["at"], state["step"]) == (1, 1, 4)
    torch.rand(7)  # other use of the global generators in between must not matter
    train(engine.read_config(tmp_path / "cut"), resume=True, report=False)
    same(end(tmp_path / "whole"), end(tmp_path / "cut"))


# In the order of the state: cheap ones that keep little, a history, a teacher, own optimisers, a weighing network.
KEEPING = ("ce", "coplenet", "ua_mt", "asdnet", "mcpm")


@pytest.fixture
def untested(monkeypatch, read_once):
    """Runs end with their training."""
    monkeypatch.setattr(engine._Loop, "finish", lambda self, *_: None)
    monkeypatch.setattr(engine, "Store", read_once)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory, read_once):
    """The folder of the cross-entropy run, only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Loop, "finish", lambda self, *_: None)
        patch.setattr(engine, "Store", read_once)
        out = tmp_path_factory.mktemp("runs") / "whole"
        train(of(tiny, "ce", out), report=False)
    return out


@pytest.fixture(scope="module")
def uninterrupted(finished):
    """The end of the cross-entropy run."""
    return end(finished)


def goes_on(out, uninterrupted):
    """The run in the folder, resumed, ends as an uninterrupted one."""
    train(engine.read_config(out), resume=True, report=False)
    same(uninterrupted, end(out))
    whole(out)


def test_a_signal_in_validation_has_it_done_again(tiny, tmp_path, monkeypatch, untested, uninterrupted):
    with monkeypatch.context() as patch:
        signal_in(patch, signal.SIGTERM, 1, "_unless_stopping")
        with pytest.raises(signals.Interrupted):
            train(of(tiny, "ce", tmp_path / "run"), report=False)
    state = end(tmp_path / "run")
    assert (state["epoch"], state["at"], state["history"]) == (0, 3, [])
    goes_on(tmp_path / "run", uninterrupted)


def test_a_signal_in_the_test_has_it_done_again(tiny, tmp_path, monkeypatch):
    first = train(of(tiny, "ce", tmp_path / "whole"), report=False)
    with monkeypatch.context() as patch:
        signal_in(patch, signal.SIGINT, 3, "_unless_stopping")  # after one case of each validation
        with pytest.raises(signals.Interrupted):
            train(of(tiny, "ce", tmp_path / "cut"), report=False)
    assert not (tmp_path / "cut" / "summary.json").exists()
    second = train(engine.read_config(tmp_path / "cut"), resume=True, report=False)
    assert first.test == second.test


def test_handlers_are_put_back(tiny, tmp_path, untested):
    before = [signal.getsignal(number) for number in signals.STOPS]
    train(replace(of(tiny, "ce", tmp_path / "run"), epochs=1), report=False)
    assert [signal.getsignal(number) for number in signals.STOPS] == before


# ---- processes that are killed ---------------------------------------------------------------------


def process(work, log):
    """A process that does the work and exits as the command line does; what it says goes to the log."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for number in signals.STOPS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        with open(log, "a") as file:
            sys.stdout = sys.stderr = file
            work()
        code = 0
    except SystemExit as done:
        code = done.code
    except BaseException as error:
        with open(log, "a") as file:
            print(f"{type(error).__name__}: {error}", file=file)
    finally:
        os._exit(code)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(*arguments):
    from noisyseg_fast.cli import app

    return lambda: app([str(a) for a in arguments])


LOOK_AT = os.WEXITED | os.WNOHANG | os.WNOWAIT  # whether a process has ended, which is still to be waited for


def written_at(out):
    """When the run last began to train."""
    return (out / "config.json").stat().st_mtime_ns if (out / "config.json").is_file() else 0


def killed(config, numbers, log, moments):
    """The run, by `noisyseg train`, gets the signals at random moments after its data are read, each fifth one at any
    time, is resumed after each, and then ends.

    Returns how often each exit code was seen.
    """
    out, codes = Path(config.out), []
    file = out.parent / f"{out.name}.yaml"
    settings = ("data", "method", "options", "width", "epochs", "batch_size", "epoch_batches", "device", "lr")
    settings += ("meta_fraction", "noise_rate", "network", "save_every")
    import yaml

    file.write_text(yaml.safe_dump({name: getattr(config, name) for name in settings}))
    for i, number in enumerate((*numbers, None)):
        begun = (out / "split.json").is_file()
        before = written_at(out)
        pid = process(
            command("train", *(("--resume", out) if begun else ("--config", file, "--out", out))), log
        )
        if number is not None:
            while i % 5 and written_at(out) == before and not os.waitid(os.P_PID, pid, LOOK_AT):
                time.sleep(0.01)
            time.sleep(moments())
            os.kill(pid, number)
        codes.append(exit_code(pid))
        if number == signal.SIGKILL:
            for path in out.glob(".tmp*"):
                path.unlink()
            if out.is_dir() and not (out / "split.json").is_file():  # killed before the run was described
                for path in out.iterdir():
                    path.unlink()
        if out.is_dir():
            whole(out)
    assert codes[-1] == 0, log.read_text()
    assert set(codes) <= {0, 130, 143, -signal.SIGKILL, -signal.SIGTERM}, (codes, log.read_text())
    return {code: codes.count(code) for code in set(codes)}


def test_killed_at_random_moments(tiny, tmp_path, uninterrupted):
    """By SIGTERM, SIGINT and SIGKILL, one after another."""
    generator = random.Random(0)
    config = replace(of(tiny, "ce", tmp_path / "cut"), save_every=1)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    killed(config, numbers, tmp_path / "log", lambda: generator.uniform(0.2, 1.0))
    same(uninterrupted, end(tmp_path / "cut"))


@pytest.mark.soak
@pytest.mark.parametrize("name", KEEPING)
def test_killed_twenty_times(name, tiny, tmp_path, capsys):
    """SIGKILL and SIGTERM at random."""
    config = replace(of(tiny, name, tmp_path / "whole"), epochs=30)
    start = time.monotonic()
    train(config, report=False)
    long = time.monotonic() - start
    generator = random.Random(name)
    numbers = [generator.choice((signal.SIGKILL, signal.SIGTERM)) for _ in range(20)]
    cut = replace(config, out=str(tmp_path / "cut"), save_every=2)
    seen = killed(cut, numbers, tmp_path / "log", lambda: generator.uniform(0, long / 15))
    same(end(tmp_path / "whole"), end(tmp_path / "cut"))
    with capsys.disabled():
        print(f"\n{name}: exit codes {seen}")


def test_the_command_exits_with_143(folder, tmp_path):
    """As it is installed, and says how to go on."""
    line = [
        sys.executable,
        "-m",
        "noisyseg_fast.cli",
        "train",
        "--data",
        folder,
        "--width",
        4,
        "--epochs",
        9999,
    ]
    line += ["--batch-size", 2, "--device", "cpu", "--out", tmp_path / "run", "--save-every", 1, "--keep", 3]
    with subprocess.Popen(
        list(map(str, line)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        while not (tmp_path / "run" / "last-2.pt").is_file():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        said = run.stderr.read()
    assert run.returncode == 143
    assert said.endswith(f"noisyseg: interrupted; noisyseg train --resume {tmp_path / 'run'} goes on\n")
    whole(tmp_path / "run")


def test_a_second_signal_ends_at_once(tiny, tmp_path, monkeypatch, untested):
    def forever(self, batch):
        Path(tmp_path / "step").touch()
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(engine._Loop, "_step", forever)
    pid = process(lambda: train(of(tiny, "ce", tmp_path / "run"), report=False), tmp_path / "log")
    while not (tmp_path / "step").exists():
        time.sleep(0.02)
    for _ in range(2):  # within a moment: one request
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    time.sleep(signals.AGAIN[signal.SIGINT])
    os.kill(pid, signal.SIGINT)
    assert exit_code(pid) == -signal.SIGINT


# ---- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_checkpoints_are_kept(tiny, tmp_path, untested, keep):
    train(replace(of(tiny, "ce", tmp_path), epochs=4, keep=keep), report=False)
    names = [f"last-{i}.pt" if i else "last.pt" for i in range(keep)]
    assert sorted(p.name for p in tmp_path.glob("last*")) == sorted(names)
    assert [end(tmp_path, name)["epoch"] for name in names] == [4, 3, 2, 1][:keep]


def test_save_every(tiny, tmp_path, untested):
    train(replace(of(tiny, "ce", tmp_path), save_every=2, keep=9), report=False)
    steps = [end(tmp_path, p.name)["step"] for p in sorted(tmp_path.glob("last*.pt"))]
    assert sorted(steps) == [2, 3, 4, 6]  # 3 and 6 are the ends of epochs


def truncated(path, other):
    path.write_bytes(path.read_bytes()[:-1000])


def of_text(path, other):
    path.write_text("text")


def of_another_package(path, other):
    torch.save({"state_dict": {}}, path)


def of_another_model(path, other):
    path.write_bytes(other.read_bytes())


def of_bytes_changed(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def without_a_part(path, other):
    content = torch.load(path, weights_only=True)
    del content["optimizer"]
    torch.save(content, path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def with_a_pickle_bomb(path, other):
    torch.save({"format": 1, "method": Bomb()}, path)


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory, read_once):
    """The checkpoint of a wider network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Loop, "finish", lambda self, *_: None)
        out = tmp_path_factory.mktemp("runs") / "other"
        train(replace(of(tiny, "ce", out), epochs=1, width=6), report=False)
    return out / "last.pt"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, "last.pt: cannot be read as a checkpoint"),
        (of_text, "last.pt: cannot be read as a checkpoint"),
        (of_bytes_changed, "last.pt: "),
        (of_another_package, "last.pt: is no checkpoint of noisyseg-fast (format 1)"),
        (of_another_model, "last.pt: was trained with another model than"),
        (without_a_part, "last.pt: is no checkpoint of this run (KeyError: 'optimizer')"),
        (with_a_pickle_bomb, "last.pt: cannot be read as a checkpoint"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_the_one_before_it_used(
    finished, tmp_path, monkeypatch, untested, uninterrupted, other, caplog, spoil, message
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    spoil(out / "last.pt", other)
    train(engine.read_config(out), resume=True, report=False)
    same(uninterrupted, end(out))
    # The bad one is set aside, not kept in place of a good one.
    assert {p.name for p in out.glob("*last*")} == {"last.pt", "last-1.pt", "refused-last.pt"}
    assert message in caplog.text and "going on from last-1.pt" in caplog.text
    assert caplog.text.count("\n") == 1
    assert not (tmp_path / "exploded").exists()


def test_without_any_good_checkpoint(finished, tmp_path, untested):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("last.pt", "last-1.pt"):
        (tmp_path / name).write_bytes(b"")
    with refuses(ValueError, "no checkpoint is left to resume from") as error:
        train(engine.read_config(tmp_path), resume=True, report=False)
    assert all(f"{tmp_path / name}: cannot be read" in str(error.value) for name in ("last.pt", "last-1.pt"))
    assert (tmp_path / "last.pt").read_bytes() == b""  # left for inspection


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"on_nan": "go"}, "unknown on_nan 'go'; choose from stop, skip"),
    ],
)
def test_bad_settings(tiny, tmp_path, change, message):
    with refuses(ValueError, message):
        train(replace(tiny, out=str(tmp_path / "run"), **change))
    assert not (tmp_path / "run").exists()


# ---- not finite ------------------------------------------------------------------------------------


def poisoned(monkeypatch, steps, spoil):
    """These batches reach the step spoilt."""
    real = engine._Loop._batches

    def batches(self, epoch, done=0):
        for i, batch in enumerate(real(self, epoch, done)):
            if epoch * self.batches + done + i in steps:
                spoil(batch)
            yield batch

    monkeypatch.setattr(engine._Loop, "_batches", batches)


def in_one_image(batch):
    batch["image"][1, 0, 3, 4] = torch.nan


def in_all(batch):
    batch["image"][:] = torch.inf


def leaves_out(monkeypatch, number):
    """What on_nan "skip" must come to: the step is counted, and nothing else."""
    real = engine._Loop._step

    def step(self, batch):
        if self.step != number:
            return real(self, batch)
        self.step, self.at = self.step + 1, self.at + 1
        return {}

    monkeypatch.setattr(engine._Loop, "_step", step)


@pytest.mark.parametrize("look", [1, 2, 50])
def test_a_loss_that_is_not_finite_is_named_and_the_run_stops_before_it(
    tiny, tmp_path, monkeypatch, untested, uninterrupted, look
):
    monkeypatch.setattr(engine, "LOOK", look)
    with monkeypatch.context() as patch:
        poisoned(patch, {4}, in_one_image)
        with pytest.raises(FloatingPointError) as error:
            train(of(tiny, "ce", tmp_path), report=False)
    found = torch.load(tmp_path / "nan-step-4.pt", weights_only=True)
    first, second = (image["cases"]["image"] for image in found["images"])
    assert str(error.value) == (
        f"step 4 (epoch 1): not finite: loss; by itself not finite: case {second} (image of the data, logits, loss); "
        f"saved in {tmp_path / 'nan-step-4.pt'}; try a smaller lr, or --on-nan skip"
    )
    assert first != second and found["images"][0]["terms"] == []
    assert (found["step"], found["epoch"]) == (4, 1) and found["losses"]["loss"] != found["losses"]["loss"]
    assert found["batch"]["image"].isnan().nonzero().tolist() == [[1, 0, 3, 4]]
    cases = json_of(tmp_path / "split.json")["training"]
    assert [cases[i] for i in found["batch"]["index"]] == [first, second]
    # Nothing is lost: with the data repaired the run ends as if nothing had been.
    assert end(tmp_path)["step"] == 4
    goes_on(tmp_path, uninterrupted)


def json_of(path):
    import json

    return json.loads(path.read_text())


@pytest.mark.parametrize("name", KEEPING)
def test_skip_leaves_the_step_out_as_if_it_had_not_been(name, tiny, tmp_path, monkeypatch, untested, caplog):
    config = replace(of(tiny, name, tmp_path / "skip"), epochs=1, on_nan="skip")
    with monkeypatch.context() as patch:
        poisoned(patch, {1}, in_one_image)
        train(config, report=False)
    assert caplog.text.count("left out") == 1 and "step 1 (epoch 0): not finite: " in caplog.text
    with monkeypatch.context() as patch:
        leaves_out(patch, 1)
        train(replace(config, out=str(tmp_path / "without")), report=False)
    found, expected = end(tmp_path / "skip"), end(tmp_path / "without")
    assert found.pop("skipped") == [1] and expected.pop("skipped") == []
    same(expected, found)


def test_a_run_that_stopped_may_skip_the_step_when_resumed(tiny, tmp_path, monkeypatch, untested):
    poisoned(monkeypatch, {4}, in_one_image)
    with pytest.raises(FloatingPointError):
        train(of(tiny, "ce", tmp_path / "stopped"), report=False)
    resumed = replace(engine.read_config(tmp_path / "stopped"), on_nan="skip")
    train(resumed, resume=True, report=False)
    train(replace(of(tiny, "ce", tmp_path / "skipped"), on_nan="skip"), report=False)
    same(end(tmp_path / "skipped"), end(tmp_path / "stopped"))


def test_skipped_steps_are_counted(tiny, tmp_path, monkeypatch):
    poisoned(monkeypatch, {0, 1, 2, 4}, in_all)  # all of the first epoch
    out = tmp_path / "run"
    history = train(replace(of(tiny, "ce", out), on_nan="skip"), report=False).history
    assert json_of(out / "summary.json")["skipped_steps"] == [0, 1, 2, 4]
    assert [row["train_loss"] > 0 for row in history] == [False, True]
    assert sorted(p.name for p in out.glob("nan*")) == [f"nan-step-{i}.pt" for i in (0, 1, 2, 4)]


def test_too_many_in_a_row_stop_the_run(tiny, tmp_path, monkeypatch, untested):
    poisoned(monkeypatch, set(range(1, 99)), in_all)
    with refuses(FloatingPointError, "; it is the last of 10 in a row"):
        train(replace(of(tiny, "ce", tmp_path), on_nan="skip", epochs=9), report=False)
    assert end(tmp_path)["skipped"] == list(range(1, 10))


def test_a_gradient_that_is_not_finite_is_told_from_a_loss(tiny, tmp_path, monkeypatch, untested):
    plain = methods.get("ce")
    make = plain.training_step

    def rooted(self, batch, step):
        out = make(self, batch, step)
        root = (0 * next(self.parameters()).sum()).abs().sqrt()  # 0, with gradient 0/0
        return {"loss": out["loss"] + root} if step == 4 else out

    monkeypatch.setattr(plain, "training_step", rooted)
    with refuses(FloatingPointError, "step 4 (epoch 1): the loss is finite, its gradient is not; cases case"):
        train(of(tiny, "ce", tmp_path), report=False)
    assert end(tmp_path)["step"] == 4
    assert all(v.isfinite().all() for v in end(tmp_path)["method"].values())


def test_gradients_that_the_scaler_of_16_mixed_handles_are_no_fault(tiny, tmp_path, monkeypatch, untested):
    make_loop = engine._Loop.__init__

    def with_scaler(self, *arguments):  # which Lightning gives to GPUs only
        make_loop(self, *arguments)
        self.fabric.strategy.precision.scaler = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(engine._Loop, "__init__", with_scaler)
    config = replace(of(tiny, "ce", tmp_path / "whole"), precision="bf16-mixed")
    plain = methods.get("ce")
    make = plain.training_step

    def large(self, batch, step):
        return {"loss": make(self, batch, step)["loss"] * (1e36 if step == 1 else 1)}  # infinite when scaled

    monkeypatch.setattr(plain, "training_step", large)
    train(config, report=False)
    scale = end(tmp_path / "whole")["scaler"]["scale"]
    assert 0 < scale < 65536  # it was infinite once, and the scaler left the step out
    with monkeypatch.context() as patch:
        signal_in(patch, signal.SIGTERM, 4)
        with pytest.raises(signals.Interrupted):
            train(replace(config, out=str(tmp_path / "cut")), report=False)
    goes_on(tmp_path / "cut", end(tmp_path / "whole"))


# ---- bad days --------------------------------------------------------------------------------------


def at_step(monkeypatch, number, act):
    real = engine._Loop._step

    def step(self, batch):
        if self.step == number:
            act(self)
        return real(self, batch)

    monkeypatch.setattr(engine._Loop, "_step", step)


def fails_and_goes_on(config, uninterrupted, monkeypatch, act, message, repair=lambda: None):
    """The process in which this happens ends with the line and exit code 2; nothing is half written; resumed, the
    run ends as an uninterrupted one."""
    out = Path(config.out)
    log = out.parent.with_suffix(".log")

    def run():
        from noisyseg_fast import cli

        at_step(monkeypatch, 4, act)
        monkeypatch.setattr(engine, "load_config", lambda path: config)
        cli.app(["train", "--config", "given"])

    assert exit_code(process(run, log)) == 2, log.read_text()
    said = [line for line in log.read_text().splitlines() if line.startswith("noisyseg: ")]
    assert len(said) == 1 and re.search(message, said[0]), log.read_text()
    whole(out)
    repair()
    goes_on(out, uninterrupted)


def test_a_file_that_grows_too_large(tiny, tmp_path, monkeypatch, untested, uninterrupted):
    """RLIMIT_FSIZE, which every system has: a write fails in the middle, as on a full disk."""
    import resource

    def limit(loop):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    fails_and_goes_on(
        of(tiny, "ce", tmp_path / "run"), uninterrupted, monkeypatch, limit,
        r"run/(best|last)\.pt: cannot be written: File too large$",
    )  # fmt: skip


def test_a_folder_that_may_no_longer_be_written(tiny, tmp_path, monkeypatch, untested, uninterrupted):
    def forbid(loop):
        if os.geteuid() == 0:
            os.seteuid(65534)
        else:
            loop.out.chmod(0o500)

    try:
        fails_and_goes_on(
            of(tiny, "ce", tmp_path / "run"), uninterrupted, monkeypatch, forbid,
            r"run/(best|last)\.pt: cannot be written: (Permission denied|Read-only file system)$",
        )  # fmt: skip
    finally:
        (tmp_path / "run").chmod(0o700)


@pytest.mark.soak
def test_a_full_disk(tiny, tmp_path, monkeypatch, untested, uninterrupted):
    """A file system of 4 MB; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]).returncode:
        pytest.skip("no file system could be mounted")

    def fill(loop):
        with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    try:
        fails_and_goes_on(
            of(tiny, "ce", disk / "run"), uninterrupted, monkeypatch, fill,
            r"run/(best|last)\.pt: cannot be written: No space left on device$", (disk / "filler").unlink,
        )  # fmt: skip
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_file_that_vanishes(tiny, tmp_path, monkeypatch, untested, workers):
    root = nifti_folder(tmp_path / "set", cases=8, shape=(16, 32), raters=1)
    # Read again each time, as large data are.
    monkeypatch.setattr(engine, "Store", lambda classes, _, **more: STORE(classes, 0, **more))
    config = replace(of(tiny, "ce", tmp_path / "whole"), data=str(root), workers=workers)
    train(config, report=False)

    def move(loop):
        for path in root.glob("imagesTr/*"):
            path.rename(tmp_path / path.name)

    def back(out):
        whole(out)
        for path in tmp_path.glob("*.nii.gz"):
            path.rename(root / "imagesTr" / path.name)

    with monkeypatch.context() as patch:
        at_step(patch, 2 if workers else 4, move)
        with pytest.raises(ValueError, match=r"^.*case\d_0000\.nii\.gz: no such file$"):
            train(replace(config, out=str(tmp_path / "cut")), report=False)
    back(tmp_path / "cut")
    goes_on(tmp_path / "cut", end(tmp_path / "whole"))


def test_a_worker_that_is_killed(tiny, tmp_path, monkeypatch, untested, uninterrupted):
    def kill(loop):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.5)

    fails_and_goes_on(
        replace(of(tiny, "ce", tmp_path / "run"), workers=2), uninterrupted, monkeypatch, kill,
        r"^noisyseg: a process that prepares batches was killed \(.*\); noisyseg train --resume .*run goes on from ",
    )  # fmt: skip


def test_workers_outlive_a_signal_to_all_processes(tiny, tmp_path, monkeypatch, untested, uninterrupted):
    """As Ctrl-C in a terminal, and Slurm and then torchrun (which sends on what it got to the whole group) send it."""
    config = replace(of(tiny, "ce", tmp_path / "run"), workers=2)
    for number, step in ((signal.SIGTERM, 1), (signal.SIGINT, 4)):

        def all_of(loop, number=number):
            for _ in range(2):
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, number)
                os.kill(os.getpid(), number)
                time.sleep(0.3)

        with monkeypatch.context() as patch:
            at_step(patch, step, all_of)
            with pytest.raises(signals.Interrupted):
                train(config, resume=step > 1, report=False)
        assert end(tmp_path / "run")["step"] == step + 1
    goes_on(tmp_path / "run", uninterrupted)


def test_workers_outlive_a_signal_at_their_start(tiny, tmp_path, monkeypatch, untested, uninterrupted):
    """Each gets SIGTERM when torch's own handler is set, which ends it, and ours is not yet."""
    torchs_own = torch.utils.data._utils.signal_handling._set_worker_signal_handlers

    def and_a_signal():
        torchs_own()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_set_worker_signal_handlers", and_a_signal)
    train(replace(of(tiny, "ce", tmp_path / "run"), workers=2), report=False)
    same(uninterrupted, end(tmp_path / "run"))
