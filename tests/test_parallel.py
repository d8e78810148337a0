"""Training on several processes comes to the parameters of one, and what ends it on one of them ends it on all."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import nifti_folder
from several import spread
from steps import SHORT, STEPS, everything, step
from torch import nn

from noisyseg_fast import meta
from noisyseg_fast.training import data, engine, methods, networks, parallel
from noisyseg_fast.training.model import ModelSpec, read_checkpoint

ROOT = Path(__file__).parents[1]
NUMBERS = (0, 12)  # of the steps: the first, and one where ramps, rounds and thresholds are at work
# With batch norm and dropout; networks that are used by parts; every kind of gradient.
HARD = (
    ("ce", "vnet"), ("double_uncertainty", "vnet"), ("mcpm", "vnet"), ("sassnet", "vnet"), ("coplenet", "coplenet"),
    ("umanet", "unet"), ("self_calib", "unet"),
)  # fmt: skip


def build(name, network="unet"):
    torch.manual_seed(0)
    spec = ModelSpec(name, network, 4, 2, 1, 2, (32, 32), SHORT.get(name, {}), 3)
    method = (
        spec.build().double().train()
    )  # in float32 Adam makes steps of the rounding noise of gradients that are 0
    for m in method.modules():  # some methods make maps of float32 and give them to a network
        if isinstance(m, nn.modules.conv._ConvNd):
            m.register_forward_pre_hook(lambda _, given: tuple(x.double() for x in given))
    method.plan = methods.Plan(torch.optim.Adam(method.trained(), lr=1e-3), STEPS, 5)
    return method


def double(part):
    if isinstance(part, dict):
        return {name: double(value) for name, value in part.items()}
    return part.double() if part.is_floating_point() else part


def trained(name, network, batch, group, divided):
    """The state after some steps, and of the random generator."""
    method = build(name, network)
    for number in NUMBERS:
        with group.dividing(method) if divided else group.alike():
            step(method, batch, number)
    return {**method.state_dict(), "random": torch.get_rng_state()}


def apart(one, several):
    """The largest difference of two states."""
    assert one.keys() == several.keys()
    pairs = [(one[name].double(), several[name].double()) for name in one if one[name].numel()]
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in pairs)
    return max(float((a - b).abs().nan_to_num(0).max()) for a, b in pairs)


def compared(group, name, network, rows, change=lambda batch: None):
    """How far the group is from one process."""
    batch = double(everything(size=rows))
    change(batch)
    several = trained(name, network, batch, group, True)
    return apart(trained(name, network, batch, group, False), several) if group.first else None


class Deaf(parallel.Group):
    """Sums nothing of one kind."""

    kind = "gradients"

    def sum_raw(self, what, partials):
        summed = super().sum_raw(what, partials)
        return list(partials) if what == self.kind else summed


class DeafToNorms(Deaf):
    kind = "norms"


def second_half_unlabelled(batch):
    batch["label"][2:] = data.MISSING


def curvature(group, mode):
    """A meta-gradient by that mode, which differentiates twice or forward."""
    batch = double(everything(size=3))

    def gradient(divided):
        method = build("l2rw", "vnet")
        with group.dividing(method) if divided else group.alike():
            found = meta.pixel_meta_gradient(
                method.network,
                batch["image"],
                batch["label"],
                None,
                batch["image"],
                batch["label"],
                0.1,
                mode=mode,
            )
        return found.dR

    several = gradient(True)
    one = gradient(False)
    return float((one - several).abs().max() / one.abs().max())


def of_two(group, folder):
    """All that two processes are tested for."""
    found = {name: compared(group, name, "unet", 5) for name in methods.METHODS}
    found["unlabelled"] = [
        compared(group, name, "vnet", 5, second_half_unlabelled) for name in ("ce", "selective")
    ]
    found["modes"] = [curvature(group, mode) for mode in meta.MODES]
    found["deaf"] = [compared(kind(2, group.rank), "ce", "vnet", 5) for kind in (Deaf, DeafToNorms)]
    found["messages"] = dict(group.messages)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    values = (group.rank, group.rank, group.size, group.size, 0)
    os.environ.update(
        {name: str(value) for name, value in zip(names, values, strict=True)}
    )  # as torchrun does
    found["engine"] = of_engine(group, folder)
    if group.rank == 0:  # the other one is gone, or about to be
        try:
            with parallel.told("runs/a"):
                for _ in range(100):
                    group.any(True)
        except ConnectionError as error:
            found["left"] = str(error)
    return found


def config_of(folder, out):
    """Four training cases in batches of three, one to validate, one to test."""
    return engine.Config(
        data=str(folder / "data"), method="ce_dice", width=4, epochs=2, batch_size=3, optimizer="sgd", lr=0.01,
        schedule="constant", out=str(folder / out),
    )  # fmt: skip


def of_engine(group, folder):
    """Runs that go wrong on one of two processes, and one that is stopped and goes on."""
    run, told = config_of(folder, "two"), {}

    def fails(name, config, **options):
        try:
            engine.train(config, report=False, **options)
        except (Exception, engine.Interrupted) as error:
            told[name] = type(error).__name__, str(error), parallel.silent(error)

    fails("exists", replace(run, out=str(folder / "data")))
    opened = engine.open_run
    if group.rank:
        engine.open_run = lambda config: (_ for _ in ()).throw(data.DataError("no such file"))
    fails("data", replace(run, out=str(folder / "data_error")))
    engine.open_run = opened
    told["nothing written"] = not (folder / "data_error").exists()
    item, calls = data.TrainingSet.__getitem__, []

    def gone(self, number):
        calls.append(number)
        if group.rank and len(calls) == 4:
            raise data.DataError("a file is gone")
        return item(self, number)

    data.TrainingSet.__getitem__ = gone
    fails("gone", replace(run, out=str(folder / "gone")))
    told["rescued"] = read_checkpoint(folder / "gone" / "last.pt")["step"]
    calls.clear()

    def stopped(self, number):
        calls.append(number)
        if group.rank and len(calls) == 2:  # of the first batch
            os.kill(os.getpid(), signal.SIGTERM)
        return item(self, number)

    data.TrainingSet.__getitem__ = stopped
    fails("stopped", run)
    data.TrainingSet.__getitem__ = item
    told["stopped at"] = read_checkpoint(folder / "two" / "last.pt")["step"]
    result = engine.train(engine.read_config(folder / "two"), resume=True)
    told["test"] = result.test
    told["pictures"] = len(result.pictures)
    return told


def of_four(group):
    found = {case: compared(group, *case, 3) for case in HARD}
    method = build("ce")
    with torch.no_grad():
        next(method.parameters()).add_(group.rank == 2)
    try:
        group.compare(method.state_dict(), "epoch 0")
    except RuntimeError as error:
        found["differ"] = str(error)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    nifti_folder(folder / "data")
    return folder


@pytest.fixture(scope="module")
def one(folder, one_thread):
    """The run on one process: its Result."""
    return engine.train(config_of(folder, "one"))


@pytest.fixture(scope="module")
def two(folder):
    return spread(of_two, 2, folder, folder)


@pytest.fixture(scope="module")
def four(folder):
    return spread(of_four, 4, folder)


@pytest.mark.parametrize("name", methods.METHODS)
def test_two_processes_come_to_the_parameters_of_one(two, name):
    assert two[0][name] < 1e-6


@pytest.mark.parametrize("case", HARD, ids="-".join)
def test_four_processes_with_three_images(four, case):
    """One of them has none."""
    assert four[0][case] < 1e-6


def every_method(group):
    return {name: compared(group, name, "unet", 5) for name in methods.METHODS}


@pytest.mark.soak
def test_four_processes_with_every_method(folder):
    found = spread(every_method, 4, folder)[0]
    assert {name: difference for name, difference in found.items() if not difference < 1e-6} == {}


def test_a_process_whose_images_have_no_labels(two):
    assert max(two[0]["unlabelled"]) < 1e-6


def test_meta_gradients_are_of_the_whole_batch_in_either_mode(two):
    assert max(two[0]["modes"]) < 1e-9


def test_without_the_sums_it_would_be_seen(two):
    assert min(two[0]["deaf"]) > 1e-4


def test_what_is_sent(two):
    assert two[0]["messages"].keys() == {"outputs", "gradients", "input gradients", "norms"}


def test_parameters_that_differ_are_told(four):
    for found in four:
        assert found["differ"].startswith("epoch 0: 1 of ")
        assert "differ between processes 0 and 2" in found["differ"]


def test_a_stopped_run_on_two_processes_ends_as_one_did(two, one, folder):
    states = [read_checkpoint(folder / out / "last.pt") for out in ("one", "two")]
    assert apart(*(state["method"] for state in states)) < 1e-6
    assert torch.equal(*(state["random"]["torch"] for state in states))
    rows = [list(csv.DictReader((folder / out / "test.csv").open())) for out in ("one", "two")]
    assert rows[0] == rows[1]
    assert rows[0]
    for found in two:
        assert found["engine"]["test"] == one.test
        assert found["engine"]["stopped at"] == 1
        kind, text, _ = found["engine"]["stopped"]
        assert (kind, text) == ("Interrupted", "stopped by SIGTERM")
    assert two[0]["engine"]["pictures"]
    assert not two[1]["engine"]["pictures"]
    assert (folder / "two" / "report.html").is_file()


def test_what_goes_wrong_on_one_process_is_raised_on_all_and_said_once(two):
    for rank, found in enumerate(two):
        told = found["engine"]
        assert told["exists"][0] == "FileExistsError"
        assert told["data"][:2] == ("DataError", "process 1 of 2: no such file")
        assert told["nothing written"]
        assert told["gone"][:2] == ("DataError", "process 1 of 2: a file is gone")
        assert told["rescued"] == 2
        assert all(told[name][2] == (rank > 0) for name in ("exists", "data", "gone", "stopped"))


def test_who_waits_for_a_process_that_is_gone_is_told(two):
    assert two[0]["left"].startswith("another of the processes that train together has ended")
    assert "--resume runs/a goes on" in two[0]["left"]


def run(*command, **environment):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], env=variables, capture_output=True, text=True, timeout=900
    )


OPTIONS = (
    "--method", "ce_dice", "--width", 4, "--epochs", 2, "--batch-size", 3, "--optimizer", "sgd", "--lr", 0.01,
    "--schedule", "constant",
)  # fmt: skip


def test_torchrun_comes_to_the_parameters_of_one_process(one, folder):
    """More processes than cases to validate or test, and a last batch of fewer images than processes."""
    train = ("noisyseg_fast.cli", "train", "--data", folder / "data", *OPTIONS, "--out")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m")
    several = run(*launcher, *train, folder / "torchrun")
    assert several.returncode == 0, several.stderr
    assert several.stdout.count("test: Dice") == 1
    states = [read_checkpoint(folder / out / "last.pt")["method"] for out in ("one", "torchrun")]
    assert apart(*states) < 1e-6
    assert (folder / "one" / "test.csv").read_text() == (folder / "torchrun" / "test.csv").read_text()


def test_fabric_starts_the_others_and_a_mistake_is_said_once(folder):
    used = run(
        "noisyseg_fast.cli",
        "train",
        "--data",
        folder / "data",
        *OPTIONS,
        "--devices",
        2,
        "--out",
        folder / "data",
    )
    assert used.returncode == 2
    assert used.stderr.count("is not empty") == 1
    assert "Traceback" not in used.stderr


def test_which_networks_are_divided():
    method = build("mcpm")
    assert parallel.divided_networks(method) == [method.network]  # not the net that weighs pixels
    assert len(parallel.divided_networks(build("tri_net"))) == 3
    for odd in (nn.AlphaDropout(), nn.InstanceNorm2d(4, track_running_stats=True)):
        method.network = nn.Sequential(networks.build("unet", 2, 1, 1, 4), odd)
        assert parallel.divided_networks(method) == []


def test_settings():
    for name in ("devices", "nodes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            replace(engine.Config(), **{name: 0}).check()
    if torch.cuda.device_count() < 2:
        with pytest.raises(ValueError, match="devices 2: needs as many GPUs"):
            parallel.launch(torch.device("cuda", 0), 2, 1, "32-true")
