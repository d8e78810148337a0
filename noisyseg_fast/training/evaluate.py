"""How good are the masks: Dice, IoU and HD95 in mm against the raters' consensus, case by case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from .data import MISSING, Array, Case, Data, Loaded, Store
from .files import write_csv
from .model import infer

COLUMNS = ("case", "label", "dice", "iou", "hd95", "empty")


class Score(NamedTuple):
    """One foreground label of one case.

    HD95 is in the spacing's unit: inf where just one of the two masks is empty, nan where both are, and nan where
    the reference lacks labels in places: what is left there has no surface that could be compared.
    """

    case: str
    label: int
    dice: float
    iou: float
    hd95: float
    empty: str  # "", "prediction", "reference" or "both"


class Summary(NamedTuple):
    """Means over cases and labels, of labelled pixels; HD95 where it is finite, and how often it is not.

    dice and iou count an empty prediction of a non-empty reference as 0 and leave out pairs where both are
    empty.
    """

    dice: float
    iou: float
    hd95: float
    masks: int  # compared, that is cases times labels
    empty_predictions: int  # prediction empty, reference not: HD95 infinite
    empty_references: int  # reference empty, prediction not: HD95 infinite
    both_empty: int  # nothing to compare
    partial: int = 0  # the others whose reference lacks labels in places: no HD95

    def sentence(self, unit: str) -> str:
        text = (
            f"Dice {self.dice:.4f}, IoU {self.iou:.4f}, HD95 {self.hd95:.2f} {unit} over {self.masks} masks"
        )
        notes = [
            f"{n} {what}"
            for n, what in (
                (self.empty_predictions, "empty prediction(s)"),
                (self.empty_references, "empty reference(s)"),
                (self.both_empty, "empty in both"),
                (self.partial, "partly labelled"),
            )
            if n
        ]
        return text + (f" (without a finite HD95: {', '.join(notes)})" if notes else "")


def score(
    case: str, prediction: Array, target: Array, spacing: Sequence[float], classes: int = 2
) -> list[Score]:
    """The scores of one case, one for each foreground label. prediction, target: (*S) uint8; where the target is
    MISSING neither counts."""
    known = target != MISSING
    partial = not known.all()
    prediction, target = prediction * known, target * known
    scores = []
    for label in range(1, classes):
        p, t = (np.ascontiguousarray(a == label).view(np.uint8) for a in (prediction, target))
        empty = {(0, 0): "", (1, 0): "prediction", (0, 1): "reference", (1, 1): "both"}[
            (int(not p.any()), int(not t.any()))
        ]
        if empty:
            value = math.nan if empty == "both" else 0.0
            distance = math.nan if empty == "both" or partial else math.inf
            scores.append(Score(case, label, value, value, distance, empty))
            continue
        overlap, distance = metrics.overlap_metrics(p, t), math.nan
        if not partial:
            surface = metrics.surface_metrics(p, t, tuple(spacing), definition="monai", percentile=95)
            distance = float(surface.hd_percentile)
        scores.append(Score(case, label, float(overlap.dice), float(overlap.jaccard), distance, empty))
    return scores


def summarize(scores: Sequence[Score]) -> Summary:
    def mean(values: Sequence[float]) -> float:
        kept = [v for v in values if math.isfinite(v)]
        return float(np.mean(kept)) if kept else math.nan

    empty = [s.empty for s in scores]
    return Summary(
        mean([s.dice for s in scores]),
        mean([s.iou for s in scores]),
        mean([s.hd95 for s in scores]),
        len(scores),
        empty.count("prediction"),
        empty.count("reference"),
        empty.count("both"),
        sum(not s.empty and math.isnan(s.hd95) for s in scores),
    )


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    write_csv(path, COLUMNS, [s._asdict() for s in scores])


def predict_cases(
    predictor: Callable[[Tensor], Tensor],
    cases: Sequence[Case],
    store: Store,
    patch: tuple[int, ...],
    device: torch.device,
    batch_size: int = 16,
) -> Iterator[tuple[Case, Loaded, Array]]:
    """Each case with its predicted label map (*S) uint8.

    Neighbours of the patch's size go through in one batch, others alone, window by window.
    """
    batch: list[tuple[Case, Loaded]] = []

    def flush() -> Iterator[tuple[Case, Loaded, Array]]:
        if batch:
            images = torch.from_numpy(np.stack([loaded.image for _, loaded in batch])).to(device)
            for (case, loaded), mask in zip(
                batch, infer(predictor, images, patch).cpu().numpy(), strict=True
            ):
                yield case, loaded, mask
            batch.clear()

    for case in cases:
        loaded = store.get(case)
        whole = loaded.image.shape[1:] == patch
        if len(batch) == batch_size or not whole:
            yield from flush()
        batch.append((case, loaded))
        if not whole:
            yield from flush()
    yield from flush()


def evaluate(
    predictor: Callable[[Tensor], Tensor],
    cases: Sequence[Case],
    store: Store,
    patch: tuple[int, ...],
    device: torch.device,
    batch_size: int = 16,
    seen: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Predict and score every case; `seen` is called after each."""
    scores: list[Score] = []
    for case, loaded, mask in predict_cases(predictor, cases, store, patch, device, batch_size):
        scores += score(case.id, mask, loaded.target, loaded.spacing, store.classes)
        seen()
    return scores


def pictures(
    predictor: Callable[[Tensor], Tensor],
    data: Data,
    store: Store,
    patch: tuple[int, ...],
    device: torch.device,
    ids: Sequence[str],
    noisy: Callable[[Case], Array | None],
) -> list[dict[str, Any]]:
    """For the report: id, image, clean, noisy and prediction of the named cases, each (H, W) or None; pixels
    without a label are shown as background.

    Of volumes it is the slice along the last axis that shows most of the consensus.
    """
    cases = [case for case in data.split("all") if case.id in set(ids)]
    result = []
    for case, loaded, mask in predict_cases(predictor, cases, store, patch, device, 1):
        target, label = loaded.target * (loaded.target != MISSING), noisy(case)
        planes = [loaded.image[0], target, mask, None if label is None else label * (label != MISSING)]
        if mask.ndim == 3:
            k = int((target > 0).sum((0, 1)).argmax())
            # Of a volume, x runs right and y down.
            planes = [None if a is None else a[..., k].T for a in planes]
        image, clean, prediction, noise = planes
        result.append(
            {"id": case.id, "image": image, "clean": clean, "noisy": noise, "prediction": prediction}
        )
    return result
