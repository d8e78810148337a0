"""Surface and overlap metrics: CUDA against the CPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast import confusion, overlap_metrics, surface_metrics  # noqa: E402
from noisyseg_fast.metrics import DEFINITIONS  # noqa: E402

SHAPES = [(2, 1, 64, 64), (1, 3, 37, 101), (40, 55), (1, 2, 23, 30, 41), (19, 64, 33), (1, 1, 1, 30)]


def blobs(shape, dims, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for axis in range(len(shape) - dims, len(shape)):
        for _ in range(5):
            x = x + x.roll(1, axis) + x.roll(-1, axis)
    return x > 0


def pairs(shape, dims):
    empty, full = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    one = empty.clone()
    one[..., -1] = True
    first = blobs(shape, dims, 1)
    yield first, blobs(shape, dims, 2)
    yield first, first
    yield first, one
    yield one, full
    yield empty, first
    yield first, empty
    yield empty, empty


def spatial(shape):
    return len(shape) if len(shape) <= 3 else len(shape) - 2


def assert_same(cuda, cpu):
    assert cuda._fields == cpu._fields
    for name, got, want in zip(cuda._fields, cuda, cpu, strict=True):
        assert (got.device.type, got.dtype) == ("cuda", want.dtype), name
        np.testing.assert_allclose(got.cpu().numpy(), want.numpy(), rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_surface_metrics_equal_the_cpu(shape, definition):
    dims = spatial(shape)
    for pred, target in pairs(shape, dims):
        for spacing in (None, (0.8, 1.3, 2.1)[:dims]):
            for options in ({}, {"percentile": 50, "tolerance": [0, 2.5], "border": False}):
                got = surface_metrics(pred.cuda(), target.cuda(), spacing, definition=definition, **options)
                assert_same(got, surface_metrics(pred, target, spacing, definition=definition, **options))


@pytest.mark.small
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_overlap_metrics_equal_the_cpu(shape):
    for pred, target in pairs(shape, spatial(shape)):
        assert_same(overlap_metrics(pred.cuda(), target.cuda()), overlap_metrics(pred, target))


@pytest.mark.small
def test_other_rules_equal_the_cpu():
    pred, target = blobs((3, 2, 40, 70), 2, 7), blobs((3, 2, 40, 70), 2, 8)
    for options in (
        {"surface": "full", "percentile_rule": "pooled", "interpolation": "inverted_cdf", "average": "mean"},
        {"definition": "deepmind", "percentile_rule": "pooled", "tolerance": [[0, 1], [2, 3]]},
        {"empty": "diagonal", "interpolation": "inverted_cdf", "percentile": 50},
    ):
        for spacing in (1.5, (0.5, 1.5)):
            got = surface_metrics(pred.cuda(), target.cuda(), spacing, **options)
            assert_same(got, surface_metrics(pred, target, spacing, **options))


def labels(seed):
    return torch.randint(0, 5, (2, 9, 40, 70), generator=torch.Generator().manual_seed(seed))


@pytest.mark.small
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_label_images_equal_the_cpu(dtype):
    pred, target = labels(0).to(dtype), labels(1).to(dtype)
    for background in (True, False):
        options = {"num_classes": 4, "include_background": background}
        for function in (surface_metrics, overlap_metrics, confusion):
            assert_same(function(pred.cuda(), target.cuda(), **options), function(pred, target, **options))


@pytest.mark.small
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logits_equal_the_cpu(dtype):
    logits = (
        torch.randn((2, 5, 9, 40, 70), generator=torch.Generator().manual_seed(2)).mul(4).round().to(dtype)
    )
    target = labels(3)
    last = logits.cuda().to(memory_format=torch.channels_last_3d)
    for options in ({}, {"include_background": False}, {"threshold": 0.5}):
        want = overlap_metrics(logits, target, **options)
        assert_same(overlap_metrics(logits.cuda(), target.cuda(), **options), want)
        assert_same(overlap_metrics(last, target.cuda(), **options), want)
    assert_same(overlap_metrics(last[:, :1], target.cuda()), overlap_metrics(logits[:, :1], target))


def test_more_pairs_than_a_grid_is_long():
    """70,000 pairs in one call: more than gridDim.y and z hold."""
    pred = torch.rand((70_000, 1, 6, 5), generator=torch.Generator().manual_seed(1)) < 0.3
    target = pred.roll(1, 0)
    assert_same(surface_metrics(pred.cuda(), target.cuda()), surface_metrics(pred, target))
    assert_same(overlap_metrics(pred.cuda(), target.cuda()), overlap_metrics(pred, target))


@pytest.mark.small
@pytest.mark.parametrize("shape", [(2, 2, 30, 41), (1, 1, 12, 20, 15)], ids=str)
def test_small_selection(shape):
    for pred, target in pairs(shape, spatial(shape)):
        assert_same(surface_metrics(pred.cuda(), target.cuda()), surface_metrics(pred, target))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32, torch.int64], ids=str)
def test_dtypes_and_strides(dtype):
    pred, target = blobs((2, 1, 60, 90), 2, 3).to(dtype), blobs((2, 1, 60, 90), 2, 4).to(dtype)
    strided = pred.cuda().transpose(2, 3).contiguous().transpose(2, 3)
    assert_same(surface_metrics(strided, target.cuda()), surface_metrics(pred, target))
    assert_same(overlap_metrics(strided, target.cuda()), overlap_metrics(pred, target))


def test_cupy_equals_torch():
    cupy = pytest.importorskip("cupy")
    pred, target = blobs((2, 1, 50, 70), 2, 5), blobs((2, 1, 50, 70), 2, 6)
    for function in (surface_metrics, overlap_metrics):
        got = function(cupy.asarray(pred.numpy()), cupy.asarray(target.numpy()))
        want = function(pred.cuda(), target.cuda())
        for g, w in zip(got, want, strict=True):
            assert type(g).__module__.startswith("cupy")
            np.testing.assert_array_equal(cupy.asnumpy(g), w.cpu().numpy())


def test_more_than_two_to_the_31_pixels(room):
    """Only the last voxels are object: 1 of pred within 2 of target."""
    room(16)
    pred = torch.zeros((46341, 46345), dtype=torch.uint8, device="cuda")
    assert pred.numel() > 2**31
    target = pred.clone()
    pred[-1, -1] = 1
    target[-1, -2:] = 1
    result = overlap_metrics(pred, target)
    assert float(result.dice) == pytest.approx(2 / 3)
    assert float(result.jaccard) == pytest.approx(1 / 2)
    assert float(result.volume_error) == pytest.approx(-1 / 2)
