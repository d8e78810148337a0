"""MONAI's losses and metrics by our kernels, against MONAI itself; and programs that do not know of us."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest

pytest.importorskip("monai")
torch = pytest.importorskip("torch")
import monai.losses  # noqa: E402
import monai.metrics  # noqa: E402
import monai.transforms.utils  # noqa: E402

from noisyseg_fast.compat import monai as ours  # noqa: E402
from noisyseg_fast.compat import monai_losses  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def data(channels, labels, dims=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    size = (10, 12, 7)[:dims]
    logits = torch.randn((3, channels, *size), generator=generator)
    target = torch.randint(0, max(channels, 2), (3, 1, *size), generator=generator)
    target[1] = 0  # an image of background alone
    if not labels and channels > 1:
        target = monai.networks.one_hot(target, channels)
    return logits, target.to(dtype)


def same(kind, options, input, target, tolerance=1e-5):
    """Value and gradient."""
    results = []
    for package in (monai.losses, ours):
        x = input.clone().requires_grad_()
        value = getattr(package, kind)(**options)(x, target)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        results.append((value.detach(), gradient))
    (expected, slope), (value, gradient) = results
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected.float(), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-7)


DICE = [
    {},
    {"squared_pred": True, "smooth_nr": 1.0, "smooth_dr": 1.0},
    {"include_background": False, "batch": True},
    {"reduction": "none"},
    {"reduction": "none", "batch": True},
    {"reduction": "sum", "include_background": False},
]


@pytest.mark.parametrize("options", DICE)
@pytest.mark.parametrize(("channels", "act"), [(1, "sigmoid"), (3, "sigmoid"), (3, "softmax")])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("kind", ["DiceLoss", "GeneralizedDiceLoss", "DiceCELoss", "DiceFocalLoss"])
def test_dice_losses(kind, labels, channels, act, options):
    if kind == "GeneralizedDiceLoss" and "squared_pred" in options:
        options = {"w_type": "simple", "smooth_nr": 1.0, "smooth_dr": 1.0}
    if kind in ("DiceCELoss", "DiceFocalLoss") and options.get("reduction") == "none":
        return
    options = {**options, act: True, "to_onehot_y": labels and channels > 1}
    same(kind, options, *data(channels, labels))


@pytest.mark.parametrize("kind", ["DiceLoss", "DiceCELoss", "DiceFocalLoss"])
@pytest.mark.parametrize("background", [True, False])
def test_class_weights(kind, background):
    weight = torch.tensor([0.2, 1.0, 3.0])
    if not background and kind != "DiceCELoss":
        weight = weight[1:]
    options = {"softmax": True, "to_onehot_y": True, "include_background": background, "weight": weight}
    if kind == "DiceFocalLoss" and not background:
        options["gamma"] = 1.5
    same(kind, options, *data(3, True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_target_dtypes(dtype):
    logits, target = data(4, True, 3, dtype=dtype)
    options = {"softmax": True, "to_onehot_y": True}
    expected = monai.losses.DiceLoss(**options)(logits, target.long())
    torch.testing.assert_close(ours.DiceLoss(**options)(logits, target), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"lambda_dice": 0.3, "lambda_ce": 2.0},
        {"label_smoothing": 0.1},
        {"reduction": "sum"},
        {"sigmoid": True, "softmax": False},
    ],
)
def test_dice_ce_options(options):
    same("DiceCELoss", {"softmax": True, "to_onehot_y": True, **options}, *data(3, True))


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (1, {}),
        (1, {"reduction": "sum", "gamma": 0.5}),
        (1, {"weight": 2.0}),
        (3, {"to_onehot_y": True}),
        (3, {"to_onehot_y": True, "include_background": False, "weight": [1.0, 2.0]}),
        (3, {"to_onehot_y": True, "use_softmax": True, "reduction": "sum"}),
        (3, {"to_onehot_y": True, "use_softmax": True, "weight": [0.5, 1.0, 2.0]}),
    ],
)
def test_focal(channels, options):
    same("FocalLoss", options, *data(channels, True))


def test_ignore_index():
    for channels, act in ((1, "sigmoid"), (3, "softmax")):
        logits, target = data(channels, True)
        target[:, :, 3:5] = 9
        same("DiceLoss", {act: True, "to_onehot_y": channels > 1, "ignore_index": 9}, logits, target)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"batch": True, "reduction": "none"}, {"alpha": 1.0, "reduction": "sum"}]
)
def test_hausdorff_dt(dims, options):
    same("HausdorffDTLoss", {"sigmoid": True, **options}, *data(1, True, dims))
    act = {"softmax": True, "to_onehot_y": True, "include_background": dims == 2}
    same("HausdorffDTLoss", {**act, **options}, *data(3, True, dims))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("DiceLoss", {}, "needs sigmoid=True or softmax=True"),
        ("DiceLoss", {"sigmoid": True, "jaccard": True}, "jaccard=True is not supported"),
        (
            "DiceCELoss",
            {"softmax": True, "smooth_nr": 0},
            "smooth_nr must equal smooth_dr, got 0.0 and 1e-05",
        ),
        ("FocalLoss", {"alpha": 0.3}, "alpha is not supported"),
        ("DiceFocalLoss", {"sigmoid": True, "reduction": "none"}, 'reduction "none" is not supported'),
    ],
)
def test_what_cannot_be_honoured_raises(kind, options, reason):
    with pytest.raises(NotImplementedError, match=re.escape(f"{kind}: {reason}; use monai.losses.{kind}")):
        getattr(ours, kind)(**options)
    with ours.patch_monai():  # there it is MONAI's
        x, y = data(1, True)
        loss = getattr(monai.losses, kind)(**options)
        patched = loss(x.sigmoid(), y)
    torch.testing.assert_close(patched, loss(x.sigmoid(), y))


def test_errors_are_monais():
    x, y = data(3, True)
    for kind, options, error in (
        ("DiceLoss", {"softmax": True}, AssertionError),
        ("DiceCELoss", {"softmax": True}, AssertionError),
        ("DiceLoss", {"sigmoid": True, "softmax": True}, ValueError),
    ):
        for package in (monai.losses, ours):
            with pytest.raises(error):
                getattr(package, kind)(**options)(x, y)
    for package in (monai.losses, ours):
        with pytest.raises(ValueError, match="number of dimensions for input and target should be the same"):
            package.DiceCELoss(softmax=True, to_onehot_y=True)(x, y[:, 0])


# ---- metrics --------------------------------------------------------------------------------------


def masks(dims=2, batch=3, classes=2, seed=0):
    generator = np.random.default_rng(seed)
    shape = (batch, classes, *(9, 11, 6)[:dims])
    pred, target = (torch.from_numpy((generator.random(shape) < 0.2).astype(np.float32)) for _ in range(2))
    pred[0, 1], target[1, 1], pred[2, 1], target[2, 1] = 0, 0, 0, 0
    return pred, target


SPACINGS = [None, 2, (1.0, 2.5), [(1.0, 2.0), (0.5, 0.5), (3.0, 1.0)]]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("compute_hausdorff_distance", {}),
        ("compute_hausdorff_distance", {"percentile": 95}),
        ("compute_hausdorff_distance", {"percentile": 0}),
        ("compute_hausdorff_distance", {"directed": True}),
        ("compute_hausdorff_distance", {"distance_metric": "chessboard"}),
        ("compute_average_surface_distance", {}),
        ("compute_average_surface_distance", {"symmetric": True}),
        ("compute_surface_dice", {"class_thresholds": [1.0, 1.5]}),
        ("compute_surface_dice", {"class_thresholds": [1.0, 1.5], "use_subvoxels": True}),
    ],
)
def test_surface_functions(name, options, background, spacing):
    if "class_thresholds" in options and not background:
        options = {**options, "class_thresholds": [1.5]}
    if options.get("use_subvoxels") and isinstance(spacing, int):
        return  # MONAI wants one for each axis there
    arguments = {**options, "include_background": background, "spacing": spacing}
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        expected = getattr(monai.metrics, name)(*masks(), **arguments)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = getattr(ours, name)(*masks(), **arguments)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    empty = [{str(w.message) for w in all_ if "is all 0" in str(w.message)} for all_ in (theirs, said)]
    if name == "compute_average_surface_distance" and not background:  # MONAI counts from the first shown
        empty[0] = {text.replace("class 0", "class 1") for text in empty[0]}
    assert empty[0] == empty[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("HausdorffDistanceMetric", {"percentile": 95, "include_background": True}),
        ("SurfaceDistanceMetric", {"symmetric": True}),
        ("SurfaceDiceMetric", {"class_thresholds": [1.0]}),
        ("DiceMetric", {}),
        ("DiceMetric", {"ignore_empty": False, "include_background": False, "reduction": "none"}),
    ],
)
def test_metric_classes(name, options):
    totals = []
    for package in (monai.metrics, ours):
        metric = getattr(package, name)(**options)
        for seed in range(2):
            metric(*masks(3, seed=seed))
        totals.append(metric.aggregate())
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("sampling", [None, 2.0, (1.0, 2.5)])
def test_distance_transform(kind, sampling):
    x = masks()[0][:, 0] > 0
    x = x.numpy() if kind == "numpy" else x
    for image in (x, x | True):
        expected = monai.transforms.utils.distance_transform_edt(image, sampling)
        got = ours.distance_transform_edt(image, sampling)
        assert type(got) is type(expected) and got.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-12)


# ---- programs that do not know of us --------------------------------------------------------------


def test_patch_and_back(monkeypatch):
    """What the program imported and made before is patched too; afterwards all is MONAI's again."""
    from monai.losses import DiceCELoss
    from monai.metrics import compute_hausdorff_distance

    loss, (x, y) = DiceCELoss(softmax=True, to_onehot_y=True), data(3, True)
    metric = monai.metrics.HausdorffDistanceMetric(percentile=95)
    used = []
    compute, surface = monai_losses.compute, ours.metrics.surface_metrics
    monkeypatch.setattr(monai_losses, "compute", lambda *a: used.append("loss") or compute(*a))
    monkeypatch.setattr(
        ours.metrics, "surface_metrics", lambda *a, **k: used.append("hd") or surface(*a, **k)
    )
    before = loss(x, y), metric(*masks()), monai.losses.DiceCELoss.forward
    assert not used
    with ours.patch_monai():
        torch.testing.assert_close(loss(x, y), before[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(metric(*masks()), before[1], equal_nan=True)
        assert used == ["loss", "hd"]
        with pytest.raises(KeyError), ours.patch_monai():
            raise KeyError
        loss(x, y)
        assert used == ["loss", "hd", "loss"]
    loss(x, y), metric(*masks())
    assert len(used) == 3
    assert monai.losses.DiceCELoss.forward is before[2]
    assert monai.metrics.compute_hausdorff_distance is compute_hausdorff_distance


def test_every_name_is_monais():
    for name in ours.__all__:
        if name not in ("patch_monai", "SurfaceMetric", "OverlapMetric"):
            homes = (monai.losses, monai.metrics, monai.transforms.utils)
            assert any(hasattr(home, name) for home in homes), name
    assert set(monai_losses.NAMES) < set(ours.__all__)
