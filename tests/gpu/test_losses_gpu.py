"""The fused losses: CUDA against the CPU, value and gradient."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast import dice_loss, nr_dice_loss, pixel_loss  # noqa: E402

SHAPES = [(8, 1, 64, 64), (2, 3, 33, 47), (1, 2, 17, 30, 11), (3, 5, 1, 7), (1, 14, 65, 129), (2, 1, 100_003)]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# relative to the largest value: the arithmetic's own rounding, and for gradients the storage's
VALUE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
GRADIENT = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def with_softmax(function, **options):
    """The loss with softmax where there is more than one channel."""

    def loss(logits, target, **kw):
        activation = "softmax" if logits.shape[1] > 1 else "sigmoid"
        return function(logits, target, activation=activation, **options, **kw)

    return loss


LOSSES = {
    "nr_dice": nr_dice_loss,
    "nr_dice_linear": partial(nr_dice_loss, gamma=1.2, denominator="linear", per_image=False),
    "nr_dice_softmax": with_softmax(nr_dice_loss, include_background=False),
    "dice": dice_loss,
    "dice_linear": partial(dice_loss, denominator="linear", reduction="sum"),
    "ce": with_softmax(pixel_loss),
    "bce": partial(pixel_loss, activation="sigmoid"),
    "ce_map": with_softmax(pixel_loss, reduction="none"),
}


def case(shape, dtype, label, seed=0):
    """logits, target, weight and mask on the CPU; label: a label dtype, or "soft" for (B, C, *S) floats."""
    g = torch.Generator().manual_seed(seed)
    pixels = (shape[0], *shape[2:])
    logits = (3 * torch.randn(shape, generator=g)).to(dtype)
    if label == "soft":
        target = torch.rand(shape, generator=g)
    else:
        classes = 2 if label is torch.bool else max(shape[1], 2)
        target = torch.randint(0, classes, pixels, generator=g).to(label)
    weight = torch.rand(pixels, generator=g)
    mask = torch.rand(pixels, generator=g) > 0.2
    return logits, target, weight, mask


def value_and_grad(loss, logits, target, **kw):
    logits = logits.detach().requires_grad_()
    value = loss(logits, target, **kw)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), grad


def assert_same(cuda, cpu, tolerance):
    cuda, cpu = cuda.cpu().double(), cpu.double()
    assert cuda.shape == cpu.shape
    assert torch.equal(torch.isfinite(cuda), torch.isfinite(cpu))
    scale = float(cpu.abs().max()) if cpu.numel() else 0.0
    torch.testing.assert_close(cuda, cpu, rtol=0, atol=tolerance * scale, equal_nan=True)


def compare(loss, dtype, logits, target, **kw):
    device = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    value, grad = value_and_grad(loss, logits.cuda(), target.cuda(), **device)
    want_value, want_grad = value_and_grad(loss, logits, target, **kw)
    assert (value.device.type, value.dtype, grad.dtype) == ("cuda", want_value.dtype, dtype)
    assert_same(value, want_value, VALUE[dtype])
    assert_same(grad, want_grad, GRADIENT[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_cpu(name, shape, dtype):
    logits, target, weight, mask = case(shape, dtype, torch.uint8)
    compare(LOSSES[name], dtype, logits, target)
    compare(LOSSES[name], dtype, logits, target, weight=weight, mask=mask)


@pytest.mark.small
@pytest.mark.parametrize("label", [torch.uint8, torch.bool, torch.int32, torch.int64, "soft"], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_every_dtype(name, label):
    logits, target, weight, mask = case((2, 3, 19, 23), torch.float32, label)
    compare(LOSSES[name], torch.float32, logits, target, weight=weight, mask=mask)


@pytest.mark.parametrize("name", LOSSES)
def test_strides_and_channels_last(name):
    logits, target, _, _ = case((2, 4, 40, 56), torch.float32, torch.uint8)
    value, grad = value_and_grad(LOSSES[name], logits, target)
    for z in (
        logits.cuda().to(memory_format=torch.channels_last),
        logits.cuda().transpose(2, 3).contiguous().transpose(2, 3),
        torch.nn.functional.pad(logits.cuda(), (3, 5))[..., 3:-5],
    ):
        got_value, got_grad = value_and_grad(LOSSES[name], z, target.cuda())
        assert_same(got_value, value, VALUE[torch.float32])
        assert_same(got_grad, grad, GRADIENT[torch.float32])


def test_class_weight():
    logits, target, _, mask = case((2, 5, 30, 31), torch.float32, torch.int64)
    compare(pixel_loss, torch.float32, logits, target, class_weight=[0.1, 2.0, 1.0, 0.0, 3.0], mask=mask)
    compare(pixel_loss, torch.float32, logits, target, class_weight=torch.rand(5))


@pytest.mark.small
@pytest.mark.parametrize("name", LOSSES)
def test_empty_batch_and_everything_masked(name):
    for shape in ((0, 2, 8, 8), (2, 2, 8, 8)):
        logits, target, _, mask = case(shape, torch.float32, torch.uint8)
        compare(LOSSES[name], torch.float32, logits, target)
        compare(LOSSES[name], torch.float32, logits, target, mask=torch.zeros_like(mask))


def test_label_out_of_range_gives_nan():
    logits, target, _, _ = case((1, 3, 8, 8), torch.float32, torch.uint8)
    target[0, 5, 5] = 7
    assert torch.isnan(nr_dice_loss(logits.cuda(), target.cuda(), activation="softmax"))
    assert torch.isnan(pixel_loss(logits.cuda(), target.cuda()))


def test_arguments_on_two_devices_are_refused():
    logits, target, _, _ = case((1, 1, 8, 8), torch.float32, torch.uint8)
    with pytest.raises(ValueError, match="same device"):
        nr_dice_loss(logits.cuda(), target)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_gives_float32(name):
    logits, target, _, _ = case((2, 2, 32, 32), torch.float32, torch.uint8)
    convolution = torch.nn.Conv2d(2, 2, 1).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        z = convolution(logits.cuda())
        assert z.dtype == torch.bfloat16
        value = LOSSES[name](z, target.cuda())
    assert value.dtype == torch.float32
    value.sum().backward()
    assert torch.isfinite(convolution.weight.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_without_graph_break(name):
    logits, target, _, _ = case((2, 3, 40, 40), torch.float32, torch.uint8)
    compiled = torch.compile(LOSSES[name], fullgraph=True)
    value, grad = value_and_grad(compiled, logits.cuda(), target.cuda())
    want_value, want_grad = value_and_grad(LOSSES[name], logits.cuda(), target.cuda())
    assert_same(value, want_value.cpu(), VALUE[torch.float32])
    assert_same(grad, want_grad.cpu(), GRADIENT[torch.float32])


@pytest.mark.parametrize("name", LOSSES)
def test_cupy_equals_torch(name):
    cupy = pytest.importorskip("cupy")
    logits, target, _, _ = case((2, 3, 40, 40), torch.float32, torch.uint8)
    value = LOSSES[name](cupy.asarray(logits.numpy()), cupy.asarray(target.numpy()))
    assert type(value).__module__.startswith("cupy")
    want = LOSSES[name](logits.cuda(), target.cuda())
    np.testing.assert_array_equal(cupy.asnumpy(value), want.cpu().numpy())


def test_more_than_two_to_the_31_pixels(room):
    """pytorch#46178: 32-bit indices. p = 1/2 everywhere, and only the last pixel is labelled."""
    room(24)
    n = 2**31 + 1027
    logits = torch.zeros((1, 1, n), dtype=torch.bfloat16, device="cuda", requires_grad=True)
    target = torch.zeros((1, n), dtype=torch.uint8, device="cuda")
    target[0, -1] = 1
    value = nr_dice_loss(logits, target)
    (grad,) = torch.autograd.grad(value, logits)
    denominator = 0.25 * n + 1
    assert float(value) == pytest.approx(n * 0.5**1.5 / denominator, rel=1e-5)
    # d/dz of |p - g|^1.5 is -+ 1.5 sqrt(1/2) p (1 - p), of p^2 it is 2 p p (1 - p)
    slope, common = 1.5 * 0.5**0.5 * 0.25 / denominator, n * 0.5**1.5 * 0.25 / denominator**2
    assert float(grad[0, 0, -1]) == pytest.approx(-slope - common, rel=1e-2)
    assert float(grad[0, 0, -2]) == pytest.approx(slope - common, rel=1e-2, abs=slope * 1e-2)
    assert float(grad[0, 0, 0]) == float(grad[0, 0, -2])
