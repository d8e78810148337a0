"""Distance transforms and signed distance maps: CUDA against the CPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast import distance_transform_edt, signed_distance_map  # noqa: E402

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
