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
from scipy import ndimage

from noisyseg_fast import distance_transform_edt, reference, sampled_distance, signed_distance_map
from noisyseg_fast.distance import CONVENTIONS

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
            np.testing.assert_allclose(
                distance_transform_edt(mask, spacing), expected, rtol=1e-6, err_msg=name
            )
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
    view = view[
        data.draw(hnp.basic_indices(view.shape, min_dims=1, allow_newaxis=False, allow_ellipsis=False))
    ]
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
        (
            {"mask": np.ones((2, 2), bool), "spacing": (1,)},
            ValueError,
            "spacing has 1 values for 2 spatial axes",
        ),
        (
            {"mask": np.ones((2, 2), bool), "spacing": (1, 0)},
            ValueError,
            "spacing must be positive and finite",
        ),
        (
            {"mask": np.ones((2, 2), bool), "spacing": (1, np.nan)},
            ValueError,
            "spacing must be positive and finite",
        ),
        ({"mask": [[1, 0]]}, TypeError, "mask must be a torch tensor, a NumPy or CuPy array .* not list"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    for function in (distance_transform_edt, signed_distance_map):
        with pytest.raises(error, match=message):
            function(**arguments)


@settings(max_examples=150, deadline=None)
@given(masks(9), st.sampled_from(CONVENTIONS), st.booleans(), st.sampled_from(["float32", "float64"]))
def test_border_counts_as_background(
    case: tuple[np.ndarray, tuple[float, ...] | None], convention: str, normalize: bool, dtype: str
) -> None:
    mask, spacing = case
    item = torch.from_numpy(mask)
    tolerance = 2e-6 if dtype == "float32" else 1e-13
    expected = reference.distance_transform_edt(item, spacing, border=True)
    got = distance_transform_edt(mask, spacing, border=True, dtype=dtype)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, rtol=tolerance)
    options = {"convention": convention, "normalize": normalize, "border": True}
    expected = reference.signed_distance_map(item, spacing, **options)
    np.testing.assert_allclose(
        signed_distance_map(mask, spacing, dtype=dtype, **options), expected, rtol=tolerance, atol=tolerance
    )


@st.composite
def labels(draw: st.DrawFn, longest: int = 8) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """Few labels in cells of 1 to 3 voxels."""
    dims = draw(st.integers(1, 3))
    cells = tuple(draw(st.integers(1, longest)) for _ in range(dims))
    image = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, draw(st.integers(1, 5)), cells)
    for axis in range(dims):
        image = image.repeat(draw(st.integers(1, 3)), axis)
    return image, draw(st.none() | st.tuples(*[SPACING] * dims))


@settings(max_examples=200, deadline=None)
@given(labels(), st.booleans(), st.sampled_from(["float32", "float64"]))
def test_multi_label_equals_the_reference(
    case: tuple[np.ndarray, tuple[float, ...] | None], border: bool, dtype: str
) -> None:
    image, spacing = case
    expected = reference.distance_transform_edt(
        torch.from_numpy(image), spacing, multi_label=True, border=border
    ).numpy()
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    options = {"multi_label": True, "dtype": dtype}
    got = distance_transform_edt(image, spacing, border=border, **options)
    np.testing.assert_allclose(got, expected, rtol=tolerance)
    if border:
        return
    _, indices = distance_transform_edt(image, spacing, return_indices=True, **options)
    finite = np.isfinite(expected)
    assert (indices[:, ~finite] == -1).all()
    if not finite.all():
        return
    assert ((image[tuple(indices)] != image) | (image == 0)).all()
    scale = np.reshape(spacing or (1,) * image.ndim, (-1,) + (1,) * image.ndim)
    reached = np.sqrt((((np.indices(image.shape) - indices) * scale) ** 2).sum(0))
    np.testing.assert_allclose(reached, expected, rtol=1e-6)


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("shape", [(700,), (300, 20), (20, 300), (30, 40, 70), (300, 4, 5), (5, 4, 300)])
def test_multi_label_equals_edt(shape: tuple[int, ...], border: bool) -> None:
    """Long lines too, where the search gives way to the envelope."""
    edt = pytest.importorskip("edt")
    rng = np.random.default_rng(len(shape))
    coarse = rng.integers(0, 4, [-(-n // 150) for n in shape])
    for axis in range(len(shape)):
        coarse = coarse.repeat(150, axis)
    big = coarse[tuple(slice(0, n) for n in shape)]
    spots = np.where(rng.random(shape) < 0.001, 7, 1)
    for image in (big, spots, rng.integers(0, 3, shape), np.ones(shape, int)):
        for spacing in (None, (1.7, 0.6, 1.1)[: len(shape)]):
            scale = spacing or (1.0,) * len(shape)
            expected = edt.edt(
                np.ascontiguousarray(image, np.uint32),
                anisotropy=scale if len(shape) > 1 else scale[0],
                black_border=border,
            )
            got = distance_transform_edt(image, spacing, multi_label=True, border=border)
            np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_labels_of_any_integer_dtype() -> None:
    image = np.random.default_rng(4).integers(0, 5, (12, 15))
    expected = distance_transform_edt(image, multi_label=True)
    for dtype in ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]:
        for given_image in (image.astype(dtype), torch.from_numpy(image).to(getattr(torch, dtype))):
            np.testing.assert_array_equal(distance_transform_edt(given_image, multi_label=True), expected)
            maps = signed_distance_map(given_image, num_classes=5)
            np.testing.assert_array_equal(maps, signed_distance_map(image, num_classes=5))
    for far in (image * (2**40 + 1), np.where(image, image + 2**40, 0), image - 2 * (image > 2) * 2**33):
        np.testing.assert_array_equal(distance_transform_edt(far, multi_label=True), expected)
    never_zero = np.where(image == 0, 2**50, image)
    np.testing.assert_array_equal(
        distance_transform_edt(never_zero, multi_label=True),
        distance_transform_edt(np.where(image == 0, 9, image), multi_label=True),
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_map_for_each_class(convention: str) -> None:
    image = torch.from_numpy(np.random.default_rng(5).integers(-1, 4, (2, 3, 9, 11)))
    got = signed_distance_map(image, (1, 2), spatial_dims=2, convention=convention, num_classes=4)
    assert got.shape == (2, 3, 4, 9, 11)
    for c in range(4):
        one = signed_distance_map(image == c, (1, 2), spatial_dims=2, convention=convention)
        assert torch.equal(got[:, :, c], one)


def test_spacing_of_each_item() -> None:
    image = np.random.default_rng(6).random((3, 2, 8, 9)) < 0.7
    spacing = np.random.default_rng(7).uniform(0.5, 2, (3, 2, 2))
    edt, indices = distance_transform_edt(image, spacing, spatial_dims=2, return_indices=True)
    maps = signed_distance_map(image, spacing.tolist(), spatial_dims=2, num_classes=2)
    values = torch.rand(3, 2, 8, 9, requires_grad=True)
    sampled = sampled_distance(values, torch.from_numpy(~image), torch.from_numpy(spacing), spatial_dims=2)
    sampled.square().sum().backward()
    for i in np.ndindex(3, 2):
        own = tuple(spacing[i])
        for whole, one in zip(
            (edt, indices), distance_transform_edt(image[i], own, return_indices=True), strict=True
        ):
            np.testing.assert_array_equal(whole[i], one)
        np.testing.assert_array_equal(maps[i], signed_distance_map(image[i], own, num_classes=2))
        alone = values.detach()[i].requires_grad_()
        result = sampled_distance(alone, torch.from_numpy(~image[i]), own)
        assert torch.equal(result, sampled[i])
        result.square().sum().backward()
        assert torch.equal(alone.grad, values.grad[i])


def test_float64_is_exact_beyond_2_to_the_24() -> None:
    mask = np.ones((1, 6001), np.uint8)
    mask[0, 0] = 0
    squared = distance_transform_edt(mask, squared=True, dtype=np.float64)
    assert (squared[0] == np.arange(6001.0) ** 2).all()
    far = np.ones((3, 5000, 2), bool)
    far[0, 0, 0] = False
    squared = distance_transform_edt(torch.from_numpy(far), squared=True, dtype=torch.float64)
    z, y, x = np.indices(far.shape).astype(float)
    assert (squared.numpy() == z**2 + y**2 + x**2).all()


def test_items_without_a_site() -> None:
    mask = np.stack([np.ones((4, 5), np.uint8), np.zeros((4, 5), np.uint8), np.eye(4, 5, dtype=np.uint8)])
    got = distance_transform_edt(mask, spatial_dims=2, no_site=7.5)
    assert (got[0] == 7.5).all()
    np.testing.assert_array_equal(got[1:], distance_transform_edt(mask, spatial_dims=2)[1:])
    labelled = distance_transform_edt(mask * 3, spatial_dims=2, multi_label=True, squared=True, no_site=0)
    assert (labelled[0] == 0).all()
    for convention in ("boundary", "two_sided"):
        got = signed_distance_map(mask, spatial_dims=2, convention=convention, no_site=9)
        assert (got[0] == -9).all()
        assert (got[1] == 9).all()
        np.testing.assert_array_equal(got[2], signed_distance_map(mask[2], convention=convention))


@settings(max_examples=60, deadline=None)
@given(masks(6))
def test_sampled_distance_equals_the_reference(case: tuple[np.ndarray, tuple[float, ...] | None]) -> None:
    mask, spacing = case
    sites = torch.from_numpy(mask)
    rng = np.random.default_rng(mask.size)
    ours = torch.from_numpy(rng.normal(0, 5, mask.shape)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    got, expected = sampled_distance(ours, sites, spacing), reference.sampled_distance(theirs, sites, spacing)
    torch.testing.assert_close(got, expected)
    if mask.any():
        weight = torch.from_numpy(rng.normal(size=mask.shape))
        (got * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
    else:
        assert (got == np.inf).all()
    single = sampled_distance(ours.detach().float().numpy(), mask, spacing)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, got.detach(), rtol=1e-5, atol=1e-5)


def test_sampled_distance_on_long_lines() -> None:
    """With values 0 it is the squared transform."""
    for shape in ((700,), (130, 150), (20, 90, 70)):
        mask = np.random.default_rng(1).random(shape) < 0.999
        expected = distance_transform_edt(mask, squared=True)
        np.testing.assert_array_equal(sampled_distance(np.zeros(shape, np.float32), ~mask), expected)


def test_sampled_distance_gradients() -> None:
    values = (torch.rand(2, 5, 6, dtype=torch.float64) * 9).requires_grad_()
    sites = torch.rand(2, 5, 6) < 0.4
    sites[:, 0, 0] = True
    call = lambda v: sampled_distance(v, sites, (1, 1.5), spatial_dims=2)  # noqa: E731
    assert torch.autograd.gradcheck(call, (values,))
    gradients = []
    for count in (1, 2):
        torch.set_num_threads(count)
        large = torch.rand(300, 200, generator=torch.Generator().manual_seed(0)).requires_grad_()
        sampled_distance(large * 100).sin().sum().backward()
        gradients.append(large.grad)
    assert torch.equal(*gradients), "the same bits for any number of threads"
    (grad,) = torch.autograd.grad((call(values) ** 2).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), call(values))
    (ours,) = torch.autograd.grad(call(values).square().sum(), values)
    (theirs,) = torch.autograd.grad(compiled(values).square().sum(), values)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: distance_transform_edt(m, dtype="float16"),
            ValueError,
            "dtype must be float32 or float64",
        ),
        (
            lambda m: distance_transform_edt(m, no_site=-1),
            ValueError,
            "no_site must be a number from 0 to inf, got -1",
        ),
        (
            lambda m: signed_distance_map(m, no_site=np.nan),
            ValueError,
            "no_site must be a number from 0 to inf",
        ),
        (
            lambda m: distance_transform_edt(m, border=True, return_indices=True),
            ValueError,
            "return_indices=True needs border=False",
        ),
        (
            lambda m: signed_distance_map(m, num_classes=0),
            ValueError,
            "num_classes must be a positive integer or None",
        ),
        (
            lambda m: signed_distance_map(m[(None,) * (8 - m.ndim)], spatial_dims=2, num_classes=2),
            ValueError,
            "mask has 8 dimensions; with num_classes at most 7 are supported",
        ),
        (
            lambda m: distance_transform_edt(m[(None,) * (8 - m.ndim)], spatial_dims=2, return_indices=True),
            ValueError,
            "mask has 8 dimensions; with return_indices at most 7 are supported",
        ),
        (
            lambda m: distance_transform_edt(m[None], [[1, 2], [3, 4]], spatial_dims=2),
            ValueError,
            r"spacing has shape \(2, 2\); for each item of this batch it would be \(1, 2\)",
        ),
        (
            lambda m: distance_transform_edt(m, [[1], [1, 2]]),
            TypeError,
            "spacing must be a number, one for each",
        ),
        (lambda m: sampled_distance(m), TypeError, "values has dtype bool; use one of float32, float64"),
        (
            lambda m: sampled_distance(np.zeros((2, 2)), np.zeros((2, 2))),
            TypeError,
            "sites has dtype float64; use one of uint8, bool, int32, int64",
        ),
        (
            lambda m: sampled_distance(np.zeros((2, 2)), m[:1]),
            ValueError,
            r"sites has shape \(1, 2\), values \(2, 2\); they must be alike",
        ),
        (lambda m: sampled_distance(np.zeros((2, 0))), ValueError, "values has a spatial axis of size 0"),
        (
            lambda m: sampled_distance(np.zeros((1,) * 4)),
            ValueError,
            "spatial_dims must be 1, 2 or 3, got 4 for values of shape",
        ),
    ],
)
def test_errors_of_options(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(np.ones((2, 2), bool))


def test_unknown_convention() -> None:
    with pytest.raises(
        ValueError, match="convention must be one of boundary, two_sided, kervadec, dtc, got 'sdf'"
    ):
        signed_distance_map(np.ones((2, 2), bool), convention="sdf")
