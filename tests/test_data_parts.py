"""The parts of the data beyond images and labels: the clean meta set, raters, unlabelled images; arrays."""

import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

from folders import blob, nifti_folder, save_nifti  # noqa: E402

from noisyseg_fast import losses  # noqa: E402
from noisyseg_fast.training import data as D  # noqa: E402
from noisyseg_fast.training import engine, methods  # noqa: E402
from noisyseg_fast.training.engine import Config, train  # noqa: E402


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the meta set ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_meta_patients_come_out_of_the_training_patients(fraction):
    plain, data = D.open_data("sample"), D.open_data("sample", meta_fraction=fraction)
    assert [c.id for c in data.test] == [c.id for c in plain.test]
    assert [c.id for c in data.validation] == [c.id for c in plain.validation]
    assert sorted(c.id for c in data.training + data.meta) == sorted(c.id for c in plain.training)
    patients = [{c.patient for c in part} for part in (data.training, data.meta)]
    assert not patients[0] & patients[1]
    assert len(patients[1]) == round(fraction * len({c.patient for c in plain.training}))
    other = D.open_data("sample", meta_fraction=fraction, seed=1)
    assert {c.patient for c in other.meta} != patients[1]


def marked_datalist(root, cases=8, clean=(1, 4), unlabelled=(5,)):
    nifti_folder(root, cases=cases)
    entries = [
        {
            "image": f"imagesTr/case{i}_0000.nii.gz",
            "label": [f"labelsTr/case{i}_rater0.nii.gz"],
            "clean": i in clean,
        }
        for i in range(cases)
    ]
    for i in unlabelled:
        del entries[i]["label"]
    parts = {"training": entries[:6], "validation": entries[6:7], "test": entries[7:]}
    (root / "list.json").write_text(json.dumps(parts))
    return root / "list.json"


def test_cases_marked_clean_and_entries_without_label_in_a_datalist(tmp_path):
    path = marked_datalist(tmp_path)
    data = D.open_data(path)
    assert [c.id for c in data.meta] == ["case1", "case4"]
    assert [c.id for c in data.training] == ["case0", "case2", "case3"]
    assert [c.id for c in data.unlabelled] == ["case5"]
    with refuses(
        D.DataError, "2 training cases are marked clean and make the meta set; leave meta_fraction at 0"
    ):
        D.open_data(path, meta_fraction=0.1)
    content = json.loads(path.read_text())
    content["training"][0]["clean"] = "yes"
    path.write_text(json.dumps(content))
    with refuses(D.DataError, "training[0]: \"clean\" must be true or false, got 'yes'"):
        D.open_data(path)


def test_folder_with_clean_column_missing_raters_and_unlabelled_images(tmp_path):
    root = nifti_folder(tmp_path / "set", cases=8, raters=3)
    rows = [f"case{i},p{i},{'true' if i % 2 else ''}" for i in range(8)]
    (root / "patients.csv").write_text("case,patient,clean\n" + "\n".join(rows) + "\n")
    (root / "labelsTr" / "case2_rater1.nii.gz").unlink()
    (root / "imagesUn").mkdir()
    for i in range(3):
        save_nifti(root / "imagesUn" / f"new{i}_0000.nii.gz", blob((32, 32), 90 + i)[0])
    data = D.open_data(root)
    assert data.meta and all(int(c.id[4:]) % 2 for c in data.meta)
    assert not any(int(c.id[4:]) % 2 for c in data.training)
    assert [c.id for c in data.unlabelled] == ["new0", "new1", "new2"]
    case = next(c for c in data.split("all") if c.id == "case2")
    loaded = D.load(case)
    assert loaded.raters.shape == (3, 32, 32)
    assert (loaded.raters[1] == D.MISSING).all()
    assert np.array_equal(loaded.target, (loaded.raters[0] + loaded.raters[2]) >= 1)  # at least half of two
    (root / "imagesUn" / "new0_0000.nii.gz").rename(root / "imagesUn" / "case0_0000.nii.gz")
    with refuses(D.DataError, "two entries have the id case0; rename one"):
        D.open_data(root)
    (root / "patients.csv").write_text("case,patient,clean\ncase0,p0,maybe\n")
    with refuses(D.DataError, "\"clean\" of case 'case0' must be true or false, got 'maybe'"):
        D.open_data(root)


def test_unlabelled_images_of_held_out_patients_are_left_out(tmp_path):
    root = nifti_folder(tmp_path / "set", cases=8)
    (root / "imagesUn").mkdir()
    for i in range(8):
        save_nifti(root / "imagesUn" / f"u{i}_0000.nii.gz", blob((32, 32), i)[0])
    rows = [f"{kind}{i},p{i}" for kind in ("case", "u") for i in range(8)]
    (root / "patients.csv").write_text("case,patient\n" + "\n".join(rows) + "\n")
    data = D.open_data(root)
    assert {c.patient for c in data.unlabelled} == {c.patient for c in data.training}


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_meta_fraction_out_of_range(fraction):
    with refuses(ValueError, f"meta_fraction must be at least 0 and below 1, got {fraction}"):
        D.open_data("sample", meta_fraction=fraction)
    with refuses(ValueError, f"meta_fraction must be at least 0 and below 1, got {fraction}"):
        Config(meta_fraction=fraction).check()


def test_all_clean_or_too_few_patients(tmp_path):
    path = marked_datalist(tmp_path, clean=range(6), unlabelled=())
    with refuses(D.DataError, "every training case is marked clean; mark only those to be trusted"):
        D.open_data(path)
    (tmp_path / "b").mkdir()
    root = nifti_folder(tmp_path / "b" / "set", cases=3)
    with refuses(D.DataError, "1 training patient(s) cannot spare any for a meta set"):
        D.open_data(root, meta_fraction=0.5)


# ---- arrays ---------------------------------------------------------------------------------------


def arrays(path, count=8, raters=3, **more):
    pairs = [blob((16, 16), i) for i in range(count)]
    image, mask = (np.stack(a) for a in zip(*pairs, strict=True))
    masks = np.stack([np.roll(mask, r, 1) for r in range(raters)], 1) if raters else mask
    np.savez(path, **{"image": image, "mask": masks, **more})
    return path


def test_npz(tmp_path):
    present = np.ones((8, 3), bool)
    present[3, 1:] = False
    labelled = np.arange(8) != 6
    path = arrays(
        tmp_path / "a.npz",
        rater_present=present,
        nodule=np.repeat([f"n{i}" for i in range(4)], 2),
        slice_index=np.tile([0, 1], 4),
        patient=np.repeat([f"p{i}" for i in range(4)], 2),
        pixel_mm=np.full(8, 0.7),
        labelled=labelled,
    )
    data = D.open_data(path, seed=5, validation=0.25, test=0.25)
    assert data.unit == "mm"
    assert [c.id for c in data.unlabelled] in ([], ["n3_s0"])
    assert len(data.split("all")) == 7
    case = next(c for c in data.split("all") if c.id == "n1_s1")
    loaded = D.load(case)
    assert np.array_equal(loaded.target, blob((16, 16), 3)[1])  # the one rater who was present
    assert (loaded.raters[1:] == D.MISSING).all()
    assert loaded.spacing == pytest.approx((0.7, 0.7))
    assert len({c.patient for c in data.test} & {c.patient for c in data.training}) == 0


def test_npz_of_one_rater_without_names(tmp_path):
    data = D.open_data(arrays(tmp_path / "a.npz", raters=0, clean=np.arange(8) < 3))
    assert data.unit == "px"
    assert {c.id for c in data.split("all")} == {f"a_{i}" for i in range(8)}
    assert {c.id for c in data.meta} <= {"a_0", "a_1", "a_2"}


def test_npz_with_masks_to_trust(tmp_path):
    blobs = np.stack([blob((16, 16), i)[1] for i in range(8)])
    experts = np.stack([blobs, blobs, 1 - blobs], 1)
    there = np.ones((8, 3), bool)
    there[2] = False
    crowd = np.stack([np.roll(blobs, r, 1) for r in range(2)], 1)
    own = arrays(tmp_path / "own.npz", mask=crowd, reference=experts, reference_present=there)
    names = np.asarray([f"cell{i}" for i in range(8)])
    theirs = tmp_path / "bubil.npz"
    np.savez(
        theirs,
        image=np.stack([blob((16, 16), i)[0] for i in range(8)]),
        crowd=crowd,
        crowd_present=np.arange(16).reshape(8, 2) != 3,
        expert_b=experts[:, :1],
        expert_b_present=there[:, :1],
        expert_c=experts[:, 1:],
        expert_c_present=there[:, 1:],
        name=names,
    )
    for path in (own, theirs):
        data = D.open_data(path, validation=0.25, test=0.25, meta_fraction=0.3)
        assert {len(case.labels) for case in data.training} == {2}  # the crowd, which is trained on
        for case in data.split("all"):
            number = int(case.id[-1])
            if number == 2:
                assert case.reference is None and len(case.labels) == 2
            else:
                assert np.array_equal(case.reference, blobs[number])
                trusted = case.id not in {c.id for c in data.training}
                assert np.array_equal(case.labels, case.reference[None]) == trusted
                assert np.array_equal(case.trusted().labels, case.reference[None])
    assert {case.id for case in data.split("all")} == set(names)
    assert all(
        (c.labels[1] == D.MISSING).all() for c in data.split("all") if c.id == "cell1" and len(c.labels) == 2
    )
    assert D.open_data(arrays(tmp_path / "one.npz", reference=blobs)).test[0].reference is not None
    bad = {"reference": np.zeros((8, 16, 15), np.uint8)}
    with refuses(D.DataError, "reference must be (8, 16, 16) or have an axis of experts behind the first"):
        D.open_data(arrays(tmp_path / "a.npz", **bad))
    with refuses(D.DataError, "reference must hold class numbers from 0 to 254"):
        D.open_data(arrays(tmp_path / "a.npz", reference=np.full((8, 16, 16), 0.5)))
    with refuses(D.DataError, "reference_present must have the shape (8, 3), got (8, 2)"):
        D.open_data(arrays(tmp_path / "a.npz", reference=experts, reference_present=there[:, :2]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"mask": np.zeros((8, 2, 16, 15), np.uint8)},
            "image must be (N, *S) with 2 or 3 axes S and mask (N, *S)",
        ),
        ({"mask": np.full((8, 16, 16), 0.5)}, "mask must hold class numbers from 0 to 254"),
        ({"image": np.full((8, 16, 16), np.nan)}, "image must hold finite real numbers"),
        ({"rater_present": np.ones((8, 2), bool)}, "rater_present must have the shape (8, 3), got (8, 2)"),
        (
            {"rater_present": np.zeros((8, 3), bool)},
            "no rater is present for image 0; mark it labelled=False",
        ),
        ({"patient": np.asarray(["a"])}, "needs one name and one patient for each of 8 images"),
        ({"case": np.asarray(["a"] * 8)}, 'two entries have the id a; name them in the array "case"'),
        ({"pixel_mm": np.zeros(8)}, "spacing and pixel_mm must be positive and finite"),
    ],
)
def test_bad_npz(tmp_path, more, message):
    with refuses(D.DataError, message):
        D.open_data(arrays(tmp_path / "a.npz", **more))


def test_npz_without_arrays_or_unreadable(tmp_path):
    np.savez(tmp_path / "a.npz", picture=np.zeros(3))
    with refuses(D.DataError, "needs the arrays image and mask, has picture"):
        D.open_data(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"nonsense")
    with refuses(D.DataError, f"{tmp_path / 'b.npz'}: cannot be read as .npz"):
        D.open_data(tmp_path / "b.npz")


# ---- what an item brings along --------------------------------------------------------------------


def full_set(tmp_path, patch=(16, 16), items=None, **more):
    labelled = np.arange(20) < 14
    present = np.ones((20, 3), bool)
    present[::2, 1] = False
    path = arrays(tmp_path / "a.npz", count=20, labelled=labelled, rater_present=present)
    data = D.open_data(path, meta_fraction=0.3)
    store = D.Store(raters=True)
    parts = {"meta": data.meta, "unlabelled": data.unlabelled, **more}
    return data, D.TrainingSet(data.training, store, patch, noise_rate=0.5, items=items, **parts)


def test_items_bring_meta_raters_and_unlabelled(tmp_path):
    data, training = full_set(tmp_path)
    other = full_set(tmp_path)[1]
    for number in training.order(0):
        item, again = training[number], other[number]
        assert item["raters"].shape == (3, 16, 16) and item["raters"].dtype == torch.uint8
        absent = data.training[number].labels[1].flat[0] == D.MISSING
        assert bool((item["raters"][1] == D.MISSING).all()) == absent
        assert item["unlabelled"].shape == (1, 16, 16)
        assert torch.equal(item["meta"]["image"], again["meta"]["image"])
        assert torch.equal(item["unlabelled"], again["unlabelled"])
        inside = item["meta"]["label"] > 0
        assert item["meta"]["image"][0][inside].mean() > item["meta"]["image"][0][~inside].mean() + 1
        assert (
            item["meta"]["label"].sum() == D.load(data.meta[item["meta"]["index"]]).target.sum()
        )  # never dilated


def test_every_clean_case_comes_equally_often(tmp_path):
    data, training = full_set(tmp_path, items=5 * 3)
    count = len(data.meta)
    seen = []
    for epoch in range(4):
        training.epoch = epoch
        drawn = [training[n]["meta"]["index"] for n in training.order(epoch)]
        assert max(np.bincount(drawn, minlength=count)) - min(np.bincount(drawn, minlength=count)) <= 1
        seen.append(drawn)
    assert seen[0] != seen[1]


def test_an_epoch_of_more_items_than_cases(tmp_path):
    _, training = full_set(tmp_path, items=25)
    count, order = len(training), training.order(2)
    assert len(order) == 25
    for lap in range(25 // count):
        assert sorted(n % count for n in order[lap * count : (lap + 1) * count]) == list(range(count))
    case, again = order[0], order[0] % count + count
    assert not torch.equal(training[case]["image"], training[again]["image"]) or not torch.equal(
        training[case]["meta"]["image"], training[again]["meta"]["image"]
    )
    assert full_set(tmp_path)[1].order(2) == order[:count]  # the first lap is the plain epoch


def test_raters_and_meta_are_cropped_alike_and_padding_counts_as_not_drawn(tmp_path):
    data, training = full_set(tmp_path, patch=(32, 32))
    number = next(n for n in range(len(training)) if data.training[n].labels[1].flat[0] == D.MISSING)
    item = training[number]
    assert item["image"].shape == (1, 32, 32)
    assert (item["raters"][1] == D.MISSING).all()
    assert item["meta"]["label"].shape == item["unlabelled"].shape[1:] == (32, 32)
    small = full_set(tmp_path, patch=(8, 8))[1][number]
    agree = (small["raters"][0] + small["raters"][2] > 0).to(torch.uint8)
    assert torch.equal(agree, small["label"]) or training.radii[number]


def test_probe_holds_still_and_knows_the_clean_label(tmp_path):
    data, training = full_set(tmp_path, patch=(8, 8))
    index = int(np.flatnonzero(training.radii)[0])
    first = training.probe(index)
    training.epoch = 3
    again = training.probe(index)
    assert all(torch.equal(first[k], again[k]) for k in ("image", "label", "clean"))
    whole = full_set(tmp_path)[1].probe(index)
    assert np.array_equal(whole["clean"], D.load(data.training[index]).target)
    assert np.array_equal(whole["label"], training.label(index))
    assert whole["label"].sum() > whole["clean"].sum()


def test_clean_cases_among_the_training_cases_stay_clean(tmp_path):
    data, _ = full_set(tmp_path)
    both = D.TrainingSet(data.training, D.Store(), (16, 16), noise_rate=1.0, clean=data.meta)
    assert len(both) == len(data.training) + len(data.meta)
    assert not both.radii[len(data.training) :].any()
    alone = D.TrainingSet(data.training, D.Store(), (16, 16), noise_rate=1.0)
    assert np.array_equal(both.radii[: len(data.training)], alone.radii)
    assert len(D.TrainingSet((), D.Store(), (16, 16), noise_rate=1.0, clean=data.meta)) == len(data.meta)


# ---- the engine -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Nothing:
    pass


@pytest.fixture
def greedy():
    """A method that asks for everything and keeps what it was given."""
    seen = []

    class Greedy(methods.Method):
        Config = _Nothing
        needs = frozenset({"meta", "raters", "unlabelled"})

        def training_step(self, batch, step):
            seen.append({k: v for k, v in batch.items()})
            return {
                "loss": losses.pixel_loss(self(batch["image"]), batch["label"], activation=self.activation)
            }

    methods.base.register("greedy")(Greedy)
    yield seen
    del methods.METHODS["greedy"]


def npz_run(tmp_path, **more):
    path = arrays(tmp_path / "a.npz", count=20, labelled=np.arange(20) < 16)
    settings = {"meta_fraction": 0.3, "noise_rate": 1.0, "epochs": 2, "width": 4, "batch_size": 4, **more}
    settings = {
        "patch": (32, 32),
        "device": "cpu",
        "out": str(tmp_path / "run"),
        "data": str(path),
        **settings,
    }
    return Config(**settings)


def test_a_method_gets_what_it_needs(tmp_path, greedy):
    config = npz_run(tmp_path, method="greedy")
    train(config, report=False)
    batch = greedy[0]
    size = len(batch["index"])
    assert batch["meta"]["image"].shape == batch["image"].shape == batch["unlabelled"].shape
    assert batch["meta"]["label"].shape == batch["label"].shape
    assert batch["raters"].shape == (size, 3, 32, 32)
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["meta"] and not set(split["meta"]) & set(split["training"])
    assert split["unlabelled"] == [f"a_{i}" for i in range(16, 20)]
    kept = [b["meta"]["index"].tolist() for b in greedy]
    greedy.clear()
    with pytest.MonkeyPatch.context() as patch:
        save = engine._Loop.save_last

        def stop(self):
            save(self)
            raise KeyboardInterrupt

        patch.setattr(engine._Loop, "save_last", stop)
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, out=str(tmp_path / "b"), workers=1), report=False)
    train(replace(config, out=str(tmp_path / "b")), resume=True, report=False)
    assert [b["meta"]["index"].tolist() for b in greedy] == kept


@pytest.mark.parametrize("train_on", engine.TRAIN_ON)
def test_train_on(tmp_path, train_on):
    config = npz_run(tmp_path, train_on=train_on, epoch_batches=3, epochs=1)
    data = engine.open_run(config)
    result = train(config, report=False)
    expected = {"training": len(data.training), "meta": len(data.meta)}
    expected["both"] = sum(expected.values())
    seen = {}
    init = D.TrainingSet.__init__

    def note(self, *args, **kwargs):
        init(self, *args, **kwargs)
        seen["cases"], seen["radii"] = [c.id for c in self.cases], self.radii

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(D.TrainingSet, "__init__", note)
        train(replace(config, out=str(tmp_path / "again")), report=False)
    assert len(seen["cases"]) == expected[train_on]
    clean = [id in {c.id for c in data.meta} for id in seen["cases"]]
    assert not seen["radii"][clean].any()
    assert len(result.history) == 1


def test_what_the_data_lack_is_told(tmp_path, greedy):
    one = arrays(tmp_path / "one.npz", raters=0)
    several = arrays(tmp_path / "several.npz")
    config = Config(data=str(one), method="greedy", out=str(tmp_path / "run"))
    with refuses(
        ValueError, f"method greedy needs cases with clean labels, {one} marks none; set meta_fraction"
    ):
        train(config)
    with refuses(ValueError, f"method greedy needs several raters, {one} has one; give each rater's mask"):
        train(replace(config, meta_fraction=0.3))
    with refuses(ValueError, f"method greedy needs images without labels, {several} has none; put them into"):
        train(replace(config, meta_fraction=0.3, data=str(several)))
    with refuses(ValueError, f"train_on 'meta' needs cases with clean labels, {one} marks none"):
        train(replace(config, method="ce", train_on="meta"))
    with refuses(ValueError, "unknown train_on 'all'; choose from training, meta, both"):
        train(replace(config, train_on="all"))
    with refuses(ValueError, "epoch_batches must be at least 1, got 0"):
        train(replace(config, epoch_batches=0))
    assert not (tmp_path / "run").exists()


def test_unlabelled_volumes_and_windows(tmp_path):
    generator = np.random.default_rng(0)
    image = np.arange(2 * 5 * 40, dtype=np.float32).reshape(1, 10, 40)
    for _ in range(5):
        patch = D._crop_anywhere(image, (16, 16), generator)
        assert patch.shape == (1, 16, 16)
        assert np.array_equal(np.unique(patch[patch > 0]), np.sort(patch[patch > 0]))
        assert not patch[0, :3].any() and not patch[0, 13:].any()
