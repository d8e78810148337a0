"""What every operation promises on a GPU: the caller's stream and device, graphs, no waiting, the same
bits each time, inputs untouched (MODELS.md, promises 9 and 10)."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import noisyseg_fast as nf  # noqa: E402
from noisyseg_fast import task_losses  # noqa: E402


def _loss(function, **options):
    def operation(logits, target):
        z = logits.detach().requires_grad_()
        value = function(z, target, **options)
        return value.detach(), torch.autograd.grad(value, z)[0]

    return operation


def _plain(function, **options):
    def operation(*masks):
        result = function(*masks, **options)
        return tuple(result) if isinstance(result, tuple) else (result,)

    return operation


def _logits(seed, device, shape=(4, 2, 96, 120)):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=g)
    target = torch.randint(0, 2, (shape[0], *shape[2:]), generator=g).to(torch.uint8)
    return logits.to(device), target.to(device)


def _mask(seed, device, shape=(3, 1, 96, 120)):
    g = torch.Generator().manual_seed(seed)
    return ((torch.rand(shape, generator=g) > 0.2).to(torch.uint8).to(device),)


def _pair(seed, device):
    return _mask(seed, device) + _mask(seed + 100, device)


def _volumes(seed, device):
    return _mask(seed, device, (1, 1, 40, 56, 33))


def _task(loss):
    def operation(logits, other, labels):
        terms, *grads = loss(logits, other, labels)
        return (*terms, *grads)

    return operation


def _maps(maps, scale):
    def make(seed, device):
        g = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn((3, 1, 96, 120), generator=g)
        other = scale * torch.rand((3, maps, 96, 120), generator=g)
        labels = (torch.rand((3, maps, 96, 120), generator=g) > 0.5).to(torch.uint8)
        return logits.to(device), other.to(device), labels.to(device)

    return make


# name -> (operation on tensors, maker of its inputs from a seed)
OPERATIONS = {
    "uncertainty_weighted_loss": (
        _task(lambda z, u, y: task_losses.uncertainty_weighted_loss(z, y, u, return_grad=True)),
        _maps(4, 1),
    ),
    "dual_task_loss": (
        _task(lambda z, d, y: task_losses.dual_task_loss(z, d, y, return_grad=True)),
        _maps(1, 1e-3),
    ),
    "nr_dice_loss": (_loss(nf.nr_dice_loss), _logits),
    "nr_dice_loss_large": (_loss(nf.nr_dice_loss), lambda s, d: _logits(s, d, (2, 1, 512, 512))),
    "dice_loss": (_loss(nf.dice_loss, activation="softmax"), _logits),
    "pixel_loss": (_loss(nf.pixel_loss), _logits),
    "edt": (_plain(nf.distance_transform_edt, spatial_dims=2), _mask),
    "edt_3d": (_plain(nf.distance_transform_edt, spacing=(2, 1, 0.5), spatial_dims=3), _volumes),
    "signed_distance_map": (_plain(nf.signed_distance_map, spatial_dims=2), _mask),
    "signed_distance_map_dtc": (_plain(nf.signed_distance_map, spatial_dims=3, convention="dtc"), _volumes),
    "surface_metrics": (_plain(nf.surface_metrics), _pair),
    "surface_metrics_medpy": (_plain(nf.surface_metrics, definition="medpy"), _pair),
    "overlap_metrics": (_plain(nf.overlap_metrics), _pair),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def same(first, second):
    return all(torch.equal(a, b.to(a.device)) for a, b in zip(first, second, strict=True))


@every_operation
def test_same_bits_over_100_runs_and_inputs_untouched(name):
    operation, make = OPERATIONS[name]
    inputs = make(0, "cuda")
    before = [x.clone() for x in inputs]
    first = operation(*inputs)
    for _ in range(99):
        assert same(operation(*inputs), first)
    assert same(inputs, before)


@every_operation
def test_runs_on_the_callers_stream(name):
    """The inputs are written late on a second stream: work on any other stream would read zeros."""
    operation, make = OPERATIONS[name]
    real = make(1, "cuda")
    want = operation(*real)
    late = [torch.zeros_like(x) for x in real]
    operation(*late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for x, y in zip(late, real, strict=True):
            x.copy_(y)
        got = operation(*late)
    stream.synchronize()
    assert same(got, want)


@every_operation
def test_returns_while_the_device_is_busy(name):
    """No synchronisation, neither torch's own nor ours."""
    operation, make = OPERATIONS[name]
    inputs = make(2, "cuda")
    for _ in range(3):  # kernels loaded, memory in torch's cache
        operation(*inputs)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    slept = torch.cuda.Event()
    slept.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = operation(*inputs)
        busy = not slept.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert busy
    assert same(operation(*inputs), result)


@every_operation
def test_captured_in_a_graph(name):
    """pytorch#54077, #114048: replayed with new inputs."""
    operation, make = OPERATIONS[name]
    static = [x.clone() for x in make(3, "cuda")]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            operation(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operation(*static)
    for seed in (3, 4):
        fresh = make(seed, "cuda")
        for x, y in zip(static, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        assert same(captured, operation(*fresh))


@every_operation
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_second_device(name):
    operation, make = OPERATIONS[name]
    result = operation(*make(5, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in result)
    assert same(result, operation(*make(5, "cuda:0")))


@pytest.mark.parametrize("name", [n for n in OPERATIONS if "loss" not in n])  # losses: test_losses_gpu.py
def test_survives_torch_compile(name):
    operation, make = OPERATIONS[name]
    inputs = make(6, "cuda")
    compiled = torch.compile(operation)
    for got, want in zip(compiled(*inputs), operation(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 33, 45), (1, 1, 9, 20, 31)], ids=str)
def test_dlpack_between_torch_and_cupy(shape):
    """A torch tensor seen by CuPy is the same memory: no copy on the way in."""
    cupy = pytest.importorskip("cupy")
    (mask,) = _mask(7, "cuda", shape)
    view = cupy.from_dlpack(mask)
    assert view.data.ptr == mask.data_ptr()
    got = nf.distance_transform_edt(view, spatial_dims=2)
    assert torch.equal(torch.from_dlpack(got), nf.distance_transform_edt(mask, spatial_dims=2))
