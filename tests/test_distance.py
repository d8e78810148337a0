"""Distance transforms and signed maps against SciPy and reference.py."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from noisyseg_fast import distance_transform_edt, reference, signed_distance_map
from noisyseg_fast.distance import CONVENTIONS
from scipy import ndimage

SPACING = st.sampled_from([0.3, 0.7, 1.0, 2.5])


@st.composite
def masks(draw: st.DrawFn, longest: int = 24) -> tuple[np.ndarray, tuple[float, ...] | None]:
    dims = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, longest)) for _ in range(dims))
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.9, 0.98, 1.0]))
    mask = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random(shape) < share
    spacing = draw(st.none() | st.tuples(*[SPACING] * dims))
    return mask.astype(draw(st.sampled_from(["bool", "uint8", "int32", "int64"]))), spacing


def scipy_edt(mask: np.ndarray, spacing: tuple[float, ...] | None) -> np.ndarray:
    """SciPy's answer, with inf instead of its phantom voxel where there is no background."""
    if (mask != 0).all():
        return np.full(mask.shape, np.inf)
    return np.asarray(ndimage.distance_transform_edt(mask, sampling=spacing))


def adversarial(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Masks that make some algorithm slow or wrong."""
    index = np.indices(shape)
    rng = np.random.default_rng(0)
    lone = np.ones(shape, np.uint8)
    lone[tuple(n // 3 for n in shape)] = 0
    corner = np.ones(shape, np.uint8)
    corner[(0,) * len(shape)] = 0
    diagonal = np.ones(shape, np.uint8)
    line = np.arange(min(shape))
    diagonal[(line,) * len(shape)] = 0
    return {
        "lone zero": lone,
        "lone one": 1 - lone,
        "corner": corner,
        "diagonal": diagonal,
        "checkerboard": (index.sum(0) % 2).astype(np.uint8),
        "stripes": (index[-1] // 8 % 2).astype(np.uint8),
        "half": (index[0] > 0).astype(np.uint8),
        "last half": (index[-1] > 0).astype(np.uint8),
        "1 %": (rng.random(shape) < 0.01).astype(np.uint8),
        "99 %": (rng.random(shape) < 0.99).astype(np.uint8),
        "full": np.ones(shape, np.uint8),
        "empty": np.zeros(shape, np.uint8),
    }


@settings(max_examples=300, deadline=None)
@given(masks())
def test_edt_equals_scipy(case: tuple[np.ndarray, tuple[float, ...] | None]) -> None:
    mask, spacing = case
    expected = scipy_edt(mask, spacing)
    before = mask.copy()
    np.testing.assert_allclose(distance_transform_edt(mask, spacing), expected, rtol=1e-6)
    assert (mask == before).all()
    if spacing is None:
        squared = distance_transform_edt(mask, squared=True)
        assert (squared == np.round(expected**2)).all(), "squared distances are exact integers"


@settings(max_examples=150, deadline=None)
@given(masks())
def test_indices_name_a_nearest_background_voxel(case: tuple[np.ndarray, tuple[float, ...] | None]) -> None:
    mask, spacing = case
    distance, indices = distance_transform_edt(mask, spacing, return_indices=True)
    assert indices.shape == (mask.ndim, *mask.shape)
    if (mask != 0).all():
        assert (indices == -1).all()
        return
    assert not mask[tuple(indices)].any()
    scale = np.reshape(spacing or (1,) * mask.ndim, (-1,) + (1,) * mask.ndim)
    reached = np.sqrt((((np.indices(mask.shape) - indices) * scale) ** 2).sum(0))
    np.testing.assert_allclose(reached, scipy_edt(mask, spacing), rtol=1e-6)
    np.testing.assert_allclose(distance, reached, rtol=1e-6)


@settings(max_examples=150, deadline=None)
@given(masks(9), st.sampled_from(CONVENTIONS), st.booleans())
def test_signed_maps_equal_the_reference(
    case: tuple[np.ndarray, tuple[float, ...] | None], convention: str, normalize: bool
) -> None:
    mask, spacing = case
    expected = reference.signed_distance_map(
        torch.from_numpy(mask), spacing, convention=convention, normalize=normalize
    )
    got = signed_distance_map(mask, spacing, convention=convention, normalize=normalize)
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(700,), (130, 150), (40, 70, 90), (3, 300, 5), (300, 3, 5), (5, 4, 300)])
def test_adversarial_masks(shape: tuple[int, ...]) -> None:
    """Far fields too: these are long enough for the search to give way to the envelope."""
    for name, mask in adversarial(shape).items():
        for spacing in (None, (1.7, 0.6, 1.1)[: len(shape)]):
            expected = scipy_edt(mask, spacing)
            np.testing.assert_allclose(distance_transform_edt(mask, spacing), expected, rtol=1e-6, err_msg=name)
            with np.errstate(invalid="ignore"):
                signed = np.where(mask != 0, -expected, scipy_edt(1 - mask, spacing))
            got = signed_distance_map(mask, spacing, convention="two_sided")
            np.testing.assert_allclose(got, signed, rtol=1e-6, err_msg=name)


def test_dtc_equals_the_public_code_where_that_is_defined() -> None:
    """The formula of DTC, SASSNet and DTML (METHODS.md section 1), on a ball that does not touch the border."""
    mask = ((np.indices((21, 22, 23)) - 11) ** 2).sum(0) <= 36
    outside, inside = ndimage.distance_transform_edt(~mask), ndimage.distance_transform_edt(mask)
    expected = outside / outside.max() - inside / inside.max()
    expected[mask & ~ndimage.binary_erosion(mask)] = 0
    np.testing.assert_allclose(signed_distance_map(mask, convention="dtc"), expected, rtol=1e-6, atol=1e-7)


def test_one_class_items_are_defined() -> None:
    batch = np.stack([np.zeros((4, 5), np.uint8), np.ones((4, 5), np.uint8)])
    for convention, plain, normalized in (
        ("boundary", np.inf, 1),
        ("two_sided", np.inf, 1),
        ("dtc", 1, 1),
        ("kervadec", 0, 0),
    ):
        for normalize, value in ((False, plain), (True, normalized)):
            got = signed_distance_map(batch, spatial_dims=2, convention=convention, normalize=normalize)
            assert (got[0] == value).all()
            assert (got[1] == -value).all()
    assert (distance_transform_edt(batch, spatial_dims=2)[1] == np.inf).all()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_batches_equal_their_items(dims: int) -> None:
    mask = np.random.default_rng(1).random((3, 2, 7, 9, 8)[: dims + 2]) < 0.8
    for function in (distance_transform_edt, signed_distance_map):
        together = function(mask, spatial_dims=dims)
        for i in np.ndindex(3, 2):
            np.testing.assert_array_equal(together[i], function(mask[i]))
    _, indices = distance_transform_edt(mask, spatial_dims=dims, return_indices=True)
    assert indices.shape == (3, 2, dims, *mask.shape[2:])
    assert indices.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_strides(data: st.DataObject) -> None:
    base = np.random.default_rng(data.draw(st.integers(0, 999))).random((6, 10, 12)) < 0.7
    view = base.transpose(data.draw(st.permutations([0, 1, 2])))
    view = view[data.draw(hnp.basic_indices(view.shape, min_dims=1, allow_newaxis=False, allow_ellipsis=False))]
    if 0 in view.shape:
        return
    dense = np.ascontiguousarray(view)
    for function in (distance_transform_edt, signed_distance_map):
        np.testing.assert_array_equal(function(view), function(dense))
        np.testing.assert_array_equal(function(view.astype("int32")[...]), function(dense))


@example(shape=(2, 70, 90))
@example(shape=(40, 100, 50))
@settings(max_examples=5, deadline=None)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 90), st.integers(1, 90)))
def test_same_bits_for_any_threads(shape: tuple[int, ...]) -> None:
    mask = torch.from_numpy(np.random.default_rng(0).random(shape) < 0.97)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append([signed_distance_map(mask, convention=c) for c in CONVENTIONS])
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_torch_and_numpy_give_the_same() -> None:
    mask = np.random.default_rng(2).random((2, 30, 40)) < 0.6
    for function in (distance_transform_edt, signed_distance_map):
        result = function(torch.from_numpy(mask), (0.5, 2.0), spatial_dims=2)
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        np.testing.assert_array_equal(result.numpy(), function(mask, (0.5, 2.0), spatial_dims=2))


def test_empty_batch() -> None:
    assert distance_transform_edt(np.ones((0, 4, 4), np.uint8), spatial_dims=2).shape == (0, 4, 4)
    assert signed_distance_map(np.ones((0, 4, 4), np.uint8), spatial_dims=2).shape == (0, 4, 4)


def test_every_instruction_set_gives_the_same() -> None:
    """Unit spacing is exact whatever the CPU; run again as an old one."""
    code = (
        "import numpy as np, noisyseg_fast as ns; m = np.random.default_rng(3).random((20, 60, 70)) < 0.95;"
        "print(ns.build_info()['instruction_set_in_use'], ns.distance_transform_edt(m, squared=True).sum(dtype='f8'),"
        "abs(ns.signed_distance_map(m, convention='two_sided') ** 2).sum(dtype='f8').round(3))"
    )
    lines = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "NOISYSEG_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for isa in ("baseline", "avx2", "avx512")
    ]
    assert lines[0][0] == "baseline"
    assert lines[0][1:] == lines[1][1:] == lines[2][1:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": np.ones((2, 2), np.float32)}, TypeError, "mask has dtype float32; use one of uint8, bool"),
        ({"mask": np.ones((2, 2, 2, 2), bool)}, ValueError, "spatial_dims must be 1, 2 or 3, got 4 .* batch"),
        ({"mask": np.ones((2, 2), bool), "spatial_dims": 3}, ValueError, "too few axes for spatial_dims=3"),
        ({"mask": np.ones((2, 0), bool)}, ValueError, "mask has a spatial axis of size 0"),
        ({"mask": np.ones((2, 2), bool), "spacing": (1,)}, ValueError, "spacing has 1 values for 2 spatial axes"),
        ({"mask": np.ones((2, 2), bool), "spacing": (1, 0)}, ValueError, "spacing must be positive and finite"),
        ({"mask": np.ones((2, 2), bool), "spacing": (1, np.nan)}, ValueError, "spacing must be positive and finite"),
        ({"mask": [[1, 0]]}, TypeError, "mask must be a torch tensor, a NumPy or CuPy array .* not list"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    for function in (distance_transform_edt, signed_distance_map):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_unknown_convention() -> None:
    with pytest.raises(ValueError, match="convention must be one of boundary, two_sided, kervadec, dtc, got 'sdf'"):
        signed_distance_map(np.ones((2, 2), bool), convention="sdf")
