"""How well a method's pixel weights find the labels that are wrong, where the right ones are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .data import Array, Case, TrainingSet
from .methods import Method

MOST_PIXELS = 1 << 20  # that are ranked: 256 images of 64x64


class Found(NamedTuple):
    """1 - weight as a detector of wrong labels, over all pixels of the training cases that were looked at."""

    auroc: (
        float  # the chance that a wrong label weighs less than a right one; 0.5 for weights that know nothing
    )
    average_precision: float  # `share` for weights that know nothing
    share: float  # of the labels that are wrong
    weight_wrong: float  # mean weight of the wrong labels
    weight_right: float
    cases: int


def auroc(score: Array, positive: Array) -> float:
    """Area under the ROC curve, exact with ties (half a win each); nan unless there are both kinds.

    score (n,) numbers, positive (n,) bool.
    """
    wins, losses, _ = _counts(score, positive)
    below = np.cumsum(losses[::-1])[::-1] - losses  # negatives of a lower score
    pairs = float(wins.sum()) * float(losses.sum())
    return float((wins * (below + 0.5 * losses)).sum() / pairs) if pairs else float("nan")


def average_precision(score: Array, positive: Array) -> float:
    """Mean precision over the positives, each taken at its own score as threshold (so ties come in together):
    sum of (recall step) * precision; nan without positives.
    """
    wins, _, sizes = _counts(score, positive)
    if not wins.sum():
        return float("nan")
    precision = np.cumsum(wins) / np.cumsum(sizes)
    return float((wins * precision).sum() / wins.sum())


def _counts(score: Array, positive: Array) -> tuple[Array, Array, Array]:
    """Positives, negatives and all of each distinct score, the highest first."""
    _, place = np.unique(score, return_inverse=True)
    sizes = np.bincount(place)[::-1].astype(np.float64)
    wins = np.bincount(place, weights=positive.astype(np.float64))[::-1]
    return wins, sizes - wins, sizes


def find(
    method: Method, training: TrainingSet, device: torch.device, batch_size: int, ids: Sequence[str] = ()
) -> tuple[Found, list[dict[str, Any]]] | None:
    """What the weights of the training labels tell of those that were corrupted, and pictures of the named cases;
    None for a method without weights, or where nothing was corrupted.

    A picture: id, image, clean, noisy and weight, each (H, W), the middle of what the label shows of a volume.
    """
    corrupted = np.flatnonzero(training.radii)
    if not len(corrupted):
        return None
    training.epoch = 0  # which clean cases come along must not depend on where the run stands
    pixels = int(np.prod(training.patch))
    most = max(1, min(len(training), MOST_PIXELS // pixels))
    chosen = np.unique(np.linspace(0, len(training) - 1, most).astype(int)).tolist()
    named = {i for i, case in enumerate(training.cases) if case.id in set(ids)}
    chosen += sorted(named - set(chosen))
    scores, wrong, pictures = [], [], []
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size]
        items = [_with_meta(training, training.probe(i)) for i in indices]
        batch: Any = _moved(torch.utils.data.default_collate(items), device)
        weights = method.pixel_weights(batch)
        if weights is None:
            return None
        found = weights.detach().float().cpu().numpy()
        errors = (batch["label"] != batch["clean"]).cpu().numpy()
        scores.append(1 - found.reshape(-1))
        wrong.append(errors.reshape(-1))
        pictures += [
            _picture(training.cases[i], item, weight)
            for i, item, weight in zip(indices, items, found, strict=True)
            if i in named
        ]
    score, positive = np.concatenate(scores), np.concatenate(wrong)
    right, bad = (float(1 - score[p].mean()) if p.any() else float("nan") for p in (~positive, positive))
    result = Found(
        auroc(score, positive),
        average_precision(score, positive),
        float(positive.mean()),
        bad,
        right,
        len(chosen),
    )
    return result, pictures


def explained(
    method: Method,
    training: TrainingSet,
    device: torch.device,
    batch_size: int,
    most: int = 48,
    shown: int = 6,
) -> list[dict[str, Any]]:
    """What the method makes of the labels of some training cases, evenly spread; empty for most methods.

    Mappings with id, facts and, for as many as are shown, image (H, W) and maps (name -> (n, H, W), the middle of what
    the label shows of a volume).
    """
    chosen = np.unique(np.linspace(0, len(training) - 1, min(most, len(training))).astype(int)).tolist()
    pictured = {chosen[i] for i in np.linspace(0, len(chosen) - 1, min(shown, len(chosen))).astype(int)}
    found: list[dict[str, Any]] = []
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size]
        items = [training.probe(i) for i in indices]
        seen = method.explain(_moved(torch.utils.data.default_collate(items), device))
        if seen is None:
            return []
        for i, item, one in zip(indices, items, seen, strict=True):
            entry: dict[str, Any] = {"id": training.cases[i].id, "facts": one.facts}
            if i in pictured:
                planes = {"image": item["image"][0].numpy()}
                planes |= {name: maps.detach().float().cpu().numpy() for name, maps in one.maps.items()}
                if item["label"].ndim == 3:
                    k = int((item["label"] > 0).sum((0, 1)).argmax())
                    planes = {name: np.swapaxes(a[..., k], -1, -2) for name, a in planes.items()}
                entry |= {"image": planes.pop("image"), "maps": planes}
            found.append(entry)
    return found


def _with_meta(training: TrainingSet, item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "meta": training.meta_item(item["index"])} if training.meta else item


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    return batch.to(device)


def _picture(case: Case, item: dict[str, Any], weight: Array) -> dict[str, Any]:
    planes = [item["image"][0].numpy(), item["clean"].numpy(), item["label"].numpy(), weight]
    if weight.ndim == 3:
        k = int((planes[2] > 0).sum((0, 1)).argmax())
        planes = [a[..., k].T for a in planes]
    return {"id": case.id, **dict(zip(("image", "clean", "noisy", "weight"), planes, strict=True))}
