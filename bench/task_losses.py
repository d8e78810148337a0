"""UMA-Net's and DTML's losses, forward + backward, against eager PyTorch and torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from noisyseg_fast.timing import (
    OURS,
    Call,
    Case,
    Contender,
    blobs,
    compiled,
    random_logits,
)

RATERS = 4
SHAPES = [(8, 1, 64, 64), (32, 1, 256, 256), (4, 1, 112, 112, 80)]
HEADLINES = [(32, 1, 256, 256), (4, 1, 112, 112, 80)]


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    """Makers of cases, so that only one case's arrays exist at a time."""
    for shape in SHAPES[:1] if quick else SHAPES:
        yield partial(uncertainty_case, shape, device, headline=shape == HEADLINES[0])
    for shape in SHAPES[:1] if quick else SHAPES:
        yield partial(dual_task_case, shape, device, headline=shape == HEADLINES[1])


def gradients(function: Callable[..., Any], *args: Any) -> Call:
    """The loss, and its gradients with respect to all arguments that want one."""
    import torch

    leaves = [x for x in args if x.requires_grad]

    def call() -> Any:
        loss = function(*args)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return call


def contenders(
    ours: Callable[..., Any], plain: Callable[..., Any], *args: Any, deadline: float = math.inf
) -> list[Contender]:
    def prepare(function: Callable[..., Any]) -> Call:
        return gradients(function, *args)

    return [
        Contender(OURS, partial(prepare, ours)),
        Contender("eager", partial(prepare, plain)),
        compiled(plain, prepare, deadline),
    ]


def in_double(function: Callable[..., Any], *args: Any) -> Call:
    """The oracle: the reference in float64."""
    return gradients(
        function, *(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in args)
    )


def torch_uncertainty(
    logits: Any,
    annotations: Any,
    uncertainty: Any,
    *,
    dice_weight: float = 1.0,
    consistency_weight: float = 1.0,
    raters: Any = None,
    entropy: str = "paper",
    reduction: str = "mean",
) -> tuple[Any, ...]:
    """UMA-Net's terms as one writes them in PyTorch: total, ce, dice, consistency, each the mean or of each image, and
    the scores of each image. raters (B, M): who drew."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    y, p, weight = annotations.to(logits.dtype), logits.sigmoid(), torch.exp(-uncertainty)
    share = None if raters is None else raters / raters.sum(1, keepdim=True)

    def over_raters(x: Any, keepdim: bool = False) -> Any:
        if share is None:
            return x.mean(1, keepdim=keepdim)
        return (x * share.reshape(*share.shape, *(1,) * (x.ndim - 2))).sum(1, keepdim=keepdim)

    regular = over_raters(uncertainty.flatten(2).mean(2)) / 2
    each = binary_cross_entropy_with_logits(logits.expand_as(y), y, reduction="none")
    ce = over_raters((weight * each).flatten(2).mean(2)) + regular
    below = (p**2).flatten(2).sum(2) + (y**2).flatten(2).sum(2) + 1e-5
    dice = over_raters((weight * (p - y) ** 2).flatten(2).sum(2) / below) + regular
    s = (y - uncertainty).abs()
    mean = over_raters(s, keepdim=True)
    variance = over_raters((s - mean) ** 2).flatten(1)
    terms = [ce, dice, variance.mean(1)]
    if reduction == "mean":
        terms = [term.mean() for term in terms]
    total = terms[0] + dice_weight * terms[1] + consistency_weight * terms[2]
    with torch.no_grad():
        star = mean.flatten(1)
        agreement = 4 * variance.sum(1) / star.sum(1)
        if entropy == "binary":
            confidence = -(torch.xlogy(star, star) + torch.xlogy(1 - star, 1 - star)).mean(1)
        else:
            confidence = -torch.xlogy(star, star).sum(1) / star.sum(1)
    return total, *terms, confidence, agreement


def torch_uncertainty_total(logits: Any, annotations: Any, uncertainty: Any) -> Any:
    total, *_, confidence, agreement = torch_uncertainty(logits, annotations, uncertainty)
    # 0 times: so that torch.compile computes the scores too
    return total + 0 * (confidence + agreement).sum()


def torch_dual_task(
    logits: Any,
    sdf: Any,
    target: Any,
    *,
    k: float = 1500.0,
    labelled: int | None = None,
    routing: str = "own",
    mask: Any = None,
) -> tuple[Any, Any, Any]:
    """DTML's losses as its code has them: of the segmentation and the mask, of the first `labelled` images, and the
    consistency of all. mask: the pixels that count."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    y, p, t = target.unsqueeze(1).to(logits.dtype), logits.sigmoid(), (-k * sdf).sigmoid()
    keep = None if mask is None else mask.reshape(logits.shape)

    def mean(x: Any, keep: Any) -> Any:
        return x.mean() if keep is None else (keep * x).sum() / keep.sum()

    n = len(logits) if labelled is None else labelled
    known = None if keep is None else keep[:n]
    y = y[:n] if known is None else y[:n] * known

    def dice(x: Any) -> Any:
        x = x[:n] if known is None else x[:n] * known
        return 1 - (2 * (x * y).sum() + 1e-5) / ((x * x).sum() + (y * y).sum() + 1e-5)

    ce = mean(binary_cross_entropy_with_logits(logits[:n], y, reduction="none"), known)
    left, right = (p, t.detach()) if routing == "logits" else (p.detach(), t) if routing == "sdf" else (p, t)
    consistency = mean((left - right) ** 2, keep)
    if routing == "shared":
        consistency = 2 * consistency - consistency.detach()
    return 0.5 * (ce + dice(p)), dice(t), consistency


def uncertainty_case(
    shape: Sequence[int], device: str = "cpu", *, deadline: float = math.inf, headline: bool = False
) -> Case:
    """uncertainty_weighted_loss; logits (B, 1, *S), uncertainty (B, 4, *S) float32, annotations uint8."""
    import torch

    from noisyseg_fast import reference
    from noisyseg_fast.task_losses import uncertainty_weighted_loss

    random = torch.Generator().manual_seed(1)
    several = (shape[0], RATERS, *shape[2:])
    logits = random_logits(shape, device)
    sigma = torch.rand(several, generator=random).to(device).requires_grad_()
    y = torch.from_numpy(blobs(several)).to(device)
    return Case(
        family="task_losses",
        operation=f"UMA-Net loss, M = {RATERS}, forward + backward",
        input="x".join(map(str, shape)),
        contenders=contenders(
            lambda z, y, u: uncertainty_weighted_loss(z, y, u).total,
            torch_uncertainty_total,
            logits,
            y,
            sigma,
            deadline=deadline,
        ),
        oracle=in_double(lambda z, y, u: reference.uncertainty_weighted_loss(z, y, u)[0], logits, y, sigma),
        tolerance=1e-5,
        moved=logits.numel() * (12 + 14 * RATERS),  # all inputs twice, two gradients once
        work={"exp": 2 * logits.numel(), "div": 2 * logits.numel()},
        autograd=True,
        device=device,
        headline=headline,
    )


def dual_task_case(
    shape: Sequence[int], device: str = "cpu", *, deadline: float = math.inf, headline: bool = False
) -> Case:
    """dual_task_loss; logits and distance map (B, 1, *S) float32, labels (B, *S) uint8."""
    import torch

    from noisyseg_fast import reference
    from noisyseg_fast.task_losses import dual_task_loss

    def of(module: Callable[..., Any]) -> Callable[..., Any]:
        def total(z: Any, d: Any, y: Any) -> Any:
            seg, mask, consistency = module(z, d, y)
            return seg + mask + 0.1 * consistency

        return total

    random = torch.Generator().manual_seed(1)
    logits = random_logits(shape, device)
    sdf = (0.05 * torch.randn(tuple(shape), generator=random)).to(device).requires_grad_()
    target = torch.from_numpy(blobs((shape[0], *shape[2:]))).to(device)
    return Case(
        family="task_losses",
        operation="dual-task loss, forward + backward",
        input="x".join(map(str, shape)),
        contenders=contenders(
            of(dual_task_loss), of(torch_dual_task), logits, sdf, target, deadline=deadline
        ),
        oracle=in_double(of(reference.dual_task_loss), logits, sdf, target),
        tolerance=1e-5,
        moved=26 * logits.numel(),  # both maps and the labels twice, two gradients once
        work={"exp": 4 * logits.numel(), "div": 4 * logits.numel()},  # a sigmoid of each map, in both passes
        autograd=True,
        device=device,
        headline=headline,
    )
