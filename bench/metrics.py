"""Surface and overlap metrics against MONAI, MedPy, DeepMind's surface-distance, torch, and distance transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from noisyseg_fast import metrics
from noisyseg_fast.timing import (
    OURS,
    Call,
    Case,
    Contender,
    blobs,
    compiled,
    on_device,
    pair,
    random_logits,
    surface_case,
)

SHAPES = [(128, 64, 64), (1, 112, 112, 80), (8, 512, 512), (1, 512, 512, 150)]
CELLS = [(1, 112, 112, 80), (1, 256, 256, 100)]
CLASSES = [(4, 4, 112, 112, 80), (30, 2, 512, 512), (2, 14, 64, 64, 64)]


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    for shape in SHAPES[1:2] if quick else SHAPES:
        yield partial(surface_case, shape, device, headline=True, deadline=0.0 if quick else float("inf"))
    for shape in CELLS[:1] if quick else CELLS:
        yield partial(cells_case, shape, device)
    for shape in CLASSES[:1] if quick else CLASSES:
        yield partial(labels_case, shape, device)
        yield partial(logits_case, shape, device, float("inf") if not quick else 0.0)


def cells_case(shape: Sequence[int], device: str) -> Case:
    """All metrics in DeepMind's definition: hd, hd95, asd and nsd within 1, of areas of contours."""
    pred, target = pair(shape)

    def ours() -> Call:
        p, t = (on_device(x, device) for x in (pred, target))

        def call() -> Any:
            m = metrics.surface_metrics(p, t, spatial_dims=p.ndim - 1, definition="deepmind")
            return m.hd, m.hd_percentile, m.asd, m.asd_target, m.nsd

        return call

    def deepmind() -> Call:
        from surface_distance import metrics as peer

        def one(p: Any, t: Any) -> Any:
            found = peer.compute_surface_distances(t != 0, p != 0, (1.0,) * t.ndim)
            back, there = peer.compute_average_surface_distance(found)
            hd, hd95 = (peer.compute_robust_hausdorff(found, q) for q in (100, 95))
            return hd, hd95, there, back, peer.compute_surface_dice_at_tolerance(found, 1.0)

        return lambda: one(pred[0], target[0])

    return Case(
        family="metrics",
        operation="surface metrics, cells",
        input="x".join(map(str, shape)),
        contenders=[Contender(OURS, ours), Contender("DeepMind", deepmind)],
        oracle="DeepMind",
        tolerance=1e-6,
        moved=2 * pred.size,
        device=device,
    )


def labels_case(shape: Sequence[int], device: str) -> Case:
    """All overlap metrics of uint8 label images (B, *S) of C classes, shape (B, C, *S)."""
    pred, target = _labels(shape, device)
    classes = shape[1]

    def ours() -> Call:
        return lambda: metrics.overlap_metrics(
            pred, target, num_classes=classes, spatial_dims=len(shape) - 2
        )[:5]

    contenders = [Contender(OURS, ours), *_torch(pred, target, classes, device)]
    return _overlap_case("overlap metrics, labels", shape, device, contenders, 2 * pred.numel())


def logits_case(shape: Sequence[int], device: str, deadline: float) -> Case:
    """The same of logits (B, C, *S) float32."""
    logits = random_logits(tuple(shape), device)
    logits = logits.detach()
    _, target = _labels(shape, device)
    contenders = [
        Contender(OURS, lambda: lambda: metrics.overlap_metrics(logits, target)[:5]),
        *_torch(logits, target, shape[1], device, deadline),
    ]
    moved = 4 * logits.numel() + target.numel()
    return _overlap_case("overlap metrics, logits", shape, device, contenders, moved)


def _overlap_case(
    operation: str, shape: Sequence[int], device: str, contenders: Sequence[Contender], moved: int
) -> Case:
    return Case(
        family="metrics",
        operation=operation,
        input="x".join(map(str, shape)),
        contenders=contenders,
        oracle="eager",
        tolerance=1e-6,
        moved=moved,
        device=device,
    )


def _labels(shape: Sequence[int], device: str) -> Any:
    """uint8 (B, *S): blobs of one class after another, and the same with some voxels of the next class."""
    import torch

    size = (shape[0], *shape[2:])
    target = torch.zeros(size, dtype=torch.uint8)
    for c in range(1, shape[1]):
        target[torch.from_numpy(blobs(size, c)) != 0] = c
    other = torch.from_numpy(blobs(size, 99, 0.05)) != 0
    pred = torch.where(other, (target + 1) % shape[1], target).to(torch.uint8)
    return pred.to(device), target.to(device)


def _torch(
    pred: Any, target: Any, classes: int, device: str, deadline: float = float("inf")
) -> list[Contender]:
    import torch

    def eager(pred: Any, target: Any) -> Any:
        labels = pred.argmax(1) if pred.is_floating_point() else pred
        n = labels[0].numel()
        p = torch.nn.functional.one_hot(labels.long(), classes).flatten(1, -2)
        t = torch.nn.functional.one_hot(target.long(), classes).flatten(1, -2)
        tp, ps, ts = ((x.sum(1)).double() for x in (p * t, p, t))
        return 2 * tp / (ps + ts), tp / (ps + ts - tp), tp / ts, (n - ps - ts + tp) / (n - ts), tp / ps

    def prepare(function: Callable[..., Any]) -> Call:
        return lambda: function(pred, target)

    return [Contender("eager", partial(prepare, eager)), compiled(eager, prepare, deadline)]
