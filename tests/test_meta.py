"""The per-pixel meta-gradient against differentiating through the step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from noisyseg_fast import meta
from noisyseg_fast.meta import pixel_meta_gradient, unroll_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*has no state yet")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NORMS = {
    "batch": lambda n, d: (nn.BatchNorm2d if d == 2 else nn.BatchNorm3d)(n),
    "instance": lambda n, d: (nn.InstanceNorm2d if d == 2 else nn.InstanceNorm3d)(n, affine=True),
    "group": lambda n, d: nn.GroupNorm(2, n),
    "layer": lambda n, d: nn.GroupNorm(1, n),
}


def make_net(norm="batch", dims=2, channels=2, dtype=torch.float64, extra=()):
    torch.manual_seed(0)
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    return nn.Sequential(
        conv(1, 4, 3, padding=1), NORMS[norm](4, dims), nn.ReLU(), *extra, conv(4, channels, 1)
    ).to(dtype)


def make_data(dims=2, channels=2, dtype=torch.float64, batch=3, edge=6):
    torch.manual_seed(1)
    S = (edge,) * dims
    x, x_clean = torch.randn(batch, 1, *S, dtype=dtype), torch.randn(2, 1, *S, dtype=dtype)
    top = max(channels, 2)
    y, y_clean = torch.randint(0, top, (batch, *S)), torch.randint(0, top, (2, *S))
    return x, y, torch.rand(batch, *S, dtype=dtype), x_clean, y_clean


def error(a, b):
    pairs = zip(a, b, strict=True) if isinstance(a, (list, tuple)) else [(a, b)]
    return max(float((p - q).abs().max() / q.abs().max().clamp_min(1e-300)) for p, q in pairs)


def warm(net, optimizer, data):
    for _ in range(2):
        optimizer.zero_grad()
        meta.cross_entropy_map(net(data[0]), data[1]).mean().backward()
        optimizer.step()
    return optimizer


def groups(net):
    first, *rest = net.parameters()
    return [{"params": [first], "lr": 0.05}, {"params": rest, "weight_decay": 0.0}]


OPT = torch.optim
UPDATES = {
    "float": lambda net: 0.1,
    "sgd": lambda net: OPT.SGD(net.parameters(), 0.1),
    "momentum": lambda net: OPT.SGD(net.parameters(), 0.1, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "nesterov": lambda net: OPT.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True),
    "maximize": lambda net: OPT.SGD(net.parameters(), 0.1, momentum=0.9, maximize=True),
    "adam": lambda net: OPT.Adam(net.parameters(), 0.01, weight_decay=0.1),
    "adam maximize": lambda net: OPT.Adam(net.parameters(), 0.01, maximize=True),
    "amsgrad": lambda net: OPT.Adam(net.parameters(), 0.01, amsgrad=True),
    "adamw": lambda net: OPT.AdamW(net.parameters(), 0.01, weight_decay=0.1),
    "rmsprop": lambda net: OPT.RMSprop(net.parameters(), 0.01, weight_decay=0.1, maximize=True),
    "rmsprop centered": lambda net: OPT.RMSprop(net.parameters(), 0.01, centered=True, momentum=0.9),
    "groups": lambda net: OPT.SGD(groups(net), 0.1, momentum=0.5, weight_decay=0.1),
    "function": lambda net: lambda p, g, s: {n: p[n] - s * g[n] / (1 + g[n] ** 2) for n in p},
}


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("name", UPDATES)
def test_equals_unroll_for_every_update(name, clip):
    net, data = make_net(), make_data()
    update = UPDATES[name](net)
    if isinstance(update, OPT.Optimizer):
        warm(net, update, data)
    options = {"clip_grad_norm": clip, "state": 0.3}
    before = copy.deepcopy((net.state_dict(), update.state_dict() if hasattr(update, "state_dict") else 0))
    for K in (1, 2):
        x, y, R, *clean = data
        args = (x, y, R, *clean) if K == 1 else ([x, x + 0.1], [y, y], [R, 0.5 * R], *clean)
        want = unroll_reference(net, *args, update, **options)
        for mode in meta.MODES:
            got = pixel_meta_gradient(net, *args, update, mode=mode, **options)
            assert all(error(a, b) < 1e-10 for a, b in zip(got, want, strict=True))
    after = (net.state_dict(), update.state_dict() if hasattr(update, "state_dict") else 0)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_unroll_for_every_norm(norm, dims, dtype, tolerance):
    for channels in (1, 3):
        net, data = make_net(norm, dims, channels, dtype), make_data(dims, channels, dtype)
        got = pixel_meta_gradient(net, *data, 0.1)
        want = unroll_reference(
            net.double(), *(t.double() if t.is_floating_point() else t for t in data), 0.1
        )
        assert all(error(a, b) < tolerance for a, b in zip(got, want, strict=True))


def test_the_step_is_the_optimizers():
    net, data = make_net(), make_data()
    for name, make in UPDATES.items():
        optimizer = make(net)
        if not isinstance(optimizer, OPT.Optimizer):
            continue
        warm(net, optimizer, data)
        params = dict(net.named_parameters())
        grads = {n: torch.randn_like(p) for n, p in params.items()}
        new, _ = meta.update_vjp(optimizer, params, grads, lambda new: new)
        for n, p in params.items():
            p.grad = grads[n]
        optimizer.step()
        assert all(error(new[n], p.detach()) < 1e-14 for n, p in params.items()), name


def test_zero_weights_shortcut():
    net, (x, y, _, *clean) = make_net(), make_data()
    want = unroll_reference(net, x, y, None, *clean, 0.1)
    for keep in (False, True):
        got = pixel_meta_gradient(net, x, y, None, *clean, 0.1, keep_graph=keep)
        assert all(error(a.detach(), b) < 1e-10 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("attached", [False, True])
def test_weights_from_a_function(attached):
    net, (x, y, _, *clean) = make_net("group"), make_data()
    theta = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)

    def weigh(L):
        return torch.sigmoid(theta[0] + theta[1] * L)

    got = pixel_meta_gradient(net, x, y, weigh, *clean, 0.1, attached=attached)
    want = unroll_reference(net, x, y, weigh, *clean, 0.1, attached=attached)
    a, b = (torch.autograd.grad(m.objective, theta)[0] for m in (got, want))
    assert error(a, b) < 1e-10 and error(got.dR, want.dR) < 1e-10


def test_keep_graph_gives_the_real_step_and_one_buffer_update():
    net, (x, y, R, *clean) = make_net(), make_data()
    plain = copy.deepcopy(net)
    (R * meta.cross_entropy_map(plain(x), y)).mean().backward()
    result = pixel_meta_gradient(net, x, y, R, *clean, 0.1, keep_graph=True)
    (R * result.loss_map).mean().backward()
    for (n, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=n)
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_dropout_and_random_state():
    net, (x, y, R, *clean) = make_net(extra=(nn.Dropout(0.5),)), make_data()
    torch.manual_seed(3)
    net(x)
    after = torch.get_rng_state()
    for R_given in (R, None):
        torch.manual_seed(3)
        got = pixel_meta_gradient(net, x, y, R_given, *clean, 0.1)
        assert torch.equal(torch.get_rng_state(), after)
        torch.manual_seed(3)
        torch.testing.assert_close(got.loss_map, meta.cross_entropy_map(net(x), y).detach())


def test_any_loss_map_and_clean_loss():
    net, (x, y, _, *clean) = make_net(), make_data()

    def per_image(z, y):
        return (z.softmax(1)[:, 1] - y).square().flatten(1).mean(1)

    R = torch.rand(3, dtype=torch.float64)
    options = {"loss": per_image, "clean_loss": lambda z, y: per_image(z, y).max()}
    got, want = (f(net, x, y, R, *clean, 0.1, **options) for f in (pixel_meta_gradient, unroll_reference))
    assert got.dR.shape == (3,) and error(got.dR, want.dR) < 1e-10


def test_subsets_of_parameters():
    net, data = make_net(), make_data()
    options = {"params": ["0.weight"]}
    assert error(*(f(net, *data, 0.1, **options).dR for f in (pixel_meta_gradient, unroll_reference))) < 1e-10
    net[0].requires_grad_(False)
    assert error(*(f(net, *data, 0.1).dR for f in (pixel_meta_gradient, unroll_reference))) < 1e-10
    part = OPT.SGD(net[-1].parameters(), 0.1)
    assert error(*(f(net, *data, part).dR for f in (pixel_meta_gradient, unroll_reference))) < 1e-10


def test_bf16_autocast_and_channels_last():
    net, data = make_net(dtype=torch.float32), make_data(dtype=torch.float32)
    want = pixel_meta_gradient(net, *data, 0.1).dR
    with torch.autocast("cpu", torch.bfloat16):
        assert error(pixel_meta_gradient(net, *data, 0.1).dR, want) < 0.1
    net.to(memory_format=torch.channels_last)
    x, *rest = data
    assert (
        error(pixel_meta_gradient(net, x.contiguous(memory_format=torch.channels_last), *rest, 0.1).dR, want)
        < 1e-4
    )


class GridSample(nn.Module):
    def forward(self, x):
        theta = torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3)
        grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
        return nn.functional.grid_sample(x, grid, align_corners=False)


def test_falls_back_without_a_forward_rule():
    net, data = make_net(extra=(GridSample(),)), make_data()
    with pytest.warns(RuntimeWarning, match="double backward"):
        got = pixel_meta_gradient(net, *data, 0.1)
    assert error(got.dR, unroll_reference(net, *data, 0.1).dR) < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixel_meta_gradient(net, *data, 0.1)


class Detached(nn.Module):
    """Loses a part of the tangent, and keeps the gradient."""

    class F(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

        @staticmethod
        def jvp(ctx, t):
            return torch.zeros_like(t)

    def forward(self, x):
        return self.F.apply(x)


def test_self_check_finds_a_wrong_tangent():
    net, data = make_net(extra=(Detached(),)), make_data()
    with pytest.raises(RuntimeError, match="self-check"):
        pixel_meta_gradient(net, *data, 0.1)
    pixel_meta_gradient(net, *data, 0.1, self_check=False)
    assert (
        error(
            pixel_meta_gradient(net, *data, 0.1, mode="double_vjp").dR, unroll_reference(net, *data, 0.1).dR
        )
        < 1e-10
    )


def test_checkpointing_sees_the_virtual_weights():
    from torch.utils.checkpoint import checkpoint

    class Checked(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    net, data = make_net("group"), make_data()
    assert (
        error(pixel_meta_gradient(Checked(net), *data, 0.1).dR, unroll_reference(net, *data, 0.1).dR) < 1e-10
    )


def test_head_hypergradient_of_the_weights_is_dR():
    net, (x, y, R, *clean) = make_net("group"), make_data()
    names = dict(net.named_parameters())
    L = meta.cross_entropy_map(net(x), y)
    g = dict(zip(names, torch.autograd.grad((R * L).mean(), list(names.values())), strict=True))

    def v(new):
        leaves = {n: t.requires_grad_() for n, t in new.items()}
        loss = meta.cross_entropy_map(torch.func.functional_call(net, leaves, (clean[0],)), clean[1]).mean()
        return dict(zip(new, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    _, u = meta.update_vjp(0.1, names, g, v)
    z, zdot = meta.logit_jvp(net, None, None, x, u)
    dR = meta.head_hypergradient(lambda z, R: (R * meta.cross_entropy_map(z, y)).mean(), z, zdot, R)
    assert error(dR, unroll_reference(net, x, y, R, *clean, 0.1).dR) < 1e-10


def test_cold_adam_is_finite_and_warns():
    net, data = make_net(), make_data()
    with pytest.warns(RuntimeWarning, match="no state yet"):
        got = pixel_meta_gradient(net, data[0], data[1], None, *data[3:], OPT.Adam(net.parameters()))
    assert got.dR.isfinite().all()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"R": torch.rand(3, 5, 5)}, ValueError, "R has shape"),
        ({"R": torch.ones(3, 6, 6, dtype=torch.int64)}, TypeError, "R must be floating"),
        ({"R": "x"}, TypeError, "R must be a tensor"),
        ({"R": torch.rand(2, 6, 6)}, ValueError, "holds 3 images"),
        ({"y": torch.zeros(2, 6, 6)}, ValueError, "y must be a tensor of 3"),
        ({"x_clean": None}, TypeError, "x_clean must be a tensor"),
        ({"update": "sgd"}, TypeError, "update is str"),
        ({"update": -1.0}, ValueError, "learning rate"),
        ({"update": OPT.SGD([nn.Parameter(torch.ones(1))], 0.1)}, ValueError, "does not hold"),
        ({"update": OPT.Adagrad([nn.Parameter(torch.ones(1))], 0.1)}, TypeError, "Adagrad"),
        ({"mode": "backward"}, ValueError, "mode must be"),
        ({"params": ["no"]}, ValueError, "no parameter of net"),
        ({"params": []}, ValueError, "params is empty"),
        ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm"),
        ({"attached": True}, ValueError, "attached"),
        ({"net": 3}, TypeError, "net must be"),
    ],
)
def test_errors(change, kind, message):
    x, y, R, x_clean, y_clean = make_data()
    given = {"net": make_net(), "x": x, "y": y, "R": R, "x_clean": x_clean, "y_clean": y_clean, "update": 0.1}
    with pytest.raises(kind, match=message):
        pixel_meta_gradient(**{**given, **change})


def test_inference_mode_raises():
    net, data = make_net(), make_data()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        pixel_meta_gradient(net, *data, 0.1)


def _worker(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x, y, R, x_clean, y_clean = make_data(batch=4)
    mine, clean = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
    net = make_net("group")
    got = pixel_meta_gradient(net, x[mine], y[mine], R[mine], x_clean[clean], y_clean[clean], 0.1)
    torch.save((got.dR, got.meta_loss), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(_worker, (tmp_path / "meet", tmp_path), nprocs=2)
    want = unroll_reference(make_net("group"), *make_data(batch=4), 0.1)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert error(torch.cat([p[0] for p in parts]), want.dR) < 1e-10
    assert all(error(p[1], want.meta_loss) < 1e-10 for p in parts)
