"""Statistics over all pixels of a batch, exact, of any number of pixels, with nothing that the host waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of all values that are not NaN, interpolated linearly, as a scalar; NaN of none.

    values: any shape and number (torch.quantile refuses more than 16 million), floating point; 0 <= q <= 1.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q must lie in [0, 1], got {q}")
    ordered = values.detach().flatten().sort().values  # NaN comes last
    last = ordered.numel() - ordered.isnan().sum() - 1
    position = (q * last.double()).clamp(min=0)
    low = position.floor()
    ends = torch.stack([low, position.ceil()]).long()
    low_value, high_value = ordered.gather(0, ends)
    result: Tensor = low_value.lerp(high_value, (position - low).to(ordered.dtype))
    return result


def class_probabilities(logits: Tensor) -> Tensor:
    """(B, C, *S) probabilities; of one channel (sigmoid) those of background and foreground, C = 2."""
    logits = logits.float()
    if logits.shape[1] == 1:
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], 1)
    return logits.softmax(1)


TOLERANCE = 1e-6  # of probabilities, cleanlab's


def confident_joint(probabilities: Tensor, label: Tensor) -> Tensor:
    """How many pixels with the given label i are confidently of class j: counts (C, C) int64 (Northcutt et al.,
    JAIR 2021, eq. 1), as cleanlab 2.9's compute_confident_joint(calibrate=False).

    probabilities (B, C, *S); label (B, *S) class numbers, others (255) are left out. A pixel is confidently of
    class j if p_j reaches the mean p_j of the pixels labelled j; of the most probable class if that holds for
    several; of none, and counted nowhere, if for none. A class without labels has no such pixels. Every
    diagonal count is at least 1.
    """
    p, given = _flat(probabilities, label)
    classes = len(p)
    mine = torch.stack([given == i for i in range(classes)])
    threshold = (p.double() * mine).sum(1) / mine.sum(1)  # NaN without labels, which nothing reaches
    reaches = p >= (threshold.clamp(min=2 * TOLERANCE) - TOLERANCE)[:, None]
    several = reaches.sum(0) > 1
    guess = torch.where(several, p.argmax(0), reaches.int().argmax(0))
    confident = torch.stack([(guess == j) & reaches.any(0) for j in range(classes)])
    counts = torch.stack([(mine[i] & confident).sum(1) for i in range(classes)])
    return torch.maximum(counts, torch.eye(classes, dtype=counts.dtype, device=counts.device))


def label_errors(probabilities: Tensor, label: Tensor, prune: str = "both") -> Tensor:
    """Where confident learning takes the label for wrong: (B, *S) bool, as cleanlab 2.9's find_label_issues with
    filter_by="both", "prune_by_class" or "prune_by_noise_rate" on pixels in a row.

    From the confident joint, scaled so that each row sums to the number of pixels with that label, come the
    numbers n_ij of pixels labelled i that are of class j.  prune="noise_rate": for each i and j the n_ij pixels
    labelled i with the largest p_j - p_i; "class": for each i the sum_j n_ij pixels labelled i with the smallest
    p_i; "both": those in both. Never a pixel whose label is its most probable class. Of pixels that tie, the
    first ones are taken. Equal to cleanlab for two classes; for more, n_ij may differ by 1, as it rounds twice.
    """
    if prune not in ("both", "class", "noise_rate"):
        raise ValueError(f"prune must be both, class or noise_rate, got {prune!r}")
    p, given = _flat(probabilities, label)
    classes = len(p)
    mine = torch.stack([given == i for i in range(classes)])
    sizes = mine.sum(1)
    numbers = _numbers_of_errors(confident_joint(probabilities, label), sizes)
    by_rate = torch.zeros_like(given, dtype=torch.bool)
    by_class = torch.zeros_like(by_rate)
    for i in range(classes):
        for j in range(classes):
            if j != i and prune != "class":
                by_rate |= _largest(p[j] - p[i], mine[i], numbers[i, j])
        if prune != "noise_rate":
            by_class |= _largest(-p[i], mine[i], sizes[i] - numbers[i, i])
    chosen = {"both": by_rate & by_class, "class": by_class, "noise_rate": by_rate}[prune]
    believed = torch.stack([p[i] + TOLERANCE * mine[i] for i in range(classes)]).argmax(0) == given
    # cleanlab leaves a class alone that has one pixel.
    alone = (mine & (sizes <= 1)[:, None]).any(0)
    return (chosen & ~believed & ~alone).view_as(label)


def _flat(probabilities: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return probabilities.detach().movedim(1, 0).flatten(1), label.flatten()


def _numbers_of_errors(counts: Tensor, sizes: Tensor) -> Tensor:
    """The confident joint as whole numbers whose rows sum to sizes, each class keeping a pixel at least."""
    joint = counts.double() * (sizes / counts.sum(1))[:, None]
    numbers = _round_rows(joint)
    diagonal = numbers.diagonal()
    raised = diagonal.clamp(min=1)
    less = (raised - diagonal) / ((numbers != 0).sum(1) - 1).clamp(min=1)
    numbers = (numbers - less[:, None]).clamp(min=0).floor()
    return numbers.diagonal_scatter(raised).long()


def _round_rows(values: Tensor) -> Tensor:
    """Each row rounded so that its sum is that of the row, rounded: the largest remainders go the other way."""
    whole = values.round()
    lacking = values.sum(1, True).round() - whole.sum(1, True)
    rank = (whole - values).argsort(dim=1, stable=True).argsort(1)
    back = (values - whole).argsort(dim=1, stable=True).argsort(1)
    return whole + (rank < lacking).double() - (back < -lacking).double()


def _largest(values: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` (a scalar on the device) largest values among those."""
    order = torch.where(among, values, -torch.inf).argsort(descending=True, stable=True)
    places = torch.arange(len(order), device=order.device)
    return among & torch.zeros_like(among).scatter(0, order, places < count)
