"""Files that are either whole or not there."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def written(path: Path, keep: int = 0) -> Iterator[Path]:
    """A temporary name beside `path`; on leaving, its bytes are on the disk and it takes the name of `path`.

    After an error the temporary file is removed and `path` is as it was; an OSError names `path`. The suffix is
    kept for writers that go by it. keep: so many files of older content stay too, as `older` names them.
    """
    temporary = path.with_name(f".tmp{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        if path.exists():
            for i in reversed(range(keep)):
                with suppress(FileNotFoundError):
                    os.replace(older(path, i), older(path, i + 1))
        os.replace(temporary, path)
        with suppress(OSError):  # some file systems cannot flush a folder
            _flush(path.parent)
    except OSError as error:
        if error.filename is None or str(error.filename) in map(str, (path, temporary, path.parent)):
            raise type(error)(f"{path}: cannot be written: {error.strerror or error}") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def older(path: Path, i: int) -> Path:
    """last.pt, last-1.pt, last-2.pt, ..."""
    return path.with_stem(f"{path.stem}-{i}") if i else path


def clear(folder: Path) -> None:
    """Remove what processes that were killed had begun to write."""
    for path in folder.glob(".tmp*-*"):
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def write_text(path: Path, text: str) -> None:
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Content as indented JSON; NaN and infinities, which JSON lacks, as null."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV; floats with 6 digits after the point, None as an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, text.getvalue())
