"""Quantiles, the k largest and confident learning against sorting, NumPy and cleanlab."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from noisyseg_fast import pixels, reference
from noisyseg_fast.timing import OURS, Call, Case, Contender, Skipped, compiled

SIZES = (100_000, 16_000_000, 64_000_000)  # torch.quantile takes 2^24 at most
IMAGES = ((16, 2, 256, 256), (4, 2, 112, 112, 80))  # (B, C, *S)
Q, SHARE = 0.9, 0.1


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    for size in SIZES[:1] if quick else SIZES:
        deadline = 0.0 if quick or size > SIZES[0] else math.inf
        yield partial(quantile_case, size, device, deadline)
        yield partial(topk_case, size, device, deadline)
    for shape in IMAGES[:1] if quick else IMAGES:
        yield partial(errors_case, shape, device)


def losses(size: int, device: str) -> Any:
    """Cross-entropies of as many pixels, most of them small: float32."""
    import torch

    random = torch.Generator().manual_seed(0)
    return torch.nn.functional.softplus(2 * torch.randn(size, generator=random) - 3).to(device)


def quantile_case(size: int, device: str, deadline: float) -> Case:
    import torch

    x = losses(size, device)

    def by_sorting(x: Any) -> Any:
        ordered = x.sort().values
        position = Q * (len(ordered) - 1)
        low = int(position)
        return ordered[low].lerp(ordered[min(low + 1, len(ordered) - 1)], position - low)

    def torch_quantile() -> Call:
        if size > 1 << 24:
            raise Skipped("takes at most 16 million values")
        return lambda: torch.quantile(x, Q)

    def numpy_quantile() -> Call:
        host = x.cpu().numpy()
        return lambda: np.quantile(host, Q)

    contenders = [
        Contender(OURS, lambda: lambda: pixels.quantile(x, Q)),
        Contender("eager", torch_quantile),
        compiled(by_sorting, lambda function: lambda: function(x), deadline),
        Contender("sort", lambda: lambda: by_sorting(x)),
        Contender("kthvalue", lambda: lambda: torch.kthvalue(x, round(Q * (size - 1)) + 1).values),
        Contender("NumPy", numpy_quantile),
    ]
    return _case(f"quantile {Q:g}", str(size), device, contenders, "NumPy", 4 * size)


def topk_case(size: int, device: str, deadline: float) -> Case:
    """The mask of the k largest; of equal values torch takes any."""
    import torch

    x, k = losses(size, device), round(SHARE * size)

    def by_topk(x: Any) -> Any:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device).scatter(0, x.topk(k).indices, True)

    def by_partition() -> Call:
        host = x.cpu().numpy()

        def call() -> Any:
            mask = np.zeros(size, bool)
            mask[np.argpartition(host, size - k)[size - k :]] = True
            return mask

        return call

    contenders = [
        Contender(OURS, lambda: lambda: pixels.topk_mask(x, k), _differing),
        Contender("eager", lambda: lambda: by_topk(x), _differing),
        compiled(by_topk, lambda function: lambda: function(x), deadline),
        Contender("NumPy", by_partition, _differing),
    ]
    return _case(f"mask of the {SHARE:.0%} largest", str(size), device, contenders, "eager", 5 * size)


def errors_case(shape: Sequence[int], device: str) -> Case:
    """A fifth of the labels drawn anew."""
    import torch

    random = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(*shape, generator=random)).softmax(1)
    label = p.argmax(1)
    wrong = torch.rand(label.shape, generator=random) < 0.2
    label = torch.where(wrong, torch.randint(shape[1], label.shape, generator=random), label).byte()
    p, label = p.to(device), label.to(device)

    def cleanlab() -> Call:
        from cleanlab.filter import find_label_issues

        y = label.cpu().numpy().ravel()
        rows = np.ascontiguousarray(p.movedim(1, -1).flatten(0, -2).cpu().numpy())
        return lambda: find_label_issues(y, rows, filter_by="both", n_jobs=1)

    contenders = [
        Contender(OURS, lambda: lambda: pixels.label_errors(p, label), _differing),
        Contender("eager", lambda: lambda: reference.label_errors(p, label), _differing),
        compiled(
            reference.label_errors,
            lambda function: lambda: function(p, label),
            time.perf_counter() - 1,  # how many values are indexed is data: nothing to compile
        ),
        Contender("cleanlab", cleanlab, _differing),
    ]
    moved = label.numel() * (4 * shape[1] + 2)
    return _case("label errors", "x".join(map(str, shape)), device, contenders, "eager", moved, headline=True)


def _differing(answer: Any, expected: Any) -> float:
    """The share of pixels that differ."""
    a, b = (np.asarray(x.cpu() if hasattr(x, "cpu") else x).ravel() for x in (answer, expected))
    return float((a != b).mean())


def _case(
    operation: str,
    size: str,
    device: str,
    contenders: Sequence[Contender],
    oracle: str,
    moved: int,
    *,
    headline: bool = False,
) -> Case:
    return Case(
        family="pixels",
        operation=operation,
        input=size,
        contenders=contenders,
        oracle=oracle,
        tolerance=1e-5,
        moved=moved,
        device=device,
        headline=headline,
    )
