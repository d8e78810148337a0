"""How good are the masks: Dice, IoU, HD95 and ASD against the raters' consensus, case by case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from . import resample
from .data import MISSING, Array, Case, Data, Loaded, Store
from .files import write_csv
from .model import infer

COLUMNS = ("case", "label", "dice", "iou", "hd95", "asd", "hd95_voxels", "asd_voxels", "empty")


class Score(NamedTuple):
    """One foreground label of one case.

    HD95, and ASD, the mean distance of the prediction's surface from the reference's (as in MedPy, with which the Left
    Atrium papers measure), are in the spacing's unit and in voxels: inf where just one of the two masks is empty,
    nan where both are, and nan where the reference lacks labels in places: what is left there has no surface that
    could be compared.
    """

    case: str
    label: int
    dice: float
    iou: float
    hd95: float
    asd: float
    hd95_voxels: float
    asd_voxels: float
    empty: str  # "", "prediction", "reference" or "both"


class Summary(NamedTuple):
    """Means over cases and labels, of labelled pixels; HD95 and ASD where they are finite, and how often they are not.

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
    asd: float = math.nan
    hd95_voxels: float = math.nan
    asd_voxels: float = math.nan
    partial: int = 0  # the others whose reference lacks labels in places: no HD95

    def sentence(self, unit: str) -> str:
        text = (
            f"Dice {self.dice:.4f}, IoU {self.iou:.4f}, HD95 {self.hd95:.2f} {unit}, ASD {self.asd:.2f} {unit} "
            f"over {self.masks} masks"
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
            none = math.nan if empty == "both" or partial else math.inf
            scores.append(Score(case, label, value, value, none, none, none, none, empty))
            continue
        overlap = metrics.overlap_metrics(p, t)
        distances = (math.nan, math.nan, math.nan, math.nan)
        if not partial:
            here, voxels = (
                metrics.surface_metrics(p, t, unit, definition="monai", percentile=95)
                for unit in (tuple(spacing), None)
            )
            of_voxels = float(voxels.hd_percentile), float(voxels.asd)
            distances = (float(here.hd_percentile), float(here.asd), *of_voxels)
        scores.append(Score(case, label, float(overlap.dice), float(overlap.jaccard), *distances, empty))
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
        mean([s.asd for s in scores]),
        mean([s.hd95_voxels for s in scores]),
        mean([s.asd_voxels for s in scores]),
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
    """Predict and score every case, on its own grid where the store resamples; `seen` is called after each."""
    scores: list[Score] = []
    for case, loaded, mask in predict_cases(predictor, cases, store, patch, device, batch_size):
        target, spacing = loaded.own or (loaded.target, loaded.spacing)
        mask = resample.resample_label(mask, target.shape)
        scores += score(case.id, mask, target, spacing, store.classes)
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
