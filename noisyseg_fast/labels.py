"""Fusing the masks that several raters drew of one image, and how far the raters agree. CPU or CUDA, batched.

annotations: (M, *S) or (B, M, *S), M raters; torch, NumPy, CuPy or DLPack, any strides. How many axes are space says
`spatial_dims`; None: arrays of up to 4 dimensions are (M, *S), of more (B, M, *S), unless `present` has two
axes, which means a batch; (1, n, h, w) could be either and is refused. Without num_classes they are masks, and whatever is not 0 is object; with num_classes=C
(2 to 255) images of labels 0 to C - 1, and any other label is no vote. bool, uint8, int32, int64; soft_average and
label_sampling take floats too.

Raters may be missing: `present`, (M,) or (B, M), is not 0 where a rater's mask counts; `missing` is a value that marks
pixels without a vote. What is not there is left out of every sum.

The votes on a pixel form a pattern, of which an image has few (at most 2^M for masks). One pass over the image counts
them, everything iterative works on the counts, a last pass looks the results up. So an iteration costs microseconds
and all counts are exact integers; results are the same bits for any number of threads. With CUDA arrays nothing waits
for the device, but: simple, rater_scores and agreement read the counts on the host; so does staple above 65,536
possible patterns; and what is given on the host (present, weights, prior) must be copied. Results are new arrays of
the annotations' kind, on their device, without gradients. Definitions: `noisyseg_fast.reference`.

Raises TypeError for dtypes and kinds of arrays, ValueError for shapes and options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import _arrays, _core

MAX_CLASSES = 255  # VoteOptions in csrc/include/noisyseg/labels.h
_DIRECT = 1 << 16  # patterns up to which a table has a place for each
_MOST = 1 << 62
_TIES = ("lowest", "highest")  # after Tie::value in csrc/include/noisyseg/labels.h
_HUGE = 4 << 20

HostArray = np.ndarray[Any, Any]


class Staple(NamedTuple):
    """STAPLE's estimate; shapes for (B, M, *S), without B for (M, *S). Rates are float64."""

    posterior: Any  # (B, *S) P(object | votes); with num_classes (B, C, *S) P(label | votes)
    sensitivity: Any  # (B, M); with num_classes (B, M, C), each label against the rest
    specificity: Any  # as sensitivity
    labels: Any  # (B, *S) uint8, the likeliest label, the lowest of equals
    iterations: Any  # (B,) int32
    converged: Any  # (B,) bool
    performance: Any  # (B, M, C, C), P(the rater says r | the truth is t) at [m, t, r]; C = 2 for masks


class Simple(NamedTuple):
    """SIMPLE's estimate; shapes for (B, M, *S), without B for (M, *S)."""

    labels: Any  # (B, *S) in the annotations' dtype
    selected: Any  # (B, M) bool, the raters that were kept
    weights: Any  # (B, M) float64, their last Dice; 0 for the others
    iterations: Any  # (B,) int32


class RaterScores(NamedTuple):
    """float64 (B, M) or, with num_classes, (B, M, C): each label against the rest. NaN for raters without a vote."""

    sensitivity: Any
    specificity: Any
    dice: Any


class Agreement(NamedTuple):
    """float64; without B for (M, *S)."""

    dice: Any  # (B, M, M) or, with num_classes, (B, M, M, C); NaN for two raters without a common pixel
    fleiss_kappa: Any  # (B,)
    krippendorff_alpha: Any  # (B,)


# ---- fusion ---------------------------------------------------------------------------------------


def majority_vote(
    annotations: Any,
    *,
    tie: int | str = 0,
    num_classes: int | None = None,
    present: Any = None,
    missing: int | None = None,
    spatial_dims: int | None = None,
) -> Any:
    """The label most raters gave each pixel: (B, *S) or (*S) in the annotations' dtype, masks as 0 and 1.

    tie: the label where several have most votes, which may be one that does not occur otherwise (255); or "lowest" or
    "highest" of those. Pixels without any vote get tie too, 0 for "lowest" and "highest".

    Extra memory: 1 byte per pixel of uint8 annotations, the result's.
    """
    v = _votes(annotations, present, num_classes, missing, spatial_dims)
    rule, value = _tie(tie, v.space.dtype(annotations), num_classes is None)
    slots = v.patterns if v.patterns <= _DIRECT else 0
    out = _image(v.space, (v.batch, *v.size), v.space.dtype(annotations))
    work = v.space.empty((_core.majority_vote_workspace(slots, v.space.exec),), "uint8")
    _core.majority_vote(
        v.view, v.present, v.options, rule, value, slots, v.space.view(out), v.space.view(work), v.space.exec
    )
    return v.back(out)


def staple(
    annotations: Any,
    *,
    max_iter: int = 10_000,
    tol: float = 1e-7,
    prior: float | Sequence[float] | None = None,
    num_classes: int | None = None,
    present: Any = None,
    missing: int | None = None,
    spatial_dims: int | None = None,
    dtype: Any = "float32",
) -> Staple:
    """Simultaneous truth and performance level estimation: EM for the true mask and each rater's error rates.

    Warfield, Zou, Wells, IEEE TMI 23(7):903, 2004. The conventions are those of SimpleITK's STAPLEImageFilter, whose
    numbers these are for masks; for label images they are the same (its MultiLabelSTAPLE is the same model with
    another start, a coarser stopping rule and single precision). The start is the share of raters that marked a
    pixel, the prior the share of all votes, held fixed: so results depend on how much background the image has.

    Extra memory: 6 bytes per pixel of masks: the posterior's (8 in float64), the labels' and the pattern's number.

    Args:
        max_iter: iterations at most (converged says whether they sufficed; real raters took up to 8,000, where most
            of them marked nothing).
        tol: stop when no rate changes by more in one iteration.
        prior: P(object), or with num_classes P(label) for each, in place of the share of all votes.
        dtype: of the posterior, float32 or float64. EM itself runs in double precision.

    Nothing is NaN but the rates of raters without a vote: where nobody marked anything the posterior is 0 and all
    rates are 1 (a truth that does not occur was never missed; SimpleITK gives NaN). On CUDA nothing waits for the
    device, as long as there are at most 65,536 possible patterns.

    >>> staple(numpy.stack([mask_a, mask_b, mask_c])).posterior > 0.5
    """
    v = _votes(annotations, present, num_classes, missing, spatial_dims)
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or not 1 <= max_iter < 2**31:
        raise ValueError(f"max_iter must be a positive integer, got {max_iter!r}")
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol must be finite and not negative, got {tol}")
    given = _to(v.space, _prior(prior, v.classes, num_classes is None))
    kind = str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else np.dtype(dtype).name
    if kind not in ("float32", "float64"):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    index, keys, counts = _patterns(v)
    space, slots, channels = v.space, int(counts.shape[1]), 1 if num_classes is None else v.classes
    values = space.empty((v.batch, slots, channels), "float64")
    labels = space.empty((v.batch, slots), "int64")
    performance = space.empty((v.batch, v.raters, v.classes, v.classes), "float64")
    rates = [space.empty((v.batch, v.raters, v.classes), "float64") for _ in range(2)]
    status = space.empty((v.batch, 2), "int32")
    work = space.empty((_core.staple_workspace(v.batch, slots, v.raters, v.classes, space.exec),), "uint8")
    views = (space.view(x) for x in (values, labels, performance, *rates, status, work))
    _core.staple(
        None if keys is None else space.view(keys),
        space.view(counts),
        v.raters,
        v.options,
        max_iter,
        float(tol),
        None if given is None else space.view(given),
        *views,
        space.exec,
    )
    out = _image(space, (v.batch, channels, v.pixels), kind)
    masks = _image(space, (v.batch, v.pixels), "uint8")
    _core.spread(*(space.view(x) for x in (index, values, out, labels, masks)), space.exec)
    shape = v.size if num_classes is None else (channels, *v.size)
    sensitivity, specificity = (x[..., 1] if num_classes is None else x for x in rates)
    return Staple(
        v.back(out.reshape((v.batch, *shape))),
        v.back(sensitivity),
        v.back(specificity),
        v.back(masks.reshape((v.batch, *v.size))),
        v.back(status[:, 0]),
        v.back(status[:, 1] != 0),
        v.back(performance),
    )


def simple(
    annotations: Any,
    *,
    alpha: float = 1.0,
    max_iter: int = 25,
    tie: int | str = 0,
    num_classes: int | None = None,
    present: Any = None,
    missing: int | None = None,
    spatial_dims: int | None = None,
) -> Simple:
    """SIMPLE: majority vote of the raters that agree with it, each weighted by how well it does.

    Langerak et al., IEEE TMI 29(12):2000, 2010. From the plain majority vote on: each kept rater's Dice with the
    estimate (with num_classes its mean over the labels but 0) becomes its weight, raters below mean - alpha * standard
    deviation of the kept ones are dropped for good, and the rest vote again; until none is dropped and the estimate
    stays, or max_iter. alpha is ours to choose: 1 drops outliers, 0 all below the mean. tie: as in majority_vote.

    Extra memory: 2 bytes per pixel of uint8 masks: the result's and the pattern's number.
    """
    v = _votes(annotations, present, num_classes, missing, spatial_dims)
    rule, value = _tie(tie, v.space.dtype(annotations), num_classes is None)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and not negative, got {alpha}")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter must be a positive integer, got {max_iter!r}")
    index, keys, counts = _patterns(v)
    table = np.zeros(tuple(int(n) for n in counts.shape), np.int64)
    selected = np.zeros((v.batch, v.raters), bool)
    weights = np.zeros((v.batch, v.raters))
    iterations = np.zeros(v.batch, np.int32)
    for b, (slots, digits, n) in enumerate(_host_patterns(v, keys, counts)):
        table[b, slots], selected[b], weights[b], iterations[b] = _simple(
            digits, n, v.classes, alpha, max_iter, rule, value
        )
    out = _image(v.space, (v.batch, v.pixels), v.space.dtype(annotations))
    where = _to(v.space, table)
    _core.spread(v.space.view(index), None, None, v.space.view(where), v.space.view(out), v.space.exec)
    return Simple(
        v.back(out.reshape((v.batch, *v.size))),
        *(v.back(_to(v.space, x)) for x in (selected, weights, iterations)),
    )


def soft_average(
    annotations: Any,
    *,
    weights: Any = None,
    num_classes: int | None = None,
    present: Any = None,
    missing: float | None = None,
    spatial_dims: int | None = None,
    dtype: Any = "float32",
) -> Any:
    """The mean over raters, as a soft label: (B, *S) or (*S); with num_classes (B, C, *S) or (C, *S), of one-hot masks.

    annotations may be floats (soft masks), then their values are averaged and NaN is no vote; of integers the share of
    raters that marked a pixel. weights: (M,) or (B, M), not negative, for a weighted mean. dtype: float32 or float64.
    Pixels without any vote, or only votes of weight 0, are 0.

    Extra memory: 5 bytes per pixel of masks: the result's (8 in float64) and the pattern's number.
    """
    v = _votes(annotations, present, num_classes, missing, spatial_dims, _arrays.FLOATS)
    kind = str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else np.dtype(dtype).name
    if kind not in ("float32", "float64"):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    host = given = None
    if weights is not None:
        host = _host(weights).astype(np.float64)
        if host.shape not in ((v.raters,), (v.batch, v.raters)):
            raise ValueError(
                f"weights has shape {host.shape}; for {v.raters} raters it must be ({v.raters},) "
                f"or ({v.batch}, {v.raters})"
            )
        if not (np.isfinite(host) & (host >= 0)).all():
            raise ValueError("weights must be finite and not negative")
        host = np.broadcast_to(host, (v.batch, v.raters)).copy()
        given = _to(v.space, host)
    shape = v.size if num_classes is None else (v.classes, *v.size)
    out = _image(v.space, (v.batch, *shape), kind)
    labelled = v.space.dtype(annotations) in _arrays.LABELS
    if labelled and v.patterns <= _DIRECT and v.space.device < 0:  # bytes of patterns in place of doubles
        index, _, _ = _patterns(v)
        values = _to(v.space, _means(v, host))
        flat = out.reshape((v.batch, -1, v.pixels))
        views = (v.space.view(x) for x in (index, values, flat))
        _core.spread(*views, None, None, v.space.exec)
        return v.back(out)
    _core.soft_average(
        v.view,
        v.present,
        None if given is None else v.space.view(given),
        v.options,
        v.space.view(out),
        v.space.exec,
    )
    return v.back(out)


def label_sampling(
    annotations: Any,
    generator: Any,
    *,
    present: Any = None,
    spatial_dims: int | None = None,
    return_rater: bool = False,
) -> Any:
    """One rater's mask for each image, drawn with equal chances among those present: (B, *S) or (*S), a copy.

    generator: a torch.Generator for torch tensors (on any device), otherwise a numpy.random.Generator (or CuPy's);
    an image takes one number from it, whether or not raters are missing. return_rater=True gives (mask, rater) with
    rater int64 (B,) or (). Images without any rater are 0 everywhere. No synchronisation on CUDA unless the
    generator lives on the CPU.

    Extra memory: 1 byte per pixel of uint8 annotations, the result's.
    """
    v = _votes(annotations, present, None, None, spatial_dims, _arrays.FLOATS)
    chosen, there = _draw(v, generator)
    masks = v.space.as_numpy(annotations) if isinstance(v.space, _arrays.Dlpack) else annotations
    masks = masks if v.batched else masks[None]
    if v.space.name == "torch":
        import torch

        picked = masks[torch.arange(v.batch, device=masks.device), chosen]
        if there is not None:
            picked = picked.masked_fill(~there.reshape(-1, *[1] * len(v.size)), 0)
    else:
        module: Any = np if v.space.name != "cupy" else __import__("cupy")
        picked = masks[module.arange(v.batch), chosen]
        if there is not None:
            picked = module.where(
                there.reshape(-1, *[1] * len(v.size)), picked, module.zeros((), picked.dtype)
            )
    return (v.back(picked), v.back(chosen)) if return_rater else v.back(picked)


def _draw(v: _Votes, generator: Any) -> tuple[Any, Any]:
    """Each image's rater (B,) int64, and where there is one (B,), None for everywhere."""
    if v.space.name == "torch":
        import torch

        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator for torch tensors, got {type(generator).__name__}"
            )
        device = "cpu" if v.space.device < 0 else f"cuda:{v.space.device}"
        u = torch.rand(v.batch, generator=generator, device=generator.device, dtype=torch.float64).to(device)
        if v.present_array is None:
            return (u * v.raters).long().clamp_(max=v.raters - 1), None
        here = v.present_array != 0
        count = here.sum(1)
        wanted = torch.minimum((u * count).long(), (count - 1).clamp(min=0))
        return ((here.long().cumsum(1) - 1 == wanted[:, None]) & here).long().argmax(1), count > 0
    if not hasattr(generator, "random"):
        raise TypeError(f"generator must be a numpy.random.Generator, got {type(generator).__name__}")
    u = generator.random(v.batch)
    if v.space.name == "cupy":
        import cupy

        u = cupy.asarray(u)
    if v.present_array is None:
        return (u * v.raters).astype("int64").clip(0, v.raters - 1), None
    here = v.present_array != 0
    count = here.sum(1)
    wanted = (u * count).astype("int64").clip(0, None)
    wanted = wanted - (wanted >= count) * (count > 0)
    return ((here.cumsum(1) - 1 == wanted[:, None]) & here).argmax(1), count > 0


# ---- comparison -----------------------------------------------------------------------------------


def rater_scores(
    annotations: Any,
    fusion: Any,
    *,
    num_classes: int | None = None,
    present: Any = None,
    missing: int | None = None,
    spatial_dims: int | None = None,
) -> RaterScores:
    """Each rater's sensitivity, specificity and Dice against a fused mask (B, *S) or (*S), of any label dtype.

    Over the pixels where the rater voted. With num_classes, pixels where fusion has another label are left out. 0/0
    counts as 1 where the two masks are equal and as 0 where they differ, as in overlap_metrics.

    Extra memory: 1 byte per pixel, the pattern's number.
    """
    _arrays.given(annotations=annotations, fusion=fusion)
    v = _votes(annotations, present, num_classes, missing, spatial_dims, fusion=fusion)
    result = np.empty((3, v.batch, v.raters, v.classes))
    for b, (_, digits, n) in enumerate(_host_patterns(v, *_patterns(v)[1:])):
        for m in range(v.raters):
            counts = _confusion(digits[:, -1], digits[:, m], n, v.classes)
            result[:, b, m] = _scores(counts)
    if num_classes is None:
        result = result[..., 1]
    return RaterScores(*(v.back(_to(v.space, np.ascontiguousarray(x))) for x in result))


def agreement(
    annotations: Any,
    *,
    num_classes: int | None = None,
    present: Any = None,
    missing: int | None = None,
    spatial_dims: int | None = None,
) -> Agreement:
    """How far the raters agree: Dice of each pair, Fleiss' kappa, Krippendorff's alpha.

    dice: over the pixels where both voted; 1 where both masks are empty. fleiss_kappa: Fleiss, Psychological Bulletin
    76:378, 1971, over the pixels with two votes or more (with raters missing, each pixel's agreement is that of its
    own votes). krippendorff_alpha: for nominal data (Krippendorff, Content Analysis, 2004), which is defined for
    missing votes. Both are 1 where all votes are the same. Background counts: a wider image raises both.

    Extra memory: 1 byte per pixel, the pattern's number.
    """
    v = _votes(annotations, present, num_classes, missing, spatial_dims)
    dice = np.empty((v.batch, v.raters, v.raters, v.classes))
    kappa, alpha = np.empty(v.batch), np.empty(v.batch)
    for b, (_, digits, n) in enumerate(_host_patterns(v, *_patterns(v)[1:])):
        dice[b], kappa[b], alpha[b] = _agreement(digits, n, v.classes)
    if num_classes is None:
        dice = dice[..., 1]
    return Agreement(*(v.back(_to(v.space, np.ascontiguousarray(x))) for x in (dice, kappa, alpha)))


# ---- on counted patterns --------------------------------------------------------------------------
# digits (P, M): each pattern's votes, `classes` for none; n (P,): how many pixels have it.


def _confusion(truth: HostArray, vote: HostArray, n: HostArray, classes: int) -> HostArray:
    """int64 (classes, classes) at [truth, vote], over the pixels where both are there."""
    both = (truth < classes) & (vote < classes)
    place = truth[both].astype(np.int64) * classes + vote[both]
    counts = np.zeros(classes * classes, np.int64)
    np.add.at(counts, place, n[both])
    return counts.reshape(classes, classes)


def _scores(confusion: HostArray) -> HostArray:
    """Sensitivity, specificity and Dice of each label: (3, classes)."""
    total = confusion.sum()
    if total == 0:
        return np.full((3, len(confusion)), np.nan)
    tp = np.diag(confusion)
    fp, fn = confusion.sum(0) - tp, confusion.sum(1) - tp
    tn = total - tp - fp - fn
    equal = (fp == 0) & (fn == 0)

    def share(part: HostArray, whole: HostArray) -> HostArray:
        return np.where(whole > 0, part / np.maximum(whole, 1), equal)

    return np.stack([share(tp, tp + fn), share(tn, tn + fp), share(2 * tp, 2 * tp + fp + fn)])


def _agreement(digits: HostArray, n: HostArray, classes: int) -> tuple[HostArray, float, float]:
    weight = n.astype(np.float64)
    voted = (digits < classes).astype(np.float64)
    common = voted.T @ (weight[:, None] * voted)
    dice = np.empty((*common.shape, classes))
    for c in range(classes):
        marked = (digits == c).astype(np.float64)
        both, either = marked.T @ (weight[:, None] * marked), marked.T @ (weight[:, None] * voted)
        whole = either + either.T
        dice[..., c] = np.where(whole > 0, 2 * both / np.maximum(whole, 1), 1.0)
    dice[common == 0] = np.nan

    votes = np.stack([(digits == c).sum(1) for c in range(classes)], 1).astype(np.float64)  # (P, classes)
    pairable = votes.sum(1) >= 2
    votes, weight = votes[pairable], weight[pairable]
    raters = votes.sum(1)
    if not len(votes):
        return dice, 1.0, 1.0
    agreeing = (votes * (votes - 1)).sum(1)  # ordered pairs of raters with the same label
    of_label = weight @ votes
    share = of_label / of_label.sum()
    observed = float(weight @ (agreeing / (raters * (raters - 1))) / weight.sum())
    expected = float((share**2).sum())
    kappa = (observed - expected) / (1 - expected) if (of_label > 0).sum() > 1 else 1.0
    all_votes = float(of_label.sum())
    different = all_votes - float(weight @ (agreeing / (raters - 1)))
    chance = all_votes**2 - float((of_label**2).sum())
    alpha = 1 - (all_votes - 1) * different / chance if (of_label > 0).sum() > 1 else 1.0
    return dice, kappa, alpha


def _simple(
    digits: HostArray, n: HostArray, classes: int, alpha: float, max_iter: int, rule: int, value: int
) -> tuple[HostArray, HostArray, HostArray, int]:
    """Each pattern's label, the kept raters, their weights, and the iterations."""
    kept: HostArray = np.asarray((digits < classes).any(0))
    weights: HostArray = kept.astype(np.float64)
    labels = _weighted_vote(digits, weights, classes, rule, value)
    iterations, done = 0, False
    while iterations < max_iter and not done:
        iterations += 1
        scores = np.array(
            [_mean_dice(labels, digits[:, m], n, classes) if kept[m] else 0.0 for m in range(digits.shape[1])]
        )
        of_kept = scores[kept]
        limit = of_kept.mean() - alpha * of_kept.std() if len(of_kept) else 0.0
        still = kept & (scores >= limit - 1e-12)
        weights = np.where(still, scores, 0.0) if scores[still].any() else still.astype(np.float64)
        new = _weighted_vote(digits, weights, classes, rule, value)
        done = bool((still == kept).all() and (new == labels).all())
        kept, labels = still, new
    return labels, kept, weights, iterations


def _mean_dice(truth: HostArray, vote: HostArray, n: HostArray, classes: int) -> float:
    """Mean over the labels but 0; a tie's label that is none of them counts as no vote."""
    outside = (truth < 0) | (truth >= classes)
    return float(_scores(_confusion(np.where(outside, classes, truth), vote, n, classes))[2, 1:].mean())


def _weighted_vote(digits: HostArray, weights: HostArray, classes: int, rule: int, value: int) -> HostArray:
    score = np.stack([(digits == c) @ weights for c in range(classes)], 1)
    most = score.max(1)
    equal = score >= most[:, None] * (1 - 1e-12)
    best = equal.argmax(1) if rule != 2 else classes - 1 - equal[:, ::-1].argmax(1)
    tied = (equal.sum(1) > 1) | (most == 0)
    if rule == 0:
        return np.where(tied, value, best).astype(np.int64)
    return np.where(most == 0, 0, best).astype(np.int64)


def _means(v: _Votes, weights: HostArray | None) -> HostArray:
    """Of every possible pattern: (B, patterns, channels), the sums in the raters' order."""
    codes = np.arange(v.patterns)
    total = np.zeros((v.batch, v.patterns, 1))
    sums = np.zeros((v.batch, v.patterns, v.classes))
    for m in range(v.raters):
        digit = codes // v.base**m % v.base
        w = np.ones((v.batch, 1, 1)) if weights is None else weights[:, m, None, None]
        total += w * (digit < v.classes)[:, None]
        sums += w * (digit[:, None] == np.arange(v.classes))
    means = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
    return np.ascontiguousarray(means[..., 1:] if v.options[1] else means)


# ---- arguments ------------------------------------------------------------------------------------


@dataclass
class _Votes:
    space: _arrays.Namespace
    view: _arrays.View  # (B, M, *S)
    fusion: _arrays.View | None  # (B, *S)
    present: _arrays.View | None  # (B, M)
    present_array: Any
    batched: bool
    batch: int
    raters: int
    size: tuple[int, ...]
    classes: int
    options: tuple[int, bool, bool, bool, int]
    base: int
    patterns: int

    @property
    def pixels(self) -> int:
        return math.prod(self.size)

    def back(self, x: Any) -> Any:
        """A result as the caller's kind of array, without the batch axis where none was given."""
        if self.batched:
            return self.space.back(x)
        return self.space.back(x[0, ...] if self.space.name == "dlpack" else x[0])


def _votes(
    annotations: Any,
    present: Any,
    num_classes: int | None,
    missing: float | None,
    spatial_dims: int | None,
    more: Sequence[str] = (),
    fusion: Any = None,
) -> _Votes:
    space = _arrays.of(annotations=annotations, fusion=fusion)
    dtype = space.dtype(annotations)
    if dtype in _arrays.FLOATS and not more:
        raise TypeError(
            f"annotations have dtype {dtype}; use one of {', '.join(_arrays.LABELS)} "
            "(pass annotations > 0.5, or average them with soft_average)"
        )
    _arrays.check_dtype("annotations", dtype, (*_arrays.LABELS, *more))
    _arrays.check_rank("annotations", annotations)
    shape = tuple(int(n) for n in annotations.shape)
    mask = None if present is None else _host_or_same(space, present)
    if spatial_dims is None:
        two = mask is not None and len(mask.shape) == 2
        dims = len(shape) - (2 if two or len(shape) > 4 else 1)
        if dims == 3 and len(shape) == 4 and shape[0] == 1:
            raise ValueError(
                f"annotations have shape {shape}: one rater's volume, or one image of {shape[1]} raters? "
                "Pass spatial_dims=3 or spatial_dims=2"
            )
    else:
        dims = spatial_dims
    lead = len(shape) - dims
    if lead not in (1, 2) or dims < 0 or len(shape) < 1:
        raise ValueError(
            f"annotations have shape {shape}; they must be (M, *S) or (B, M, *S)"
            + ("" if spatial_dims is None else f" with {spatial_dims} spatial axes")
        )
    if 0 in shape:
        raise ValueError(f"annotations have shape {shape}; at least one rater and one pixel are needed")
    batched = lead == 2
    address, code, sizes, strides = space.view(annotations)
    view = (address, code, sizes, strides) if batched else (address, code, (1, *sizes), (0, *strides))
    batch, raters, size = view[2][0], view[2][1], tuple(view[2][2:])
    if len(view[2]) > _arrays.MAX_RANK:
        raise ValueError(f"annotations have {len(shape)} dimensions; at most 7 are supported without a batch")
    if num_classes is not None and (
        isinstance(num_classes, bool)
        or not isinstance(num_classes, int)
        or not 2 <= num_classes <= MAX_CLASSES
    ):
        raise ValueError(f"num_classes must be an integer from 2 to {MAX_CLASSES}, got {num_classes!r}")
    if missing is not None and not (
        isinstance(missing, (int, float)) and abs(missing) < 2**62 and missing == int(missing)
    ):
        raise ValueError(f"missing must be a whole number, got {missing!r}")
    if mask is not None and tuple(mask.shape) not in ((raters,), (batch, raters)):
        raise ValueError(
            f"present has shape {tuple(mask.shape)}; for annotations of shape {shape} it must be ({raters},)"
            + (f" or ({batch}, {raters})" if batched else "")
        )
    mask = None if mask is None else _present(space, mask, batch, raters)
    fused = None
    if fusion is not None:
        _arrays.check_dtype("fusion", space.dtype(fusion), _arrays.LABELS)
        expected = size if not batched else (batch, *size)
        if tuple(fusion.shape) != expected:
            raise ValueError(
                f"fusion has shape {tuple(fusion.shape)}; for these annotations it must be {expected}"
            )
        a, c, n, s = space.view(fusion)
        fused = (a, c, n, s) if batched else (a, c, (1, *n), (0, *s))
    can_miss = not (num_classes is None and missing is None and mask is None)
    classes = num_classes or 2
    base, voters = classes + can_miss, raters + (fusion is not None)
    if not more and base**voters >= _MOST:
        most = next(m for m in range(64) if base ** (m + 1) >= _MOST) - (fusion is not None)
        raise ValueError(
            f"annotations have {raters} raters; with {base} possible votes (no vote included) "
            f"at most {most} are supported"
            if can_miss
            else f"annotations have {raters} raters; at most {most} are supported"
        )
    if raters > 61:
        raise ValueError(f"annotations have {raters} raters; at most 61 are supported")
    options = (classes, num_classes is None, can_miss, missing is not None, int(missing or 0))
    return _Votes(
        space,
        view,
        fused,
        None if mask is None else space.view(mask),
        mask,
        batched,
        batch,
        raters,
        size,
        classes,
        options,
        base,
        base**voters,
    )


def _host_or_same(space: _arrays.Namespace, present: Any) -> Any:
    """present as an array of the annotations' kind and device, if it is none yet from the host."""
    try:
        if space.name != "dlpack" and _arrays.of(present=present) is space:
            return present
    except TypeError:
        pass
    return np.asarray(_host(present))


def _present(space: _arrays.Namespace, mask: Any, batch: int, raters: int) -> Any:
    """uint8 (B, M), contiguous, in the annotations' kind."""
    if isinstance(mask, np.ndarray):
        whole = np.broadcast_to(mask != 0, (batch, raters))
        return _to(space, np.ascontiguousarray(whole).astype(np.uint8))
    if space.name == "torch":
        return (mask != 0).expand(batch, raters).contiguous().byte()
    import cupy

    return cupy.ascontiguousarray(cupy.broadcast_to(mask != 0, (batch, raters))).astype("uint8")


def _tie(tie: int | str, dtype: str, binary: bool) -> tuple[int, int]:
    """Tie in csrc/include/noisyseg/labels.h, and its label."""
    if tie in _TIES:
        return 1 + _TIES.index(str(tie)), 0
    if isinstance(tie, bool) or not isinstance(tie, int):
        raise ValueError(f"tie must be a label or one of {', '.join(_TIES)}, got {tie!r}")
    low, high = {"bool": (0, 1), "uint8": (0, 255), "int32": (-(2**31), 2**31 - 1)}.get(
        dtype, (-(2**63), 2**63 - 1)
    )
    if not low <= tie <= high:
        raise ValueError(f"tie must be between {low} and {high} for annotations of dtype {dtype}, got {tie}")
    return 0, tie


def _prior(prior: Any, classes: int, binary: bool) -> HostArray | None:
    if prior is None:
        return None
    try:
        p = np.asarray(prior, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"prior must be numbers between 0 and 1, got {prior!r}") from None
    if binary and p.ndim == 0:
        p = np.array([1 - p, p])
    if p.shape != (classes,):
        wish = "one number, or two" if binary else f"{classes} numbers"
        raise ValueError(f"prior must be {wish}, got {prior!r}")
    if not ((p >= 0) & (p <= 1)).all() or abs(p.sum() - 1) > 1e-6:
        raise ValueError(f"prior must be probabilities (that add up to 1 over the labels), got {prior!r}")
    return p


# ---- patterns -------------------------------------------------------------------------------------


def _patterns(v: _Votes) -> tuple[Any, Any, Any]:
    """index (B, pixels), keys (B, slots) or None, counts (B, slots): see csrc/include/noisyseg/labels.h."""
    space, place = v.space, v.space.exec
    if v.patterns <= _DIRECT:
        index = _image(space, (v.batch, v.pixels), "uint8" if v.patterns <= 256 else "int32")
        counts = space.empty((v.batch, v.patterns), "int64")
        work = space.empty((_core.vote_patterns_workspace(v.patterns, place),), "uint8")
        _count(v, index, None, counts, work)
        return index, None, counts
    if space.device >= 0:
        return _sorted_patterns(v)
    index = _image(space, (v.batch, v.pixels), "int32")
    slots = 1 << 17
    while True:
        keys, counts = (space.empty((v.batch, slots), "int64") for _ in range(2))
        if _count(v, index, keys, counts, None):
            return index, keys, counts
        slots *= 8


def _count(v: _Votes, index: Any, keys: Any, counts: Any, work: Any) -> bool:
    views = (None if x is None else v.space.view(x) for x in (index, keys, counts, work))
    index, keys, counts, work = views
    return bool(
        _core.vote_patterns(v.view, v.fusion, v.present, v.options, index, keys, counts, work, v.space.exec)
    )


def _sorted_patterns(v: _Votes) -> tuple[Any, Any, Any]:
    """Of CUDA arrays with too many possible patterns for a table: by the array library's sort."""
    space = v.space
    codes = space.empty((v.batch, v.pixels), "int64")
    _core.vote_codes(v.view, v.fusion, v.present, v.options, space.view(codes), space.exec)
    module: Any = __import__(space.name)
    found = [module.unique(c, return_inverse=True, return_counts=True) for c in codes]
    slots = max(len(k) for k, _, _ in found)
    keys, counts = (space.empty((v.batch, slots), "int64") for _ in range(2))
    index = space.empty((v.batch, v.pixels), "int32")
    keys[...] = 0
    counts[...] = 0
    for b, (key, inverse, n) in enumerate(found):
        keys[b, : len(key)], counts[b, : len(key)], index[b] = key, n, inverse
    return index, keys, counts


def _host_patterns(v: _Votes, keys: Any, counts: Any) -> Any:
    """For each image, on the host: the slots that occur, their votes (P, raters) and their pixels (P,)."""
    all_counts = _host(counts)
    all_keys = None if keys is None else _host(keys)
    voters = v.raters + (v.fusion is not None)
    for b in range(v.batch):
        slots = np.flatnonzero(all_counts[b])
        codes = slots.astype(np.int64) if all_keys is None else all_keys[b, slots]
        digits = np.stack([codes // v.base**m % v.base for m in range(voters)], 1)
        yield slots, digits, all_counts[b, slots]


# ---- arrays ---------------------------------------------------------------------------------------


def _host(x: Any) -> HostArray:
    if hasattr(x, "detach"):
        return np.asarray(x.detach().cpu())
    if type(x).__module__.split(".")[0] == "cupy":
        return np.asarray(x.get())
    return np.from_dlpack(x) if hasattr(x, "__dlpack__") and not hasattr(x, "__array__") else np.asarray(x)


def _to(space: _arrays.Namespace, x: HostArray | None) -> Any:
    """A host array in the given kind, on its device."""
    if x is None or space.name in ("numpy", "dlpack"):
        return x
    if space.name == "torch":
        import torch

        return torch.from_numpy(x).to("cpu" if space.device < 0 else f"cuda:{space.device}")
    import cupy

    with cupy.cuda.Device(space.device):
        return cupy.asarray(x)


def _image(space: _arrays.Namespace, shape: Sequence[int], dtype: str) -> Any:
    """Memory for an image-sized result; in huge pages where the array library does not ask for them itself."""
    x = space.empty(shape, dtype)
    if space.name == "torch" and space.device < 0 and x.nbytes >= _HUGE:
        _core.use_huge_pages(x.data_ptr(), x.nbytes)
    return x
