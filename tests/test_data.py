import json
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("nibabel")
torch = pytest.importorskip("torch")

from folders import SPACING, blob, nifti_folder, oblique_affine, png_folder, save_nifti  # noqa: E402
from PIL import Image  # noqa: E402

from noisyseg_fast import noise  # noqa: E402
from noisyseg_fast.training import data as D  # noqa: E402


def error(message):
    return pytest.raises(D.DataError, match=re.escape(message))


# ---- noise ----------------------------------------------------------------------------------------


def brute_dilate(mask, radius):
    points = np.argwhere(mask)
    grid = np.stack(np.meshgrid(*map(np.arange, mask.shape), indexing="ij"), -1)
    if not len(points):
        return np.zeros_like(mask)
    squared = ((grid[..., None, :] - points) ** 2).sum(-1).min(-1)
    return (squared <= radius**2).astype(mask.dtype)


@pytest.mark.parametrize("radius", [0, 1, 2.5, 6])
@pytest.mark.parametrize("shape", [(24, 17), (8, 9, 7)])
def test_dilate_is_a_euclidean_disk(radius, shape):
    mask = (np.random.default_rng(1).random(shape) < 0.02).astype(np.uint8)
    before = mask.copy()
    grown = noise.dilate(mask, radius)
    assert grown.dtype == np.uint8
    assert np.array_equal(grown, brute_dilate(mask, radius))
    assert np.array_equal(mask, before)


def test_dilate_batch_of_torch_with_own_radii_and_an_empty_mask():
    mask = torch.zeros(3, 16, 16, dtype=torch.uint8)
    mask[0, 8, 8] = mask[1, 3, 4] = 1
    grown = noise.dilate(mask, [2, 0, 4], spatial_dims=2)
    assert isinstance(grown, torch.Tensor)
    assert grown.dtype == torch.uint8
    assert grown[0].sum() == 13
    assert torch.equal(grown[1], mask[1])
    assert not grown[2].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: noise.dilate(m, -1), "radius must be finite and not negative, got -1"),
        (lambda m: noise.dilate(m, 1, spatial_dims=3), "spatial_dims must be 1 to 2"),
        (lambda m: noise.dilate(m, [1, 2], spatial_dims=1), "radius has 2 values for a mask of shape (4, 4)"),
        (lambda m: noise.corrupt(m, 1.5, seed=0), "noise rate must be between 0 and 1, got 1.5"),
        (lambda m: noise.corrupt(m, 0.5, -1, seed=0), "max_radius must not be negative, got -1"),
        (lambda m: noise.corrupt(m[:0], 0.5, seed=0), "masks must hold at least one mask, got shape (0, 4)"),
    ],
)
def test_noise_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(np.zeros((4, 4), np.uint8))


def test_corrupt_is_seeded_and_hits_the_share():
    masks = np.zeros((200, 32, 32), np.uint8)
    masks[:, 14:18, 14:18] = 1
    noisy, radii = noise.corrupt(masks, 0.4, seed=3)
    again, _ = noise.corrupt(masks, 0.4, seed=3)
    other, _ = noise.corrupt(masks, 0.4, seed=4)
    assert np.array_equal(noisy, again)
    assert not np.array_equal(noisy, other)
    assert set(radii) == set(range(7))  # 0 and 6 included
    assert np.array_equal((noisy != masks).any((1, 2)), radii > 0)
    assert 0.25 < (radii > 0).mean() < 0.4  # 40 % drawn, one in seven of them by 0 pixels
    assert (noisy >= masks).all()


def test_more_noise_only_adds_cases():
    low, high = (noise.corruption_radii(100, rate, 6, seed=5) for rate in (0.4, 0.8))
    assert np.array_equal(high[low > 0], low[low > 0])


def test_dilate_labels_grows_over_background_only():
    labels = np.zeros((9, 9), np.uint8)
    labels[4, 2], labels[4, 6] = 1, 2
    grown = noise.dilate_labels(labels, 2)
    assert grown[4, 4] == 1  # contested: the smaller label
    assert grown[4, 5] == 2
    assert (grown == 1).sum() == 13
    assert (grown == 2).sum() == 12


# ---- consensus and split --------------------------------------------------------------------------


def test_consensus_ties_are_foreground():
    raters = np.array([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 0, 1]])[:, None]
    assert D.consensus(raters).tolist() == [[0, 0, 1, 1, 1]]
    assert D.consensus(raters).dtype == np.uint8


def test_consensus_of_classes_is_the_most_frequent_label():
    raters = np.array([[0, 1, 2], [0, 1, 1], [2, 0, 0]])[:, None]
    assert D.consensus(raters, 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_split_by_patient(seed):
    data = D.open_data("sample", seed=seed)
    parts = [data.training, data.validation, data.test]
    patients = [{case.patient for case in part} for part in parts]
    assert sum(map(len, parts)) == 514
    assert sum(map(len, patients)) == len(set.union(*patients)) == 335
    assert len(patients[1]) == round(0.1 * 335)
    assert len(patients[2]) == 67
    assert D.open_data("sample", seed=seed).split("test")[0].id == data.test[0].id


def test_too_few_patients(tmp_path):
    folder = nifti_folder(tmp_path / "set", cases=2)
    with error("2 patient(s) in training, at least 3 are needed"):
        D.open_data(folder)


def test_shares():
    with pytest.raises(ValueError, match="validation must be a share between 0 and 1, got 0"):
        D.open_data("sample", validation=0)
    with pytest.raises(ValueError, match="must leave some training data"):
        D.open_data("sample", validation=0.5, test=0.5)


# ---- folders and datalists ------------------------------------------------------------------------


def test_nifti_folder(tmp_path):
    data = D.open_data(nifti_folder(tmp_path / "set", shape=(20, 24, 8), raters=3))
    case = next(c for c in data.split("all") if c.id == "case0")
    loaded = D.load(case)
    _, mask = blob((20, 24, 8), 0)
    raters = np.stack([np.roll(mask, r, axis=0) for r in range(3)])
    assert loaded.image.shape == (1, 20, 24, 8)
    assert abs(float(loaded.image.mean())) < 1e-5
    assert abs(float(loaded.image.std()) - 1) < 1e-5
    assert np.array_equal(loaded.target, raters.sum(0) >= 2)
    assert loaded.spacing == pytest.approx(SPACING)
    assert data.unit == "mm"


def test_two_dimensional_nifti_stored_as_one_slice(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", np.ones((5, 6, 1), np.float32))
    raw = D.read(tmp_path / "a.nii.gz")
    assert raw.array.shape == (5, 6)
    assert raw.spacing == pytest.approx(SPACING[:2])


def test_png_folder(tmp_path):
    data = D.open_data(png_folder(tmp_path / "set"))
    loaded = D.load(data.training[0])
    assert loaded.image.shape == (1, 32, 32)
    assert set(np.unique(loaded.target)) == {0, 1}
    assert loaded.spacing == (1.0, 1.0)
    assert data.unit == "px"


def test_patients_csv_channels_and_classes(tmp_path):
    root = tmp_path / "set"
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for i in range(6):
        image, mask = blob((16, 16), i)
        for channel in range(2):
            save_nifti(root / "imagesTr" / f"c{i}_000{channel}.nii.gz", image + channel)
        save_nifti(root / "labelsTr" / f"c{i}.nii.gz", mask * 2)
    (root / "patients.csv").write_text("case,patient\n" + "".join(f"c{i},p{i // 2}\n" for i in range(6)))
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "b": 2}}))
    data = D.open_data(root, validation=0.3, test=0.3)
    assert [len(data.split(name)) for name in ("training", "validation", "test")] == [2, 2, 2]
    assert data.classes == 3
    store = D.Store(data.classes)
    assert D.check(data, store) == (2, [(16, 16)])
    assert store.get(data.test[0]).target.max() == 2


def test_own_test_set(tmp_path):
    root = nifti_folder(tmp_path / "set")
    for kind in ("images", "labels"):
        (root / f"{kind}Ts").mkdir()
        for path in sorted((root / f"{kind}Tr").glob("case5*")):
            path.rename(root / f"{kind}Ts" / path.name)
    data = D.open_data(root)
    assert [c.id for c in data.test] == ["case5"]
    assert len(data.training) == 4
    assert len(data.validation) == 1


def datalist(root, **more):
    nifti_folder(root)
    entries = [
        {
            "image": f"imagesTr/case{i}_0000.nii.gz",
            "label": [f"labelsTr/case{i}_rater0.nii.gz", f"labelsTr/case{i}_rater1.nii.gz"],
            "patient": f"p{i}",
        }
        for i in range(6)
    ]
    content = {"training": entries[:4], "validation": entries[4:5], "test": entries[5:], **more}
    (root / "list.json").write_text(json.dumps(content))
    return root / "list.json"


def test_datalist(tmp_path):
    data = D.open_data(datalist(tmp_path))
    assert [c.id for c in data.training] == [f"case{i}" for i in range(4)]
    assert [c.patient for c in data.test] == ["p5"]
    assert D.load(data.test[0]).image.shape == (1, 32, 32)


def test_unlabelled_test_images_of_the_decathlon_are_passed_over(tmp_path):
    data = D.open_data(datalist(tmp_path, test=["./imagesTs/x.nii.gz", {"image": "y.nii.gz"}]))
    assert len(data.training) + len(data.test) == 4


def test_numbered_cases_are_not_channels(tmp_path):
    root = png_folder(tmp_path / "set", cases=3)
    for kind in ("imagesTr", "labelsTr"):
        for i in range(3):
            (root / kind / f"case{i}.png").rename(root / kind / f"scan_{i:04d}.png")
    data = D.open_data(root)
    assert sorted(c.id for c in data.split("all")) == ["scan_0000", "scan_0001", "scan_0002"]


# ---- bad data -------------------------------------------------------------------------------------


def test_missing_source(tmp_path):
    with error(f'{tmp_path / "none"}: no such data; pass "sample", a folder, a datalist .json or an .npz'):
        D.open_data(tmp_path / "none")


def test_empty_folder(tmp_path):
    with error(f"{tmp_path}: has no folder imagesTr"):
        D.open_data(tmp_path)
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    with error(f"{tmp_path / 'imagesTr'}: holds no images (.nii.gz, .nii, .png)"):
        D.open_data(tmp_path)


def test_image_without_label_and_label_without_image(tmp_path):
    root = nifti_folder(tmp_path / "set", raters=1)
    label = root / "labelsTr" / "case3.nii.gz"
    label.rename(root / "labelsTr" / "other.nii.gz")
    with error(f"has no label case3 in {root / 'labelsTr'}"):
        D.open_data(root)
    (root / "imagesTr" / "case3_0000.nii.gz").unlink()
    with error(f"{root / 'labelsTr' / 'other.nii.gz'}: has no image other in"):
        D.open_data(root)


def one_case(root, image=None, mask=None, mask_affine=None):
    """A case of one NIfTI image and one mask."""
    plain, inside = blob((16, 16), 0)
    save_nifti(root / "image.nii.gz", plain if image is None else image)
    save_nifti(root / "mask.nii.gz", inside if mask is None else mask, mask_affine)
    return D.Case("a", "a", (root / "image.nii.gz",), (root / "mask.nii.gz",))


def test_mask_of_another_shape(tmp_path):
    case = one_case(tmp_path, mask=np.zeros((16, 15), np.uint8))
    with error(f"mask.nii.gz: shape (16, 15) differs from (16, 16) of its image {tmp_path / 'image.nii.gz'}"):
        D.load(case)


def test_mask_with_another_affine(tmp_path):
    case = one_case(tmp_path, mask_affine=np.diag([2.0, 2.0, 3.0, 1.0]))
    with error("mask.nii.gz: affine [2 0 0 0; 0 2 0 0; 0 0 3 0] differs from [0.6578 -0.1961 -0.4904 -91.5;"):
        D.load(case)


def test_intensities_not_finite(tmp_path):
    image, _ = blob((16, 16), 0)
    image[3, 4], image[5, 6] = np.nan, np.inf
    with error(f"{tmp_path / 'image.nii.gz'}: 2 of 256 intensities are not finite"):
        D.load(one_case(tmp_path, image=image))


def test_labels_out_of_range_and_fractional(tmp_path):
    _, mask = blob((16, 16), 0)
    with error("mask.nii.gz: label 3 is out of range 0..1"):
        D.load(one_case(tmp_path, mask=mask * 3))
    with error("mask.nii.gz: label -1 is out of range 0..1"):
        D.load(one_case(tmp_path, mask=mask.astype(np.int16) * -1))
    with error("mask.nii.gz: labels must be whole numbers"):
        D.load(one_case(tmp_path, mask=mask * np.float32(0.5)))


def test_unreadable_files(tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"nonsense")
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    (tmp_path / "bad.mha").write_bytes(b"nonsense")
    with error(f"{tmp_path / 'bad.nii.gz'}: cannot be read as NIfTI"):
        D.read(tmp_path / "bad.nii.gz")
    with error(f"{tmp_path / 'bad.png'}: cannot be read as PNG"):
        D.read(tmp_path / "bad.png")
    with error(f"{tmp_path / 'bad.mha'}: unknown kind of file; use .nii.gz, .nii, .png"):
        D.read(tmp_path / "bad.mha")
    with error(f"{tmp_path / 'none.png'}: no such file"):
        D.read(tmp_path / "none.png")
    save_nifti(tmp_path / "cut.nii.gz", np.random.default_rng(0).random((30, 30)).astype(np.float32))
    whole = (tmp_path / "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    with error(f"{tmp_path / 'cut.nii.gz'}: cannot be read as NIfTI"):
        D.read(tmp_path / "cut.nii.gz")
    Image.new("RGBA", (8, 8)).save(tmp_path / "rgba.png")
    with error(f"{tmp_path / 'rgba.png'}: PNG of mode RGBA; use grey (8 or 16 bit) or RGB"):
        D.read(tmp_path / "rgba.png")
    save_nifti(tmp_path / "four.nii.gz", np.zeros((4, 4, 4, 2), np.float32))
    with error(f"{tmp_path / 'four.nii.gz'}: has shape (4, 4, 4, 2); a 2D image or a 3D volume is needed"):
        D.read(tmp_path / "four.nii.gz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", 'needs a list "training"'),
        ('{"training": []}', "has no training cases"),
        ('{"training": [3]}', "training[0] must be an object with image and label"),
        ('{"training": [{"image": "a.png"}]}', "has no training cases"),
        (
            '{"training": [{"image": "a.png", "label": []}]}',
            'training[0]: "label" must be a file name or a list of them',
        ),
        (
            '{"training": [], "validation": [{"image": "a.png"}]}',
            'validation[0]: "label" must be a file name or a list of them',
        ),
        (
            '{"training": [{"image": "a.png", "label": "b.png", "spacing": [0, 1]}]}',
            '"spacing" must be a list of positive numbers, got [0, 1]',
        ),
        (
            '{"training": [{"image": "a.png", "label": "b.png"}, {"image": "x/a.png", "label": "b.png"}]}',
            'two entries have the id a; give them an "id"',
        ),
        ('{"training": [], "labels": {"a": 1}}', 'the values of "labels" must be 0, 1, 2, ..., got [1]'),
    ],
)
def test_bad_datalists(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with error(message):
        D.open_data(tmp_path / "list.json")


def test_patient_on_two_sides(tmp_path):
    path = datalist(tmp_path)
    content = json.loads(path.read_text())
    content["test"][0]["patient"] = "p0"
    path.write_text(json.dumps(content))
    with error("patient p0 is in both training and test"):
        D.open_data(path)


def test_mixed_dimensions(tmp_path):
    root = nifti_folder(tmp_path / "set", raters=1)
    image, mask = blob((16, 16, 8), 0)
    save_nifti(root / "imagesTr" / "case0_0000.nii.gz", image)
    save_nifti(root / "labelsTr" / "case0.nii.gz", mask)
    with error("all must agree"):
        D.check(D.open_data(root), D.Store())


# ---- patches --------------------------------------------------------------------------------------


def test_patch_size():
    assert D.patch_size(D.Shape(1, [(64, 64)]), 16) == (64, 64)
    assert D.patch_size(D.Shape(1, [(64, 64), (70, 300)]), 16) == (80, 256)
    assert D.patch_size(D.Shape(1, [(128, 128, 10)]), 16) == (64, 64, 16)
    assert D.patch_size(D.Shape(1, [(64, 64)]), 16, (32, 48)) == (32, 48)
    with pytest.raises(
        ValueError, match=re.escape("patch must be 2 multiples of 16 (the network's), got (30, 32)")
    ):
        D.patch_size(D.Shape(1, [(64, 64)]), 16, (30, 32))
    with pytest.raises(ValueError, match="too small"):
        D.patch_size(D.Shape(1, [(12, 12)]), 16)


def test_training_set_depends_on_seed_epoch_and_case_only():
    data = D.open_data("sample")
    data = replace(data, training=data.training[:20])
    sets = [D.TrainingSet(data.training, D.Store(), (64, 64), noise_rate=0.5, seed=1) for _ in range(2)]
    for index in (3, 0, 7):
        a, b = sets[0][index], sets[1][index]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])
    epochs = [_at(sets[0], epoch)[3]["image"] for epoch in range(4)]
    assert any(not torch.equal(epochs[0], image) for image in epochs[1:])
    assert sets[0].order(0) != sets[0].order(1)
    assert sorted(sets[0].order(0)) == list(range(20))


def _at(training, epoch):
    training.epoch = epoch
    return training


def test_image_and_label_move_together(tmp_path):
    root = nifti_folder(tmp_path / "set", shape=(40, 36, 20), raters=1)
    data = D.open_data(root)
    training = D.TrainingSet(data.training, D.Store(), (32, 32, 16))
    for epoch in range(3):
        item = _at(training, epoch)[epoch % len(training)]
        assert item["image"].shape == (1, 32, 32, 16)
        assert item["label"].shape == (32, 32, 16)
        assert item["label"].dtype == torch.uint8
        inside = item["label"] > 0
        if inside.any() and not inside.all():
            assert item["image"][0][inside].mean() > item["image"][0][~inside].mean() + 1


def test_store_forgets_beyond_its_limit():
    case = D.open_data("sample").training[0]
    store = D.Store(limit=10)
    assert store.get(case) is not store.get(case)
    assert D.Store().limit > 1e9
    kept = D.Store()
    assert kept.get(case) is kept.get(case)


def test_oblique_affine_helper_has_the_spacing():
    assert np.allclose(np.linalg.norm(oblique_affine()[:3, :3], axis=0), SPACING)
