"""A validation pass over 20 volumes: Dice, HD95 and average surface distance of each class from the network's logits,
ours and as people write it with MONAI's metric classes and with MedPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from noisyseg_fast import metrics
from noisyseg_fast.timing import OURS, Call, Case, Contender, blobs, relative_error

VOLUMES, CLASSES, SIZE = 20, 3, (64, 64, 32)
SPACING = (1.0, 1.0, 2.0)


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    yield partial(pass_case, 2 if quick else VOLUMES, (32, 32, 16) if quick else SIZE, device)


def volumes(count: int, size: Sequence[int], device: str) -> list[tuple[Any, Any]]:
    """(logits (1, C, *S) float32, labels (1, *S) uint8) of each volume; the logits are wrong near the edges."""
    import torch

    labels = np.zeros((count, *size), np.uint8)
    for c in range(1, CLASSES):
        labels[blobs((count, *size), c, 0.15) != 0] = c
    shifted = torch.from_numpy(np.roll(labels, (2, 1, 1), (1, 2, 3))).long()
    random = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        one_hot = torch.nn.functional.one_hot(shifted[i], CLASSES).movedim(-1, 0)[None]
        logits = 4 * one_hot + torch.randn(one_hot.shape, generator=random) / 4
        found.append((logits.to(device), torch.from_numpy(labels[i : i + 1]).to(device)))
    return found


def pass_case(count: int, size: Sequence[int], device: str = "cpu", *, headline: bool = True) -> Case:
    """Answers: (volumes, 3, C - 1): Dice, HD95, ASSD of the foreground classes."""
    import torch

    cohort = volumes(count, size, device)

    def ours() -> Call:
        def one(logits: Any, labels: Any) -> Any:
            dice = metrics.overlap_metrics(logits, labels, include_background=False).dice
            found = metrics.surface_metrics(
                logits.argmax(1),
                labels,
                SPACING,
                num_classes=CLASSES,
                include_background=False,
                spatial_dims=3,
            )
            return torch.stack([dice[0].double(), found.hd_percentile[0].double(), found.assd[0].double()])

        return lambda: torch.stack([one(*volume) for volume in cohort])

    def monai() -> Call:
        from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDistanceMetric
        from monai.networks.utils import one_hot

        def call() -> Any:
            kinds = (
                DiceMetric(include_background=False, reduction="none"),
                HausdorffDistanceMetric(include_background=False, percentile=95, reduction="none"),
                SurfaceDistanceMetric(include_background=False, symmetric=True, reduction="none"),
            )
            for logits, labels in cohort:
                pred = one_hot(logits.argmax(1, keepdim=True), CLASSES)
                target = one_hot(labels[:, None], CLASSES)
                kinds[0](pred, target)
                for kind in kinds[1:]:
                    kind(pred, target, spacing=SPACING)
            return torch.stack([kind.aggregate().double() for kind in kinds], 1)

        return call

    def medpy() -> Call:
        from medpy.metric import binary

        def call() -> Any:
            rows = []
            for logits, labels in cohort:
                pred, target = logits.argmax(1)[0].cpu().numpy(), labels[0].cpu().numpy()
                pairs = [(pred == c, target == c) for c in range(1, CLASSES)]
                rows.append(
                    [
                        [binary.dc(*pair) for pair in pairs],
                        [binary.hd95(*pair, voxelspacing=SPACING) for pair in pairs],
                        [binary.assd(*pair, voxelspacing=SPACING) for pair in pairs],
                    ]
                )
            return np.array(rows)

        return call

    def only_dice(answer: Any, expected: Any) -> float:
        """MedPy defines surfaces and percentiles otherwise."""
        return relative_error(np.asarray(answer)[:, 0], np.asarray(expected)[:, 0])

    return Case(
        family="validation",
        operation="validation pass, Dice, HD95, ASSD",
        input=f"{count} volumes {CLASSES}x" + "x".join(map(str, size)),
        contenders=[Contender(OURS, ours), Contender("MONAI", monai), Contender("MedPy", medpy, only_dice)],
        oracle="MONAI",
        tolerance=1e-5,
        moved=sum(z.nbytes + y.nbytes for z, y in cohort),
        device=device,
        headline=headline,
    )
