"""Files that may come from elsewhere: what they say is checked before anything is allocated for it, nothing in them is
run, and whatever is wrong is told in one line that names the file.

A compressed file cannot hold more than DEFLATE's 1032 times its size, so a header that announces more is false: that
finds most bombs, and bounds the memory that a small file can take. What remains must fit into the memory there is.
"""

from __future__ import annotations

import json
import math
import os
import pickletools
import reprlib
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RATIO = 1032  # of DEFLATE at most: 258 bytes from 2 bits
SETTINGS = 100_000  # bytes of a file of settings at most; the parser takes seconds for as many
DEPTH = 50  # of what is nested in it; the parser's time grows with the square


class DataError(ValueError):
    """What is wrong with the data, with the file's name, in one line."""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def short(value: Any) -> str:
    """A repr of bounded length, whatever the value holds."""
    text = reprlib.Repr()
    text.maxstring = text.maxother = 60
    text.maxlevel = 3
    return text.repr(value)


def memory() -> int:
    """Bytes of memory that this process may have."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return 1 << 62
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's
        try:
            found = min(found, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):
            continue
    return found


def fits(path: Path, needed: int, stored: int, packed: bool) -> None:
    """DataError unless `stored` bytes of the file, packed or not, can hold the `needed` ones that it announces, and, of
    a packed file, which cannot be mapped, the memory can."""
    if needed > stored * (RATIO if packed else 1):
        raise DataError(
            f"{path}: announces {size(needed)} of data, which {size(stored)} in the file cannot hold; it is cut off or "
            "its header is wrong"
        )
    if packed and needed > memory():
        raise DataError(f"{path}: needs {size(needed)} of memory, there are {size(memory())}")


def size(count: int) -> str:
    """Bytes as people write them."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB" if count < 1000 else f"{count:.1e} TB"


# ---- text -----------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark. OSError, UnicodeDecodeError (a ValueError)."""
    return path.read_text(encoding="utf-8-sig")


def parse_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; DataError."""
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise DataError(f"{path}: cannot be read as JSON: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return content


def parse_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML (or JSON) file: plain values, lists and dictionaries. ValueError for anything else,
    aliases among it, of which a few lines can make terabytes."""
    import yaml

    def refuse(why: str) -> ValueError:
        return ValueError(f"{path}: is no configuration ({why})")

    try:
        if path.stat().st_size > SETTINGS:
            raise refuse(f"larger than {size(SETTINGS)}")
        text = read_text(path)
        depth = 0
        for token in yaml.scan(text):
            kind = type(token).__name__
            depth += kind.endswith("StartToken") - kind.endswith("EndToken")
            if isinstance(token, yaml.AliasToken):
                raise refuse("YAML aliases, *NAME, are not taken; write the values out")
            if depth > DEPTH:
                raise refuse("nested too deeply")
        content = yaml.safe_load(text)
    except OSError as error:
        raise FileNotFoundError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError:
        raise refuse("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise refuse(_reason(error)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise refuse(f"{' '.join(str(error.problem).split())}{place}") from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise refuse(" ".join(str(error).split())) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise refuse("must hold NAME: VALUE, one a line")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return error.strerror or str(error) if isinstance(error, OSError) else first_line(error)


# ---- arrays and checkpoints -----------------------------------------------------------------------


def load_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays in an .npz, none of them pickled; DataError."""
    try:
        stored = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # Compressed parts cannot overlap in an honest file, so together they are no larger than it.
            fits(path, sum(m.file_size for m in members), stored, packed=True)
            result = {}
            for member in members:
                with archive.open(member) as file:
                    shape, fortran, dtype = _npy_header(file)
                    if dtype.hasobject:
                        raise ValueError(f"{member.filename} holds Python objects, which are not read")
                    needed = math.prod(shape) * dtype.itemsize
                    if not 0 <= needed <= member.file_size:
                        raise ValueError(f"{member.filename} is cut off or its header is wrong")
                    array = np.frombuffer(file.read(needed), dtype, count=math.prod(shape))
                    if file.read(1):
                        raise ValueError(f"{member.filename} is longer than its header says")
                    letters = (
                        array.view(np.dtype("u4").newbyteorder(dtype.byteorder))
                        if dtype.kind == "U"
                        else array[:0]
                    )
                    if letters.size and letters.max() > sys.maxunicode:
                        raise ValueError(f"{member.filename} holds letters that there are not")
                result[member.filename.removesuffix(".npy")] = array.reshape(
                    shape, order="F" if fortran else "C"
                )
            return result
    except DataError:
        raise
    except zipfile.BadZipFile as error:
        why = "it is no zip archive, or cut off" if "not a zip" in str(error) else first_line(error)
        raise DataError(f"{path}: cannot be read as .npz: {why}") from error
    except (Exception, RecursionError) as error:  # zlib, struct, tokenize, ... each raise their own
        raise DataError(f"{path}: cannot be read as .npz: {first_line(error)}") from error


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of .npy is not read")
    shape, fortran, dtype = read(file)  # of at most 10000 characters
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape {short(shape)}")
    return shape, fortran, dtype


# What the tensors and values of our checkpoints are made of. torch's own list for weights_only has more, among it
# bytearray, which takes any size.
_PARTS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_PARTS |= {f"torch {kind}Storage" for kind in _KINDS}


def load_tensors(path: Path) -> Any:
    """What torch.save wrote, as far as it is tensors on the CPU and plain values; nothing in the file is run.
    ValueError."""
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (Exception, RecursionError) as error:
        line = first_line(error)
        if "weights_only" in line or "Weights only" in line:  # torch advises to load it without
            line = "it holds more than tensors and plain values"
        raise ValueError(f"{path}: cannot be read as a checkpoint: {line}") from error


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(max(m.file_size, m.compress_size) for m in members) > path.stat().st_size or any(
                m.compress_type != zipfile.ZIP_STORED for m in members
            ):
                raise ValueError("it is packed, which torch.save never does")
            if (part := archive.testzip()) is not None:  # torch itself does not look at the sums
                raise ValueError(f"the checksum of {part} is wrong")
            pickles = [archive.read(m) for m in members if m.filename.endswith((".pkl", ".pickle"))]
    except zipfile.BadZipFile as error:
        why = "it is no zip archive, or cut off" if "not a zip" in str(error) else first_line(error)
        raise ValueError(why) from error
    for pickle in pickles:
        for opcode, argument, _ in pickletools.genops(pickle):
            called = opcode.name in ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ_EX")
            if called or (opcode.name == "GLOBAL" and argument not in _PARTS):
                name = str(argument).replace(" ", ".") if opcode.name == "GLOBAL" else opcode.name
                raise ValueError(f"it asks for {short(name)}; only tensors and plain values are read")


# ---- settings -------------------------------------------------------------------------------------


def typed(values: Mapping[str, Any], hints: Mapping[str, Any], what: str = "setting") -> dict[str, Any]:
    """The values with the types that the hints of a dataclass name, of str, bool, int, float, tuples and dictionaries,
    or None; ValueError for others and for unknown names. Text that is a number (YAML's 1e-3) counts as one."""
    import difflib

    if not isinstance(values, Mapping):
        raise ValueError(f"needs the name of each {what}, got {short(values)}")
    result = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {what} {short(name)}{hint}")
        result[name] = _typed(name, value, hints[name])
    return result


def _typed(name: str, value: Any, hint: Any) -> Any:
    import types
    import typing

    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    origin = typing.get_origin(kind) or kind
    if origin is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_typed(name, v, item) for v in value)
        wish = "a list of whole numbers" if item is int else "a list of numbers"
    elif origin is float:
        try:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                return float(value)
        except (ValueError, OverflowError):
            pass
        wish = "a number"
    elif origin in (int, str, bool):
        if type(value) is origin:
            return value
        wish = {int: "a whole number", str: "text", bool: "true or false"}[origin]
    else:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return dict(value)
        wish = "NAME: VALUE pairs"
    raise ValueError(f"{name} must be {wish}, got {short(value)}")
