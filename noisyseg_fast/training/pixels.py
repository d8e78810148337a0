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
    return low_value.lerp(high_value, (position - low).to(ordered.dtype))


def class_probabilities(logits: Tensor) -> Tensor:
    """(B, C, *S) probabilities; of one channel (sigmoid) those of background and foreground, C = 2."""
    logits = logits.float()
    if logits.shape[1] == 1:
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], 1)
    return logits.softmax(1)


def confident_joint(probabilities: Tensor, label: Tensor) -> Tensor:
    """How many pixels with the given label i are confidently of class j: counts (C, C) int64 (Northcutt et al.,
    JAIR 2021, eq. 1).

    probabilities (B, C, *S); label (B, *S) class numbers, others (255) are left out. A pixel counts for the
    class of the largest probability among those that reach their threshold, the mean probability of class j
    over the pixels labelled j; a pixel that reaches none counts nowhere. A class without labels has no
    threshold, and no pixel counts for it.
    """
    classes = probabilities.shape[1]
    p = probabilities.detach().movedim(1, 0).flatten(1)  # (C, N)
    given = label.flatten()
    mine = torch.stack([given == i for i in range(classes)])
    sizes = mine.sum(1)
    threshold = (p.double() * mine).sum(1) / sizes  # 0 / 0 is NaN, which nothing reaches
    reaches = p >= (threshold - 1e-6)[:, None]  # cleanlab's tolerance: all may be equally probable
    best = torch.where(reaches, p, -1.0).argmax(0)
    counted = reaches.any(0)
    confident = torch.stack([(best == j) & counted for j in range(classes)])
    rows = [(mine[i] & confident).sum(1) for i in range(classes)]
    return torch.stack(rows)


def label_errors(probabilities: Tensor, label: Tensor, prune: str = "both") -> Tensor:
    """Where confident learning takes the label for wrong: (B, *S) bool (cleanlab's filters of these names).

    From the confident joint, scaled so that each row sums to the number of pixels with that label, come the
    numbers of errors n_ij.  prune="noise_rate": for each i and j the n_ij pixels labelled i with the largest
    p_j - p_i; "class": for each i the sum_j n_ij pixels labelled i with the smallest p_i; "both": those in
    both. Pixels that tie with the last one are taken too, so that the answer does not depend on their order.
    """
    if prune not in ("both", "class", "noise_rate"):
        raise ValueError(f"prune must be both, class or noise_rate, got {prune!r}")
    classes = probabilities.shape[1]
    p = probabilities.detach().movedim(1, 0).flatten(1)
    given = label.flatten()
    mine = [given == i for i in range(classes)]
    counts = confident_joint(probabilities, label).double()
    sizes = torch.stack([m.sum() for m in mine])
    joint = counts * (sizes / counts.sum(1).clamp(min=1))[:, None]
    by_rate = torch.zeros_like(given, dtype=torch.bool)
    by_class = torch.zeros_like(by_rate)
    for i in range(classes):
        others = [j for j in range(classes) if j != i]
        if prune != "class":
            for j in others:
                by_rate |= _largest(p[j] - p[i], mine[i], joint[i, j].round())
        if prune != "noise_rate":
            by_class |= _largest(-p[i], mine[i], joint[i, others].sum().round())
    chosen = {"both": by_rate & by_class, "class": by_class, "noise_rate": by_rate}[prune]
    return chosen.view_as(label)


def _largest(values: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` (a scalar on the device) largest values among those, with all that tie with the last."""
    ordered = torch.where(among, values, -torch.inf).sort(descending=True).values
    last = ordered.gather(0, (count.long() - 1).clamp(min=0).view(1))
    return among & (values >= last) & (count > 0)
