"""Fused norm + activation: values, tangents and gradients against torch's own operations, and MONAI's networks."""

from __future__ import annotations

import copy
import itertools
import pickle
import re

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.func import functional_call  # noqa: E402

from noisyseg_fast import dual_norms, fuse_dual_norms, norm_act, reference, unfuse_dual_norms  # noqa: E402
from noisyseg_fast.dual_norms import DualNorm, FusedActivation  # noqa: E402

NORMS = {"batch": {}, "eval": {}, "instance": {}, "group": {"groups": 2}, "layer": {"groups": 1}}
SLOPES = ("none", "relu", "leaky", "prelu1", "prelu")
SHAPES = [(3, 4, 5, 7), (2, 4, 3, 5, 6), (5, 4), (2, 4, 40, 37)]
LAYOUTS = ("contiguous", "channels_last", "strided")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


pytestmark = pytest.mark.usefixtures("one_thread")


def laid_out(x, layout):
    if layout == "channels_last":
        return x.contiguous(memory_format=FORMATS.get(x.dim(), torch.contiguous_format))
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]
    return x


def case(norm, slope, shape, dtype=torch.float64, layout="contiguous", affine=True, seed=0):
    """(tensors x, weight, bias, slope or None; their directions; the options)."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    c = shape[1]
    x = laid_out(2 * draw(*shape) + 3, layout)
    parameters = [draw(c), draw(c)] if affine else [None, None]
    fixed = {"none": 1.0, "relu": 0.0, "leaky": 0.1}.get(slope)
    tensors = [x, *parameters, draw(1 if slope == "prelu1" else c) if fixed is None else None]
    dots = [None if t is None else draw(*t.shape) for t in tensors]
    options = {"norm": {"eval": "batch", "layer": "group"}.get(norm, norm), **NORMS[norm]}
    if norm == "eval":
        options |= {"running_mean": draw(c) + 3, "running_var": draw(c).square() + 1, "training": False}
    if fixed is not None:
        options["slope"] = fixed
    return tensors, dots, options


def call(function, tensors, options):
    x, weight, bias, slope = tensors
    return function(x, weight, bias, **options, **({} if slope is None else {"slope": slope}))


def tangents(function, tensors, dots, options):
    with torch.no_grad(), forward_ad.dual_level():
        duals = [
            t if t is None or d is None else forward_ad.make_dual(t, d)
            for t, d in zip(tensors, dots, strict=True)
        ]
        return tuple(forward_ad.unpack_dual(call(function, duals, options)))


def gradients(function, tensors, options, cotangent, **kwargs):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = call(function, leaves, options)
    return torch.autograd.grad(y, [t for t in leaves if t is not None], cotangent, **kwargs)


def close(a, b, tolerance):
    assert a.shape == b.shape and a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (1 + float(b.abs().max())))


# ---- values and first derivatives -----------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("slope", SLOPES)
def test_equals_torch(norm, slope):
    for shape, layout, dtype, affine in itertools.product(SHAPES, LAYOUTS, TOLERANCE, (True, False)):
        if norm == "instance" and len(shape) == 2:
            continue
        tensors, dots, options = case(norm, slope, shape, dtype, layout, affine)
        tolerance = TOLERANCE[dtype]
        close(call(norm_act, tensors, options), call(reference.norm_act, tensors, options), tolerance)
        cotangent = torch.cos(torch.arange(tensors[0].numel(), dtype=dtype)).reshape(shape)
        if dtype == torch.float32:  # a pixel whose sign the rounding decides has either derivative
            before = call(reference.norm_act, [*tensors[:3], None], {**options, "slope": 1.0})
            cotangent[before.abs() < 1e-4] = 0
        ours, wanted = (tangents(f, tensors, dots, options) for f in (norm_act, reference.norm_act))
        close(ours[0], wanted[0], tolerance)
        close(ours[1] * (cotangent != 0), wanted[1] * (cotangent != 0), tolerance)
        for a, b in zip(
            *(gradients(f, tensors, options, cotangent) for f in (norm_act, reference.norm_act)), strict=True
        ):
            close(a, b, 10 * tolerance)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("slope", SLOPES)
def test_jvp_of_torch_func_and_the_formula(norm, slope):
    tensors, dots, options = case(norm, slope, (3, 4, 5, 7))
    given_ = [i for i in range(4) if tensors[i] is not None]

    def of(function):
        def value(*args):
            return call(function, [dict(zip(given_, args, strict=True)).get(i) for i in range(4)], options)

        return torch.func.jvp(value, tuple(tensors[i] for i in given_), tuple(dots[i] for i in given_))

    ours, wanted = of(norm_act), of(reference.norm_act)
    formula = reference.norm_act_jvp(
        *(v for pair in zip(tensors[:3], dots[:3], strict=True) for v in pair),
        slope=options.get("slope", tensors[3]),
        slope_dot=dots[3],
        **{k: v for k, v in options.items() if k != "slope"},
    )
    for a, b, c in zip(ours, wanted, formula, strict=True):
        close(a, b, 1e-12)
        close(c, b, 1e-12)


@pytest.mark.parametrize("some", range(4))
def test_a_direction_of_one_input_alone(some):
    tensors, dots, options = case("batch", "prelu", (3, 4, 5, 7))
    dots = [d if i == some else None for i, d in enumerate(dots)]
    ours, wanted = (tangents(f, tensors, dots, options)[1] for f in (norm_act, reference.norm_act))
    close(ours, wanted, 1e-12)


def test_efficient_zero_tangents():
    tensors, dots, options = case("batch", "relu", (3, 4, 5, 7))
    x_dot = torch._efficientzerotensor(tensors[0].shape, dtype=torch.float64)
    ours, wanted = (
        tangents(f, tensors, [x_dot, *dots[1:]], options)[1] for f in (norm_act, reference.norm_act)
    )
    close(ours, wanted, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_computed_in_float(dtype, layout, norm):
    tensors, dots, options = case(norm, "prelu", (3, 8, 33, 5), torch.float32)
    low = [laid_out(tensors[0].to(dtype), layout), *tensors[1:]]
    high = [low[0].float(), *tensors[1:]]
    dots = [dots[0].to(dtype), *dots[1:]]
    ours = tangents(norm_act, low, dots, options)
    wanted = tangents(norm_act, high, [dots[0].float(), *dots[1:]], options)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))
    cotangent = torch.ones_like(low[0])
    ours = gradients(norm_act, low, options, cotangent)
    wanted = gradients(norm_act, high, options, cotangent.float())
    for a, b, t in zip(ours, wanted, low, strict=True):
        assert a.dtype == t.dtype
        torch.testing.assert_close(a, b.to(t.dtype), rtol=1e-2, atol=1e-2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.lists(st.integers(1, 70), min_size=0, max_size=2),
    st.sampled_from(sorted(NORMS)),
    st.sampled_from(SLOPES),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape(batch, channels, size, norm, slope, layout, tangent_strided, seed):
    if norm == "group":
        channels *= 2
    if norm == "instance" and not size:
        size = [2]
    shape = (batch, channels, *size)
    tensors, dots, options = case(norm, slope, shape, layout=layout, seed=seed)
    if tangent_strided:
        dots[0] = laid_out(dots[0], "strided")
    try:
        wanted = tangents(reference.norm_act, tensors, dots, options)
    except ValueError as error:  # a single value
        with pytest.raises(ValueError, match=re.escape(str(error))):
            call(norm_act, tensors, options)
        return
    for a, b in zip(tangents(norm_act, tensors, dots, options), wanted, strict=True):
        close(a, b, 1e-9)
    cotangent = torch.cos(torch.arange(tensors[0].numel(), dtype=torch.float64)).reshape(shape)
    for a, b in zip(
        *(gradients(f, tensors, options, cotangent) for f in (norm_act, reference.norm_act)), strict=True
    ):
        close(a, b, 1e-9)


@pytest.mark.parametrize("shape", [(70, 3, 4, 4), (5, 2), (33, 5, 1, 1), (40, 3, 7, 9), (2, 300, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_batch_norm_of_small_images(shape, dtype):
    """Several images of a channel make a row, and more than one row."""
    tensors, dots, options = case("batch", "prelu", shape)
    low = [t if t is None else t.to(dtype) for t in tensors]
    high = [t if t is None else t.double() for t in low]
    directions = [dots[0].to(dtype), *dots[1:]]
    close_by = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2}[dtype]
    wanted = tangents(reference.norm_act, high, [d if d is None else d.double() for d in directions], options)
    for a, b in zip(tangents(norm_act, low, directions, options), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=close_by, atol=close_by)
    cotangent = torch.cos(torch.arange(low[0].numel())).reshape(shape)
    wanted = gradients(reference.norm_act, high, options, cotangent.double())
    for a, b in zip(gradients(norm_act, low, options, cotangent.to(dtype)), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=close_by, atol=20 * close_by)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_means_keep_their_digits(layout):
    g = torch.Generator().manual_seed(0)
    x = laid_out(torch.randn((4, 3, 64, 64), generator=g) + 1000, layout)
    x_dot = torch.randn(x.shape, generator=g) + 100
    ours = tangents(norm_act, [x, None, None, None], [x_dot, None, None, None], {})
    wanted = tangents(
        reference.norm_act, [x.double(), None, None, None], [x_dot.double(), None, None, None], {}
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5)


def test_a_constant_image_and_infinities():
    x = torch.full((2, 3, 8, 8), 5.0)
    assert torch.equal(norm_act(x, slope=0.0), torch.zeros_like(x))
    x[0, 1, 2, 3] = torch.inf
    y = norm_act(x, slope=0.0)
    assert y[:, 1].isnan().all() and (y[:, 0] == 0).all()
    ones, zeros = torch.ones(3), torch.zeros(3)
    x[0, 0, 0, 0], x[0, 2, 0, 0] = -torch.inf, torch.nan
    y = norm_act(x, running_mean=zeros, running_var=ones, training=False, slope=0.0)
    assert y[0, 0, 0, 0] == 0 and y[0, 1, 2, 3] == torch.inf and y[0, 2, 0, 0].isnan()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (2, 3, 40, 50)])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_squares_beyond_float32(norm, shape, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[0, 1, 2, 3], x[1, 0, 0, 0] = 1e30, -3e38
    x, x_dot = laid_out(x, layout), laid_out(torch.randn(shape), layout)
    options = {"norm": norm}
    ours = tangents(norm_act, [x, None, None, None], [x_dot, None, None, None], options)
    wide = [x.double(), None, None, None], [x_dot.double(), None, None, None]
    for a, b in zip(ours, tangents(reference.norm_act, *wide, options), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_infinite_weight_times_what_it_weighs(layout):
    """By the definition: torch's own kernels multiply the mean by the weight first, and may give NaN."""
    x = laid_out(torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0)), layout)
    weight = torch.tensor([torch.inf, -torch.inf, 1.0])
    plain, y = norm_act(x), norm_act(x, weight)
    assert torch.equal(y, plain * weight[:, None, None]) and y[:, :2].isinf().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 300, 301), (1, 48, 40, 41)])
@pytest.mark.parametrize("norm", ["batch", "instance", "layer"])
def test_same_bits_with_any_number_of_threads(layout, shape, norm):
    tensors, dots, options = case(norm, "prelu", shape, torch.float32, layout)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(
                (*tangents(norm_act, tensors, dots, options), *gradients(norm_act, tensors, options, dots[0]))
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_inputs_are_not_written_to():
    tensors, dots, options = case("batch", "prelu", (3, 4, 5, 7))
    before = [t.clone() for t in (*tensors, *dots)]
    tangents(norm_act, tensors, dots, options)
    gradients(norm_act, tensors, options, dots[0])
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, *dots), strict=True))


# ---- gradients of higher order, transforms --------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("slope", ["none", "leaky", "prelu"])
def test_gradcheck(norm, slope):
    tensors, _, options = case(norm, slope, (2, 2, 3, 2))
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def value(*args):
        return call(norm_act, [*args, *([None] * (4 - len(args)))], options)

    assert torch.autograd.gradcheck(value, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(value, leaves)


def test_forward_over_reverse_is_the_double_backward():
    tensors, dots, options = case("batch", "leaky", (3, 4, 5, 7))

    def loss(x, weight, bias, function):
        return call(function, [x, weight, bias, None], options).pow(3).mean()

    def product(function):
        leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(leaves, dots[:3], strict=True)]
            grads = torch.autograd.grad(loss(*duals, function), duals)
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    grads = torch.autograd.grad(loss(*leaves, reference.norm_act), leaves, create_graph=True)
    wanted = torch.autograd.grad(sum((g * d).sum() for g, d in zip(grads, dots[:3], strict=True)), leaves)
    for a, b in zip(product(norm_act), wanted, strict=True):
        close(a, b, 1e-11)


def test_torch_func_transforms():
    tensors, dots, options = case("group", "relu", (3, 4, 5, 7))
    x, w, b, _ = tensors

    def of(function):
        def loss(x, w):
            return (function(x, w, b, **options) ** 2 * dots[0]).sum()

        return (
            torch.func.grad(loss, (0, 1))(x, w),
            torch.func.vjp(loss, x, w)[1](torch.ones((), dtype=x.dtype)),
            torch.func.jvp(torch.func.grad(loss), (x, w), (dots[0], dots[1])),
            torch.func.grad(lambda w: torch.func.jvp(lambda x: loss(x, w), (x,), (dots[0],))[1])(w),
            torch.func.vmap(lambda x: function(x, w, b, **options))(torch.stack([x, 2 * x])),
            torch.func.jacfwd(lambda w: loss(x, w))(w),
        )

    ours, wanted = (torch.utils._pytree.tree_leaves(of(f)) for f in (norm_act, reference.norm_act))
    for a, c in zip(ours, wanted, strict=True):
        close(a, c, 1e-11)


def test_batched_gradients():
    tensors, _, options = case("batch", "relu", (3, 4, 5, 7))
    cotangents = torch.randn(3, 3, 4, 5, 7, dtype=torch.float64)
    ours, wanted = (
        gradients(f, tensors, options, cotangents, is_grads_batched=True)
        for f in (norm_act, reference.norm_act)
    )
    for a, b in zip(ours, wanted, strict=True):
        close(a, b, 1e-12)


def test_compiled():
    tensors, dots, options = case("batch", "relu", (3, 4, 5, 7))
    compiled = torch.compile(norm_act, backend="aot_eager", fullgraph=True)
    close(call(compiled, tensors, options), call(reference.norm_act, tensors, options), 1e-12)

    def along(x, x_dot):
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(norm_act(forward_ad.make_dual(x, x_dot), **options)))

    ours = torch.compile(along, backend="eager")(tensors[0], dots[0])
    wanted = tangents(
        reference.norm_act, [tensors[0], None, None, None], [dots[0], None, None, None], options
    )
    for a, b in zip(ours, wanted, strict=True):
        close(a, b, 1e-12)


def kernel_calls(monkeypatch):
    calls = []
    for name in ("norm_forward", "norm_backward"):
        plain = getattr(dual_norms._core, name)

        def counted(*args, name=name, plain=plain):
            calls.append(name)
            return plain(*args)

        monkeypatch.setattr(dual_norms._core, name, counted, raising=False)
    return calls


def test_what_runs_in_the_kernels(monkeypatch):
    calls = kernel_calls(monkeypatch)
    tensors, dots, options = case("batch", "relu", (3, 4, 5, 7))

    def runs(action):
        calls.clear()
        action()
        return list(calls)

    cotangent = torch.ones_like(tensors[0])
    assert runs(lambda: call(norm_act, tensors, options)) == ["norm_forward"]
    assert runs(lambda: tangents(norm_act, tensors, dots, options)) == ["norm_forward"]
    assert runs(lambda: gradients(norm_act, tensors, options, cotangent)) == ["norm_forward", "norm_backward"]
    assert runs(lambda: gradients(norm_act, tensors, options, cotangent, create_graph=True)) == [
        "norm_forward"
    ]
    assert (
        runs(lambda: torch.func.jvp(lambda x: norm_act(x, **options), (tensors[0],), (dots[0],)))
        == ["norm_forward"] * 2
    )


# ---- running statistics, modules ------------------------------------------------------------------


def pair(norm, act):
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, act).double()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "affine": False}])
def test_running_statistics(options):
    plain = pair(nn.BatchNorm2d(4, **options), nn.ReLU())
    fused = fuse_dual_norms(copy.deepcopy(plain))
    for seed in range(3):
        x = torch.randn(5, 2, 7, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        version = fused[1].running_mean._version
        close(fused(x), plain(x), 1e-12)
        assert fused[1].running_mean._version > version
        with torch.no_grad(), forward_ad.dual_level():
            for net in (plain, fused):
                net(forward_ad.make_dual(x, x))
        for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, msg=name)
    for net in (plain, fused):
        net.eval()
    state = copy.deepcopy(fused.state_dict())
    close(fused(x), plain(x), 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), fused.state_dict().values(), strict=True))


def test_a_backward_with_graph_leaves_running_statistics_alone():
    net = fuse_dual_norms(pair(nn.BatchNorm2d(4), nn.ReLU()))
    y = net(torch.randn(5, 2, 7, 6, dtype=torch.float64))
    state = copy.deepcopy(net.state_dict())
    torch.autograd.grad(y.sum(), list(net.parameters()), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))


def test_batch_norm_without_running_statistics_and_tracking_instance_norm():
    x = torch.randn(5, 2, 7, 6, dtype=torch.float64)
    for norm in (
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    ):
        plain = pair(norm, nn.LeakyReLU(0.2))
        fused = fuse_dual_norms(copy.deepcopy(plain))
        for training in (True, False):
            close(fused.train(training)(x), plain.train(training)(x), 1e-12)
        assert all(
            torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in (plain, fused)), strict=True)
        )


BATCH, GROUP = ("batch", {}), ("group", {"num_groups": 2})
LEAKY = ("leakyrelu", {"negative_slope": 0.1, "inplace": True})
DYNAMIC = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 4, 8]}
MONAI = {  # name -> class, spatial dimensions, other arguments
    "UNet": ("UNet", 2, {"channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 2}),
    "UNet, dropout 0": (
        "UNet",
        3,
        {"channels": (4, 8), "strides": (2,), "norm": BATCH, "act": "relu", "dropout": 0.0},
    ),
    "UNet, dropout": ("UNet", 2, {"channels": (4, 8), "strides": (2,), "norm": BATCH, "dropout": 0.3}),
    "BasicUNet": ("BasicUNet", 2, {"features": (4, 4, 8, 8, 8, 4), "norm": BATCH, "act": LEAKY}),
    "SegResNet": (
        "SegResNet",
        3,
        {"init_filters": 4, "norm": GROUP, "blocks_down": (1, 1), "blocks_up": (1,)},
    ),
    "DynUNet": ("DynUNet", 2, DYNAMIC),
    "DynUNet, residual": ("DynUNet", 2, {**DYNAMIC, "res_block": True, "norm_name": GROUP}),
}


def monai_net(name):
    nets = pytest.importorskip("monai.networks.nets")
    kind, dims, arguments = MONAI[name]
    return getattr(nets, kind)(spatial_dims=dims, in_channels=1, out_channels=2, **arguments), dims


def whole_tangent(net, x, directions):
    torch.manual_seed(3)
    with torch.no_grad(), forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p.detach(), directions[n]) for n, p in net.named_parameters()}
        return tuple(forward_ad.unpack_dual(functional_call(net, duals, (x,))))


@pytest.mark.parametrize("name", MONAI)
def test_monai_networks(name):
    torch.manual_seed(0)
    plain, dims = monai_net(name)
    plain = plain.double()
    fused = copy.deepcopy(plain)
    assert fuse_dual_norms(fused) is fused
    assert list(fused.state_dict()) == list(plain.state_dict())
    kinds = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm)
    norms = [m for m in fused.modules() if isinstance(m, kinds)]
    assert norms and all(isinstance(m, DualNorm) for m in norms)
    joined = sum("_dual_activation" in m.__dict__ for m in norms)
    assert joined == len(norms) or name == "DynUNet, residual"
    x = torch.randn(2, 1, *[16] * dims, dtype=torch.float64)
    directions = {n: torch.randn_like(p) for n, p in plain.named_parameters()}
    for training in (True, False):
        for net in (plain, fused):
            net.train(training)
        torch.manual_seed(1)
        grads = []
        for net in (plain, fused):
            torch.manual_seed(1)
            y = net(x)
            parameters = [p for p in net.parameters() if p.requires_grad]
            grads.append((y, *torch.autograd.grad(y.pow(2).mean(), parameters, materialize_grads=True)))
        for a, b in zip(*grads, strict=True):
            close(b, a, 1e-10)
        for a, b in zip(*(whole_tangent(n, x, directions) for n in (plain, fused)), strict=True):
            close(b, a, 1e-10)
    fresh = monai_net(name)[0].double()
    fresh.load_state_dict(fused.state_dict())
    fused.load_state_dict(fresh.state_dict())
    again = pickle.loads(pickle.dumps(copy.deepcopy(fused))).eval()
    close(again(x), plain.eval()(x), 1e-12)
    assert [type(m) for m in unfuse_dual_norms(fused).modules()] == [type(m) for m in plain.modules()]
    close(fused.eval()(x), plain(x), 1e-12)


def test_parameters_are_shared_and_stay_trainable():
    net = pair(nn.InstanceNorm2d(4, affine=True), nn.PReLU(4))
    before = dict(net.named_parameters())
    fuse_dual_norms(net)
    assert all(p is before[n] for n, p in net.named_parameters()) and len(before) == 5
    net.load_state_dict({n: torch.randn_like(p) for n, p in before.items()}, assign=True)
    slope = net[2].weight
    unfuse_dual_norms(net)
    assert type(net[2]) is nn.PReLU and net[2].weight is slope and type(net[1]) is nn.InstanceNorm2d


def test_only_pairs_are_joined():
    shared = nn.BatchNorm2d(4)
    net = nn.ModuleDict(
        {
            "gelu": nn.Sequential(nn.BatchNorm2d(4), nn.GELU(), nn.ReLU()),
            "identity": nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.Dropout(0.5), nn.ReLU()),
            "shared": nn.Sequential(shared, nn.ReLU()),
            "shared too": nn.Sequential(shared, nn.Sigmoid()),
            "first": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
            "layer": nn.Sequential(nn.LayerNorm(4), nn.ReLU()),
        }
    )
    fuse_dual_norms(fuse_dual_norms(net))
    where = {n for n, m in net.named_modules() if isinstance(m, FusedActivation)}
    assert where == {"identity.3"}
    assert {n for n, m in net.named_modules() if isinstance(m, DualNorm)} == {
        "gelu.0",
        "identity.0",
        "shared.0",
        "first.1",
    }
    assert "ReLU" in repr(net["identity"])


def test_hooks_see_what_they_saw():
    for hooked in (1, 2):
        net = pair(nn.BatchNorm2d(4), nn.ReLU())
        net[hooked].register_forward_hook(lambda *_: None)
        fuse_dual_norms(net)
        assert type(net[2]) is nn.ReLU
        assert isinstance(net[1], DualNorm) == (hooked == 2)
    net, seen = fuse_dual_norms(pair(nn.BatchNorm2d(4), nn.ReLU())), []
    x = torch.randn(5, 2, 7, 6, dtype=torch.float64)
    y = net(x)
    net[1].register_forward_hook(lambda _, __, output: seen.append(output))  # later: then nothing is joined
    close(net(x), y, 1e-12)
    assert (seen[0] < 0).any() and not (y < 0).any()


def test_a_dropout_between_is_obeyed():
    net = nn.Sequential(nn.InstanceNorm2d(4), nn.Dropout(0.5), nn.PReLU()).double()
    plain, x = copy.deepcopy(net), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    fuse_dual_norms(net)
    for training in (True, False):
        results = []
        for n in (net.train(training), plain.train(training)):
            torch.manual_seed(0)
            results.append(n(x))
        close(*results, 1e-12)
    assert (net.eval()[0](x) == net(x)).all()


def test_an_unbatched_image_of_instance_norm():
    plain = nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.ReLU()).double()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    close(fuse_dual_norms(copy.deepcopy(plain))(x), plain(x), 1e-12)


def test_autocast_and_inference_mode():
    plain = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    fused, x = fuse_dual_norms(copy.deepcopy(plain)), torch.randn(4, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ours, wanted = fused(x), plain(x)
        assert ours.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2)
        with torch.no_grad(), forward_ad.dual_level():
            for net, results in ((fused, ours := []), (plain, wanted := [])):
                results += forward_ad.unpack_dual(net(forward_ad.make_dual(x, x)))
        torch.testing.assert_close(ours[1].float(), wanted[1].float(), rtol=0.1, atol=0.05)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


# ---- errors ---------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("error", "says", "action"),
    [
        (TypeError, "x must be a torch tensor, not list", lambda: norm_act([1])),
        (ValueError, r"x must be \(B, C, \*S\), got shape \(3,\)", lambda: norm_act(X[0, 0, 0])),
        (TypeError, "x must be floating, got torch.int64", lambda: norm_act(X.long())),
        (ValueError, "norm must be one of batch, instance, group", lambda: norm_act(X, norm="layer")),
        (ValueError, "groups must divide the 4 channels", lambda: norm_act(X, norm="group", groups=3)),
        (ValueError, r"weight has shape \(3,\); x has 4 channels", lambda: norm_act(X, X[0, 0, 0])),
        (ValueError, r"slope has shape \(3,\); pass \(1,\) or \(4,\)", lambda: norm_act(X, slope=X[0, 0, 0])),
        (TypeError, "slope must be a number or a tensor, not str", lambda: norm_act(X, slope="relu")),
        (ValueError, "both or neither", lambda: norm_act(X, running_mean=torch.zeros(4))),
        (ValueError, "training=False needs running_mean", lambda: norm_act(X, training=False)),
        (ValueError, "eps must be >= 0, got -1", lambda: norm_act(X, eps=-1)),
        (ValueError, "Expected more than 1 value per channel", lambda: norm_act(X[:1, :, :1, :1])),
        (ValueError, "Expected more than 1 spatial", lambda: norm_act(X[..., :1, :1], norm="instance")),
        (TypeError, "net must be an nn.Module, not list", lambda: fuse_dual_norms([])),
        (TypeError, "net must be an nn.Module, not list", lambda: unfuse_dual_norms([])),
        (
            ValueError,
            "expected 4D input",
            lambda: fuse_dual_norms(nn.BatchNorm2d(4))(X[0]),
        ),
    ],
)
def test_errors(error, says, action):
    with pytest.raises(error, match=says):
        action()


def test_an_empty_batch_is_torchs_business():
    x = torch.zeros(0, 4, 3, 3)
    assert norm_act(x, slope=0.0).shape == x.shape


def test_more_axes_than_the_kernels_know():
    x = torch.randn(2, 4, 2, 3, 1, 1, 1, 1, 1)
    torch.testing.assert_close(
        norm_act(x, norm="group", groups=2), norm_act(x.flatten(2), norm="group", groups=2).view_as(x)
    )
