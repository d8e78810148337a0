"""Every public operation that takes arrays, each with arrays that it takes: what test_hostile_arrays, test_memory and
scripts/fuzz_arrays.py go through."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import noisyseg_fast as ns

MODULES = (
    "distance",
    "metrics",
    "labels",
    "losses",
    "task_losses",
    "pixels",
    "noise",
    "weight_nets",
    "dual_norms",
    "meta",
    "compat.medpy",
    "compat.scipy",
    "compat.monai",
    "compat.monai_losses",
    "compat.monai_metrics",
    "compat.monai_noise",
    "compat.torchmetrics",
    "compat.nnunet",
)
# Public functions that take no arrays, or NumPy counts alone; and what is tested as a class.
OTHER = {
    "options_of",
    "corruption_radii",
    "sum_by_class",
    "overlap_of",
    "patch_monai",
    "main",
    "unhonoured",
    "fits",
    "compute",
    "as_mask",
    "dice_helper",
    "size",
    "parts",
    "wide",
    "shapes",
    "forward",
    "backward",
    "vjp",
    "ce_values",
    "tangent",
    "backward_tangent",
    "value_and_grad",
    "bad_label",
    "loss_shape",
    "loss_dtype",
    "sums_shape",
    "sampled_forward",
    "sampled_backward",
    "fuse_dual_norms",
    "unfuse_dual_norms",
    "cross_entropy_map",
    "recall",
    "true_positive_rate",
    "true_negative_rate",
    "positive_predictive_value",  # other names of the same
}
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """make(random, batch, size): the arrays by the names that messages give them, NumPy; size: of the spatial axes.
    call(**arrays): the operation. torch: it takes torch tensors alone."""

    name: str
    make: Callable[[np.random.Generator, int, tuple[int, ...]], Arrays]
    call: Callable[..., Any]
    torch: bool = False


def operations() -> list[Operation]:
    return [*_plain(), *_torch(), *_compat()]


def public() -> set[str]:
    """module.function of every public function, torch and the peers being there."""
    found = set()
    for name in MODULES:
        module = importlib.import_module(f"noisyseg_fast.{name}")
        for key, value in vars(module).items():
            own = inspect.isfunction(value) and value.__module__ == module.__name__
            if own and not key.startswith("_") and key not in OTHER:
                found.add(f"{name}.{key}")
    return found


# ---- arrays ----------------------------------------------------------------------------------------


def masks(r: Any, *shape: int) -> Any:
    """Bits that no axis leaves empty or full, mostly."""
    return (r.random(shape) < 0.5).astype(np.uint8)


def classes(r: Any, *shape: int, n: int = 3, dtype: str = "uint8") -> Any:
    return r.integers(0, n, shape).astype(dtype)


def reals(r: Any, *shape: int, low: float = -2.0, high: float = 2.0, dtype: str = "float32") -> Any:
    return r.uniform(low, high, shape).astype(dtype)


def _logits(r: Any, b: int, s: tuple[int, ...], target: str = "labels", c: int = 3, **more: Any) -> Arrays:
    given = {"labels": lambda: classes(r, b, *s, n=c), "soft": lambda: reals(r, b, c, *s, low=0, high=1)}[
        target
    ]()
    return {"logits": reals(r, b, c, *s), "target": given, **more}


def _weighted(r: Any, b: int, s: tuple[int, ...]) -> Arrays:
    return _logits(r, b, s, weight=reals(r, b, *s, low=0, high=1), mask=masks(r, b, *s))


def _two_masks(r: Any, b: int, s: tuple[int, ...], a: str = "pred", c: str = "target") -> Arrays:
    return {a: masks(r, b, *s), c: masks(r, b, *s)}


def _votes(r: Any, b: int, s: tuple[int, ...]) -> Arrays:
    return {"annotations": masks(r, b, 3, *s)}


def _theta(kind: str, r: Any, dims: int = 2) -> list[Any]:
    shapes = (
        [(4, *[3] * dims), (4,), (2, *[5] * dims), (2,), (7,), (1,)]
        if kind == "mask_net"
        else [(5,), (5,), (5,), (1,)]
    )
    return [reals(r, *shape, low=-0.5, high=0.5) for shape in shapes]


_FIELDS = {"mask_net": ("w3", "b3", "w5", "b5", "w1", "b1"), "mw_net": ("w1", "b1", "w2", "b2")}


def _net(kind: str, vjp: bool) -> Callable[..., Arrays]:
    def make(r: Any, b: int, s: tuple[int, ...]) -> Arrays:
        maps = {"L": reals(r, b, *s, low=0, high=4)}
        if vjp:
            maps = {"dR": reals(r, b, *s), "R": reals(r, b, *s, low=0.1, high=0.9), **maps}
        theta = _theta(kind, r, 3 if len(s) == 3 else 2)
        return {**maps, **{f"theta_{f}": x for f, x in zip(_FIELDS[kind], theta, strict=True)}}

    return make


def _call_net(kind: str, vjp: bool) -> Callable[..., Any]:
    from noisyseg_fast import weight_nets

    def call(**x: Any) -> Any:
        theta = [x[f"theta_{f}"] for f in _FIELDS[kind]]
        if vjp:
            return getattr(weight_nets, f"{kind}_vjp")(x["dR"], x["R"], x["L"], theta, attached=True)
        return getattr(weight_nets, kind)(x["L"], theta)

    return call


# ---- for any kind of array -------------------------------------------------------------------------


def _plain() -> list[Operation]:
    from noisyseg_fast import distance, labels, losses, metrics, noise, pixels, task_losses, weight_nets

    found: list[Operation] = []

    def add(name: str, make: Any, call: Any, torch: bool = False) -> None:
        found.append(Operation(name, make, call, torch))

    def one(name: str, draw: Any) -> Any:
        return lambda r, b, s: {name: draw(r, b, *s)}

    def d(x: Any, lead: int = 1) -> int:
        """The spatial axes of x; of what is no array some number, for the operation to complain."""
        try:
            return min(max(len(x.shape) - lead, 1), 3)
        except (AttributeError, TypeError, RuntimeError):
            return 2

    add(
        "distance.distance_transform_edt",
        one("mask", masks),
        lambda mask: distance.distance_transform_edt(mask, spatial_dims=d(mask)),
    )
    add(
        "distance.distance_transform_edt, labels",
        one("mask", classes),
        lambda mask: distance.distance_transform_edt(
            mask, 0.5, spatial_dims=d(mask), multi_label=True, dtype="float64"
        ),
    )
    add(
        "distance.distance_transform_edt, indices",
        one("mask", masks),
        lambda mask: distance.distance_transform_edt(mask, spatial_dims=d(mask), return_indices=True)[0],
    )
    add(
        "distance.signed_distance_map",
        one("mask", masks),
        lambda mask: distance.signed_distance_map(mask, spatial_dims=d(mask)),
    )
    add(
        "distance.signed_distance_map, classes",
        one("mask", classes),
        lambda mask: distance.signed_distance_map(
            mask, spatial_dims=d(mask), convention="dtc", num_classes=3
        ),
    )
    add(
        "distance.sampled_distance",
        lambda r, b, s: {"values": reals(r, b, *s), "sites": masks(r, b, *s)},
        lambda values, sites: distance.sampled_distance(values, sites, spatial_dims=d(values)),
    )

    add(
        "metrics.surface_metrics",
        _two_masks,
        lambda pred, target: metrics.surface_metrics(pred, target, spatial_dims=d(pred)),
    )
    add(
        "metrics.surface_metrics, cells",
        _two_masks,
        lambda pred, target: metrics.surface_metrics(
            pred, target, 0.7, spatial_dims=d(pred), definition="deepmind"
        ),
    )
    add(
        "metrics.surface_metrics, labels",
        lambda r, b, s: {"pred": classes(r, b, *s), "target": classes(r, b, *s)},
        lambda pred, target: metrics.surface_metrics(pred, target, spatial_dims=d(pred), num_classes=3),
    )
    add(
        "metrics.overlap_metrics",
        _two_masks,
        lambda pred, target: metrics.overlap_metrics(pred, target, spatial_dims=d(pred)),
    )
    add(
        "metrics.overlap_metrics, logits",
        lambda r, b, s: {"pred": reals(r, b, 3, *s), "target": classes(r, b, *s)},
        lambda pred, target: metrics.overlap_metrics(pred, target),
    )
    add(
        "metrics.confusion",
        _two_masks,
        lambda pred, target: metrics.confusion(pred, target, spatial_dims=d(pred)),
    )

    def accumulated(pred: Any, target: Any) -> Any:
        total = metrics.OverlapAccumulator(num_classes=3, spatial_dims=d(pred))
        total.update(pred, target)
        return total.compute()

    add(
        "metrics.OverlapAccumulator",
        lambda r, b, s: {"pred": classes(r, b, *s), "target": classes(r, b, *s)},
        accumulated,
    )

    def votes(name: str, **options: Any) -> Any:
        function = getattr(labels, name)
        return lambda annotations: function(annotations, spatial_dims=d(annotations, 2), **options)

    add("labels.majority_vote", _votes, votes("majority_vote"))
    add("labels.staple", _votes, votes("staple", max_iter=20))
    add(
        "labels.staple, labels",
        lambda r, b, s: {"annotations": classes(r, b, 3, *s)},
        votes("staple", max_iter=20, num_classes=3),
    )
    add(
        "labels.staple, many raters",
        lambda r, b, s: {"annotations": masks(r, b, 20, *s)},
        votes("staple", max_iter=5),
    )
    add("labels.simple", _votes, votes("simple"))
    add("labels.soft_average", _votes, votes("soft_average"))
    add(
        "labels.soft_average, soft",
        lambda r, b, s: {"annotations": reals(r, b, 3, *s)},
        votes("soft_average"),
    )
    add("labels.agreement", _votes, votes("agreement"))
    add(
        "labels.rater_scores",
        lambda r, b, s: {**_votes(r, b, s), "fusion": masks(r, b, *s)},
        lambda annotations, fusion: labels.rater_scores(annotations, fusion, spatial_dims=d(annotations, 2)),
    )

    def sampled(annotations: Any) -> Any:
        generator: Any = np.random.default_rng(0)
        if hasattr(annotations, "data_ptr"):
            import torch

            generator = torch.Generator().manual_seed(0)
        return labels.label_sampling(annotations, generator, spatial_dims=d(annotations, 2))

    add("labels.label_sampling", _votes, sampled)

    for name in (
        "nr_dice_loss",
        "dice_loss",
        "focal_dice_loss",
        "generalized_dice_loss",
        "pixel_loss",
        "dice_ce_loss",
        "dice_mae_loss",
    ):
        function = getattr(losses, name)
        add(
            f"losses.{name}",
            _weighted,
            lambda logits, target, weight, mask, f=function: f(
                logits, target, weight=weight, mask=mask, return_grad=True, activation="softmax"
            ),
        )
        add(
            f"losses.{name}, value",
            _logits,
            lambda logits, target, f=function: f(logits, target, activation="softmax"),
        )
    add(
        "losses.pixel_loss, map",
        lambda r, b, s: {**_logits(r, b, s, "soft"), "class_weight": reals(r, 3, low=0.5, high=1)},
        lambda logits, target, class_weight: losses.pixel_loss(
            logits, target, class_weight=class_weight, reduction="none"
        ),
    )
    add(
        "losses.boundary_loss",
        lambda r, b, s: {"logits": reals(r, b, 1, *s), "distance_map": reals(r, b, 1, *s)},
        lambda logits, distance_map: losses.boundary_loss(logits, distance_map, return_grad=True),
    )
    add(
        "losses.consistency_loss",
        lambda r, b, s: {"logits": reals(r, b, 2, *s), "target_logits": reals(r, b, 2, *s)},
        lambda logits, target_logits: losses.consistency_loss(logits, target_logits, return_grad=True),
    )

    add(
        "task_losses.uncertainty_weighted_loss",
        lambda r, b, s: {
            "logits": reals(r, b, 1, *s),
            "annotations": masks(r, b, 3, *s),
            "uncertainty": reals(r, b, 3, *s, low=0, high=1),
            "raters": masks(r, b, 3),
        },
        lambda logits, annotations, uncertainty, raters: task_losses.uncertainty_weighted_loss(
            logits, annotations, uncertainty, raters=raters, return_grad=True
        ),
    )
    add(
        "task_losses.dual_task_loss",
        lambda r, b, s: {
            "logits": reals(r, b, 1, *s),
            "sdf": reals(r, b, 1, *s, low=-1, high=1),
            "target": masks(r, b, *s),
            "labelled": masks(r, b),
        },
        lambda logits, sdf, target, labelled: task_losses.dual_task_loss(
            logits, sdf, target, labelled=labelled, return_grad=True
        ),
    )

    add(
        "pixels.quantile",
        lambda r, b, s: {"values": reals(r, b, *s), "mask": masks(r, b, *s)},
        lambda values, mask: pixels.quantile(values, [0.1, 0.9], mask=mask, per_image=True),
    )
    add(
        "pixels.topk_threshold",
        lambda r, b, s: {"values": reals(r, b, *s), "mask": masks(r, b, *s)},
        lambda values, mask: pixels.topk_threshold(values, 3, mask=mask),
    )
    add("pixels.topk_mask", one("values", reals), lambda values: pixels.topk_mask(values, 3, per_image=True))
    add(
        "pixels.confident_joint",
        lambda r, b, s: {"probabilities": reals(r, b, 3, *s, low=0, high=1), "label": classes(r, b, *s)},
        pixels.confident_joint,
    )
    add(
        "pixels.label_errors",
        lambda r, b, s: {"probabilities": reals(r, b, 3, *s, low=0, high=1), "label": classes(r, b, *s)},
        pixels.label_errors,
    )

    def noisy(
        name: str,
        argument: str = "masks",
        draw: Any = masks,
        seeded: bool = True,
        args: tuple[Any, ...] = (),
        **options: Any,
    ) -> None:
        function = getattr(noise, name)
        seed = {"seed": 3} if seeded else {}

        def call(**x: Any) -> Any:
            return function(x[argument], *args, spatial_dims=d(x[argument]), **seed, **options)

        add(f"noise.{name}", one(argument, draw), call)

    noisy("dilate", "mask", seeded=False, radius=1.5)
    noisy("erode", "mask", seeded=False, radius=1.5)
    noisy("erode_or_dilate", radius=1.0)
    noisy("rater_bias", bias=[1.0, -1.0])
    noisy("shift", draw=classes, seeded=False, offset=1)
    noisy("elastic_deform", draw=classes, sigma=1.0)
    noisy("flip_square", size=2)
    noisy("erase_component")
    noisy("connected_components", seeded=False)
    noisy("polygonize", vertices=4)
    noisy("distort_boundary", radius=1)
    noisy("mixture", args=([noise.Noise("shift", offset=1), None],))
    add(
        "noise.Noise",
        one("masks", masks),
        lambda masks: noise.Noise("dilate", radius=1)(masks, seed=1, spatial_dims=d(masks)),
    )
    add(
        "noise.deform",
        one("masks", classes),
        lambda masks: noise.deform(masks, np.zeros((d(masks), *[3] * d(masks))) + 0.7, spatial_dims=d(masks)),
    )
    add(
        "noise.each_label",
        one("labels", classes),
        lambda labels: noise.each_label(noise.Noise("dilate", radius=1), labels, spatial_dims=d(labels)),
    )
    add(
        "noise.dice_of",
        lambda r, b, s: _two_masks(r, b, s, "noisy", "clean"),
        lambda noisy, clean: noise.dice_of(noisy, clean, spatial_dims=d(noisy)),
    )
    add(
        "noise.calibrate",
        one("masks", masks),
        lambda masks: noise.calibrate("dilate", masks, 0.9, bounds=(0, 2), unreachable="closest").dice,
    )
    add(
        "noise.simulate_raters",
        one("masks", masks),
        lambda masks: noise.simulate_raters(masks, noises=["shift"], seed=1).annotations,
    )
    add("noise.corrupt", one("masks", masks), lambda masks: noise.corrupt(masks, 0.5, 2, seed=1)[0])
    add(
        "noise.dilate_labels",
        lambda r, b, s: {"labels": classes(r, *s)},
        lambda labels: noise.dilate_labels(labels, 1),
    )

    add(
        "weight_nets.ce_dual",
        lambda r, b, s: {"z": reals(r, b, 3, *s), "zdot": reals(r, b, 3, *s), "y": classes(r, b, *s)},
        weight_nets.ce_dual,
    )
    for kind in ("mask_net", "mw_net"):
        add(f"weight_nets.{kind}", _net(kind, False), _call_net(kind, False))
        add(f"weight_nets.{kind}_vjp", _net(kind, True), _call_net(kind, True))
    return found


# ---- for torch tensors alone -----------------------------------------------------------------------


def _torch() -> list[Operation]:
    import torch

    from noisyseg_fast import dual_norms, meta

    def net() -> Any:
        torch.manual_seed(0)
        return torch.nn.Conv2d(1, 2, 3, padding=1)

    def batch(r: Any, b: int, s: tuple[int, ...]) -> Arrays:
        return {
            "x": reals(r, b, 1, *s),
            "y": classes(r, b, *s, n=2),
            "R": reals(r, b, *s, low=0, high=1),
            "x_clean": reals(r, b, 1, *s),
            "y_clean": classes(r, b, *s, n=2),
        }

    def hyper(z: Any, zdot: Any, h: Any) -> Any:
        return meta.head_hypergradient(
            lambda logits, w: (w * meta.cross_entropy_map(logits, torch.zeros_like(w).long())).mean(),
            z,
            zdot,
            h,
        )

    def jvp(x: Any) -> Any:
        model = net()
        return meta.logit_jvp(
            model, None, None, x, {n: torch.ones_like(p) for n, p in model.named_parameters()}
        )

    return [
        Operation(
            "dual_norms.norm_act",
            lambda r, b, s: {"x": reals(r, b, 4, *s), "weight": reals(r, 4), "bias": reals(r, 4)},
            lambda x, weight, bias: dual_norms.norm_act(x, weight, bias, slope=0.1),
            True,
        ),
        Operation(
            "dual_norms.norm_act, group",
            lambda r, b, s: {"x": reals(r, b, 4, *s), "weight": reals(r, 4)},
            lambda x, weight: dual_norms.norm_act(x, weight, norm="group", groups=2),
            True,
        ),
        Operation(
            "meta.pixel_meta_gradient",
            batch,
            lambda **a: meta.pixel_meta_gradient(
                net(), a["x"], a["y"], a["R"], a["x_clean"], a["y_clean"], 0.1, self_check=False
            ),
            True,
        ),
        Operation(
            "meta.unroll_reference",
            batch,
            lambda **a: meta.unroll_reference(net(), a["x"], a["y"], a["R"], a["x_clean"], a["y_clean"], 0.1)[
                :1
            ],
            True,
        ),
        Operation("meta.logit_jvp", lambda r, b, s: {"x": reals(r, b, 1, *s)}, jvp, True),
        Operation(
            "meta.update_vjp",
            lambda r, b, s: {"params": reals(r, b, *s), "grads": reals(r, b, *s), "v": reals(r, b, *s)},
            lambda params, grads, v: meta.update_vjp(0.1, {"p": params}, {"p": grads}, {"p": v})[1]["p"],
            True,
        ),
        Operation(
            "meta.head_hypergradient",
            lambda r, b, s: {"z": reals(r, b, 2, *s), "zdot": reals(r, b, 2, *s), "h": reals(r, b, *s)},
            hyper,
            True,
        ),
    ]


# ---- drop-ins --------------------------------------------------------------------------------------


def _compat() -> list[Operation]:

    from noisyseg_fast.compat import medpy, monai_losses, monai_metrics, nnunet, scipy, torchmetrics

    found = []
    for name in ("hd", "hd95", "assd", "asd", "dc", "jc", "precision", "sensitivity", "specificity", "ravd"):
        function = getattr(medpy, name)
        found.append(
            Operation(
                f"compat.medpy.{name}",
                lambda r, b, s: {"result": masks(r, *s), "reference": masks(r, *s)},
                lambda result, reference, f=function: f(result, reference),
            )
        )
    found.append(
        Operation(
            "compat.scipy.distance_transform_edt",
            lambda r, b, s: {"input": masks(r, *s)},
            lambda input: scipy.distance_transform_edt(input),
        )
    )

    def one_hot(r: Any, b: int, s: tuple[int, ...]) -> Arrays:
        return {"y_pred": masks(r, b, 2, *s), "y": masks(r, b, 2, *s)}

    for name, options in (
        ("compute_hausdorff_distance", {"percentile": 95}),
        ("compute_average_surface_distance", {}),
        ("compute_surface_dice", {"class_thresholds": [1.0]}),
    ):
        function = getattr(monai_metrics, name)
        found.append(
            Operation(
                f"compat.monai_metrics.{name}",
                one_hot,
                lambda y_pred, y, f=function, o=options: f(y_pred, y, **o),
                True,
            )
        )
    found.append(
        Operation(
            "compat.monai_metrics.distance_transform_edt",
            lambda r, b, s: {"img": masks(r, b, *s)},
            lambda img: monai_metrics.distance_transform_edt(img),
            True,
        )
    )
    for name in ("HausdorffDistanceMetric", "SurfaceDistanceMetric", "DiceMetric"):
        made = getattr(monai_metrics, name)
        found.append(
            Operation(f"compat.monai_metrics.{name}", one_hot, lambda y_pred, y, f=made: f()(y_pred, y), True)
        )
    for name in ("DiceLoss", "DiceCELoss", "DiceFocalLoss", "GeneralizedDiceLoss", "FocalLoss"):
        loss = getattr(monai_losses, name)(**({"sigmoid": True} if name != "FocalLoss" else {}))
        found.append(
            Operation(
                f"compat.monai_losses.{name}",
                lambda r, b, s: {"input": reals(r, b, 2, *s), "target": masks(r, b, 2, *s)},
                lambda input, target, f=loss: f(input, target),
                True,
            )
        )

    def overlap(preds: Any, target: Any) -> Any:
        metric = torchmetrics.OverlapMetric(num_classes=3)
        metric.update(preds, target)
        return metric.compute()

    found.append(
        Operation(
            "compat.torchmetrics.OverlapMetric",
            lambda r, b, s: {"preds": reals(r, b, 3, *s), "target": classes(r, b, *s)},
            overlap,
            True,
        )
    )
    ours = nnunet.Loss(ns.dice_ce_loss)
    found.append(
        Operation(
            "compat.nnunet.Loss",
            lambda r, b, s: {"logits": reals(r, b, 3, *s), "target": classes(r, b, 1, *s)},
            lambda logits, target: ours(logits, target),
            True,
        )
    )
    return found


# ---- answers ---------------------------------------------------------------------------------------


def flat(x: Any) -> list[Any]:
    """The arrays and numbers of a result, as NumPy."""
    if x is None:
        return []
    if isinstance(x, (tuple, list)):
        return [a for item in x for a in flat(item)]
    if hasattr(x, "detach"):
        x = x.detach()
        x = (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
    return [np.asarray(x)]


def tensors(arrays: Arrays) -> Arrays:
    import torch

    return {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}


__all__ = ["MODULES", "Operation", "flat", "ns", "operations", "public", "tensors"]
