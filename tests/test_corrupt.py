"""`noisyseg corrupt` and the MONAI transforms of label noise."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for _needed in ("monai", "nibabel", "typer", "rich", "matplotlib"):
    pytest.importorskip(_needed)

import nibabel  # noqa: E402
from folders import blob, oblique_affine, save_nifti  # noqa: E402
from monai.data import MetaTensor  # noqa: E402
from monai.transforms import Compose  # noqa: E402
from PIL import Image  # noqa: E402
from test_cli import fails, works  # noqa: E402

from noisyseg_fast import noise  # noqa: E402
from noisyseg_fast.compat import monai_noise  # noqa: E402


@pytest.fixture
def volumes(tmp_path):
    """Masks of different sizes and types with an oblique affine."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for i, (shape, dtype) in enumerate(
        [((24, 20, 9), np.uint8), ((30, 22, 7), np.int16), ((20, 20, 8), np.float32)]
    ):
        save_nifti(folder / f"case{i}.nii.gz", blob(shape, i)[1].astype(dtype))
    return folder


def array(path):
    return np.asarray(nibabel.load(path).dataobj)


def test_corrupt_keeps_geometry_and_records(volumes, tmp_path):
    out = tmp_path / "noisy"
    result = works("corrupt", volumes, "--out", out, "--noise", "dilate", "--set", "radius=2", "--seed", 5)
    assert sorted(p.name for p in out.iterdir()) == [
        "case0.nii.gz",
        "case1.nii.gz",
        "case2.nii.gz",
        "contact_sheet.png",
        "noise.json",
    ]
    record = json.loads((out / "noise.json").read_text())
    assert record["seed"] == 5 and record["noises"] == [
        {"name": "dilate", "options": {"radius": 2}, "probability": 1.0}
    ]
    for i, row in enumerate(record["files"]):
        before, after = nibabel.load(volumes / row["file"]), nibabel.load(out / row["file"])
        assert (
            np.array_equal(after.affine, before.affine) and after.get_data_dtype() == before.get_data_dtype()
        )
        assert after.header["qform_code"] == before.header["qform_code"] and i == int(row["file"][4])
        clean = array(volumes / row["file"]).astype(np.uint8)
        assert np.array_equal(array(out / row["file"]), noise.dilate(clean, 2))
        assert row["dice"] == pytest.approx(
            noise.dice_of(array(out / row["file"]).astype(int)[None], clean[None], spatial_dims=3)[0]
        )
    assert record["mean_dice"] == pytest.approx(np.mean([r["dice"] for r in record["files"]]))
    assert f"{record['mean_dice']:.4f}" in result.output
    assert Image.open(out / "contact_sheet.png").size[0] > 200


def test_corrupt_in_mm(volumes, tmp_path):
    works("corrupt", volumes, "--out", tmp_path / "mm", "--noise", "erode", "--set", "radius=2", "--mm")
    spacing = nibabel.load(volumes / "case0.nii.gz").header.get_zooms()
    clean = array(volumes / "case0.nii.gz")
    expected = noise.erode(clean, 2, [float(s) for s in spacing])
    assert np.array_equal(array(tmp_path / "mm" / "case0.nii.gz"), expected)
    assert not np.array_equal(expected, noise.erode(clean, 2))


def test_corrupt_is_seeded_by_file_and_hits_the_dice(tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for i in range(30):
        Image.fromarray(blob((40 + i % 3, 40), i)[1] * np.uint8(255)).save(folder / f"m{i:02d}.png")
    arguments = ("--noise", "erode_or_dilate", "--noise", "flip_square", "--target-dice", 0.8)
    works("corrupt", folder, "--out", tmp_path / "a", *arguments)
    works("corrupt", folder, "--out", tmp_path / "b", *arguments)
    record = json.loads((tmp_path / "a" / "noise.json").read_text())
    assert abs(record["mean_dice"] - 0.8) < 0.05  # each noise alone hits it on all files
    assert all(
        abs(n["calibration"]["dice"] - 0.8) < 0.01 and n["probability"] == 0.5 for n in record["noises"]
    )
    for path in sorted(folder.iterdir()):
        assert (tmp_path / "a" / path.name).read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert set(np.unique(np.asarray(Image.open(tmp_path / "a" / path.name)))) <= {0, 255}
    (folder / "m00.png").unlink()
    fixed = ("--noise", "flip_square", "--set", "size=9", "--seed", 3)
    works("corrupt", folder, "--out", tmp_path / "c", *fixed)
    (folder / "m01.png").unlink()
    works("corrupt", folder, "--out", tmp_path / "d", *fixed)
    for path in folder.iterdir():  # files that come and go change no other
        assert (tmp_path / "c" / path.name).read_bytes() == (tmp_path / "d" / path.name).read_bytes()


def test_corrupt_label_maps_and_empty_masks(tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    labels = np.zeros((20, 30), np.uint8)
    labels[3:9, 3:9], labels[10:18, 14:26] = 1, 2
    Image.fromarray(labels).save(folder / "a.png")
    Image.fromarray(0 * labels).save(folder / "b.png")
    works("corrupt", folder, "--out", tmp_path / "out", "--noise", "dilate=1", "--set", "dilate.radius=1.5")
    got = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert np.array_equal(got, noise.each_label(noise.Noise("dilate", radius=1.5), labels))
    assert not np.asarray(Image.open(tmp_path / "out" / "b.png")).any()
    record = json.loads((tmp_path / "out" / "noise.json").read_text())
    assert record["files"][1]["dice"] is None and record["mean_dice"] == record["files"][0]["dice"]


def test_corrupt_errors(volumes, tmp_path):
    out, full = tmp_path / "out", tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("")

    def check(message, *arguments, masks=volumes, out=out):
        fails("corrupt", masks, "--out", out, *arguments, message=message)
        assert not (tmp_path / "out").exists()

    check(f"{full}: exists and is not an empty folder; choose another --out", "--noise", "shift", out=full)
    check(f"{tmp_path / 'no'}: no such folder of masks", "--noise", "shift", masks=tmp_path / "no")
    check(f"{full}: holds no masks (.nii.gz, .nii, .png)", "--noise", "shift", masks=full)
    check("dilate has no option 'size'; it takes radius, spacing", "--noise", "dilate", "--set", "size=3")
    check("dilate needs its radius: --set radius=..., or --target-dice", "--noise", "dilate")
    check("radius must be finite and not negative, got -1", "--noise", "dilate", "--set", "radius=-1")
    check("--noise must be like dilate or dilate=0.5, got 'dilate=x'", "--noise", "dilate=x")
    check("--noise: give every noise a probability or none", "--noise", "dilate=0.5", "--noise", "erode")
    check("--noise: each operator can be given once", "--noise", "erode", "--noise", "erode")
    check(
        "--noise: probabilities must not be negative and sum up to at most 1, got [0.7, 0.7]",
        "--noise",
        "dilate=0.7",
        "--noise",
        "erode=0.7",
    )
    check(
        "--set radius: in a mixture say whose, as dilate.radius=3",
        "--noise",
        "dilate",
        "--noise",
        "erode",
        "--set",
        "radius=3",
    )
    check(
        "--set shift.offset: shift is not among the noises dilate",
        "--noise",
        "dilate",
        "--set",
        "shift.offset=3",
    )
    check("--mm needs one of dilate, erode, erode_or_dilate", "--noise", "shift", "--set", "offset=1", "--mm")
    check(
        "--mm and --target-dice cannot be combined: magnitudes are found in pixels",
        "--noise",
        "dilate",
        "--mm",
        "--target-dice",
        0.8,
    )
    check("target_dice must be between 0 and 1, got 1.5", "--noise", "dilate", "--target-dice", 1.5)
    save_nifti(volumes / "odd.nii.gz", np.full((4, 4, 4), 0.5, np.float32))
    check(
        f"{volumes / 'odd.nii.gz'}: labels must be whole numbers, found 0.5",
        "--noise",
        "shift",
        "--set",
        "offset=1",
    )


# ---- MONAI ------------------------------------------------------------------------------------------


def test_every_operator_has_a_transform():
    names = {t.__name__: t for t in vars(monai_noise).values() if isinstance(t, type)}
    mask = blob((24, 24), 0)[1][None]
    operators = set()
    for name, options in {
        "RandDilated": {"radius": 2},
        "RandEroded": {"radius": 2},
        "RandErodeOrDilated": {"radius": (1, 3)},
        "RandElasticDeformd": {"sigma": 3},
        "RandShiftd": {"offset": 3},
        "RandFlipSquared": {"size": 7},
        "RandPolygonized": {"vertices": 3},
        "RandEraseComponentd": {},
        "RandDistortBoundaryd": {"radius": 3, "share": 0.5},
    }.items():
        transform = names[name]("label", **options)
        operators.add(transform.noise.name)
        first = transform.set_random_state(seed=1)({"label": mask, "image": 7})
        again = transform.set_random_state(seed=1)({"label": torch.from_numpy(mask).float(), "image": 7})
        assert (
            isinstance(first["label"], np.ndarray)
            and first["label"].dtype == mask.dtype
            and first["image"] == 7
        )
        assert isinstance(again["label"], torch.Tensor) and again["label"].dtype == torch.float32
        assert np.array_equal(first["label"], again["label"].numpy())
        assert first["label"].shape == mask.shape and not np.array_equal(first["label"], mask)
        assert name[4:-1] in (transform.__doc__ or "").title().replace("_", "")
    assert operators == set(noise.OPERATORS)


def test_transforms_follow_monai():
    mask = MetaTensor(torch.from_numpy(blob((24, 24), 0)[1][None]), affine=torch.from_numpy(oblique_affine()))
    pipeline = Compose([monai_noise.RandFlipSquared(("a", "b"), prob=0.5, size=6)]).set_random_state(seed=0)
    results = [pipeline({"a": mask, "b": mask.clone()}) for _ in range(40)]
    changed = [not torch.equal(r["a"], mask) for r in results]
    assert 8 < sum(changed) < 32
    assert all(torch.equal(r["a"], r["b"]) for r in results)  # all keys alike
    assert isinstance(results[0]["a"], MetaTensor) and torch.equal(results[0]["a"].affine, mask.affine)
    assert len({tuple(r["a"].flatten().tolist()) for r, c in zip(results, changed, strict=True) if c}) > 3
    assert monai_noise.RandFlipSquared("no", allow_missing_keys=True, size=3)({"a": 1}) == {"a": 1}
    labels = torch.zeros(1, 20, 20)
    labels[0, 2:8, 2:8], labels[0, 10:16, 10:16] = 1, 2
    grown = monai_noise.RandDilated("a", radius=1)({"a": labels})["a"]
    assert torch.equal(
        grown, noise.each_label(noise.Noise("dilate", radius=1), labels.long(), spatial_dims=2).float()
    )
    moved = monai_noise.RandShiftd("a", offset=2)({"a": labels})["a"]
    assert set(moved.unique().tolist()) == {0, 1, 2}


def test_mixtures_raters_and_calibrations_as_transforms():
    masks = np.stack([blob((24, 24), i)[1] for i in range(20)])
    mixed = monai_noise.RandNoiseMixtured("a", [noise.Noise("dilate", radius=2), None], [0.5, 0.5])
    mixed.set_random_state(seed=0)
    changed = sum(not np.array_equal(mixed({"a": masks[:1]})["a"], masks[:1]) for _ in range(40))
    assert 8 < changed < 32
    raters = monai_noise.RandRaterBiasd("a", [2, -2])({"a": masks[:1]})["a"]
    assert raters.shape == (2, 24, 24) and raters[0].sum() > masks[0].sum() > raters[1].sum()
    found = noise.calibrate("dilate", masks, 0.8)
    scores = [
        noise.dice_of(monai_noise.RandLabelNoised("a", found)({"a": m[None]})["a"], m[None], spatial_dims=2)
        for m in masks
    ]
    assert abs(np.mean(scores) - 0.8) < 0.1
    with pytest.raises(ValueError, match="options radius need the name of an operator"):
        monai_noise.RandLabelNoised("a", found, radius=3)
    with pytest.raises(ValueError, match="a label of floats must hold whole numbers"):
        monai_noise.RandDilated("a", radius=1)({"a": np.full((1, 4, 4), 0.5)})
    with pytest.raises(ValueError, match="holds more labels than 0 and 2"):
        monai_noise.RandRaterBiasd("a", [1])({"a": np.arange(3)[None].repeat(4, 0)[None]})
