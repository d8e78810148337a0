"""Masks in which only some pixels have a label: dots, lines, some slices; from files to scores."""

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

from folders import blob, nifti_folder, save_nifti  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from noisyseg_fast import cli  # noqa: E402
from noisyseg_fast.training import data as D  # noqa: E402
from noisyseg_fast.training import engine, evaluate, methods, model  # noqa: E402
from noisyseg_fast.training.engine import Config, train  # noqa: E402
from noisyseg_fast.training.methods.plain import LOSSES  # noqa: E402

NONE = D.MISSING
RATERS = ("majority_vote", "staple", "label_sampling", "multi_head")


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


pytestmark = pytest.mark.usefixtures("one_thread")


def dots(mask, seed, value=NONE, share=0.03):
    """Some pixels of a mask, of the object and of the background; the others have `value`."""
    generator = np.random.default_rng(seed)
    kept = np.zeros(mask.shape, bool)
    for label in (0, 1):
        places = np.argwhere(mask == label)
        chosen = places[generator.permutation(len(places))[: max(2, int(share * len(places)))]]
        kept[tuple(chosen.T)] = True
    return np.where(kept, mask, value).astype(np.uint8)


def sparse_folder(root, cases=6, shape=(32, 32), value=NONE, raters=1, whole=()):
    """As nifti_folder, with dots for masks but for the cases in `whole`."""
    nifti_folder(root, cases, shape, raters)
    for i in set(range(cases)) - set(whole):
        for rater in range(raters):
            name = f"case{i}_rater{rater}" if raters > 1 else f"case{i}"
            mask = np.roll(blob(shape, i)[1], rater, axis=0)
            save_nifti(root / "labelsTr" / f"{name}.nii.gz", dots(mask, 10 * i + rater, value))
    return root


def masks(root, ignore=None):
    data = D.open_data(root, ignore_label=ignore)
    return {case.id: D.load(case, data.classes).target for case in data.split("all")}


# ---- files ----------------------------------------------------------------------------------------


def test_nifti_pixels_without_a_label(tmp_path):
    root = sparse_folder(tmp_path / "set")
    found = masks(root, 255)
    for i in range(6):
        assert np.array_equal(found[f"case{i}"], dots(blob((32, 32), i)[1], 10 * i))
    message = 'label 255 is out of range 0..1; name the classes in "labels" of dataset.json or the datalist, or, if '
    with refuses(
        D.DataError, message + "it marks pixels without a label, set ignore_label (--ignore-label 255)"
    ):
        masks(root)


@pytest.mark.parametrize("value", [2, 255, 7])
def test_nnunets_ignore_label_in_dataset_json(tmp_path, value):
    root = sparse_folder(tmp_path / "set", value=value)
    labels = {"background": 0, "lesion": 1, "ignore": value}
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    data = D.open_data(root)
    assert (data.classes, data.ignore) == (2, value)
    assert np.array_equal(masks(root)["case0"], dots(blob((32, 32), 0)[1], 0))
    assert np.array_equal(masks(root, value)["case0"], masks(root)["case0"])
    with refuses(D.DataError, f'{root}: "ignore" in "labels" is {value}, ignore_label 9; name one'):
        D.open_data(root, ignore_label=9)
    (root / "dataset.json").write_text(json.dumps({"labels": {str(v): k for k, v in labels.items()}}))
    assert D.open_data(root).ignore == value  # as the Decathlon writes it
    with refuses(D.DataError, f"{root}: ignore_label 1 is one of the classes 0..1"):
        (root / "dataset.json").unlink()
        D.open_data(root, ignore_label=1)


def png_case(folder, mask, mode=None):
    folder.mkdir()
    image = Image.fromarray(mask)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    image.save(folder / "mask.png")
    Image.fromarray(np.arange(mask.size, dtype=np.uint8).reshape(mask.shape)).save(folder / "image.png")
    return D.Case("a", "p", (folder / "image.png",), (folder / "mask.png",))


@pytest.mark.parametrize(
    ("values", "ignore", "expected"),
    [
        ((0, 255, 255), None, (0, 1, 1)),  # a binary mask
        ((0, 255, 255), 255, (0, NONE, NONE)),  # unless that is the ignored value
        ((0, 1, 255), 255, (0, 1, NONE)),
        ((0, 255, 128), 128, (0, 1, NONE)),
        ((0, 1, 2), 2, (0, 1, NONE)),
    ],
)
@pytest.mark.parametrize("mode", [None, "P"])
def test_png(tmp_path, values, ignore, expected, mode):
    mask = np.array([values] * 2, dtype=np.uint8)
    case = replace(png_case(tmp_path / "set", mask, mode), ignore=ignore)
    assert D.load(case).target.tolist() == [list(expected)] * 2


def test_an_image_with_a_palette_is_still_refused(tmp_path):
    case = png_case(tmp_path / "set", np.array([[0, 1]], dtype=np.uint8), "P")
    with refuses(D.DataError, "mask.png: PNG of mode P; use grey (8 or 16 bit) or RGB"):
        D.load_image(replace(case, image=case.labels))


def test_datalist(tmp_path):
    sparse_folder(tmp_path / "set", value=9, cases=4)
    entries = [
        {"image": f"set/imagesTr/case{i}_0000.nii.gz", "label": f"set/labelsTr/case{i}.nii.gz"}
        for i in range(4)
    ]
    content = {"training": entries, "labels": {"background": 0, "lesion": 1, "ignore": 9}}
    (tmp_path / "list.json").write_text(json.dumps(content))
    assert np.array_equal(masks(tmp_path / "list.json")["case2"], dots(blob((32, 32), 2)[1], 20))
    del content["labels"]
    (tmp_path / "list.json").write_text(json.dumps(content))
    assert np.array_equal(masks(tmp_path / "list.json", 9)["case2"], dots(blob((32, 32), 2)[1], 20))


def test_npz(tmp_path):
    whole = [blob((16, 16), i) for i in range(4)]
    mask = np.stack([dots(m, i) for i, (_, m) in enumerate(whole)])
    path = tmp_path / "a.npz"
    np.savez(path, image=np.stack([image for image, _ in whole]), mask=mask)
    assert np.array_equal(masks(path, 255)["a_1"], mask[1])
    assert D.open_data(path, ignore_label=255).classes == 2
    with refuses(
        D.DataError, "if another value marks pixels without a label, set ignore_label (--ignore-label)"
    ):
        D.open_data(path)


def test_a_mask_without_any_label_is_told(tmp_path):
    root = sparse_folder(tmp_path / "set")
    save_nifti(root / "labelsTr" / "case3.nii.gz", np.full((32, 32), 255, np.uint8))
    with refuses(D.DataError, "case case3: no pixel has a label; it belongs among the unlabelled images"):
        masks(root, 255)


# ---- votes, noise and patches ---------------------------------------------------------------------


def test_pixels_without_a_label_do_not_vote():
    drawn = np.array([[0, 1, 1, NONE, 0], [0, NONE, 0, NONE, 1], [1, NONE, 0, NONE, NONE]], np.uint8)
    assert D.consensus(drawn).tolist() == [0, 1, 0, NONE, 1]


def training_set(root, patch=(32, 32), **options):
    data = D.open_data(root, ignore_label=255)
    store = D.Store(data.classes, raters=options.pop("raters", False))
    return data, D.TrainingSet(data.training, store, patch, **options)


def test_noise_grows_over_labelled_pixels_alone(tmp_path):
    root = nifti_folder(tmp_path / "set", raters=1)
    for i in range(6):
        half = blob((32, 32), i)[1]
        half[:, 16:] = 255
        save_nifti(root / "labelsTr" / f"case{i}.nii.gz", half)
    data, training = training_set(root, noise_rate=1.0, noise_radius=6)
    assert training.radii.max() >= 3
    for i, case in enumerate(data.training):
        before, after = training.store.get(case).target, training.label(i)
        assert np.array_equal(before == NONE, after == NONE)
        assert ((after == 1) >= (before == 1)).all()
        if training.radii[i] >= 3:
            assert (after == 1).sum() > (before == 1).sum()


@pytest.mark.parametrize("shape", [(64, 64), (40, 24)])
def test_every_patch_has_a_label(tmp_path, shape):
    root = nifti_folder(tmp_path / "set", cases=3, shape=shape, raters=1)
    for i in range(3):
        label = np.full(shape, 255, np.uint8)
        label[4 * i + 1, 5], label[shape[0] - 3, shape[1] - 2 - i] = 0, 1  # two dots, far apart
        save_nifti(root / "labelsTr" / f"case{i}.nii.gz", label)
    _, training = training_set(root, (16, 16))
    seen = set()
    for training.epoch in range(20):
        label = training[0]["label"].numpy()
        seen |= set(np.unique(label))
        assert (label != NONE).any()
        assert (label != NONE).sum() <= 2
    assert seen == {0, 1, NONE}


def test_each_raters_own_gaps_come_along(tmp_path):
    _, training = training_set(sparse_folder(tmp_path / "set", raters=3), raters=True)
    item = training.probe(0)
    votes = item["raters"].numpy()
    assert votes.shape == (3, 32, 32)
    assert (votes == NONE).any((1, 2)).all() and (votes != NONE).any((1, 2)).all()
    assert np.array_equal(item["label"].numpy() == NONE, (votes == NONE).all(0))


@pytest.mark.parametrize("method", ["majority_vote", "staple"])
def test_fused_labels_have_gaps_where_nobody_drew(tmp_path, method):
    fuse = methods.get(method).fuse
    config = methods.configure(method)
    _, training = training_set(
        sparse_folder(tmp_path / "set", raters=3), raters=True, fuse=lambda raters: fuse(config, raters, 2)
    )
    label, votes = training.labels(0)[0], training.labels(0)[1:]
    assert np.array_equal(label == NONE, (votes == NONE).all(0))
    one = (votes != NONE).sum(0) == 1
    assert method == "staple" or np.array_equal(label[one], votes.min(0)[one])


# ---- methods --------------------------------------------------------------------------------------

# Whose loss in the first step is of labels alone.
SUPERVISED = [*LOSSES, "selective", "self_learning", "trimmed", "co_teaching", "tri_net", "two_stream"]


@pytest.mark.parametrize("name", SUPERVISED)
def test_nothing_is_learned_from_pixels_without_a_label(name):
    """The image where no labelled pixel sees it may be anything."""
    torch.manual_seed(0)
    method = methods.create(
        name, None, lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)), 1
    )
    method.plan = methods.Plan(torch.optim.Adam(method.trained()), 20, 5)
    label = torch.full((4, 16, 16), NONE, dtype=torch.uint8)
    label[:, 10:, :8], label[:, 10:, 8:] = 0, 1
    image = torch.randn(4, 1, 16, 16)
    batch = {"image": image, "label": label, "index": torch.arange(4)}
    first = method.training_step(batch, 0)["loss"]
    image[:, :, :9] = 7.0
    assert torch.equal(method.training_step(batch, 0)["loss"], first) and first > 0
    image[:, :, 12:] = 7.0
    assert method.training_step(batch, 0)["loss"] != first


@pytest.mark.parametrize("name", RATERS[2:])
def test_raters_gaps_count_for_nothing(name):
    torch.manual_seed(0)
    inputs = methods.Inputs(2, 1, 2, 2)
    method = methods.create(name, None, lambda: nn.Conv2d(1, 1, 3, padding=1), 1, inputs)
    image, raters = torch.randn(2, 1, 32, 32), torch.full((2, 2, 32, 32), NONE, dtype=torch.uint8)
    batch = {"image": image, "label": raters[:, 0], "raters": raters, "index": torch.arange(2)}
    assert method.training_step(batch, 0)["loss"] == 0  # nobody drew here
    raters[0, 0, 3, 3:9] = 1
    losses = set()
    for _ in range(8):
        loss = method.training_step(batch, 0)["loss"]
        loss.backward()
        losses.add(round(loss.item(), 6))
    assert len(losses) == 1 and losses != {0.0}  # the first image's rater, whoever is drawn
    logits = torch.zeros(1, 1, 32, 32)
    from noisyseg_fast.training.methods._raters import segmentation_loss

    a = segmentation_loss(logits, raters[:1, 0], "sigmoid")
    logits[..., 10:, :] = 9.0
    assert segmentation_loss(logits, raters[:1, 0], "sigmoid") == a


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sparse_folder(tmp_path_factory.mktemp("sparse") / "set", raters=2)


@pytest.fixture(scope="module")
def tiny(folder):
    return Config(
        data=str(folder),
        network="unet",
        width=4,
        epochs=2,
        batch_size=4,
        device="cpu",
        ignore_label=255,
        lr=3e-3,
    )


@pytest.mark.parametrize(
    "method", ["ce", "nr_dice", "selective", "self_learning", "mean_teacher", "confident_learning", *RATERS]
)
def test_runs_on_dots(tiny, tmp_path, method):
    result = train(replace(tiny, method=method, out=str(tmp_path / "run")), report=method == "ce")
    assert math.isfinite(result.history[-1]["train_loss"])
    assert math.isfinite(result.history[-1]["val_dice"])
    assert result.test.partial == result.test.masks and math.isnan(result.test.hd95)
    assert "partly labelled)" in result.test.sentence("mm")
    assert max(p["clean"].max() for p in result.pictures) == 1


def test_methods_that_cannot_say_so_before_anything_is_read(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "check", None)
    unable = [name for name, method in methods.METHODS.items() if not method.sparse]
    assert {"umanet", "mcpm", "dtc", "boundary"} <= set(unable)
    for name in unable:
        message = (
            f"method {name} cannot leave out pixels without a label (ignore_label 255); choose from ce, "
        )
        with refuses(ValueError, message):
            train(replace(tiny, method=name, meta_fraction=0.3, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    with refuses(ValueError, "ignore_label must be a whole number, got '255'"):
        replace(tiny, ignore_label="255").check()


def test_some_slices_teach_a_volume(tmp_path):
    """Every third slice has labels; the others are segmented as well."""
    root = nifti_folder(tmp_path / "set", cases=6, shape=(32, 32, 16), raters=1)
    data = D.open_data(root)
    for i in {int(case.id[4:]) for case in data.training}:
        mask = blob((32, 32, 16), i)[1]
        label = np.full_like(mask, 2)
        label[..., ::3] = mask[..., ::3]
        save_nifti(root / "labelsTr" / f"case{i}.nii.gz", label)
    (root / "dataset.json").write_text('{"labels": {"background": 0, "lesion": 1, "ignore": 2}}')
    run = Config(
        data=str(root), network="vnet-2d", width=4, epochs=5, batch_size=2,
        patch=(32, 32, 16), device="cpu", lr=1e-2, out=str(tmp_path / "run"),
    )  # fmt: skip
    result = train(run, report=False)
    assert result.test.partial == 0 and result.test.dice > 0.65


# ---- scores ---------------------------------------------------------------------------------------


def test_score_of_labelled_pixels():
    target = np.full((10, 10), NONE, np.uint8)
    target[:2, :5], target[:2, 5:] = 0, 1
    prediction = np.ones((10, 10), np.uint8)
    prediction[:2, 3:5] = prediction[:2, 8:] = 0
    (score,) = evaluate.score("a", prediction, target, (1, 1))
    assert score.dice == pytest.approx(2 * 6 / (12 + 10))  # 6 right of 12 predicted and 10 drawn
    assert score.iou == pytest.approx(6 / 16)
    assert math.isnan(score.hd95) and score.empty == ""
    target[0, 5:] = target[1, 5:] = 0
    assert evaluate.score("a", prediction, target, (1, 1))[0].empty == "reference"
    target[:2] = NONE
    target[9, 9] = 0
    prediction[9, 9] = 0
    (nothing,) = evaluate.score("a", prediction, target, (1, 1))
    assert nothing.empty == "both"
    summary = evaluate.summarize([score, nothing])
    assert (summary.dice, summary.partial, summary.both_empty) == (score.dice, 1, 1)
    assert summary.sentence("mm").endswith("(without a finite HD95: 1 empty in both, 1 partly labelled)")


def test_evaluate_leaves_them_out_too(tmp_path, tiny):
    train(replace(tiny, out=str(tmp_path / "run")), report=False)

    def run(*arguments):
        return CliRunner().invoke(
            cli.app, [str(a) for a in ("evaluate", tmp_path / "run" / "best.pt", *arguments)]
        )

    def rows(path):
        with open(path) as file:
            return list(csv.DictReader(file))

    assert run("--out", tmp_path / "a.csv").exit_code == 0
    assert rows(tmp_path / "a.csv") == rows(tmp_path / "run" / "test.csv")
    other = sparse_folder(tmp_path / "other", value=3)
    assert "set ignore_label (--ignore-label 3)" in run("--data", other).stderr
    result = run("--data", other, "--ignore-label", 3, "--split", "all", "--out", tmp_path / "b.csv")
    assert "6 partly labelled" in " ".join(result.output.split())
    place = torch.device("cpu")
    trained, spec = model.load_model(model.read_checkpoint(tmp_path / "run" / "best.pt"), place)
    data = D.open_data(other, ignore_label=3)
    store = D.Store()
    for row, case in zip(rows(tmp_path / "b.csv"), data.split("all"), strict=True):
        loaded = store.get(case)
        found = model.infer(trained, torch.from_numpy(loaded.image)[None], spec.patch)[0].numpy()
        known = loaded.target != NONE
        a, b = found[known] == 1, loaded.target[known] == 1
        assert float(row["dice"]) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)
