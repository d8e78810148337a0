"""The Left Atrium 2018 layout, folders without imagesTr, and the study on few labels."""

import re
from dataclasses import asdict, replace

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from folders import SPACING, blob, oblique_affine, save_nifti  # noqa: E402

from noisyseg_fast.training import atrium as A  # noqa: E402
from noisyseg_fast.training import data as D  # noqa: E402
from noisyseg_fast.training import methods  # noqa: E402
from noisyseg_fast.training import reproduce as R  # noqa: E402


def refuses(message, error=D.DataError):
    return pytest.raises(error, match=re.escape(message))


pytestmark = pytest.mark.usefixtures("one_thread")


NAMES = [f"{i:02d}SCAN" for i in range(12)]  # 10 to train on, 2 labelled; 2 to test on


def write_lists(root, folder="2018LA_Seg_Training Set"):
    (root / folder).mkdir(parents=True)
    # not in the order of the names: the first fifth is that of the list
    (root / "train.list").write_text("\n".join(NAMES[9::-1]) + "\n\n")
    (root / "test.list").write_text("\n".join(NAMES[10:]))
    return root / folder


def h5_set(root, shape=(36, 34, 18), folder="2018LA_Seg_Training Set"):
    h5py = pytest.importorskip("h5py")
    place = write_lists(root, folder)
    for i, name in enumerate(NAMES):
        image, mask = blob(shape, i)
        (place / name).mkdir()
        with h5py.File(place / name / "mri_norm2.h5", "w") as file:
            file.create_dataset("image", data=image, compression="gzip")
            file.create_dataset("label", data=mask, compression="gzip")
    return root


def nrrd_set(root, shape=(64, 60, 18)):
    sitk = pytest.importorskip("SimpleITK")
    place = write_lists(root)
    for i, name in enumerate(NAMES):
        image, mask = blob(shape, i)
        (place / name).mkdir()
        for file, array in (("lgemri", (image + 50).clip(0, 255)), ("laendo", mask * 255)):
            volume = sitk.GetImageFromArray(array.T.astype(np.uint8))
            volume.SetSpacing((0.625, 0.625, 1.25))
            volume.SetOrigin((5.0, -7.0, 11.0))
            sitk.WriteImage(volume, str(place / name / f"{file}.nrrd"))
    return root


def test_the_lists_say_who_is_labelled_unlabelled_and_tested(tmp_path):
    root = h5_set(tmp_path)
    data = A.open_atrium(root)
    assert [c.id for c in data.training] == NAMES[9:7:-1]
    assert [c.id for c in data.unlabelled] == NAMES[7::-1]
    assert [c.id for c in data.test] == NAMES[10:] and not data.validation
    loaded = D.load(data.training[0])
    image, mask = blob((36, 34, 18), 9)
    np.testing.assert_array_equal(loaded.target, mask)
    np.testing.assert_allclose(loaded.image[0], (image - image.mean()) / image.std(), atol=1e-4)
    assert loaded.spacing == (0.625,) * 3 and data.unit == "mm"
    (root / "labelled.list").write_text("\n".join(NAMES[:3]))
    assert [c.id for c in A.open_atrium(root).training] == NAMES[2::-1]
    # for training in general, validation comes out of those with labels
    general = D.open_data(root, validation=0.3)
    assert len(general.validation) == 1 and len(general.training) == 2
    assert len(general.unlabelled) == 7 and len(general.test) == 2


def test_the_cases_may_lie_beside_their_lists(tmp_path):
    root = h5_set(tmp_path)
    beside = D.open_data(root / "2018LA_Seg_Training Set", validation=0.5)
    assert [c.id for c in beside.test] == NAMES[10:]


def test_nrrd_as_the_challenge_gave_them(tmp_path):
    data = A.open_atrium(nrrd_set(tmp_path))
    loaded = D.load(data.training[0])
    mask = blob((64, 60, 18), 9)[1]
    np.testing.assert_array_equal(loaded.target, mask[::-1, ::-1])  # 255 is 1; LPS in the file, turned to RAS
    assert loaded.spacing == (0.625, 0.625, 1.25)
    raw = D.read(data.training[0].image[0])
    np.testing.assert_allclose(raw.affine[:3, 3], (-5, 7, 11))
    np.testing.assert_allclose(np.diag(raw.affine), (-0.625, -0.625, 1.25, 1))


def test_cropped_as_the_authors_cropped(tmp_path):
    data = A.open_atrium(nrrd_set(tmp_path))
    whole = D.load(data.test[0])
    for seed in range(5):
        case = A.boxed(data.test[0], 2, (16, 30, 16), np.random.default_rng(seed))
        mask = D.load(case).target
        assert mask.sum() == whole.target.sum() and mask.shape[2] == 18
        shown = np.argwhere(whole.target)
        box = shown.max(0) - shown.min(0) + 1
        first = np.argwhere(mask).min(0)
        for axis, smallest in ((0, 16), (1, 30)):
            side = mask.shape[axis]
            touches = side == whole.target.shape[axis]
            assert touches or side >= max(smallest, box[axis]) + 10
            assert side <= max(smallest, box[axis]) + 38
            assert touches or first[axis] >= 1
    empty = replace(case, labels=np.zeros_like(case.labels))
    assert D.load(A.boxed(empty, 2, (16, 16, 16), np.random.default_rng(0))).target.shape == mask.shape


def test_errors(tmp_path, monkeypatch):
    root = h5_set(tmp_path / "a")
    with refuses("has no train.list"):
        A.open_atrium(tmp_path)
    test = (root / "test.list").read_text()
    for text, message in (
        (NAMES[0], f"test.list: {NAMES[0]} is in train.list, too"),
        ("\n", "test.list: names no case"),
        ("nobody", "case nobody of the lists has neither nobody/mri_norm2.h5 nor nobody/lgemri.nrrd"),
        (f"{NAMES[10]}\n{NAMES[10]}", f"test.list: names {NAMES[10]} twice"),
    ):
        (root / "test.list").write_text(text)
        with refuses(message):
            A.open_atrium(root)
    (root / "test.list").unlink()
    with refuses("test.list: no such file; it holds the names of the cases, one a line"):
        D.open_data(root)
    (root / "test.list").write_text(test)
    (root / "labelled.list").write_text("nobody")
    with refuses("labelled.list: nobody is not in train.list"):
        A.open_atrium(root)
    (root / "labelled.list").unlink()
    case = A.open_atrium(root).training[0]
    case.image[0].write_bytes(b"no")
    with refuses('mri_norm2.h5: cannot be read as HDF5 with "image" and "label"'):
        D.load(case)
    (tmp_path / "x.nrrd").write_bytes(b"no")
    with refuses("x.nrrd: cannot be read as NRRD"):
        D.read(tmp_path / "x.nrrd")
    with refuses("y.h5: no such file"):
        D.read(tmp_path / "y.h5")

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(A.importlib, "import_module", missing)
    with refuses("h5py is not installed; pip install 'noisyseg-fast[la]'"):
        D.load(case)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "float64", "uint16"])
def test_nrrd_is_read_as_itk_reads_it(tmp_path, kind, packed):
    """Turned, spaced, off the origin; ITK itself is not used, since broken headers bring it down."""
    sitk = pytest.importorskip("SimpleITK")
    values = (np.random.default_rng(0).random((3, 4, 5)) * 200).astype(kind)
    image = sitk.GetImageFromArray(values)
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ np.diag([1, -1, 1])
    image.SetDirection(turn.ravel().tolist())
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((-3.5, 7.25, 11.0))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"), packed)
    raw = D.read(tmp_path / "a.nrrd")
    assert raw.array.dtype == values.dtype and np.array_equal(raw.array, values.T)
    assert raw.spacing == pytest.approx((0.5, 0.75, 2.5))
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = turn * (0.5, 0.75, 2.5), (-3.5, 7.25, 11.0)
    assert np.allclose(raw.affine, np.diag([-1, -1, 1, 1]) @ lps)


# ---- flat folders ---------------------------------------------------------------------------------


def flat(root, cases=8, shape=(40, 40, 12), raters=2, unlabelled=(), spacing=SPACING):
    root.mkdir(exist_ok=True)
    for i in range(cases):
        image, mask = blob(shape, i)
        save_nifti(root / f"n{i}_image.nii.gz", image, oblique_affine(spacing))
        for rater in range(raters if i not in unlabelled else 0):
            save_nifti(root / f"n{i}_rater{rater}.nii.gz", np.roll(mask, rater, 0), oblique_affine(spacing))
    return root


def test_a_flat_folder_of_images_and_raters(tmp_path):
    data = D.open_data(flat(tmp_path / "a", unlabelled=(2,)), test=0.3)
    everyone = data.split("all")
    assert {len(c.labels) for c in everyone} == {2} and data.unit == "mm"
    assert "n2" not in {c.id for c in everyone}
    assert [c.id for c in D._flat(tmp_path / "a").unlabelled] == ["n2"]
    store = D.Store(raters=True)
    assert store.get(everyone[0]).raters.shape == (2, 40, 40, 12)
    (tmp_path / "a" / "n9_label.nii.gz").write_bytes(b"")
    with refuses("n9_label.nii.gz: has no image n9_image in"):
        D.open_data(tmp_path / "a")
    (tmp_path / "a" / "n9_label.nii.gz").rename(tmp_path / "a" / "notes.nii.gz")
    with refuses("notes.nii.gz: is neither CASE_image, CASE_label nor CASE_rater0, _rater1, ..."):
        D.open_data(tmp_path / "a")


# ---- the study ------------------------------------------------------------------------------------


def test_few_labels_split_by_patient_anew_for_each_seed(tmp_path):
    source = flat(tmp_path / "a", cases=12)
    study = R.get("dtml")
    settings = replace(study.settings, data=str(source))
    data = study.data(settings)
    assert len(data.training) == 2 and len(data.meta) == 6  # a fifth of 8
    assert data.meta == data.unlabelled
    parts = [{c.patient for c in part} for part in (data.training, data.meta, data.validation, data.test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 12
    other = study.data(replace(settings, seed=1))
    assert {c.id for c in other.test} != {c.id for c in data.test} and study.splits
    crops = {c.id: c.image.shape for c in [*data.split("all")]}
    assert {c.id: c.image.shape for c in other.split("all")} == crops


def test_all_arms_get_as_many_images_a_step():
    study = R.get("dtml")
    for of in (study, R._DTML_LEFT_ATRIUM):
        runs = R.plan(of, replace(of.settings, epochs=3, epoch_batches=100), of.arms, 2, R.Path("out"))
        for run in runs:
            run.config.check()
            bound = run.arm.startswith("vnet")
            assert run.config.batch_size == (4 if bound else 2)
            assert ("unlabelled" in methods.get(run.config.method).wants) != bound
        assert {(r.config.lr, r.config.optimizer, r.config.epoch_batches) for r in runs} == {
            (of.settings.lr, of.settings.optimizer, 100)
        }
    assert {arm for arm, _ in study.paper} <= set(study.arms)
    assert len(study.paper[next(iter(study.paper))]) == len(study.measures)


def test_left_atrium_data_get_the_papers_settings(tmp_path):
    root = h5_set(tmp_path / "la")
    study = R.get("dtml").on(str(root))
    assert study.budget == 6000
    expected = {
        "patch": (112, 112, 80), "width": 16, "batch_size": 2, "optimizer": "sgd", "lr": 0.01,
        "schedule": "tenth", "halve_every": 2500, "weight_decay": 1e-4, "network": "vnet", "spacing": None,
    }  # fmt: skip
    assert expected.items() <= asdict(study.settings).items()
    assert [study.settings.decay(s, 150) for s in (0, 2499, 2500, 5000)] == pytest.approx([1, 1, 0.1, 0.01])
    data = study.data(replace(study.settings, data=str(root)))
    assert (len(data.training), len(data.unlabelled), len(data.meta), len(data.test)) == (2, 8, 8, 2)
    assert R.get("dtml").on("sample") is None and R.get("mcpm").on(str(root)) is None


@pytest.mark.parametrize("kind", ["h5", "nrrd", "flat"])
def test_one_command(tmp_path, kind):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from noisyseg_fast import cli

    small = (32, 32, 16)  # one window
    make = {
        "h5": lambda: h5_set(tmp_path / "data", small),
        "nrrd": lambda: nrrd_set(tmp_path / "data", small),
        "flat": lambda: flat(tmp_path / "data", 8, small, spacing=(0.7, 0.7, 0.7)),
    }
    arms = {"h5": ("dtml", "ua_mt"), "nrrd": ("vnet_all",), "flat": ("dtml",)}[kind]
    command = ["reproduce", "dtml", "--quick", "--budget", "1", "--seeds", "2" if kind == "flat" else "1"]
    command += ["--data", str(make[kind]()), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, [*command, *(x for arm in arms for x in ("--arm", arm))])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "results.md").read_text()
    unit = "mm" if kind == "flat" else "voxel"
    assert f"| training | Dice | Jaccard | ASD [{unit}] | HD95 [{unit}] | seeds | paper's Dice |" in text
    assert ("| 0.9012 | 0.8214 | 1.82 | 7.01 |" in text) == ("dtml" in arms)
    assert ("SGD with lr 0.01" in text) == (kind != "flat")
    assert ("the split by patient" in text) == (kind == "flat")
    assert (tmp_path / "out" / "results.png").is_file()
    if kind == "flat":
        splits = [
            (tmp_path / "out" / "runs" / f"dtml-afifthofthelabels-seed{i}" / "split.json") for i in (0, 1)
        ]
        assert splits[0].read_text() != splits[1].read_text()
