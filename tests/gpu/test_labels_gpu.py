"""Label fusion: CUDA against the CPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import noisyseg_fast as nf  # noqa: E402

SHAPES = [(2, 3, 64, 64), (1, 5, 37, 101), (3, 1, 500), (1, 8, 23, 30, 41), (600, 4, 16, 16)]


def raters(shape, classes=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (shape[0], 1, *shape[2:]), generator=g)
    wrong = torch.rand(shape, generator=g) < 0.15
    return torch.where(wrong, torch.randint(0, classes, shape, generator=g), truth)


def assert_same(cuda, cpu, tolerance=1e-9):
    names = getattr(cpu, "_fields", [""])
    cuda, cpu = (x if isinstance(x, tuple) else (x,) for x in (cuda, cpu))
    for name, got, want in zip(names, cuda, cpu, strict=True):
        assert (got.device.type, got.dtype, got.shape) == ("cuda", want.dtype, want.shape), name
        off = 1e-6 if want.dtype == torch.float32 else tolerance
        np.testing.assert_allclose(got.cpu().numpy(), want.numpy(), rtol=off, atol=off, err_msg=name)


def options_of(shape):
    dims = len(shape) - 2
    present = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.7
    yield {"spatial_dims": dims}
    yield {"spatial_dims": dims, "present": present}
    yield {"spatial_dims": dims, "missing": 1}


@pytest.mark.small
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_equal_the_cpu(shape, dtype):
    masks = raters(shape).to(dtype)
    for options in options_of(shape):
        on_gpu = {k: v.cuda() if hasattr(v, "cuda") else v for k, v in options.items()}
        gpu = masks.cuda()
        em = {"max_iter": 30, "tol": 0.0}
        assert_same(nf.staple(gpu, **em, **on_gpu), nf.staple(masks, **em, **options), 1e-7)
        for tie in (0, 1, "highest"):
            assert_same(nf.majority_vote(gpu, tie=tie, **on_gpu), nf.majority_vote(masks, tie=tie, **options))
        assert_same(nf.soft_average(gpu, **on_gpu), nf.soft_average(masks, **options))
        assert_same(nf.simple(gpu, **on_gpu), nf.simple(masks, **options))
        assert_same(nf.agreement(gpu, **on_gpu), nf.agreement(masks, **options))
        fused = masks[:, 0]
        assert_same(nf.rater_scores(gpu, fused.cuda(), **on_gpu), nf.rater_scores(masks, fused, **options))


@pytest.mark.small
@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("count", [3, 9])  # 9: more patterns than a table holds
def test_labels_equal_the_cpu(classes, count):
    images = raters((2, count, 30, 50), classes).to(torch.uint8)
    options = {"num_classes": classes, "spatial_dims": 2}
    em = {"max_iter": 20, "tol": 0.0}
    got, want = (nf.staple(x, **em, **options) for x in (images.cuda(), images))
    assert_same(got, want, 1e-7)
    assert_same(nf.majority_vote(images.cuda(), **options), nf.majority_vote(images, **options))
    assert_same(nf.soft_average(images.cuda(), **options), nf.soft_average(images, **options))


def test_strides_and_same_bits():
    masks = raters((3, 4, 60, 70)).to(torch.uint8).permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    first = nf.staple(masks.cuda(), spatial_dims=2)
    assert_same(first, nf.staple(masks, spatial_dims=2), 1e-6)
    for again, once in zip(nf.staple(masks.cuda(), spatial_dims=2), first, strict=True):
        assert torch.equal(again, once)


def test_soft_masks_equal_the_cpu():
    x = torch.rand((2, 5, 33, 40), generator=torch.Generator().manual_seed(0))
    x[0, 2, :4] = float("nan")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        soft = x.to(dtype)
        for weights in (None, [1, 2, 3, 4, 5]):
            got = nf.soft_average(soft.cuda(), weights=weights, spatial_dims=2)
            assert_same(got, nf.soft_average(soft, weights=weights, spatial_dims=2))


def test_staple_does_not_wait_for_the_device():
    masks = raters((2, 4, 64, 64)).to(torch.uint8).cuda()
    present = torch.ones((2, 4), dtype=torch.bool, device="cuda")
    nf.staple(masks, present=present)
    torch.cuda.set_sync_debug_mode("error")
    try:
        nf.staple(masks, present=present)
        nf.majority_vote(masks, present=present)
        nf.label_sampling(masks, torch.Generator("cuda").manual_seed(0), present=present)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_label_sampling():
    masks = raters((40, 4, 8, 8)).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    found, rater = nf.label_sampling(masks, generator, spatial_dims=2, return_rater=True)
    assert torch.equal(found, masks[torch.arange(40, device="cuda"), rater])
    assert set(rater.tolist()) == {0, 1, 2, 3}


def test_cupy():
    cupy = pytest.importorskip("cupy")
    masks = raters((2, 4, 32, 32)).to(torch.uint8)
    found = nf.staple(cupy.asarray(masks.numpy()), spatial_dims=2)
    assert isinstance(found.posterior, cupy.ndarray)
    np.testing.assert_allclose(
        found.posterior.get(), nf.staple(masks, spatial_dims=2).posterior.numpy(), atol=1e-6
    )
    nine = raters((2, 9, 20, 20), 5).to(torch.uint8)
    found = nf.staple(cupy.asarray(nine.numpy()), num_classes=5, spatial_dims=2, max_iter=9)
    expected = nf.staple(nine, num_classes=5, spatial_dims=2, max_iter=9)
    np.testing.assert_allclose(found.performance.get(), expected.performance.numpy(), atol=1e-9)
