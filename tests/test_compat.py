"""The drop-ins give their peers' own answers, errors and edge cases."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisyseg_fast.compat import medpy, scipy

# ---- scipy ----------------------------------------------------------------------------------------

peer = pytest.importorskip("scipy.ndimage").distance_transform_edt


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scipy_distances_and_indices(data):
    rank = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.integers(1, 9)) for _ in range(rank))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    share = data.draw(st.sampled_from([0, 0.1, 0.5, 0.9, 1]))
    dtype = data.draw(st.sampled_from([bool, np.uint8, np.int8, np.int16, np.float32, np.float64, ">i4"]))
    x = (generator.random(shape) < share).astype(dtype)
    sampling = data.draw(st.sampled_from([None, 2.5, tuple(generator.uniform(0.5, 3, rank))]))
    if data.draw(st.booleans()):
        x = x.T
        sampling = sampling[::-1] if isinstance(sampling, tuple) else sampling
    expected, where = peer(x, sampling, return_indices=True)
    got, index = scipy.distance_transform_edt(x, sampling, return_indices=True)
    assert got.dtype == expected.dtype and index.dtype == where.dtype and index.shape == where.shape
    np.testing.assert_allclose(got, expected, rtol=1e-13)
    steps = np.broadcast_to(1.0 if sampling is None else sampling, rank)
    offset = (index - np.indices(x.shape)) * steps.reshape(-1, *[1] * rank)
    np.testing.assert_allclose(np.sqrt((offset**2).sum(0)), expected, rtol=1e-13)
    if x.all():
        np.testing.assert_array_equal(index, where)
    else:
        assert not x[tuple(index)].any()


@pytest.mark.parametrize(
    "x", [[0, 1, 1, 0, 1], [[1, 1], [1, 0]], 1, 0, np.float64(2), np.array([np.nan, 0, 1])]
)
def test_scipy_takes_what_scipy_takes(x):
    np.testing.assert_array_equal(scipy.distance_transform_edt(x), peer(x))


def test_scipy_fills_the_callers_arrays():
    x = np.random.default_rng(0).random((6, 7)) < 0.7
    distances, indices = np.empty((6, 7)), np.empty((2, 6, 7), np.int32)
    assert scipy.distance_transform_edt(x, distances=distances) is None
    np.testing.assert_array_equal(distances, peer(x))
    got = scipy.distance_transform_edt(x, return_indices=True, indices=indices)
    np.testing.assert_array_equal(got, distances)
    assert not x[tuple(indices)].any()
    both = {"return_indices": True, "distances": distances, "indices": indices}
    assert scipy.distance_transform_edt(x, **both) is None
    only = scipy.distance_transform_edt(x, return_distances=False, return_indices=True)
    np.testing.assert_array_equal(only, indices)


@pytest.mark.parametrize(
    "options",
    [
        {"return_distances": False},
        {"return_distances": False, "return_indices": True, "distances": np.empty((3, 3))},
        {"indices": np.empty((2, 3, 3), np.int32)},
        {"distances": np.empty((3, 4))},
        {"distances": np.empty((3, 3), np.float32)},
        {"return_indices": True, "indices": np.empty((3, 3), np.int32)},
        {"return_indices": True, "indices": np.empty((2, 3, 3), np.int64)},
        {"return_distances": False, "distances": np.empty((3, 3))},
    ],
)
def test_scipy_errors(options):
    x = np.eye(3)
    with pytest.raises(RuntimeError) as theirs:
        peer(x, **options)
    with pytest.raises(RuntimeError) as ours:
        scipy.distance_transform_edt(x, **options)
    assert str(ours.value) == str(theirs.value)


def test_scipy_limits():
    with pytest.raises(ValueError, match="input must have 1 to 3 axes, got shape"):
        scipy.distance_transform_edt(np.ones((2, 2, 2, 2)))
    assert scipy.distance_transform_edt(np.eye(3), float64_distances=False).dtype == np.float32


def test_scipy_torch_arrays():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).random((6, 7)) < 0.7
    got = scipy.distance_transform_edt(torch.from_numpy(x))
    assert got.dtype == torch.float64
    np.testing.assert_array_equal(got.numpy(), peer(x))
    full = scipy.distance_transform_edt(torch.ones(3, 2), 2.0)
    np.testing.assert_array_equal(full.numpy(), peer(np.ones((3, 2)), 2.0))


# ---- MedPy ----------------------------------------------------------------------------------------

SURFACE = ("hd", "hd95", "assd", "asd")
COUNTS = ("dc", "jc", "precision", "recall", "sensitivity", "specificity", "ravd")
COUNTS += ("true_negative_rate", "true_positive_rate", "positive_predictive_value")


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_medpy_answers(data):
    binary = pytest.importorskip("medpy.metric.binary")
    rank = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.integers(1, 10)) for _ in range(rank))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    kinds = st.sampled_from([bool, np.uint8, np.int16, np.float32, np.int64])
    pair = [
        (generator.random(shape) < data.draw(st.sampled_from([0, 0.2, 0.7, 1]))).astype(data.draw(kinds))
        for _ in range(2)
    ]
    spacing = data.draw(st.sampled_from([None, 0.7, tuple(generator.uniform(0.5, 3, rank))]))
    arguments = {"voxelspacing": spacing, "connectivity": data.draw(st.sampled_from([1, rank]))}
    for names, options in ((SURFACE, arguments), (COUNTS, {})):
        for name in names:
            try:
                expected = getattr(binary, name)(*pair, **options)
            except RuntimeError as error:
                with pytest.raises(RuntimeError, match=re.escape(str(error))):
                    getattr(medpy, name)(*pair, **options)
            else:
                if np.isnan(expected):  # MedPy waits for a ZeroDivisionError, which NumPy 2 does not raise
                    expected = 1.0 if name in ("dc", "jc") else 0.0
                assert getattr(medpy, name)(*pair, **options) == pytest.approx(expected, rel=1e-9), name


def test_medpy_counts_in_any_number_of_axes():
    binary = pytest.importorskip("medpy.metric.binary")
    a, b = np.random.default_rng(0).random((2, 2, 3, 4, 5)) < 0.5
    assert medpy.dc(a, b) == binary.dc(a, b)
    with pytest.raises(ValueError, match="result must have 1 to 3 axes"):
        medpy.hd(a, b)
    with pytest.raises(ValueError, match="connectivity must be 1 or 3, the number of axes, got 2"):
        medpy.hd(a[0], b[0], connectivity=2)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_medpy_counts_of_small_and_large_masks_are_the_same(dtype, monkeypatch):
    """NumPy counts small masks, the kernel large ones."""
    a, b = ((np.random.default_rng(seed).random((7, 8, 9)) < 0.4).astype(dtype) for seed in (0, 1))
    names = ("dc", "jc", "precision", "sensitivity", "specificity", "ravd")
    small = [getattr(medpy, name)(a, b) for name in names]
    monkeypatch.setattr(medpy, "_SMALL", 0)
    monkeypatch.setattr(np, "count_nonzero", None)
    assert [getattr(medpy, name)(a, b) for name in names] == small
    for empty in (a * 0, b * 0):
        with pytest.raises(RuntimeError, match="second supplied"):
            medpy.ravd(a, empty.astype(dtype))
