"""The Left Atrium 2018 set (Xiong et al., Medical Image Analysis 2021) as the public semi-supervised code lays it out.

    DIR/train.list, DIR/test.list       names of cases, one a line: 80 and 20 (UA-MT, SASSNet, DTC, DTML)
    DIR/labelled.list                   optional: the names whose labels are trained on; else the first fifth of
                                        train.list, 16 of 80
    DIR/2018LA_Seg_Training Set/<case>/mri_norm2.h5        with "image" and "label", (x, y, z), or
    DIR/2018LA_Seg_Training Set/<case>/lgemri.nrrd, laendo.nrrd       as the challenge gave them

The cases may also lie in DIR itself, and the lists beside it. mri_norm2.h5 is z-scored and cropped to the object with a
margin by UA-MT's la_heart_processing.py, from the labels of all cases; `boxed` crops other volumes alike. It holds no
spacing: the challenge's scans have 0.625 mm along each axis. NRRD labels are 0 and 255.

The cases that are to count as unlabelled keep their labels, for whoever trains an upper bound; training never looks
there. h5py comes with the extra "la".
"""

from __future__ import annotations

import importlib
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .data import Array, Case, Data, DataError, Raw, load
from .untrusted import first_line, fits, read_text, short

SPACING = (0.625, 0.625, 0.625)  # mm, of every scan of the challenge
FOLDERS = ("2018LA_Seg_Training Set", "2018LA_Seg_Training")
SHARE = 0.2  # of train.list that is labelled: 16 of 80
MARGIN = (10, 20)  # voxels around the object, la_heart_processing.py


def _lists(root: Path) -> Path | None:
    """The folder with train.list: DIR or the one above."""
    return next((place for place in (root, root.parent) if (place / "train.list").is_file()), None)


def is_atrium(root: Path) -> bool:
    """Whether the folder has this layout."""
    return _lists(root) is not None


def open_atrium(root: Path) -> Data:
    """The set by its lists, with no validation part; nothing but names is read.

    unlabelled: the other training cases, with their labels. DataError for a list that is missing or empty, names a case
    twice or one that is not there.
    """
    lists = _lists(root)
    if lists is None:
        raise DataError(f"{root}: has no train.list, the names of the training cases, one a line")
    train, test = _names(lists / "train.list"), _names(lists / "test.list")
    twice = sorted(set(train) & set(test))
    if twice:
        raise DataError(f"{lists / 'test.list'}: {twice[0]} is in train.list, too")
    if (lists / "labelled.list").is_file():
        labelled = _names(lists / "labelled.list")
        for name in labelled:
            if name not in train:
                raise DataError(f"{lists / 'labelled.list'}: {name} is not in train.list")
    else:
        labelled = train[: max(1, round(SHARE * len(train)))]
    cases = {name: _case(root, name) for name in [*train, *test]}
    return Data(
        [cases[name] for name in train if name in labelled],
        [],
        [cases[name] for name in test],
        source=str(root),
        unlabelled=[cases[name] for name in train if name not in labelled],
    )


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; it holds the names of the cases, one a line")
    try:
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text: {first_line(error)}") from error
    if not names:
        raise DataError(f"{path}: names no case")
    for name in names:
        if name in (".", "..") or set(name) & {"/", "\\", "\0"}:
            raise DataError(f"{path}: {short(name)} is no name of a folder")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: names {max(names, key=names.count)} twice")
    return names


def _case(root: Path, name: str) -> Case:
    for place in (root, *(root / folder for folder in FOLDERS)):
        folder = place / name
        if (folder / "mri_norm2.h5").is_file():
            path = folder / "mri_norm2.h5"
            return Case(name, name, (path,), (path,))
        if (folder / "lgemri.nrrd").is_file():
            return Case(name, name, (folder / "lgemri.nrrd",), (folder / "laendo.nrrd",))
    raise DataError(
        f"{root}: case {name} of the lists has neither {name}/mri_norm2.h5 nor {name}/lgemri.nrrd, "
        f'here or in "{FOLDERS[0]}"'
    )


def read(path: Path, what: str) -> Raw:
    """The "image" or "label" in a .h5; a .nrrd, whose label 255 becomes 1. DataError where that cannot be."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return _read_h5(path, what) if path.suffix == ".h5" else _read_nrrd(path, what)


def _module(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: cannot be read, {name} is not installed; pip install 'noisyseg-fast[la]'"
        ) from None


def _read_h5(path: Path, what: str) -> Raw:
    h5py = _module("h5py", path)
    try:
        with h5py.File(path, "r") as file:
            found = file[what] if file.get(what, getlink=True).__class__ is h5py.HardLink else None
            # External links and storage and virtual data sets would be read from other files.
            if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
                raise DataError(f'{path}: "{what}" is no array of this file')
            if found.dtype.kind not in "buif" or found.ndim != 3:
                raise DataError(
                    f'{path}: "{what}" has shape {found.shape} and type {found.dtype}; a volume of numbers is needed'
                )
            fits(path, found.size * found.dtype.itemsize, path.stat().st_size, packed=True)
            array = np.asarray(found)
    except DataError:
        raise
    except Exception as error:  # h5py passes on many kinds
        why = str(error.args[0]) if isinstance(error, KeyError) and error.args else first_line(error)
        raise DataError(f'{path}: cannot be read as HDF5 with "image" and "label": {why}') from error
    if not array.size:
        raise DataError(f'{path}: "{what}" has shape {array.shape}; a volume is needed')
    return Raw(_ones(array) if what == "label" else array, SPACING, np.diag([*SPACING, 1.0]))


# teem.sourceforge.net/nrrd/format.html. Read here and not by ITK, whose reader was brought down by lines of "space
# directions" that are too long (scripts/fuzz_readers.py), and reads the data from any other file that a header names.
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
# What turns a space into RAS; files without one are taken as ITK's, LPS.
_SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
    **dict.fromkeys(("left-posterior-superior", "lps", ""), (-1, -1, 1)),
}


def _read_nrrd(path: Path, what: str) -> Raw:
    fields, begin = _nrrd_header(path)

    def refuse(why: str) -> DataError:
        return DataError(f"{path}: {why}")

    for name in ("data file", "datafile"):
        if name in fields:
            raise refuse(f"its data are in another file, {short(fields[name])}; store them in one")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz") or {"byte skip", "byteskip", "line skip", "lineskip"} & set(
        fields
    ):
        raise refuse(f"encoding {short(fields.get('encoding'))} is not read; use raw or gzip, without skips")
    kind = next((k for k, names in _TYPES.items() if fields.get("type", "").lower() in names), None)
    sizes = fields.get("sizes", "").split()
    if (
        kind is None
        or len(sizes) != 3
        or not all(n.isdecimal() and len(n) < 19 and int(n) > 0 for n in sizes)
    ):
        raise refuse(
            f"has sizes {short(fields.get('sizes'))} and type {short(fields.get('type'))}; a volume is needed"
        )
    shape = tuple(map(int, sizes))
    dtype = np.dtype(kind).newbyteorder(">" if fields.get("endian", "little").lower() == "big" else "<")
    needed = math.prod(shape) * dtype.itemsize
    fits(path, needed, path.stat().st_size - begin, packed=encoding != "raw")
    with open(path, "rb") as file:
        file.seek(begin)
        data = file.read(needed if encoding == "raw" else -1)
    if encoding != "raw":
        try:
            data = zlib.decompressobj(31).decompress(data, needed + 1)
        except zlib.error as error:
            raise refuse(f"cannot be read as NRRD: {error}") from error
    if len(data) != needed:
        raise refuse(f"cannot be read as NRRD: holds {len(data)} bytes of data, {needed} are needed")
    array = np.frombuffer(data, dtype).reshape(shape, order="F").astype(dtype.newbyteorder("="))
    if "space directions" in fields:
        axes = np.reshape(_numbers(path, fields, "space directions", 9), (3, 3)).T
    else:
        axes = np.diag(_numbers(path, fields, "spacings", 3) if "spacings" in fields else np.ones(3))
    affine = np.eye(4)
    affine[:3, :3] = axes
    if "space origin" in fields:
        affine[:3, 3] = _numbers(path, fields, "space origin", 3)
    space = fields.get("space", "").lower()
    if space not in _SPACES:
        raise refuse(f"space {short(space)} is not read; use left-posterior-superior")
    affine[:3] *= np.reshape(_SPACES[space], (3, 1))
    spacing = tuple(float(s) for s in np.sqrt((axes**2).sum(0)))
    if not all(0 < s < 1e18 for s in spacing) or not (abs(affine) < 1e18).all():
        raise refuse(f"voxel spacing in the header must be positive and finite, got {short(spacing)}")
    return Raw(_ones(array) if what == "label" else array, spacing, affine)


def _nrrd_header(path: Path) -> tuple[dict[str, str], int]:
    """The fields of a header by their names in small letters, and where the data begin."""
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        if file.readline(100)[:7] != b"NRRD000":
            raise DataError(f"{path}: cannot be read as NRRD: it does not begin as one")
        for _ in range(1000):
            line = file.readline(10_000)
            if not line.strip():
                break
            name, colon, value = line.decode("latin-1").partition(":")
            if colon and not line.startswith(b"#") and not value.startswith("="):
                if name.lower() in fields:
                    raise DataError(f"{path}: its header has {short(name)} twice")
                fields[name.lower()] = value.strip()
        return fields, file.tell()


def _numbers(path: Path, fields: Mapping[str, str], name: str, count: int) -> Array:
    try:
        found = np.array([float(word) for word in re.sub(r"[(),]", " ", fields[name]).split()])
    except ValueError:
        found = np.zeros(0)
    if len(found) != count:
        raise DataError(f"{path}: {name} must be {count} numbers, got {short(fields[name])}")
    return found


def _ones(label: Array) -> Array:
    """With 1 for 255 where there is nothing else."""
    return label // 255 if label.max(initial=0) == 255 and np.isin(label, (0, 255)).all() else label


def boxed(
    case: Case,
    classes: int,
    smallest: tuple[int, ...],
    generator: np.random.Generator,
    margin: tuple[int, int] = MARGIN,
) -> Case:
    """The case cropped as la_heart_processing.py does: in the first two axes to the box of the labels' consensus, but
    at least `smallest`, and a number of voxels more on every side, drawn from range(*margin); the other axis stays.
    As there, this looks at the labels of every case, those of test and unlabelled ones, too.
    """
    image, target, spacing, raters, _ = load(case, classes)
    if not target.any():
        return replace(case, image=image, labels=raters, spacing=spacing)
    ranges = [slice(None)] * target.ndim
    for axis in range(2):
        shown = np.flatnonzero(target.any(tuple(a for a in range(target.ndim) if a != axis)))
        first, last = int(shown[0]), int(shown[-1]) + 1
        lacking = max(0, smallest[axis] - (last - first))
        first -= lacking // 2 + int(generator.integers(*margin))
        last += lacking - lacking // 2 + int(generator.integers(*margin))
        ranges[axis] = slice(max(0, first), min(target.shape[axis], last))
    here = tuple(ranges)
    return replace(
        case,
        image=np.ascontiguousarray(image[(slice(None), *here)]),
        labels=np.ascontiguousarray(raters[(slice(None), *here)]),
        spacing=spacing,
    )
