"""The fused losses: CUDA against the CPU, values and derivatives."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast import (  # noqa: E402
    boundary_loss,
    consistency_loss,
    dice_ce_loss,
    dice_loss,
    dice_mae_loss,
    focal_dice_loss,
    generalized_dice_loss,
    nr_dice_loss,
    pixel_loss,
)

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
    "nr_dice_images": with_softmax(nr_dice_loss, gamma=1.0, reduction="image"),
    "dice": dice_loss,
    "dice_linear": partial(dice_loss, denominator="linear", reduction="sum"),
    "dice_classes": with_softmax(dice_loss, reduction="none", label_smoothing=0.1),
    "focal_dice": with_softmax(focal_dice_loss),
    "generalized_dice": with_softmax(generalized_dice_loss),
    "generalized_dice_sigmoid": partial(
        generalized_dice_loss, activation="sigmoid", class_weighting="simple", reduction="none"
    ),
    "ce": with_softmax(pixel_loss),
    "ce_smooth": with_softmax(pixel_loss, label_smoothing=0.1, reduction="sum"),
    "ce_map": with_softmax(pixel_loss, reduction="none"),
    "ce_images": with_softmax(pixel_loss, reduction="image"),
    "bce": partial(pixel_loss, activation="sigmoid"),
    "focal": with_softmax(pixel_loss, kind="focal"),
    "focal_sigmoid": partial(pixel_loss, kind="focal", focal_gamma=0.5, activation="sigmoid"),
    "gce": with_softmax(pixel_loss, kind="gce"),
    "gce_sigmoid": partial(pixel_loss, kind="gce", activation="sigmoid", reduction="none"),
    "mae": with_softmax(pixel_loss, kind="mae"),
    "mse": with_softmax(pixel_loss, kind="mse"),
    "kl": with_softmax(pixel_loss, kind="kl", label_smoothing=0.1),
    "dice_ce": with_softmax(dice_ce_loss, dice_weight=0.5),
    "dice_ce_images": partial(dice_ce_loss, activation="sigmoid", reduction="image"),
    "dice_mae": with_softmax(dice_mae_loss, include_background=False),
}
FEW = ("nr_dice", "dice_classes", "generalized_dice", "ce", "ce_map", "dice_ce_images")  # for slower tests


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
    # not all ones, so that a gradient that ignores its place is noticed
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
    (grad,) = torch.autograd.grad(value, logits, upstream.reshape(value.shape))
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


# Half precision differs by its loads and stores alone: two shapes are enough.
@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, d) for d in FLOATS for s in (SHAPES if d.itemsize > 2 else SHAPES[1:3])], ids=str
)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_cpu(name, shape, dtype):
    logits, target, weight, mask = case(shape, dtype, torch.uint8)
    compare(LOSSES[name], dtype, logits, target)
    compare(LOSSES[name], dtype, logits, target, weight=weight, mask=mask)


@pytest.mark.small
@pytest.mark.parametrize("label", [torch.uint8, torch.bool, torch.int32, torch.int64, "soft"], ids=str)
@pytest.mark.parametrize("name", FEW)
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


@pytest.mark.parametrize("kind", ["ce", "focal", "mae", "gce", "mse", "kl"])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("reduction", ["mean", "image"])
def test_class_weight(kind, classes, reduction):
    logits, target, _, mask = case((2, classes, 30, 31), torch.float32, torch.int64)
    loss = partial(pixel_loss, kind=kind, reduction=reduction)
    weights = [0.1, 2.0, 1.0, 0.0, 3.0][:classes]
    compare(loss, torch.float32, logits, target, class_weight=weights, mask=mask)
    compare(loss, torch.float32, logits, target, class_weight=torch.rand(classes))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_ignored_label(name, dtype):
    logits, target, weight, _ = case((2, 3, 30, 31), torch.float32, dtype)
    target[:, ::3] = 255
    compare(LOSSES[name], torch.float32, logits, target, ignore_index=255)
    compare(LOSSES[name], torch.float32, logits, target, ignore_index=255, weight=weight)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [2, 4])
def test_boundary_and_consistency(activation, dtype, classes):
    logits, _, weight, mask = case((2, classes, 33, 47), dtype, torch.uint8)
    other = case((2, classes, 33, 47), torch.float32, torch.uint8, seed=1)[0]
    for loss in (boundary_loss, partial(boundary_loss, include_background=False, reduction="none")):
        compare(partial(loss, activation=activation), dtype, logits, other, weight=weight, mask=mask)
    for kind in ("mse", "mae", "kl"):
        loss = partial(consistency_loss, kind=kind, activation=activation)
        compare(loss, dtype, logits, other)
        compare(loss, dtype, logits, other, mask=mask, reduction="image")


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("shape", [(1, 70, 9, 11), (1, 1024, 2, 3), (70_000, 2, 2, 2)], ids=str)
def test_many_classes_and_images(name, shape):
    """More classes than a block keeps on chip; more images than gridDim.y holds."""
    logits, target, _, mask = case(shape, torch.float32, torch.int32)
    compare(LOSSES[name], torch.float32, logits, target)
    compare(LOSSES[name], torch.float32, logits, target, mask=mask)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.small] if name in FEW and dtype.itemsize == 4 else [])
        for name in LOSSES
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def test_second_and_forward_derivatives(name, dtype):
    """jvp, vjp of the gradient and jvp of the gradient, all in float64 whatever the logits are."""
    logits, target, weight, _ = case((2, 3, 17, 19), dtype, torch.uint8)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(dtype)

    def derivatives(device):
        z, v = logits.to(device), direction.to(device)
        t, w = target.to(device), weight.to(device)
        loss = lambda x: LOSSES[name](x, t, weight=w).sum()  # noqa: E731
        value, tangent = torch.func.jvp(loss, (z,), (v,))
        grad, grad_dot = torch.func.jvp(torch.func.grad(loss), (z,), (v,))
        x = z.detach().requires_grad_()
        (again,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (product,) = torch.autograd.grad(again, x, v)
        return value, tangent, grad, grad_dot, product

    tolerance = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 1.6e-2}[dtype]
    for got, want in zip(derivatives("cuda"), derivatives("cpu"), strict=True):
        assert got.dtype == want.dtype
        assert_same(got, want, tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_return_grad(name):
    logits, target, _, _ = case((2, 3, 33, 47), torch.float32, torch.uint8)
    value, grad = LOSSES[name](logits.cuda(), target.cuda(), return_grad=True)
    want_value, want_grad = LOSSES[name](logits, target, return_grad=True)
    assert_same(value, want_value, VALUE[torch.float32])
    assert_same(grad, want_grad, GRADIENT[torch.float32])


@pytest.mark.parametrize("name", LOSSES)
def test_kept_gradient_is_scaled(name):
    """What the forward call leaves serves any gradient of the loss; a second backward computes anew."""
    logits, target, _, mask = case((2, 3, 33, 47), torch.float32, torch.uint8)
    z = logits.cuda().requires_grad_()
    value = LOSSES[name](z, target.cuda(), mask=mask.cuda()).sum()
    (one,) = torch.autograd.grad(value, z, retain_graph=True)
    one = one.clone()
    (again,) = torch.autograd.grad(value, z, retain_graph=True)
    assert_same(again, one.cpu(), GRADIENT[torch.float32])
    value = LOSSES[name](z, target.cuda(), mask=mask.cuda()).sum()
    (scaled,) = torch.autograd.grad(value, z, torch.full_like(value, 3.0))
    assert_same(scaled, 3 * one.cpu(), GRADIENT[torch.float32])


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_every_time_and_on_any_stream(name):
    logits, target, _, _ = case((2, 3, 65, 129), torch.float32, torch.uint8)
    z, t = logits.cuda(), target.cuda()
    want = value_and_grad(LOSSES[name], z, t)
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for _ in range(5):
                got = value_and_grad(LOSSES[name], z, t)
                for a, b in zip(got, want, strict=True):
                    assert torch.equal(a, b)
        stream.synchronize()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(name, dtype):
    """Nothing synchronises or allocates outside torch: a captured call gives new results for new inputs."""
    first, target, _, mask = case((2, 3, 40, 56), dtype, torch.uint8)
    second = case((2, 3, 40, 56), dtype, torch.uint8, seed=1)[0]
    z, t, m = first.cuda(), target.cuda(), mask.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        LOSSES[name](z, t, mask=m, return_grad=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = LOSSES[name](z, t, mask=m, return_grad=True)
    for logits in (first, second):
        z.copy_(logits)
        graph.replay()
        want_value, want_grad = LOSSES[name](logits, target, mask=mask, return_grad=True)
        assert_same(value, want_value, VALUE[dtype])
        assert_same(grad, want_grad, GRADIENT[dtype])


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
    for loss in LOSSES.values():
        assert torch.isnan(loss(logits.cuda(), target.cuda())).any()
    weight = torch.ones(target.shape)
    weight[0, 5, 5] = 0
    compare(LOSSES["dice_ce"], torch.float32, logits, target, weight=weight)


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


@pytest.mark.parametrize("name", FEW)
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
