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


def _binary(logits: Any, target: Any) -> tuple[Any, Any]:
    return logits.sigmoid(), target.unsqueeze(1).to(logits.dtype)


def _dice(p: Any, g: Any, power: float = 1.0) -> Any:
    overlap, total = (2 * p * g).flatten(2).sum(2), (p + g).flatten(2).sum(2)
    return (1 - ((overlap + 1e-5) / (total + 1e-5)) ** power).mean()


def _one_hot(logits: Any, target: Any) -> tuple[Any, Any]:
    from torch.nn.functional import one_hot

    return logits.softmax(1), one_hot(target.long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype)


def dice(logits: Any, target: Any) -> Any:
    return _dice(*_binary(logits, target))


def focal_dice(logits: Any, target: Any) -> Any:
    return _dice(*_binary(logits, target), power=2.0)


def generalized_dice(logits: Any, target: Any) -> Any:
    p, g = _one_hot(logits, target)
    volume = g.flatten(2).sum(2)
    v = 1 / volume.clamp_min(1) ** 2
    overlap, total = (2 * p * g).flatten(2).sum(2), (p + g).flatten(2).sum(2)
    return (1 - ((v * overlap).sum(1) + 1e-5) / ((v * total).sum(1) + 1e-5)).mean()


def dice_ce(logits: Any, target: Any) -> Any:
    from torch.nn.functional import cross_entropy

    return _dice(*_one_hot(logits, target)) + cross_entropy(logits, target.long())


def dice_mae(logits: Any, target: Any) -> Any:
    p, g = _one_hot(logits, target)
    return _dice(p, g) + (p - g).abs().mean()


def focal(logits: Any, target: Any) -> Any:
    from torch.nn.functional import cross_entropy

    ce = cross_entropy(logits, target.long(), reduction="none")
    return ((1 - (-ce).exp()) ** 2 * ce).mean()


def gce(logits: Any, target: Any) -> Any:
    p = logits.softmax(1).gather(1, target.long().unsqueeze(1))
    return ((1 - p**0.7) / 0.7).mean()


def mae(logits: Any, target: Any) -> Any:
    p, g = _one_hot(logits, target)
    return (p - g).abs().mean()


def boundary(logits: Any, distance_map: Any) -> Any:
    return (logits.sigmoid() * distance_map).mean()


def consistency(logits: Any, target_logits: Any) -> Any:
    return ((logits.softmax(1) - target_logits.softmax(1)) ** 2).mean()


# Name: our function, its options, the plain one, the shape of the logits.
VOLUME, CLASSES = (4, 1, 112, 112, 80), (4, 4, 112, 112, 20)
LOSSES: dict[str, tuple[str, dict[str, Any], Callable[..., Any], tuple[int, ...]]] = {
    "Dice": ("dice_loss", {"denominator": "linear"}, dice, VOLUME),
    "focal Dice": ("focal_dice_loss", {"denominator": "linear"}, focal_dice, VOLUME),
    "boundary loss": ("boundary_loss", {}, boundary, VOLUME),
    "generalized Dice": ("generalized_dice_loss", {}, generalized_dice, CLASSES),
    "Dice + CE": ("dice_ce_loss", {"denominator": "linear"}, dice_ce, CLASSES),
    "Dice + MAE": ("dice_mae_loss", {"denominator": "linear"}, dice_mae, CLASSES),
    "focal": ("pixel_loss", {"kind": "focal"}, focal, CLASSES),
    "GCE": ("pixel_loss", {"kind": "gce"}, gce, CLASSES),
    "MAE": ("pixel_loss", {"kind": "mae"}, mae, CLASSES),
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
    contenders = loss_contenders(partial(getattr(losses, function), **options), plain, logits, target)

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
