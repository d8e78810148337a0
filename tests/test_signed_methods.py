"""DTML, DTC, SASSNet and the boundary loss: each test would fail without what it names."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

from folders import blob, nifti_folder, save_nifti  # noqa: E402
from resuming import whole_and_cut  # noqa: E402
from steps import step, trains  # noqa: E402
from test_methods_noisy import some_batch  # noqa: E402
from torch import nn  # noqa: E402

from noisyseg_fast import reference  # noqa: E402
from noisyseg_fast.training import engine, methods, model, ramps  # noqa: E402
from noisyseg_fast.training.methods import _signed, boundary, several  # noqa: E402

SIGNED = ["dtml", "dtc", "sassnet"]
OURS = [*SIGNED, "boundary"]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(outputs, dims, norm):
    conv, batch_norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    middle = batch_norm(8) if norm else nn.Identity()
    return nn.Sequential(conv(1, 8, 3, padding=1), middle, nn.ReLU(), conv(8, outputs, 3, padding=1))


def make(name, options=None, channels=1, *, steps=20, dims=2, norm=False, lr=2e-2):
    """Without norm, so that no image sees the others of its batch."""
    torch.manual_seed(0)
    options = {"width": 4, **(options or {})} if name == "sassnet" else options
    method = methods.create(
        name,
        options,
        lambda heads=1: tiny(heads * channels, dims, norm),
        channels,
        methods.Inputs(dims, 1, 1, 4),
    )
    method.plan = methods.Plan(torch.optim.Adam(method.trained(), lr=lr), steps, 5)
    return method


def semi(channels=1, size=3, dims=2, side=16, count=2):
    """A batch with unlabelled images, which show other noise."""
    batch = some_batch(channels, size, dims, side)
    generator = torch.Generator().manual_seed(7)
    return {**batch, "unlabelled": torch.randn(count, 1, *(side,) * dims, generator=generator)}


def gradients(method, batch, number=20):
    method.zero_grad()
    method.training_step(batch, number)["loss"].backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in method.named_parameters()
    }


def maps_of(label, convention="dtc", **options):
    return torch.stack(
        [reference.signed_distance_map(x, convention=convention, **options) for x in label]
    ).float()


# ---- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_method_fits_eight_patches(name, channels):
    batch = some_batch(channels, side=16)
    if name != "boundary":
        batch["unlabelled"] = batch["image"].flip(0)
    method = make(name, channels=channels, steps=80, norm=True)
    for number in range(method.plan.steps):
        out = step(method, batch, number)
        assert all(value.dim() == 0 for value in out.values())
    method.eval()
    right = (several.hard(method(batch["image"])) == batch["label"]).float().mean()
    background = (batch["label"] == 0).float().mean()
    assert right > 0.85 > 0.8 > background


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("network", "dims"), [("vnet", 2), ("vnet", 3), ("unet", 3)])
def test_each_method_trains_real_networks(name, network, dims):
    side = 32 if network == "unet" else 16
    options = {"width": 4} if name == "sassnet" else {}
    trains(name, network, semi(dims=dims, size=2, side=side), options)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("label", [0, 1, 255])
def test_empty_full_and_unknown_crops_are_finite(name, channels, label):
    options = {"supervision": "both"} if name == "dtml" else {}
    method, batch = make(name, options, channels), semi(channels)
    batch["label"][:] = label
    out = method.training_step(batch, 20)
    assert all(torch.isfinite(value) for value in out.values())
    assert all(torch.isfinite(g).all() for g in gradients(method, batch).values())
    if label == 255:
        assert all(
            out[k] == 0 for k in ("segmentation", "mask", "distance", "region", "boundary") if k in out
        )


@pytest.mark.parametrize("name", OURS)
def test_unlabelled_pixels_do_not_count(name):
    options = {"consistency": 0.0} if name in ("dtml", "dtc") else None
    batch, method = some_batch(), make(name, options)
    batch["label"][:, :4] = 255
    loss = method.training_step(batch, 9)["loss"]
    image = batch["image"].clone()
    image[:, :, :2] += 1  # seen only by pixels without a label
    assert method.training_step({**batch, "image": image}, 9)["loss"] == loss


# ---- signed maps ----------------------------------------------------------------------------------


def test_log_odds_of_each_class():
    z = torch.randn(2, 4, 3, 3)
    assert torch.allclose(_signed.odds(z).sigmoid(), z.softmax(1)[:, 1:], atol=1e-6)
    assert _signed.odds(z[:, :1]) is not None and torch.equal(_signed.odds(z[:, :1]), z[:, :1])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_inverse_transform_is_inside_where_the_map_is_negative(channels):
    batch = some_batch(channels)
    method = make("dtml", {"tested": "distance"}, channels)
    maps = torch.cat([
        torch.zeros(8, channels > 1, 16, 16),
        *(
            maps_of(batch["label"] == c, convention="two_sided")[:, None]
            for c in range(1, max(2, channels))
        ),
    ], 1).float() / 10  # fmt: skip
    nonsense = torch.randn(8, channels, 16, 16)
    method.both = lambda image: (nonsense, maps)
    assert torch.equal(several.hard(method(batch["image"])), batch["label"])
    assert method.training_step(batch, 0)["mask"] < 1e-3
    method.both = lambda image: (nonsense, -maps)
    assert method.training_step(batch, 0)["mask"] > 0.9


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("channels", [1, 3])
def test_whom_to_test(name, channels):
    image = torch.randn(2, 1, 16, 16)
    logits, maps = make(name, channels=channels).both(image)
    assert torch.equal(make(name, channels=channels)(image), logits)
    p = several.ensemble([logits])
    of_maps = make(name, {"tested": "distance", "k": 10.0}, channels)(image)
    mean = make(name, {"tested": "mean", "k": 10.0}, channels)(image)
    if channels == 1:
        assert torch.allclose(of_maps, -10 * maps)
        assert torch.allclose(mean.sigmoid(), (p.sigmoid() + of_maps.sigmoid()) / 2, atol=1e-6)
    else:
        assert torch.equal(of_maps[:, 0], torch.zeros(2, 16, 16))
        assert torch.allclose(of_maps[:, 1:], -10 * maps[:, 1:])
        assert torch.allclose(mean.softmax(1), (p.softmax(1) + of_maps.softmax(1)) / 2, atol=1e-6)


@pytest.mark.parametrize("convention", ["dtc", "boundary"])
@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_the_distance_loss(convention, kind):
    batch = semi()
    batch["label"][1], batch["label"][2] = 0, 1  # nothing, and nothing else
    study = make("dtc").study(batch)
    options = {"convention": convention, "normalize": convention == "boundary"}
    expected = maps_of(batch["label"], **options)
    assert (expected[1] == 1).all() and (expected[2] == -1).all() and expected[0].abs().max() == 1
    d = study.maps[:3, 0] - expected
    assert torch.allclose(
        study.distance(kind, convention), (d**2 if kind == "l2" else d.abs()).mean().float()
    )


def test_maps_take_a_small_share_of_a_step():
    """Under 3 % of a step, where scipy's transforms, as the public code calls them, take several times as long."""
    scipy = pytest.importorskip("scipy.ndimage")
    options = {"supervision": "both"}
    method = model.ModelSpec("dtml", "vnet", 4, 3, 1, 2, (32, 32, 32), options).build()
    method.plan = methods.Plan(torch.optim.Adam(method.trained()), 2, 1)
    batch = semi(dims=3, size=2, side=32)

    def public():
        for y in batch["label"].numpy().astype(bool):
            inside, outside = scipy.distance_transform_edt(y), scipy.distance_transform_edt(~y)
            outside / outside.max() - inside / inside.max()

    def seconds(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    maps = _signed.signed_distance_map
    target = (batch["label"] == 1)[:, None].to(torch.uint8)
    calls = (lambda: step(method, batch, 0), lambda: maps(target, spatial_dims=3, convention="dtc"), public)
    of_step, ours, theirs = (
        min(x) for x in zip(*([seconds(f) for f in calls] for _ in range(3)), strict=True)
    )
    assert ours < 0.03 * of_step and 2 * ours < theirs


# ---- DTML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervision", ["mask", "distance", "both"])
def test_dtml_is_its_reference(supervision):
    batch = semi()
    method = make("dtml", {"supervision": supervision, "consistency": 0.7, "k": 20.0, "ramp": 0.5})
    out = method.training_step(batch, 4)
    image = torch.cat([batch["image"], batch["unlabelled"]])
    logits, maps = method.network(image), method.map_network(image).tanh()
    target = torch.cat([batch["label"], torch.full((2, 16, 16), 9)])
    seg, mask, consistency = reference.dual_task_loss(logits, maps, target, k=20.0, labelled=3)
    sdf = maps_of(batch["label"])
    distance = ((maps[:3, 0] - sdf) ** 2).mean()
    of_map = {"mask": mask, "distance": distance, "both": mask + distance}[supervision]
    expected = seg + of_map + 0.7 * ramps.gaussian(4, 10) * consistency
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert ("mask" in out, "distance" in out) == (supervision != "distance", supervision != "mask")
    # The consistency is of all images, and without unlabelled ones of the labelled.
    alone = method.training_step({k: v for k, v in batch.items() if k != "unlabelled"}, 4)
    p, t = logits[:3].sigmoid(), (-20 * maps[:3]).sigmoid()
    assert alone["consistency"].item() == pytest.approx(((p - t) ** 2).mean().item(), rel=1e-5)
    assert alone["segmentation"].item() == pytest.approx(out["segmentation"].item(), rel=1e-6)


def test_dtml_with_classes_is_the_reference_of_each_against_the_rest():
    batch = semi(3)
    method = make("dtml", {"k": 20.0, "consistency": 0.7}, 3)
    out = method.training_step(batch, 20)
    image = torch.cat([batch["image"], batch["unlabelled"]])
    p, maps = (
        method.network(image).double().softmax(1)[:, 1:],
        method.map_network(image).double().tanh()[:, 1:],
    )
    y = torch.stack([batch["label"] == 1, batch["label"] == 2], 1)
    expected = reference.dual_task_loss(
        p.logit().reshape(10, 1, 16, 16), maps.reshape(10, 1, 16, 16),
        torch.cat([y.flatten(0, 1), torch.zeros(4, 16, 16, dtype=torch.bool)]), k=20.0, labelled=6,
    )  # fmt: skip
    for name, value in zip(("segmentation", "mask", "consistency"), expected, strict=True):
        assert out[name].item() == pytest.approx(value.item(), rel=1e-4)


def test_dtml_routes_the_consistency_as_told():
    batch = semi()
    without = gradients(make("dtml", {"consistency": 0.0, "k": 20.0}), batch)

    def of_consistency(routing):
        got = gradients(make("dtml", {"consistency": 1.0, "k": 20.0, "routing": routing}), batch)
        return {name: got[name] - without[name] for name in got}

    own, shared, logits, sdf = (of_consistency(r) for r in ("own", "shared", "logits", "sdf"))
    for name, gradient in own.items():
        zero = torch.zeros_like(gradient)
        first = name.startswith("network")
        assert gradient.abs().max() > 1e-5
        assert torch.allclose(shared[name], 2 * gradient, atol=1e-6)  # each network gets it twice
        assert torch.allclose(logits[name], gradient if first else zero, atol=1e-6)
        assert torch.allclose(sdf[name], zero if first else gradient, atol=1e-6)


@pytest.mark.parametrize("name", ["dtml", "dtc"])
def test_unlabelled_images_enter_only_the_consistency(name):
    batch = semi()
    other = {**batch, "unlabelled": batch["unlabelled"].flip(0, 2) * 2}
    off, on = ({"consistency": c, "k": 20.0} for c in (0.0, 1.0))
    a, b = (make(name, on).training_step(x, 20) for x in (batch, other))
    assert [k for k in a if a[k] != b[k]] == ["loss", "consistency"]
    for options, same in ((off, True), (on, False)):
        first, second = gradients(make(name, options), batch), gradients(make(name, options), other)
        assert all(torch.allclose(first[n], second[n], atol=1e-7) for n in first) == same


@pytest.mark.parametrize("name", ["dtml", "dtc"])
def test_the_consistency_brings_the_tasks_together_on_unlabelled_images(name):
    batch = semi()

    def apart(weight):
        method = make(name, {"consistency": weight, "ramp": 0.0, "k": 10.0}, steps=60)
        for number in range(60):
            step(method, batch, number)
        logits, maps = method.both(batch["unlabelled"])
        return (logits.sigmoid() - (-10 * maps).sigmoid()).square().mean().item()

    assert apart(3.0) < 0.5 * apart(0.0)


@pytest.mark.parametrize(
    ("shape", "expected"), [("gaussian", ramps.gaussian), ("exponential", ramps.exponential)]
)
def test_dtml_ramps(shape, expected):
    method, batch = make("dtml", {"ramp_shape": shape, "consistency": 1.0}), semi()
    for number in (0, 7, 20):
        out = method.training_step(batch, number)
        weight = (out["loss"] - out["segmentation"] - out["mask"]) / out["consistency"]
        assert weight.item() == pytest.approx(expected(number, 20), abs=1e-5)
    assert ramps.exponential(5, 20) == pytest.approx(np.exp(-3.75))
    assert ramps.gaussian(5, 20) == pytest.approx(np.exp(-2.8125))


def test_half_precision_maps_keep_float32():
    method = make("dtml", {"tested": "distance"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, maps = method.both(torch.randn(1, 1, 16, 16))
        assert torch.isfinite(method.training_step(semi(), 3)["loss"])
    assert logits.dtype == torch.bfloat16 and maps.dtype == torch.float32


# ---- DTC ------------------------------------------------------------------------------------------


def test_dtc_is_its_reference():
    batch, method = semi(), make("dtc", {"k": 20.0})
    batch["label"][1, 6:] = 0  # of another size: the sums run over the batch
    logits, maps = method.both(torch.cat([batch["image"], batch["unlabelled"]]))
    p, y = logits[:3, 0].sigmoid(), batch["label"].float()
    dice = 1 - (2 * (p * y).sum() + 1e-5) / ((p**2).sum() + (y**2).sum() + 1e-5)
    sdf = maps_of(batch["label"])
    distance = ((maps[:3, 0] - sdf) ** 2).mean()
    consistency = ((logits.sigmoid() - (-20 * maps).sigmoid()) ** 2).mean()
    out = method.training_step(batch, 10)
    expected = dice + 0.3 * distance + ramps.gaussian(10, 20) * consistency
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    # One network, and its gradient flows through both heads once.
    method.zero_grad()
    out["consistency"].backward()
    got = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    consistency.backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(got, method.parameters(), strict=True))


# ---- SASSNet --------------------------------------------------------------------------------------


def test_sassnet_is_its_reference():
    batch, method = semi(), make("sassnet", {"adversarial": 0.5})
    logits, maps = method.both(torch.cat([batch["image"], batch["unlabelled"]]))
    p, y = logits[:3, 0].sigmoid(), batch["label"].float()
    dice = 1 - (2 * (p * y).sum() + 1e-5) / ((p**2).sum() + (y**2).sum() + 1e-5)
    sdf = maps_of(batch["label"])
    scores = method.discriminator.eval()(maps[3:], batch["unlabelled"])
    adversarial = -scores.log_softmax(1)[:, 1].mean()  # to be taken for labelled
    expected = dice + 0.3 * ((maps[:3, 0] - sdf) ** 2).mean() + 0.5 * ramps.gaussian(10, 20) * adversarial
    assert method.training_step(batch, 10)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    alone = method.training_step({k: v for k, v in batch.items() if k != "unlabelled"}, 10)
    assert "adversarial" not in alone and method.images is None


def test_sassnet_discriminator_has_its_own_step():
    batch, method = semi(), make("sassnet", norm=True, lr=0.0)
    own = list(method.discriminator.parameters())
    assert not {id(p) for p in own} & {id(p) for p in method.trained()}
    assert method.optimizers["discriminator"].param_groups[0]["betas"] == (0.9, 0.99)
    method.training_step(batch, 0)["loss"].backward()
    assert all(p.grad is None for p in own)
    before, network = [p.clone() for p in own], [p.clone() for p in method.network.parameters()]
    statistics = method.network.network[1].running_mean.clone()
    method.after_step(0)
    assert all(not torch.equal(a, b) for a, b in zip(before, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(network, method.network.parameters(), strict=True))
    assert torch.equal(statistics, method.network.network[1].running_mean) and method.network.training


def test_sassnet_discriminator_learns_to_tell_and_the_network_to_mislead():
    batch = semi()
    told = make("sassnet", {"lr": 0.01}, lr=0.0)
    first = told.training_step(batch, 20)["adversarial"].item()
    for number in range(30):
        told.training_step(batch, number)["loss"].backward()
        told.after_step(number)
    assert told.training_step(batch, 20)["adversarial"].item() > first + 1  # knows the unlabelled

    def after_steps(weight):
        method = make("sassnet", {"lr": 0.0, "adversarial": weight, "ramp": 0.0})
        return [step(method, batch, number)["adversarial"].item() for number in range(30)][-1]

    assert after_steps(10.0) < after_steps(0.0) - 0.005


def test_sassnet_says_what_it_cannot_take():
    method = make("sassnet")
    with pytest.raises(ValueError, match=re.escape("at least 16 in every direction")):
        method.training_step(semi(side=8), 0)


# ---- boundary -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_boundary_is_its_reference(channels):
    batch, method = some_batch(channels, size=3), make("boundary", {"weight": 0.2}, channels)
    batch["label"][2] = 0
    logits = method(batch["image"])
    p = logits.sigmoid() if channels == 1 else logits.softmax(1)[:, 1:]
    phi = torch.zeros(3, max(1, channels - 1), 16, 16, dtype=torch.float64)
    for i in range(2):
        for c in range(max(1, channels - 1)):
            inside = (batch["label"][i] == c + 1).numpy()
            points, other = np.argwhere(inside), np.argwhere(~inside)
            for x, y in np.ndindex(16, 16):
                d = np.sqrt(((other if inside[x, y] else points) - (x, y)) ** 2 @ (1, 1)).min()
                phi[i, c, x, y] = -(d - 1) if inside[x, y] else d
    out = method.training_step(batch, 12)  # the third epoch
    assert out["boundary"].item() == pytest.approx((p * phi).mean().item(), rel=1e-4)
    assert out["loss"].item() == pytest.approx(
        (0.78 * out["region"] + 0.22 * out["boundary"]).item(), rel=1e-5
    )
    assert (
        out["region"]
        == methods.create("dice", None, lambda: method.network, channels).training_step(batch, 0)["loss"]
    )


def test_boundary_schedules():
    def weights(schedule, epoch):
        return make("boundary", {"schedule": schedule}).weights(5 * epoch + 4)

    assert weights("rebalance", 0) == pytest.approx((0.99, 0.01))
    assert weights("rebalance", 30) == pytest.approx((0.69, 0.31))
    assert weights("rebalance", 120) == pytest.approx((0.1, 1.21))
    assert weights("increase", 30) == pytest.approx((1, 0.31))
    assert weights("constant", 30) == pytest.approx((1, 0.01))


def test_boundary_pulls_far_errors_in():
    label = torch.zeros(1, 16, 16, dtype=torch.uint8)
    label[:, 4:9, 4:9] = 1
    phi = boundary.distances(label, 1)
    assert phi.shape == (1, 1, 16, 16) and phi[0, 0, 6, 6] == -2 and phi[0, 0, 4, 4] == 0
    assert phi[0, 0, 15, 15] > phi[0, 0, 10, 10] > 0


# ---- errors and runs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dtml", {"supervision": "l2"}, "supervision must be one of mask, distance, both, got 'l2'"),
        ("dtml", {"distance": "l3"}, "distance must be one of l2, l1, got 'l3'"),
        ("dtml", {"convention": "kervadec"}, "convention must be one of dtc, boundary, got 'kervadec'"),
        ("dtml", {"routing": "twice"}, "routing must be one of own, shared, logits, sdf, got 'twice'"),
        ("dtml", {"ramp_shape": "linear"}, "ramp_shape must be one of gaussian, exponential, got 'linear'"),
        ("dtc", {"tested": "both"}, "tested must be one of segmentation, distance, mean, got 'both'"),
        ("sassnet", {"k": 0}, "k must be positive, got 0.0"),
        (
            "boundary",
            {"schedule": "steal"},
            "schedule must be one of rebalance, increase, constant, got 'steal'",
        ),
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
    return engine.Config(data=str(root), width=4, epochs=4, batch_size=2, device="cpu")


@pytest.mark.parametrize(
    ("name", "options"),
    [("dtml", {"tested": "mean"}), ("dtc", {}), ("sassnet", {"width": 4}), ("boundary", {})],
)
def test_methods_resume_to_the_bit(config, tmp_path, monkeypatch, name, options):
    run = replace(config, method=name, options=options)
    whole, a, b = whole_and_cut(run, tmp_path, monkeypatch)
    assert whole.config.network == ("unet" if name == "boundary" else "vnet")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    best = model.read_checkpoint(tmp_path / "whole" / "best.pt")["method"]
    assert any("discriminator" in k for k in a) == (name == "sassnet")
    assert not any("discriminator" in k for k in best)
