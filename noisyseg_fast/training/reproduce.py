"""`noisyseg reproduce`: a paper's comparison, repeated on public data with equal budgets for all arms.

A study is an entry of STUDIES: its arms and conditions as changes to common settings, and the paper's own figures.
The machinery below runs the grid arm x condition x seed, one run after another, each with the same number of
iterations. Everything can be interrupted at any time and goes on with the same command:

    OUT/study.json        what was asked for
    OUT/runs/<run>/       the engine's folder of each run; a half-done one is resumed
    OUT/results.json      a row for each finished run
    OUT/results.md        tables of what is finished so far, and what they say
    OUT/results.png       the same as a plot
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .. import noise
from . import atrium
from .data import MISSING, Case, Data, Store, open_data
from .engine import Config, train
from .files import write_json, write_text, written

if TYPE_CHECKING:
    from rich.console import Console


class Measure(NamedTuple):
    label: str
    papers: str  # the label of the paper's column
    distance: bool = False  # the smaller the better


MEASURES = {
    "dice": Measure("Dice", "paper's Dice"),
    "iou": Measure("IoU", "paper's IoU"),
    "hd95": Measure("HD95", "paper's HD95", True),
}


class Arm(NamedTuple):
    label: str
    changes: Mapping[str, Any]  # to the common settings
    everywhere: bool = False  # the same under all conditions, so run once for each seed
    only: tuple[str, ...] = ()  # the conditions it is run under; (): all


@dataclass(frozen=True)
class Study:
    title: str
    settings: Config  # common to all arms
    arms: Mapping[str, Arm]
    default_arms: tuple[str, ...]
    conditions: Mapping[str, Mapping[str, Any]]  # name -> changes to the common settings
    data: Callable[[Config], Data]  # the data of all runs
    main_arm: str  # which the others are compared with
    under: Callable[[Data, str], Data] = lambda data, condition: (
        data
    )  # the data under a condition ("": under all)
    on: Callable[[str], Study | None] = lambda data: None  # the same study on data of another kind
    splits: bool = False  # every seed splits the patients anew
    measures: Mapping[str, Measure] = field(default_factory=lambda: MEASURES)
    budget: int = 500  # iterations of every run, where the user names none
    epochs: int = 5  # in which an interrupted run loses one at most
    quick: Mapping[str, Any] = field(default_factory=dict)  # changes that make a run last a second
    paper: Mapping[tuple[str, str], tuple[float | None, ...]] = field(default_factory=dict)
    # (arm, condition) -> the paper's figures for the measures, None where it gives none
    notes: tuple[str, ...] = ()  # what differs from the paper


class Run(NamedTuple):
    key: str
    arm: str
    condition: str  # "" for an arm that is the same under all
    seed: int
    config: Config


def get(name: str) -> Study:
    """The study of that name; ValueError lists those there are."""
    try:
        return STUDIES[name]
    except KeyError:
        raise ValueError(f"unknown study {name!r}; choose from {', '.join(STUDIES)}") from None


def reproduce(
    name: str,
    out: Path,
    *,
    data: str = "sample",
    seeds: int = 3,
    budget: int | None = None,
    arms: Sequence[str] = (),
    conditions: Sequence[str] = (),
    quick: bool = False,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Run what is not yet finished of a study, and return all rows of results.json.

    data: as open_data takes it. seeds: how many, from 0. budget: iterations of every run, by default the study's. arms:
    other than the study's default ones. conditions: only these of the study's. quick: runs of a second, to try the
    machinery.

    A further call with the same settings goes on; more seeds, other arms or conditions may be asked for. ValueError for
    unknown names, numbers below 1, or settings other than those OUT was begun with.
    """
    study = get(name)
    study = study.on(data) or study
    budget = study.budget if budget is None else budget
    for what, value in (("seeds", seeds), ("budget", budget)):
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    chosen = tuple(arms) or study.default_arms
    for arm in chosen:
        if arm not in study.arms:
            raise ValueError(f"unknown arm {arm!r} of study {name}; choose from {', '.join(study.arms)}")
    for condition in conditions:
        if condition not in study.conditions:
            raise ValueError(
                f"unknown condition {condition!r} of study {name}; choose from {', '.join(study.conditions)}"
            )
    epochs = min(budget, 2 if quick else study.epochs)
    settings = replace(
        study.settings,
        data=data,
        epochs=epochs,
        epoch_batches=budget // epochs,
        **(study.quick if quick else {}),
    )
    _begin(
        out,
        {"study": name, "budget": epochs * (budget // epochs), "quick": quick, "settings": asdict(settings)},
    )
    sources: dict[int, Data] = {}  # by seed, where that changes the split
    conditioned: dict[tuple[str, int], Data] = {}
    rows = _read(out / "results.json")
    todo = [
        run
        for run in plan(study, settings, chosen, seeds, out, conditions)
        if run.key not in {row["key"] for row in rows}
    ]
    # One thread: results depend on how many there are, and small steps gain nothing from a second one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, run in enumerate(todo, 1):
            if console is not None:
                console.print(f"{number} of {len(todo)}: {run.key}", highlight=False)
            split = run.seed if study.splits else 0
            if split not in sources:
                sources[split] = study.data(replace(settings, seed=split))
            if (run.condition, split) not in conditioned:
                conditioned[run.condition, split] = study.under(sources[split], run.condition)
            rows.append(_train(run, conditioned[run.condition, split], console))
            write_json(out / "results.json", rows)
            write(study, rows, settings, out)
    finally:
        torch.set_num_threads(threads)
    write(study, rows, settings, out)
    return rows


def plan(
    study: Study,
    settings: Config,
    arms: Iterable[str],
    seeds: int,
    out: Path,
    conditions: Sequence[str] = (),
) -> list[Run]:
    """All runs, seed by seed, so that what is finished at any time compares all arms. conditions: none for all."""
    runs = []
    for seed in range(seeds):
        for arm in arms:
            asked = [c for c in _conditions(study, arm) if not c or not conditions or c in conditions]
            for condition in asked:
                changes = {**study.conditions.get(condition, {}), **study.arms[arm].changes, "seed": seed}
                key = "-".join(part for part in (arm, condition.replace(" ", ""), f"seed{seed}") if part)
                config = replace(settings, **changes, out=str(out / "runs" / key))
                runs.append(Run(key, arm, condition, seed, config))
    return runs


def _conditions(study: Study, arm: str) -> tuple[str, ...]:
    if study.arms[arm].everywhere:
        return ("",)
    return study.arms[arm].only or tuple(study.conditions)


def _begin(out: Path, asked: dict[str, Any]) -> None:
    path = out / "study.json"
    asked = json.loads(json.dumps(asked))  # as it will be read again
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        # A version that has since learnt a new setting goes on with the setting's default.
        before["settings"] = {**json.loads(json.dumps(asdict(Config()))), **before["settings"]}
        if before != asked:
            raise ValueError(f"{path}: was begun with other settings; take them, or another folder (--out)")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty and holds no study; choose another folder (--out)")
    write_json(path, asked)


def _read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return rows


def _train(run: Run, data: Data, console: Console | None) -> dict[str, Any]:
    start, folder = time.perf_counter(), Path(run.config.out)
    begun = (folder / "config.json").is_file()
    result = train(run.config, resume=begun, console=console, picture_ids=(), data=data)
    return {
        "key": run.key,
        "arm": run.arm,
        "condition": run.condition,
        "seed": run.seed,
        **result.test._asdict(),
        "weights": result.found and result.found._asdict(),
        "steps": run.config.epochs * (run.config.epoch_batches or 0),
        "train_seconds": sum(row["seconds"] for row in result.history),
        "seconds": time.perf_counter() - start,
        "resumed": begun,
    }


# ---- what came of it ------------------------------------------------------------------------------


def values(rows: Iterable[Mapping[str, Any]], arm: str, condition: str, measure: str) -> dict[int, float]:
    """Seed -> figure; an arm that is the same everywhere counts under each condition. A distance of a run whose
    predictions are all empty is left out."""
    return {
        row["seed"]: row[measure]
        for row in rows
        if row["arm"] == arm
        and row["condition"] in ("", condition)
        and row[measure] is not None
        and math.isfinite(row[measure])
    }


def write(study: Study, rows: Sequence[Mapping[str, Any]], settings: Config, out: Path) -> None:
    """results.md and results.png of the rows there are."""
    parts = [f"# {study.title}", "", *_settings(study, rows, settings), ""]
    for condition in _shown_conditions(study, rows):
        parts += [
            f"## {condition}",
            "",
            *_table(study, rows, condition),
            "",
            *_reading(study, rows, condition),
            "",
        ]
    parts += _weights(study, rows)
    if study.notes:
        parts += ["## What differs from the paper", "", *(f"- {note}" for note in study.notes), ""]
    write_text(out / "results.md", "\n".join(parts))
    if rows:
        _plot(study, rows, out / "results.png")


def _shown_conditions(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that something was run under; all, if nothing was."""
    run = [c for c in study.conditions if any(row["condition"] == c for row in rows)]
    return run or list(study.conditions)


def _settings(study: Study, rows: Sequence[Mapping[str, Any]], settings: Config) -> list[str]:
    steps = settings.epochs * (settings.epoch_batches or 0)
    seconds = sum(row["seconds"] for row in rows)
    return [
        f"Data: {Path(settings.data).name}. Every run: {steps} iterations of batch {settings.batch_size}, "
        f"{settings.network} of width {settings.width}, {'Adam' if settings.optimizer == 'adam' else 'SGD'} with lr "
        f"{settings.lr:g}, tested after the last iteration. {len(rows)} runs, {seconds / 60:.0f} minutes on one "
        f"{'CPU core' if settings.device == 'cpu' else 'device'}. Mean ± standard deviation over seeds, which change "
        "the initial weights, the order and "
        + ("the split by patient." if study.splits else "which labels are corrupted, not the split."),
        "",
        "![results](results.png)",
    ]


def _shown(study: Study, rows: Sequence[Mapping[str, Any]], condition: str) -> list[str]:
    return [arm for arm in study.arms if values(rows, arm, condition, "dice")]


def _table(study: Study, rows: Sequence[Mapping[str, Any]], condition: str) -> list[str]:
    measures = study.measures
    head = [
        "training",
        *(m.label for m in measures.values()),
        "seeds",
        *(m.papers for m in measures.values()),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for arm in _shown(study, rows, condition):
        cells = [study.arms[arm].label]
        digits = [2 if m.distance else 4 for m in measures.values()]
        seeds = len(values(rows, arm, condition, "dice"))
        for measure, places in zip(measures, digits, strict=True):
            figures = list(values(rows, arm, condition, measure).values())
            cells.append(_spread(figures, places) + (f" (of {len(figures)})" if len(figures) < seeds else ""))
        cells.append(str(seeds))
        paper = study.paper.get((arm, condition), (None,) * len(measures))
        cells += ["" if v is None else f"{v:.{d}f}" for v, d in zip(paper, digits, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    empty = sum(row["empty_predictions"] for row in rows if row["condition"] in ("", condition))
    return [*lines, "", f"Empty predictions, which have no HD95, in all these runs: {empty}."]


def _spread(numbers: Sequence[float], digits: int) -> str:
    if not numbers:
        return "–"
    mean = f"{np.mean(numbers):.{digits}f}"
    return f"{mean} ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else mean


def _mean(numbers: Iterable[float], none: float) -> float:
    found = list(numbers)
    return float(np.mean(found)) if found else none


def _reading(study: Study, rows: Sequence[Mapping[str, Any]], condition: str) -> list[str]:
    """Who wins, by how much, and whether the paper's order holds: nothing but what the rows say."""
    arms = _shown(study, rows, condition)
    means = {arm: float(np.mean(list(values(rows, arm, condition, "dice").values()))) for arm in arms}
    order = sorted(arms, key=lambda arm: -means[arm])
    lines = ["Order by Dice: " + " > ".join(order) + "."]
    ours, main = values(rows, study.main_arm, condition, "dice"), study.main_arm
    for arm in order:
        other = values(rows, arm, condition, "dice")
        gaps = [ours[seed] - other[seed] for seed in ours if seed in other]
        if arm != main and gaps:
            wins = sum(gap > 0 for gap in gaps)
            lines.append(
                f"- {main} minus {arm}: {_spread(gaps, 4)} Dice, ahead in {wins} of {len(gaps)} seeds."
            )
    for column, (measure, (label, _, distance)) in enumerate(study.measures.items()):
        known = {arm: study.paper[arm, condition][column] for arm in arms if (arm, condition) in study.paper}
        published = {arm: value for arm, value in known.items() if value is not None}
        if len(published) < 2:
            continue
        sign = 1 if distance else -1
        theirs = sorted(published, key=lambda arm: sign * published[arm])
        got = {arm: _mean(values(rows, arm, condition, measure).values(), sign * math.inf) for arm in theirs}
        here = sorted(theirs, key=lambda arm: sign * got[arm])
        word = "the same" if here == theirs else "another"
        lines.append(
            f"- {label}: {word} order as in the paper: here {' > '.join(here)}; there {' > '.join(theirs)}."
        )
    return lines


def _weights(study: Study, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How well each arm's weights find the corrupted pixels."""
    lines = []
    for condition in study.conditions:
        for arm in study.arms:
            found = [
                r["weights"] for r in rows if r["arm"] == arm and r["condition"] == condition and r["weights"]
            ]
            if found:
                keys = ("auroc", "average_precision", "share", "weight_wrong", "weight_right")
                cells = [_spread([f[key] for f in found if f[key] is not None], 3) for key in keys]
                lines.append("| " + " | ".join([condition, study.arms[arm].label, *cells]) + " |")
    if not lines:
        return []
    head = (
        "| condition | training | AUROC | average precision | wrong labels | weight, wrong | weight, right |"
    )
    text = (
        "1 - weight as a detector of the corrupted pixels of the training images, after the last iteration. Weights "
        "that know nothing have AUROC 0.5 and an average precision equal to the share of wrong labels."
    )
    return [
        "## Do the weights find the label errors?",
        "",
        text,
        "",
        head,
        "|---|---" + "|---:" * 5 + "|",
        *lines,
        "",
    ]


def _plot(study: Study, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    conditions = _shown_conditions(study, rows)
    arms = [arm for arm in study.arms if any(row["arm"] == arm for row in rows)][::-1]
    size = (3.6 + 2.6 * len(study.measures), 0.9 + len(conditions) * (0.7 + 0.3 * len(arms)))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(len(conditions), len(study.measures), squeeze=False, sharex="col", sharey=True)
    for i, condition in enumerate(conditions):
        for j, (measure, (name, _, _)) in enumerate(study.measures.items()):
            panel = axes[i, j]
            for place, arm in enumerate(arms):
                points = [v for v in values(rows, arm, condition, measure).values() if math.isfinite(v)]
                colour = "#D55E00" if arm == study.main_arm else "#0072B2"
                panel.plot(points, [place] * len(points), "o", ms=4, alpha=0.5, color=colour, mew=0)
                if points:
                    panel.plot([float(np.mean(points))], [place], "|", ms=16, mew=2.5, color=colour)
            panel.set_title(f"{name}, {condition}", fontsize=10, loc="left")
            panel.set_yticks(range(len(arms)), [study.arms[arm].label for arm in arms], fontsize=9)
            panel.grid(axis="x", alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    with written(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


# ---- the studies ----------------------------------------------------------------------------------


_PATCHES = Config(  # of the studies on 64x64 patches
    network="unet",
    width=8,
    batch_size=8,
    lr=3e-3,
    foreground=0.04,  # about the patches' share: the few steps are not spent on learning that
    validation=0.05,
    test=0.25,
    test_on="last",
    device="cpu",
)


def _nodules(settings: Config) -> Data:
    """The 64x64 nodule patches that have a consensus, split by patient once for all seeds; distances in pixels."""
    data = open_data(
        settings.data,
        validation=settings.validation,
        test=settings.test,
        meta_fraction=settings.meta_fraction,
    )
    store = Store(data.classes, limit=0)

    def usable(cases: list[Case]) -> list[Case]:
        return [
            replace(c, spacing=(1.0,) * store.get(c).target.ndim) for c in cases if store.get(c).target.any()
        ]

    return replace(
        data,
        training=usable(data.training),
        validation=usable(data.validation),
        test=usable(data.test),
        meta=usable(data.meta),
        unit="px",
    )


_FIRST = ("r = 0.4",)

_MCPM = Study(
    title="MCPM on lung nodules: dilated labels, a small clean meta set",
    settings=replace(_PATCHES, meta_fraction=0.14),  # 300 of 2206, as in the paper
    arms={
        "ce": Arm("U-Net, noisy and clean labels", {"train_on": "both"}),
        "ce_meta": Arm("U-Net, meta set only", {"train_on": "meta"}, everywhere=True),
        "ce_clean": Arm("U-Net, all labels clean", {"train_on": "both"}, everywhere=True),
        "mwnet": Arm("MWNet, pixels", {"method": "mwnet"}),
        "mwnet_image": Arm("MWNet, images", {"method": "mwnet_image"}),
        "spatial_reweighting": Arm("spatial reweighting", {"method": "spatial_reweighting"}),
        "mcpm": Arm("MCPM", {"method": "mcpm"}),
        # Further ones, to understand the others by.
        "ce_noisy": Arm("U-Net, noisy labels only", {}),
        "l2rw": Arm("L2RW, images", {"method": "l2rw"}),
        "mcpm_warm": Arm("MCPM after a warm-up", {"method": "mcpm", "options": {"warmup": 200}}, only=_FIRST),
        "mwnet_warm": Arm(
            "MWNet, pixels, after a warm-up", {"method": "mwnet", "options": {"warmup": 200}}, only=_FIRST
        ),
        # In few steps a weight net moves little from its random start, unless its lr is larger.
        "mcpm_fast": Arm("MCPM, 30 x meta lr", {"method": "mcpm", "options": {"meta_lr": 0.03}}),
        "mwnet_fast": Arm("MWNet, pixels, 30 x meta lr", {"method": "mwnet", "options": {"meta_lr": 0.03}}),
        "mcpm_both": Arm("MCPM, meta set trained on, too", {"method": "mcpm", "train_on": "both"}),
        "mcpm_real": Arm("MCPM, virtual step by Adam", {"method": "mcpm", "options": {"virtual": "real"}}),
    },
    default_arms=("ce", "ce_meta", "ce_clean", "mwnet", "mwnet_image", "spatial_reweighting", "mcpm"),
    conditions={"r = 0.4": {"noise_rate": 0.4}, "r = 0.8": {"noise_rate": 0.8}},
    data=_nodules,
    main_arm="mcpm",
    quick={"width": 4, "batch_size": 4},
    paper={  # Table 1 (dilation; Hausdorff in a unit it does not name) and, for r = 0.8, Table 2
        ("ce", "r = 0.4"): (0.7556, 0.6253, None),
        ("ce_meta", "r = 0.4"): (0.7221, 0.6091, None),
        ("ce_clean", "r = 0.4"): (0.8391, 0.7573, None),
        ("mwnet", "r = 0.4"): (0.8117, 0.7156, None),
        ("mcpm", "r = 0.4"): (0.8464, 0.7469, None),
        ("ce", "r = 0.8"): (None, 0.4264, None),
        ("ce_clean", "r = 0.8"): (None, 0.7573, None),
        ("mwnet", "r = 0.8"): (None, 0.6128, None),
        ("mcpm", "r = 0.8"): (None, 0.6760, None),
    },
    notes=(
        "The budget: the paper trains for 120 epochs of 1906 patches with batch 128 and lr 1e-4.",
        "The network: MONAI's residual U-Net with instance norm, its output bias set for 4 % of foreground; the paper "
        "does not describe its U-Net.",
        "Patches and the consensus of four radiologists (at least two of them) as prepared for this package, not the "
        "authors' selection; split by patient, which the paper does not claim.",
        "The plain U-Net trains on the noisy and the meta set together, as the paper says of all it compares with; "
        "here MWNet and the reweighting train on the noisy set, as MCPM does, and learn their weights on the meta set. "
        "Whether the paper's MWNet weighs pixels or images is not said; both are here; its figures stand beside the "
        "pixel-wise one.",
        "Networks begin with a foreground share of 0.04 (the bias of the last layer), or so small a budget goes on "
        "learning that most pixels are background. This was chosen after seeing clean labels tested with another seed.",
        "HD95 here is the 95th percentile in pixels; the paper's Hausdorff distance (1.7 to 2.0) has no stated unit "
        "and is left out.",
        "The paper's figures for clean labels are those at r = 0.",
    ),
)

# The mean Dice of the simulated raters (UMA-Net sec. IV-A); none: those who drew.
_RATERS = {"LN": 0.8, "HN": 0.7, "real raters": None}


def _raters(data: Data, condition: str) -> Data:
    """The training cases with their reference or consensus (condition ""), with five simulated raters of it, or with
    the real ones; validation and test stay as they are."""
    target = _RATERS.get(condition)
    if target is None and condition:
        return data
    data = replace(data, training=[case.trusted() for case in data.training])
    if target is None:
        return data
    store = Store(data.classes, limit=0)
    masks = [store.get(case).target for case in data.training]
    if len({mask.shape for mask in masks}) > 1:
        raise ValueError(f"{data.source}: simulated raters need training images of one size")
    drawn = noise.simulate_raters(np.stack(masks), target, seed=0).annotations
    return replace(
        data, training=[replace(c, labels=labels) for c, labels in zip(data.training, drawn, strict=True)]
    )


# Nodules fill 4 % of their image, the paper's lungs a third: what is other for so small objects (umanet.py says why).
# The threshold is another for each of the paper's data sets, too. Here 0.2 calls every image low in quality, and the
# primary predictor learns no more after the warm-up; 0.6 splits those of HN about in half.
_SMALL = {"regularizer": "area", "entropy": "binary", "tau_agreement": 0.6}
_HN = ("HN",)

_UMANET = Study(
    title="UMA-Net: five simulated raters, and real ones",
    settings=replace(_PATCHES, method="umanet"),
    arms={
        # The same loss as majority_vote's, on the reference, or the consensus of the real raters.
        "clean": Arm("U-Net, clean labels", {"method": "ce_dice"}, everywhere=True),
        "majority_vote": Arm("U-Net, majority vote", {"method": "majority_vote"}),
        "staple": Arm("U-Net, STAPLE", {"method": "staple"}),
        "label_sampling": Arm("label sampling", {"method": "label_sampling"}),
        "umanet": Arm("UMA-Net", {"options": _SMALL}),
        "auem": Arm("AUEM", {"options": {**_SMALL, "assess": False, "consistency": 0.0}}, only=_HN),
        "auem_cl": Arm("AUEM, consistency", {"options": {**_SMALL, "assess": False}}, only=_HN),
        "auem_cl_qam": Arm("AUEM, consistency, QAM", {"options": {**_SMALL, "auxiliary": False}}, only=_HN),
        "umanet_paper": Arm("UMA-Net, as printed", {}, only=_HN),
        "mr_net": Arm("MR-Net", {"method": "mr_net"}, only=_HN),
        "self_calib": Arm("Self-Calib", {"method": "self_calib"}, only=_HN),
        # Further ones.
        "multi_head": Arm("a decoder for each rater", {"method": "multi_head"}),
        "umanet_soft": Arm("UMA-Net, soft assignment", {"options": {**_SMALL, "soft": 0.05}}),
    },
    default_arms=(
        "clean",
        "majority_vote",
        "staple",
        "label_sampling",
        "umanet",
        "auem",
        "auem_cl",
        "auem_cl_qam",
        "umanet_paper",
        "mr_net",
        "self_calib",
    ),
    conditions={name: {} for name in _RATERS},
    data=_nodules,
    under=_raters,
    main_arm="umanet",
    quick={"width": 4, "batch_size": 4},
    paper={  # Tables II and V, lungs in radiographs; the ablation is of HN
        ("clean", "LN"): (0.9623, 0.9273, None),
        ("majority_vote", "LN"): (0.8223, 0.6982, None),
        ("umanet", "LN"): (0.9297, 0.8686, None),
        ("clean", "HN"): (0.9663, 0.9273, None),
        ("majority_vote", "HN"): (0.7528, 0.6036, None),
        ("auem", "HN"): (0.8212, 0.6967, None),
        ("auem_cl", "HN"): (0.8529, 0.7435, None),
        ("auem_cl_qam", "HN"): (0.8671, 0.7653, None),
        ("umanet", "HN"): (0.8875, 0.7979, None),
        ("mr_net", "HN"): (0.8543, 0.7456, None),
        ("self_calib", "HN"): (0.8539, 0.7450, None),
    },
    notes=(
        "The data: the paper's figures are of lungs in radiographs (JSRT, 165 training images of the whole chest), "
        "which fill a third of the image; LIDC's nodules fill 4 % of theirs, BU-BIL's cells 8 %. HD95 is in other "
        "pixels and left out.",
        "LN and HN: five raters simulated from the consensus or reference, one for each of the paper's kinds of noise, "
        "each with the strength that gives a mean Dice of 0.8 and 0.7, which is all the paper says; drawn once for all "
        "seeds.",
        "Real raters, of LIDC: the four radiologists. The reference is their own consensus (at least two of them), so "
        "majority vote trains on exactly what is tested, and is no fair opponent there. Of BU-BIL: up to seven crowd "
        "workers for training; the reference is the consensus of the named experts, drawn with two tools.",
        "Eq. 3 and 6 and one threshold: with the paper's, no image is of high quality (arm 'as printed'). Elsewhere "
        "sigma/2 of eq. 3 is divided by the object's area and not the image's, the confidence is the mean binary "
        "entropy, and tau_b is 0.6. The threshold and the warm-up were chosen after runs of 150 iterations on HN of "
        "LIDC with seed 0, tested on the same cases.",
        "A warm-up of 30 % of the run in which the AUEM is not taught; the paper names none.",
        "MR-Net and Self-Calib: by their public code, with networks and losses of ours (mr_net.py, self_calib.py).",
        "Adam's lr falls by nnU-Net's polynomial, not by 0.96 per epoch; the budget is much smaller.",
        "Alpha's ramp and the sizes of AUEM and predictors are not in the paper.",
    ),
)


def _one_rater(data: Data, condition: str) -> Data:
    """The training cases with the mask of one radiologist each, drawn among those who marked something there."""
    if condition != "one rater":
        return data
    store, random = Store(data.classes, limit=0, raters=True), np.random.default_rng(0)

    def drawn(case: Case) -> Case:
        raters = store.get(case).raters
        marked = [r for r in raters if ((r != 0) & (r != MISSING)).any()]
        return replace(case, labels=marked[random.integers(len(marked))][None]) if marked else case

    return replace(data, training=[drawn(case) for case in data.training])


class _Row(NamedTuple):
    """Of the COPLE-Net paper's tables: what it calls the row, its Dice there, and our changes."""

    label: str
    dice: float | None
    changes: Mapping[str, Any]
    only: tuple[str, ...] = ("one rater",)


def _loss(
    label: str, dice: float, method: str, only: tuple[str, ...] = ("one rater",), **options: Any
) -> _Row:
    return _Row(label, dice, {"method": method, "options": options}, only)


def _cople(label: str, dice: float | None, method: str, **options: Any) -> _Row:
    return _Row(label, dice, {"network": "coplenet", "method": method, "options": options})


def _ensembled(label: str, dice: float, loss: str, *, teacher: bool, student: bool) -> _Row:
    adaptive = {"adaptive_teacher": teacher, "adaptive_student": student}
    return _cople(label, dice, "coplenet", loss=loss, **adaptive)


_TABLES = {  # I, III
    "ce": _loss("CE", 0.7655, "ce", ()),
    "focal": _loss("focal CE, gamma 2", 0.7475, "focal"),
    "focal_half": _loss("focal CE, gamma 0.5", 0.7662, "focal", focal_gamma=0.5),
    "mae": _loss("MAE", 0.7648, "mae"),
    "gce": _loss("GCE", 0.7696, "gce", ()),
    "dice": _loss("Dice", 0.7789, "dice", ()),
    "sorensen_dice": _loss("Sørensen-Dice", 0.7774, "sorensen_dice"),
    "focal_dice": _loss("focal Dice", 0.7728, "focal_dice"),
    "ce_dice": _loss("CE + Dice", 0.7814, "ce_dice", ()),
    "mae_dice": _loss("MAE + Dice", 0.7834, "mae_dice"),
    "nr_dice": _loss("NR-Dice", 0.7907, "nr_dice", ()),
    "cople": _cople("COPLE-Net, Dice", 0.7861, "dice"),
    "cople_mt": _ensembled("+ mean teacher", 0.7936, "dice", teacher=False, student=False),
    "cople_adat": _ensembled("+ adaptive teacher", 0.7951, "dice", teacher=True, student=False),
    "cople_adas": _ensembled("+ adaptive student", 0.7980, "dice", teacher=False, student=True),
    "cople_both": _ensembled("+ both", 0.8009, "dice", teacher=True, student=True),
    "coplenet": _ensembled("+ both, NR-Dice", 0.8072, "nr_dice", teacher=True, student=True),
}
_FURTHER = {  # II and IV, and the printed form of eq. 7
    "cople_nr_dice": _cople("COPLE-Net, NR-Dice", 0.8029, "nr_dice"),
    "trimmed": _cople("COPLE-Net, data re-weighting", 0.7997, "trimmed"),
    "label_update": _cople("COPLE-Net, label update", 0.7935, "label_update"),
    "cople_printed": _cople("+ both, eq. 7 as printed", None, "coplenet", loss="dice", as_printed=True),
}

_COPLENET = Study(
    title="COPLE-Net's losses and self-ensembling on lung nodules: one radiologist's mask each",
    settings=_PATCHES,
    arms={
        "clean": Arm("CE + Dice, clean labels", {"method": "ce_dice"}, everywhere=True),
        **{name: Arm(row.label, row.changes, only=row.only) for name, row in {**_TABLES, **_FURTHER}.items()},
    },
    default_arms=("clean", *_TABLES),
    conditions={"one rater": {}, "r = 0.4": {"noise_rate": 0.4}},
    data=_nodules,
    under=_one_rater,
    main_arm="nr_dice",
    quick={"width": 4, "batch_size": 4},
    paper={  # HD95 there is in mm of lungs
        (name, "one rater"): (row.dice, None, None) for name, row in {**_TABLES, **_FURTHER}.items()
    },
    notes=(
        "The data: the paper's are CT slices of COVID-19 pneumonia, marked by non-experts (Dice with the experts 0.88 "
        "± 0.06). Here each training image has the mask of one of its radiologists, drawn once among those who marked "
        "something (Dice with the consensus 0.88 ± 0.12 on these patches), and tests are against the consensus of "
        "four. The second condition dilates 40 % of the consensus masks, as in the MCPM study.",
        "One lr for all losses; the paper chose one for each by validation.",
        "The network of the losses' table is MONAI's residual U-Net; the paper's is nnU-Net's 2D network. COPLE-Net "
        "is a quarter as wide as the paper's.",
        "Every image here holds a nodule. NR-Dice as printed (eq. 3) raises p on images without the class, which this "
        "study does not touch.",
        "Table III: which of its second and third row is which was read from the paper's text.",
        "Self-ensembling has a few hundred steps here, not tens of thousands; its threshold comes from the last 100.",
    ),
)


def _cropping(
    settings: Config, classes: int, margin: tuple[int, int] = atrium.MARGIN
) -> Callable[[list[Case]], list[Case]]:
    """Crops cases around their objects, to at least the patch, alike whatever the split."""
    assert settings.patch is not None
    smallest = settings.patch

    def cropped(cases: list[Case]) -> list[Case]:
        return [
            atrium.boxed(case, classes, smallest, np.random.default_rng(zlib.crc32(case.id.encode())), margin)
            for case in cases
        ]

    return cropped


def _few_labels(settings: Config) -> Data:
    """Volumes cropped around their objects; a fifth of the training patients keep their labels, and the others are the
    unlabelled images and, with their labels, the meta set, which the upper bound trains on, too."""
    data = open_data(settings.data, validation=settings.validation, test=settings.test, seed=settings.seed)
    cropped = _cropping(settings, data.classes, margin=(0, 8))  # nodules are a tenth of a left atrium's size
    patients = sorted({case.patient for case in data.training})
    if len(patients) < 2:
        raise ValueError(
            f"{data.source}: {len(patients)} training patient(s) cannot be both with and without labels"
        )
    order = np.random.default_rng([settings.seed, 0x666577]).permutation(len(patients))  # "few"
    chosen = {patients[i] for i in order[: max(1, round(atrium.SHARE * len(patients)))]}
    training = cropped(data.training)
    rest = [case for case in training if case.patient not in chosen]
    return replace(
        data,
        training=[case for case in training if case.patient in chosen],
        validation=cropped(data.validation),
        test=cropped(data.test),
        meta=rest,
        unlabelled=rest,
    )


def _left_atrium(settings: Config) -> Data:
    """The Left Atrium set by its lists, without validation; the meta set as in _few_labels. Scans that come as NRRD are
    cropped as the authors of mri_norm2.h5 did."""
    data = atrium.open_atrium(Path(settings.data))
    if any(case.image[0].suffix == ".nrrd" for case in data.training):
        cropped = _cropping(settings, data.classes)
        data = replace(
            data,
            training=cropped(data.training),
            test=cropped(data.test),
            unlabelled=cropped(data.unlabelled),
        )
    return replace(data, meta=data.unlabelled)


_DISTANCES = {
    "dice": Measure("Dice", "paper's Dice"),
    "iou": Measure("Jaccard", "paper's Jaccard"),
    "asd": Measure("ASD [mm]", "paper's ASD [voxel]", True),
    "hd95": Measure("HD95 [mm]", "paper's HD95 [voxel]", True),
}
# The loss of the segmentation in all of them: UA-MT's, DTML's (sec. 3.1).
_PLAIN: dict[str, Any] = {
    "method": "ce_dice",
    "options": {"ce_weight": 0.5, "dice_weight": 0.5},
    "batch_size": 4,  # as many images as the others, which take two with and two without labels
}
_FEW = "a fifth of the labels"

_SEMI_SUPERVISED = {
    "vnet_all": Arm("V-Net, all labels (upper bound)", {**_PLAIN, "train_on": "both"}),
    "vnet": Arm("V-Net, few labels (lower bound)", _PLAIN),
    "mean_teacher": Arm("mean teacher", {"method": "mean_teacher"}),
    "ua_mt": Arm("UA-MT", {"method": "ua_mt"}),
    "dtc": Arm("DTC", {"method": "dtc"}),
    "sassnet": Arm("SASSNet", {"method": "sassnet"}),
    "asdnet": Arm("ASDNet", {"method": "asdnet"}),
    "tcse": Arm("TCSE", {"method": "tcse"}),
    "double_uncertainty": Arm("double uncertainty", {"method": "double_uncertainty"}),
    "dtml": Arm("DTML", {"method": "dtml"}),
    "dtml_code": Arm(
        "DTML, weights of its code",
        {"method": "dtml", "options": {"consistency": 1.0, "routing": "shared"}},
    ),
}
_COMPARED = ("vnet_all", "vnet", "ua_mt", "dtc", "sassnet", "dtml", "dtml_code")
_TABLE_3: dict[
    tuple[str, str], tuple[float | None, ...]
] = {  # the left atrium, 16 of 80 scans labelled; ASD and HD95 in voxels of 0.625 mm
    ("vnet_all", _FEW): (0.9114, 0.8382, 1.52, 5.75),
    ("vnet", _FEW): (0.8603, 0.7606, 3.51, 14.26),
    ("asdnet", _FEW): (0.8790, 0.7885, 2.08, 9.24),
    ("tcse", _FEW): (0.8815, 0.7920, 2.44, 9.57),
    ("double_uncertainty", _FEW): (0.8965, 0.8135, 2.03, 7.04),
    ("ua_mt", _FEW): (0.8888, 0.8021, 2.26, 7.32),
    ("dtc", _FEW): (0.8942, 0.8089, 2.10, 7.32),
    ("sassnet", _FEW): (0.8954, 0.8124, 2.20, 8.24),
    ("dtml", _FEW): (0.9012, 0.8214, 1.82, 7.01),
}

_DTML_LEFT_ATRIUM = Study(
    title="DTML on the left atrium: 16 of 80 scans labelled",
    settings=Config(  # the paper's (sec. 4.1) and its code's
        network="vnet",
        width=16,
        batch_size=2,
        optimizer="sgd",
        lr=0.01,
        schedule="tenth",
        halve_every=2500,
        weight_decay=1e-4,
        patch=(112, 112, 80),
        test_on="last",
    ),
    arms=_SEMI_SUPERVISED,
    default_arms=_COMPARED,
    conditions={_FEW: {}},
    data=_left_atrium,
    main_arm="dtml",
    measures={
        "dice": Measure("Dice", "paper's Dice"),
        "iou": Measure("Jaccard", "paper's Jaccard"),
        "asd_voxels": Measure("ASD [voxel]", "paper's ASD", True),
        "hd95_voxels": Measure("HD95 [voxel]", "paper's HD95", True),
    },
    budget=6000,
    epochs=40,
    quick={"width": 4, "batch_size": 1, "patch": (32, 32, 16)},
    paper=_TABLE_3,
    notes=(
        "Windows overlap by half and are blended by Gaussian weights; the paper's code moves its windows by 18, 18 and "
        "4 voxels, averages them, and keeps the largest component of the mask.",
        "Crops hold an object voxel in their middle every other time; the code's lie anywhere. Flips and quarter turns "
        "as there, and flips of the third axis.",
        "DTML weighs the consistency as the paper says; the arm with the weights of its code has 20 times as much.",
        "The images are cropped to the object with a margin, which the authors found from the labels of all scans, "
        "unlabelled and test ones, too: mri_norm2.h5 is so already, NRRD are cropped here.",
    ),
)

_DTML = Study(
    title="DTML on lung nodules in 3D: few labelled volumes, many without labels",
    settings=Config(
        network="vnet",
        width=4,
        batch_size=2,
        lr=1e-2,
        patch=(32, 32, 16),
        spacing=(0.7, 0.7, 0.7),
        validation=0.06,
        test=0.28,
        test_on="last",
        device="cpu",
    ),
    arms={
        **_SEMI_SUPERVISED,
        # As much narrower than the paper's discriminators as the V-Nets are.
        "sassnet": Arm("SASSNet", {"method": "sassnet", "options": {"width": 16}}),
        "asdnet": Arm("ASDNet", {"method": "asdnet", "options": {"width": 16}}),
    },
    default_arms=_COMPARED,
    conditions={_FEW: {}},
    data=_few_labels,
    on=lambda data: _DTML_LEFT_ATRIUM if atrium.is_atrium(Path(data)) else None,
    main_arm="dtml",
    splits=True,
    measures=_DISTANCES,
    budget=400,
    epochs=4,
    quick={"width": 4, "batch_size": 1, "patch": (32, 32, 16)},
    paper=_TABLE_3,
    notes=(
        "The data: the paper's figures are of the left atrium in 100 MR scans, 16 labelled and 64 not; here 36 "
        "lung nodules in CT, of 36 patients, 5 labelled and 19 not, 2 to validate and 10 to test, split by "
        "patient anew for each seed. The reference is the consensus of four radiologists (at least two of them). "
        "ASD and HD95 are in mm, the paper's in voxels of 0.625 mm. With the Left Atrium set as --data the study "
        "takes the paper's settings.",
        "The budget and the size: the paper trains V-Nets of width 16 for 6000 iterations with SGD on patches of "
        "112x112x80; here the patches are 32x32x16 voxels of 0.7 mm, to which the volumes are resampled; scores "
        "are those on the volumes' own grid.",
        "Every step takes four patches, two with labels and two without; in the two bounds all four have labels.",
        "The volumes are cropped in the plane to the nodule's box, or to the patch where that is larger, and 0 to "
        "7 voxels more on every side, at random; the axis across the slices comes without empty margin. The "
        "authors cropped to the box and 10 to 19 voxels of an object ten times as large. Both know the labels of "
        "all volumes, and so does whoever is shown a crop that holds a nodule.",
        "lr was chosen by the lower bound alone, on another split of the same patients (seed 7, 300 iterations): its "
        "test Dice was 0.40 with 1e-2 and 0.34 with 3e-3.",
        "ASDNet, TCSE and double uncertainty, the other rows of Table 3, are arms run when asked for.",
    ),
)

STUDIES: dict[str, Study] = {
    "mcpm": _MCPM,
    "umanet": _UMANET,
    "coplenet": _COPLENET,
    "dtml": _DTML,
}
