"""The losses, forward + backward, against eager PyTorch, torch.compile and MONAI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from noisyseg_fast.timing import (
    Case,
    Contender,
    in_double,
    loss_contenders,
    nr_dice_case,
    random_logits,
    value_and_grad,
    weighted_ce_case,
)

# From 32 thousand to 79 million logits: also the sweep that shows how the time grows.
SHAPES = [
    (8, 1, 64, 64),
    (128, 1, 64, 64),
    (32, 1, 256, 256),
    (4, 1, 112, 112, 80),
    (30, 2, 512, 512),
    (1, 1, 512, 512, 300),
]
HEADLINES = [(128, 1, 64, 64), (4, 1, 112, 112, 80)]
CE_SHAPES = [(32, 2, 256, 256), (4, 4, 112, 112, 20), (2, 14, 64, 64, 64)]


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    """Makers of cases, so that only one case's arrays exist at a time."""
    for shape in HEADLINES if quick else SHAPES:
        yield partial(nr_dice_case, shape, device, headline=shape in HEADLINES)
    if not quick:
        yield partial(dice_case, (4, 1, 112, 112, 80), device)
    for shape in CE_SHAPES[1:2] if quick else CE_SHAPES:
        yield partial(weighted_ce_case, shape, device, headline=shape == CE_SHAPES[1])


def dice_case(shape: tuple[int, ...], device: str) -> Case:
    """dice_loss with linear denominator, which MONAI has too; one channel, labels uint8."""
    from noisyseg_fast import losses, reference

    base = nr_dice_case(shape, device)
    logits = random_logits(shape, device)
    import torch

    from noisyseg_fast.timing import blobs

    target = torch.from_numpy(blobs((shape[0], *shape[2:]))).to(device)

    def ours(logits: Any, target: Any) -> Any:
        return losses.dice_loss(logits, target, denominator="linear")

    def exact(logits: Any, target: Any) -> Any:
        return reference.dice_loss(logits, target, denominator="linear")

    def plain(logits: Any, target: Any) -> Any:
        p, g = logits.sigmoid(), target.unsqueeze(1).to(logits.dtype)
        overlap, total = ((2 * p * g).flatten(2).sum(2), (p + g).flatten(2).sum(2))
        return (1 - (overlap + 1e-5) / (total + 1e-5)).mean()

    def monai() -> Callable[[], Any]:
        from monai.losses import DiceLoss

        loss = DiceLoss(sigmoid=True)
        return value_and_grad(lambda z, y: loss(z, y.unsqueeze(1)), logits, target)

    return replace(
        base,
        operation="Dice, forward + backward",
        contenders=[*loss_contenders(ours, plain, logits, target), Contender("MONAI", monai)],
        oracle=in_double(exact, logits, target),
    )
