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
    for shape in HEADLINES[:1] if quick else SHAPES:
        yield partial(uncertainty_case, shape, device, headline=shape == HEADLINES[0])
    for shape in HEADLINES[1:] if quick else SHAPES:
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


def torch_uncertainty(logits: Any, annotations: Any, uncertainty: Any) -> Any:
    """UMA-Net's total as one writes it in PyTorch, the scores included."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    y, p, weight = annotations.to(logits.dtype), logits.sigmoid(), torch.exp(-uncertainty)
    regular = uncertainty.mean() / 2
    each = binary_cross_entropy_with_logits(logits.expand_as(y), y, reduction="none")
    ce = (weight * each).mean() + regular
    below = (p**2).flatten(2).sum(2) + (y**2).flatten(2).sum(2) + 1e-5
    dice = ((weight * (p - y) ** 2).flatten(2).sum(2) / below).mean() + regular
    s = (y - uncertainty).abs()
    mean = s.mean(1, keepdim=True)
    consistency = ((s - mean) ** 2).mean()
    with torch.no_grad():
        star = mean.flatten(1)
        confidence = -torch.xlogy(star, star).sum(1) / star.sum(1)
        agreement = 4 * s.var(1, correction=0).flatten(1).sum(1) / star.sum(1)
    # 0 times: so that torch.compile computes the scores too
    return ce + dice + consistency + 0 * (confidence + agreement).sum()


def torch_dual_task(logits: Any, sdf: Any, target: Any) -> Any:
    """DTML's losses as its code has them, all images labelled, weight 0.1 for the consistency."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    y, p, t = target.unsqueeze(1).to(logits.dtype), logits.sigmoid(), (-1500 * sdf).sigmoid()

    def dice(x: Any) -> Any:
        return 1 - (2 * (x * y).sum() + 1e-5) / ((x * x).sum() + (y * y).sum() + 1e-5)

    seg = 0.5 * (binary_cross_entropy_with_logits(logits, y) + dice(p))
    return seg + dice(t) + 0.1 * ((p - t) ** 2).mean()


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
            torch_uncertainty,
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
        contenders=contenders(of(dual_task_loss), torch_dual_task, logits, sdf, target, deadline=deadline),
        oracle=in_double(of(reference.dual_task_loss), logits, sdf, target),
        tolerance=1e-5,
        moved=26 * logits.numel(),  # both maps and the labels twice, two gradients once
        work={"exp": 4 * logits.numel(), "div": 4 * logits.numel()},  # a sigmoid of each map, in both passes
        autograd=True,
        device=device,
        headline=headline,
    )
