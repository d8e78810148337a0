"""The methods that weigh labels by their effect on clean cases: what defines each, against the unrolled definition."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

import steps  # noqa: E402
import test_methods_noisy as noisy  # noqa: E402
from folders import blob, nifti_folder  # noqa: E402

from noisyseg_fast import meta, noise  # noqa: E402
from noisyseg_fast.training import engine, label_errors, methods, model, networks  # noqa: E402
from noisyseg_fast.training.engine import Config, train  # noqa: E402

LEARNED = ("mcpm", "mwnet", "mwnet_image")
ANEW = ("spatial_reweighting", "l2rw")
BY_IMAGE = ("mwnet_image", "l2rw")


pytestmark = pytest.mark.usefixtures("one_thread")


def make(name, dims=2, channels=1, lr=1e-2, **options):
    torch.manual_seed(0)
    method = methods.create(name, options, lambda: networks.build("unet", dims, 1, channels, 4), channels)
    method.plan = methods.Plan(torch.optim.Adam(method.trained(), lr=lr), 10, 5)
    return method


def batch_of(count=4, size=(32, 32), classes=2, seed=0):
    """Blobs, every other label dilated by 5 pixels, and clean cases; with "clean", the right labels."""
    image, target = (np.stack(a) for a in zip(*(blob(size, seed + i) for i in range(2 * count)), strict=True))
    target = target * np.uint8(classes - 1)
    label = target[:count].copy()
    for i in range(0, count, 2):
        label[i] = noise.dilate_labels(label[i], 5.0)
    image = torch.from_numpy((image - image.mean()) / image.std())[:, None]
    parts = [torch.from_numpy(a) for a in (label, target[count:], target[:count])]
    place = torch.arange(count)
    clean = {"image": image[count:], "label": parts[1], "index": place}
    return {"image": image[:count], "label": parts[0], "index": place, "meta": clean, "clean": parts[2]}


def cross_entropy(method, batch):
    return meta.cross_entropy_map(method(batch["image"]), batch["label"])


def gradients(module):
    return [p.grad.clone() for p in module.parameters()]


# ---- learned weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("channels", [1, 3])
def test_theta_follows_the_unrolled_meta_gradient(name, channels):
    batch = batch_of(classes=max(2, channels))
    method = make(name, channels=channels)
    clean = batch["meta"]
    unrolled = meta.unroll_reference(
        method.network, batch["image"], batch["label"], method.weigh, clean["image"], clean["label"], 1e-2
    )
    unrolled.objective.backward()
    expected = gradients(method.weigher)
    method.weigher.zero_grad()
    method.network.zero_grad()
    before = [p.detach().clone() for p in method.weigher.parameters()]
    losses = method.training_step(batch, 0)
    for got, want in zip(gradients(method.weigher), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    assert any(float(g.abs().max()) > 0 for g in expected)
    assert losses["clean_loss"].item() == pytest.approx(float(unrolled.meta_loss), rel=1e-4)
    assert all(not torch.equal(a, p) for a, p in zip(before, method.weigher.parameters(), strict=True))
    assert all(p.grad is None or not p.grad.any() for p in method.network.parameters())


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_real_step_uses_the_new_theta_as_constants(name, recompute):
    batch = batch_of()
    method = make(name, recompute=recompute, meta_lr=0.1)
    with torch.no_grad():
        old = method.weigh(cross_entropy(method, batch))
    loss = method.training_step(batch, 0)["loss"]
    theta = gradients(method.weigher)
    loss.backward()
    got = gradients(method.network)
    assert all(torch.equal(a, b) for a, b in zip(theta, gradients(method.weigher), strict=True))
    new = method.pixel_weights(batch)
    assert not torch.allclose(old, new, atol=1e-3)
    method.network.zero_grad()
    expected = (new * cross_entropy(method, batch)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(got, gradients(method.network), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_mcpm_looks_at_the_losses_around_and_mwnet_does_not():
    loss_map = torch.rand(1, 9, 9)
    other = loss_map.clone()
    other[0, 4, 4] += 1
    moved = {name: (make(name).weigh(loss_map) != make(name).weigh(other))[0] for name in ("mcpm", "mwnet")}
    assert moved["mwnet"].nonzero().tolist() == [[4, 4]]
    assert moved["mcpm"][2:7, 2:7].sum() > 9  # 5x5
    assert not moved["mcpm"][:2].any()


# ---- weights made anew ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANEW)
@pytest.mark.parametrize("recompute", [False, True])
def test_weights_are_the_clamped_gain_divided_by_its_sum(name, recompute):
    batch = batch_of()
    batch["label"][0] = 1 - batch["label"][0]  # this image does harm as a whole
    method = make(name, recompute=recompute)
    with torch.no_grad():
        zeros = torch.zeros_like(cross_entropy(method, batch))
    clean = batch["meta"]
    dR = meta.unroll_reference(
        method.network, batch["image"], batch["label"], zeros, clean["image"], clean["label"], 1e-2
    ).dR
    gain = -dR.mean((1, 2), keepdim=True).expand_as(dR) if name == "l2rw" else -dR
    assert (gain < 0).any()  # else the clamp would not be tested
    expected = gain.clamp(min=0) / gain.clamp(min=0).sum()
    got = method.weights(method.look_ahead(batch, None, keep_graph=False).dR)
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    assert got.sum().item() == pytest.approx(1)
    assert got.min() == 0
    loss = method.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx((got * cross_entropy(method, batch)).sum().item(), rel=1e-4)
    loss.backward()
    assert any(p.grad.any() for p in method.network.parameters())


@pytest.mark.parametrize("name", ANEW)
def test_no_weight_where_nothing_helps(name):
    method = make(name)
    weights = method.weights(torch.ones(2, 4, 4))
    assert torch.equal(weights, torch.zeros(2, 4, 4))


# ---- what they are for ----------------------------------------------------------------------------


def small_network(dims=2):
    conv = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
    return torch.nn.Sequential(conv(1, 8, 3, padding=1), torch.nn.ReLU(), conv(8, 1, 3, padding=1))


@pytest.mark.parametrize("name", [*LEARNED, *ANEW])
def test_wrong_labels_come_to_weigh_less(name):
    """Pixels with dilated labels; of the methods that weigh images, the images that have them."""
    torch.manual_seed(0)
    method = methods.create(name, {"meta_lr": 0.02} if name in LEARNED else {}, small_network, 1)
    optimizer = torch.optim.Adam(method.trained(), lr=1e-2)
    method.plan = methods.Plan(optimizer, 100, 100)
    batches = [batch_of(8, (16, 16), seed=100 * i) for i in range(4)]

    def descend(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # A network that knows what is right: before that, what is hard and what is wrong look alike.
    for step in range(40):
        descend(cross_entropy(method, batches[step % 4]["meta"]).mean())
    for step in range(40):
        descend(method.training_step(batches[step % 4], step)["loss"])
    batch = batch_of(8, (16, 16), seed=1000)
    weights = method.pixel_weights(batch).detach()
    wrong = batch["label"] != batch["clean"]
    assert weights.shape == wrong.shape
    assert weights.min() >= 0 and weights.max() <= 1
    if name in BY_IMAGE:
        assert torch.equal(weights, weights[:, :1, :1].expand_as(weights))
        weights, wrong = weights[:, 0, 0], wrong.flatten(1).any(1)
    found = label_errors.auroc((1 - weights).numpy().ravel(), wrong.numpy().ravel())
    assert found > 0.8, found


@pytest.mark.parametrize("name", [*LEARNED, *ANEW])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_method_fits_eight_patches(name, channels):
    torch.manual_seed(0)
    method = methods.create(name, None, lambda: noisy.tiny(channels), channels)
    method.plan = methods.Plan(torch.optim.Adam(method.trained(), lr=2e-2), 80, 5)
    batch = noisy.some_batch(channels, side=14)
    batch["meta"] = dict(batch)
    steps.fits(method, batch)


@pytest.mark.parametrize("name", [*LEARNED, *ANEW])
def test_volumes_of_three_classes(name):
    batch = batch_of(2, (32, 16, 16), classes=3)
    method = make(name, dims=3, channels=3)
    losses = method.training_step(batch, 0)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert method.pixel_weights(batch).shape == (2, 32, 16, 16)


# ---- options --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the first step of")
def test_the_virtual_step_can_be_the_real_one():
    batch, steps = batch_of(), []
    for virtual in ("sgd", "real"):
        method = make("mcpm", virtual=virtual)
        for step in range(3):
            losses = method.training_step(batch, step)
            method.plan.optimizer.zero_grad()
            losses["loss"].backward()
            method.plan.optimizer.step()
        steps.append(losses["clean_loss"].item())
    assert steps[1] < steps[0] - 1e-3  # a step of Adam goes further than one of SGD with the same lr


@pytest.mark.parametrize("name", [*LEARNED, *ANEW])
def test_warm_up_is_plain_cross_entropy(name):
    batch, method = batch_of(), make(name, warmup=1)
    before = [p.detach().clone() for p in method.parameters()]
    loss = method.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx(cross_entropy(method, batch).mean().item(), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))
    assert method.training_step(batch, 1)["loss"].item() != pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_begins_with_little_foreground(name, channels):
    torch.manual_seed(0)
    network = networks.build(name, 2, 1, channels, 16 if name == "monai_vnet" else 8)
    networks.start_at(network, 0.02)
    logits = network(torch.randn(2, 1, 32, 32))
    share = logits.sigmoid().mean() if channels == 1 else logits.softmax(1)[:, 1:].sum(1).mean()
    assert 0.005 < share < 0.08
    with pytest.raises(ValueError, match="the network ends in no convolution with a bias"):
        networks.start_at(torch.nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match=re.escape("foreground must be between 0 and 1, got 1.0")):
        Config(foreground=1.0).check()


def test_bad_options():
    for name in (*LEARNED, *ANEW):
        with pytest.raises(ValueError, match="unknown virtual 'adam'; choose from sgd, real"):
            methods.configure(name, {"virtual": "adam"})
    with pytest.raises(ValueError, match="warmup must not be negative, got -1"):
        methods.configure("mcpm", {"warmup": "-1"})
    with pytest.raises(ValueError, match="width must be a positive integer"):
        methods.create("mcpm", {"channels": 0}, lambda: torch.nn.Conv2d(1, 1, 3), 1)


# ---- in the engine --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = nifti_folder(tmp_path_factory.mktemp("weighted") / "set", cases=10)
    return Config(
        data=str(folder),
        width=4,
        epochs=2,
        batch_size=2,
        noise_rate=1.0,
        meta_fraction=0.3,
        device="cpu",
        lr=3e-3,
    )


def state(out):
    content = model.read_checkpoint(out / "last.pt")
    return {
        **content["method"],
        "optimizers": str(content["optimizers"]),
        "optimizer": str(content["optimizer"]),
    }


@pytest.mark.parametrize("name", ["mcpm", "spatial_reweighting"])
def test_resumed_is_bit_for_bit_the_same(tiny, tmp_path, name, monkeypatch):
    whole = replace(tiny, method=name, out=str(tmp_path / "whole"))
    first = train(whole, report=False)
    save = engine._Loop.save_last

    def save_and_stop(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._Loop, "save_last", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(replace(whole, out=str(tmp_path / "b")), report=False)
    second = train(engine.read_config(tmp_path / "b"), resume=True, report=False)
    a, b = state(tmp_path / "whole"), state(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
    assert ("weigher.w1" in a) == (name == "mcpm")
    assert first.test == second.test and first.found == second.found


def test_report_shows_the_weights_beside_the_errors(tiny, tmp_path):
    result = train(replace(tiny, method="mwnet", out=str(tmp_path / "run")))
    assert 0 < result.found.share < 0.5
    assert result.found.cases == len(json.loads((tmp_path / "run" / "split.json").read_text())["training"])
    assert [set(p) for p in result.weights[:1]] == [{"id", "image", "clean", "noisy", "weight"}]
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Pixel weights and label errors" in text and "AUROC" in text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["weights"]["auroc"] == pytest.approx(result.found.auroc)
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_no_weights_without_a_method_that_weighs_or_without_noise(tiny, tmp_path):
    assert train(replace(tiny, out=str(tmp_path / "a"), epochs=1), report=False).found is None
    quiet = replace(tiny, method="l2rw", noise_rate=0.0, epochs=1, out=str(tmp_path / "b"))
    assert train(quiet, report=False).found is None


def test_clean_cases_are_asked_for(tiny, tmp_path):
    with pytest.raises(ValueError, match=re.escape("set meta_fraction (--meta-fraction 0.1)")):
        train(replace(tiny, method="mcpm", meta_fraction=0.0, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_last_weights_are_tested_when_asked(tiny, tmp_path):
    config = replace(tiny, test_on="last", out=str(tmp_path / "run"), epochs=1)
    train(config, report=False)
    with pytest.raises(ValueError, match="unknown test_on 'first'; choose from best, last"):
        replace(config, test_on="first").check()
