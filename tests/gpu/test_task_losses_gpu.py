"""The losses of several maps: CUDA against the CPU, values, gradients and second derivatives."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast.task_losses import dual_task_loss, uncertainty_weighted_loss  # noqa: E402

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(8, 64, 64), (2, 33, 47), (1, 17, 30, 11), (3, 1, 7), (2, 100_003)]
# relative to the largest value: the arithmetic's own rounding, and for gradients the storage's
VALUE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-6}
GRADIENT = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def uncertainty(a, b, labels, **options):
    return uncertainty_weighted_loss(a, labels, b, **options)


# name -> (loss of logits, the other input and the labels; maps; options of one image or one value)
LOSSES = {
    "uncertainty": (uncertainty, 4, {}),
    "uncertainty_image": (uncertainty, 3, {"reduction": "image", "entropy": "binary"}),
    "one_rater": (uncertainty, 1, {"reduction": "sum", "consistency_weight": 0.1}),
    "dual_task": (dual_task_loss, 1, {}),
    "dual_task_shared": (dual_task_loss, 1, {"routing": "shared", "labelled": 1}),
    "dual_task_image": (dual_task_loss, 1, {"per_image": True, "reduction": "image", "routing": "sdf"}),
}


def case(name, shape, dtype=torch.float32, label=torch.uint8, seed=0):
    g = torch.Generator().manual_seed(seed)
    maps = LOSSES[name][1]
    several = (shape[0], maps, *shape[1:])
    logits = (3 * torch.randn((shape[0], 1, *shape[1:]), generator=g)).to(dtype)
    other = torch.rand(several, generator=g)
    if name.startswith("dual"):
        other = (other - 0.5) / 200
    labels = torch.rand(several, generator=g)
    labels = labels if label.is_floating_point else labels > 0.6
    mask = torch.rand(shape, generator=g) > 0.2
    return logits, other.to(dtype), labels.to(label), mask


def total(terms, name):
    """Of the differentiable terms, no two of equal weight."""
    parts = terms[: 3 if name.startswith("dual") else 4]
    return sum((0.3 + i) * x.sum() for i, x in enumerate(parts))


def values_and_grads(name, logits, other, labels, **extra):
    function, _, options = LOSSES[name]
    leaves = [x.detach().requires_grad_() for x in (logits, other)]
    terms = function(*leaves, labels, **options, **extra)
    grads = torch.autograd.grad(total(terms, name), leaves)
    return [x.detach() for x in terms], grads


def assert_same(cuda, cpu, tolerance):
    cuda, cpu = cuda.cpu().double(), cpu.double()
    assert cuda.shape == cpu.shape
    assert torch.equal(torch.isfinite(cuda), torch.isfinite(cpu))
    scale = float(cpu.abs().max()) if cpu.numel() else 0.0
    torch.testing.assert_close(cuda, cpu, rtol=0, atol=tolerance * scale + 1e-12, equal_nan=True)


def compare(name, dtype, *tensors, **extra):
    device = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
    values, grads = values_and_grads(name, *(x.cuda() for x in tensors), **device)
    want, want_grads = values_and_grads(name, *tensors, **extra)
    assert values[0].device.type == "cuda"
    for a, b in zip(values, want, strict=True):
        assert a.dtype == b.dtype
        assert_same(a, b, VALUE[dtype])
    for a, b in zip(grads, want_grads, strict=True):
        assert a.dtype == b.dtype
        assert_same(a, b, GRADIENT[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_equal_the_cpu(name, shape, dtype):
    logits, other, labels, mask = case(name, shape, dtype)
    compare(name, dtype, logits, other, labels)
    compare(name, dtype, logits, other, labels, mask=mask)


@pytest.mark.small
@pytest.mark.parametrize(
    "label", [torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_every_dtype(name, label):
    logits, other, labels, mask = case(name, (2, 19, 23), label=label)
    compare(name, torch.float32, logits, other, labels, mask=mask)


@pytest.mark.small
def test_raters_and_labelled_images():
    logits, other, labels, mask = case("uncertainty", (3, 19, 23))
    raters = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0.5, 2, 0, 1]])
    compare("uncertainty", torch.float32, logits, other, labels, mask=mask, raters=raters)
    logits, other, labels, mask = case("dual_task", (3, 19, 23))
    compare(
        "dual_task",
        torch.float32,
        logits,
        other,
        labels,
        mask=mask,
        labelled=torch.tensor([True, False, True]),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_strides_and_channels_last(name):
    logits, other, labels, _ = case(name, (2, 40, 56))
    values, grads = values_and_grads(name, logits, other, labels)
    for change in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5],
    ):
        got, got_grads = values_and_grads(name, *(change(x.cuda()) for x in (logits, other, labels)))
        for a, b in zip(got, values, strict=True):
            assert_same(a, b, VALUE[torch.float32])
        for a, b in zip(got_grads, grads, strict=True):
            assert_same(a, b, GRADIENT[torch.float32])


@pytest.mark.small
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives(name):
    function, _, options = LOSSES[name]
    logits, other, labels, _ = case(name, (2, 9, 11), torch.float64)

    def products(device):
        z, u, y = (x.to(device) for x in (logits, other, labels))
        direction = (torch.ones_like(z), 0.01 * torch.ones_like(u))
        run = lambda a, b: total(function(a, b, y, **options), name)  # noqa: E731
        forward = torch.func.jvp(run, (z, u), direction)
        mixed = torch.func.jvp(torch.func.grad(run, (0, 1)), (z, u), direction)
        leaves = [x.requires_grad_() for x in (z, u)]
        first = torch.autograd.grad(run(*leaves), leaves, create_graph=True)
        double = torch.autograd.grad(
            sum((a * b).sum() for a, b in zip(first, direction, strict=True)), leaves
        )
        return [*forward, *mixed[0], *mixed[1], *double]

    for a, b in zip(products("cuda"), products("cpu"), strict=True):
        assert_same(a.detach(), b.detach(), 1e-10)


@pytest.mark.small
@pytest.mark.parametrize("name", LOSSES)
def test_empty_batch_and_everything_masked(name):
    logits, other, labels, mask = case(name, (2, 8, 8))
    compare(name, torch.float32, logits, other, labels, mask=torch.zeros_like(mask))
    if name != "dual_task_shared":
        compare(name, torch.float32, logits[:0], other[:0], labels[:0])
    compare(name, torch.float32, logits[..., :0], other[..., :0], labels[..., :0])


def test_faults_give_nan():
    logits, other, labels, _ = (x.cuda() for x in case("uncertainty", (2, 8, 8)))
    bad = labels.clone()
    bad[1, 2, 3, 4] = 2
    assert torch.isnan(uncertainty_weighted_loss(logits, bad, other).total)
    assert torch.isnan(
        uncertainty_weighted_loss(logits, labels, other, raters=-torch.ones(2, 4).cuda()).total
    )
    assert torch.isnan(dual_task_loss(logits, other[:, :1], bad[:, 2:3]).seg)


@pytest.mark.parametrize("name", ["uncertainty", "dual_task"])
def test_autocast_gives_float32(name):
    logits, other, labels, _ = (x.cuda() for x in case(name, (2, 32, 32)))
    convolution = torch.nn.Conv2d(1, 1, 1).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        z = convolution(logits)
        terms = LOSSES[name][0](z, other, labels)
    assert z.dtype == torch.bfloat16
    assert terms[0].dtype == torch.float32
    total(terms, name).backward()
    assert torch.isfinite(convolution.weight.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_without_graph_break(name):
    function, _, options = LOSSES[name]
    logits, other, labels, _ = (x.cuda() for x in case(name, (2, 40, 40)))
    run = lambda a, b: total(function(a, b, labels, **options), name)  # noqa: E731
    results = []
    for f in (run, torch.compile(run, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (logits, other)]
        value = f(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for a, b in zip(*results, strict=True):
        assert_same(a, b.cpu(), 1e-6)


@pytest.mark.parametrize("name", ["uncertainty", "dual_task"])
def test_return_grad_in_a_cuda_graph(name):
    logits, other, labels, _ = (x.cuda() for x in case(name, (2, 40, 40)))
    function = LOSSES[name][0]
    function(logits, other, labels, return_grad=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms, *grads = function(logits, other, labels, return_grad=True)
    logits.copy_(case(name, (2, 40, 40), seed=1)[0])
    graph.replay()
    want, *want_grads = function(logits, other, labels, return_grad=True)
    for a, b in zip((*terms, *grads), (*want, *want_grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_cupy_equals_torch(name):
    cupy = pytest.importorskip("cupy")
    function, _, options = LOSSES[name]
    logits, other, labels, _ = case(name, (2, 40, 40))
    terms = function(*(cupy.asarray(x.numpy()) for x in (logits, other, labels)), **options)
    want = function(*(x.cuda() for x in (logits, other, labels)), **options)
    for a, b in zip(terms, want, strict=True):
        assert type(a).__module__.startswith("cupy")
        np.testing.assert_array_equal(cupy.asnumpy(a), b.cpu().numpy())


def test_more_than_two_to_the_31_pixels(room):
    """32-bit indices: only the last pixel is labelled, and p = t = 1/2 everywhere."""
    room(40)
    n = 2**31 + 1027
    logits = torch.zeros((1, 1, n), dtype=torch.bfloat16, device="cuda", requires_grad=True)
    sdf = torch.zeros((1, 1, n), dtype=torch.bfloat16, device="cuda", requires_grad=True)
    target = torch.zeros((1, n), dtype=torch.uint8, device="cuda")
    target[0, -1] = 1
    seg, mask, consistency = dual_task_loss(logits, sdf, target)
    dice = 1 - 1 / (0.25 * n + 1)
    assert float(seg) == pytest.approx(0.5 * (np.log(2) + dice), rel=1e-5)
    assert float(mask) == pytest.approx(dice, rel=1e-5)
    assert float(consistency) == 0
    by_logits, by_sdf = torch.autograd.grad(seg + mask, (logits, sdf))
    assert float(by_logits[0, 0, -1]) < 0 < float(by_logits[0, 0, -2])
    assert float(by_sdf[0, 0, -1]) > 0
    assert float(by_logits[0, 0, 0]) == float(by_logits[0, 0, -2])
