"""TCSE, ASDNet, double uncertainty, the star-shape prior and the Hausdorff loss; teachers in 3D; training by SGD.

Each test would fail without what it names."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

from folders import blob, nifti_folder, save_nifti  # noqa: E402
from resuming import whole_and_cut  # noqa: E402
from steps import fits, step, trains  # noqa: E402
from test_methods_noisy import some_batch  # noqa: E402
from test_signed_methods import gradients, semi  # noqa: E402
from torch import nn  # noqa: E402

from noisyseg_fast.training import engine, methods, model, networks, ramps, shapes  # noqa: E402
from noisyseg_fast.training.methods import asdnet, double_uncertainty, tcse  # noqa: E402
from noisyseg_fast.training.pixels import class_probabilities  # noqa: E402

SEMI = ["tcse", "asdnet", "double_uncertainty"]
OURS = [*SEMI, "star_shape", "hausdorff_dt"]


pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    def __init__(self, outputs, dims, size=3):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.first = conv(1, 8, size, padding=size // 2)
        self.out_conv = conv(8, outputs, size, padding=size // 2)

    def forward(self, x):
        return self.out_conv(self.first(x).relu())


def small(name, options=None):
    return {"width": 4, **(options or {})} if name == "asdnet" else options


def make(name, options=None, channels=1, *, steps=20, dims=2, lr=2e-2, size=3):
    torch.manual_seed(0)
    inputs = methods.Inputs(dims, 1, 1, 4)
    method = methods.create(
        name, small(name, options), lambda heads=1: Tiny(heads * channels, dims, size), channels, inputs
    )
    method.plan = methods.Plan(torch.optim.Adam(method.trained(), lr=lr), steps, 5)
    return method


# ---- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_method_fits_eight_patches(name, channels):
    batch = some_batch(channels, side=16)
    if name in SEMI:
        batch["unlabelled"] = batch["image"].flip(0)
    method = make(name, channels=channels, steps=80)
    fits(method, batch)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("network", "dims"), [("vnet", 2), ("vnet", 3), ("unet", 3)])
def test_each_method_trains_real_networks(name, network, dims):
    side = 32 if network == "unet" else 16
    options = {"passes": 2} if name == "double_uncertainty" else small(name, {})
    trains(name, network, semi(dims=dims, size=2, side=side), options)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("label", [0, 1, 255])
def test_empty_full_and_unknown_crops_are_finite(name, channels, label):
    options = {"field": "soft"} if name == "hausdorff_dt" else {}
    method, batch = make(name, options, channels), semi(channels)
    batch["label"][:] = label
    out = method.training_step(batch, 20)
    assert all(torch.isfinite(value) for value in out.values())
    assert all(torch.isfinite(g).all() for g in gradients(method, batch).values())
    method.after_step(20)
    assert all(torch.isfinite(p).all() for p in method.parameters())
    if label == 255:
        assert all(out[k] == 0 for k in ("segmentation", "given", "star", "region", "hausdorff") if k in out)


@pytest.mark.parametrize(
    "name", [*SEMI, "star_shape"]
)  # a boundary predicted there bounds hausdorff_dt's others
def test_pixels_without_a_label_do_not_count(name):
    options = {"adversarial": 0.0} if name == "asdnet" else {"consistency": 0.0} if name in SEMI else {}
    batch, method = some_batch(), make(name, options)
    batch["label"][:, :6] = 255
    loss = method.training_step(batch, 9)["loss"]
    image = batch["image"].clone()
    image[:, :, :2] += 1  # seen only by pixels without a label
    assert method.training_step({**batch, "image": image}, 9)["loss"].item() == pytest.approx(
        loss.item(), rel=1e-6
    )


# ---- TCSE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_motions_are_flips_and_quarter_turns(dims):
    torch.manual_seed(0)
    x = torch.randn(200, 2, *(4,) * dims)
    move = tcse.random_motion(x, 0.0)
    moved, seen = move(x), set()
    assert move.inside(x) is None
    for i in range(200):
        axes = [1 + a for a in range(dims) if move.flips[i, a]]
        expected = np.rot90(np.flip(x[i].numpy(), axes), int(move.turn[i]), (1, 2))
        assert np.array_equal(moved[i].numpy(), expected)
        seen.add((*move.flips[i].tolist(), move.turn[i].item()))
    assert len(seen) == 2 ** (dims + 1)
    oblong = torch.randn(200, 1, 4, 6)
    assert tcse.random_motion(oblong, 0.0)(oblong).shape == oblong.shape


def test_scaling_is_linear_about_the_centre():
    ramp = torch.arange(9.0).expand(3, 1, 9, 9)
    scale = torch.tensor([1.0, 0.8, 1.25])
    out = tcse.scaled(ramp, scale)
    assert torch.allclose(out[0], ramp[0])
    inside = tcse.Motion(torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.bool), scale).inside(
        ramp
    )
    expected = (torch.arange(9.0) - 4) / scale[:, None] + 4
    for i in range(3):
        rows = inside[i].any(1)
        assert torch.allclose(out[i, 0, 4][inside[i, 4]], expected[i][inside[i, 4]], atol=1e-5)
        assert rows.sum() == (9, 7, 9)[i]  # made smaller, pixels come from outside
    x = torch.randn(2, 1, 5, 6, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: tcse.scaled(x, torch.tensor([0.9, 1.1], dtype=torch.float64)), x)


def test_tcse_is_its_reference():
    batch, method = semi(), make("tcse", {"consistency": 0.7, "noise": 0.0, "zoom": 0.2})
    for p in method.teacher.parameters():
        p += 0.1 * torch.randn_like(p)
    torch.manual_seed(5)
    out = method.training_step(batch, 4)
    torch.manual_seed(5)
    image = torch.cat([batch["image"], batch["unlabelled"]])  # of both, labelled and not
    move = tcse.random_motion(image, 0.2)
    with torch.no_grad():
        there, back = method.teacher(move(image)).sigmoid(), move(method.network(image)).sigmoid()
    apart = (there - back).square()[:, 0][move.inside(image)].mean()
    assert out["consistency"].item() == pytest.approx(apart.item(), rel=1e-5)
    given = methods.create("ce_dice", None, lambda: method.network, 1).training_step(batch, 0)["loss"]
    expected = 0.5 * given + 0.7 * ramps.gaussian(4, 15) * apart
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_tcse_asks_that_the_prediction_moves_with_the_image():
    batch = semi()
    options = {"noise": 0.0, "zoom": 0.0, "decay": 0.0}
    alike = make("tcse", options, size=1)  # pixel by pixel, so that it moves with the image by itself
    assert alike.training_step(batch, 9)["consistency"] < 1e-10

    def apart(weight):
        method = make("tcse", {**options, "consistency": weight, "ramp": 0.0}, steps=60)
        for number in range(60):
            step(method, batch, number)
        image = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            return (method(image.flip(2)).flip(2).sigmoid() - method(image).sigmoid()).square().mean().item()

    assert apart(10.0) < 0.5 * apart(0.0)


# ---- ASDNet ---------------------------------------------------------------------------------------


def test_asdnet_is_its_reference():
    batch = semi()
    method = make("asdnet", {"loss": "ce", "adversarial": 0.3, "semi": 0.2, "attention": 2.0})
    image = torch.cat([batch["image"], batch["unlabelled"]])
    with torch.no_grad():
        logits = method.network(image)
        confidence = method.discriminator(class_probabilities(logits))
    p, y = logits[:3, 0].sigmoid(), batch["label"].float()
    ce = nn.functional.binary_cross_entropy(p, y, reduction="none").mean((1, 2))
    dice = (2 * (p * y).sum((1, 2)) + 1e-5) / ((p**2).sum((1, 2)) + (y**2).sum((1, 2)) + 1e-5)
    given = ((1 - dice) ** 2 * ce).mean()
    mislead = -confidence.sigmoid().log().mean()
    threshold = confidence[3:].sigmoid().median().item()
    method.config = replace(method.config, threshold=threshold)
    trusted = confidence[3:, 0].sigmoid() >= threshold
    assert 0 < trusted.float().mean() < 1
    believed = logits[3:, 0].abs()
    semi_loss = -believed.sigmoid().log()[trusted].mean()
    out = method.training_step(batch, 5)  # a quarter of the run
    assert out["loss"].item() == pytest.approx((given + 0.3 * mislead + 0.2 * semi_loss).item(), rel=1e-5)
    assert out["trusted"].item() == pytest.approx(trusted.float().mean().item())
    early = method.training_step(batch, 4)
    assert "semi" not in early and early["segmentation"] == out["segmentation"]
    assert "semi" not in method.training_step(some_batch(), 19)


def test_asdnet_confidence_network_has_its_own_step():
    batch, method = semi(), make("asdnet")
    own = list(method.discriminator.parameters())
    assert not {id(p) for p in own} & {id(p) for p in method.trained()}
    method.training_step(batch, 0)["loss"].backward()
    assert all(p.grad is None for p in own)
    before, network = [p.clone() for p in own], [p.clone() for p in method.network.parameters()]
    method.after_step(0)
    assert all(not torch.equal(a, b) for a, b in zip(before, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(network, method.network.parameters(), strict=True))


def test_asdnet_tells_labels_from_predictions_and_is_misled():
    batch = semi()
    method = make("asdnet", {"lr": 0.01})
    for number in range(40):
        method.training_step(batch, number)
        method.after_step(number)
    labels = class_probabilities(1e3 * (batch["label"][:, None].float() - 0.5))
    with torch.no_grad():
        of_labels = method.discriminator(labels).sigmoid().mean()
        of_predictions = (
            method.discriminator(class_probabilities(method.network(batch["image"]))).sigmoid().mean()
        )
    assert of_labels > 0.8 > 0.2 > of_predictions
    untrusted = method.training_step(batch, 19)  # nothing is believed, so nothing is learnt of it
    assert untrusted["trusted"] < 0.5

    def misled(weight):
        rival = make("asdnet", {"lr": 0.0, "adversarial": weight, "semi": 0.0})
        rival.discriminator.load_state_dict(method.discriminator.state_dict())
        return [step(rival, batch, number)["adversarial"].item() for number in range(20)][-1]

    assert misled(10.0) < misled(0.0) - 0.1


def test_asdnet_learns_nothing_where_it_trusts_nothing():
    batch = semi()
    off = {"adversarial": 0.0, "semi": 1.0}
    none = gradients(make("asdnet", {**off, "threshold": 1.0}), batch)
    some = gradients(make("asdnet", {**off, "threshold": 0.0}), batch)
    without = gradients(make("asdnet", {**off, "semi": 0.0}), batch)
    trained = [n for n in none if n.startswith("network")]
    assert all(torch.equal(none[n], without[n]) for n in trained)
    assert any(not torch.allclose(some[n], without[n]) for n in trained)


def test_asdnet_says_what_it_cannot_take():
    with pytest.raises(ValueError, match=re.escape("sides are multiples of 8, got (12, 12)")):
        make("asdnet").training_step(semi(side=12), 0)
    assert asdnet.ConfidenceNetwork(3, 2, 4)(torch.zeros(1, 2, 8, 16, 24)).shape == (1, 1, 8, 16, 24)


# ---- double uncertainty ---------------------------------------------------------------------------


def test_double_uncertainty_is_its_reference():
    batch = semi()
    method = make("double_uncertainty", {"passes": 3, "features": 0.7, "reduction": 0.2, "consistency": 0.5})
    for p in method.teacher.parameters():
        p += 0.1 * torch.randn_like(p)
    torch.manual_seed(5)
    out = method.training_step(batch, 4)
    torch.manual_seed(5)
    image = torch.cat([batch["image"], batch["unlabelled"]])
    with torch.no_grad():
        mine, logits = method.network.first(image).relu(), method.network(image)
        seen = [method.noisy(image) for _ in range(3)]
        theirs = torch.stack([method.teacher.first(x).relu() for x in seen])
        mean = torch.stack([method.teacher(x).sigmoid() for x in seen]).mean(0)

    def entropy(p):
        return -(p * p.log() + (1 - p) * (1 - p).log()) / math.log(2)

    p = logits.sigmoid()
    segmentation = ((-entropy(mean)).exp() * (p - mean) ** 2).mean()
    square = (theirs**2).mean((0, 3, 4))
    u = theirs.var(0, correction=0).mean((2, 3)) / square
    features = ((-u).exp() * ((mine - theirs.mean(0)) ** 2).mean((2, 3)) / square).mean()
    assert out["consistency"].item() == pytest.approx(segmentation.item(), rel=1e-4)
    assert out["features"].item() == pytest.approx(0.7 * features.item(), rel=1e-4)
    assert out["uncertainty"].item() == pytest.approx(0.2 * entropy(p).mean().item(), rel=1e-4)
    terms = out["consistency"] + out["features"] + out["uncertainty"]
    expected = 0.5 * out["segmentation"] + 0.5 * ramps.gaussian(4, 20) * terms
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_uncertain_weighs_less():
    batch, method = semi(), make("double_uncertainty")
    _, image, logits = method.study(batch)
    features = method.seen
    passes = method.passes(image)

    def compare(target, mean, square):
        method.passes = lambda image: (target, mean, square)
        method.seen = features
        return method.compare(image, logits, 0)

    target, mean = passes[0], features + 1
    sure, vague = compare(target, mean, mean**2), compare(target, mean, mean**2 + 100)
    scale = (mean**2).mean((2, 3)) / (mean**2 + 100).mean((2, 3))
    assert (vague["features"] < 0.5 * sure["features"] * scale.max()).item()
    # A target far from the prediction, and as far but unsure.
    p, one = torch.full_like(logits, 0.5), torch.ones(())
    for aim, weight in ((0.9, -0.9 * math.log2(0.9) - 0.1 * math.log2(0.1)), (0.5, 1.0)):
        logits = torch.full_like(p, aim - 0.3).logit()
        out = compare(torch.full_like(p, aim).logit(), mean, mean**2)
        assert out["consistency"].item() == pytest.approx(0.09 * math.exp(-weight) * one.item(), rel=1e-4)


def test_features_are_those_before_dropout():
    torch.manual_seed(0)
    for name in ("vnet", "vnet-2d", "unet", "basicunet"):
        network = networks.build(name, 3 if name == "vnet-2d" else 2, 1, 1, 4)
        image = torch.randn(1, 1, 32, 32, *([2] if name == "vnet-2d" else []))
        with double_uncertainty.last_features(network) as seen:
            logits = network.eval()(image)
        assert seen and seen[-1].ndim == 4
        if name == "vnet":
            assert torch.allclose(network.out_conv(seen[-1]), logits)
            network.train()
            with double_uncertainty.last_features(network) as again:
                network(image)
            assert (again[-1] == 0).all((2, 3)).sum() == (seen[-1] == 0).all((2, 3)).sum()
        assert not networks.before_head(network)._forward_pre_hooks


@pytest.mark.parametrize("name", ["mean_teacher", "ua_mt", "double_uncertainty"])
def test_teachers_work_in_3d_with_dropout_on(name):
    spec = model.ModelSpec(name, "vnet", 2, 3, 1, 2, (16, 16, 16), {"noise": 0.0})
    torch.manual_seed(0)
    method = spec.build()
    method.plan = methods.Plan(torch.optim.Adam(method.trained()), 2, 1)
    batch = semi(dims=3, size=2, side=16)
    for number in range(2):
        assert torch.isfinite(step(method, batch, number)["consistency"])
    image = batch["unlabelled"]
    assert not torch.equal(method.teach(image), method.teach(image))  # no noise: dropout alone
    uncertain = method.uncertainty(image, 4)
    assert uncertain.shape == (2, 16, 16, 16) and ((uncertain > 0) & (uncertain <= 1)).all()
    method.eval()
    assert torch.equal(method(image), method(image))


# ---- star shape -----------------------------------------------------------------------------------


def star_by_loops(s, y, steps, centre, mask=None):
    """Of one image and class."""
    total = 0.0
    for p in np.ndindex(*y.shape):
        if not y.any() or (mask is not None and not mask[p]):
            continue
        v = np.array(centre) - p
        length = np.abs(v).max()
        way = np.where(np.abs(v) > np.tan(np.pi / 8) * length, np.sign(v), 0)
        for i in range(1, min(steps, length) + 1):
            q = tuple(np.array(p) + i * way)
            if any(a < 0 or a >= n for a, n in zip(q, y.shape, strict=True)):
                continue
            if y[q] == y[p] and (mask is None or mask[q]):
                total += abs(y[p] - s[p]) * abs(s[p] - s[q])
    return total


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_star_shape_is_its_reference(dims, masked):
    rng = np.random.default_rng(dims)
    shape = (9, 11) if dims == 2 else (5, 6, 7)
    y = np.zeros((2, 2, *shape))
    y[(slice(None), slice(None), *[slice(1, 5)] * dims)] = rng.random((2, 2, *[4] * dims)) < 0.8
    y[1, 1] = 0
    s = rng.random(y.shape)
    mask = rng.random(y.shape) < 0.8 if masked else None
    total = 0.0
    for b, f in np.argwhere(y.any((2, 3) if dims == 2 else (2, 3, 4))):
        centre = np.floor(np.argwhere(y[b, f]).mean(0)).astype(int)
        total += star_by_loops(s[b, f], y[b, f], 4, centre, mask[b, f] if masked else None)
    got = shapes.star_shape_loss(
        torch.from_numpy(s), torch.from_numpy(y).to(torch.uint8), steps=4,
        mask=None if mask is None else torch.from_numpy(mask),
    )  # fmt: skip
    assert got.item() == pytest.approx(total / (y.size if mask is None else mask.sum()), rel=1e-9)


def test_star_shape_closes_holes():
    y = torch.zeros(1, 1, 17, 17, dtype=torch.uint8)
    y[..., 3:14, 3:14] = 1
    whole, hole, smaller = (y.double() for _ in range(3))
    assert shapes.star_shape_loss(whole, y) == 0
    hole[..., 5:7, 8] = 0.1
    smaller = torch.zeros_like(whole)
    smaller[..., 4:13, 4:13] = 1  # as wrong, but star-shaped within
    assert shapes.star_shape_loss(hole, y) > 0
    hole.requires_grad_()
    shapes.star_shape_loss(hole, y).backward()
    assert (hole.grad[..., 5:7, 8] < 0).all()  # the hole shall be filled
    lone = y.double()
    lone[..., 0, 8] = 0.8  # a false pixel on the far side of background
    lone.requires_grad_()
    shapes.star_shape_loss(lone, y).backward()
    assert lone.grad[..., 0, 8] > 0
    x = torch.rand(1, 1, 6, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: shapes.star_shape_loss(x, y[..., :6, :7], steps=3), x)


def test_the_deepest_point_lies_inside():
    y = torch.zeros(1, 1, 15, 15, dtype=torch.uint8)
    y[..., 2:13, 2:6] = 1
    y[..., 2:6, 2:13] = 1  # an L, whose centroid lies outside
    a, b = (shapes._centre(y, kind)[0, 0].tolist() for kind in shapes.CENTRES)
    assert y[0, 0][tuple(b)] == 1 and a != b
    s = torch.rand(1, 1, 15, 15)
    assert shapes.star_shape_loss(s, y) != shapes.star_shape_loss(s, y, centre="deepest")


def test_star_shape_method_is_its_loss():
    batch, method = some_batch(3, size=2), make("star_shape", {"weight": 3.0, "steps": 2}, 3)
    out = method.training_step(batch, 10)
    y = torch.stack([batch["label"] == 1, batch["label"] == 2], 1).to(torch.uint8)
    prior = shapes.star_shape_loss(method(batch["image"]).softmax(1)[:, 1:], y, steps=2)
    assert out["star"].item() == pytest.approx(prior.item(), rel=1e-5) and prior > 0
    given = methods.create("ce", None, lambda: method.network, 3).training_step(batch, 0)["loss"]
    expected = given + 3 * ramps.gaussian(10, 20) * prior
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


# ---- Hausdorff ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_hausdorff_is_monais(dims, alpha):
    from monai.losses import HausdorffDTLoss

    torch.manual_seed(0)
    s = (
        nn.functional.avg_pool2d(torch.rand(2, 2, 12, 12), 3, 1, 1)
        if dims == 2
        else torch.rand(2, 2, 6, 7, 8)
    )
    y = torch.zeros(s.shape, dtype=torch.uint8)
    y[..., 2:5, 2:6] = 1
    y[1, 1] = 0
    s[0, 1] = 0.1  # no boundary
    expected = HausdorffDTLoss(alpha=alpha, include_background=True)(s, y.float())
    assert shapes.hausdorff_dt_loss(s, y, alpha=alpha).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_soft_field_has_the_derivative_it_says():
    torch.manual_seed(0)
    y = torch.zeros(1, 2, 6, 7, dtype=torch.uint8)
    y[..., 1:4, 2:5] = 1
    s = torch.rand(1, 2, 6, 7, dtype=torch.float64)
    s = torch.where(s > 0.5, s + 0.02, s - 0.02).clamp(0.02, 0.98).requires_grad_()
    for alpha in (1.0, 2.0):
        torch.autograd.gradcheck(lambda s, a=alpha: shapes.hausdorff_dt_loss(s, y, alpha=a, field="soft"), s)
    sure = torch.where(s.detach() > 0.5, 1.0, 0.0)
    hard, soft = (shapes.hausdorff_dt_loss(sure, y, field=f) for f in shapes.FIELDS)
    assert hard.item() == pytest.approx(soft.item(), rel=1e-12)  # of certain predictions it is the same
    # A false pixel far from the object: the nearest pixels of background are asked to be surer.
    s = torch.full((1, 1, 9, 9), 0.3, dtype=torch.float64)
    s[..., 6:9, 6:9] = 0.9
    s.requires_grad_()
    y = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    y[..., 0, 0] = 1
    flows = [torch.autograd.grad(shapes.hausdorff_dt_loss(s, y, field=f), s)[0] for f in shapes.FIELDS]
    assert (flows[1] - flows[0])[..., 5, 5:8].max() > 0


def test_far_errors_weigh_more():
    y = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    y[..., 2:5, 2:5] = 1
    s = y.float().requires_grad_()
    near, far = y.float(), y.float()
    near[..., 6, 3], far[..., 14, 14] = 0.4, 0.4
    assert shapes.hausdorff_dt_loss(far, y) > 10 * shapes.hausdorff_dt_loss(near, y) > 0
    assert shapes.hausdorff_dt_loss(s, y) == 0


def test_hausdorff_is_balanced_with_the_region():
    batch = some_batch(size=3)
    method = make("hausdorff_dt", {"weight": 2.0}, lr=0.0)  # epochs of 5 steps
    first = method.training_step(batch, 0)
    assert first["loss"].item() == pytest.approx(3 * first["region"].item(), rel=1e-5)
    others = [{**batch, "image": batch["image"] * (1 + n)} for n in range(1, 5)]
    outs = [first, *(method.training_step(other, n + 1) for n, other in enumerate(others))]
    ratio = sum(o["region"].item() for o in outs) / sum(o["hausdorff"].item() for o in outs)
    for number in (5, 9):
        out = method.training_step(others[0], number)
        expected = out["region"] + 2 * ratio * out["hausdorff"]
        assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    constant = make("hausdorff_dt", {"weight": 2.0, "schedule": "constant"}).training_step(batch, 0)
    assert constant["loss"].item() == pytest.approx((constant["region"] + 2 * constant["hausdorff"]).item())


# ---- errors and runs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tcse", {"zoom": 1.0}, "zoom must be at least 0 and below 1, got 1.0"),
        ("tcse", {"tested": "both"}, "tested must be student or teacher, got 'both'"),
        ("asdnet", {"threshold": 1.5}, "threshold must be between 0 and 1, got 1.5"),
        ("double_uncertainty", {"passes": 1}, "passes must be at least 2, got 1"),
        ("star_shape", {"centre": "middle"}, "centre must be one of centroid, deepest, got 'middle'"),
        ("star_shape", {"steps": 0}, "steps must be at least 1, got 0"),
        ("hausdorff_dt", {"field": "round"}, "field must be one of hard, soft, got 'round'"),
        ("hausdorff_dt", {"schedule": "rise"}, "schedule must be one of balance, constant, got 'rise'"),
        ("hausdorff_dt", {"alpha": 0.5}, "alpha must be at least 1, got 0.5"),
    ],
)
def test_wrong_options_are_told(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(name, options)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = nifti_folder(tmp_path_factory.mktemp("data") / "set", cases=6, raters=1)
    (root / "imagesUn").mkdir()
    for i in range(3):
        save_nifti(root / "imagesUn" / f"new{i}_0000.nii.gz", blob((32, 32), 90 + i)[0])
    return engine.Config(data=str(root), network="unet", width=4, epochs=2, batch_size=2, device="cpu")


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("tcse", {}, {}),
        ("asdnet", {"width": 4, "start": 0.0}, {}),
        ("double_uncertainty", {"passes": 2}, {}),
        ("star_shape", {}, {}),
        ("hausdorff_dt", {}, {}),
        (
            "dtml",
            {},
            {"optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4, "schedule": "tenth", "halve_every": 3},
        ),
        ("mcpm", {"virtual": "real"}, {"optimizer": "sgd", "lr": 0.01, "meta_fraction": 0.4}),
    ],
)
def test_methods_resume_to_the_bit(config, tmp_path, monkeypatch, name, options, more):
    run = replace(config, method=name, options=options, **more)
    whole, a, b = whole_and_cut(run, tmp_path, monkeypatch, after=1)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    last, cut = (model.read_checkpoint(tmp_path / part / "last.pt")["optimizer"] for part in ("whole", "cut"))
    assert str(last) == str(cut)
    assert ("momentum_buffer" in last["state"][0]) == ("optimizer" in more)
    best = model.read_checkpoint(tmp_path / "whole" / "best.pt")["method"]
    assert not any("discriminator" in k for k in best)
    if more.get("schedule"):
        assert [row["lr"] for row in whole.history] == pytest.approx([0.01, 0.001])


def test_the_virtual_step_of_mcpm_is_sgds_with_its_momentum():
    """By hand: after one step the buffer holds g0, so the next moves by lr (0.9 g0 + sum w grad L)."""
    torch.manual_seed(0)
    method = methods.create("mcpm", {"virtual": "real"}, lambda: Tiny(1, 2), 1, methods.Inputs(2, 1, 1, 4))
    optimizer = torch.optim.SGD(method.trained(), lr=0.1, momentum=0.9)
    method.plan = methods.Plan(optimizer, 20, 5)
    batch = some_batch(size=2)
    batch["meta"] = dict(some_batch(size=2), image=batch["image"].flip(0))
    step(method, batch, 0)
    ahead = method.look_ahead(batch, method.weigh, keep_graph=True)
    params = dict(method.network.named_parameters())
    logits = method.network(batch["image"])
    maps = nn.functional.binary_cross_entropy_with_logits(
        logits[:, 0], batch["label"].float(), reduction="none"
    )
    weights = method.weigh(maps).detach().requires_grad_()
    grads = torch.autograd.grad((weights * maps).mean(), list(params.values()), create_graph=True)
    new = {
        n: p - 0.1 * (0.9 * optimizer.state[p]["momentum_buffer"] + g)
        for (n, p), g in zip(params.items(), grads, strict=True)
    }
    clean = torch.func.functional_call(method.network, new, (batch["meta"]["image"],))
    meta_loss = nn.functional.binary_cross_entropy_with_logits(clean[:, 0], batch["meta"]["label"].float())
    assert ahead.meta_loss.item() == pytest.approx(meta_loss.item(), rel=1e-5)
    assert torch.allclose(ahead.dR, torch.autograd.grad(meta_loss, weights)[0], rtol=1e-3, atol=1e-8)


def test_the_optimizer_is_the_one_asked_for(config):
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; choose from adam, sgd"):
        replace(config, optimizer="lion").check()
    steps = replace(config, schedule="tenth", halve_every=2500)
    assert [steps.decay(t, 100) for t in (0, 2499, 2500, 5999)] == pytest.approx([1, 1, 0.1, 0.01])
