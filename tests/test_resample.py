"""To another spacing and back: the functions, training and prediction at a wanted spacing, turns in equal planes."""

import json
import re

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

from folders import blob, oblique_affine, save_nifti  # noqa: E402

from noisyseg_fast.training import data as D  # noqa: E402
from noisyseg_fast.training import evaluate as E  # noqa: E402
from noisyseg_fast.training import predict as P  # noqa: E402
from noisyseg_fast.training import resample as R  # noqa: E402
from noisyseg_fast.training.engine import Config, config_of, train  # noqa: E402
from noisyseg_fast.training.model import load_model, read_checkpoint  # noqa: E402


def refuses(message, error=ValueError):
    return pytest.raises(error, match=re.escape(message))


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the functions --------------------------------------------------------------------------------


def test_sizes_and_spacings():
    assert R.size_of((128, 128, 11), (0.7, 0.7, 2.5), (0.7, 0.7, 0.7)) == (128, 128, 39)
    assert R.size_of((3, 4), (0.1, 1.0), (1.0, 1.0)) == (1, 4)
    assert R.spacing_of((10, 11), (1.0, 2.5), (10, 39)) == pytest.approx((1.0, 27.5 / 39))
    with refuses("spacing must have 2 values, one for each axis, got (1, 1, 1)"):
        R.size_of((3, 4), (1, 1), (1, 1, 1))
    with refuses("spacing must be positive and finite, got (1, 0)"):
        R.size_of((3, 4), (1, 1), (1, 0))


def test_images_are_linear_between_voxel_centres():
    ramp = np.broadcast_to(np.arange(8.0)[:, None, None], (8, 3, 2))[None]
    finer = R.resample_image(ramp, (16, 3, 2))
    assert finer.dtype == np.float32 and finer.shape == (1, 16, 3, 2)
    # voxel i of the finer one has its centre at (i + 0.5) / 2 - 0.5 of the coarser, held at the ends
    np.testing.assert_allclose(finer[0, :, 0, 0], np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(0, 2**31),
)
def test_labels_are_the_argmax_of_the_classes_resampled_one_by_one(shape, new, seed):
    label = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    label[label == 3] = 255
    size = tuple(new[: len(shape)])
    found = R.resample_label(label, size)
    assert found.shape == size and found.dtype == np.uint8
    classes = [0, 1, 2, 255]
    shares = np.stack([R.resample_image((label == c)[None], size)[0] for c in classes])
    np.testing.assert_array_equal(found, np.take(classes, shares.argmax(0)))
    np.testing.assert_array_equal(R.resample_label(label, label.shape), label)


def test_there_and_back_keeps_a_ball():
    _, ball = blob((40, 40, 30), 3)
    size = R.size_of(ball.shape, (0.7, 0.7, 1.4), (1.0, 1.0, 1.0))
    back = R.resample_label(R.resample_label(ball, size), ball.shape)
    assert 2 * (back & ball).sum() / (back.sum() + ball.sum()) > 0.93
    assert R.resample_label(np.full((3, 4), 255, np.uint8), (5, 5)).tolist() == [[255] * 5] * 5


# ---- cases ----------------------------------------------------------------------------------------


def volumes(root, spacing=(1.0, 1.0, 2.5), shape=(24, 24, 8), cases=6):
    """A datalist of volumes, case 3 and 4 without labels, one rater who did not draw."""
    entries = []
    for i in range(cases):
        image, mask = blob(shape, i)
        save_nifti(root / f"c{i}.nii.gz", image, oblique_affine(spacing))
        for rater in range(2):
            save_nifti(root / f"c{i}_r{rater}.nii.gz", np.roll(mask, rater, 0), oblique_affine(spacing))
        label = [f"c{i}_r0.nii.gz", f"c{i}_r1.nii.gz" if i else None]
        entries.append({"image": f"c{i}.nii.gz", **({} if i in (3, 4) else {"label": label})})
    lists = {"training": entries[:5] if cases == 6 else entries[:-2], "validation": [], "test": entries[-1:]}
    (root / "list.json").write_text(json.dumps(lists))
    return root / "list.json"


def test_a_store_resamples_and_keeps_what_is_needed_to_score(tmp_path):
    data = D.open_data(volumes(tmp_path))
    case = next(c for c in data.split("all") if c.id == "c0")
    plain, other = D.Store(raters=True).get(case), D.Store(raters=True, spacing=(1, 1, 1)).get(case)
    assert plain.own is None and plain.image.shape == (1, 24, 24, 8)
    assert other.image.shape == (1, 24, 24, 20) and other.image.dtype == np.float32
    assert other.target.shape == (24, 24, 20) and other.raters.shape == (2, 24, 24, 20)
    assert (other.raters[1] == D.MISSING).all()  # who did not draw
    assert other.spacing == pytest.approx((1, 1, 1))
    np.testing.assert_array_equal(other.own.target, plain.target)
    assert other.own.spacing == pytest.approx((1, 1, 2.5))
    volume = [x.sum() * np.prod(s) for x, s in ((plain.target, plain.spacing), (other.target, other.spacing))]
    assert volume[1] == pytest.approx(volume[0], rel=0.1)
    image, spacing = D.load_image(case, (1, 1, 1))
    np.testing.assert_array_equal(image, other.image)
    assert spacing == other.spacing
    unlabelled = D.Store(spacing=(1, 1, 1)).get(data.unlabelled[0])
    assert unlabelled.image.shape == (1, 24, 24, 20) and (unlabelled.target == D.MISSING).all()
    with refuses("case c0: spacing must have 3 values, one for each axis, got (1, 1)", D.DataError):
        D.Store(spacing=(1, 1)).get(case)


def test_trained_scored_and_predicted_on_the_files_own_grid(tmp_path):
    """The network sees 1 mm; scores and masks are those of the files' grid, 2.5 mm along the third axis."""
    source = volumes(tmp_path)
    config = Config(
        data=str(source), network="vnet", width=2, method="dtml", epochs=1, batch_size=1, epoch_batches=2,
        patch=(32, 32, 16), spacing=(1.0, 1.0, 1.0), device="cpu", out=str(tmp_path / "run"), test_on="last",
        lr=0.01,
    )  # fmt: skip
    result = train(config)
    assert config_of(json.loads((tmp_path / "run" / "config.json").read_text())["config"]).spacing == (
        1,
        1,
        1,
    )
    method, spec = load_model(read_checkpoint(tmp_path / "run" / "last.pt"), torch.device("cpu"))
    assert spec.spacing == (1.0, 1.0, 1.0)
    with torch.no_grad():  # a network that says something on these few steps
        for p in method.network.out_conv.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    todo = P.jobs([tmp_path / "c5.nii.gz"], tmp_path / "masks", 1)
    P.check(todo, spec)
    P.predict(method, spec, todo, torch.device("cpu"))
    mask = nibabel.load(tmp_path / "masks" / "c5.nii.gz")
    assert mask.shape == (24, 24, 8)
    np.testing.assert_allclose(mask.affine, oblique_affine((1.0, 1.0, 2.5)), atol=1e-5)
    data = D.open_data(source)
    (score,) = E.evaluate(method, data.test, D.Store(spacing=spec.spacing), spec.patch, torch.device("cpu"))
    own = D.load(data.test[0])
    assert own.target.shape == (24, 24, 8)
    expected = E.score("c5", np.asarray(mask.dataobj), own.target, own.spacing)[0]
    assert score == expected
    assert result.config.spacing == (1.0, 1.0, 1.0)


def test_one_list_of_labelled_and_unlabelled_volumes_feeds_the_batches(tmp_path):
    data = D.open_data(volumes(tmp_path))
    assert {c.id for c in data.unlabelled} <= {"c3", "c4"} and data.unlabelled
    training = D.TrainingSet(
        data.training, D.Store(spacing=(1, 1, 1)), (16, 16, 16), unlabelled=data.unlabelled, items=6
    )
    items = [training[number] for number in training.order(0)]
    assert all(item["unlabelled"].shape == (1, 16, 16, 16) for item in items)
    assert any(item["label"].any() for item in items)  # patches around the object
    assert not any(item["label"].eq(D.MISSING).any() for item in items)


# ---- turns ----------------------------------------------------------------------------------------


def moved(shape, spacing, count=300):
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    seen = {}
    for seed in range(count):
        a, b = D._turn(image, image.astype(np.int64), spacing, np.random.default_rng(seed))
        assert a.shape == image.shape and np.array_equal(a, b)
        seen[a.tobytes()] = a
    return seen.values()


@pytest.mark.parametrize(
    ("shape", "spacing", "count"),
    [
        ((3, 3), (1, 1), 8),  # the symmetries of a square
        ((3, 3), (1, 2), 4),  # flips alone
        ((3, 3, 3), (1, 1, 1), 48),  # of a cube
        ((3, 3, 3), (1, 1, 2.5), 16),
        ((3, 3, 3), (2.5, 1, 1.005), 16),
        ((3, 3, 2), (1, 1, 1), 16),
        ((2, 3, 3), (1, 1, 1), 16),
        ((2, 3, 4), (1, 1, 1), 8),
    ],
)
def test_turns_only_in_planes_of_equal_sides_and_spacing(shape, spacing, count):
    assert len(moved(shape, spacing, 1500 if count == 48 else 300)) == count


# ---- distances ------------------------------------------------------------------------------------


def test_distances_in_millimetres_and_in_voxels_against_medpy():
    binary = pytest.importorskip("medpy.metric.binary")
    p, t = (blob((30, 30, 12), seed)[1] for seed in (1, 2))
    (score,) = E.score("a", p, t, (0.5, 0.5, 2.0))
    assert score.asd == pytest.approx(binary.asd(p, t, voxelspacing=(0.5, 0.5, 2.0)), rel=0.05)
    assert score.asd_voxels == pytest.approx(binary.asd(p, t), rel=0.05)
    (cubes,) = E.score("a", p, t, (2.0, 2.0, 2.0))
    assert cubes.hd95 == pytest.approx(2 * cubes.hd95_voxels) and cubes.asd == pytest.approx(
        2 * cubes.asd_voxels
    )
    assert (score.hd95_voxels, score.asd_voxels) == (cubes.hd95_voxels, cubes.asd_voxels)
    summary = E.summarize([score, cubes])
    assert summary.asd == pytest.approx((score.asd + cubes.asd) / 2)
    assert summary.hd95_voxels == pytest.approx(score.hd95_voxels)
    assert "mm, ASD" in summary.sentence("mm")
    (empty,) = E.score("a", 0 * p, t, (1, 1, 1))
    assert (empty.asd, empty.hd95_voxels, empty.asd_voxels) == (np.inf, np.inf, np.inf)
    assert E.Score._fields == E.COLUMNS
