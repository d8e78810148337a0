"""The fused losses against noisyseg_fast.reference, torch, MONAI and PyMIC."""

from __future__ import annotations

import functools
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

import noisyseg_fast  # noqa: E402
from noisyseg_fast import losses, reference  # noqa: E402

F = torch.nn.functional
Tensor = torch.Tensor
REGION = ("nr_dice_loss", "dice_loss", "focal_dice_loss", "generalized_dice_loss")
SUMS = ("dice_ce_loss", "dice_mae_loss")  # of a region and a pixel loss
KINDS = {
    "pixel_loss": {},
    "focal": {"kind": "focal"},
    "focal 0.5": {"kind": "focal", "focal_gamma": 0.5},
    "mae": {"kind": "mae"},
    "gce": {"kind": "gce"},
    "mse": {"kind": "mse"},
    "kl": {"kind": "kl"},
}
FAMILY = (*REGION, *SUMS, *KINDS)
LABELS = (torch.uint8, torch.bool, torch.int32, torch.int64)
SHAPES = ((37,), (1,), (5, 7), (1, 9), (33, 31), (3, 5, 7), (4, 1, 17))


def ours(name: str, module: Any = losses) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(module, "pixel_loss" if name in KINDS else name)
    return functools.partial(function, **KINDS.get(name, {}))


def oracle(name: str) -> Callable[..., Any]:
    return ours(name, reference)


def many(name: str) -> str:
    """A reduction that gives more than one value."""
    return "image" if name in SUMS else "none"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def value_and_grad(
    function: Callable[..., Tensor], logits: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    z = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(z, *args, **options)
    # not all ones, so that a gradient that ignores its place is noticed
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (grad,) = torch.autograd.grad(loss, z, upstream)
    return loss.detach(), grad


def error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in norm."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def example(
    shape: tuple[int, ...],
    classes: int,
    *,
    seed: int = 0,
    batch: int = 2,
    soft: bool = False,
    scale: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """float64 logits (B, C, *S) and labels (B, *S), or soft labels (B, C, *S)."""
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, *shape, generator=random, dtype=torch.float64)
    if soft:
        return logits, torch.rand(batch, classes, *shape, generator=random, dtype=torch.float64)
    return logits, torch.randint(max(classes, 2), (batch, *shape), generator=random)


def close(name: str, logits: Tensor, target: Tensor, atol: float = 1e-6, **options: Any) -> None:
    """Value and gradient equal the reference's: float64 to 1e-12, float32 to 1e-6 in norm."""
    want, want_grad = value_and_grad(oracle(name), logits.double(), target, **options)
    loss, grad = value_and_grad(ours(name), logits.double(), target, **options)
    assert loss.dtype == torch.float64
    assert loss.shape == want.shape
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-13)
    assert error(grad, want_grad) <= 1e-12 or (grad - want_grad).abs().max() <= 1e-15
    # the same numbers that float32 holds, computed in float64
    single = logits.float()
    want, want_grad = value_and_grad(oracle(name), single.double(), target, **options)
    loss, grad = value_and_grad(ours(name), single, target, **options)
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=atol)
    # Near |p - g| = 0, as soft targets have it, a slope like sqrt |p - g| magnifies the rounding of p.
    steep = name == "nr_dice_loss" and (target.is_floating_point() or options.get("label_smoothing"))
    # (or, where a pixel's own gradient vanishes, to the rounding of the probabilities)
    rounding = 1e-7 / max(logits[:, 0].numel(), 1)
    assert error(grad, want_grad) <= (1e-5 if steep else 1e-6) or (grad - want_grad).abs().max() <= rounding


# ---- against the reference ------------------------------------------------------------------------


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_reference(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    name = pick(*FAMILY)
    classes, shape = pick(1, 2, 3, 14), pick(*SHAPES)
    soft = data.draw(st.booleans())
    logits, target = example(
        shape, classes, seed=data.draw(st.integers(0, 99)), batch=pick(1, 2, 3), soft=soft
    )
    if not soft:
        target = target.to(pick(*(LABELS if classes < 3 else (torch.uint8, torch.int32, torch.int64))))
    random = torch.Generator().manual_seed(1)
    pixels = (logits.shape[0], *shape)
    options: dict[str, Any] = {
        "activation": "sigmoid" if classes == 1 else pick("sigmoid", "softmax"),
        "weight": pick(None, torch.rand(pixels, generator=random, dtype=torch.float64)),
        "mask": pick(None, torch.rand(pixels, generator=random) > 0.3),
        "reduction": pick("mean", "sum", "image", many(name)),
        "label_smoothing": pick(0.0, 0.0, 0.1),
    }
    if name in REGION or name in SUMS:
        options["denominator"] = pick("linear", "squared")
        options["per_image"] = options["reduction"] == "image" or data.draw(st.booleans())
        options["include_background"] = data.draw(st.booleans())
        options["eps"] = pick(1e-5, 1.0)
    if name not in REGION:
        options["class_weight"] = pick(None, [0.5 + c for c in range(classes)])
    if name == "nr_dice_loss":
        options["gamma"] = pick(1.0, 1.3, 1.5, 2.0)
    if name == "focal_dice_loss":
        options["beta"] = pick(0.5, 2.0)
    if name == "generalized_dice_loss":
        options["class_weighting"] = pick("square", "simple", "uniform")
    if name == "dice_ce_loss":
        options["dice_weight"], options["ce_weight"] = pick(1.0, 0.5), pick(1.0, 0.5, 0.0)
    close(name, logits, target, **options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_ignored_labels(data: st.DataObject) -> None:
    """ignore_index leaves out what mask does, whether or not it is a class, in every dtype of labels."""
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    name, classes, label = pick(*FAMILY), pick(1, 2, 3, 14), pick(255, 1, 0, 14, -100, -1, 2**31, 2**40)
    dtype = pick(torch.uint8, torch.int32, torch.int64)
    logits, target = example((5, 67), classes)
    if torch.iinfo(dtype).min <= label <= torch.iinfo(dtype).max:
        target[torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = label
    target = target.to(dtype)
    outside = target.long() == label
    options: dict[str, Any] = {"activation": "sigmoid" if classes == 1 else pick("sigmoid", "softmax")}
    options["weight"] = pick(None, torch.rand(target.shape))
    if name not in REGION:
        options["class_weight"] = pick(None, [0.5 + c for c in range(classes)])
    function = ours(name)
    for z in (logits, logits.float()):
        got = value_and_grad(function, z, target, ignore_index=label, reduction=many(name), **options)
        want = value_and_grad(
            function, z, target.masked_fill(outside, 0), mask=~outside, reduction=many(name), **options
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        torch.testing.assert_close(
            function(logits, target, ignore_index=label, **options),
            function(logits, target.masked_fill(outside, 0), mask=~outside, **options),
            rtol=1e-13,
            atol=0,
        )


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "image", "none"])
def test_boundary_and_consistency(activation: str, reduction: str) -> None:
    for classes in (1, 2, 3, 14)[activation == "softmax" :]:
        logits, other = example((5, 67), classes)[0], example((5, 67), classes, seed=1)[0]
        random = torch.Generator().manual_seed(2)
        weight, mask = (torch.rand(2, 5, 67, generator=random) for _ in range(2))
        mask = mask > 0.3
        options: dict[str, Any] = {"activation": activation, "reduction": reduction}
        for extra in ({}, {"weight": weight, "mask": mask}):
            for background in (True, False):
                # terms of both signs, up to 20 each, cancel in the sum
                close(
                    "boundary_loss",
                    logits,
                    5 * other,
                    1e-3,
                    include_background=background,
                    **options,
                    **extra,
                )
            for kind in ("mse", "mae", "kl"):
                close("consistency_loss", logits, other, kind=kind, **options, **extra)
                z = logits.float()
                assert losses.consistency_loss(z, z, kind=kind, **options).abs().max() < 1e-6 * 700
        if classes == 1:
            assert torch.equal(
                losses.boundary_loss(logits, other[:, 0], activation=activation),
                losses.boundary_loss(logits, other, activation=activation),
            )


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    ("classes", "shape"), [(65, (13, 11)), (300, (7,)), (1024, (3,)), (2, (3, 70, 71)), (1, (9001,))]
)
def test_many_classes_and_pixels(name: str, classes: int, shape: tuple[int, ...]) -> None:
    logits, target = example(shape, classes)
    for activation in ("sigmoid", "softmax")[: 1 + (classes > 1)]:
        close(name, logits, target.to(torch.int32), activation=activation)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", LABELS)
@pytest.mark.parametrize("classes", [1, 2])
def test_label_dtypes_and_channel_axis(name: str, dtype: torch.dtype, classes: int) -> None:
    logits, target = example((5, 7), classes)
    function = ours(name)
    want, want_grad = value_and_grad(function, logits, target, activation="sigmoid")
    for labels in (target.to(dtype), target.to(dtype)[:, None]):
        loss, grad = value_and_grad(function, logits, labels, activation="sigmoid")
        assert torch.equal(loss, want)
        assert torch.equal(grad, want_grad)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("classes", [1, 3])
def test_one_hot_and_soft_dtypes(name: str, classes: int) -> None:
    logits, target = example((5, 7), classes)
    hot = target[:, None] if classes == 1 else F.one_hot(target, classes).movedim(-1, 1)
    function = ours(name)
    want, want_grad = value_and_grad(function, logits, target, activation="sigmoid")
    for dtype in (
        torch.uint8,
        torch.bool,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        loss, grad = value_and_grad(function, logits, hot.to(dtype), activation="sigmoid")
        torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)
        torch.testing.assert_close(grad, want_grad, rtol=1e-12, atol=1e-15)
    if classes == 1:  # soft labels without the channel axis
        soft = torch.rand(2, 5, 7, dtype=torch.float64)
        assert torch.equal(
            function(logits, soft, activation="sigmoid"),
            function(logits, soft[:, None], activation="sigmoid"),
        )


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_half_precision_rounds_once(name: str, dtype: torch.dtype, tolerance: float, activation: str) -> None:
    logits, target = example((33, 31), 3)
    logits = logits.to(dtype)
    function = ours(name)
    # a loss scale, as GradScaler has it, keeps float16's gradient out of the denormals
    scaled = lambda *args, **options: 1024 * function(*args, **options)  # noqa: E731
    loss, grad = value_and_grad(scaled, logits, target, activation=activation)
    want, want_grad = value_and_grad(scaled, logits.float(), target, activation=activation)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert torch.equal(loss, want)
    torch.testing.assert_close(grad.float(), want_grad, rtol=tolerance, atol=1e-7)


# ---- layouts --------------------------------------------------------------------------------------


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values (B, C, H, W) in other strides."""
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


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_strides(name: str, activation: str, dtype: torch.dtype) -> None:
    logits, _ = example((9, 35), 3, batch=3)
    logits = logits.to(dtype)
    soft = torch.rand(logits.shape)
    labels = torch.randint(3, (3, 1, 9, 35), dtype=torch.uint8)
    weight, mask = torch.rand(3, 1, 9, 35), torch.rand(3, 1, 9, 35) > 0.3
    function = ours(name)
    for kind in _layouts(logits):
        z = _layouts(logits)[kind]
        for target in (soft, labels):
            given_, w, m = (_layouts(x)[kind] for x in (target, weight, mask))
            copies = [x.clone() for x in (z, given_, w, m)]
            for reduction in ("mean", many(name)):
                options: dict[str, Any] = {"activation": activation, "reduction": reduction}
                # contiguous copies must give the same bits
                want, want_grad = value_and_grad(
                    function,
                    z.contiguous(),
                    given_.contiguous(),
                    weight=w.contiguous(),
                    mask=m.contiguous(),
                    **options,
                )
                leaf = z.detach().requires_grad_()
                loss = function(leaf, given_, weight=w, mask=m, **options)
                upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
                (grad,) = torch.autograd.grad(loss, leaf, upstream)
                assert torch.equal(loss, want), kind
                assert torch.equal(grad, want_grad), kind
                if kind in ("channels_last", "transposed", "batch inside"):
                    assert grad.stride() == z.stride(), kind
                # an expanded gradient from above
                (grad,) = torch.autograd.grad(function(leaf, given_, weight=w, mask=m, **options).sum(), leaf)
                assert torch.isfinite(grad).all()
            assert all(torch.equal(x, c) for x, c in zip((z, given_, w, m), copies, strict=True)), (
                "inputs were written"
            )


@pytest.mark.parametrize("name", FAMILY)
def test_numpy_gives_the_same_value(name: str) -> None:
    logits, target = example((9, 11), 3)
    weight = torch.rand(2, 9, 11)
    function = ours(name)
    for z in (logits, logits.float(), logits.half()):
        for reduction in ("mean", many(name)):
            want = function(z, target, weight=weight, reduction=reduction)
            value = function(z.numpy(), target.numpy(), weight=weight.numpy(), reduction=reduction)
            assert isinstance(value, np.ndarray)
            np.testing.assert_array_equal(value, want.numpy())
    back = [
        np.ascontiguousarray(x.numpy()[..., ::-1, ::-1])[..., ::-1, ::-1] for x in (logits, target, weight)
    ]
    assert back[0].strides[-1] < 0
    np.testing.assert_array_equal(
        function(back[0], back[1], weight=back[2], reduction=many(name)),
        function(logits, target, weight=weight, reduction=many(name)).numpy(),
    )
    if name == "pixel_loss":
        np.testing.assert_array_equal(
            function(logits.numpy(), target.numpy(), class_weight=[1.0, 2.0, 3.0]),
            function(logits, target, class_weight=[1.0, 2.0, 3.0]).numpy(),
        )


def test_class_weight_of_any_stride() -> None:
    logits, target = example((9, 11), 3)
    wide = torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0])
    want = losses.pixel_loss(logits, target, class_weight=[1.0, 2.0, 3.0])
    assert torch.equal(losses.pixel_loss(logits, target, class_weight=wide[::2]), want)
    assert torch.equal(losses.pixel_loss(logits, target, class_weight=wide[::2].double()), want)


# ---- against others' definitions ------------------------------------------------------------------


def test_dice_equals_monai() -> None:
    monai = pytest.importorskip("monai.losses")
    logits, target = example((9, 11), 3)
    hot = F.one_hot(target, 3).movedim(-1, 1).double()
    for background in (True, False):
        for batch in (True, False):
            want, want_grad = value_and_grad(
                monai.DiceLoss(
                    sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5, include_background=background, batch=batch
                ),
                logits,
                hot,
            )
            loss, grad = value_and_grad(
                losses.dice_loss,
                logits,
                target,
                denominator="linear",
                include_background=background,
                per_image=not batch,
            )
            torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
            assert error(grad, want_grad) < 1e-12


def test_cross_entropy_equals_torch() -> None:
    logits, target = example((9, 11), 5)
    class_weight = torch.tensor([0.3, 1.0, 2.0, 0.7, 1.1], dtype=torch.float64)
    for cw in (None, class_weight):
        for reduction in ("mean", "sum", "none"):
            want, want_grad = value_and_grad(F.cross_entropy, logits, target, weight=cw, reduction=reduction)
            loss, grad = value_and_grad(
                losses.pixel_loss, logits, target, class_weight=cw, reduction=reduction
            )
            torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-15)
            assert error(grad, want_grad) < 1e-12
    ignored = torch.where(torch.rand(target.shape) < 0.3, 255, target)
    want = F.cross_entropy(logits, ignored, weight=class_weight, ignore_index=255)
    loss = losses.pixel_loss(logits, ignored, class_weight=class_weight, mask=ignored != 255)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    two, binary = logits[:, :1], (target > 2).to(torch.uint8)
    want, want_grad = value_and_grad(F.binary_cross_entropy_with_logits, two, binary[:, None].double())
    loss, grad = value_and_grad(losses.pixel_loss, two, binary, activation="sigmoid")
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert error(grad, want_grad) < 1e-12


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_smoothed_cross_entropy_equals_torch(smoothing: float, reduction: str) -> None:
    logits, target = example((9, 11), 5)
    target[torch.rand(target.shape) < 0.3] = -100
    for cw in (None, torch.tensor([0.3, 1.0, 2.0, 0.7, 1.1], dtype=torch.float64)):
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        want, want_grad = value_and_grad(F.cross_entropy, logits, target, weight=cw, **options)
        options["ignore_index"] = -100
        loss, grad = value_and_grad(losses.pixel_loss, logits, target, class_weight=cw, **options)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-15)
        assert error(grad, want_grad) < 1e-12


def test_others_equal_monai() -> None:
    monai = pytest.importorskip("monai.losses")
    logits, target = example((9, 11), 3)
    hot = F.one_hot(target, 3).movedim(-1, 1).double()
    pairs: list[tuple[Any, Any]] = []
    eps: dict[str, Any] = {"smooth_nr": 1e-5, "smooth_dr": 1e-5}
    for weighting in ("square", "simple", "uniform"):
        for batch in (True, False):
            for background in (True, False):
                pairs.append(
                    (
                        monai.GeneralizedDiceLoss(
                            softmax=True,
                            w_type=weighting,
                            batch=batch,
                            include_background=background,
                            **eps,
                        ),
                        functools.partial(
                            losses.generalized_dice_loss,
                            class_weighting=weighting,
                            per_image=not batch,
                            include_background=background,
                        ),
                    )
                )
    for gamma in (0.5, 1.0, 2.0, 3.0):
        focal = functools.partial(losses.pixel_loss, kind="focal", focal_gamma=gamma)
        pairs.append((monai.FocalLoss(gamma=gamma), functools.partial(focal, activation="sigmoid")))
        # MONAI takes the mean over the classes too
        softmax = monai.FocalLoss(gamma=gamma, use_softmax=True)
        pairs.append((lambda z, y, softmax=softmax: 3 * softmax(z, y), focal))
    pairs.append(
        (
            monai.DiceCELoss(softmax=True, lambda_dice=0.5, lambda_ce=2.0, **eps),
            functools.partial(losses.dice_ce_loss, denominator="linear", dice_weight=0.5, ce_weight=2.0),
        )
    )
    for theirs, mine in pairs:  # MONAI has float32 inside
        want, want_grad = value_and_grad(theirs, logits, hot)
        loss, grad = value_and_grad(mine, logits, target)
        torch.testing.assert_close(loss, want.double().squeeze(), rtol=2e-7, atol=0)
        assert error(grad, want_grad) < 1e-6
    absent = torch.zeros_like(target)  # a class that is not there
    want, want_grad = value_and_grad(
        monai.GeneralizedDiceLoss(softmax=True, **eps), logits, F.one_hot(absent, 3).movedim(-1, 1).double()
    )
    loss, grad = value_and_grad(losses.generalized_dice_loss, logits, absent)
    torch.testing.assert_close(loss, want, rtol=1e-7, atol=0)
    assert error(grad, want_grad) < 1e-6


def test_equals_pymic() -> None:
    """METHODS.md section 2: batch flattened, sum p + sum g below, mean over all classes, softmax."""
    dice, plain = pytest.importorskip("pymic.loss.seg.dice"), pytest.importorskip("pymic.loss.seg.mse")
    ce = pytest.importorskip("pymic.loss.seg.ce")
    logits, target = example((9, 11), 3)
    hot = F.one_hot(target, 3).movedim(-1, 1).double()
    flat: dict[str, Any] = {"denominator": "linear", "per_image": False, "activation": "softmax"}
    soft = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    soft = soft / soft.sum(1, keepdim=True)
    pairs = [
        (
            dice.NoiseRobustDiceLoss({"noiserobustdiceloss_gamma": gamma}),
            losses.nr_dice_loss,
            {"gamma": gamma},
        )
        for gamma in (1.0, 1.3, 1.5, 2.0)
    ]
    pairs += [
        (dice.FocalDiceLoss({"focaldiceloss_beta": b}), losses.focal_dice_loss, {"beta": b}) for b in (1, 2)
    ]
    pairs += [(dice.DiceLoss(), losses.dice_loss, {})]
    pairs = [(theirs, mine, {**flat, **extra}) for theirs, mine, extra in pairs]
    pairs += [
        (plain.MAELoss(), losses.pixel_loss, {"kind": "mae"}),
        (plain.MSELoss(), losses.pixel_loss, {"kind": "mse"}),
        (
            ce.GeneralizedCELoss({"loss_gce_q": 0.7}),
            losses.pixel_loss,
            {"kind": "gce"},
        ),
    ]
    for theirs, mine, options in pairs:
        for given_, y in ((hot, target), (soft, soft)):
            if mine is losses.pixel_loss and options["kind"] == "gce" and y is soft:
                continue
            want, want_grad = value_and_grad(
                lambda z, g, theirs=theirs: theirs({"prediction": z, "ground_truth": g}), logits, given_
            )
            loss, grad = value_and_grad(mine, logits, y, **options)
            # PyMIC's Dice has its epsilon elsewhere
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
            assert error(grad, want_grad) < 1e-5


def test_gamma_one_is_soerensens_dice() -> None:
    logits, target = example((9, 11), 3)
    # its gamma 1 is Soerensen's Dice, exactly, for binary g
    linear: dict[str, Any] = {"denominator": "linear", "eps": 0.0}
    torch.testing.assert_close(
        losses.nr_dice_loss(logits, target, gamma=1, **linear),
        losses.dice_loss(logits, target, **linear),
        rtol=1e-12,
        atol=0,
    )


def test_gamma_two_is_squared_dice() -> None:
    for soft in (False, True):
        logits, target = example((9, 11), 3, soft=soft)
        two, two_grad = value_and_grad(losses.nr_dice_loss, logits, target, gamma=2, eps=0.0)
        dice, dice_grad = value_and_grad(losses.dice_loss, logits, target, eps=0.0)
        torch.testing.assert_close(two, dice, rtol=1e-12, atol=0)
        assert error(two_grad, dice_grad) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_one_slope_is_zero_at_the_target(dtype: torch.dtype) -> None:
    """Where p = g exactly: under the sigmoid that is at both ends, under softmax over four classes at 1/4."""
    ends = torch.tensor([[[-1e4, 1e4, -1e4, 1e4]]], dtype=dtype)
    quarters = torch.zeros(1, 4, 5, dtype=dtype)
    for gamma in (1.0, 1.3, 1.5, 2.0):
        loss, grad = value_and_grad(losses.nr_dice_loss, ends, (ends > 0).to(dtype), gamma=gamma)
        assert loss == 0
        assert not grad.any()
        loss, grad = value_and_grad(
            losses.nr_dice_loss, quarters, torch.full_like(quarters, 0.25), gamma=gamma, activation="softmax"
        )
        assert loss == 0
        assert not grad.any()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_gradcheck(name: str, activation: str) -> None:
    for classes in (2, 3):
        logits, target = example((3, 4), classes, scale=1.0)
        weight = torch.rand(2, 3, 4, dtype=torch.float64)
        for reduction in ("mean", many(name)):
            run = functools.partial(
                ours(name),
                target=target,
                activation=activation,
                weight=weight,
                reduction=reduction,
            )
            z = logits.clone().requires_grad_()
            assert torch.autograd.gradcheck(run, z, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(run, z, check_fwd_over_rev=True)


# ---- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_huge_logits_stay_finite(name: str, classes: int, dtype: torch.dtype) -> None:
    logits, target = example((5, 7), classes)
    logits = (1e4 * logits.sign()).to(dtype)
    for activation in ("sigmoid", "softmax")[: 1 + (classes > 1)]:
        for extra in ({"gamma": 1.0}, {"gamma": 1.3}, {}) if name == "nr_dice_loss" else ({},):
            loss, grad = value_and_grad(ours(name), logits, target, activation=activation, **extra)
            want, _ = value_and_grad(oracle(name), logits.double(), target, activation=activation, **extra)
            assert torch.isfinite(loss)
            assert torch.isfinite(grad).all()
            torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_nan(name: str, dtype: torch.dtype, classes: int) -> None:
    function = ours(name)
    logits, target = example((5, 7), classes)
    logits = logits.to(dtype)
    mask = torch.ones(2, 5, 7, dtype=torch.bool)
    mask[0, 2] = mask[1, :, 3] = False
    weight = torch.rand(2, 5, 7)
    for activation in ("sigmoid", "softmax")[: 1 + (classes > 1)]:
        for reduction in ("mean", many(name)):
            options: dict[str, Any] = {"activation": activation, "mask": mask, "reduction": reduction}
            want, want_grad = value_and_grad(function, logits, target, weight=weight, **options)
            for bad in (float("nan"), float("inf")):
                loss, grad = value_and_grad(
                    function,
                    logits.masked_fill(~mask[:, None], bad),
                    target.masked_fill(~mask, 255),
                    weight=weight.masked_fill(~mask, bad),
                    **options,
                )
                assert torch.equal(loss, want)
                assert torch.equal(grad, want_grad)
        for channel in range(classes):  # whichever channel it is in, and whatever the label
            for pixel in range(5):
                spoilt = logits.clone()
                spoilt[1, channel, pixel, 0] = float("nan")
                loss, grad = value_and_grad(function, spoilt, target, activation=activation)
                assert torch.isnan(loss)
                assert torch.isnan(grad).any()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("reduction", ["mean", "sum", "image", "none"])
def test_nothing_there(name: str, reduction: str) -> None:
    function = ours(name)
    if reduction == "none" and name in SUMS:
        return
    for classes in (1, 2, 3):
        activations = ("sigmoid", "softmax")[: 1 + (classes > 1)]
        logits, target = example((5, 7), classes)
        for activation in activations:
            options: dict[str, Any] = {"activation": activation, "reduction": reduction}
            for eps in ({}, {"eps": 0.0}) if name in REGION else ({},):
                out, grad = value_and_grad(
                    function, logits, target, mask=torch.zeros(2, 5, 7), **options, **eps
                )
                assert not out.any()
                assert not grad.any()
            for empty in (logits[:0], logits[..., :0]):
                out, grad = value_and_grad(
                    function, empty, target[: len(empty), ..., : empty.shape[-1]], **options
                )
                assert not out.any()
                assert grad.shape == empty.shape
                assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("classes", [1, 2, 3, 300])
def test_label_out_of_range(name: str, classes: int) -> None:
    function = ours(name)
    logits, target = example((5, 67), classes)
    top = max(classes, 2) - 1
    mask = torch.ones(2, 5, 67)
    mask[1, 4, 66] = mask[0, 0, 3] = 0
    want = function(logits, target, mask=mask, activation="sigmoid")
    for dtype in (torch.uint8, torch.int32, torch.int64):
        if dtype == torch.uint8 and classes == 300:
            continue
        for label in (top + 1, 255 if classes < 255 else 400, -1, 256 + top, 2**32, 2**40):
            bad = target.clone()
            bad[1, 4, 66] = bad[0, 0, 3] = label
            if not torch.iinfo(dtype).min <= label <= torch.iinfo(dtype).max or (
                label == 256 + top and classes == 300
            ):
                continue
            if label <= top and label >= 0:
                continue
            bad = bad.to(dtype)
            with pytest.raises(ValueError, match=rf"target holds a label outside 0\.\.{top}"):
                function(logits, bad, activation="sigmoid")
            assert torch.equal(function(logits, bad, mask=mask, activation="sigmoid"), want)
            loss = function(logits, bad, weight=mask, activation="sigmoid", reduction="sum")
            assert torch.equal(
                loss, function(logits, target, mask=mask, activation="sigmoid", reduction="sum")
            )


def test_label_of_no_class_counts_like_any_pixel() -> None:
    """A label out of range is allowed where the weight is 0; it has no class weight to count."""
    for classes in (2, 3):
        logits, target = example((5, 7), classes)
        weight = torch.ones(2, 5, 7)
        weight[0, 1, 1] = 0
        bad = target.clone()
        bad[0, 1, 1] = 255
        for z in (logits, logits.float()):
            assert torch.equal(
                losses.pixel_loss(z, bad, weight=weight), losses.pixel_loss(z, target, weight=weight)
            )
            cw = [1.0] * classes
            torch.testing.assert_close(
                losses.pixel_loss(z, bad, weight=weight, class_weight=cw),
                losses.pixel_loss(z, target, mask=weight),
            )


# ---- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_bits_every_time(name: str, dtype: torch.dtype) -> None:
    logits, target = example((97, 131), 2)
    logits, target = logits.to(dtype), target.to(torch.uint8)
    results = []
    for run in range(100 if dtype == torch.float32 else 10):
        torch.set_num_threads(1 + run % 2)
        results.append(value_and_grad(ours(name), logits, target))
    assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results)


def test_instruction_sets_agree() -> None:
    code = """
import torch, noisyseg_fast as n
torch.manual_seed(0)
z = (3 * torch.randn(2, 3, 33, 31)).requires_grad_()
y = torch.randint(3, (2, 33, 31))
softmax = n.nr_dice_loss(z, y, gamma=1.3, activation="softmax")
for loss in (n.nr_dice_loss(z, y), softmax, n.dice_loss(z, y), n.pixel_loss(z, y)):
    (grad,) = torch.autograd.grad(loss, z)
    print(*loss.reshape(1).tolist(), *grad.flatten().tolist())
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
            assert abs(a[0] - b[0]) <= 1e-6 * abs(a[0])
            assert error(b[1:], a[1:]) <= 1e-6


# ---- in PyTorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_compiled_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    function = ours(name)
    logits, target = example((17, 19), 3)
    weight, mask = torch.rand(2, 17, 19), torch.rand(2, 17, 19) > 0.3
    extra: dict[str, Any] = {"class_weight": [1.0, 2.0, 3.0]} if name in KINDS else {"per_image": False}

    def step(z: Tensor, y: Tensor, w: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return function(z, y, weight=w, mask=m, **extra), function(
            z, y, activation="softmax", reduction=many(name)
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for z in (logits.float(), logits.float().to(memory_format=torch.channels_last), logits.bfloat16()):
        results = []
        for run in (step, compiled):
            leaf = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            one, more = run(leaf, target, weight, mask)
            (one + (more * torch.linspace(0, 1, more.numel()).reshape(more.shape)).sum()).backward()
            results.append((one.detach(), more.detach(), leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert results[0][2].stride() == results[1][2].stride()


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    logits, target = example((17, 19), 2)
    logits, target = logits.float(), target.to(torch.uint8)
    compiled = torch.compile(lambda z, y: losses.nr_dice_loss(z, y), fullgraph=True)
    for a, b in zip(
        value_and_grad(compiled, logits, target),
        value_and_grad(losses.nr_dice_loss, logits, target),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FAMILY)
def test_autocast(name: str) -> None:
    logits, target = example((9, 11), 3)
    layer = torch.nn.Conv2d(3, 3, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(logits.float())
        loss = ours(name)(z, target)
    assert z.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()
    assert torch.equal(loss.detach(), ours(name)(z.detach(), target))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_func(name: str, dtype: torch.dtype) -> None:
    """grad, jvp, vmap and their compositions equal those of the reference."""
    function, plain = ours(name), oracle(name)
    logits, target = example((3, 4), 3)
    logits, other = logits.to(dtype), torch.rand(logits.shape, dtype=dtype)
    weight, options = torch.rand(2, 3, 4), {"activation": "softmax", "reduction": many(name)}
    f = torch.func

    def run(loss: Any, z: Tensor) -> list[Tensor]:
        total = lambda x: loss(x, target, weight=weight, **options).square().sum()  # noqa: E731
        one = lambda x, y, w: loss(x[None], y[None], weight=w[None], activation="softmax")  # noqa: E731
        direction = other.to(z.dtype)
        jvp_of_grad = lambda v: f.jvp(f.grad(total), (z,), (v,))[1]  # noqa: E731
        directions = torch.stack([direction, direction.square()])
        rows = list(zip(z, target, weight, strict=True))
        batched = loss is function  # F.one_hot of the reference refuses vmap
        return [
            f.grad(total)(z),
            *f.jvp(lambda x: loss(x, target, weight=weight, **options), (z,), (direction,)),
            jvp_of_grad(direction),
            f.grad(lambda x: f.jvp(total, (x,), (direction,))[1])(z),
            f.vmap(one)(z, target, weight) if batched else torch.stack([one(*row) for row in rows]),
            f.vmap(f.grad(one), in_dims=(0, 0, None))(z, target, weight[0])
            if batched
            else torch.stack([f.grad(one)(x, y, weight[0]) for x, y, _ in rows]),
            f.vmap(jvp_of_grad)(directions) if batched else torch.stack([jvp_of_grad(v) for v in directions]),
            f.jacrev(lambda x: loss(x, target, **options))(z)
            if batched
            else torch.autograd.functional.jacobian(lambda x: loss(x, target, **options), z),
            f.jacfwd(lambda x: loss(x, target, **options))(z)
            if batched
            else torch.autograd.functional.jacobian(lambda x: loss(x, target, **options), z),
        ]

    for got, want in zip(run(function, logits), run(plain, logits.double()), strict=True):
        assert got.shape == want.shape
        assert error(got, want) <= (1e-10 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_second_backward(name: str) -> None:
    """retain_graph gives the same gradient twice; what a first pass returned is not written by a second."""
    logits, target = example((5, 7), 2)
    z = logits.float().requires_grad_()
    loss = ours(name)(z, target)
    (first,) = torch.autograd.grad(loss, z, torch.tensor(3.0), retain_graph=True)
    saved = first.clone()
    (second,) = torch.autograd.grad(loss, z, torch.tensor(3.0), retain_graph=True)
    torch.testing.assert_close(second, first, rtol=1e-6, atol=0)
    torch.autograd.grad(loss, z)
    assert torch.equal(first, saved)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_backward_of_a_gradient_whose_memory_is_not_its_value(name: str, create_graph: bool) -> None:
    """Lazily negated, as through the imaginary part of a conjugate, or a zero without memory."""
    logits, target = example((5, 7), 2)
    z = logits.float().requires_grad_()
    (grad,) = torch.autograd.grad(ours(name)(z, target), z)
    for value, tensor in (
        (-1.0, torch._neg_view(torch.tensor(1.0))),
        (1.0, torch._neg_view(torch.tensor(-1.0))),
        (0.0, torch._efficientzerotensor(())),
    ):
        (found,) = torch.autograd.grad(ours(name)(z, target), z, tensor, create_graph=create_graph)
        torch.testing.assert_close(found, value * grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("classes", [1, 2])
def test_second_derivatives_at_zero_logits(name: str, classes: int) -> None:
    """Where |z| and max(z, 0) have their kinks, the losses are smooth."""
    _, target = example((3, 4), classes)
    z, v = (
        torch.zeros(2, classes, 3, 4, dtype=torch.float64),
        torch.rand(2, classes, 3, 4, dtype=torch.float64),
    )
    for activation in ("sigmoid", "softmax")[:classes]:
        results = []
        for function in (ours(name), oracle(name)):
            leaf = z.clone().requires_grad_()
            loss = function(leaf, target, activation=activation)
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            along = torch.func.jvp(lambda x: function(x, target, activation=activation), (z,), (v,))[1]  # noqa: B023
            results.append((grad, torch.autograd.grad((grad * v).sum(), leaf)[0], along))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_third_derivatives_raise() -> None:
    logits, target = example((3, 4), 2)
    z = logits.requires_grad_()
    (grad,) = torch.autograd.grad(losses.dice_loss(z, target), z, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="first and second derivatives, no third ones"):
        torch.autograd.grad(second.sum(), z)


def test_forward_mode_of_a_registered_op_is_silently_zero() -> None:
    """Why the eager route is a Function. When this fails, torch has mended it: see DESIGN.md section 4."""
    from noisyseg_fast import _autograd

    logits, target = example((3, 4), 2)
    options = [float(x) for x in losses._region_options("dice", "sigmoid", "squared", True, True, 0, 1e-5)]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        loss = _autograd._op(dual, target, None, None, None, options, 0)[0]
        assert torch.autograd.forward_ad.unpack_dual(loss).tangent is None


def test_forward_mode_of_a_compiled_loss_raises_or_is_right() -> None:
    torch._dynamo.reset()
    logits, target = example((3, 4), 2)
    want = torch.func.jvp(lambda z: losses.dice_loss(z, target), (logits,), (torch.ones_like(logits),))[1]
    compiled = torch.compile(lambda z: losses.dice_loss(z, target), backend="aot_eager")
    try:
        got = torch.func.jvp(compiled, (logits,), (torch.ones_like(logits),))[1]
    except Exception:
        return
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_return_grad(name: str, dtype: torch.dtype) -> None:
    logits, target = example((9, 11), 3)
    logits = logits.to(dtype)
    for reduction in ("mean", many(name)):
        z = logits.clone().requires_grad_()
        want = ours(name)(z, target, reduction=reduction)
        (want_grad,) = torch.autograd.grad(want.sum(), z)
        for _ in range(2):  # the second by what the first one found
            loss, grad = ours(name)(logits, target, reduction=reduction, return_grad=True)
            assert torch.equal(loss, want)
            assert torch.equal(grad, want_grad)
        if dtype != torch.bfloat16:
            loss, grad = ours(name)(logits.numpy(), target.numpy(), reduction=reduction, return_grad=True)
            np.testing.assert_array_equal(grad, want_grad.numpy())
            np.testing.assert_array_equal(loss, want.detach().numpy())


def test_memory_is_the_gradient_alone() -> None:
    """Peak memory of forward and backward, by torch's own count of its CPU allocations."""
    logits, target = example((64, 64, 64), 2, batch=1)
    for name in FAMILY:
        z = logits.float().requires_grad_()
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(ours(name)(z, target, activation="softmax"), z)
        now = top = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                top = max(top, now)
        assert z.nbytes <= top <= 1.02 * z.nbytes, name


def _available_gb() -> float:
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) / 2**20 for line in file if line.startswith("MemAvailable"))
    except OSError:
        return 0.0


@pytest.mark.skipif(_available_gb() < 16, reason="needs 16 GB of free memory")
def test_over_two_to_the_31_elements() -> None:
    size, p = 2**31 + 4096, 1 / (1 + np.exp(-3.0))
    logits, target = np.zeros((1, 1, size), np.float16), np.zeros((1, size), np.uint8)
    logits[..., -4096:] = 3
    loss = losses.nr_dice_loss(logits, target)
    want = ((size - 4096) * 0.5**1.5 + 4096 * p**1.5) / ((size - 4096) * 0.25 + 4096 * p**2 + 1e-5)
    assert abs(float(loss) - want) < 1e-6 * want
    options: dict[str, Any] = {"kind": "mae", "activation": "sigmoid", "reduction": "sum"}
    loss, grad = losses.pixel_loss(logits, target, return_grad=True, **options)
    assert float(loss) == pytest.approx((size - 4096) * 0.5 + 4096 * p, rel=1e-6)
    for place, q in ((0, 0.5), (2**31 - 1, 0.5), (size - 4096, p), (size - 1, p)):
        assert float(grad[0, 0, place]) == pytest.approx(q * (1 - q), rel=1e-3)


@pytest.mark.parametrize("name", FAMILY)
def test_gradient_only_for_logits(name: str) -> None:
    function = ours(name)
    logits, target = example((3, 4), 2, soft=True)
    floats = torch.rand(2, 3, 4, dtype=torch.float64)
    for argument in ("weight", "mask"):
        with pytest.raises(ValueError, match=f"{argument} requires a gradient, but only logits receive one"):
            function(logits, target, **{argument: floats.clone().requires_grad_()})
    with pytest.raises(ValueError, match="target requires a gradient"):
        function(logits, target.clone().requires_grad_())
    if name == "pixel_loss":
        with pytest.raises(ValueError, match="class_weight requires a gradient"):
            function(logits, target, class_weight=torch.ones(2, requires_grad=True))
    with torch.no_grad():  # nothing is lost there
        function(logits, target, weight=floats.clone().requires_grad_())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("NRDiceLoss", "nr_dice_loss"),
        ("DiceLoss", "dice_loss"),
        ("FocalDiceLoss", "focal_dice_loss"),
        ("GeneralizedDiceLoss", "generalized_dice_loss"),
        ("PixelLoss", "pixel_loss"),
        ("DiceCELoss", "dice_ce_loss"),
        ("DiceMAELoss", "dice_mae_loss"),
    ],
)
def test_modules(module: str, name: str) -> None:
    logits, target = example((5, 7), 3)
    weight, mask = torch.rand(2, 1, 5, 7), torch.rand(2, 5, 7) > 0.5
    loss = getattr(noisyseg_fast, module)(activation="softmax", reduction=many(name))
    want = ours(name)(logits, target, weight=weight, mask=mask, activation="softmax", reduction=many(name))
    assert torch.equal(loss(logits, target, weight=weight, mask=mask), want)
    assert torch.equal(loss(logits, target, weight, mask), want)
    assert "activation='softmax'" in repr(loss)
    assert not list(loss.parameters())
    with pytest.raises(TypeError, match=f"{module} has no argument 'gama'; it takes"):
        getattr(noisyseg_fast, module)(gama=1.5)
    with pytest.raises(TypeError, match="has no argument 'weight'"):
        getattr(noisyseg_fast, module)(weight=weight)


# ---- error messages -------------------------------------------------------------------------------

Z = torch.zeros(2, 3, 5, 7)
Y = torch.zeros(2, 5, 7, dtype=torch.uint8)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            (torch.zeros(5), Y),
            ValueError,
            r"logits must be \(B, C, \*S\) with 2 to 8 dimensions, got shape \(5,\)",
        ),
        ((torch.zeros((1,) * 9), Y), ValueError, "logits must be .* with 2 to 8 dimensions"),
        ((Z.int(), Y), TypeError, "logits has dtype int32; use one of float16, bfloat16, float32, float64"),
        ((Z.to(torch.complex64), Y), TypeError, "logits has dtype torch.complex64; use one of"),
        ((Z[:, :0], Y), ValueError, "logits must have 1 to 1024 channels"),
        ((torch.zeros(1, 1025, 2), torch.zeros(1, 2, dtype=torch.int32)), ValueError, "1 to 1024 channels"),
        (
            (Z, Y[:1]),
            ValueError,
            r"target has shape \(1, 5, 7\); for logits of shape \(2, 3, 5, 7\) it must be \(2, 5, 7\)",
        ),
        ((Z, Y[..., :6]), ValueError, r"target has shape \(2, 5, 6\)"),
        ((Z, Z[:, :2]), ValueError, r"target has shape \(2, 2, 5, 7\)"),
        (
            (Z, Y.float()),
            TypeError,
            r"target has dtype float32 for class numbers of shape \(2, 5, 7\); use one of uint8",
        ),
        ((Z, Y.to(torch.int16)), TypeError, "target has dtype torch.int16; use one of uint8"),
        (
            (Z, Y.numpy()),
            TypeError,
            "logits is a torch array and target a numpy array; pass both as one kind",
        ),
        ((Z.numpy(), Y), TypeError, "logits is a numpy array and target a torch array"),
        (
            (Z.tolist(), Y),
            TypeError,
            "logits must be a torch tensor, a NumPy or CuPy array or a DLPack object, not list",
        ),
        ((Z, None), TypeError, "target must be an array, not None"),
        ((Z.to_sparse(), Y), TypeError, r"logits is not dense .*; pass a dense tensor, as logits.to_dense"),
        ((Z.to("meta"), Y.to("meta")), TypeError, "logits is on device meta; supported are cpu and cuda"),
        ((Z.numpy(), Y.numpy().astype(np.int16)), TypeError, "target has dtype int16"),
        ((Z.numpy().astype(">f4"), Y.numpy()), (TypeError, ValueError), "native byte order|dtype >f4"),
    ],
)
def test_wrong_arrays(name: str, arguments: tuple[Any, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        ours(name)(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"weight": torch.ones(2, 5, 6)},
            ValueError,
            r"weight has shape \(2, 5, 6\); .* it must be \(2, 5, 7\)",
        ),
        (
            {"mask": torch.ones(2, 3, 5, 7)},
            ValueError,
            r"mask has shape \(2, 3, 5, 7\); .* it must be \(2, 5, 7\)",
        ),
        ({"weight": Y}, TypeError, "weight has dtype uint8; use one of float16"),
        ({"weight": np.ones((2, 5, 7), "f4")}, TypeError, "logits is a torch array and weight a numpy array"),
        ({"mask": 1.0}, TypeError, "mask must be a torch tensor"),
        ({"activation": "relu"}, ValueError, "activation must be one of sigmoid, softmax, got 'relu'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, image, got 'max'"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        ours(name)(Z, Y, **options)


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("nr_dice_loss", {"gamma": 0.99}, ValueError, r"gamma must lie in \[1, 2\], got 0.99"),
        ("nr_dice_loss", {"gamma": 2.01}, ValueError, r"gamma must lie in \[1, 2\], got 2.01"),
        ("nr_dice_loss", {"gamma": float("nan")}, ValueError, r"gamma must lie in \[1, 2\], got nan"),
        (
            "nr_dice_loss",
            {"denominator": "cubed"},
            ValueError,
            "denominator must be one of linear, squared, got 'cubed'",
        ),
        (
            "dice_loss",
            {"denominator": "cubed"},
            ValueError,
            "denominator must be one of linear, squared, got 'cubed'",
        ),
        ("nr_dice_loss", {"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
        ("dice_loss", {"eps": float("nan")}, ValueError, "eps must not be negative, got nan"),
        (
            "pixel_loss",
            {"kind": "hinge"},
            ValueError,
            "kind must be one of ce, focal, mae, gce, mse, kl, got 'hinge'",
        ),
        (
            "pixel_loss",
            {"class_weight": [1.0, 2.0]},
            ValueError,
            r"class_weight has shape \(2,\); it must be \(3,\)",
        ),
        (
            "pixel_loss",
            {"class_weight": torch.ones(3, dtype=torch.int64)},
            TypeError,
            "class_weight has dtype int64",
        ),
        (
            "pixel_loss",
            {"class_weight": np.ones(3)},
            TypeError,
            "logits is a torch array and class_weight a numpy",
        ),
        ("pixel_loss", {"class_weight": 2.0}, TypeError, "class_weight must be a torch tensor"),
        ("pixel_loss", {"kind": "boundary"}, ValueError, r"'boundary' is boundary_loss\(logits"),
        ("pixel_loss", {"kind": "gce", "q": 0.0}, ValueError, r"q must lie in \(0, 1\], got 0.0"),
        (
            "pixel_loss",
            {"kind": "focal", "focal_gamma": -1.0},
            ValueError,
            "focal_gamma must not be negative",
        ),
        (
            "pixel_loss",
            {"label_smoothing": 1.5},
            ValueError,
            r"label_smoothing must lie in \[0, 1\], got 1.5",
        ),
        ("pixel_loss", {"ignore_index": 1.5}, ValueError, "ignore_index must be an integer, got 1.5"),
        ("focal_dice_loss", {"beta": 0.0}, ValueError, "beta must be positive, got 0.0"),
        (
            "generalized_dice_loss",
            {"class_weighting": "cube"},
            ValueError,
            "class_weighting must be one of uniform, simple, square, got 'cube'",
        ),
        (
            "nr_dice_loss",
            {"reduction": "image", "per_image": False},
            ValueError,
            "reduction 'image' needs per_image=True",
        ),
        ("dice_ce_loss", {"reduction": "none"}, ValueError, "'none' has no meaning for a sum of two losses"),
        ("dice_ce_loss", {"ce_weight": float("inf")}, ValueError, "ce_weight must be finite, got inf"),
        ("dice_mae_loss", {"dice_weight": float("nan")}, ValueError, "dice_weight must be finite, got nan"),
    ],
)
def test_wrong_options_of_one(name: str, options: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        ours(name)(Z, Y, **options)


@pytest.mark.parametrize("name", FAMILY)
def test_softmax_over_one_channel(name: str) -> None:
    with pytest.raises(
        ValueError, match="activation 'softmax' over one channel is constant; use activation='sigmoid'"
    ):
        ours(name)(Z[:, :1], Y, activation="softmax")


def test_wrong_maps() -> None:
    for target, options in ((Z, {"ignore_index": 1}),):
        with pytest.raises(ValueError, match=r"ignore_index is a label, but target has shape .*; use mask"):
            losses.pixel_loss(Z, target, **options)
    with pytest.raises(ValueError, match=r"distance_map has shape \(2, 5, 7\); it must be that of logits"):
        losses.boundary_loss(Z, Y)
    with pytest.raises(TypeError, match="distance_map must be an array, not None"):
        losses.boundary_loss(Z, None)
    with pytest.raises(ValueError, match=r"target_logits has shape .*; it must be that of logits"):
        losses.consistency_loss(Z, Z[:1])
    with pytest.raises(TypeError, match="target_logits must be an array, not None"):
        losses.consistency_loss(Z, None)
    with pytest.raises(ValueError, match="kind must be one of mse, mae, kl, got 'ce'"):
        losses.consistency_loss(Z, Z, kind="ce")
    with pytest.raises(ValueError, match=r"target requires a gradient.*pass target.detach"):
        losses.consistency_loss(Z, Z.clone().requires_grad_())


def test_strides_that_do_not_merge() -> None:
    """Four spatial axes work as long as three walks over memory do."""
    logits, target = example((2, 3, 2, 5), 2)
    close("nr_dice_loss", logits, target)
    crossed = logits.permute(0, 1, 5, 3, 2, 4).contiguous().permute(0, 1, 4, 3, 5, 2)
    with pytest.raises(ValueError, match="more than three separate pixel axes; make them contiguous"):
        losses.nr_dice_loss(crossed, target)


# ---- calls that were checked before ---------------------------------------------------------------


def twice(function, *args, **options):
    """The call again, which then skips the checks."""
    from noisyseg_fast import _autograd  # noqa: F401  # the first call of all imports it, and is not kept

    function(*args, **options)
    return function(*args, **options)


def test_a_second_call_gives_the_same_and_is_known():
    z, y = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randint(0, 3, (2, 1, 5, 7), dtype=torch.uint8)
    twice(losses.pixel_loss, z, y)
    w, cw = torch.rand(2, 1, 5, 7), [1.0, 2.0, 0.5]
    for function in (losses.pixel_loss, losses.dice_ce_loss):
        for reduction in ("mean", "image"):
            options = {"weight": w, "class_weight": cw, "reduction": reduction, "mask": y > 0}
            losses._known.clear()
            first = function(z, y, **options)
            assert len(losses._known) == 1
            second = function(z, y, **options)
            assert len(losses._known) == 1 and torch.equal(first, second)
            a, b = (torch.autograd.grad(x.sum(), z)[0] for x in (first, second))
            assert torch.equal(a, b) and a.abs().sum() > 0
            loss, grad = function(z, y, **options, return_grad=True)
            assert len(losses._known) == 1 and torch.equal(loss, first) and torch.equal(grad, a)
            assert not loss.requires_grad and not grad.requires_grad


def test_a_known_call_still_refuses_what_a_signature_does_not_show():
    z, y, w = torch.randn(1, 2, 8, requires_grad=True), torch.zeros(1, 8, dtype=torch.uint8), torch.rand(1, 8)
    twice(losses.pixel_loss, z, y, weight=w)
    with pytest.raises(ValueError, match="weight requires a gradient"):
        losses.pixel_loss(z, y, weight=w.clone().requires_grad_())
    for return_grad in (False, True):
        with pytest.raises(ValueError, match=r"outside 0\.\.1"):
            losses.pixel_loss(z, y + 2, weight=w, return_grad=return_grad)
    with pytest.raises(TypeError, match="weight is a lazily negated view"):
        losses.pixel_loss(z, y, weight=torch.complex(w, -w).conj().imag)
    with pytest.raises(TypeError, match="weight is not dense"):
        losses.pixel_loss(z, y, weight=w.to_sparse())
    with pytest.raises(TypeError, match="pass both as one kind"):
        losses.pixel_loss(z, y.numpy(), weight=w)
    gone = w.clone()
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight has no memory of its own"):
        losses.pixel_loss(z, y, weight=gone)
    fake = torch._subclasses.FakeTensorMode().from_tensor(w)
    with pytest.raises(ValueError, match="weight has no memory of its own"):
        losses.pixel_loss(z, y, weight=fake)


def test_an_option_that_is_an_array_is_read_at_each_call():
    z, y = torch.randn(1, 1, 8), torch.zeros(1, 8, dtype=torch.uint8)
    eps = torch.tensor(1.0)
    before = twice(losses.dice_loss, z, y, eps=eps)
    eps.fill_(100.0)
    assert losses.dice_loss(z, y, eps=eps) == losses.dice_loss(z, y, eps=100.0) != before
    with pytest.raises(ValueError, match="eps must not be negative"):
        losses.dice_loss(z, y, eps=-1.0)


def test_the_known_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(losses, "_MOST_KNOWN", 4)
    y = torch.zeros(1, 9, dtype=torch.uint8)
    for n in range(1, 10):
        losses.pixel_loss(torch.randn(1, 2, n), y[:, :n])
    assert len(losses._known) <= 4


def test_a_known_call_differentiates_twice_and_in_forward_mode():
    z = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 2, (1, 6), dtype=torch.uint8)
    twice(losses.pixel_loss, z, y)
    assert torch.autograd.gradgradcheck(lambda z: losses.pixel_loss(z, y), z)
    direction = torch.randn_like(z)
    _, along = torch.func.jvp(lambda z: losses.pixel_loss(z, y), (z.detach(),), (direction,))
    (grad,) = torch.autograd.grad(losses.pixel_loss(z, y), z)
    torch.testing.assert_close(along.double(), (grad * direction).sum())
