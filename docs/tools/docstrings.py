"""A griffe extension: our docstrings, written to be read in a terminal, as Markdown of the same look.

What Markdown would run together or take for markup: rows of a name and its meaning ("ce"   -sum ...), lists right
behind a line, >>> examples, asterisks in shapes.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROW = re.compile(r'^ {0,3}("?[\w.]+"?(?:, "?[\w.]+"?)*) {2,}(\S.*)$')


def markdown(text: str) -> str:
    """The docstring's text as Markdown; blocks indented by 4 or more (arguments, tables, code) stay as they are."""
    done: list[str] = []
    block: str | None = None  # of the lines above: "row", "list", "example" or None
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        row = _ROW.match(line)
        kind = None
        if line.startswith(">>>") or (block == "example" and line):
            kind = "example"
        elif row and block != "list":
            kind, line = "row", f"- `{row[1]}`: {_plain(row[2])}"
        elif line.startswith("- "):
            kind, line = "list", _plain(line)
        elif block in ("row", "list") and line and indent:
            kind, line = block, "    " + _plain(line.strip())
        elif indent < 4:
            line = _plain(line)
        if block == "example" != kind:
            done.append("```")
        if kind != block and line and done and done[-1]:
            done.append("")
        if kind == "example" != block:
            done.append("```pycon")
        done.append(line)
        block = kind
    return "\n".join([*done, "```"] if block == "example" else done)


def _plain(text: str) -> str:
    """Asterisks and angle brackets as themselves, outside `code`."""
    parts = text.split("`")
    parts[::2] = [p.replace("*", r"\*").replace("<", "&lt;") for p in parts[::2]]
    return "`".join(parts)


class Plain(griffe.Extension):
    """Every docstring through `markdown`."""

    def on_object(self, *, obj: Any, **options: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
