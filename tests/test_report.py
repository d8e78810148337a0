"""report.html: one file that loads nothing, with everything in it that was given, whatever it is."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
report = pytest.importorskip("noisyseg_fast.training.report")

HOSTILE = "<script>alert('&')</script>"
HEADER = "epoch,train_loss,val_dice,val_iou,val_hd95\n"


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def run(
    folder: Path, name: str, lines: str = "0,0.9,0.5,0.4,9\n1,0.5,0.7,0.6,nan\n", **test: float
) -> dict[str, Any]:
    path = folder / f"metrics{len(list(folder.iterdir()))}.csv"
    path.write_text(HEADER + lines)
    return {"name": name, "metrics_csv": path, "test": test or {"dice": 0.8125, "iou": 0.7, "hd95": 2.5}}


def overlay(shape: tuple[int, int] = (64, 64), name: str = "a", **changes: Any) -> dict[str, Any]:
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 3 : shape[0] // 2, shape[1] // 3 : shape[1] // 2] = 1
    image = np.arange(mask.size, dtype=np.float32).reshape(shape)
    return {
        "id": "case 1",
        "image": image,
        "clean": mask,
        "noisy": mask,
        "predictions": {name: mask},
    } | changes


def written(folder: Path, **given: Any) -> Elements:
    path = folder / "out" / "report.html"
    report.write_report(path, **{"title": "Title", "runs": [], "overlays": [], **given})
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return Elements(path.read_text(encoding="utf-8"))


def test_everything_is_in_one_file(tmp_path: Path) -> None:
    runs = [
        run(tmp_path, "clean labels"),
        run(tmp_path, "noisy labels", dice=0.5, iou=0.4, hd95=float("nan")),
    ]
    shown = [overlay(name="clean labels"), overlay((40, 90), "noisy labels", noisy=None, id="case 2")]
    tables = [
        ("Times", ["operation", "ms"], [["EDT", 1.5], ["loss", None]]),
        ("More", [{"a": 3, "b": float("inf")}]),
    ]
    page = written(tmp_path, runs=runs, overlays=shown, tables=tables, notes=["First.", "Second."])
    for expected in (
        *("Title", "First.", "Second.", "clean labels", "noisy labels", "case 1", "case 2", "Dice", "HD95"),
        *("0.8125", "2.500", "nan", "Times", "operation", "EDT", "1.500", "–", "More", "inf"),
    ):
        assert expected in page.text
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert len(pictures) == 4 + 2  # curves and overlays
    for picture in pictures:
        kind, code = str(picture["src"]).split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(code).startswith(b"\x89PNG")
        assert picture["alt"]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = written(tmp_path, runs=[run(tmp_path, "a")], overlays=[overlay()])
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert not [a for _, a in page.tags if "href" in a or str(a.get("src", "data:")).split(":")[0] != "data"]
    assert not re.search(r"https?:|@import|url\(", (tmp_path / "out" / "report.html").read_text())


def test_text_is_escaped(tmp_path: Path) -> None:
    page = written(
        tmp_path,
        title=HOSTILE,
        runs=[run(tmp_path, HOSTILE, **{HOSTILE: 1.0})],
        overlays=[overlay(name=HOSTILE, id=HOSTILE)],
        tables=[(HOSTILE, [HOSTILE], [[HOSTILE]])],
        notes=[HOSTILE],
    )
    assert "script" not in [tag for tag, _ in page.tags]
    assert (
        page.text.count(HOSTILE) == 10
    )  # title twice, note, run, measure, legend, case, table, header, cell


@pytest.mark.parametrize(
    "lines",
    ["", "0,0.9,0.5,0.4,9\n", "0,nan,,nan,inf\n1,nan,,nan,inf\n"],
    ids=["no epoch", "one", "no numbers"],
)
def test_short_and_empty_histories(tmp_path: Path, lines: str) -> None:
    page = written(tmp_path, runs=[run(tmp_path, "a", lines)])
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 4


def test_empty_masks_are_named(tmp_path: Path) -> None:
    empty = np.zeros((64, 64), bool)
    page = written(tmp_path, overlays=[overlay(predictions={"ours": empty}), overlay(id="b", clean=empty)])
    assert "case 1 – empty: ours" in page.text
    assert "b – empty: clean" in page.text
    written(tmp_path, overlays=[overlay(clean=empty, noisy=None, predictions={"ours": empty})])


@pytest.mark.parametrize("image", [np.full((8, 9), 3.0), np.full((8, 9), np.nan), np.zeros((8, 9), np.uint8)])
def test_flat_and_broken_images(tmp_path: Path, image: np.ndarray[Any, Any]) -> None:
    written(tmp_path, overlays=[overlay((8, 9), image=image)])


def test_window_holds_the_masks() -> None:
    mask = np.zeros((512, 300), bool)
    mask[500:512, 10:40] = True
    assert report._window(mask) == [(452, 512), (0, 60)]
    assert report._window(mask[:, :20]) == [(472, 512), (0, 20)]
    assert report._window(np.zeros((5, 6), bool)) == [(0, 5), (0, 6)]


def test_more_runs_than_colours(tmp_path: Path) -> None:
    names = [f"run {i}" for i in range(7)]
    page = written(tmp_path, runs=[run(tmp_path, n) for n in names])
    assert all(n in page.text for n in names)


def test_failure_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    lost = {"name": "a", "metrics_csv": tmp_path / "none.csv", "test": {}}
    with pytest.raises(FileNotFoundError):
        report.write_report(path, title="t", runs=[lost], overlays=[])
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(
            (0.12345, "0.1235"),
            (12.0, "12.00"),
            (1234.5, "1234"),
            (123456.7, "123457"),
            (7, "7"),
            (0.0, "0.000"),
        ),
        *((np.float64(0.5), "0.5000"), (np.float32(0.5), "0.5000"), (float("-inf"), "-inf"), (True, "True")),
        *((None, "–"), ("a<b", "a&lt;b")),
    ],
)
def test_cells(value: Any, text: str) -> None:
    assert report._cell(value) == text
