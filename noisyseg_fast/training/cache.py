"""Loaded cases as files that are mapped into memory.

One file for each case: MAGIC, the length of a header, the header (JSON: what the arrays are and where), the arrays,
uncompressed, as they are trained on. Several processes may share a folder: a file appears whole or not at all, its name
tells what it was made of, and the pages that are read stand in memory once for all of them. MONAI's PersistentDataset
pickles what it keeps and unpickles all of it for every item; of these files only the patch is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import written

MAGIC = b"noisyseg cache 1\n"
ALIGN = 64
KINDS = ("memory", "disk", "none")
Array = np.ndarray[Any, Any]


def check(kind: str, gigabytes: float) -> None:
    """ValueError for what is no way to keep cases."""
    if kind not in KINDS:
        raise ValueError(f"unknown cache {kind!r}; choose from {', '.join(KINDS)}")
    if not 0 <= gigabytes < float("inf"):
        raise ValueError(f"cache_gb must not be negative, got {gigabytes}")


def default_folder() -> Path:
    """Where caches are kept by the platform's convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisyseg"


def name_of(files: Sequence[Path | None], settings: Sequence[Any]) -> str:
    """A name for what is made of these files, as they are now, with these settings. OSError for a file that is gone."""
    states: list[Any] = []
    for path in files:
        found = path.stat() if path is not None else None
        states.append(found and [os.path.abspath(str(path)), found.st_size, found.st_mtime_ns])
    return hashlib.sha256(json.dumps([states, settings]).encode()).hexdigest()


def write(path: Path, arrays: Mapping[str, Array], facts: Any) -> None:
    """Arrays and what json can hold. OSError, with a line of advice, where there is no room."""
    layout: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        layout[name] = [array.dtype.str, array.shape, end]
        end += -(-array.nbytes // ALIGN) * ALIGN
    header = json.dumps({"arrays": layout, "bytes": end, "facts": facts}).encode()
    start = len(MAGIC) + 8 + len(header)
    try:
        with written(path) as temporary, open(temporary, "wb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + header + bytes(-start % ALIGN))
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).data if array.size else b"")
                file.write(bytes(-array.nbytes % ALIGN))
    except OSError as error:
        why = error.strerror or str(error).rpartition(": ")[2]
        raise OSError(
            f"{path.parent}: the cache cannot be written: {why}; choose another --cache-dir, or --cache none"
        ) from error


def read(path: Path) -> tuple[dict[str, Array], Any] | None:
    """The arrays, mapped, and the facts; None where there is no such file, or one that is not whole.

    What is written to the arrays stays with this process. They keep the file mapped as long as they live.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            length = int.from_bytes(file.read(8), "little")
            if length > 1 << 20:
                return None
            header = json.loads(file.read(length))
            start = -(-file.tell() // ALIGN) * ALIGN
            if os.fstat(file.fileno()).st_size != start + header["bytes"]:
                return None
            whole = (
                np.asarray(np.memmap(file, np.uint8, "c")) if header["bytes"] else np.zeros(start, np.uint8)
            )
        arrays = {}
        for name, (kind, shape, offset) in header["arrays"].items():
            arrays[name] = np.ndarray(tuple(shape), np.dtype(kind), whole, start + offset)
        return arrays, header["facts"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
