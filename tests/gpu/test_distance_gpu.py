"""Distance transforms and signed distance maps: CUDA against the CPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast import distance_transform_edt, sampled_distance, signed_distance_map  # noqa: E402

# shape, spatial axes
CASES = [
    ((64, 64), 2),
    ((16, 1, 64, 64), 2),
    ((3, 2, 37, 301), 2),
    ((2, 1, 512, 512), 2),
    ((2, 33, 20, 45), 3),
    ((1, 1, 112, 112, 80), 3),
    ((1, 130, 7), 2),
    ((1, 1), 2),
    ((1, 5, 1, 9), 3),
    ((5000,), 1),
]
SPACING = {1: (0.7,), 2: (0.5, 1.7), 3: (2.5, 0.7, 0.9)}
CONVENTIONS = ["boundary", "two_sided", "kervadec", "dtc"]


def masks(shape, dims):
    """Blobs, noise of two densities, and the edge cases, each (shape), with the number of spatial axes."""
    g = torch.Generator().manual_seed(sum(shape))
    coarse = torch.randn(shape, generator=g)
    for axis in range(len(shape) - dims, len(shape)):
        for _ in range(6):
            coarse = coarse + coarse.roll(1, axis) + coarse.roll(-1, axis)
    yield "blobs", coarse > 0
    yield "sparse", torch.rand(shape, generator=g) > 0.99
    yield "dense", torch.rand(shape, generator=g) > 0.01
    yield "empty", torch.zeros(shape, dtype=torch.bool)
    yield "full", torch.ones(shape, dtype=torch.bool)
    one = torch.zeros(shape, dtype=torch.bool)
    one[..., -1] = True
    yield "border", one


def assert_same(cuda, cpu, exact):
    assert (cuda.device.type, cuda.dtype) == ("cuda", cpu.dtype)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(cuda.cpu(), cpu, equal_nan=True, **tolerance)


@pytest.mark.parametrize(("shape", "dims"), CASES, ids=str)
def test_edt_equals_the_cpu(shape, dims):
    for _, mask in masks(shape, dims):
        for squared in (False, True):
            got = distance_transform_edt(mask.cuda(), spatial_dims=dims, squared=squared)
            assert_same(got, distance_transform_edt(mask, spatial_dims=dims, squared=squared), exact=squared)
        got = distance_transform_edt(mask.cuda(), SPACING[dims], spatial_dims=dims)
        assert_same(got, distance_transform_edt(mask, SPACING[dims], spatial_dims=dims), exact=False)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("shape", "dims"), CASES, ids=str)
def test_signed_map_equals_the_cpu(shape, dims, convention, normalize):
    options = {"spatial_dims": dims, "convention": convention, "normalize": normalize}
    for _, mask in masks(shape, dims):
        for spacing in (None, SPACING[dims]):
            got = signed_distance_map(mask.cuda(), spacing, **options)
            assert_same(got, signed_distance_map(mask, spacing, **options), exact=False)


@pytest.mark.small
@pytest.mark.parametrize(("shape", "dims"), [((2, 40, 50), 2), ((9, 20, 17), 3), ((1, 300, 301), 2)], ids=str)
def test_small_selection(shape, dims):
    for _, mask in masks(shape, dims):
        got = distance_transform_edt(mask.cuda(), SPACING[dims], spatial_dims=dims)
        assert_same(got, distance_transform_edt(mask, SPACING[dims], spatial_dims=dims), exact=False)
        got = signed_distance_map(mask.cuda(), spatial_dims=dims)
        assert_same(got, signed_distance_map(mask, spatial_dims=dims), exact=False)


def assert_nearest(indices, distance, image, spacing, dims, multi_label):
    """The indices name voxels of another label (or background), as far away as the distances say."""
    inside = (distance > 0) & distance.isfinite()
    assert (indices.movedim(-dims - 1, 0)[:, distance.isinf()] == -1).all()
    places = indices.movedim(-dims - 1, 0)[:, inside].long()
    at = inside.nonzero().T
    scale = torch.tensor(spacing or (1.0,) * dims, dtype=torch.float64)[:, None]
    reached = (((at[-dims:] - places) * scale) ** 2).sum(0).sqrt()
    torch.testing.assert_close(reached, distance[inside].double(), rtol=1e-6, atol=1e-6)
    other = image[(*at[:-dims], *places)]
    assert ((other != image[inside]) if multi_label else other == 0).all()


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize(("shape", "dims"), CASES, ids=str)
def test_labels_and_indices(shape, dims, multi_label):
    g = torch.Generator().manual_seed(3)
    for _, mask in masks(shape, dims):
        image = mask * torch.randint(1, 4, shape, generator=g)
        for spacing in (None, SPACING[dims]):
            options = {"spatial_dims": dims, "multi_label": multi_label}
            want = distance_transform_edt(image, spacing, **options)
            got, indices = distance_transform_edt(image.cuda(), spacing, return_indices=True, **options)
            assert_same(got, want, exact=False)
            assert_nearest(indices.cpu(), got.cpu(), image, spacing, dims, multi_label)
            got = distance_transform_edt(image.cuda(), spacing, border=True, dtype="float64", **options)
            want = distance_transform_edt(image, spacing, border=True, dtype="float64", **options)
            assert_same(got, want, exact=False)


@pytest.mark.parametrize(
    ("shape", "dims"), [((1, 200, 300, 280), 3), ((2, 700, 900), 2), ((3, 5000), 1)], ids=str
)
def test_long_lines(shape, dims):
    """Where the search gives way to the envelope."""
    lone = torch.ones(shape, dtype=torch.bool)
    lone[(..., *(n // 3 for n in shape[-dims:]))] = False
    for mask in (lone, lone.logical_not(), torch.ones(shape, dtype=torch.bool)):
        for dtype in ("float32", "float64"):
            options = {"spatial_dims": dims, "dtype": dtype}
            got = distance_transform_edt(mask.cuda(), squared=True, **options)
            assert_same(got, distance_transform_edt(mask, squared=True, **options), exact=True)
            got = signed_distance_map(mask.cuda(), SPACING[dims], convention="two_sided", **options)
            assert_same(
                got, signed_distance_map(mask, SPACING[dims], convention="two_sided", **options), exact=False
            )


@pytest.mark.parametrize(("shape", "dims"), CASES, ids=str)
def test_sampled_distance_equals_the_cpu(shape, dims):
    g = torch.Generator().manual_seed(4)
    for dtype in (torch.float32, torch.float64):
        values, weight = (torch.rand(shape, dtype=dtype, generator=g) * 50 for _ in range(2))
        sites = torch.rand(shape, generator=g) < 0.3
        for chosen in (None, sites):
            results = []
            for device in ("cpu", "cuda"):
                x = values.to(device).requires_grad_()
                result = sampled_distance(x, None if chosen is None else chosen.to(device), spatial_dims=dims)
                result.where(result.isfinite(), 0).mul(weight.to(device)).sum().backward()
                results.append((result.detach(), x.grad))
            for cpu, cuda in zip(*results, strict=True):
                assert_same(cuda, cpu, exact=True)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_map_for_each_class(convention):
    image = torch.randint(0, 5, (70_000, 3, 4), generator=torch.Generator().manual_seed(5))
    options = {"spatial_dims": 2, "convention": convention, "num_classes": 5, "normalize": True}
    assert_same(
        signed_distance_map(image.cuda(), **options), signed_distance_map(image, **options), exact=False
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32, torch.int64], ids=str)
def test_dtypes_and_strides(dtype):
    mask = (torch.rand(4, 60, 90, generator=torch.Generator().manual_seed(1)) > 0.3).to(dtype)
    want = distance_transform_edt(mask, spatial_dims=2)
    device = mask.cuda()
    views = (
        device.transpose(1, 2).contiguous().transpose(1, 2),
        torch.nn.functional.pad(device.int(), (2, 3)).to(dtype)[..., 2:-3],
        device.repeat_interleave(2, 0)[::2],
    )
    for view in (device, *views):
        assert_same(distance_transform_edt(view, spatial_dims=2), want, exact=False)


def test_cupy_equals_torch():
    cupy = pytest.importorskip("cupy")
    mask = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(2)) > 0.2
    for function in (distance_transform_edt, signed_distance_map):
        got = function(cupy.asarray(mask.numpy()), spatial_dims=2)
        assert type(got).__module__.startswith("cupy")
        np.testing.assert_array_equal(cupy.asnumpy(got), function(mask.cuda(), spatial_dims=2).cpu().numpy())


def test_more_than_two_to_the_31_pixels(room):
    """The last image of a large batch equals the same image on its own."""
    room(60)
    mask = torch.ones((33, 8192, 8192), dtype=torch.bool, device="cuda")
    assert mask.numel() > 2**31
    mask[:, ::97, ::89] = False
    mask[-1] = torch.rand((8192, 8192), device="cuda") > 1e-4
    last = distance_transform_edt(mask, spatial_dims=2)[-1].clone()
    assert torch.equal(last, distance_transform_edt(mask[-1], spatial_dims=2))
