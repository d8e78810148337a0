"""The losses, forward + backward, against eager PyTorch, torch.compile and the peers that have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from noisyseg_fast.timing import (
    Case,
    Contender,
    blobs,
    in_double,
    loss_contenders,
    nr_dice_case,
    random_logits,
    torch_nr_dice_of,
    value_and_grad,
    weighted_ce_case,
)

SHAPES = [
    (8, 1, 64, 64),
    (128, 1, 64, 64),
    (32, 1, 256, 256),
    (4, 1, 112, 112, 80),
    (30, 2, 512, 512),
    (1, 1, 512, 512, 300),
]
QUICK = [(128, 1, 64, 64), (4, 1, 112, 112, 80)]
HEADLINES = [(8, 1, 64, 64), *QUICK, (1, 1, 512, 512, 300)]
CE_SHAPES = [(32, 2, 256, 256), (4, 4, 112, 112, 20), (2, 14, 64, 64, 64)]


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    """Makers of cases, so that only one case's arrays exist at a time."""
    for shape in QUICK if quick else SHAPES:
        yield partial(nr_dice_case, shape, device, headline=shape in HEADLINES)
    for shape in CE_SHAPES[1:2] if quick else CE_SHAPES:
        yield partial(weighted_ce_case, shape, device, headline=True)
    if quick:
        return
    for name in LOSSES:
        yield partial(loss_case, name, device)


# ---- each loss as one writes it in PyTorch --------------------------------------------------------
# logits (B, C, *S), target (B, *S) labels or (B, C, *S); options are named as ours, and cost nothing where they are not
# used. activation None: sigmoid for one channel.


def kept(target: Any, mask: Any, ignore_index: int | None) -> Any:
    """The pixels (B, *S) bool that count; None: all."""
    if ignore_index is None or target.is_floating_point():
        return mask
    labelled = target != ignore_index
    return labelled if mask is None else mask & labelled


def maps(logits: Any, target: Any, activation: str | None = None, keep: Any = None) -> tuple[Any, Any]:
    """Probabilities and the target's, (B, C, *S) each."""
    from torch.nn.functional import one_hot

    channels = logits.shape[1]
    p = logits.sigmoid() if _by_sigmoid(logits, activation) else logits.softmax(1)
    if target.shape == logits.shape:
        g = target
    else:
        labels = target if keep is None else target.masked_fill(~keep, 0)
        g = labels.unsqueeze(1) if channels == 1 else one_hot(labels.long(), channels).movedim(-1, 1)
    return p, g.to(p.dtype)


def _by_sigmoid(logits: Any, activation: str | None) -> bool:
    return logits.shape[1] == 1 if activation is None else activation == "sigmoid"


def _product(weight: Any, keep: Any) -> Any:
    return keep if weight is None else weight if keep is None else weight * keep


def _region(
    terms: Callable[..., Any],
    logits: Any,
    target: Any,
    *,
    activation: str | None = None,
    include_background: bool = True,
    per_image: bool = True,
    weight: Any = None,
    mask: Any = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    of: Any = None,
    **options: Any,
) -> Any:
    """The mean of terms(p, g, total), (B, C), over classes and images or ("image") over classes; total(x) sums maps
    over the pixels that count. of: p and g, where they are there already."""
    keep = kept(target, mask, ignore_index)
    p, g = of or maps(logits, target, activation, keep)
    w = _product(weight, keep)

    def total(x: Any) -> Any:
        sums = (x if w is None else w.unsqueeze(1) * x).flatten(2).sum(2)
        sums = sums if per_image else sums.sum(0)
        return sums if include_background else sums[..., 1:]

    each = terms(p, g, total, **options)
    return each.mean() if reduction == "mean" else each.mean(1)


def _dice(p: Any, g: Any, total: Callable[..., Any], denominator: str = "squared", beta: float = 1.0) -> Any:
    overlap, size = total(2 * p * g), total(p + g if denominator == "linear" else p**2 + g**2)
    return 1 - ((overlap + 1e-5) / (size + 1e-5)) ** (1 / beta)


def _nr_dice(p: Any, g: Any, total: Callable[..., Any], **options: Any) -> Any:
    return torch_nr_dice_of(p, g, total, **options)


def _generalized_dice(p: Any, g: Any, total: Callable[..., Any], denominator: str = "linear") -> Any:
    v = 1 / total(g).clamp_min(1) ** 2
    overlap, size = total(2 * p * g), total(p + g)
    return 1 - ((v * overlap).sum(1, keepdim=True) + 1e-5) / ((v * size).sum(1, keepdim=True) + 1e-5)


dice = focal_dice = partial(_region, _dice)
nr_dice = partial(_region, _nr_dice)
generalized_dice = partial(_region, _generalized_dice)


def pixel(
    logits: Any,
    target: Any,
    *,
    kind: str = "ce",
    activation: str | None = None,
    weight: Any = None,
    mask: Any = None,
    ignore_index: int | None = None,
    q: float = 0.7,
    focal_gamma: float = 2.0,
    reduction: str = "mean",
    of: Any = None,
) -> Any:
    """The mean over the pixels that count, of all or ("image") of each image, or ("none") the loss map (B, *S)."""
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    keep, sigmoid = kept(target, mask, ignore_index), _by_sigmoid(logits, activation)
    if kind in ("ce", "focal"):
        if sigmoid:
            g = target if keep is None or target.shape == logits.shape else target.masked_fill(~keep, 0)
            each = binary_cross_entropy_with_logits(
                logits, g.reshape(logits.shape).to(logits.dtype), reduction="none"
            )
        else:
            y = target if target.shape == logits.shape else target.long()
            ignored = -100 if ignore_index is None else ignore_index
            each = cross_entropy(logits, y, reduction="none", ignore_index=ignored)
        if kind == "focal":
            each = (1 - (-each).exp()) ** focal_gamma * each
    elif kind == "gce":
        if sigmoid:
            p, g = of or maps(logits, target, activation, keep)
            p = p * g + (1 - p) * (1 - g)
        else:
            y = target.long() if keep is None else target.long().masked_fill(~keep, 0)
            p = logits.softmax(1).gather(1, y.unsqueeze(1))
        each = (1 - p**q) / q
    else:
        p, g = of or maps(logits, target, activation, keep)
        each = p * g if kind == "boundary" else (p - g).abs() if kind == "mae" else (p - g) ** 2
    w = _product(weight, keep)
    if w is None and reduction == "mean":
        return each.mean()
    if each.ndim == logits.ndim:
        each = each.squeeze(1) if each.shape[1] == 1 else each.mean(1)
    if w is not None:
        each = w * each
    if reduction == "none":
        return each
    if reduction == "image":
        return each.flatten(1).mean(1) if keep is None else each.flatten(1).sum(1) / keep.flatten(1).sum(1)
    return each.mean() if keep is None else each.sum() / keep.sum()


def _with_dice(
    kind: str, logits: Any, target: Any, *, weights: tuple[float, float], parts: Any, **options: Any
) -> Any:
    """weights: of Dice and of the pixel loss; parts: options of Dice alone."""
    return weights[0] * dice(logits, target, **parts, **options) + weights[1] * pixel(
        logits, target, kind=kind, **options
    )


def dice_ce(
    logits: Any,
    target: Any,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    denominator: str = "squared",
    include_background: bool = True,
    **options: Any,
) -> Any:
    parts = {"denominator": denominator, "include_background": include_background}
    return _with_dice("ce", logits, target, weights=(dice_weight, ce_weight), parts=parts, **options)


def dice_mae(
    logits: Any,
    target: Any,
    *,
    dice_weight: float = 1.0,
    mae_weight: float = 1.0,
    denominator: str = "squared",
    include_background: bool = True,
    activation: str | None = None,
    mask: Any = None,
    ignore_index: int | None = None,
    **options: Any,
) -> Any:
    options |= {"activation": activation, "mask": mask, "ignore_index": ignore_index}
    options["of"] = maps(logits, target, activation, kept(target, mask, ignore_index))
    parts = {"denominator": denominator, "include_background": include_background}
    return _with_dice("mae", logits, target, weights=(dice_weight, mae_weight), parts=parts, **options)


def boundary(
    logits: Any,
    distance_map: Any,
    *,
    activation: str | None = None,
    include_background: bool = True,
    **options: Any,
) -> Any:
    first = int(not include_background)
    both = [x[:, first:] for x in maps(logits, distance_map, activation)]
    return pixel(logits, distance_map, kind="boundary", of=both, **options)


def consistency(
    logits: Any, target_logits: Any, *, kind: str = "mse", activation: str | None = None, **options: Any
) -> Any:
    one = _by_sigmoid(logits, activation)
    both = [z.sigmoid() if one else z.softmax(1) for z in (logits, target_logits)]
    return pixel(logits, target_logits, kind=kind, of=both, **options)


# Name: our function, options of both, the plain one, the shape of the logits.
VOLUME, CLASSES = (4, 1, 112, 112, 80), (4, 4, 112, 112, 20)
LOSSES: dict[str, tuple[str, dict[str, Any], Callable[..., Any], tuple[int, ...]]] = {
    "Dice": ("dice_loss", {"denominator": "linear"}, dice, VOLUME),
    "focal Dice": ("focal_dice_loss", {"denominator": "linear", "beta": 0.5}, focal_dice, VOLUME),
    "boundary loss": ("boundary_loss", {}, boundary, VOLUME),
    "generalized Dice": ("generalized_dice_loss", {}, generalized_dice, CLASSES),
    "Dice + CE": ("dice_ce_loss", {"denominator": "linear"}, dice_ce, CLASSES),
    "Dice + MAE": ("dice_mae_loss", {"denominator": "linear"}, dice_mae, CLASSES),
    "focal": ("pixel_loss", {"kind": "focal"}, pixel, CLASSES),
    "GCE": ("pixel_loss", {"kind": "gce"}, pixel, CLASSES),
    "MAE": ("pixel_loss", {"kind": "mae"}, pixel, CLASSES),
    "consistency, MSE": ("consistency_loss", {}, consistency, CLASSES),
}
# MONAI's class, its options, and the factor between its mean and ours
MONAI: dict[str, tuple[str, dict[str, Any], float]] = {
    "Dice": ("DiceLoss", {"sigmoid": True}, 1.0),
    "generalized Dice": ("GeneralizedDiceLoss", {"softmax": True, "to_onehot_y": True}, 1.0),
    "Dice + CE": ("DiceCELoss", {"softmax": True, "to_onehot_y": True}, 1.0),
    "focal": ("FocalLoss", {"use_softmax": True, "to_onehot_y": True}, 4.0),
}


def loss_case(name: str, device: str) -> Case:
    """One loss with the arguments of LOSSES; labels uint8, a distance map or a teacher's logits."""
    import torch

    from noisyseg_fast import losses, reference

    function, options, plain, shape = LOSSES[name]
    logits = random_logits(shape, device)
    pixels, random = (shape[0], *shape[2:]), torch.Generator().manual_seed(1)
    target: Any = torch.from_numpy(blobs(pixels))
    if name == "boundary loss" or name.startswith("consistency"):
        target = torch.randn(shape, generator=random)
    elif shape[1] > 1:
        target = torch.randint(0, shape[1], pixels, generator=random, dtype=torch.uint8)
    target = target.to(device)
    contenders = loss_contenders(
        partial(getattr(losses, function), **options),
        lambda z, y: plain(z, y, **options),
        logits,
        target,
    )

    def monai() -> Callable[[], Any]:
        from monai import losses as peer

        kind, arguments, factor = MONAI[name]
        loss = getattr(peer, kind)(**arguments)
        return value_and_grad(lambda z, y: factor * loss(z, y.unsqueeze(1)), logits, target)

    if name in MONAI:
        contenders.append(Contender("MONAI", monai))
    passes = 2 if function != "pixel_loss" and function not in ("boundary_loss", "consistency_loss") else 1
    read = logits.nbytes + target.nbytes
    exponentials = 2 if function == "consistency_loss" else 1  # the teacher's too
    return Case(
        family="losses",
        operation=f"{name}, forward + backward",
        input="x".join(map(str, shape)),
        contenders=contenders,
        oracle=in_double(partial(getattr(reference, function), **options), logits, target),
        tolerance=1e-5,
        moved=math.floor(passes * read + logits.nbytes),
        work={"exp": passes * logits.numel() * exponentials, "div": passes * target.numel()},
        autograd=True,
        device=device,
    )
