"""report.html of a run or of several: test results, curves, contours, tables. One file that loads nothing."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .files import write_text

# Okabe and Ito's colours, told apart with any colour vision. Those of the runs also show on white.
CLEAN, NOISY = "#009E73", "#F0E442"
COLOURS = ("#56B4E9", "#D55E00", "#CC79A7", "#E69F00", "#0072B2")
CURVES = {
    "train_loss": "Training loss",
    "val_dice": "Validation Dice",
    "val_iou": "Validation IoU",
    "val_hd95": "Validation HD95",
}
HEADINGS = {"dice": "Dice", "iou": "IoU", "hd95": "HD95"}

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b2430; --soft: #5b6675; --line: #dfe4ea; --back: #fff; --card: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa5b1; --line: #333c48; --back: #14181d; --card: #1d232a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1080px; padding: 24px 16px 48px; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 8px }
h2 { font-size: 1.15rem; margin: 36px 0 12px; padding-bottom: 4px; border-bottom: 1px solid var(--line) }
.notes { margin: 0; padding-left: 20px; color: var(--soft); overflow-wrap: anywhere }
.notes li:first-child { color: var(--ink) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 6px 20px 6px 0; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap }
th:first-child, td:first-child { white-space: normal; min-width: 7.5em }
th { font-size: .85rem; font-weight: 600; color: var(--soft) }
.number { text-align: right }
.grid { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)) }
.curves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)) }
figure { margin: 0; padding: 8px; border-radius: 8px; background: var(--card) }
figure img { display: block; width: 100%; height: auto; border-radius: 4px }
figcaption { margin-top: 6px; font-size: .85rem; color: var(--soft); overflow-wrap: anywhere }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 12px; padding: 0; list-style: none;
  font-size: .9rem }
.legend i { display: inline-block; width: 24px; margin-right: 8px; vertical-align: middle;
  border-top: 4px solid }
"""


def write_report(
    path: Path,
    *,
    title: str,
    runs: Sequence[Mapping[str, Any]],
    overlays: Sequence[Mapping[str, Any]],
    tables: Sequence[tuple[Any, ...]] = (),
    weights: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    explained: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write report.html, whole or not at all.

    runs: mappings with name, metrics_csv (a file as the engine writes it, one row for each epoch) and test
    (measure -> its mean over the test cases). overlays: mappings with id, image (H, W) and the masks (H, W),
    nonzero inside: clean, noisy (or None) and predictions (run name -> mask). tables: (title, header, rows),
    or (title, rows as mappings). weights: run name -> mappings with id and image, clean, noisy and weight (H, W),
    the last shown between 0 and 1 beside the true label errors. explained: what a method makes of the training labels,
    mappings with id, facts (name -> number or text) and perhaps image (H, W) and maps (name -> (n, H, W) between 0 and
    1). notes: sentences below the title; the first is
    the main finding.
    """
    names = [*(run["name"] for run in runs), *(name for shown in overlays for name in shown["predictions"])]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    parts = [f"<h1>{escape(title)}</h1>"]
    if notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>')
    if runs:
        results = [{"run": run["name"], **run["test"]} for run in runs]
        parts.append("<h2>Test results</h2>" + _table(*_columns(results)))
        parts.append(f'<h2>Training</h2><div class="grid curves">{_curves(runs, colours)}</div>')
    if overlays:
        parts.append("<h2>Contours</h2>" + _overlays(overlays, colours))
    if weights:
        parts.append("<h2>Pixel weights and label errors</h2>" + _weights(weights))
    if explained:
        parts.append("<h2>What training makes of the labels</h2>" + _explained(explained))
    for name, *content in tables:
        parts.append(f"<h2>{escape(name)}</h2>")
        parts.append(_table(*(content if len(content) == 2 else _columns(content[0]))))
    write_text(
        Path(path),
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n",
    )


# ---- tables --------------------------------------------------------------------------------------
def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [HEADINGS.get(key, key) for key in keys], [[row.get(key) for key in keys] for row in rows]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    numeric = [any(isinstance(row[i], (int, float, np.number)) for row in rows) for i in range(len(header))]

    def line(tag: str, cells: Sequence[Any]) -> str:
        kinds = (' class="number"' if number else "" for number in numeric)
        return "".join(f"<{tag}{kind}>{_cell(c)}</{tag}>" for kind, c in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{line("th", header)}</tr>\n{body}</table></div>'


def _cell(value: Any) -> str:
    """Floats with four significant digits; NaN and infinities by name; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, (float, np.floating)) and math.isfinite(value):
        x = float(value)
        return f"{x:#.4g}".rstrip(".") if abs(x) < 1e4 else f"{x:.0f}"
    return escape(str(value))


# ---- pictures ------------------------------------------------------------------------------------
def _element(figure: Any, text: str, caption: str = "") -> str:
    """The figure; text is for those who do not see it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    code = base64.b64encode(png.getvalue()).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/png;base64,{code}" alt="{escape(text)}">{below}</figure>\n'


def _history(path: Path) -> dict[str, list[float]]:
    """The columns of metrics.csv; an empty field is NaN."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key] or "nan") for row in rows] for key in (rows[0] if rows else ())}


def _curves(runs: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    histories = {run["name"]: _history(run["metrics_csv"]) for run in runs}
    elements: list[str] = []
    for column, heading in CURVES.items():
        figure = Figure(figsize=(5.2, 3.2), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        ends = []
        for name, history in histories.items():
            values = history.get(column, [])
            mark = "o" if len(values) < 2 else ""  # a single value makes no line
            axes.plot(history.get("epoch", []), values, mark + "-", color=colours[name], lw=1.8, label=name)
            ends.append(f"{name} {_cell(values[-1]) if values else 'empty'}")
        axes.set_title(heading, fontsize=11, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if not elements:
            axes.legend(frameon=False, fontsize=9)
        elements.append(_element(figure, f"{heading} at the last epoch: {', '.join(ends)}"))
    return "".join(elements)


def _overlays(overlays: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    styles = {"clean": (CLEAN, "solid"), "noisy": (NOISY, "dashed")}
    styles |= {name: (colour, "solid") for name, colour in colours.items()}
    shown: dict[str, None] = {}
    elements: list[str] = []
    for overlay in overlays:
        masks = {"clean": overlay["clean"], "noisy": overlay["noisy"], **overlay["predictions"]}
        masks = {name: np.asarray(mask) != 0 for name, mask in masks.items() if mask is not None}
        shown |= dict.fromkeys(masks)
        empty = [name for name, mask in masks.items() if not mask.any()]
        caption = str(overlay["id"]) + (f" – empty: {', '.join(empty)}" if empty else "")
        figure = _contours(np.asarray(overlay["image"], np.float64), masks, styles)
        elements.append(_element(figure, f"Contours: {', '.join(masks)}", caption))
    legend = "".join(
        f'<li><i style="border-color:{colour};border-top-style:{line}"></i>{escape(name)}</li>'
        for name, (colour, line) in styles.items()
        if name in shown
    )
    return f'<ul class="legend">{legend}</ul>\n<div class="grid">{"".join(elements)}</div>'


def _weights(weights: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Beside each other: the image with both labels, the pixels whose label is wrong, and their weights."""
    elements = []
    for name, shown in weights.items():
        for case in shown:
            clean, noisy = (np.asarray(case[key]) != 0 for key in ("clean", "noisy"))
            wrong = np.asarray(case["clean"]) != np.asarray(case["noisy"])
            elements.append(
                _element(
                    _side_by_side(np.asarray(case["image"], np.float64), clean, noisy, wrong, case["weight"]),
                    f"Label errors and weights of {name}",
                    f"{case['id']}, {name}: {int(wrong.sum())} wrong labels",
                )
            )
    legend = (
        f'<li><i style="border-color:{CLEAN}"></i>right label</li>'
        f'<li><i style="border-color:{NOISY};border-top-style:dashed"></i>label trained on</li>'
        "<li>middle: label errors, white; right: weight, black 0 to white 1</li>"
    )
    return f'<ul class="legend">{legend}</ul>\n<div class="grid curves">{"".join(elements)}</div>'


def _explained(cases: Sequence[Mapping[str, Any]]) -> str:
    """A row of pictures for each kind of map, below the image, and the facts of all cases."""
    elements, names = [], dict[str, None]()
    for case in cases:
        if "maps" in case:
            names |= dict.fromkeys(case["maps"])
            facts = ", ".join(f"{name} {_cell(value)}" for name, value in case["facts"].items())
            figure = _rows_of_maps(case["image"], case["maps"])
            elements.append(_element(figure, ", ".join(case["maps"]), f"{case['id']}: {facts}"))
    legend = f"<li>rows: the image, then {escape(', '.join(names))}; black 0 to white 1</li>"
    table = _table(*_columns([{"case": case["id"], **case["facts"]} for case in cases]))
    return f'<ul class="legend">{legend}</ul>\n<div class="grid curves">{"".join(elements)}</div>\n{table}'


def _rows_of_maps(image: Any, maps: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = [np.asarray(image, np.float64)[None], *(np.asarray(planes) for planes in maps.values())]
    wide, side = max(len(row) for row in rows), image.shape[0] / image.shape[1]
    figure = Figure(figsize=(1.4 * wide, 1.4 * side * len(rows)), dpi=100)
    for i, planes in enumerate(rows):
        for j, plane in enumerate(planes):
            axes = figure.add_axes(
                (j / wide + 0.003, 1 - (i + 1) / len(rows), 1 / wide - 0.006, 0.98 / len(rows))
            )
            axes.set_axis_off()
            low, high = (0, 1) if i else (None, None)
            axes.imshow(plane, cmap="gray", interpolation="nearest", vmin=low, vmax=high)
    return figure


def _side_by_side(image: Any, clean: Any, noisy: Any, wrong: Any, weight: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.5 * image.shape[0] / image.shape[1]), dpi=120)
    for i, plane in enumerate((image, wrong, weight)):
        axes = figure.add_axes((i / 3 + 0.002, 0, 1 / 3 - 0.004, 1))
        axes.set_axis_off()
        low, high = (0, 1) if i else (None, None)
        axes.imshow(plane, cmap="gray", interpolation="nearest", vmin=low, vmax=high)
        for mask, colour, line in ((clean, CLEAN, "solid"), (noisy, NOISY, "dashed")):
            if i == 0 and mask.any() and not mask.all():
                axes.contour(
                    mask.astype(float), levels=[0.5], colors=[colour], linestyles=[line], linewidths=1.6
                )
    return figure


def _contours(
    image: np.ndarray[Any, Any],
    masks: Mapping[str, np.ndarray[Any, Any]],
    styles: Mapping[str, tuple[str, str]],
) -> Any:
    """The image in grey with the contour of each mask, midway between its pixels and their neighbours."""
    from matplotlib.figure import Figure

    (top, bottom), (left, right) = _window(np.any([*masks.values()], axis=0))
    figure = Figure(figsize=(4, 4 * (bottom - top) / (right - left)), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 1.0)
    axes.imshow(image, cmap="gray", vmin=low, vmax=high if high > low else low + 1)
    for i, (name, mask) in enumerate(masks.items()):
        if mask.any():
            colour, line = styles[name]
            # Each line is thinner than the one below it, so that all show where they coincide.
            thickness = 4.6 - 3.2 * i / max(1, len(masks) - 1)
            axes.contour(
                np.arange(-1, image.shape[1] + 1),
                np.arange(-1, image.shape[0] + 1),
                np.pad(mask, 1).astype(float),
                levels=[0.5],
                colors=[colour],
                linestyles=[line],
                linewidths=[thickness],
            )
    axes.set_xlim(left - 0.5, right - 0.5)
    axes.set_ylim(bottom - 0.5, top - 0.5)
    return figure


def _window(mask: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """The part of each axis to show: twice the mask's extent, 40 pixels or more; all if it is empty."""
    inside = np.argwhere(mask)
    if not len(inside):
        return [(0, n) for n in mask.shape]
    low, high = inside.min(0), inside.max(0) + 1
    side = max(40, 2 * int((high - low).max()))
    starts = [
        max(0, min((a + b - side) // 2, n - side)) for a, b, n in zip(low, high, mask.shape, strict=True)
    ]
    return [(int(a), min(int(a) + side, n)) for a, n in zip(starts, mask.shape, strict=True)]
