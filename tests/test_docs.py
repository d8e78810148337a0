"""docs/: every Python block runs, every command line parses, the site builds without warnings."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "monai", "lightning", "typer", "nibabel"):
    pytest.importorskip(package)
ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CODE = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.S) for page in PAGES}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}

# All pages in one process, since importing torch, MONAI and Lightning takes longer than most of them.
RUNNER = """
import json, os, sys, traceback
failed = {}
for name, code in json.load(open("code.json")).items():
    os.makedirs(name)
    os.chdir(name)
    try:
        exec(compile(code, name, "exec"), {"__name__": name})
    except BaseException:
        failed[name] = traceback.format_exc()
    os.chdir("..")
json.dump(failed, open("failed.json", "w"))
"""


def program(name: str) -> str:
    """A page's blocks, each on the line it has on the page."""
    text = (DOCS / name).read_text().split("\n")
    inside = False
    for i, line in enumerate(text):
        fence = line.startswith("```")
        if not inside or fence:
            text[i] = ""
        inside = line == "```python" if fence else inside
    return "\n".join(text)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "code.json").write_text(json.dumps({n: program(n) for n, blocks in CODE.items() if blocks}))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads((folder / "failed.json").read_text())
    return found


@pytest.mark.parametrize("page", [name for name, blocks in CODE.items() if blocks])
def test_the_pages_code_runs(page: str, failed: dict[str, str]) -> None:
    assert page not in failed, failed[page]


def test_every_task_page_has_code() -> None:
    without = {page.name for page in PAGES if not CODE[page.name] and "```" not in page.read_text()}
    assert without <= {"methods.md", "bad-input.md", "reliability.md", "scaling.md"}  # facts


# ---- command lines ---------------------------------------------------------------------------------
def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("noisyseg "):
                    found.append((page.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda x: x)
def test_the_command_line_is_taken(page: str, line: str) -> None:
    """Command, options and their number parse; a training method is one, and has the options that are set."""
    import typer.main

    from noisyseg_fast.cli import app
    from noisyseg_fast.training.methods import configure

    words = shlex.split(line, comments=True)[1:]
    group: Any = typer.main.get_command(app)
    outer = group.make_context("noisyseg", list(words))
    name, command, rest = group.resolve_command(outer, list(words))
    given = command.make_context(name, rest, parent=outer).params
    if name == "train" and given["method"]:
        configure(given["method"], dict(pair.split("=") for pair in given["set_"] or ()))


def test_a_wrong_option_would_be_seen() -> None:
    import typer.main

    from noisyseg_fast.cli import app

    group: Any = typer.main.get_command(app)
    outer = group.make_context("noisyseg", ["train", "--gamma", "2"])
    name, command, rest = group.resolve_command(outer, ["train", "--gamma", "2"])
    with pytest.raises(Exception, match="gamma"):
        command.make_context(name, rest, parent=outer)


def test_the_pages_name_files_that_exist() -> None:
    for page in PAGES:
        names = re.findall(
            r"\b((?:bench|csrc|examples|noisyseg_fast|scripts|tests)/[\w./-]*\w)", page.read_text()
        )
        for name in names:
            # FAMILY, and what the reader is told to write: docs/kernel.md, docs/method.md
            if "FAMILY" not in name and Path(name).stem not in ("count", "test_count", "small_loss"):
                assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_all_public_names_are_in_the_reference() -> None:
    """A public module without a page would be missed by nobody."""
    import noisyseg_fast

    told = set(
        re.findall(
            r"^::: noisyseg_fast\.([\w.]+)", "\n".join(p.read_text() for p in DOCS.glob("api/*.md")), re.M
        )
    )
    assert set(noisyseg_fast._HOME.values()) <= told
    compat = {f"compat.{p.stem}" for p in (ROOT / "noisyseg_fast" / "compat").glob("[!_]*.py")}
    assert compat <= told


# ---- the site --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", folder],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


def test_the_site_needs_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//[^"]*"', text), page
        assert not re.findall(
            r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="(?:https?:)?//', text
        ), page


def test_the_site_holds_docstrings_and_methods(site: Path) -> None:
    metrics = (site / "api" / "metrics.html").read_text()
    assert (
        'id="noisyseg_fast.metrics.surface_metrics"' in metrics
        and "Everything comes from one extraction" in metrics
    )
    from noisyseg_fast.training.methods import METHODS

    listed = set(re.findall(r'<h3 id="([\w]+)"', (site / "methods.html").read_text()))
    assert listed >= set(METHODS)


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe")
    sys.path.insert(0, str(DOCS / "tools"))
    try:
        from docstrings import markdown
    finally:
        sys.path.pop(0)
    text = 'kinds, (B, *S):\n"ce"     -sum_c\n         ln p\n"a", "b"  x\nthen\n- one\n  more\n\n>>> f(*x)\n3'
    assert markdown(text).split("\n") == [
        r"kinds, (B, \*S):",
        "",
        '- `"ce"`: -sum_c',
        "    ln p",
        '- `"a", "b"`: x',
        "",
        "then",
        "",
        "- one",
        "    more",
        "",
        "```pycon",
        ">>> f(*x)",
        "3",
        "```",
    ]
