import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

from folders import nifti_folder  # noqa: E402

from noisyseg_fast.training import data as D  # noqa: E402
from noisyseg_fast.training import engine, evaluate, files, methods, model, networks  # noqa: E402
from noisyseg_fast.training.engine import Config, train  # noqa: E402


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return nifti_folder(tmp_path_factory.mktemp("data") / "set", cases=8)


@pytest.fixture(scope="module")
def tiny(folder):
    """Settings of a run that takes a second."""
    return Config(data=str(folder), width=4, epochs=4, batch_size=2, noise_rate=0.5, device="cpu", lr=3e-3)


# ---- networks and methods -------------------------------------------------------------------------


def test_unknown_names():
    with refuses(
        ValueError,
        "unknown network 'enet'; choose from unet, basicunet, scse_unet, attention_unet, segresnet",
    ):
        networks.get("enet")
    with refuses(ValueError, "unknown method 'none'; choose from ce, "):
        methods.get("none")
    with refuses(ValueError, "width must be a multiple of 8 for network segresnet (group norm), got 12"):
        networks.build("segresnet", 2, 1, 1, 12)


def test_method_options():
    assert methods.configure("nr_dice", {"gamma": "1.25"}).gamma == 1.25
    with refuses(ValueError, "method nr_dice has no option 'gama'; it has: gamma, denominator"):
        methods.configure("nr_dice", {"gama": 1})
    with refuses(ValueError, "option gamma of method nr_dice must be of type float, got 'much'"):
        methods.configure("nr_dice", {"gamma": "much"})


@pytest.mark.parametrize("name", methods.METHODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_step_of_each_method_lowers_its_loss(name, channels):
    torch.manual_seed(0)
    method = methods.create(
        name,
        None,
        lambda heads=1: networks.build("unet", 2, 1, heads * channels, 4),
        channels,
        methods.Inputs(spatial_dims=2, channels=1, raters=2, width=4),
    )
    label = torch.zeros(2, 32, 32, dtype=torch.uint8)
    label[:, 8:20, 8:20] = max(1, channels - 1)
    batch = {
        "image": label[:, None] + 0.1 * torch.randn(2, 1, 32, 32),
        "label": label,
        "index": torch.arange(2),
    }
    batch |= {"meta": dict(batch), "raters": torch.stack([label, label], 1), "unlabelled": batch["image"]}
    optimizer = torch.optim.Adam(method.trained(), lr=1e-2)
    method.plan = methods.Plan(optimizer, 15, 15)
    losses = []
    for step in range(15):
        values = method.training_step(batch, step)
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        # "loss" also moves with learned weights, and with the ramp of a term that comes in later.
        losses.append(values.get("clean_loss", values.get("given", values["loss"])).item())
    assert method(batch["image"]).shape == (2, channels, 32, 32)
    assert losses[-1] < 0.8 * losses[0]


# ---- scores ---------------------------------------------------------------------------------------


def test_score_in_millimetres():
    target, prediction = np.zeros((2, 20, 30), np.uint8)
    target[5:15, 10:20] = 1
    prediction[5:15, 13:23] = 1  # 3 columns to the right
    (score,) = evaluate.score("a", prediction, target, (1.0, 0.5))
    assert score.dice == pytest.approx(0.7)
    assert score.iou == pytest.approx(70 / 130)
    assert score.hd95 == pytest.approx(1.5)
    (score,) = evaluate.score("a", prediction, target, (1.0, 2.0))
    assert score.hd95 > 3


def test_empty_masks_are_counted_not_dropped():
    full, empty = np.ones((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    full[0] = 0
    pairs = {"good": (full, full), "missed": (empty, full), "invented": (full, empty), "none": (empty, empty)}
    scores = [evaluate.score(name, p, t, (1, 1))[0] for name, (p, t) in pairs.items()]
    assert [s.empty for s in scores] == ["", "prediction", "reference", "both"]
    assert [s.hd95 for s in scores[:3]] == [0, math.inf, math.inf]
    assert math.isnan(scores[3].hd95)
    summary = evaluate.summarize(scores)
    assert summary.dice == pytest.approx(1 / 3)
    assert summary.hd95 == 0
    assert summary[3:7] == (4, 1, 1, 1)
    assert summary.sentence("mm") == (
        "Dice 0.3333, IoU 0.3333, HD95 0.00 mm, ASD 0.00 mm over 4 masks "
        "(without a finite HD95: 1 empty prediction(s), 1 empty reference(s), 1 empty in both)"
    )


def test_each_class_has_its_row():
    target = np.zeros((10, 10), np.uint8)
    target[2:4, 2:4], target[6:9, 6:9] = 1, 2
    scores = evaluate.score("a", np.where(target == 1, 1, 0).astype(np.uint8), target, (1, 1), classes=3)
    assert [(s.label, s.dice, s.empty) for s in scores] == [(1, 1.0, ""), (2, 0.0, "prediction")]


# ---- files ----------------------------------------------------------------------------------------


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "a.csv"
    files.write_text(path, "old")

    def break_off():
        with files.written(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        break_off()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_json_has_null_for_what_is_not_finite(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1.5, math.nan], "b": (math.inf, "x")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None], "b": [None, "x"]}


# ---- runs -----------------------------------------------------------------------------------------


def weights(out, name="last.pt"):
    return model.read_checkpoint(out / name)["method"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_all_its_files(tiny, tmp_path):
    result = train(replace(tiny, method="nr_dice", out=str(tmp_path / "run")))
    assert result.test.dice > 0.2
    assert result.unit == "mm"
    names = {p.name for p in result.out.iterdir()}
    assert names >= {
        "config.json", "split.json", "metrics.csv", "tensorboard", "last.pt", "best.pt", "test.csv",
        "summary.json", "report.html",
    }  # fmt: skip
    assert not [n for n in names if n.startswith(".tmp")]
    with open(result.out / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["epoch"]) for r in rows] == [0, 1, 2, 3]
    assert {"train_loss", "val_dice", "val_iou", "val_hd95"} <= rows[0].keys()
    best = max(range(4), key=lambda i: (float(rows[i]["val_dice"]), -i))
    assert result.best_epoch == best
    content = json.loads((result.out / "config.json").read_text())
    assert content["method_options"] == {"gamma": 1.5, "denominator": "squared"}
    assert content["model"]["patch"] == [32, 32]
    assert any((result.out / "tensorboard").iterdir())
    assert sum(p["noisy"] is not None for p in result.pictures) >= 1
    assert all(p["prediction"].shape == (32, 32) for p in result.pictures)


def interrupt_after(monkeypatch, epochs):
    """The run stops as by Ctrl-C, once so many epochs are saved."""
    save_last = engine._Loop.save_last

    def save_and_stop(self):
        save_last(self)
        if self.epoch == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine._Loop, "save_last", save_and_stop)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_bit_for_bit_the_same(tiny, tmp_path, monkeypatch, workers):
    whole = replace(tiny, out=str(tmp_path / "whole"))
    first = train(whole, report=False)
    stopped = replace(tiny, out=str(tmp_path / "stopped"), workers=workers)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, report=False)
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    torch.rand(7)  # other use of the global generators in between must not matter
    second = train(engine.read_config(tmp_path / "stopped"), resume=True, report=False)
    for name in ("last.pt", "best.pt"):
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "stopped", name))
    a, b = (model.read_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "stopped"))
    assert torch.equal(a["random"]["torch"], b["random"]["torch"])
    assert str(a["optimizer"]) == str(b["optimizer"])
    assert first.test == second.test
    rows = [(tmp_path / run / "metrics.csv").read_text().splitlines() for run in ("whole", "stopped")]
    assert [r.rsplit(",", 1)[0] for r in rows[0]] == [
        r.rsplit(",", 1)[0] for r in rows[1]
    ]  # but for the seconds


def test_same_seed_same_weights_other_seed_others(tiny, tmp_path):
    runs = [
        replace(tiny, epochs=1, seed=seed, out=str(tmp_path / name))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    for run in runs:
        train(run, report=False)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_resume_before_the_first_checkpoint_starts_over(tiny, tmp_path):
    config = replace(tiny, epochs=1, out=str(tmp_path / "run"))
    train(config, report=False)
    kept = weights(tmp_path / "run")
    for name in ("last.pt", "best.pt", "metrics.csv"):
        (tmp_path / "run" / name).unlink()
    train(config, resume=True, report=False)
    assert same(kept, weights(tmp_path / "run"))


def test_resume_refuses_other_cases_and_fewer_epochs(tiny, tmp_path):
    config = replace(tiny, epochs=2, out=str(tmp_path / "run"))
    train(config, report=False)
    with refuses(ValueError, "epochs must be at least 2, which are done already"):
        train(replace(config, epochs=1), resume=True, report=False)
    with refuses(ValueError, "its cases are no longer those of"):
        train(replace(config, test=0.4), resume=True, report=False)
    with refuses(ValueError, "was trained with another model"):
        train(replace(config, width=6), resume=True, report=False)


def test_volumes_in_patches(tmp_path):
    root = nifti_folder(tmp_path / "set", cases=4, shape=(40, 36, 20), raters=1)
    result = train(
        Config(
            data=str(root),
            width=4,
            epochs=2,
            batch_size=2,
            patch=(32, 32, 16),
            device="cpu",
            out=str(tmp_path / "run"),
        ),
        report=False,
    )
    assert model.read_checkpoint(tmp_path / "run" / "best.pt")["model"]["spatial_dims"] == 3
    assert 0 <= result.test.dice <= 1
    assert result.pictures[0]["image"].ndim == 2


def test_three_classes(tmp_path):
    root = nifti_folder(tmp_path / "set", cases=4, raters=1)
    (root / "dataset.json").write_text('{"labels": {"background": 0, "a": 1, "b": 2}}')
    for method in ("ce", "nr_dice"):
        config = Config(
            data=str(root), method=method, width=4, epochs=1, device="cpu", out=str(tmp_path / method)
        )
        result = train(config, report=False)
        assert result.test.masks == 2  # one test case, two classes


def test_infer_by_windows_equals_in_one_piece_far_from_borders():
    image = torch.randn(1, 1, 48, 40)
    network = torch.nn.Conv2d(1, 1, 1)
    whole = model.infer(network, image, (48, 40))
    assert torch.equal(whole, model.infer(network, image, (16, 16)))
    assert torch.equal(whole, model.infer(network, image, (64, 64)))


# ---- bad settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"noise_rate": 1.5}, "noise_rate must be between 0 and 1, got 1.5"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"method": "none"}, "unknown method 'none'"),
        ({"network": "enet"}, "unknown network 'enet'"),
        ({"precision": "8"}, "unknown precision '8'; choose from 32-true, bf16-mixed, 16-mixed"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:99"}, "device cuda:99 is not there"),
        ({"options": {"x": 1}}, "method ce has no option 'x'; it has: none"),
        ({"patch": (30, 32)}, "patch must be 2 multiples of 16 (the network's), got (30, 32)"),
    ],
)
def test_bad_settings_are_told_before_anything_is_written(tiny, tmp_path, change, message):
    with refuses(ValueError, message):
        train(replace(tiny, out=str(tmp_path / "run"), **change))
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with refuses(FileExistsError, f"{tmp_path} is not empty; choose another folder (--out) or resume"):
        train(replace(tiny, out=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_loss_not_finite(tiny, tmp_path):
    with refuses(FloatingPointError, "step 1 (epoch 0): not finite: loss; by itself not finite: case "):
        train(replace(tiny, lr=1e30, out=str(tmp_path / "run")))


def test_checkpoints_of_others_are_refused(tmp_path):
    with refuses(FileNotFoundError, "no such checkpoint"):
        model.read_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("text")
    with refuses(ValueError, "cannot be read as a checkpoint"):
        model.read_checkpoint(tmp_path / "text.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with refuses(ValueError, "is no checkpoint of noisyseg-fast (format 1)"):
        model.read_checkpoint(tmp_path / "other.pt")


def test_store_reads_a_case_once(monkeypatch, folder):
    calls = []
    load = D.load
    monkeypatch.setattr(D, "load", lambda case, classes: calls.append(case.id) or load(case, classes))
    data, store = D.open_data(folder), D.Store()
    D.check(data, store)
    D.check(data, store)
    assert len(calls) == 8
