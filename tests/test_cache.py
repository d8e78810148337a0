"""Where loaded cases are kept: the same bits come out, in bounded memory, whatever happens to the files."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for _needed in ("monai", "lightning", "nibabel", "typer", "rich"):
    pytest.importorskip(_needed)

from folders import blob, nifti_folder, save_nifti  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from noisyseg_fast import cli  # noqa: E402
from noisyseg_fast.training import cache, model  # noqa: E402
from noisyseg_fast.training import data as D  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent


def full_set(root):
    """Volumes of two raters, some of which are dilated, and unlabelled ones."""
    nifti_folder(root, cases=6, shape=(20, 24, 8))
    (root / "imagesUn").mkdir()
    save_nifti(root / "imagesUn" / "u0.nii.gz", blob((20, 24, 8), 9)[0])
    return D.open_data(root)


def items(data, workers, **how):
    """All that an epoch brings along, by a store of that kind."""
    store = D.Store(raters=True, spacing=(1.0, 1.0, 2.0), **how)
    D.check(data, store)
    training = D.TrainingSet(
        data.training, store, (16, 16, 16), noise_rate=1.0, seed=3, unlabelled=data.unlabelled, items=9,
        fuse=lambda raters: raters.min(0),
    )  # fmt: skip
    training.epoch = 1
    loader = torch.utils.data.DataLoader(training, 2, sampler=training.order(1), num_workers=workers)
    return list(loader)


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def test_the_same_bits_from_every_cache_with_any_number_of_workers(tmp_path):
    data = full_set(tmp_path / "set")
    first = items(data, 0)
    kinds = ({}, {"limit": 300_000}, {"cache": "none"}, {"cache": "disk", "folder": tmp_path / "cache"})
    for how in kinds:
        for workers in (0, 1, 3):
            assert same(first, items(data, workers, **how)), (how, workers)
    assert not same(first[:1], first[1:2])  # the comparison could fail
    loaded = [D.Store(spacing=(1.0, 1.0, 2.0), **how).get(data.test[0]) for how in kinds]
    for other in loaded[1:]:
        assert np.array_equal(loaded[0].image, other.image) and loaded[0].spacing == other.spacing
        assert (
            np.array_equal(loaded[0].own.target, other.own.target)
            and loaded[0].own.spacing == other.own.spacing
        )
    assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 8  # 7 with raters, one without


def test_a_run_gives_the_same_weights_and_scores(tmp_path):
    root = nifti_folder(tmp_path / "set", shape=(40, 36))
    runs = {
        "memory": (),
        "none": (),
        "disk": ("--cache-dir", tmp_path / "cache"),
        "little": ("--cache-gb", 1e-5),
    }
    for name, more in runs.items():
        arguments = [
            "train",
            "--data",
            root,
            "--width",
            2,
            "--epochs",
            2,
            "--batch-size",
            2,
            "--device",
            "cpu",
        ]
        arguments += ["--noise-rate", 0.5, "--workers", 1, "--out", tmp_path / name, *more]
        arguments += ["--cache", name] if name != "little" else []
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
    states = [model.read_checkpoint(tmp_path / name / "last.pt")["method"] for name in runs]
    assert all(torch.equal(states[0][k], other[k]) for other in states[1:] for k in states[0])
    assert len({(tmp_path / name / "test.csv").read_text() for name in runs}) == 1
    settings = json.loads((tmp_path / "disk" / "config.json").read_text())["config"]
    assert (settings["cache"], settings["cache_dir"]) == ("disk", str(tmp_path / "cache"))
    again = ["train", "--resume", tmp_path / "disk", "--epochs", 3, "--cache", "memory"]
    assert CliRunner().invoke(cli.app, [str(a) for a in again]).exit_code == 0


@pytest.fixture
def one(tmp_path):
    data = D.open_data(nifti_folder(tmp_path / "set", shape=(20, 24)))
    case = data.training[0]
    return case, (lambda: D.Store(cache="disk", folder=tmp_path / "cache")), tmp_path / "cache"


def kept(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


def test_a_case_is_read_once_and_mapped(one, monkeypatch):
    case, store, folder = one
    first = store().get(case)
    monkeypatch.setattr(D, "load", None)
    again = store().get(case)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.target, again.target)
    assert again.image.flags.writeable and again.image.dtype == np.float32
    again.image[:] = 0  # reaches no file
    assert np.array_equal(first.image, store().get(case).image)
    (path,) = kept(folder)
    assert str(path) in Path("/proc/self/maps").read_text()
    del first, again
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_changed_file_and_other_settings_are_read_anew(one):
    case, store, folder = one
    before = store().get(case).image.copy()
    image, _ = blob((20, 24), 50)
    save_nifti(case.image[0], image)
    assert not np.array_equal(before, store().get(case).image)
    assert len(kept(folder)) == 2
    D.Store(classes=3, cache="disk", folder=folder).get(case)
    D.Store(spacing=(2.0, 2.0), cache="disk", folder=folder).get(case)
    D.Store(raters=True, cache="disk", folder=folder).get(case)
    assert len(kept(folder)) == 5
    case.image[0].unlink()
    with pytest.raises(D.DataError, match=re.escape(f"{case.image[0]}: no such file")):
        store().get(case)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:50], lambda b: b"", lambda b: b"x" * len(b), lambda b: b + b"x"]
)
def test_a_damaged_file_is_made_again(one, damage):
    case, store, folder = one
    before = store().get(case).image.copy()
    (path,) = kept(folder)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cache.read(path) is None
    assert np.array_equal(before, store().get(case).image)
    assert path.read_bytes() == whole


def test_several_processes_fill_one_folder(tmp_path):
    data = D.open_data(nifti_folder(tmp_path / "set", shape=(20, 24, 8)))
    expected = [D.load(case).image for case in data.split("all")]

    def fill(number):
        store = D.Store(cache="disk", folder=tmp_path / "cache")
        for _ in range(5):
            for case, image in zip(data.split("all"), expected, strict=True):
                if not np.array_equal(store.get(case).image, image):
                    os._exit(1)
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=fill, args=(n,)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(kept(tmp_path / "cache")) == 6


def test_no_room(one, monkeypatch):
    case, store, folder = one

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"the cache cannot be written: No space left on device; choose another --cache-dir, or"
    ):
        store().get(case)
    assert not kept(folder)


def test_arrays_stay_in_memory_and_what_was_made_counts(tmp_path):
    case = D.open_data("sample").training[0]
    D.Store(cache="disk", folder=tmp_path / "cache").get(case)
    assert not (tmp_path / "cache").exists()
    store, calls = D.Store(limit=100), []
    for _ in range(2):
        for key, size in (("a", 60), ("b", 60), ("c", 40)):
            store.made(key, lambda size=size, key=key: calls.append(key) or np.zeros(size, np.uint8))
    assert calls == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cache", "ram"), "unknown cache 'ram'; choose from memory, disk, none"),
        (("--cache-gb", "-1"), "cache_gb must not be negative, got -1.0"),
        (("--cache-gb", "nan"), "cache_gb must not be negative, got nan"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    result = CliRunner().invoke(cli.app, ["train", *arguments, "--out", str(tmp_path / "run")])
    assert (result.exit_code, result.stderr) == (2, f"noisyseg: {message}\n")


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "noisyseg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == Path.home() / ".cache" / "noisyseg"


PEAK = """
import json, sys
from pathlib import Path
import numpy as np, nibabel, torch
from noisyseg_fast.training import data as D

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1000

root = Path(sys.argv[1])
data = D.open_data(root)
result = {}
for name, how in (
    ("warm", {"cache": "none"}), ("none", {"cache": "none"}), ("memory", {"limit": 16_000_000}),
    ("disk", {"cache": "disk", "folder": root / "cache"}), ("all", {}),
):
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
    store = D.Store(**how)
    if name != "warm":
        D.check(data, store)
    training = D.TrainingSet(data.training[:2] if name == "warm" else data.training, store, (32, 32, 32))
    for item in torch.utils.data.DataLoader(training, 4, sampler=training.order(0)):
        pass
    result[name] = status("VmHWM") - before
    del store, training
print(json.dumps(result))
"""


def test_memory_is_bounded(tmp_path):
    """24 volumes of 4 MB, and 1 MB for each label: 126 MB in all, with 16 MB for them, or none."""
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / "set" / name).mkdir(parents=True)
    image, mask = blob((64, 128, 128), 0)
    save_nifti(tmp_path / "a.nii", image)
    save_nifti(tmp_path / "b.nii", mask)
    for i in range(24):  # hard links: the same bytes, other names
        os.link(tmp_path / "a.nii", tmp_path / "set" / "imagesTr" / f"c{i}.nii")
        os.link(tmp_path / "b.nii", tmp_path / "set" / "labelsTr" / f"c{i}.nii")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "set"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak = json.loads(done.stdout)
    working = 60  # MB: what it takes to load one volume and cut a patch
    assert peak["none"] < working, peak
    assert peak["disk"] < working, peak
    assert peak["memory"] < 16 + working, peak
    assert peak["all"] > 110, peak  # the measure would see more
