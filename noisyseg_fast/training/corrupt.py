"""`noisyseg corrupt`: a folder of masks made worse on purpose, in the masks' own geometry."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import noise
from ..noise import Calibration, Noise
from .data import Array, DataError, Raw, files, nifti, read, suffix, whole_numbers
from .files import write_json, written

RECORD, SHEET = "noise.json", "contact_sheet.png"
SHOWN = 24  # masks on the contact sheet
SPACED = ("dilate", "erode", "erode_or_dilate")  # operators with a radius in the unit of `spacing`
LABELLED = ("shift", "elastic_deform")  # operators that keep labels as they are


@dataclass(frozen=True)
class Plan:
    """What `write` does: everything was read and checked."""

    files: list[Path]
    seeds: list[int]  # of each file
    out: Path
    noises: list[Noise | Calibration]
    probabilities: list[float]
    record: dict[str, Any]
    mm: bool


def plan(
    folder: Path,
    out: Path,
    noises: Sequence[str],
    options: Mapping[str, str],
    target_dice: float | None = None,
    seed: int = 0,
    mm: bool = False,
) -> Plan:
    """Check everything, and find the strengths for target_dice; nothing is written.

    noises: operators' names, or "name=probability". options: their parameters as text, "radius" of a single noise or
    "dilate.radius". ValueError (DataError) in one line for what is missing, unknown, unreadable or not empty.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of masks")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty folder; choose another --out")
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed must be from 0 to 2^31 - 1, got {seed}")
    if target_dice is not None and mm:
        raise ValueError("--mm and --target-dice cannot be combined: magnitudes are found in pixels")
    paths = files(folder)
    if not paths:
        raise DataError(f"{folder}: holds no masks (.nii.gz, .nii, .png)")
    parts, chances = _noises(noises, options)
    for part in parts:
        for option, default in noise.options_of(part.name).items():
            if default is inspect.Parameter.empty and option not in part.options and target_dice is None:
                raise ValueError(f"{part.name} needs its {option}: --set {option}=..., or --target-dice")
    if mm and not any(part.name in SPACED for part in parts):
        raise ValueError(f"--mm needs one of {', '.join(SPACED)}")
    masks = []
    for path in paths:
        raw = read(path)
        mask = _labels(path, raw)
        if mm and raw.spacing is None:
            raise DataError(f"{path}: a PNG has no spacing; leave --mm out")
        if target_dice is not None:
            masks.append(mask != 0)
        elif path == paths[0]:  # the options' values, before anything is written
            for part in parts:
                part(np.zeros((1, *(4,) * mask.ndim), bool), seed=0, spatial_dims=mask.ndim)
    # A file's own stream: by its name, so that files may come and go without changing the others.
    seeds = [(seed << 32) + zlib.crc32(path.name.encode()) for path in paths]
    record: dict[str, Any] = {
        "noises": [
            {"name": p.name, "options": p.options, "probability": c}
            for p, c in zip(parts, chances, strict=True)
        ],
        "seed": seed,
        "target_dice": target_dice,
        "unit": "mm" if mm else "pixel",
    }
    ready: list[Noise | Calibration] = [*parts]
    if target_dice is not None:
        if len({mask.ndim for mask in masks}) > 1:
            raise DataError(f"{folder}: holds 2D and 3D masks; --target-dice needs one kind")
        ready = [noise.calibrate(part, masks, target_dice, seed=seeds) for part in parts]
        for entry, found in zip(record["noises"], ready, strict=True):
            assert isinstance(found, Calibration)
            entry["calibration"] = {
                "magnitude": found.low,
                "next_magnitude": found.high,
                "share_of_next": found.share,
                "dice": found.dice,
            }
    return Plan(paths, seeds, out, ready, chances, record, mm)


def write(todo: Plan, seen: Callable[[], None] = lambda: None) -> float:
    """The noisy masks, the record and the contact sheet; each file whole or not at all. Returns the mean Dice."""
    rows: list[dict[str, Any]] = []
    pictures: list[tuple[str, Array, Array]] = []
    shown = set(np.linspace(0, len(todo.files) - 1, min(SHOWN, len(todo.files))).round().astype(int).tolist())
    for number, (path, seed) in enumerate(zip(todo.files, todo.seeds, strict=True)):
        raw = read(path)
        clean = _labels(path, raw)
        noisy = _noisy(clean, raw.spacing if todo.mm else None, todo, seed)
        _save(todo.out / path.name, noisy, path, raw)
        dice = float(noise.dice_of(noisy[None], clean[None], spatial_dims=clean.ndim)[0])
        rows.append({"file": path.name, "seed": seed, "dice": dice if clean.any() else None})
        if number in shown:
            pictures.append((f"{path.name}  {dice:.3f}", *_slice(clean, noisy)))
        seen()
    scores = [row["dice"] for row in rows if row["dice"] is not None]
    mean = float(np.mean(scores)) if scores else float("nan")
    _contact_sheet(todo.out / SHEET, pictures)
    write_json(todo.out / RECORD, {**todo.record, "mean_dice": mean, "files": rows})
    return mean


def _noises(noises: Sequence[str], options: Mapping[str, str]) -> tuple[list[Noise], list[float]]:
    if not noises:
        raise ValueError(f"--noise is needed: one or more of {', '.join(noise.OPERATORS)}")
    names, given = [], []
    for text in noises:
        name, equals, value = text.partition("=")
        noise.options_of(name)
        names.append(name)
        if equals:
            try:
                given.append(float(value))
            except ValueError:
                raise ValueError(f"--noise must be like {name} or {name}=0.5, got {text!r}") from None
    if given and len(given) != len(names):
        raise ValueError("--noise: give every noise a probability or none")
    if len(set(names)) != len(names):
        raise ValueError("--noise: each operator can be given once")
    if not all(p >= 0 for p in given) or sum(given) > 1 + 1e-9:
        raise ValueError(f"--noise: probabilities must not be negative and sum up to at most 1, got {given}")
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        owner, dot, option = key.partition(".")
        if not dot:
            owner, option = names[0], key
            if len(names) > 1:
                raise ValueError(f"--set {key}: in a mixture say whose, as {names[0]}.{key}={value}")
        elif owner not in own:
            raise ValueError(f"--set {key}: {owner} is not among the noises {', '.join(names)}")
        own[owner][option] = _value(value)
    for name, options_of_it in own.items():
        if "spacing" in options_of_it:
            raise ValueError("--set spacing: comes from the files with --mm")
        Noise(name, **options_of_it)
    return [Noise(name, **own[name]) for name in names], given or [1 / len(names)] * len(names)


def _value(text: str) -> Any:
    """A number, several of them with commas between, or the text."""
    parts: list[Any] = []
    for part in text.split(","):
        for kind in (int, float):
            try:
                parts.append(kind(part))
                break
            except ValueError:
                continue
        else:
            return text
    return parts[0] if len(parts) == 1 else tuple(parts)


def _labels(path: Path, raw: Raw) -> Array:
    """Whole numbers >= 0 as int32."""
    values = whole_numbers(path, raw)
    if values.min(initial=0) < 0:
        raise DataError(f"{path}: labels must not be negative, found {values.min():g}")
    return values.astype(np.int32)


def _noisy(clean: Array, spacing: tuple[float, ...] | None, todo: Plan, seed: int) -> Array:
    parts: list[Callable[..., Any]] = []
    for part in todo.noises:
        if spacing is not None and isinstance(part, Noise) and part.name in SPACED:
            part = Noise(part.name, **part.options, spacing=spacing)
        keeps = part.name in LABELLED
        parts.append(part if keeps else partial(_by_label, part))
    noisy: Array = noise.mixture(
        clean[None], parts, todo.probabilities, seed=[seed], spatial_dims=clean.ndim
    )[0]
    return noisy


def _by_label(part: Callable[..., Any], masks: Array, *, seed: Any, spatial_dims: int) -> Any:
    labels = np.unique(masks[masks != 0])
    if len(labels) > 1:
        return noise.each_label(part, masks, seed=seed, spatial_dims=spatial_dims)
    label = labels[0] if len(labels) else 1
    return part(masks != 0, seed=seed, spatial_dims=spatial_dims) * label


def _save(target: Path, mask: Array, source: Path, raw: Raw) -> None:
    if suffix(source) == ".png":
        from PIL import Image

        with written(target) as temporary:
            Image.fromarray(mask.astype(raw.array.dtype)).save(temporary)
        return
    import nibabel

    with nifti(source, whole=False) as like:
        header = like.header.copy()
        image = like.__class__(mask.astype(like.get_data_dtype()).reshape(like.shape), like.affine, header)
    with written(target) as temporary:
        nibabel.save(image, temporary)


def _slice(clean: Array, noisy: Array) -> tuple[Array, Array]:
    """Of a volume the slice along the last axis with the largest object."""
    if clean.ndim == 3:
        at = int(((clean != 0) | (noisy != 0)).sum((0, 1)).argmax())
        clean, noisy = clean[..., at].T, noisy[..., at].T
    return clean != 0, noisy != 0


def _contact_sheet(path: Path, pictures: Sequence[tuple[str, Array, Array]]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = {"in both": (0.75, 0.75, 0.75), "added": (0.9, 0.45, 0.1), "missing": (0.2, 0.4, 0.85)}
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.2 * max(columns, 2), 2.4 * rows + 0.5), dpi=120)
    for i, (title, clean, noisy) in enumerate(pictures):
        axes = figure.add_subplot(rows, columns, i + 1)
        image = np.zeros((*clean.shape, 3))
        for where, colour in zip(
            (clean & noisy, noisy & ~clean, clean & ~noisy), colours.values(), strict=True
        ):
            image[where] = colour
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=6)
        axes.set_axis_off()
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in colours.items()],
        loc="lower center",
        ncols=3,
        fontsize=7,
        frameon=False,
    )
    figure.subplots_adjust(0.01, 0.5 / (2.4 * rows + 0.5), 0.99, 0.96, 0.05, 0.15)
    with written(path) as temporary:
        figure.savefig(temporary)
