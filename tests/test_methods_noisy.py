"""What defines each method: a test would fail without it."""

import math
import re
from dataclasses import replace

import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

from folders import nifti_folder  # noqa: E402
from resuming import whole_and_cut  # noqa: E402
from steps import fits, step  # noqa: E402
from torch import nn  # noqa: E402

from noisyseg_fast import losses  # noqa: E402
from noisyseg_fast.training import ema, engine, methods, model, pixels, ramps  # noqa: E402
from noisyseg_fast.training.history import LossHistory  # noqa: E402
from noisyseg_fast.training.methods import selective, several  # noqa: E402
from noisyseg_fast.training.methods.plain import LOSSES, segmentation_loss  # noqa: E402

OURS = [
    *LOSSES, "co_teaching", "confident_learning", "coplenet", "label_update", "mean_teacher", "selective",
    "self_learning", "tri_net", "trimmed", "two_stream", "ua_mt",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(channels=1, dims=2):
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    return nn.Sequential(conv(1, 8, 3, padding=1), norm(8), nn.ReLU(), conv(8, channels, 3, padding=1))


def make(name, options=None, channels=1, steps=20, dims=2):
    torch.manual_seed(0)
    method = methods.create(name, options, lambda: tiny(channels, dims), channels)
    optimizer = torch.optim.Adam(method.trained(), lr=2e-2)
    method.plan = methods.Plan(optimizer, steps, 5)
    return method


def some_batch(channels=1, size=8, dims=2, side=16):
    generator = torch.Generator().manual_seed(1)
    label = torch.zeros(size, *[side] * dims, dtype=torch.uint8)
    for i in range(size):
        a = 2 + i % 4
        label[(i, *[slice(a, a + 8)] * dims)] = 1
        # Both classes in every image: NR-Dice of an absent class is large for small probabilities.
        label[(i, slice(a + 4, a + 8), *[slice(a, a + 8)] * (dims - 1))] = max(1, channels - 1)
    image = label[:, None].float() + 0.1 * torch.randn(size, 1, *[side] * dims, generator=generator)
    return {"image": image, "label": label, "index": torch.arange(size)}


def parameters(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


# ---- all methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_method_fits_eight_patches(name, channels):
    batch = some_batch(channels, side=14)
    method = make(name, channels=channels, steps=80)
    fits(method, batch)


@pytest.mark.parametrize("name", OURS)
def test_each_method_trains_on_volumes(name):
    batch = some_batch(dims=3, side=12, size=2)
    method = make(name, dims=3, steps=4)
    before = parameters(method)
    for number in range(4):
        assert torch.isfinite(step(method, batch, number)["loss"])
    assert not torch.equal(parameters(method), before)
    assert method(batch["image"]).shape == (2, 1, 12, 12, 12)


@pytest.mark.parametrize("name", OURS)
def test_unlabelled_pixels_do_not_count(name):
    """What lies under 255 changes no loss, and images with nothing else leave it finite."""
    batch = some_batch(1)
    batch["label"][:, :4] = 255
    loss = make(name).training_step(batch, 0)["loss"]
    assert torch.isfinite(loss)
    batch["label"][:] = 255
    loss = make(name).training_step(batch, 0)["loss"]
    assert torch.isfinite(loss)
    if name in LOSSES:
        assert loss == 0


# ---- parts ----------------------------------------------------------------------------------------


def test_ramps():
    assert ramps.gaussian(0, 10) == pytest.approx(math.exp(-5))
    assert ramps.gaussian(5, 10) == pytest.approx(math.exp(-5 * 0.25))  # squared, unlike DTML's print
    assert ramps.gaussian(10, 10) == ramps.gaussian(99, 10) == ramps.gaussian(0, 0) == 1
    assert [ramps.linear(t, 4) for t in (-1, 0, 1, 4, 9)] == [0, 0, 0.25, 1, 1]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_teacher_is_the_closed_form(as_tensor):
    student, students = nn.Linear(3, 2).double(), []
    teacher = ema.teacher_of(student)
    for number in range(30):
        with torch.no_grad():
            for p in student.parameters():
                p.normal_()
        students.append(parameters(student))
        decay = ema.decay_at(number, 0.9)
        ema.update(teacher, student, torch.tensor(decay, dtype=torch.float64) if as_tensor else decay)
    decays = [min(1 - 1 / (t + 1), 0.9) for t in range(30)]
    weights = [(1 - decays[t]) * math.prod(decays[t + 1 :]) for t in range(30)]
    assert sum(weights) == pytest.approx(1)
    expected = sum(w * s for w, s in zip(weights, students, strict=True))
    assert torch.allclose(parameters(teacher), expected, atol=1e-12)
    assert not any(p.requires_grad for p in teacher.parameters())
    before = parameters(teacher)
    ema.update(teacher, student, torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(parameters(teacher), before)


def test_history_keeps_the_last_steps():
    history = LossHistory(3)
    for number in range(3):
        assert history.threshold(0.5, number) == math.inf
        history.add(torch.tensor([1.0, 2.0]) + 10 * number, number)
    assert history.threshold(0.5, 3) == pytest.approx(11.5)
    history.add(torch.tensor([100.0]), 3)  # takes the place of 1 and 2; one image alone
    assert history.threshold(1, 4) == 100
    assert history.threshold(0, 4) == 11
    other = LossHistory(3)
    other.load_state_dict(history.state_dict())
    assert torch.equal(other.values, history.values) or other.values.nansum() == history.values.nansum()


# ---- plain losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_losses_are_the_fast_ones(channels):
    batch = some_batch(channels)
    z, y = torch.randn(8, channels, 16, 16), batch["label"]
    activation = "sigmoid" if channels == 1 else "softmax"
    common = {"activation": activation}
    region = {**common, "include_background": channels == 1}
    expected = {
        "ce": losses.pixel_loss(z, y, kind="ce", **common),
        "focal": losses.pixel_loss(z, y, kind="focal", focal_gamma=2.0, **common),
        "mae": losses.pixel_loss(z, y, kind="mae", **common),
        "gce": losses.pixel_loss(z, y, kind="gce", q=0.7, **common),
        "dice": losses.dice_loss(z, y, **region),
        "sorensen_dice": losses.dice_loss(z, y, denominator="linear", **region),
        "focal_dice": losses.focal_dice_loss(z, y, beta=0.5, **region),
        "ce_dice": losses.dice_ce_loss(z, y, **region),
        "mae_dice": losses.dice_mae_loss(z, y, **region),
        "nr_dice": losses.nr_dice_loss(z, y, gamma=1.5, **region),
    }
    assert set(expected) == set(LOSSES)
    for name, value in expected.items():
        assert segmentation_loss(name, z, y) == value
    with pytest.raises(ValueError, match="unknown loss 'x'; choose from ce, focal"):
        segmentation_loss("x", z, y)


# ---- teachers -------------------------------------------------------------------------------------


def test_mean_teacher_teaches_by_the_moving_average():
    method, batch = make("mean_teacher", {"ramp": 0.0}), some_batch()
    start = parameters(method.network)
    step(method, batch, 0)
    assert torch.allclose(parameters(method.teacher), parameters(method.network))  # decay 0 at step 0
    assert not torch.equal(parameters(method.teacher), start)  # and not zero, as in PyMIC 0.5
    out = step(method, batch, 1)
    assert not torch.equal(parameters(method.teacher), parameters(method.network))
    assert torch.allclose(out["loss"], 0.5 * out["segmentation"] + 0.1 * out["consistency"])
    assert method.teacher[1].running_mean.abs().sum() > 0  # its own batches' statistics


def test_mean_teacher_asks_about_unlabelled_images_where_there_are_any():
    method, batch = make("mean_teacher"), some_batch()
    seen = []
    method.teacher.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    unlabelled = torch.full((3, 1, 16, 16), 5.0)
    method.training_step({**batch, "unlabelled": unlabelled}, 0)
    assert seen[0].shape == unlabelled.shape
    assert 0 < (seen[0] - 5).abs().max() <= 0.2 + 1e-6  # noisy, clipped


def test_ua_mt_counts_certain_pixels_alone():
    method, batch = make("ua_mt", {"noise": 0.0}, channels=3, steps=100), some_batch(3)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.zero_()  # uniform over three classes: the entropy is ln 3, not ln 2
    assert torch.allclose(method.uncertainty(batch["image"], 2), torch.ones(8, 16, 16))
    assert not method.target(batch["image"], 0)[1].any()
    assert method.training_step(batch, 0)["consistency"] == 0
    with torch.no_grad():
        method.teacher[3].bias[0] = 9.0
    assert method.target(batch["image"], 0)[1].all()
    passes = []
    method.teacher.register_forward_hook(lambda *_: passes.append(1))
    method.target(batch["image"], 0)
    assert len(passes) == 1 + 8


def test_coplenet_teacher_skips_steps_with_a_large_loss():
    batch = some_batch()
    method = make("coplenet", {"history": 3})
    for number in range(4):
        step(method, batch, number)
    before = parameters(method.teacher)
    method.history.values.fill_(0.01)  # better than any real loss
    out = step(method, batch, 4)
    assert out["follows"] == 0
    assert torch.equal(parameters(method.teacher), before)
    method.history.values.fill_(9.0)
    assert step(method, batch, 5)["follows"] == 1
    assert not torch.equal(parameters(method.teacher), before)
    off = make("coplenet", {"history": 1, "adaptive_teacher": False})
    step(off, batch, 0)
    off.history.values.fill_(0.01)
    assert step(off, batch, 1)["follows"] == 1


def test_coplenet_student_heeds_the_better_teacher():
    batch = some_batch()

    def weight(teacher_better, **options):
        method = make("coplenet", {"noise": 0.0, **options})
        better, worse = (method.teacher, method.network)[:: 1 if teacher_better else -1]
        # Zero weights but for a bias: certain background against certain foreground everywhere.
        with torch.no_grad():
            for network, bias in ((better, 9.0), (worse, -9.0)):
                network[3].weight.zero_()
                network[3].bias.fill_(bias)
        return method.training_step({**batch, "label": torch.ones_like(batch["label"])}, 0)["weight"]

    assert weight(True) == pytest.approx(0.1)
    assert weight(False) == pytest.approx(0.01)
    assert weight(True, as_printed=True) == pytest.approx(0.01)
    assert weight(False, as_printed=True) == pytest.approx(0.1)
    assert weight(False, adaptive_student=False) == pytest.approx(0.1)


def test_coplenet_decides_image_by_image_if_asked():
    method, batch = make("coplenet", {"history": 1, "per_image": True, "noise": 0.0}), some_batch()
    loss = segmentation_loss("nr_dice", method.network(batch["image"]), batch["label"], reduction="image")
    method.history.add(loss.median().expand(8), 0)
    out = method.training_step(batch, 1)
    assert method.history.values.shape == (1, 8)
    assert 0 < out["follows"] < 1


def test_the_teacher_is_tested_if_asked():
    for tested, network in (("student", "network"), ("teacher", "teacher")):
        method, batch = make("mean_teacher", {"tested": tested}).eval(), some_batch()
        with torch.no_grad():
            method.teacher[3].bias.add_(1)
        assert torch.equal(method(batch["image"]), getattr(method, network)(batch["image"]))
    with pytest.raises(ValueError, match="tested must be student or teacher, got 'both'"):
        make("mean_teacher", {"tested": "both"})


# ---- selection ------------------------------------------------------------------------------------


def test_trimmed_leaves_out_large_losses():
    batch = some_batch()
    method = make("trimmed", {"history": 2})
    for number in range(2):
        assert step(method, batch, number)["kept"] == 1
    batch["label"][0] = 1 - batch["label"][0]
    method.history.values.fill_(
        0.9 * segmentation_loss("dice", method(batch["image"]), batch["label"], reduction="image").max()
    )
    out = method.training_step(batch, 2)
    assert out["kept"] < 1
    method.zero_grad()
    assert out["loss"] < segmentation_loss("dice", method(batch["image"]), batch["label"])


def test_co_teaching_learns_from_the_others_small_losses():
    method, batch = make("co_teaching", {"epochs": 1}), some_batch()
    assert method.kept(0) == 1
    assert method.kept(5) == pytest.approx(0.8)
    with torch.no_grad():
        a, b = (
            segmentation_loss("ce", n(batch["image"]), batch["label"], reduction="none")
            for n in (method.network, method.second)
        )
    out = method.training_step(batch, 5)
    assert torch.allclose(out["first"], a[b <= torch.quantile(b, 0.8)].mean())
    assert torch.allclose(out["second"], b[a <= torch.quantile(a, 0.8)].mean())
    images = make("co_teaching", {"epochs": 1, "level": "image"}).training_step(batch, 5)
    assert torch.isfinite(images["loss"])


def test_tri_net_learns_where_the_other_two_are_sure():
    method, batch = make("tri_net", {"ramp": 0.0, "select": 0.7}), some_batch()
    with torch.no_grad():
        maps = [
            segmentation_loss("ce", n(batch["image"]), batch["label"], reduction="none")
            for n in (method.network, *method.others)
        ]
    sure = [m <= torch.quantile(m, 0.7) for m in maps]
    expected = sum(maps[k][sure[k - 1] & sure[k - 2]].mean() for k in range(3))
    assert torch.allclose(method.training_step(batch, 5)["loss"], expected)


def test_two_stream_leaves_out_what_both_agree_on():
    method, batch = make("two_stream", {"warm_up": 0.0}), some_batch()
    with torch.no_grad():
        z = [n(batch["image"]) for n in (method.network, method.second)]
        differ = (z[0] > 0)[:, 0] != (z[1] > 0)[:, 0]
        maps = [segmentation_loss("ce", x, batch["label"], reduction="none") for x in z]
    assert 0 < differ.float().mean() < 1
    assert torch.allclose(
        method.training_step(batch, 0)["loss"], maps[0][differ].mean() + maps[1][differ].mean()
    )
    method.second.load_state_dict(method.network.state_dict())
    assert method.training_step(batch, 0)["loss"] == 0


def test_ensemble_is_the_mean_of_probabilities():
    for channels in (1, 3):
        z = [torch.randn(2, channels, 4) * 3 for _ in range(3)]
        mean = torch.stack([pixels.class_probabilities(x) for x in z]).mean(0)
        assert torch.allclose(pixels.class_probabilities(several.ensemble(z)), mean, atol=1e-6)


# ---- labels ---------------------------------------------------------------------------------------


def test_selective_balances_the_labelled_classes():
    label = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    label[0, 0], label[1, 0, 0] = 0, 1
    weight = selective.class_balance(label, 2, per_image=False)
    assert weight[label == 255].sum() == 0
    assert weight[label == 0].sum() == pytest.approx(weight[label == 1].sum().item())
    assert weight.sum() == pytest.approx(5)
    z = torch.randn(2, 1, 4, 4)
    loss = segmentation_loss("ce", z, label, weight=weight)
    ce = nn.functional.softplus(-z[:, 0] * (2 * (label == 1).float() - 1))
    assert torch.allclose(loss, (ce[label == 0].mean() + ce[label == 1].mean()) / 2)


def test_label_update_trains_a_new_network_on_the_ensembles_labels():
    method, batch = make("label_update", {"members": 2}, steps=10), some_batch()
    fresh = parameters(method.network)
    for number in range(5):
        step(method, batch, number)
    assert torch.equal(parameters(method.network), fresh) and not method.mature(4) and method.mature(5)
    members = parameters(method.members)
    method.members.eval()
    label = several.hard(several.ensemble([m(batch["image"]) for m in method.members]))
    wrong = {**batch, "label": 1 - batch["label"]}  # the given labels no longer matter
    expected = segmentation_loss("dice", method.network(batch["image"]), label)
    assert torch.allclose(step(method, wrong, 5)["loss"], expected, atol=1e-6)
    assert torch.equal(parameters(method.members), members)


def test_self_learning_labels_the_unlabelled_round_by_round():
    method, batch = make("self_learning", {"start": 0.25, "rounds": 3}, steps=20), some_batch()
    assert [method.round(t) for t in (0, 4, 5, 9, 10, 14, 15, 19, 20)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    batch["label"][:, 8:] = 255
    for number in range(5):
        step(method, batch, number)
    assert torch.equal(parameters(method.labeller), parameters(method.network))
    pseudo = several.hard(method.labeller.eval()(batch["image"]))
    filled = torch.where(batch["label"] == 255, pseudo, batch["label"])
    expected = segmentation_loss("ce", method.network(batch["image"]), filled)
    assert torch.allclose(step(method, batch, 5)["loss"], expected, atol=1e-6)
    assert not torch.equal(parameters(method.labeller), parameters(method.network))


def test_self_learning_refines_its_pseudo_labels_by_a_crf_if_asked():
    batch = some_batch()
    seen = batch["label"].clone()
    seen[:, 14, 2] = 1  # an isolated pixel that the labeller takes for foreground, where the image shows none

    class Labeller(nn.Module):
        def forward(self, image):
            return 3.0 * seen[:, None] - 1.5

    for crf, expected in ((False, seen), (True, batch["label"])):
        method = make("self_learning", {"crf": crf, "start": 0.0}, steps=10)
        method.labeller = Labeller()
        assert torch.equal(method.pseudo(batch["image"]), expected)
        unlabelled = {**batch, "label": torch.full_like(seen, 255)}
        loss = segmentation_loss("ce", method.network(batch["image"]), expected)
        torch.testing.assert_close(method.training_step(unlabelled, 5)["loss"], loss)
    for channels, dims in ((3, 2), (1, 3)):
        method = make("self_learning", {"crf": True, "start": 0.0}, channels, dims=dims, steps=4)
        assert torch.isfinite(step(method, some_batch(channels, 2, dims, 12), 2)["loss"])
    with pytest.raises(ValueError, match=re.escape("crf_sigma_space must be positive and finite, got 0.0")):
        make("self_learning", {"crf_sigma_space": 0.0})
    with pytest.raises(
        ValueError, match="crf_radius must be at least 1 and iterations at least 0, got -2 and 5"
    ):
        make("self_learning", {"crf_radius": -2})


@pytest.mark.parametrize("correction", ["hard", "smooth", "uncertainty"])
def test_confident_learning_corrects_what_the_teacher_finds_wrong(correction):
    method, batch = make("confident_learning", {"correction": correction}), some_batch()
    truth = batch["label"].clone()
    noisy = truth.clone()
    noisy[0, :2] = 1  # wrong
    with torch.no_grad():  # a teacher that sees the truth
        method.teacher = nn.Conv2d(1, 1, 1)
        method.teacher.weight.fill_(8.0)
        method.teacher.bias.fill_(-4.0)
    target, wrong = method.correct(batch["image"], noisy)
    assert wrong[0, :2].float().mean() > 0.7 and wrong[1:].float().mean() < 0.05
    if correction == "hard":
        assert torch.equal(target[wrong], truth[wrong])
    else:
        flipped = (truth[0, :2] == 0) & wrong[0, :2]
        assert target[0, 0, :2][flipped].max() < 0.5
        assert correction != "smooth" or torch.allclose(target[0, 0, :2][flipped], torch.tensor(0.2))
    assert method.training_step({**batch, "meta": dict(batch)}, 3)["loss"] > 0


# ---- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = nifti_folder(tmp_path_factory.mktemp("data") / "set", cases=6, raters=1)
    return engine.Config(data=str(root), network="unet", width=4, epochs=4, batch_size=2, device="cpu")


@pytest.mark.parametrize(
    ("name", "options"), [("coplenet", {"history": 2, "per_image": True}), ("self_learning", {})]
)
def test_methods_with_teachers_resume_to_the_bit(config, tmp_path, monkeypatch, name, options):
    run = replace(config, method=name, options=options)
    _, a, b = whole_and_cut(run, tmp_path, monkeypatch)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k].nan_to_num(-1), b[k].nan_to_num(-1)) for k in a)


def test_a_saved_configuration_repeats_the_run(config, tmp_path):
    first = replace(config, method="nr_dice", options={"gamma": "1.3"}, epochs=2, out=str(tmp_path / "a"))
    engine.train(first, report=False)
    again = engine.load_config(tmp_path / "a" / "config.json")
    assert again.options == {"gamma": 1.3, "denominator": "squared"}
    engine.train(replace(again, out=str(tmp_path / "b")), report=False)
    a, b = (model.read_checkpoint(tmp_path / part / "last.pt")["method"] for part in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    (tmp_path / "run.yaml").write_text("method: gce\noptions: {q: 0.5}\nepochs: 3\n")
    assert engine.load_config(tmp_path / "run.yaml").options == {"q": 0.5}
    (tmp_path / "run.yaml").write_text("methode: gce\n")
    with pytest.raises(ValueError, match="is no configuration"):
        engine.load_config(tmp_path / "run.yaml")


def test_early_stopping(config, tmp_path, monkeypatch):
    monkeypatch.setattr(engine._Loop, "_scores", lambda self, cases: [])  # never a gain
    monkeypatch.setattr(engine._Loop, "finish", lambda self, *_: self.history)
    history = engine.train(replace(config, epochs=9, patience=2, out=str(tmp_path / "a")), report=False)
    assert len(history) == 3


def test_schedules(config):
    assert [replace(config, schedule="halve", halve_every=4).decay(t, 2) for t in (0, 3, 4, 8)] == [
        1, 1, 0.5, 0.25,
    ]  # fmt: skip
    assert replace(config, schedule="constant").decay(7, 2) == 1
    assert config.decay(5, 2) == pytest.approx(0.5**0.9)
    with pytest.raises(ValueError, match="unknown schedule 'step'; choose from poly, constant, halve"):
        replace(config, schedule="step").check()
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        replace(config, patience=0).check()


def test_the_methods_own_network_unless_another_is_named():
    assert (engine.Config().resolved().network, engine.Config().resolved().width) == ("unet", 16)
    resolved = engine.Config(method="coplenet").resolved()
    assert (resolved.network, resolved.width) == ("coplenet", 32)
    assert engine.Config(method="coplenet", network="unet").resolved().width == 16
