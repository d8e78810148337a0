import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for _needed in ("monai", "lightning", "nibabel", "typer", "rich"):
    pytest.importorskip(_needed)

import nibabel  # noqa: E402
from folders import SPACING, blob, nifti_folder, oblique_affine, png_folder, save_nifti  # noqa: E402
from PIL import Image  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from noisyseg_fast import cli  # noqa: E402

COMMANDS = ("demo", "train", "evaluate", "predict", "fuse", "corrupt", "methods", "info")


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def works(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fails(*arguments, message):
    """One line on stderr, exactly this one, and exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr == f"noisyseg: {message}\n"
    assert "Traceback" not in result.output
    return result


TINY = ("--width", 4, "--epochs", 2, "--batch-size", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return nifti_folder(tmp_path_factory.mktemp("cli") / "set", cases=6, shape=(32, 32, 16), raters=3)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run on oblique NIfTI volumes."""
    out = tmp_path_factory.mktemp("cli") / "run"
    result = works("train", "--data", data, "--method", "nr_dice", "--noise-rate", 0.5, "--out", out, *TINY)
    return out, result


# ---- what works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    text = works(command, "--help").output
    assert f"Example: noisyseg {command}" in text


def test_train(trained):
    out, result = trained
    distances = r"HD95 [\d.na]+ mm, ASD [\d.na]+ mm"
    assert re.search(rf"test: Dice \d\.\d{{4}}, IoU \d\.\d{{4}}, {distances} over 1 masks", result.output)
    assert "<html" in (out / "report.html").read_text()
    assert "data:image/png;base64" in (out / "report.html").read_text()
    assert len((out / "metrics.csv").read_text().splitlines()) == 3
    assert json.loads((out / "config.json").read_text())["config"]["noise_rate"] == 0.5


def test_resume_adds_epochs(data, tmp_path):
    works("train", "--data", data, "--out", tmp_path / "run", *TINY)
    works("train", "--resume", tmp_path / "run", "--epochs", 3)
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4


def test_evaluate(trained, data, tmp_path):
    out, _ = trained
    with open(out / "test.csv") as file:
        of_training = list(csv.DictReader(file))
    works("evaluate", out / "best.pt", "--device", "cpu", "--out", tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv") as file:
        assert list(csv.DictReader(file)) == of_training
    result = works("evaluate", out / "best.pt", "--data", data, "--split", "all", "--device", "cpu")
    assert "over 6 masks" in result.output


def test_predict_nifti_keeps_the_affine(trained, data, tmp_path):
    out, _ = trained
    image = data / "imagesTr" / "case0_0000.nii.gz"
    works("predict", out / "best.pt", image, "--out", tmp_path / "masks", "--device", "cpu")
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["case0.nii.gz", "predict.json"]
    mask = nibabel.load(tmp_path / "masks" / "case0.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    assert mask.shape == (32, 32, 16)
    assert np.allclose(mask.affine, oblique_affine(), atol=1e-4)
    assert mask.header.get_zooms() == pytest.approx(SPACING, abs=1e-4)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


def test_predict_folder_of_other_sizes(trained, tmp_path):
    out, _ = trained
    (tmp_path / "scans").mkdir()
    for i, shape in enumerate([(20, 40, 9), (33, 32, 17)]):
        save_nifti(tmp_path / "scans" / f"s{i}.nii.gz", blob(shape, i)[0])
    works("predict", out / "best.pt", tmp_path / "scans", "--out", tmp_path / "masks", "--device", "cpu")
    shapes = [nibabel.load(tmp_path / "masks" / f"s{i}.nii.gz").shape for i in range(2)]
    assert shapes == [(20, 40, 9), (33, 32, 17)]


def test_png_from_training_to_prediction(tmp_path):
    data = png_folder(tmp_path / "set")
    result = works("train", "--data", data, "--method", "dice", "--out", tmp_path / "run", *TINY)
    assert " px over " in result.output
    works("predict", tmp_path / "run" / "best.pt", data / "imagesTr", "--out", tmp_path / "masks")
    masks = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "masks").glob("*.png"))]
    assert len(masks) == 6
    assert all(m.shape == (32, 32) and m.dtype == np.uint8 and set(np.unique(m)) <= {0, 255} for m in masks)


def test_demo_quick(tmp_path, monkeypatch):
    from noisyseg_fast import timing

    # The timing has tests of its own; torch.compile would take half a minute here.
    rows = [{"operation": "nr_dice_loss", "input": "1x1x8x8", "ours": "1 us", "eager": "2 us (2.0x)"}]
    monkeypatch.setattr(timing, "demo_table", lambda budget_s: rows)
    result = works("demo", "--quick", "--out", tmp_path / "demo")
    assert "noisy labels, NR-Dice" in result.output
    assert str(tmp_path / "demo" / "report.html") in result.output.replace("\n", "")
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())["test"]
    assert [r["training"] for r in rows] == [
        "clean labels, cross-entropy", "noisy labels, cross-entropy", "noisy labels, NR-Dice",
    ]  # fmt: skip
    assert "nr_dice_loss" in result.output
    report = (tmp_path / "demo" / "report.html").read_text()
    assert all(text in report for text in ("noisy labels, NR-Dice", "nr_dice_loss", "data:image/png;base64"))


def test_methods_and_info():
    text = works("methods").output
    assert all(name in text for name in ("ce", "dice", "nr_dice", "gamma=1.5"))
    text = works("info").output
    assert all(name in text for name in ("version: ", "instruction_sets: ", "torch: ", "GPUs: "))


def test_help_does_not_import_torch():
    code = "import sys; from noisyseg_fast import cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_the_training_extras():
    code = "import sys; sys.modules['typer'] = None\nfrom noisyseg_fast.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "noisyseg: typer is not installed; install the training extras: pip install 'noisyseg-fast[train]', "
        "or '.[train]' from a checkout\n"
    )


def test_interrupted_run_says_how_to_go_on(data, tmp_path, monkeypatch):
    from noisyseg_fast.training import engine

    def stop(config, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train", stop)
    result = run("train", "--data", data, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr == f"noisyseg: interrupted; noisyseg train --resume {tmp_path / 'run'} goes on\n"


# ---- bad input ------------------------------------------------------------------------------------


def test_train_errors(data, tmp_path):
    out = tmp_path / "run"
    none = tmp_path / "none"
    fails(
        "train", "--data", none, "--out", out,
        message=f'{none}: no such data; pass "sample", a folder, a datalist .json or an .npz',
    )  # fmt: skip
    assert "unknown method 'none'; choose from ce" in run("train", "--method", "none", "--out", out).stderr
    fails("train", "--noise-rate", 2, "--out", out, message="noise_rate must be between 0 and 1, got 2.0")
    fails("train", "--set", "gamma", "--out", out, message="--set must be like gamma=1.3, got 'gamma'")
    fails("train", "--patch", "a", "--out", out, message="--patch must be like 96x96 or 96x96x32, got 'a'")
    fails(
        "train",
        "--device",
        "tpu",
        "--out",
        out,
        message="device must be auto, cpu, cuda or cuda:N, got 'tpu'",
    )
    assert not out.exists()


def test_bad_mask_is_named_and_nothing_written(tmp_path):
    root = nifti_folder(tmp_path / "set", raters=1)
    mask = root / "labelsTr" / "case2.nii.gz"
    save_nifti(mask, np.zeros((32, 30), np.uint8))
    image = root / "imagesTr" / "case2_0000.nii.gz"
    fails(
        "train", "--data", root, "--out", tmp_path / "run",
        message=f"{mask}: shape (32, 30) differs from (32, 32) of its image {image}",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_resume_errors(trained, tmp_path):
    out, _ = trained
    fails(
        "train", "--resume", out, "--lr", 1,
        message=f"--resume takes its settings from {out / 'config.json'}; --lr cannot be changed",
    )  # fmt: skip
    fails(
        "train", "--resume", tmp_path,
        message=f"{tmp_path / 'config.json'}: no such file; {tmp_path} holds no run to resume",
    )  # fmt: skip


def test_run_folder_in_use(trained):
    out, _ = trained
    fails(
        "train", "--out", out,
        message=f"{out} is not empty; choose another folder (--out) or resume the run in it (--resume)",
    )  # fmt: skip


def test_one_process_where_torchrun_starts_several(monkeypatch, tmp_path):
    for name, value in {"WORLD_SIZE": 4, "LOCAL_RANK": 0, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    fails(
        "predict", tmp_path / "best.pt", tmp_path, "--out", tmp_path / "out",
        message="noisyseg predict runs as one process, and torchrun has started 4; start one without torchrun, or "
        "several with a part of the files each (--device cuda:N)",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_predict_errors_write_nothing(trained, tmp_path):
    out, _ = trained
    masks = tmp_path / "masks"
    good, bad, flat = (tmp_path / f"{name}.nii.gz" for name in ("a_good", "b_bad", "c_flat"))
    image, _ = blob((32, 32, 16), 0)
    save_nifti(good, image)
    image[0, 0, 0] = np.nan
    save_nifti(bad, image)
    save_nifti(flat, image[:, :, 3])
    tail = ("--out", masks, "--device", "cpu")
    fails(
        "predict", out / "best.pt", good, bad, *tail,
        message=f"{bad}: 1 of 16384 intensities are not finite; replace NaN and infinity",
    )  # fmt: skip
    fails(
        "predict", out / "best.pt", good, flat, *tail,
        message=f"{flat}: has 1 channel(s) and 2 spatial axes; the model takes 1 and 3",
    )  # fmt: skip
    none = tmp_path / "none.nii.gz"
    fails("predict", out / "best.pt", none, *tail, message=f"{none}: no such file or folder")
    fails("predict", none, good, *tail, message=f"{none}: no such checkpoint")
    fails(
        "predict", out / "best.pt", good, "--out", tmp_path,
        message=f"{good}: would replace its own image; choose another --out",
    )  # fmt: skip
    assert not masks.exists()


def test_evaluate_errors(trained, tmp_path):
    out, _ = trained
    fails(
        "evaluate", out / "best.pt", "--split", "half",
        message="unknown split 'half'; choose from training, validation, test, meta, all",
    )  # fmt: skip
    flat = png_folder(tmp_path / "set")
    result = run("evaluate", out / "best.pt", "--data", flat, "--out", tmp_path / "s.csv")
    assert result.exit_code == 2
    assert "spatial axes; the model takes 1 and 3" in result.stderr
    assert not (tmp_path / "s.csv").exists()


def test_usage_errors_exit_with_2():
    assert run("train", "--epochs", "many").exit_code == 2
    assert run("fly").exit_code == 2


@pytest.mark.parametrize("place", [0, 3])
def test_debug_shows_the_traceback(place):
    arguments = ["train", "--epochs", "0"]
    arguments.insert(place, "--debug")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("noisyseg: epochs must be at least 1, got 0\n")


def test_an_error_of_ours_is_one_line_too(monkeypatch):
    monkeypatch.setattr(cli, "_options", lambda pairs: {}["x"])
    result = run("train", "--set", "a=b")
    assert result.exit_code == 1
    assert result.stderr == "noisyseg: KeyError: 'x' (--debug shows where)\n"
