"""Cross-entropy with its tangent and the weight nets against plain PyTorch (noisyseg_fast.reference)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import noisyseg_fast  # noqa: E402
from noisyseg_fast import losses, reference, weight_nets  # noqa: E402
from noisyseg_fast.weight_nets import (  # noqa: E402
    MaskNet,
    MaskNetTheta,
    MWNet,
    MWNetTheta,
    ce_dual,
    mask_net,
    mask_net_vjp,
    mw_net,
    mw_net_vjp,
)

Tensor = torch.Tensor
F = torch.nn.functional
KINDS = ("mask_net", "mw_net")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABELS = (torch.uint8, torch.bool, torch.int32, torch.int64)
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def parameters(
    kind: str, dims: int = 2, *, widths: tuple[int, int] = (3, 5), hidden: int = 20, seed: int = 0
):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = MaskNet(dims, widths) if kind == "mask_net" else MWNet(hidden)
        return type(net.theta)(*(x.detach().double() for x in net.theta))


def maps(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A loss map and a gradient by the weights."""
    random = torch.Generator().manual_seed(seed)
    L = 4 * torch.rand(shape, generator=random, dtype=torch.float64) ** 2
    return L, torch.randn(shape, generator=random, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in norm."""
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))


def oracle(kind: str, dR: Tensor, L: Tensor, theta: Any) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """R, dtheta and dL by autograd in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (L, *theta)]
    R = getattr(reference, kind)(leaves[0], leaves[1:])
    dL, *dtheta = torch.autograd.grad(R, leaves, dR.double())
    return R.detach(), tuple(dtheta), dL


def close(kind: str, dR: Tensor, L: Tensor, theta: Any) -> None:
    net, vjp = getattr(weight_nets, kind), getattr(weight_nets, f"{kind}_vjp")
    for dtype, bound in BOUND.items():
        these = [x.to(dtype) for x in (dR, L)]
        those = type(theta)(*(x.to(dtype) for x in theta))
        want, want_theta, want_L = oracle(kind, *these, those)
        R = net(these[1], those)
        assert R.dtype == dtype and R.shape == L.shape
        assert error(R, want) <= bound / 10
        dtheta, dL = vjp(these[0], R, these[1], those, attached=True)
        assert type(dtheta) is type(theta)
        largest = max(float(x.abs().max()) for x in want_theta)  # a single sum may cancel
        for name, a, b in zip(theta._fields, dtheta, want_theta, strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            assert (a - b).abs().max() <= bound * largest, name
        assert error(dL, want_L) <= bound
        alone = vjp(these[0], R, these[1], those)
        assert all(torch.equal(a, b) for a, b in zip(alone, dtheta, strict=True))


# ---- values and first derivatives -----------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 140)),
        st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 11), st.integers(1, 70)),
    ),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_mask_net_is_the_composition_of_convolutions(shape, widths, seed):
    dR, L = maps(shape, seed)[::-1]
    close("mask_net", dR, L, parameters("mask_net", len(shape) - 1, widths=widths, seed=seed))


@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (1, 1, 50), (2, 50, 1), (1, 2, 2), (1, 1, 1, 1), (1, 4, 1, 3), (2, 1, 9, 1)]
)
def test_mask_net_on_maps_smaller_than_the_stencil(shape):
    dR, L = maps(shape)[::-1]
    close("mask_net", dR, L, parameters("mask_net", len(shape) - 1, widths=(16, 16)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 8), min_size=1, max_size=4).map(tuple),
    hidden=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_mw_net_is_the_dense_perceptron(shape, hidden, seed):
    dR, L = maps(shape, seed)[::-1]
    if seed % 2:
        L = L - 2  # no loss, but any number is welcome
    close("mw_net", dR, L, parameters("mw_net", hidden=hidden, seed=seed))


def test_large_maps_and_nets():
    dR, L = maps((5, 31, 45))[::-1]
    close("mw_net", dR, L, parameters("mw_net", hidden=weight_nets.MOST_HIDDEN))
    dR, L = maps((5, 70, 150))[::-1]
    close("mask_net", dR, L, parameters("mask_net", widths=(16, 33)))


def test_mw_net_switches_units_exactly_where_they_switch():
    """At w x + b = 0 a unit is off and has no derivative; weights of 0 never switch; +0 and -0 are one number."""
    L = torch.tensor([0.0, -0.0, 1.0, 0.5, -1.0, 3.0, 1e-30, -1e-30, 1e5])
    w1 = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0, 0.0, 1.0, -1.0, 1e-38, -0.0, 1e-3])
    b1 = torch.tensor([0.0, 0.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1e30, 0.0, 5.0])
    theta = MWNetTheta(w1, b1, torch.linspace(-1, 1, 11), torch.tensor([0.1]))
    dR = torch.linspace(0.5, 1.5, 9)
    want, want_theta, want_L = oracle("mw_net", dR, L, theta)
    R = mw_net(L, theta)
    dtheta, dL = mw_net_vjp(dR, R, L, theta, attached=True)
    torch.testing.assert_close(R.double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dL.double(), want_L, rtol=1e-5, atol=1e-7)
    for a, b in zip(dtheta, want_theta, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_mw_net_with_all_biases_0_and_losses_of_0():
    """relu'(0) = 0: where L is exactly 0 no unit's bias learns."""
    theta = parameters("mw_net")._replace(b1=torch.zeros(20, dtype=torch.float64))
    L = torch.zeros(2, 8, dtype=torch.float64)
    dtheta = mw_net_vjp(torch.ones_like(L), mw_net(L, theta), L, theta)
    assert not dtheta.b1.any() and not dtheta.w1.any() and not dtheta.w2.any()
    assert dtheta.b2 != 0


def test_mw_net_float32_is_within_1e_6_of_the_dense_form():
    theta = MWNet(100).theta
    L = 20 * torch.rand(50_000) ** 3
    want = reference.mw_net(L.double(), [x.detach().double() for x in theta])
    assert (mw_net(L, theta).double() - want).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_nan_spreads(kind):
    L = maps((1, 9, 9))[0]
    L[0, 4, 4] = float("nan")
    theta = parameters(kind)
    R, want = getattr(weight_nets, kind)(L, theta), getattr(reference, kind)(L, theta)
    assert torch.equal(R.isnan(), want.isnan()) and R.isnan().any()
    dtheta = getattr(weight_nets, f"{kind}_vjp")(torch.ones_like(R), R, L, theta)
    assert dtheta[-1].isnan().all()


def test_empty_batch():
    for kind in KINDS:
        theta, L = parameters(kind), torch.empty(0, 4, 4, dtype=torch.float64)
        R = getattr(weight_nets, kind)(L, theta)
        dtheta, dL = getattr(weight_nets, f"{kind}_vjp")(R, R, L, theta, attached=True)
        assert R.shape == dL.shape == (0, 4, 4)
        assert not any(x.any() for x in dtheta)


def strided(x: Tensor, how: str) -> Tensor:
    """x, in memory of another order."""
    if how == "every second":
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if how == "backwards in memory":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("how", ["every second", "backwards in memory", "transposed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 13, 70), (2, 5, 6, 7)])
def test_strides(shape, kind, how):
    dR, L = maps(shape)[::-1]
    theta = parameters(kind, len(shape) - 1)
    R = getattr(weight_nets, kind)(L, theta)
    assert torch.equal(getattr(weight_nets, kind)(strided(L, how), theta), R)
    vjp = getattr(weight_nets, f"{kind}_vjp")
    want = vjp(dR, R, L, theta, attached=True)
    odd = type(theta)(*(torch.stack([x, -x], -1)[..., 0] for x in theta))
    got = vjp(strided(dR, how), strided(R, how), strided(L, how), odd, attached=True)
    assert all(torch.equal(a, b) for a, b in zip((*got[0], got[1]), (*want[0], want[1]), strict=True))
    one = torch.ones((), dtype=torch.float64).expand(shape)  # what sum().backward() gives
    assert all(
        torch.equal(a, b)
        for a, b in zip(vjp(one, R, L, theta), vjp(torch.ones_like(L), R, L, theta), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "shape"), [("mask_net", (9, 65, 64)), ("mask_net", (2, 17, 20, 66)), ("mw_net", (9, 65, 64))]
)
def test_threads_do_not_change_a_bit(kind, shape, dtype):
    dR, L = (x.to(dtype) for x in maps(shape)[::-1])
    theta = [x.to(dtype) for x in parameters(kind, len(shape) - 1)]
    z = torch.stack([L, dR], 1)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        R = getattr(weight_nets, kind)(L, theta)
        dtheta, dL = getattr(weight_nets, f"{kind}_vjp")(dR, R, L, theta, attached=True)
        results.append([R, *dtheta, dL, *ce_dual(z, z.flip(1), (L > 1).to(torch.uint8))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_gives_numpy(kind):
    dR, L = maps((2, 9, 11))[::-1]
    theta = parameters(kind)
    R = getattr(weight_nets, kind)(L, theta)
    dtheta, dL = getattr(weight_nets, f"{kind}_vjp")(dR, R, L, theta, attached=True)
    arrays = [x.numpy() for x in theta]
    if kind == "mask_net":
        arrays[0] = np.asfortranarray(arrays[0])
    got = getattr(weight_nets, kind)(L.numpy(), arrays)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, R.numpy())
    got_theta, got_L = getattr(weight_nets, f"{kind}_vjp")(dR.numpy(), got, L.numpy(), arrays, attached=True)
    np.testing.assert_array_equal(got_L, dL.numpy())
    for a, b in zip(got_theta, dtheta, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


# ---- modules and autograd -------------------------------------------------------------------------


def modules() -> list[tuple[Any, tuple[int, ...]]]:
    torch.manual_seed(0)
    return [
        (MaskNet(2, (2, 1)).double(), (2, 3, 4)),
        (MaskNet(3, 1).double(), (1, 2, 3, 2)),
        (MWNet(7).double(), (2, 3, 3)),
    ]


@pytest.mark.parametrize("case", range(3))
def test_modules_differentiate(case):
    """gradcheck, gradgradcheck (which goes through plain PyTorch) and forward mode."""
    module, shape = modules()[case]
    theta_type = type(module.theta)
    kind = "mask_net" if theta_type is MaskNetTheta else "mw_net"

    def function(L: Tensor, *theta: Tensor) -> Tensor:
        return getattr(weight_nets, kind)(L, theta)

    inputs = (maps(shape)[0].requires_grad_(), *module.theta)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("case", range(3))
def test_modules_train(case):
    """loss.backward() fills every parameter's gradient with what the reference's is; L may be detached or not."""
    module, shape = modules()[case]
    kind = "mask_net" if hasattr(module, "w3") else "mw_net"
    twin = copy.deepcopy(module)
    L, dR = maps(shape)
    for attached in (False, True):
        leaves = [L.clone().requires_grad_(attached) for _ in range(2)]
        module.zero_grad()
        twin.zero_grad()
        module(leaves[0]).backward(dR)
        getattr(reference, kind)(leaves[1], twin.theta).backward(dR)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
        if attached:
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-12, atol=1e-14)
    assert [name for name, _ in module.named_parameters()] == list(module.theta._fields)
    assert torch.equal(module(L), getattr(weight_nets, kind)(L, module.theta))


def test_only_wanted_gradients_are_given():
    theta = [x.requires_grad_(i == 2) for i, x in enumerate(parameters("mask_net"))]
    L = maps((2, 5, 6))[0]
    (grad,) = torch.autograd.grad(mask_net(L, theta).sum(), [theta[2]])
    (want,) = torch.autograd.grad(reference.mask_net(L, theta).sum(), [theta[2]])
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-14)
    mask_net(L, theta).sum().backward()
    assert theta[2].grad is not None and theta[0].grad is None and L.grad is None
    with torch.no_grad():
        assert not mask_net(L, theta).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func(kind):
    theta = parameters(kind)
    L, dR = maps((2, 5, 6))
    ours, plain = getattr(weight_nets, kind), getattr(reference, kind)
    got = torch.func.grad(lambda t: (dR * ours(L, t)).sum())(tuple(theta))
    want = torch.func.grad(lambda t: (dR * plain(L, t)).sum())(tuple(theta))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    got = torch.func.jvp(lambda x: ours(x, theta), (L,), (dR,))
    want = torch.func.jvp(lambda x: plain(x, theta), (L,), (dR,))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    stacked = torch.stack([L, 2 * L])
    torch.testing.assert_close(
        torch.vmap(lambda x: ours(x, theta))(stacked), torch.stack([plain(x, theta) for x in stacked])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    """One graph, first derivatives; inside it, forward mode raises."""
    torch._dynamo.reset()
    theta = [x.requires_grad_() for x in parameters(kind)]
    L, dR = maps((2, 7, 9))
    L.requires_grad_()
    ours, vjp = getattr(weight_nets, kind), getattr(weight_nets, f"{kind}_vjp")

    def both(L: Tensor, dR: Tensor, *theta: Tensor) -> tuple[Tensor, ...]:
        R = ours(L, theta)
        with torch.no_grad():
            packed = vjp(dR, R, L, theta)
        return R, *packed

    R, *dtheta = torch.compile(both, fullgraph=True, backend="aot_eager")(L, dR, *theta)
    want, want_theta, want_L = oracle(kind, dR, L, theta)
    torch.testing.assert_close(R, want)
    for a, b in zip(dtheta, want_theta, strict=True):
        torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(R, (L, *theta), dR)
    for a, b in zip(grads, (want_L, *want_theta), strict=True):
        torch.testing.assert_close(a, b)
    tangent = torch.compile(
        lambda L, dR: torch.func.jvp(lambda x: ours(x, theta), (L,), (dR,)),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match=r"first derivatives in reverse mode only|Unsupported"):
        tangent(L.detach(), dR)


def test_initialisation_is_that_of_torch_convolutions():
    net = MaskNet(3, (400, 300))
    theta = [x.detach() for x in net.theta]
    for x, fan in zip(theta, (27, 27, 125, 125, 701, 701), strict=True):
        bound = fan**-0.5
        assert x.abs().max() <= bound
        if x.numel() > 100:
            assert x.abs().max() > 0.98 * bound and abs(float(x.std()) / bound - 3**-0.5) < 0.05
    net = MWNet()
    assert len(net.theta.w1) == 100 and net.theta.w2.abs().max() <= 0.1 and net.theta.w1.abs().max() > 0.9
    assert repr(net) == "MWNet(hidden=100)" and "width=(16, 16)" in repr(MaskNet())
    assert set(net.state_dict()) == {"w1", "b1", "w2", "b2"}


# ---- cross-entropy --------------------------------------------------------------------------------


def ce_example(
    channels: int, shape: tuple[int, ...], soft: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    full = (shape[0], channels, *shape[1:])
    z, zdot = 4 * torch.randn(2, *full, generator=random, dtype=torch.float64)
    if soft:
        return z, zdot, torch.rand(full, generator=random, dtype=torch.float64)
    return z, zdot, torch.randint(0, max(channels, 2), shape, generator=random)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 6),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    soft=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    dot_dtype=st.sampled_from((None, *FLOATS)),
    label_dtype=st.sampled_from(LABELS),
    activation=st.sampled_from((None, "sigmoid", "softmax")),
    order=st.sampled_from(("contiguous", "channels last", "every second")),
    seed=st.integers(0, 99),
)
def test_ce_dual_is_the_cross_entropy_and_its_derivative(
    channels, shape, soft, dtype, dot_dtype, label_dtype, activation, order, seed
):
    if activation == "softmax" and channels == 1:
        activation = None
    if label_dtype == torch.bool:
        channels = min(channels, 2)
        activation = None if channels == 1 else activation
    z, zdot, y = ce_example(channels, shape, soft, seed)
    z, zdot = z.to(dtype), zdot.to(dot_dtype or dtype)
    y = y.to(dtype) if soft else y.to(label_dtype)
    wide = torch.float64 if torch.float64 in (z.dtype, zdot.dtype) else torch.float32
    kind = activation or ("softmax" if channels > 1 else "sigmoid")
    want, want_dot = reference.ce_dual(z.double(), zdot.double(), y.double() if soft else y, kind)

    def loss(x: Tensor) -> Tensor:
        return reference.pixel_loss(
            x, y.double() if soft else y, kind="ce", activation=kind, reduction="none"
        )

    by_jvp = torch.func.jvp(loss, (z.double(),), (zdot.double(),))
    torch.testing.assert_close(want, by_jvp[0])
    torch.testing.assert_close(want_dot, by_jvp[1])
    if order == "channels last":
        z, zdot = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (z, zdot))
    if order == "every second":
        z = torch.stack([z, z], -1)[..., 0]
    L, Ldot = ce_dual(z, zdot, y, activation=activation)
    assert L.dtype == Ldot.dtype == wide and L.shape == Ldot.shape == shape
    bound = 1e-12 if wide == torch.float64 else 2e-6
    for a, b in ((L, want), (Ldot, want_dot)):
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound * channels)


def test_ce_dual_of_certain_logits():
    """No overflow, no cancellation: e^-50 keeps its digits where the label is the likelier class."""
    z = torch.tensor([[-1000.0, 50.0, 0.0, 1000.0]]).reshape(1, 1, 4)
    y = torch.tensor([[0, 1, 1, 0]])
    L, Ldot = ce_dual(z, torch.ones_like(z), y)
    assert 0 <= L[0, 0] < 1e-37 and L[0, 3] == 1000
    torch.testing.assert_close(L[0, 1].double(), torch.tensor(-50.0).double().exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(Ldot[0, 1].double(), -torch.tensor(-50.0).double().exp(), rtol=1e-5, atol=0)
    assert Ldot[0, 2] == -0.5
    two = torch.stack([-z[:, 0] / 2, z[:, 0] / 2], 1)
    again = ce_dual(two, torch.stack([-L * 0 - 0.5, L * 0 + 0.5], 1), y)
    assert torch.equal(again[0], L) and torch.equal(again[1], Ldot)


def test_ce_dual_takes_labels_with_a_channel_and_numpy():
    z, zdot, y = ce_example(3, (2, 5, 6), False)
    want = ce_dual(z, zdot, y)
    for got in (ce_dual(z, zdot, y[:, None].int()), ce_dual(z.numpy(), zdot.numpy(), y.numpy())):
        assert isinstance(got[0], (torch.Tensor, np.ndarray))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(a), b.numpy())
    assert ce_dual(z[:0], zdot[:0], y[:0])[0].shape == (0, 5, 6)


def test_ce_dual_differentiates_through_plain_pytorch():
    z, zdot, y = ce_example(3, (2, 3), False)
    assert torch.autograd.gradcheck(
        lambda a, b: ce_dual(a, b, y), (z.requires_grad_(), zdot.requires_grad_()), check_forward_ad=True
    )
    got = torch.func.grad(lambda a: ce_dual(a, zdot.detach(), y)[1].sum())(z.detach())
    want = torch.func.grad(lambda a: reference.ce_dual(a, zdot.detach(), y)[1].sum())(z.detach())
    torch.testing.assert_close(got, want)


def test_ce_dual_of_what_a_dual_level_gives():
    """As a forward-mode pass uses it: logits and tangent taken apart, inside the level."""
    import torch.autograd.forward_ad as fwd

    z, zdot, y = ce_example(2, (2, 6), False)
    with fwd.dual_level(), torch.no_grad():
        parts = fwd.unpack_dual(2 * fwd.make_dual(z, zdot))
        got = ce_dual(parts.primal, parts.tangent, y)
        tangent = fwd.unpack_dual(ce_dual(fwd.make_dual(z, zdot), zdot, y)[0]).tangent
    for a, b in zip(got, reference.ce_dual(2 * z, 2 * zdot, y), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(tangent, reference.ce_dual(z, zdot, y)[1])


def test_ce_dual_compiles():
    torch._dynamo.reset()
    z, zdot, y = ce_example(3, (2, 5, 6), False)
    compiled = torch.compile(lambda *x: ce_dual(*x), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(z, zdot, y), ce_dual(z, zdot, y), strict=True):
        assert torch.equal(a, b)
    leaf = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(leaf, zdot, y)[1].sum(), leaf)
    (want,) = torch.autograd.grad(reference.ce_dual(leaf, zdot, y)[1].sum(), leaf)
    torch.testing.assert_close(grad, want)


def test_ce_dual_agrees_with_the_losses():
    z, zdot, y = ce_example(2, (2, 33, 31), False)
    L, _ = ce_dual(z.float(), zdot.float(), y.to(torch.uint8))
    torch.testing.assert_close(L, losses.pixel_loss(z.float(), y.to(torch.uint8), reduction="none"))


# ---- errors ---------------------------------------------------------------------------------------

Z = torch.zeros(2, 3, 4, 5)
Y = torch.zeros(2, 4, 5, dtype=torch.uint8)
L2 = torch.zeros(2, 4, 5)
MASK = MaskNet(2, 2).theta
MW = MWNet(3).theta


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: ce_dual(None, Z, Y), TypeError, "z must be an array, not None"),
        (lambda: ce_dual(Z[:, 0, 0, 0], Z, Y), ValueError, r"z must be \(B, C, \*S\)"),
        (lambda: ce_dual(Z.int(), Z, Y), TypeError, "z has dtype int32"),
        (lambda: ce_dual(Z, Z.int(), Y), TypeError, "zdot has dtype int32"),
        (
            lambda: ce_dual(Z, Z[:1], Y),
            ValueError,
            r"zdot has shape \(1, 3, 4, 5\); it must be \(2, 3, 4, 5\)",
        ),
        (lambda: ce_dual(Z, Z, Y[:1]), ValueError, r"y has shape \(1, 4, 5\)"),
        (lambda: ce_dual(Z, Z, Y.float()), TypeError, "y has dtype float32 for class numbers"),
        (lambda: ce_dual(Z, Z, Y + 3), ValueError, r"y holds a label outside 0\.\.2"),
        (lambda: ce_dual(Z, Z, Y.int() - 1), ValueError, r"y holds a label outside 0\.\.2"),
        (lambda: ce_dual(Z[:, :1], Z[:, :1], Y + 2), ValueError, r"y holds a label outside 0\.\.1"),
        (
            lambda: ce_dual(Z, Z, Y, activation="relu"),
            ValueError,
            "activation must be sigmoid, softmax or None",
        ),
        (lambda: ce_dual(Z[:, :1], Z[:, :1], Y, activation="softmax"), ValueError, "over one channel"),
        (lambda: ce_dual(Z, Z.numpy(), Y), TypeError, "numpy"),
        (lambda: mask_net(None, MASK), TypeError, "L must be an array, not None"),
        (lambda: mask_net(L2, MASK[:5]), TypeError, "theta must be a MaskNetTheta or 6 arrays"),
        (lambda: mask_net(L2, MaskNet()), TypeError, "theta must be a MaskNetTheta or 6 arrays, got MaskNet"),
        (lambda: mask_net(L2, MASK._replace(b3=None)), TypeError, r"theta\.b3 must be an array, not None"),
        (lambda: mask_net(L2.half(), MASK), TypeError, "L has dtype float16"),
        (lambda: mask_net(L2.double(), MASK), TypeError, r"theta\.w3 has dtype float32; it must be float64"),
        (lambda: mask_net(L2[0], MASK), ValueError, r"L has shape \(4, 5\); with 2-dimensional theta.w3"),
        (lambda: mask_net(L2, MASK._replace(w3=MASK.b3)), ValueError, r"theta\.w3 must be \(K, 3, 3\)"),
        (lambda: mask_net(L2, MASK._replace(w5=MASK.w5[:0])), ValueError, r"theta\.w5 must be \(K, 5, 5\)"),
        (
            lambda: mask_net(L2, MASK._replace(w1=MASK.b3)),
            ValueError,
            r"theta\.w1 has shape \(2,\); it must be \(5,\)",
        ),
        (lambda: mask_net(L2, MASK._replace(w5=MASK.w3)), ValueError, r"theta\.w5 has shape"),
        (lambda: mask_net_vjp(L2[:1], L2, L2, MASK), ValueError, r"dR has shape \(1, 4, 5\); it must be"),
        (lambda: mask_net_vjp(L2, L2.double(), L2, MASK), TypeError, "R has dtype float64"),
        (
            lambda: mw_net(L2, MW._replace(b2=MW.w1)),
            ValueError,
            r"theta\.b2 has shape \(3,\); it must be \(1,\)",
        ),
        (lambda: mw_net(L2, MW._replace(w1=torch.zeros(2000))), ValueError, r"H in 1\.\.1024"),
        (lambda: mw_net(L2.sum(), MW), ValueError, "L must have 1 to 6 axes"),
        (lambda: mw_net_vjp(L2, None, L2, MW), TypeError, "R must be an array, not None"),
        (lambda: MaskNet(1), ValueError, "spatial_dims must be 2 or 3"),
        (lambda: MaskNet(2, 0), ValueError, "width must be a positive integer or two"),
        (lambda: MaskNet(2, (1, 2, 3)), ValueError, "width must be a positive integer or two"),
        (lambda: MWNet(0), ValueError, r"hidden must be an integer in 1\.\.1024"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_public_names():
    for name in ("ce_dual", "mask_net", "mask_net_vjp", "mw_net", "mw_net_vjp", "MaskNet", "MWNet"):
        assert getattr(noisyseg_fast, name) is getattr(weight_nets, name)
