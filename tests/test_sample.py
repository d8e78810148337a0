import importlib.util
from pathlib import Path

import numpy as np
import pytest

from noisyseg_fast import sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data():
    return sample.load()


def test_shapes_and_types(data):
    assert data.image.shape == (514, 64, 64)
    assert data.image.dtype == np.uint8
    assert data.masks.shape == (514, 4, 64, 64)
    assert data.masks.dtype == np.uint8
    assert set(np.unique(data.masks)) == {0, 1}
    assert data.patient.shape == data.nodule.shape == data.pixel_mm.shape == (514,)


def test_content(data):
    assert len(set(data.patient)) == 335
    assert len(set(data.nodule)) == 514
    assert all(n.startswith(p) for n, p in zip(data.nodule, data.patient, strict=True))
    assert (data.pixel_mm > 0.5).all()
    assert (data.pixel_mm < 1).all()
    drawn = (data.masks.sum(1) >= 2).sum((1, 2))
    assert drawn.min() >= 10  # the raters' consensus is empty nowhere


def test_four_raters_differ(data):
    assert (data.masks[:, 0] != data.masks[:, 1]).any((1, 2)).mean() > 0.9


def test_under_4_mb_with_licence():
    assert sample.FILE.stat().st_size < 4e6
    text = (sample.FILE.parent / "LICENSE-LIDC.txt").read_text()
    for needed in ("Creative Commons Attribution 3.0", "10.7937/K9/TCIA.2015.LO9QL9SJ", "Changes made"):
        assert needed in text


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "make_sample.py"
    if not path.is_file():
        pytest.skip("not run from the repository")
    spec = importlib.util.spec_from_file_location("make_sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_writes_the_same_bytes_twice(script, tmp_path):
    generator = np.random.default_rng(0)
    middle = np.array([True, False, True, False, False])
    masks = generator.integers(0, 2, (5, 4, 64, 64), dtype=np.uint8)
    np.savez_compressed(
        tmp_path / "lidc2d_64.npz",
        image=generator.integers(0, 256, (5, 64, 64), dtype=np.uint8),
        mask=masks,
        patient=np.array(["p0", "p0", "p1", "p1", "p1"]),
        nodule=np.array(["p0_n0", "p0_n0", "p1_n0", "p1_n0", "p1_n0"]),
        is_middle=middle,
        pixel_mm=np.full(5, 0.7, np.float32),
    )
    assert script.make(tmp_path, tmp_path / "a.npz") == 2
    script.make(tmp_path, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as made:
        assert np.array_equal(np.unpackbits(made["masks"], axis=-1), masks[middle])


def test_script_rebuilds_the_sample(script, data, tmp_path):
    """Where the source data lie beside the repository."""
    source = ROOT.parent / "shared" / "data" / "lidc2d"
    if not source.is_dir():
        pytest.skip("source data are not here")
    script.make(source, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as made, np.load(sample.FILE) as kept:
        assert made.files == kept.files
        for name in made.files:
            assert np.array_equal(made[name], kept[name]), name
