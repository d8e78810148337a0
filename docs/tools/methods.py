"""An MkDocs hook: <!-- methods --> becomes the table of the training methods, as they are registered."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

MARK = "<!-- methods -->"


def table() -> str:
    """A Markdown list, for a phone's width too: each method's name, what it does, its options and defaults."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from noisyseg_fast.training.methods import METHODS, configure

    lines = []
    for name, method in sorted(METHODS.items()):
        options = ", ".join(f"`{k}={v}`" for k, v in dataclasses.asdict(configure(name)).items())
        what = (method.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        needs = f" Needs: {', '.join(sorted(method.needs))}." if method.needs else ""
        lines += [
            f"### {name}",
            "",
            what.replace("*", r"\*") + needs,
            "",
            f"Options: {options or 'none'}.",
            "",
        ]
    return "\n".join(lines)


def on_page_markdown(markdown: str, **context: Any) -> str:
    return markdown.replace(MARK, table()) if MARK in markdown else markdown
