"""Methods that learn from several raters: UMA-Net, MR-Net, Self-Calib, label fusion, label sampling, a decoder each."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

from folders import blob, nifti_folder  # noqa: E402

from noisyseg_fast import labels, reference  # noqa: E402
from noisyseg_fast.training import data as D  # noqa: E402
from noisyseg_fast.training import engine, label_errors, methods, model, networks, report  # noqa: E402
from noisyseg_fast.training import reproduce as R  # noqa: E402
from noisyseg_fast.training.branches import BranchedUNet  # noqa: E402
from noisyseg_fast.training.engine import Config, train  # noqa: E402
from noisyseg_fast.training.methods import _raters  # noqa: E402
from noisyseg_fast.training.model import ModelSpec  # noqa: E402

NAMES = ("umanet", "majority_vote", "staple", "label_sampling", "multi_head", "mr_net", "self_calib")


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name="umanet", raters=3, dims=2, classes=2, steps=10, network="unet", training=True, **options):
    torch.manual_seed(0)
    spec = ModelSpec(
        name, network, 4 if network != "segresnet" else 8, dims, 1, classes, (32,) * dims, options, raters
    )
    method = spec.build(training)
    method.plan = methods.Plan(torch.optim.Adam(method.trained(), lr=1e-2), steps, steps)
    return method


def scene(batch=2, raters=3, dims=2, classes=2, side=32, spoiled=()):
    """Squares (or cubes) in noise; rater m is m pixels off, and in the images of `spoiled` raters draw noise."""
    generator = torch.Generator().manual_seed(3)
    label = torch.zeros(batch, *(side,) * dims, dtype=torch.uint8)
    for k in range(1, classes):
        label[(slice(None), *(slice(4 + 10 * (k - 1), 4 + 10 * k + 2),) * dims)] = k
    image = label[:, None].float() + 0.1 * torch.randn(batch, 1, *(side,) * dims, generator=generator)
    drawn = torch.stack([label.roll(m % 3, 1) for m in range(raters)], 1)
    for i in spoiled:
        drawn[i] = torch.randint(classes, drawn[i].shape, generator=generator)
    return {"image": image, "label": label, "index": torch.arange(batch), "raters": drawn}


def doubt(method, value):
    """Make the AUEM say `value` everywhere, with a gradient."""
    method.doubt = lambda image, raters: torch.full(
        (len(raters), method.classes, *raters.shape[1:]), float(value), requires_grad=True
    )


def grads(module):
    return [p.grad for p in module.parameters()]


def untouched(module):
    return all(g is None or not g.any() for g in grads(module))


def touched(module):
    return any(g is not None and bool(g.any()) for g in grads(module))


# ---- UMA-Net: routing -----------------------------------------------------------------------------


def step_grads(method, batch, step):
    method.zero_grad()
    losses = method.training_step(batch, step)
    losses["loss"].backward()
    return losses


@pytest.mark.parametrize("network", ["unet", "basicunet", "segresnet"])
def test_low_quality_images_do_not_touch_the_primary_predictor(network):
    method = build(network=network, warmup=0.0, tau_confidence=1e-9)  # nothing is that certain
    losses = step_grads(method, scene(), 5)
    head = networks.head(method.network)
    assert losses["high_quality"] == 0
    assert untouched(head) and touched(method.auxiliary) and touched(method.uncertainty)
    backbone = [p for p in method.network.parameters() if id(p) not in {id(q) for q in head.parameters()}]
    assert any(p.grad is not None and p.grad.any() for p in backbone)


def test_high_quality_images_do_not_touch_the_auxiliary_predictor():
    method = build(warmup=0.0, tau_confidence=1e9, tau_agreement=1e9)
    losses = step_grads(method, scene(), 5)
    assert losses["high_quality"] == 1
    assert untouched(method.auxiliary) and touched(networks.head(method.network))
    assert touched(method.uncertainty)


def test_a_batch_of_both_kinds_goes_both_ways_image_by_image():
    method = build(warmup=0.0, tau_confidence=1e9, tau_agreement=0.5)
    batch = scene(spoiled=(1,))
    doubt(method, 0.01)
    assert method.maps(batch).primary.tolist() == [1, 0]
    both = step_grads(method, batch, 5)
    assert both["high_quality"] == 0.5
    head = [g.clone() for g in grads(networks.head(method.network))]
    one = step_grads(method, {k: v[:1] for k, v in batch.items()}, 5)
    for half, whole in zip(head, grads(networks.head(method.network)), strict=True):
        torch.testing.assert_close(2 * half, whole, rtol=1e-4, atol=1e-6)  # the spoiled image adds nothing
    other = step_grads(method, {k: v[1:] for k, v in batch.items()}, 5)
    torch.testing.assert_close(both["loss"], (one["loss"] + other["loss"]) / 2)


def test_all_images_are_of_high_quality_while_warming_up():
    method = build(warmup=0.5, tau_confidence=1e-9)
    assert step_grads(method, scene(), 4)["high_quality"] == 1
    assert untouched(method.auxiliary)
    assert step_grads(method, scene(), 5)["high_quality"] == 0


def test_without_assessment_or_auxiliary_predictor():
    method = build(warmup=0.0, tau_confidence=1e-9, assess=False)
    assert step_grads(method, scene(), 9)["high_quality"] == 1
    assert method.maps(scene()).primary.tolist() == [1, 1]
    method = build(warmup=0.0, tau_confidence=1e-9, auxiliary=False)
    losses = step_grads(method, scene(), 9)
    assert losses["loss"] == 0 and untouched(method)  # all discarded
    assert not any(name.startswith("auxiliary") for name in method.state_dict())


def test_soft_assignment_teaches_both():
    method = build(warmup=0.0, soft=0.1, tau_confidence=0.3, tau_agreement=0.4)
    batch = scene(spoiled=(1,))
    losses = step_grads(method, batch, 5)
    found = method.maps(batch)
    wanted = ((0.3 - found.confidence) / 0.1).sigmoid() * ((0.4 - found.agreement) / 0.1).sigmoid()
    torch.testing.assert_close(found.primary, wanted)
    assert 0 < losses["high_quality"] < 1
    assert touched(method.auxiliary) and touched(networks.head(method.network))


# ---- UMA-Net: the loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("raters", range(2, 8))
def test_loss_is_the_definition_for_any_number_of_raters(raters):
    method = build(raters=raters, steps=4, assess=False)
    batch = scene(raters=raters)
    losses = method.training_step(batch, 3)
    sigma = method.doubt(batch["image"], batch["raters"])[:, 0]
    assert sigma.shape == batch["raters"].shape and sigma.min() > 0 and sigma.max() < 1
    alpha = math.exp(-5 * (1 - 3 / 4) ** 2)
    wanted = reference.uncertainty_weighted_loss(
        method(batch["image"]), batch["raters"], sigma, consistency_weight=alpha
    )
    torch.testing.assert_close(losses["loss"], wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["ce"], wanted[1], rtol=1e-5, atol=1e-6)


def test_pixels_weigh_exp_of_minus_their_uncertainty():
    method, batch = build(assess=False, dice_weight=0.0, consistency=0.0), scene()
    found = []
    for sigma in (0.0, 1.0):
        doubt(method, sigma)
        step_grads(method, batch, 5)
        found.append([g.clone() for g in grads(networks.head(method.network))])
    for certain, doubted in zip(*found, strict=True):
        torch.testing.assert_close(doubted, certain / math.e, rtol=1e-4, atol=1e-7)


def test_the_uncertainty_estimator_learns_where_a_rater_is_wrong():
    method = build(raters=3, steps=60, assess=False, doubt=0.5, warmup=0.0)
    batch = scene()
    batch["raters"][:, 2] = 1 - batch["raters"][:, 2]  # one rater has it all wrong
    optimizer = method.plan.optimizer
    for step in range(60):
        step_grads(method, batch, step)
        optimizer.step()
    sigma = method.maps(batch).uncertainty[:, 0].flatten(2).mean((0, 2))
    assert sigma[2] > 0.5 and sigma[:2].max() < 0.2
    calibration = method.maps(batch).calibration[:, 0]  # the wrong masks, turned round where they are doubted
    assert ((calibration[:, 2] > 0.5) == batch["label"]).float().mean() > 0.8


def test_consistency_grows_and_brings_calibration_maps_together():
    batch = scene()
    losses = [build(assess=False).training_step(batch, step) for step in (0, 9)]
    assert losses[0]["consistency"] == losses[1]["consistency"] > 0
    rise = (math.exp(-5 * 0.1**2) - math.exp(-5)) * losses[0]["consistency"]
    torch.testing.assert_close(losses[1]["loss"] - losses[0]["loss"], rise, rtol=1e-3, atol=1e-6)
    ends = []
    for consistency in (0.0, 20.0):
        method = build(assess=False, consistency=consistency, steps=1, doubt=0.5)
        for _ in range(12):
            last = step_grads(method, batch, 1)
            method.plan.optimizer.step()
        ends.append(float(last["consistency"]))
    assert ends[1] < 0.5 * ends[0]


def test_missing_raters_count_for_nothing():
    method, batch = build(assess=False), scene()
    batch["raters"][0, 2] = D.MISSING
    gone = method.training_step(batch, 9)
    sigma = method.doubt(batch["image"], batch["raters"])[:, 0]
    assert torch.isfinite(sigma).all()
    wanted = reference.uncertainty_weighted_loss(
        method(batch["image"]),
        _raters.masks(batch["raters"], 1)[:, 0],
        sigma,
        consistency_weight=math.exp(-5 * 0.1**2),
        raters=torch.tensor([[1, 1, 0], [1, 1, 1]]),
    )
    torch.testing.assert_close(gone["loss"], wanted[0], rtol=1e-5, atol=1e-6)
    assert not method.maps(batch).calibration[0, 0, 2].any()
    # For the AUEM, a missing mask is the mean of the others; so two equal ones could have been three.
    batch["raters"][0, 1] = batch["raters"][0, 0]
    two = method.doubt(batch["image"], batch["raters"])[0]
    batch["raters"][0, 2] = batch["raters"][0, 0]
    torch.testing.assert_close(method.doubt(batch["image"], batch["raters"])[0], two)


def test_several_classes_are_each_against_the_rest():
    logits = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(_raters.one_vs_rest(logits).sigmoid(), logits.softmax(1)[:, 1:])
    assert _raters.one_vs_rest(logits[:, :1]) is not None
    method, batch = build(classes=3, warmup=0.0), scene(classes=3, spoiled=(1,))
    found = method.maps(batch)
    assert found.uncertainty.shape == (2, 2, 3, 32, 32) and found.confidence.shape == (2,)
    first = step_grads(method, batch, 1)["loss"]
    for step in range(20):
        last = step_grads(method, batch, step)["loss"]
        method.plan.optimizer.step()
    assert last < 0.8 * first


def test_eq_3_by_area_doubts_no_more_for_a_small_object():
    """The gradient of the loss with respect to sigma, of a pixel with a given error, per pixel's share of eq. 3."""
    side, found = 32, {}
    for half in (8, 4):  # a quarter and a sixteenth of the image
        label = torch.zeros(1, side, side, dtype=torch.uint8)
        label[:, 16 - half : 16 + half, 16 - half : 16 + half] = 1
        raters = label[:, None].repeat(1, 2, 1, 1)
        logits = torch.where(label > 0, 0.8, -20.0)[:, None]  # p = 0.69 in the object
        for regularizer in ("paper", "area"):
            method = build(raters=2, regularizer=regularizer)
            sigma = torch.full((1, 1, 2, side, side), 0.1, requires_grad=True)
            method._terms(
                logits, raters, sigma, torch.ones(1, 2, dtype=torch.bool), 0.0
            ).total.sum().backward()
            found[half, regularizer] = float(sigma.grad[0, 0, 0, 16, 16])
    assert found[8, "area"] == pytest.approx(found[8, "paper"], rel=0.5)
    assert found[8, "paper"] > 0 > found[4, "paper"]  # below 0: sigma rises, though the rater is right
    assert found[4, "area"] > 0


def test_eq_3_by_area_is_what_it_says():
    batch = scene(raters=3)
    batch["raters"][0, 2] = D.MISSING
    terms = {}
    for regularizer in ("paper", "area"):
        method = build(regularizer=regularizer, dice_weight=2.0)
        sigma, there = method.doubt(batch["image"], batch["raters"]), _raters.present(batch["raters"])
        terms[regularizer] = method._terms(method(batch["image"]), batch["raters"], sigma, there, 0.5).total
    p = method(batch["image"]).sigmoid().square().sum((1, 2, 3))
    for i in range(2):
        counted = range(2 if i == 0 else 3)
        wanted = sum(
            sigma[i, 0, m].sum() / 2 * (0.5 / (p[i] + batch["raters"][i, m].sum()) - 1 / 1024)
            for m in counted
        )
        gap = (terms["area"] - terms["paper"])[i]
        torch.testing.assert_close(gap, 2 * wanted / len(counted), rtol=1e-4, atol=1e-6)


def test_the_uncertainty_estimator_is_not_taught_while_warming_up():
    method = build(warmup=0.5, assess=False)
    step_grads(method, scene(), 4)
    assert untouched(method.uncertainty) and touched(method.network)
    step_grads(method, scene(), 5)
    assert touched(method.uncertainty)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"regularizer": "none"}, "regularizer must be paper or area, got 'none'"),
        ({"soft": -1}, "soft must be finite and not negative, got -1"),
        ({"tau_agreement": 0}, "tau_agreement must be positive, got 0"),
        ({"warmup": 2}, "warmup must be a share between 0 and 1, got 2"),
        ({"doubt": 0}, "doubt must be between 0 and 1, got 0"),
        ({"entropy": "half"}, "entropy must be paper or binary, got 'half'"),
    ],
)
def test_options_of_umanet(option, message):
    with refuses(ValueError, message):
        methods.configure("umanet", option)


def test_untrained_uncertainty_is_what_was_asked_for():
    for value in (0.02, 0.3):
        sigma = build(doubt=value).maps(scene()).uncertainty
        assert abs(sigma.logit().mean() - math.log(value / (1 - value))) < 0.5


def test_entropy_decides_for_small_objects():
    batch = scene()
    batch["raters"][:, 1:] = batch["raters"][:, :1]
    found = {}
    for entropy in ("paper", "binary"):
        method = build(entropy=entropy)
        doubt(method, 0.02)
        found[entropy] = method.maps(batch)
    assert found["paper"].primary.tolist() == [0, 0] and found["binary"].primary.tolist() == [1, 1]


@pytest.mark.parametrize("raters", [2, 7])
@pytest.mark.parametrize("soft", [0.0, 0.1])
def test_what_the_report_gets_for_any_number_of_raters(raters, soft):
    method, batch = build(raters=raters, soft=soft), scene(raters=raters)
    batch["raters"][0, 1] = D.MISSING
    seen = method.explain(batch)
    wanted = method.maps(batch).primary.tolist()
    for share, one in zip(wanted, seen, strict=True):
        assert {maps.shape for maps in one.maps.values()} == {(raters, 32, 32)}
        quality = one.facts["quality"]
        assert quality == (f"{share:.0%} high" if soft else "high" if share else "low")
    assert not seen[0].maps["annotations"][1].any() and not seen[0].maps["calibration maps"][1].any()


# ---- the other methods ----------------------------------------------------------------------------


def test_branched_unet_with_one_branch_is_the_unet():
    def count(network):
        return sum(p.numel() for p in network.parameters())

    assert count(BranchedUNet(2, 3, 2, 4, 1)) == count(networks.build("unet", 2, 3, 2, 4))
    network = BranchedUNet(2, 1, 2, 4, 3).eval()
    assert network(torch.zeros(1, 1, 37, 50)).shape == (1, 3, 2, 37, 50)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dims", "raters", "classes"), [(2, 4, 2), (2, 2, 3), (3, 2, 2)])
def test_each_method_learns_a_few_patches(name, dims, raters, classes):
    steps = 20 if dims == 2 else 5
    method = build(name, raters, dims, classes, steps=steps)
    batch = scene(2 if dims == 2 else 1, raters, dims, classes)
    batch["raters"][0, -1] = D.MISSING
    first = None
    for step in range(steps):
        losses = step_grads(method, batch, step)
        method.plan.optimizer.step()
        first = losses["loss"].item() if first is None else first
        assert torch.isfinite(losses["loss"])
    wanted = (len(batch["label"]), 1 if classes == 2 else classes, *batch["label"].shape[1:])
    assert method(batch["image"]).shape == wanted
    assert losses["loss"] < (0.7 if dims == 2 else 0.97) * first


@pytest.mark.parametrize("name", NAMES)
def test_each_method_fits_eight_patches(name):
    tau = {"tau_confidence": 10.0, "tau_agreement": 10.0} if name == "umanet" else {}
    method, batch = build(name, 3, steps=40, **tau), scene(8)
    for i in range(8):  # each somewhere else
        for part in ("image", "label"):
            batch[part][i] = batch[part][i].roll((3 * i % 7, i), (-2, -1))
    batch["raters"] = torch.stack([batch["label"].roll(int(m == 0), 1) for m in range(3)], 1)
    for number in range(40):
        step_grads(method, batch, number)
        method.plan.optimizer.step()
    found = method.eval()(batch["image"])[:, 0] > 0
    truth = batch["label"] == 1
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85


def test_umanet_fits_what_most_raters_drew():
    method = build(raters=4, steps=50, tau_confidence=10.0, tau_agreement=10.0)
    batch = scene(raters=4)
    batch["raters"][:, 1:] = batch["label"][:, None]
    batch["raters"][:, 0] = 1 - batch["label"]
    for step in range(50):
        step_grads(method, batch, step)
        method.plan.optimizer.step()
    found = method(batch["image"])[:, 0] > 0
    truth = batch["label"] > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.9


def test_label_sampling_draws_from_those_present():
    method, batch = build("label_sampling"), scene()
    batch["raters"][:, 2] = D.MISSING
    torch.manual_seed(1)
    seen = {round(method.training_step(batch, 0)["loss"].item(), 6) for _ in range(24)}
    assert len(seen) == 4  # two raters for each of two images
    torch.manual_seed(1)
    again = {round(method.training_step(batch, 0)["loss"].item(), 6) for _ in range(24)}
    assert again == seen


def test_multi_head_trains_each_decoder_on_its_rater_and_predicts_their_mean():
    method, batch = build("multi_head"), scene()
    batch["raters"][:, 1] = D.MISSING
    step_grads(method, batch, 0)
    assert [touched(d) for d in method.network.decoders] == [True, False, True]
    mean = method.network(batch["image"]).sigmoid().mean(1)
    torch.testing.assert_close(method(batch["image"]).sigmoid(), mean)
    method, batch = build("multi_head", classes=3), scene(classes=3)
    mean = method.network(batch["image"]).softmax(2).mean(1)
    torch.testing.assert_close(method(batch["image"]).softmax(1), mean)


def test_fusion_of_the_raters():
    drawn = np.random.default_rng(0).integers(0, 2, (4, 16, 16)).astype(np.uint8)
    drawn[3] = D.MISSING
    fused = methods.get("majority_vote").fuse(methods.configure("majority_vote"), drawn, 2)
    assert np.array_equal(fused, drawn[:3].sum(0) >= 2)
    even = drawn[:2]
    for tie, wanted in (("highest", even.max(0)), ("lowest", even.min(0))):
        config = methods.configure("majority_vote", {"tie": tie})
        assert np.array_equal(methods.get("majority_vote").fuse(config, even, 2), wanted)
    with refuses(ValueError, "tie must be lowest or highest, got 'none'"):
        methods.configure("majority_vote", {"tie": "none"})
    fused = methods.get("staple").fuse(methods.configure("staple"), drawn, 2)
    assert np.array_equal(fused, labels.staple(drawn[:3]).posterior > 0.5)


# ---- MR-Net ---------------------------------------------------------------------------------------


def learn(method, batch, steps):
    for step in range(steps):
        losses = step_grads(method, batch, step)
        method.plan.optimizer.step()
    return losses


def dice(found, truth):
    found, truth = found > 0, truth > 0
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def two_tastes():
    """One rater draws the object, the other all around it as well."""
    batch = scene(raters=2)
    wide = torch.nn.functional.max_pool2d(batch["label"][:, None].float(), 9, 1, 4)[:, 0].to(torch.uint8)
    batch["raters"] = torch.stack([batch["label"], wide], 1)
    return batch


@pytest.fixture(scope="module")
def mr_net():
    method, batch = build("mr_net", raters=2), two_tastes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.mr_net, "KINDS", (0.0, 0.0, 1.0))  # one rater at a time, or it takes longer
        learn(method, batch, 75)
    return method.eval(), batch


def test_expertness_steers_the_coarse_prediction(mr_net):
    method, batch = mr_net
    for m in range(2):
        vector = torch.zeros(2, 2)
        vector[:, m] = 1
        coarse = method.network(batch["image"], vector).coarse[:, 0]
        own, other = (dice(coarse, batch["raters"][:, k]) for k in (m, 1 - m))
        assert own > 0.9 and own > other + 0.1


def test_each_raters_mask_is_reconstructed_and_where_they_differ_is_looked_at(mr_net):
    method, batch = mr_net
    seen = {}
    hook = method.network.perception.register_forward_pre_hook(
        lambda module, given: seen.update(maps=given[1])
    )
    found = method.network(batch["image"], torch.full((2, 2), 0.5))
    hook.remove()
    for m in range(2):
        assert dice(found.raters[:, m, 0], batch["raters"][:, m]) > 0.9
    apart = batch["raters"][:, 0] != batch["raters"][:, 1]
    coarse, spread = seen["maps"].unbind(1)
    torch.testing.assert_close(coarse, found.coarse[:, 0].sigmoid())
    assert spread[apart].mean() > 4 * spread[~apart].mean()
    features = torch.randn(2, 8, 16, 16)
    with_, without = (
        method.network.perception(features, torch.stack([coarse, s], 1)) for s in (spread, 0 * spread)
    )
    assert (with_ - without).abs().max() > 1e-3
    assert torch.equal(method(batch["image"]), found.final)


def test_modules_of_mr_net_learn_from_their_own_losses():
    method, batch = build("mr_net"), scene()
    network = method.network
    found = network(batch["image"], torch.full((2, 3), 1 / 3))
    for part, module in ((found.final, network.perception), (found.raters, network.raters)):
        method.zero_grad()
        part.sum().backward(retain_graph=True)
        for other in (network.coarse, network.raters, network.perception):
            assert touched(other) == (other is module)
    method.zero_grad()
    method.distance(batch["image"], found.coarse, batch["label"][:, None].float()).backward()
    assert touched(network.coarse) and untouched(network.raters)
    assert all(p.requires_grad for p in network.raters.parameters())
    share = {}
    for reconstruction in (0.0, 0.5):
        method = build("mr_net", reconstruction=reconstruction)
        torch.manual_seed(1)
        share[reconstruction] = method.training_step(batch, 0)
    a, b = share.values()
    torch.testing.assert_close(b["loss"] - a["loss"], 0.5 * (b["distance"] - b["coarse"]))


def test_expertness_is_drawn_among_those_present():
    method = build("mr_net", raters=4)
    there = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    seen = torch.stack([method.vectors(there) for _ in range(50)])
    torch.testing.assert_close(seen.sum(-1), torch.ones(50, 3, 3))
    assert not seen[:, :, ~there].any()
    alike, random, one = seen.unbind(1)
    torch.testing.assert_close(alike[0], there / there.sum(1, keepdim=True))
    assert set(one.unique().tolist()) == {0, 1} and (one[:, 1].sum(0) > 5).tolist() == there[1].tolist()
    assert len(random[:, 0].unique()) > 10 and (random[:, 2, 3] == 1).all()


# ---- Self-Calib -----------------------------------------------------------------------------------


def test_expertness_finds_the_rater_who_is_wrong():
    method, batch = build("self_calib", steps=40), scene()
    batch["raters"][:, :2] = batch["label"][:, None]
    batch["raters"][:, 2] = 1 - batch["label"]
    learn(method, batch, 40)
    log_p = method.network.diverge(batch["image"], method(batch["image"]).sigmoid())
    share = log_p.softmax(2)[:, 0]
    torch.testing.assert_close(share.sum(1), torch.ones(2, 32, 32))
    fused = (share * batch["raters"]).sum(1)
    plain = batch["raters"].float().mean(1)
    assert (fused - batch["label"]).abs().mean() < 0.8 * (plain - batch["label"]).abs().mean()
    assert dice(method(batch["image"])[:, 0], batch["label"]) > 0.9


def test_each_network_of_self_calib_learns_from_its_own_loss():
    method, batch = build("self_calib"), scene()
    network = method.network
    step_grads(method, batch, 0)
    assert touched(network.converging) and touched(network.expertness) and touched(network.diverging)
    converge, diverge = network.converge, network.diverge
    network.diverge = lambda *given: diverge(*given).detach()
    step_grads(method, batch, 0)
    assert touched(network.converging) and untouched(network.diverging)
    network.converge, network.diverge = (lambda *given: converge(*given).detach()), diverge
    step_grads(method, batch, 0)
    assert untouched(network.converging) and touched(network.diverging)


def test_what_one_turn_finds_the_next_one_learns():
    """With a diverging model that believes the last rater alone, the later turns learn his masks."""
    batch, wanted = scene(), []
    for turns in (1, 2):
        method = build("self_calib", turns=turns, warmup=0.5)
        log_p = torch.tensor([-60.0, -60.0, -1e-3]).reshape(1, 1, 3, 1, 1).expand(2, 1, 3, 32, 32)
        method.network.diverge = lambda image, found, log_p=log_p: log_p
        logits = method.network.converge(
            method.network.converging.encode(batch["image"]), method.alike(batch["image"])
        )
        first = _raters.segmentation_loss(logits, batch["raters"].float().mean(1, keepdim=True), "sigmoid")
        wanted.append(method.training_step(batch, 5)["converging"])
        assert (
            turns == 1 or method.training_step(batch, 4)["converging"] != wanted[1]
        )  # in the warm-up: the average
        if turns == 1:
            torch.testing.assert_close(wanted[0], first)
            continue
        given = log_p.exp() * log_p.softmax(2)
        logits = method.network.converge(method.network.converging.encode(batch["image"]), given)
        second = _raters.segmentation_loss(logits, batch["raters"][:, 2:].float(), "sigmoid")
        torch.testing.assert_close(wanted[1], (first + second) / 2)
        torch.testing.assert_close(method(batch["image"]), logits)


def test_shuffle_loss_pulls_each_map_to_its_raters_masks():
    method = build("self_calib", raters=2)
    drawn = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1, 1).expand(1, 1, 2, 4, 4)
    share, there = torch.full_like(drawn, 0.5), torch.ones(1, 1, 2, 1, 1, dtype=torch.bool)
    good, bad = (p.log() * torch.ones_like(drawn) for p in (drawn * 0.9 + 0.05, 0.95 - drawn * 0.9))
    assert method._shuffled(good, share, drawn, there) < method._shuffled(bad, share, drawn, there)


def test_missing_raters_have_no_say_in_self_calib():
    batch, losses = scene(), []
    batch["raters"][:, 2] = D.MISSING
    for believed in (-1.0, -9.0):
        method = build("self_calib", turns=1)
        log_p = torch.tensor([-1.0, -2.0, believed]).reshape(1, 1, 3, 1, 1).expand(2, 1, 3, 32, 32)
        method.network.diverge = lambda image, found, log_p=log_p: log_p
        losses.append(method.training_step(batch, 0))
    assert torch.isfinite(losses[0]["loss"]) and losses[0]["diverging"] == losses[1]["diverging"]


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("mr_net", {"reconstruction": 1}, "reconstruction must be at least 0 and below 1, got 1"),
        ("mr_net", {"dice_weight": -1}, "dice_weight must be finite and not negative, got -1"),
        ("self_calib", {"turns": 0}, "turns must be at least 1, got 0"),
        ("self_calib", {"warmup": 1.5}, "warmup must be a share between 0 and 1, got 1.5"),
        ("self_calib", {"shuffle": -0.1}, "shuffle must be finite and not negative, got -0.1"),
    ],
)
def test_options_of_mr_net_and_self_calib(name, option, message):
    with refuses(ValueError, message):
        methods.configure(name, option)


@pytest.mark.parametrize("name", ["mr_net", "self_calib"])
def test_untrained_predictors_begin_with_the_foreground_asked_for(name):
    method = build(name)
    networks.start_at(method.network, 0.03)
    parts = method.network.predictors()
    assert len(parts) > 1
    assert abs(method(scene()["image"]).sigmoid().mean() - 0.03) < 0.05
    odd = torch.randn(1, 1, 37, 50)  # no multiple of 16
    assert method(odd).shape == (1, 1, 37, 50)


# ---- with the engine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = nifti_folder(tmp_path_factory.mktemp("data") / "set", cases=8, raters=3)
    (root / "labelsTr" / "case1_rater2.nii.gz").unlink()
    return root


@pytest.fixture
def tiny(folder):
    return Config(data=str(folder), width=4, epochs=2, batch_size=2, device="cpu", lr=3e-3)


def test_labels_are_fused_once_for_each_case(folder, monkeypatch):
    data = D.open_data(folder)
    store, calls = D.Store(2, raters=True), []

    def fuse(raters):
        calls.append(raters.shape)
        return np.full(raters.shape[1:], len(calls), np.uint8)

    training = D.TrainingSet(data.training, store, (32, 32), fuse=fuse, noise_rate=0.5)
    first = [training[i]["label"].unique().tolist() for i in range(len(training))]
    assert first == [[i + 1] for i in range(len(training))]
    assert training[0]["raters"].max() != training[0]["label"].max() or len(calls) == len(training)
    assert len(calls) == len(training) and set(calls) == {(3, 32, 32)}


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_ends_with_the_same_bits_and_exports_what_predicts(name, tiny, tmp_path):
    config = replace(tiny, method=name, epochs=3, out=str(tmp_path / "whole"))
    train(config, report=False)
    part = replace(config, out=str(tmp_path / "part"))

    class Stop(Exception):
        pass

    original = engine._Loop._epoch

    def stop_after_first(self, *args):
        if self.epoch == 1:
            raise Stop
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Loop, "_epoch", stop_after_first)
        with pytest.raises(Stop):
            train(part, report=False)
    train(part, resume=True, report=False)
    whole, again = (model.read_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "part"))
    assert whole["method"].keys() == again["method"].keys()
    assert all(torch.equal(whole["method"][k], again["method"][k]) for k in whole["method"])

    best = model.read_checkpoint(tmp_path / "whole" / "best.pt")
    assert {k.split(".")[0] for k in best["method"]} == {"network"}
    image = torch.randn(1, 1, 32, 32)
    for checkpoint in (best, whole):  # both predict
        method, spec = model.load_model(checkpoint, torch.device("cpu"))
        assert spec.raters == 3
        assert {k.split(".")[0] for k in method.state_dict()} == {"network"}
        assert method(image).shape == (1, 1, 32, 32)
    if name == "umanet":
        assert {k.split(".")[0] for k in whole["method"]} == {"network", "auxiliary", "uncertainty"}
        plain = networks.build("unet", 2, 1, 1, 4)
        assert {f"network.{k}" for k in plain.state_dict()} == set(best["method"])
    missing = dict(best, method={k: v for i, (k, v) in enumerate(best["method"].items()) if i})
    with refuses(ValueError, "is missing or another"):
        model.load_model(missing, torch.device("cpu"))


def test_report_shows_annotations_uncertainty_calibration_and_quality(tiny, tmp_path):
    result = train(replace(tiny, method="umanet", epochs=1, out=str(tmp_path / "run")))
    assert len(result.explained) > 2
    for case in result.explained:
        assert case["facts"]["quality"] in ("high", "low")
    shown = result.explained[0]
    assert {name: a.shape for name, a in shown["maps"].items()} == dict.fromkeys(
        ("annotations", "uncertainty", "calibration maps"), (3, 32, 32)
    )
    drawn, doubted, corrected = shown["maps"].values()
    assert np.allclose(np.abs(drawn - doubted), corrected, atol=1e-6) or (drawn[2] == 0).all()
    text = (tmp_path / "run" / "report.html").read_text()
    assert "rows: the image, then annotations, uncertainty, calibration maps" in text
    assert "quality low" in text or "quality high" in text
    assert not train(replace(tiny, epochs=1, out=str(tmp_path / "ce")), report=False).explained


def test_report_pictures_some_cases_and_lists_all(folder, tmp_path):
    data = D.open_data(folder)
    training = D.TrainingSet(data.training, D.Store(2, raters=True), (32, 32))
    found = label_errors.explained(build(), training, torch.device("cpu"), 2, most=5, shown=2)
    assert [("maps" in case) for case in found] == [True, False, False, False, True]
    report.write_report(tmp_path / "a.html", title="t", runs=[], overlays=[], explained=found)
    text = (tmp_path / "a.html").read_text()
    assert all(case["id"] in text for case in found) and text.count("<img") == 2


def test_study_of_umanet(tmp_path):
    pairs = [blob((32, 32), i) for i in range(20)]
    image, mask = (np.stack(a) for a in zip(*pairs, strict=True))
    drawn = np.stack([mask, np.roll(mask, 1, 2)], 1)
    np.savez(tmp_path / "set.npz", image=image, mask=drawn)
    study = R.get("umanet")
    settings = replace(study.settings, data=str(tmp_path / "set.npz"))
    data = study.data(settings)
    for condition, wanted in (("LN", 0.8), ("HN", 0.7)):
        noisy = study.under(data, condition).training
        assert noisy[0].labels.shape == (5, 32, 32)
        truth = [D.load(case).target for case in data.training]
        dice = [
            2 * (a & t).sum() / (a.sum() + t.sum())
            for case, t in zip(noisy, truth, strict=True)
            for a in case.labels
        ]
        assert abs(np.mean(dice) - wanted) < 0.06
        assert study.under(data, condition).test == data.test
    assert study.under(data, "real raters") is data
    assert study.under(data, "").training == data.training  # LIDC's clean labels are its own consensus
    for arm in study.arms.values():
        replace(study.settings, **arm.changes).check()
    settings = replace(study.settings, epochs=1, epoch_batches=1)
    runs = R.plan(study, settings, study.default_arms, 3, tmp_path)
    under = {c: [run.arm for run in runs if run.condition == c and run.seed == 2] for c in study.conditions}
    assert under["LN"] == under["real raters"] == ["majority_vote", "staple", "label_sampling", "umanet"]
    assert set(under["HN"]) == set(study.default_arms) - {"clean"}
    some = R.plan(study, settings, study.default_arms, 1, tmp_path, ["LN", "real raters"])
    assert [run.condition for run in some] == ["", *["LN", "real raters"] * 4]
    with refuses(ValueError, "unknown condition 'none' of study umanet; choose from LN, HN, real raters"):
        R.reproduce("umanet", tmp_path / "out", conditions=("none",))
    rows = R.reproduce(
        "umanet",
        tmp_path / "out",
        data=str(tmp_path / "set.npz"),
        seeds=1,
        budget=2,
        quick=True,
        arms=("clean", "umanet"),
    )
    assert [row["condition"] for row in rows] == ["", "LN", "HN", "real raters"]
    assert len({row["dice"] for row in rows[1:]}) == 3
    assert "umanet minus clean" in (tmp_path / "out" / "results.md").read_text()


def test_study_of_umanet_with_masks_to_trust(tmp_path):
    """As BU-BIL: a crowd to train on, experts to be tested by; clean labels are the experts'."""
    pairs = [blob((32, 32), i) for i in range(16)]
    image, mask = (np.stack(a) for a in zip(*pairs, strict=True))
    crowd = np.stack([np.roll(mask, 3, 1), np.roll(mask, 4, 1)], 1)
    there = np.ones((16, 2), bool)
    there[::3, 0] = False
    path = str(tmp_path / "set.npz")
    np.savez(
        path,
        image=image,
        crowd=crowd,
        crowd_present=there,
        expert_a=mask[:, None],
        expert_a_present=there[:, 1:],
    )
    study = R.get("umanet")
    data = study.data(replace(study.settings, data=path))
    for condition, raters in (("", 1), ("LN", 5), ("real raters", 2)):
        training = study.under(data, condition).training
        assert {len(case.labels) for case in training} == {raters}
        for case in training:
            truth = mask[int(case.id.split("_")[1])]
            assert np.array_equal(D.load(case).target, truth) == (not condition)
    rows = R.reproduce(
        "umanet",
        tmp_path / "out",
        data=path,
        seeds=1,
        budget=2,
        quick=True,
        arms=("clean", "umanet"),
        conditions=("real raters",),
    )
    assert [row["condition"] for row in rows] == ["", "real raters"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "## real raters" in text and "## LN" not in text


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_head_makes_the_logits_of_any_network(name):
    for full, dims in ((name, 2), (f"{name}-2d", 3)):
        width = 16 if name == "monai_vnet" else 8
        network = networks.build(full, dims, 1, 2, width).eval()
        image, seen = torch.randn(1, 1, *(32,) * dims), []
        hook = networks.head(network).register_forward_hook(lambda *parts, seen=seen: seen.append(parts[2]))
        logits = network(image[..., :2] if dims == 3 else image)
        hook.remove()
        assert len(seen) == 1 and seen[0].numel() == logits.numel()
        assert torch.equal(seen[0].flatten().sort().values, logits.flatten().sort().values)
        if dims == 3:
            continue
        method = build(network=name, warmup=0.0) if name != "monai_vnet" else None
        if method is not None:
            assert torch.isfinite(method.training_step(scene(), 5)["loss"])


def test_one_rater_is_refused(tmp_path, tiny):
    root = nifti_folder(tmp_path / "set", cases=6, raters=1)
    with refuses(ValueError, "method umanet needs several raters"):
        train(replace(tiny, method="umanet", data=str(root), out=str(tmp_path / "run")))


def test_inputs_are_needed():
    with refuses(ValueError, "method umanet needs inputs, to know how many raters there are"):
        methods.create("umanet", None, lambda: networks.build("unet", 2, 1, 1, 4), 1)


def test_networks_without_a_known_head():
    with refuses(ValueError, "network Conv2d has no head that is known"):
        networks.head(torch.nn.Conv2d(1, 1, 1))
