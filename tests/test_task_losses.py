"""The losses of several maps against noisyseg_fast.reference and the sources' formulas."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from noisyseg_fast import reference, task_losses  # noqa: E402
from noisyseg_fast.task_losses import (  # noqa: E402
    DualTaskLoss,
    UncertaintyWeightedLoss,
    dual_task_loss,
    uncertainty_weighted_loss,
)

Tensor = torch.Tensor
F = torch.nn.functional
SHAPES = ((37,), (1,), (5, 7), (1, 9), (33, 31), (3, 5, 7), (4, 1, 17))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABELS = (torch.uint8, torch.bool, torch.int32, torch.int64)
WEIGHTS = (0.7, -0.3, 1.1, 0.5)  # of the terms: no two alike
BOTH = ("uncertainty_weighted_loss", "dual_task_loss")
Inputs = tuple[Tensor, Tensor, Tensor]  # logits, the other differentiable input, the labels


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def example(
    name: str,
    shape: tuple[int, ...] = (5, 7),
    *,
    batch: int = 2,
    maps: int = 3,
    seed: int = 0,
    soft: bool = False,
) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    maps = maps if name == BOTH[0] else 1
    logits = 3 * torch.randn(batch, 1, *shape, generator=random, dtype=torch.float64)
    if name == BOTH[0]:
        other = torch.rand(batch, maps, *shape, generator=random, dtype=torch.float64)
    else:
        other = 2e-3 * torch.randn(batch, 1, *shape, generator=random, dtype=torch.float64)
    labels = torch.rand(batch, maps, *shape, generator=random, dtype=torch.float64)
    return logits, other, labels if soft else (labels > 0.6).to(torch.uint8)


def call(module: Any, name: str, inputs: Inputs, **options: Any) -> Any:
    logits, other, labels = inputs
    function = getattr(module, name)
    return (
        function(logits, labels, other, **options)
        if name == BOTH[0]
        else function(logits, other, labels, **options)
    )


def weighted(terms: Any, name: str) -> Tensor:
    """A scalar of all differentiable terms, images of different weight."""
    parts = terms[: 4 if name == BOTH[0] else 3]
    return sum(
        (w * x * torch.linspace(1, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)).sum()
        for w, x in zip(WEIGHTS, parts, strict=False)
    )


def terms_and_grads(module: Any, name: str, inputs: Inputs, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs[:2]]
    terms = call(module, name, (*leaves, inputs[2]), **options)
    grads = torch.autograd.grad(weighted(terms, name), leaves)
    return tuple(x.detach() for x in terms), grads


def error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in norm."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def close(name: str, inputs: Inputs, **options: Any) -> None:
    """Terms and gradients equal the reference's: float64 to 1e-12, float32 gradients to 1e-6 in norm."""
    for dtype, value_bound, grad_bound, tiny in (
        (torch.float64, 1e-12, 1e-12, 1e-15),
        (torch.float32, 1e-5, 1e-6, 1e-9),
    ):
        these = (inputs[0].to(dtype), inputs[1].to(dtype), inputs[2])
        exact = (these[0].double(), these[1].double(), these[2])
        want, want_grads = terms_and_grads(reference, name, exact, **options)
        terms, grads = terms_and_grads(task_losses, name, these, **options)
        assert len(terms) == len(want)
        for a, b in zip(terms, want, strict=True):
            assert a.dtype == dtype
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b, rtol=value_bound, atol=tiny * 10)
        for a, b, x in zip(grads, want_grads, these, strict=False):
            assert a.dtype == dtype
            assert a.shape == x.shape
            assert error(a, b) <= grad_bound or (a - b).abs().max() <= tiny, (options, error(a, b))


# ---- against the reference ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_uncertainty_equals_reference(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    batch, maps, shape, soft = pick(1, 2, 3), pick(1, 2, 4, 17), pick(*SHAPES), data.draw(st.booleans())
    inputs = example(BOTH[0], shape, batch=batch, maps=maps, seed=data.draw(st.integers(0, 99)), soft=soft)
    if not soft:
        inputs = (*inputs[:2], inputs[2].to(pick(*LABELS)))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    close(
        BOTH[0],
        inputs,
        dice_weight=pick(1.0, 0.3),
        consistency_weight=pick(1.0, 0.0, 2.0),
        raters=pick(
            None,
            torch.rand(batch, maps, generator=random) > 0.3,
            torch.rand(batch, maps, generator=random, dtype=torch.float64),
            torch.randint(3, (batch, maps), generator=random),
        ),
        mask=pick(None, torch.rand(batch, *shape, generator=random) > 0.3),
        entropy=pick("paper", "binary"),
        eps=pick(1e-5, 0.0, 1.0),
        reduction=pick("mean", "sum", "image"),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_dual_task_equals_reference(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    batch, shape, soft = pick(1, 2, 4), pick(*SHAPES), data.draw(st.booleans())
    inputs = example(BOTH[1], shape, batch=batch, seed=data.draw(st.integers(0, 99)), soft=soft)
    if not soft:
        inputs = (*inputs[:2], inputs[2].to(pick(*LABELS)))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    per_image = data.draw(st.booleans())
    close(
        BOTH[1],
        inputs,
        k=pick(1500.0, 200.0),
        labelled=pick(None, 0, 1, batch, torch.rand(batch, generator=random) > 0.5),
        routing=pick("own", "shared", "logits", "sdf"),
        per_image=per_image,
        mask=pick(None, torch.rand(batch, *shape, generator=random) > 0.3),
        eps=pick(1e-5, 0.0, 1.0),
        reduction=pick("mean", "image") if per_image else "mean",
    )


@pytest.mark.parametrize("name", BOTH)
def test_many_pixels_and_maps(name: str) -> None:
    for shape, maps in (((3, 70, 71), 4), ((9001,), 2), ((3,), 512), ((40, 17), 33)):
        close(name, example(name, shape, maps=maps))


@pytest.mark.parametrize("name", BOTH)
def test_label_dtypes_agree(name: str) -> None:
    inputs = example(name)
    want, want_grads = terms_and_grads(task_losses, name, inputs)
    for dtype in (*LABELS, *FLOATS):
        terms, grads = terms_and_grads(task_losses, name, (*inputs[:2], inputs[2].to(dtype)))
        for a, b in zip((*terms, *grads), (*want, *want_grads), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_half_precision_rounds_once(name: str, dtype: torch.dtype, tolerance: float) -> None:
    a, b, labels = example(name, (33, 31))
    inputs = (a.to(dtype), b.to(dtype), labels)
    terms, grads = terms_and_grads(
        task_losses, name, inputs, reduction="image" if name == BOTH[0] else "mean"
    )
    want, want_grads = terms_and_grads(
        task_losses,
        name,
        (inputs[0].float(), inputs[1].float(), labels),
        reduction="image" if name == BOTH[0] else "mean",
    )
    for x, y in zip(terms, want, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)
    for x, y in zip(grads, want_grads, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.float(), y, rtol=tolerance, atol=1e-7)
    mixed = (inputs[0], b, labels)  # one float64 input makes everything float64
    terms, grads = terms_and_grads(task_losses, name, mixed)
    want, want_grads = terms_and_grads(task_losses, name, (inputs[0].double(), b, labels))
    assert all(torch.equal(x, y) for x, y in zip(terms, want, strict=True))
    assert torch.equal(grads[1], want_grads[1])
    assert grads[0].dtype == dtype


# ---- what the sources say -------------------------------------------------------------------------


def test_uma_net_by_hand() -> None:
    """Equations 1, 3, 5, 6 and 7, written out pixel by pixel."""
    logits, sigma, y = (x.double() for x in example(BOTH[0], (4,), batch=1, maps=2))
    p = [1 / (1 + math.exp(-z)) for z in logits.flatten().tolist()]
    n, m = 4, 2
    ce = dice = consistency = variance = total = entropy = star_sum = 0.0
    for r in range(m):
        below = sum(x * x for x in p) + sum(float(v) ** 2 for v in y[0, r])
        for i in range(n):
            s, g = float(sigma[0, r, i]), float(y[0, r, i])
            nll = -math.log(p[i]) if g else -math.log(1 - p[i])
            ce += (nll / math.exp(s) + s / 2) / (n * m)
            dice += ((p[i] - g) ** 2 / math.exp(s) / below + s / 2 / n) / m
    for i in range(n):
        s = [abs(float(y[0, r, i]) - float(sigma[0, r, i])) for r in range(m)]
        star = sum(s) / m
        consistency += sum((x - star) ** 2 for x in s) / (m * n)
        variance += sum((x - star) ** 2 for x in s) / m
        total += sum(s)
        entropy -= star * math.log(star)
        star_sum += star
    terms = uncertainty_weighted_loss(logits, y, sigma, eps=0.0, dice_weight=0.5, consistency_weight=2.0)
    want = (
        ce + 0.5 * dice + 2 * consistency,
        ce,
        dice,
        consistency,
        entropy / star_sum,
        4 * m * variance / total,
    )
    for a, b in zip(terms, want, strict=True):
        assert float(a) == pytest.approx(b, rel=1e-12)


def test_scores_of_known_cases() -> None:
    """METHODS.md section 5: a small sure object, and k of M raters who mark a pixel."""
    y = torch.zeros(1, 1, 1000, dtype=torch.float64)
    y[..., :10] = 1
    terms = [
        uncertainty_weighted_loss(torch.zeros_like(y), y, torch.full_like(y, 0.01), entropy=e)
        for e in ("paper", "binary")
    ]
    assert float(terms[0].confidence) == pytest.approx(2.31, abs=0.02)
    assert float(terms[1].confidence) == pytest.approx(0.056, abs=0.001)
    for marked, raters in ((1, 5), (2, 4), (3, 3)):
        y = (torch.arange(raters) < marked).to(torch.uint8).reshape(1, raters, 1)
        terms = uncertainty_weighted_loss(torch.zeros(1, 1, 1), y, torch.zeros(1, raters, 1))
        assert float(terms.agreement) == pytest.approx(4 * (1 - marked / raters), abs=1e-6)
        assert float(terms.confidence) == pytest.approx(-math.log(marked / raters), abs=1e-6)


def test_dtml_as_its_code_has_it() -> None:
    """train_la_dtml.py: sums over the labelled part of the batch, sigmoid(-1500 z), MSE over all volumes."""
    logits, sdf, target = example(BOTH[1], (9, 8), batch=4)
    z, d, g = logits.requires_grad_(), sdf.requires_grad_(), target.double()

    def dice_loss(score: Tensor, label: Tensor) -> Tensor:
        smooth = 1e-5
        intersect = torch.sum(score * label)
        return 1 - (2 * intersect + smooth) / (torch.sum(score * score) + torch.sum(label * label) + smooth)

    outputs, mask = torch.sigmoid(z), torch.sigmoid(-1500 * d)
    seg = 0.5 * (F.binary_cross_entropy_with_logits(z[:2], g[:2]) + dice_loss(outputs[:2], g[:2]))
    of_mask = dice_loss(mask[:2], g[:2])
    consistency = torch.mean((outputs - mask) ** 2)
    # both networks' losses, back-propagated one after the other
    want = torch.autograd.grad(seg + 0.3 * consistency + of_mask + 0.3 * consistency, (z, d))
    terms = dual_task_loss(z, d, target, labelled=2, routing="shared")
    for a, b in zip(terms, (seg, of_mask, consistency), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(terms.seg + terms.mask + 0.3 * terms.consistency, (z, d))
    for a, b in zip(grads, want, strict=True):
        assert error(a, b) < 1e-12


def test_routing() -> None:
    inputs = example(BOTH[1])
    own, shared, to_logits, to_sdf = (
        terms_and_grads(
            lambda_module(
                lambda *a, r=r: (torch.zeros(()), torch.zeros(()), dual_task_loss(*a, routing=r).consistency)
            ),
            BOTH[1],
            inputs,
        )
        for r in ("own", "shared", "logits", "sdf")
    )
    assert own[0][2] == shared[0][2] == to_logits[0][2] == to_sdf[0][2]
    for i in (0, 1):
        torch.testing.assert_close(shared[1][i], 2 * own[1][i])
    assert torch.equal(to_logits[1][0], own[1][0])
    assert torch.equal(to_sdf[1][1], own[1][1])
    assert not to_logits[1][1].any()
    assert not to_sdf[1][0].any()


def lambda_module(function: Callable[..., Any]) -> Any:
    return type("Module", (), {BOTH[1]: staticmethod(function)})


def test_unlabelled_targets_and_absent_raters_are_never_read() -> None:
    logits, sdf, target = example(BOTH[1], batch=4)
    labelled = torch.tensor([True, False, True, False])
    want = terms_and_grads(task_losses, BOTH[1], (logits, sdf, target), labelled=labelled)
    spoilt = target.double()
    spoilt[~labelled] = float("nan")
    got = terms_and_grads(task_losses, BOTH[1], (logits, sdf, spoilt), labelled=labelled)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    assert torch.equal(
        dual_task_loss(logits, sdf, target, labelled=np.int64(2)).seg,
        dual_task_loss(logits, sdf, target, labelled=torch.tensor([1, 1, 0, 0])).seg,
    )
    logits, sigma, y = example(BOTH[0], maps=4)
    raters = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]])
    terms, grads = terms_and_grads(task_losses, BOTH[0], (logits, sigma, y), raters=raters, reduction="image")
    gone = (raters == 0)[..., None, None]
    spoilt = y.double().masked_fill(gone, float("nan")), sigma.masked_fill(gone, float("nan"))
    got, got_grads = terms_and_grads(
        task_losses, BOTH[0], (logits, spoilt[1], spoilt[0]), raters=raters, reduction="image"
    )
    for a, b in zip((*got, *got_grads), (*terms, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)
    assert not grads[1][gone.expand_as(y)].any()
    # each image as if it had come alone with its own raters
    for b in (0, 1):
        own = raters[b] == 1
        alone = uncertainty_weighted_loss(logits[b : b + 1], y[b : b + 1, own], sigma[b : b + 1, own])
        for a, want_ in zip(terms, alone, strict=True):
            torch.testing.assert_close(a[b], want_.squeeze(), rtol=1e-12, atol=1e-15)


def test_image_terms_route_images_to_two_heads() -> None:
    """A head that gets no image contributes zero loss and zero gradient."""
    logits, sigma, y = example(BOTH[0], batch=3)
    z = logits.requires_grad_()
    terms = uncertainty_weighted_loss(z, y, sigma, reduction="image")
    want = uncertainty_weighted_loss(z, y, sigma)
    torch.testing.assert_close(terms.total.mean(), want.total)
    for high in (torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)):
        loss = (terms.total * high).sum() / high.sum().clamp(min=1)
        (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert torch.isfinite(loss)
        assert not grad[~high].any()
        assert bool(grad[high].any()) == bool(high.any())


# ---- derivatives ----------------------------------------------------------------------------------


def smooth_example(name: str) -> Inputs:
    """Away from the kink of |y - sigma|, and the transform not yet a step."""
    logits, other, labels = example(name, (3, 4), soft=True)
    if name == BOTH[0]:
        other = 0.1 + 0.8 * other
        labels = torch.where((labels - other).abs() < 0.05, (labels + 0.2) % 1, labels)
    return logits / 3, other, labels


@pytest.mark.parametrize("name", BOTH)
def test_gradcheck(name: str) -> None:
    logits, other, labels = smooth_example(name)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.2
    several: tuple[dict[str, Any], ...] = (
        ({"mask": mask, "raters": torch.tensor([[1, 0.5, 0], [1, 1, 2]])}, {"reduction": "image"})
        if name == BOTH[0]
        else ({"mask": mask, "labelled": 1, "k": 1000}, {"per_image": True, "reduction": "image", "k": 1000})
    )
    for options in several:

        def run(a: Tensor, b: Tensor, options: dict[str, Any] = options) -> tuple[Tensor, ...]:
            return call(task_losses, name, (a, b, labels), **options)[: 4 if name == BOTH[0] else 3]

        leaves = (logits.clone().requires_grad_(), other.clone().requires_grad_())
        tight = {"atol": 1e-5, "rtol": 1e-3, "eps": 1e-6 if name == BOTH[0] else 1e-8}
        assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, **tight)
        assert torch.autograd.gradgradcheck(run, leaves, check_fwd_over_rev=True, **{**tight, "atol": 1e-3})


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("routing", ["own", "shared", "logits", "sdf"])
def test_every_derivative_equals_the_references(name: str, routing: str) -> None:
    if name == BOTH[0] and routing != "own":
        return
    logits, other, labels = smooth_example(name)
    options: dict[str, Any] = {} if name == BOTH[0] else {"routing": routing, "labelled": 1}
    direction = tuple(torch.randn_like(x) * x.abs().mean() for x in (logits, other))

    def of(module: Any) -> Callable[..., Tensor]:
        return lambda a, b: weighted(call(module, name, (a, b, labels), **options), name)

    def twice(module: Any) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (logits, other)]
        first = torch.autograd.grad(of(module)(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, direction, strict=True)), leaves)

    def by_tangent(module: Any) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda a, b: torch.func.jvp(of(module), (a, b), direction)[1], (0, 1))(
            logits, other
        )

    def forward_ad(module: Any) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(logits, direction[0])
            return torch.autograd.forward_ad.unpack_dual(of(module)(dual, other)).tangent

    tests: tuple[Callable[[Any], Any], ...] = (
        lambda m: torch.func.grad(of(m), (0, 1))(logits, other),
        lambda m: torch.func.jvp(of(m), (logits, other), direction),
        lambda m: torch.func.jvp(torch.func.grad(of(m), (0, 1)), (logits, other), direction),
        lambda m: torch.func.vjp(of(m), logits, other)[1](torch.tensor(1.5, dtype=torch.float64)),
        lambda m: torch.func.jvp(lambda a: torch.func.grad(of(m))(a, other), (logits,), direction[:1]),
        lambda m: torch.func.hessian(of(m))(logits, other),
        forward_ad,
        twice,
        by_tangent,
    )
    for test in tests:
        for a, b in zip(flat(test(task_losses)), flat(test(reference)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def flat(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [y for part in x for y in flat(part)]


def test_kinks_have_derivative_zero() -> None:
    """At y = sigma, first and second derivatives; and at logits of exactly 0 nothing is lost."""
    y = torch.tensor([[[0.25, 0.5]], [[0.75, 0.5]]], dtype=torch.float64)
    z = torch.zeros(2, 1, 2, dtype=torch.float64)
    for module in (task_losses, reference):
        run = lambda a, b, m=module: call(m, BOTH[0], (a, b, y))[3]  # noqa: E731
        assert not torch.func.grad(run, 1)(z, y.clone()).any()
        assert not torch.func.jvp(run, (z, y.clone()), (torch.ones_like(z), torch.ones_like(y)))[1].any()
    sigma = torch.full_like(y, 0.3)
    total = lambda m: lambda a: call(m, BOTH[0], (a, sigma, y))[0]  # noqa: E731
    for f in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(f(total(task_losses))(z), f(total(reference))(z), rtol=1e-12, atol=1e-15)
    _, tangent = torch.func.jvp(total(task_losses), (z,), (torch.ones_like(z),))
    torch.testing.assert_close(tangent, torch.func.grad(total(reference))(z).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", BOTH)
def test_float32_second_derivatives(name: str) -> None:
    logits, other, labels = smooth_example(name)

    logits, other = logits.float(), other.float()

    def product(module: Any, dtype: torch.dtype) -> Tensor:
        z = logits.to(dtype)
        run = lambda a: weighted(call(module, name, (a, other.to(dtype), labels)), name)  # noqa: E731
        return torch.func.jvp(torch.func.grad(run), (z,), (torch.ones_like(z),))[1]

    got = product(task_losses, torch.float32)
    assert got.dtype == torch.float32
    assert error(got, product(reference, torch.float64)) < 1e-6


@pytest.mark.parametrize("name", BOTH)
def test_vmap(name: str) -> None:
    inputs = example(name, batch=3)

    def one(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return weighted(call(task_losses, name, (a[None], b[None], c[None])), name)

    values = torch.func.vmap(one)(*inputs)
    per_sample = torch.func.vmap(torch.func.grad(one, (0, 1)))(*inputs)
    for i in range(3):
        these = tuple(x[i] for x in inputs)
        torch.testing.assert_close(values[i], one(*these))
        for a, b in zip(per_sample, torch.func.grad(one, (0, 1))(*these), strict=True):
            torch.testing.assert_close(a[i], b)
    # over logits alone, along the last axis, options and labels shared
    shared = torch.func.vmap(
        lambda a: call(task_losses, name, (a[None], inputs[1][:1], inputs[2][:1]))[0], in_dims=3
    )(inputs[0].movedim(0, -1))
    for i in range(3):
        torch.testing.assert_close(
            shared[i], call(task_losses, name, (inputs[0][i : i + 1], inputs[1][:1], inputs[2][:1]))[0]
        )


@pytest.mark.parametrize("name", BOTH)
def test_only_the_wanted_gradient(name: str) -> None:
    inputs = example(name)
    _, want = terms_and_grads(task_losses, name, inputs)
    for i in (0, 1):
        leaves = [x.clone().requires_grad_(i == k) for k, x in enumerate(inputs[:2])]
        weighted(call(task_losses, name, (*leaves, inputs[2])), name).backward()
        assert torch.equal(leaves[i].grad, want[i])
        assert leaves[1 - i].grad is None


@pytest.mark.parametrize("name", BOTH)
def test_what_is_not_there_raises(name: str) -> None:
    """Third derivatives, and everything but reverse mode inside a compiled graph: errors, never silent zeros."""
    torch._dynamo.reset()
    logits, other, labels = smooth_example(name)
    z = logits.clone().requires_grad_()
    total = lambda a: weighted(call(task_losses, name, (a, other, labels)), name)  # noqa: E731
    (first,) = torch.autograd.grad(total(z), z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|third derivatives"):
        torch.autograd.grad(second.sum(), z)

    def tangent(a: Tensor) -> Tensor:
        return torch.func.jvp(total, (a,), (torch.ones_like(a),))[1]

    want = tangent(logits)
    with pytest.raises(Exception, match=r"inside torch.compile|Observed exception"):
        torch.compile(tangent, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(
        torch.compile(tangent, backend="aot_eager")(logits), want
    )  # falls back to eager
    with torch.autograd.forward_ad.dual_level():  # around a compiled function
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        result = torch.autograd.forward_ad.unpack_dual(torch.compile(total, backend="aot_eager")(dual))
        torch.testing.assert_close(result.tangent, want)


def test_registered_op_still_drops_tangents() -> None:
    """If this fails, torch gives registered ops forward derivatives: the check for compilation may go."""
    from noisyseg_fast import _task_autograd

    logits, sigma, y = example(BOTH[0])
    options = [1.0, 1.0, 0.0, 1e-5, 0.0]

    def run(z: Tensor) -> Tensor:
        return _task_autograd._terms_op(z, sigma, y, None, None, "uncertainty", options)[0]

    assert not torch.func.jvp(run, (logits,), (torch.ones_like(logits),))[1].any()


# ---- layouts --------------------------------------------------------------------------------------


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values (B, M, H, W) in other strides."""
    wide = torch.full((*x.shape[:2], 2 * x.shape[2], 3 * x.shape[3]), 9, dtype=x.dtype)
    wide[:, :, ::2, ::3] = x
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch inside": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "sliced": wide[:, :, ::2, ::3],
        "expanded": x[:1].expand_as(x),
        "expanded pixels": x[:, :, :1].expand_as(x),
    }


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_strides(name: str, dtype: torch.dtype) -> None:
    logits, other, labels = example(name, (9, 35), batch=3)
    inputs, mask = (logits.to(dtype), other.to(dtype), labels), torch.rand(3, 1, 9, 35) > 0.3
    for kind in layouts(logits):
        these, keep = tuple(layouts(x)[kind] for x in inputs), layouts(mask)[kind]
        copies = [x.clone() for x in (*these, keep)]
        plain = tuple(x.contiguous() for x in these)
        want, want_grads = terms_and_grads(task_losses, name, plain, mask=keep.contiguous())
        leaves = [x.detach().requires_grad_() for x in these[:2]]
        terms = call(task_losses, name, (*leaves, these[2]), mask=keep)
        grads = torch.autograd.grad(weighted(terms, name), leaves)
        assert all(torch.equal(a, b) for a, b in zip(terms, want, strict=True)), kind
        assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True)), kind
        if kind in ("channels_last", "transposed", "batch inside"):
            assert all(g.stride() == x.stride() for g, x in zip(grads, these, strict=False)), kind
        assert all(torch.equal(x, c) for x, c in zip((*these, keep), copies, strict=True)), (
            "inputs were written"
        )


@pytest.mark.parametrize("name", BOTH)
def test_numpy_gives_the_same(name: str) -> None:
    inputs, mask = example(name, (9, 11)), torch.rand(2, 9, 11) > 0.3
    for a in (torch.float64, torch.float32, torch.float16):
        these = (inputs[0].to(a), inputs[1].to(a), inputs[2])
        arrays = tuple(x.numpy() for x in these)
        want, got = (call(task_losses, name, x, mask=m) for x, m in ((these, mask), (arrays, mask.numpy())))
        for x, y in zip(got, want, strict=True):
            assert isinstance(x, np.ndarray)
            np.testing.assert_array_equal(x, y.numpy())
        assert type(got) is type(want)
        want, *want_grads = call(task_losses, name, these, mask=mask, return_grad=True)
        got, *grads = call(task_losses, name, arrays, mask=mask.numpy(), return_grad=True)
        for x, y in zip((*got, *grads), (*want, *want_grads), strict=True):
            np.testing.assert_array_equal(x, y.numpy())
    back = [np.ascontiguousarray(x.numpy()[..., ::-1, ::-1])[..., ::-1, ::-1] for x in inputs]
    assert back[0].strides[-1] < 0
    for x, y in zip(call(task_losses, name, tuple(back)), call(task_losses, name, inputs), strict=True):
        np.testing.assert_array_equal(x, y.numpy())


def test_return_grad() -> None:
    logits, sigma, y = example(BOTH[0])
    for reduction in ("mean", "sum", "image"):
        terms, by_logits, by_sigma = uncertainty_weighted_loss(
            logits, y, sigma, reduction=reduction, return_grad=True
        )
        a, b = logits.clone().requires_grad_(), sigma.clone().requires_grad_()
        want = uncertainty_weighted_loss(a, y, b, reduction=reduction)
        want.total.sum().backward()
        assert all(torch.equal(x, w) for x, w in zip(terms, want, strict=True))
        assert torch.equal(by_logits, a.grad)
        assert torch.equal(by_sigma, b.grad)
    logits, sdf, target = example(BOTH[1])
    for squeeze, weights in itertools.product((False, True), ((1.0, 1.0, 1.0), (0.5, 0.0, 0.1))):
        d = sdf[:, 0] if squeeze else sdf
        terms, by_logits, by_sdf = dual_task_loss(
            logits, d, target[:, 0], return_grad=True, grad_weights=weights
        )
        a, b = logits.clone().requires_grad_(), d.clone().requires_grad_()
        want = dual_task_loss(a, b, target)
        sum(w * x for w, x in zip(weights, want, strict=True)).backward()
        assert all(torch.equal(x, w) for x, w in zip(terms, want, strict=True))
        torch.testing.assert_close(by_logits, a.grad, rtol=1e-13, atol=0)
        torch.testing.assert_close(by_sdf, b.grad, rtol=1e-13, atol=0)
        assert by_sdf.shape == d.shape


# ---- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", FLOATS)
def test_huge_inputs_stay_finite(name: str, dtype: torch.dtype) -> None:
    logits, other, labels = example(name)
    for scale in (1e4, 300.0):
        z = (scale * logits.sign()).to(dtype)
        ends = (other > other.mean()).to(dtype) if name == BOTH[0] else (2e4 * other.sign()).to(dtype)
        for options in ({}, {"eps": 0.0}):
            for target in (labels, torch.zeros_like(labels), torch.ones_like(labels)):
                terms, grads = terms_and_grads(task_losses, name, (z, ends, target), **options)
                assert all(torch.isfinite(x).all() for x in (*terms, *grads))
                want, _ = terms_and_grads(reference, name, (z.double(), ends.double(), target), **options)
                for a, b in zip(terms, want, strict=True):
                    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_nan(name: str, dtype: torch.dtype) -> None:
    logits, other, labels = example(name)
    inputs, mask = (logits.to(dtype), other.to(dtype), labels), torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 2] = mask[1, 0, :, 3] = False
    want, want_grads = terms_and_grads(task_losses, name, inputs, mask=mask)
    for bad in (float("nan"), float("inf")):
        spoilt = (*(x.masked_fill(~mask, bad) for x in inputs[:2]), inputs[2].masked_fill(~mask, 255))
        terms, grads = terms_and_grads(task_losses, name, spoilt, mask=mask)
        assert all(torch.equal(a, b) for a, b in zip((*terms, *grads), (*want, *want_grads), strict=True))
    for i in (0, 1):  # and where it counts it is seen
        spoilt = [x.clone() for x in inputs]
        spoilt[i][1, 0, 0, 0] = float("nan")
        terms, grads = terms_and_grads(task_losses, name, tuple(spoilt))
        assert torch.isnan(terms[0] if name == BOTH[0] else terms[2])
        assert torch.isnan(grads[i]).any()


@pytest.mark.parametrize("name", BOTH)
def test_nothing_there(name: str) -> None:
    inputs = example(name)
    every: list[dict[str, Any]] = [{}, {"eps": 0.0}]
    every += (
        [{"reduction": "image", "per_image": True}]
        if name == BOTH[1]
        else [{"reduction": "sum"}, {"reduction": "image"}]
    )
    for options in every:
        terms, grads = terms_and_grads(task_losses, name, inputs, mask=torch.zeros(2, 5, 7), **options)
        assert not any(x.any() for x in (*terms, *grads))
        half = torch.ones(2, 5, 7)
        half[0] = 0
        terms, grads = terms_and_grads(task_losses, name, inputs, mask=half, **options)
        assert all(torch.isfinite(x).all() for x in (*terms, *grads))
        assert not grads[0][0].any()
        assert grads[0][1].any()
        for cut in (lambda x: x[:0], lambda x: x[..., :0]):
            empty = tuple(cut(x) for x in inputs)
            terms, grads = terms_and_grads(task_losses, name, empty, **options)
            assert not any(x.any() for x in terms)
            assert all(g.shape == x.shape for g, x in zip(grads, empty, strict=False))
            run = lambda a, b, e=empty, o=options: call(task_losses, name, (a, b, e[2]), **o)[0]  # noqa: E731
            _, tangent = torch.func.jvp(
                run, empty[:2], (torch.ones_like(empty[0]), torch.ones_like(empty[1]))
            )
            assert not tangent.any()
    if name == BOTH[0]:
        terms, grads = terms_and_grads(task_losses, name, inputs, raters=torch.zeros(2, 3))
        assert not any(x.any() for x in (*terms, *grads))


@pytest.mark.parametrize("name", BOTH)
def test_labels_out_of_range(name: str) -> None:
    inputs = example(name, (5, 67))
    argument = "annotations" if name == BOTH[0] else "target"
    mask = torch.ones(2, 5, 67)
    mask[1, 4, 66] = mask[0, 0, 3] = 0
    want = call(task_losses, name, inputs, mask=mask)
    for dtype, values in (
        (torch.uint8, (2, 255)),
        (torch.int32, (-1, 2, 2**30)),
        (torch.int64, (-1, 256, 2**40, -(2**62))),
    ):
        for value in values:
            bad = inputs[2].to(dtype)
            bad[1, 0, 4, 66] = bad[0, 0, 0, 3] = value
            with pytest.raises(ValueError, match=f"{argument} holds integers other than 0 and 1"):
                call(task_losses, name, (*inputs[:2], bad))
            got = call(task_losses, name, (*inputs[:2], bad), mask=mask)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            with pytest.raises(ValueError, match="other than 0 and 1"):
                call(task_losses, name, tuple(x.numpy() for x in (*inputs[:2], bad)))


# ---- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_bits_every_time(name: str, dtype: torch.dtype) -> None:
    logits, other, labels = example(name, (97, 131))
    inputs, results = (logits.to(dtype), other.to(dtype), labels), []
    for run in range(100):
        torch.set_num_threads(1 + run % 2)
        terms, grads = terms_and_grads(task_losses, name, inputs)
        results.append((*terms, *grads))
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_instruction_sets_agree() -> None:
    code = """
import torch
from noisyseg_fast.task_losses import dual_task_loss, uncertainty_weighted_loss
torch.manual_seed(0)
z, u, d = 3 * torch.randn(2, 1, 33, 31), torch.rand(2, 3, 33, 31), 1e-3 * torch.randn(2, 1, 33, 31)
y = (torch.rand(2, 3, 33, 31) > 0.5).to(torch.uint8)
both = (
    uncertainty_weighted_loss(z, y, u, return_grad=True),
    dual_task_loss(z, d, y[:, 0], return_grad=True),
)
for terms, *grads in both:
    print(*torch.cat([x.flatten() for x in terms]).tolist())
    for g in grads:
        print(*g.flatten().tolist())
"""
    outputs = []
    for isa in ("baseline", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "NOISYSEG_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        outputs.append([torch.tensor([float(x) for x in line.split()]) for line in done.stdout.splitlines()])
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            assert error(b, a) <= 1e-6


# ---- in PyTorch -----------------------------------------------------------------------------------


def walk(x: Tensor) -> list[int]:
    """The strides that mean something."""
    return [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]


@pytest.mark.parametrize("name", BOTH)
def test_compiled_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    logits, other, labels = example(name, (17, 19))
    mask = torch.rand(2, 17, 19) > 0.3
    weights = torch.tensor([[1, 0, 1], [1, 1, 1]]) if name == BOTH[0] else torch.tensor([True, False])
    extra = {"raters" if name == BOTH[0] else "labelled": weights, "mask": mask}
    whole: dict[str, Any] = (
        {"reduction": "image"} if name == BOTH[0] else {"per_image": True, "routing": "shared"}
    )

    def step(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        first = call(task_losses, name, (a, b, c), **extra)
        return (weighted(first, name), weighted(call(task_losses, name, (a, b, c), **whole), name), *first)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    last = torch.channels_last
    for cast in (lambda x: x.float(), lambda x: x.float().to(memory_format=last), lambda x: x.bfloat16()):
        results = []
        for run in (step, compiled):
            leaves = [cast(x).requires_grad_() for x in (logits, other)]
            values = run(*leaves, labels)
            (values[0] + 2 * values[1]).backward()
            results.append([*(v.detach() for v in values), *(x.grad for x in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert [walk(a) for a in results[0]] == [walk(b) for b in results[1]]


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    logits, sigma, y = (x.float() for x in example(BOTH[0], (17, 19)))
    y = y.to(torch.uint8)

    def total(z: Tensor, u: Tensor) -> Tensor:
        return uncertainty_weighted_loss(z, y, u).total

    results = []
    for run in (total, torch.compile(total, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (logits, sigma)]
        value = run(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    logits, other, labels = (x.float() for x in example(name, (9, 11)))
    labels = labels.to(torch.uint8)
    layer = torch.nn.Conv2d(1, 1, 1)
    with torch.autocast("cpu", dtype):
        z = layer(logits)
        terms = call(task_losses, name, (z, other, labels))
    assert z.dtype == dtype
    assert terms[0].dtype == torch.float32
    weighted(terms, name).backward()
    assert layer.weight.grad.any()
    assert torch.equal(terms[0], call(task_losses, name, (z.detach(), other, labels))[0])


def test_dtypes_of_the_maps_may_differ() -> None:
    """A segmentation net in half precision, a distance map in float32."""
    logits, sdf, target = example(BOTH[1])
    terms = dual_task_loss(logits.half(), sdf.float(), target)
    want = dual_task_loss(logits.half().float(), sdf.float(), target)
    assert all(torch.equal(a, b) for a, b in zip(terms, want, strict=True))


@pytest.mark.parametrize("name", BOTH)
def test_gradient_only_for_two(name: str) -> None:
    inputs = example(name, soft=True)
    others = ("annotations", "uncertainty", "raters") if name == BOTH[0] else ("target", "sdf", "labelled")
    weights = torch.ones(2, 3) if name == BOTH[0] else torch.ones(2)
    for argument, options in (
        (others[0], {}),
        (others[2], {others[2]: weights.clone().requires_grad_()}),
        ("mask", {"mask": torch.ones(2, 5, 7).requires_grad_()}),
    ):
        labels = inputs[2].clone().requires_grad_(argument == others[0])
        with pytest.raises(
            ValueError, match=f"{argument} requires a gradient, but only logits and {others[1]} receive one"
        ):
            call(task_losses, name, (*inputs[:2], labels), **options)
        with torch.no_grad():  # nothing is lost there
            call(task_losses, name, (*inputs[:2], labels), **options)


@pytest.mark.parametrize("name", BOTH)
def test_modules(name: str) -> None:
    inputs = example(name)
    mask = torch.rand(2, 5, 7) > 0.5
    if name == BOTH[0]:
        module = UncertaintyWeightedLoss(dice_weight=0.5, entropy="binary")
        raters = torch.tensor([[1, 1, 0], [1, 0, 0]])
        got = module(inputs[0], inputs[2], inputs[1], raters, mask)
        want = call(task_losses, name, inputs, dice_weight=0.5, entropy="binary", raters=raters, mask=mask)
        assert "dice_weight=0.5" in repr(module)
    else:
        module = DualTaskLoss(k=300.0, routing="shared")
        got = module(inputs[0], inputs[1], inputs[2], labelled=1, mask=mask)
        want = call(task_losses, name, inputs, k=300.0, routing="shared", labelled=1, mask=mask)
        assert "routing='shared'" in repr(module)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not list(module.parameters())
    for argument in ("gamma", "mask", "return_grad"):
        with pytest.raises(
            TypeError, match=f"{type(module).__name__} has no argument {argument!r}; it takes"
        ):
            type(module)(**{argument: 1})


def test_the_benchmark_compares_equals() -> None:
    bench = pytest.importorskip("bench.task_losses")
    from noisyseg_fast.timing import measure

    for case in (
        bench.uncertainty_case((2, 1, 9, 11), deadline=0.0),
        bench.dual_task_case((2, 1, 9, 11), deadline=0.0),
    ):
        states = {name: (t.state, t.note) for name, t in measure(case, 0.01).timings.items()}
        assert states[case.contenders[0].name][0] == states["eager"][0] == "ok", states


# ---- error messages -------------------------------------------------------------------------------

Z, Y, U = torch.zeros(2, 1, 5, 7), torch.zeros(2, 3, 5, 7, dtype=torch.uint8), torch.zeros(2, 3, 5, 7)
D, G = torch.zeros(2, 1, 5, 7), torch.zeros(2, 5, 7, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        (
            (torch.zeros(5), Y, U),
            {},
            ValueError,
            r"logits must be \(B, 1, \*S\) with 2 to 8 dimensions, got shape \(5,\)",
        ),
        ((Y.float(), Y, U), {}, ValueError, r"logits must be \(B, 1, \*S\) .*, got shape \(2, 3, 5, 7\)"),
        ((Z.int(), Y, U), {}, TypeError, "logits has dtype int32; use one of float16"),
        ((None, Y, U), {}, TypeError, "logits must be an array, not None"),
        ((Z, None, U), {}, TypeError, "annotations must be an array, not None"),
        ((Z, Y, None), {}, TypeError, "uncertainty must be an array, not None"),
        (
            (Z, Y[:1], U),
            {},
            ValueError,
            r"annotations has shape \(1, 3, 5, 7\); .* it must be \(2, M, 5, 7\) with M >= 1",
        ),
        ((Z, Y[:, 0], U), {}, ValueError, r"annotations has shape \(2, 5, 7\)"),
        ((Z, Y[:, :0], U[:, :0]), {}, ValueError, r"annotations has shape \(2, 0, 5, 7\)"),
        (
            (Z[..., :1], torch.zeros(2, 513, 5, 1), U),
            {},
            ValueError,
            "annotations has 513 maps; at most 512 are supported",
        ),
        (
            (Z, Y, U[:, :2]),
            {},
            ValueError,
            r"uncertainty has shape \(2, 2, 5, 7\); it must be \(2, 3, 5, 7\), as annotations",
        ),
        ((Z, Y, Y), {}, TypeError, "uncertainty has dtype uint8; use one of float16"),
        ((Z, Y.numpy(), U), {}, TypeError, "logits is a torch array and annotations a numpy array"),
        ((Z, Y.to(torch.int16), U), {}, TypeError, "annotations has dtype torch.int16"),
        (
            (Z, Y, U),
            {"raters": torch.ones(3)},
            ValueError,
            r"raters has shape \(3,\); it must be \(B, M\) = \(2, 3\)",
        ),
        (
            (Z, Y, U),
            {"raters": -torch.ones(2, 3)},
            ValueError,
            "raters holds a negative or infinite weight or NaN",
        ),
        ((Z, Y, U), {"raters": torch.full((2, 3), math.nan)}, ValueError, "raters holds a negative"),
        (
            (Z, Y, U),
            {"raters": torch.full((2, 3), math.inf)},
            ValueError,
            "raters holds a negative or infinite",
        ),
        (
            (Z, Y, U),
            {"mask": torch.ones(2, 5, 6)},
            ValueError,
            r"mask has shape \(2, 5, 6\); .* it must be \(2, 5, 7\)",
        ),
        ((Z, Y, U), {"mask": 1.0}, TypeError, "mask must be a torch tensor"),
        ((Z, Y, U), {"entropy": "log2"}, ValueError, "entropy must be one of paper, binary, got 'log2'"),
        (
            (Z, Y, U),
            {"reduction": "none"},
            ValueError,
            "reduction must be one of mean, sum, image, got 'none'",
        ),
        ((Z, Y, U), {"eps": -1.0}, ValueError, "eps must be finite and >= 0, got -1.0"),
        ((Z, Y, U), {"dice_weight": math.nan}, ValueError, "dice_weight must be finite, got nan"),
        (
            (Z, Y, U),
            {"consistency_weight": math.inf},
            ValueError,
            "consistency_weight must be finite, got inf",
        ),
    ],
)
def test_wrong_uncertainty_arguments(
    arguments: Any, options: dict[str, Any], kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        uncertainty_weighted_loss(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((Y.float(), D, G), {}, ValueError, r"logits must be \(B, 1, \*S\)"),
        ((Z, None, G), {}, TypeError, "sdf must be an array, not None"),
        ((Z, D, None), {}, TypeError, "target must be an array, not None"),
        (
            (Z, D[:1], G),
            {},
            ValueError,
            r"sdf has shape \(1, 1, 5, 7\); .* it must be \(2, 5, 7\) or \(2, 1, 5, 7\)",
        ),
        ((Z, D, G[..., :3]), {}, ValueError, r"target has shape \(2, 5, 3\)"),
        ((Z, D.int(), G), {}, TypeError, "sdf has dtype int32; use one of float16"),
        ((Z, D.numpy(), G), {}, TypeError, "logits is a torch array and sdf a numpy array"),
        ((Z, D, G), {"labelled": 3}, ValueError, r"labelled must lie in 0\.\.2, the number of images, got 3"),
        ((Z, D, G), {"labelled": -1}, ValueError, r"labelled must lie in 0\.\.2"),
        ((Z, D, G), {"labelled": True}, TypeError, "labelled must be a torch tensor"),
        (
            (Z, D, G),
            {"labelled": torch.ones(3)},
            ValueError,
            r"labelled has shape \(3,\); it must be \(2,\), or a number",
        ),
        (
            (Z, D, G),
            {"routing": "both"},
            ValueError,
            "routing must be one of own, shared, logits, sdf, got 'both'",
        ),
        ((Z, D, G), {"k": 0.0}, ValueError, "k must be finite and > 0, got 0.0"),
        ((Z, D, G), {"k": math.inf}, ValueError, "k must be finite and > 0, got inf"),
        ((Z, D, G), {"eps": math.nan}, ValueError, "eps must be finite and >= 0, got nan"),
        ((Z, D, G), {"reduction": "sum"}, ValueError, "reduction must be one of mean, image, got 'sum'"),
        ((Z, D, G), {"reduction": "image"}, ValueError, "reduction 'image' needs per_image=True"),
        ((Z, D, G), {"mask": torch.ones(2, 2, 5, 7)}, ValueError, r"mask has shape \(2, 2, 5, 7\)"),
        (
            (Z, D, G),
            {"return_grad": True, "grad_weights": (1, 2)},
            ValueError,
            "grad_weights must be three numbers",
        ),
    ],
)
def test_wrong_dual_task_arguments(arguments: Any, options: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        dual_task_loss(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_strides_that_do_not_merge() -> None:
    logits, sdf, target = example(BOTH[1], (2, 3, 2, 5))
    crossed = logits.permute(0, 1, 5, 3, 2, 4).contiguous().permute(0, 1, 4, 3, 5, 2)
    with pytest.raises(ValueError, match="more than three separate pixel axes; make them contiguous"):
        dual_task_loss(crossed, sdf, target)
