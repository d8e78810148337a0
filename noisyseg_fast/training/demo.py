"""`noisyseg demo`: what noisy masks cost on real CT nodules, and what a noise-robust loss wins back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .. import noise
from .data import open_data
from .engine import Config, Result, merge_pictures, spread, train
from .files import write_json

if TYPE_CHECKING:
    from rich.console import Console

# As large a network, for as many epochs, as train in about 45 seconds on one CPU core. The learning rate was
# compared on the validation patients (1e-3 against 3e-3, clean labels), nothing else. The noise is MCPM's
# default: 40 % of the labels dilated by 0-6 pixels.
SETTINGS = Config(
    data="sample", network="unet", width=8, epochs=24, batch_size=8, lr=3e-3, seed=0, device="cpu"
)
NOISE_RATE = 0.4


class Arm(NamedTuple):
    name: str
    folder: str
    method: str
    noise_rate: float


ARMS = (
    Arm("clean labels, cross-entropy", "clean_ce", "ce", 0.0),
    Arm("noisy labels, cross-entropy", "noisy_ce", "ce", NOISE_RATE),
    Arm("noisy labels, NR-Dice", "noisy_nr_dice", "nr_dice", NOISE_RATE),
)


def train_arms(out: Path, *, quick: bool = False, console: Console | None = None) -> dict[str, Result]:
    """Train the three arms with the same seed, data and budget; out/<folder> holds each run.

    quick: one epoch of a tiny network, to try the machinery.
    """
    settings = replace(SETTINGS, epochs=1, width=4, batch_size=64) if quick else SETTINGS
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty; choose another folder with --out")
    shown = _picture_ids(settings)
    results = {}
    # One thread: the sums of convolutions, and so the results, depend on the number of threads; and on a busy
    # machine a second one makes such small steps slower, not faster.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for arm in ARMS:
            config = replace(
                settings, method=arm.method, noise_rate=arm.noise_rate, out=str(out / arm.folder)
            )
            if console is not None:
                console.print(f"training: {arm.name}")
            results[arm.name] = train(config, console=console, picture_ids=shown, report=False)
    finally:
        torch.set_num_threads(threads)
    return results


def _picture_ids(settings: Config) -> list[str]:
    """Four test cases evenly spread, and the first two training cases whose labels are dilated by 3 pixels or
    more."""
    data = open_data(settings.data, validation=settings.validation, test=settings.test, seed=settings.seed)
    radii = noise.corruption_radii(len(data.training), NOISE_RATE, settings.noise_radius, settings.seed)
    return [*spread(data.test, 4), *(data.training[i].id for i in np.flatnonzero(radii >= 3)[:2])]


def table(results: dict[str, Result]) -> list[dict[str, Any]]:
    """The test results, one row for each arm."""
    return [
        {
            "training": name,
            "dice": r.test.dice,
            "iou": r.test.iou,
            "hd95": r.test.hd95,
            "without_hd95": r.test.empty_predictions + r.test.empty_references,
        }
        for name, r in results.items()
    ]


def verdict(results: dict[str, Result]) -> str:
    """What the noise cost and what came back, whatever it is."""
    clean, noisy, robust = (results[arm.name].test.dice for arm in ARMS)
    cost, back = clean - noisy, robust - noisy
    text = (
        f"Noise took {cost:.3f} Dice from cross-entropy"
        if cost > 0
        else f"Noise cost nothing here ({-cost:+.3f} Dice)"
    )
    if back <= 0:
        return f"{text}; NR-Dice won nothing back ({back:+.3f}). One seed, one small test set."
    share = f" ({back / cost:.0%} of it)" if cost > 0 else ""
    return f"{text}; NR-Dice won {back:.3f} back{share}. One seed, one small test set."


def write(out: Path, results: dict[str, Result], tables: Sequence[Any] = ()) -> None:
    """results.json and report.html."""
    from .report import write_report

    runs = {name: asdict(result.config) for name, result in results.items()}
    content = {"test": table(results), "verdict": verdict(results), "settings": runs}
    write_json(out / "results.json", content)
    write_report(
        out / "report.html",
        title="noisyseg demo: lung nodules, four raters",
        runs=[result.run(name) for name, result in results.items()],
        overlays=merge_pictures({name: result.pictures for name, result in results.items()}),
        tables=tables,
        notes=[
            verdict(results),
            f"Noise: labels of {NOISE_RATE:.0%} of the training images dilated by 0 to "
            f"{SETTINGS.noise_radius} pixels (MCPM, MICCAI 2020, sec. 4.1).",
            "Reference: the pixels that at least two of the four raters outlined.",
            "Each run is tested at its epoch with the best Dice on clean validation masks, which in itself "
            "limits what noise can do.",
            *(
                f"{name}: {r.test.sentence(r.unit)}; best epoch {r.best_epoch}."
                for name, r in results.items()
            ),
        ],
    )
