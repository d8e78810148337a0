"""An MkDocs hook: in tables, long names may break after a dot, an underscore or a slash, and nowhere else."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **context: Any) -> str:
    def name(code: re.Match[str]) -> str:
        return re.sub(r"(?<=\w)([._/])(?=\w)", r"\1<wbr>", code[0])

    return re.sub(
        r"<td[^>]*>.*?</td>", lambda cell: re.sub(r"<code>[^<]*</code>", name, cell[0]), html, flags=re.S
    )
