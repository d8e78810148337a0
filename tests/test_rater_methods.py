"""Methods that learn from several raters: UMA-Net, label fusion, label sampling, a decoder for each rater."""

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

NAMES = ("umanet", "majority_vote", "staple", "label_sampling", "multi_head")


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    method = build(raters=3, steps=60, assess=False, doubt=0.5)
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


@pytest.mark.parametrize(
    ("option", "message"),
    [
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
    with refuses(RuntimeError, "Missing key"):
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
    assert study.under(data, "real raters") is data and study.under(data, "") is data
    for arm in study.arms.values():
        replace(study.settings, **arm.changes).check()
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
