"""Images and the masks that raters drew on them: the sample, folders of NIfTI or PNG, MONAI datalists, arrays.

A folder has the layout of nnU-Net and the Medical Segmentation Decathlon:

    DIR/imagesTr/<case>.nii.gz                     or <case>_0000.nii.gz, _0001 ... for several channels;
    DIR/labelsTr/<case>.nii.gz                     .nii and .png work alike
    DIR/labelsTr/<case>_rater0.nii.gz, _rater1 ...    instead, when several raters drew
    DIR/imagesTs/, DIR/labelsTs/                   optional: the test set (otherwise a share of the patients)
    DIR/imagesUn/                                  optional: images without labels
    DIR/dataset.json                               optional: {"labels": {"background": 0, "lesion": 1, ...}}
    DIR/patients.csv                               optional: case,patient (otherwise each case is a patient)
                                                   and perhaps clean (true or false)

The Left Atrium 2018 set has its own layout and lists of cases: atrium.py.

A datalist is MONAI's JSON, with paths relative to it:

    {"training": [{"image": "a.nii.gz", "label": ["a_rater0.nii.gz", "a_rater1.nii.gz"],
                   "patient": "p1"}, ...],
     "validation": [...], "test": [...], "labels": {...}}

Images without a mask stand in the same folder or list: in imagesUn, or as entries without a label. A folder may
also be flat, without imagesTr:

    DIR/<case>_image.nii.gz, <case>_rater0.nii.gz, <case>_rater1 ... or <case>_label.nii.gz
                                                   without either: an unlabelled image

In a datalist "image" may be a list of channels, "label" a list of raters (null for one who did not draw), "patient",
"id" and "clean" are optional, as are "validation" and "test" (otherwise shares of the patients). "training"
entries without a label are unlabelled images; "test" entries without one are passed over.

An .npz holds arrays of N images of one size:

    image (N, *S) numbers;  mask (N, *S) or, for several raters, (N, raters, *S) class numbers
    rater_present (N, raters) bool       optional: false where a rater did not draw, whose mask then counts not
    patient (N,)                         optional: otherwise each image is a patient
    case (N,), or nodule (N,) and slice_index (N,)      optional: names
    clean (N,), labelled (N,) bool       optional
    reference (N, *S) or (N, experts, *S)    optional: masks to trust. They, or the consensus of the experts, are what
    reference_present (N, experts) bool      validation, test and meta set have for labels; training keeps mask
    crowd, crowd_present, name; expert_X, expert_X_present    BU-BIL's names of mask, its presence and case; reference
    spacing (N, dims) mm, or pixel_mm (N,)      optional: otherwise a pixel counts as 1

Training cases marked clean are the meta set: labels that may be trusted, which some methods learn from. Without
a mark, open_data(meta_fraction=...) takes them from so large a share of the training patients.

Pixels without a label, where only dots, lines or some slices were drawn, have one value of their own, which is
named: "ignore" in "labels" (as in nnU-Net: {"background": 0, "lesion": 1, "ignore": 2}), or open_data(
ignore_label=255). Unnamed, no value means that. Such a pixel has no vote in the consensus and counts in no loss and
no score; in memory it is 255 (MISSING).

NIfTI's voxel spacing (mm) comes from the header. PNG has none: one pixel counts as 1, unless the entry in a
datalist has "spacing". On request volumes are resampled to one spacing (resample.py); masks are then predicted
there and scored on the files' own grid. A PNG mask is grey or has a palette, whose indices count; a binary one may hold
0 and 255, when 255 is foreground unless it is the ignored value. Without "labels" there are two classes, 0 and 1.
Intensities are z-scored, image by image and channel by channel.

Whatever the order and direction in which a NIfTI file stores its axes, images and masks are turned to the nearest of
RAS (the first axis rises to the right, the second to the front, the third to the top; of a 2D image those two that
it has, in that order), without resampling: scans of mixed orientations look alike to the network. A mask must be
stored as its image is. The masks that are written lie in the image's own grid.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import noise
from .. import sample as sample_data
from ..labels import majority_vote
from . import resample

SUFFIXES = (".nii.gz", ".nii", ".png")
MISSING = 255  # in a label: nobody drew here
Array = np.ndarray[Any, Any]


class DataError(ValueError):
    """What is wrong with the data, with the file's name, in one line."""


# ---- reading one file -----------------------------------------------------------------------------


class Raw(NamedTuple):
    array: Array  # (*S) or, for an RGB PNG, (3, *S)
    spacing: tuple[float, ...] | None  # mm, one for each of S; None for PNG
    affine: Array | None  # (4, 4), None for PNG


def suffix(path: Path) -> str:
    """The suffix by which the file is read; DataError for one that is not supported."""
    for known in SUFFIXES:
        if path.name.lower().endswith(known):
            return known
    raise DataError(f"{path}: unknown kind of file; use {', '.join(SUFFIXES)}")


def stem(path: Path) -> str:
    return path.name[: -len(suffix(path))]


def read(path: Path, what: str = "image") -> Raw:
    """One file of one image or mask. PNG is read as rows and columns, NIfTI in its own axis order. what: image or
    label, for files that hold both (atrium.py); of a label PNG's palette the indices count, an image with a palette is
    refused."""
    if path.suffix in (".h5", ".nrrd"):
        from . import atrium

        return atrium.read(path, what)
    kind = suffix(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return _read_png(path, what == "label") if kind == ".png" else _read_nifti(path)


def _read_nifti(path: Path) -> Raw:
    import nibabel

    try:
        image = nibabel.load(path)
        array = np.asarray(image.dataobj)
        zooms = image.header.get_zooms()
        unit = image.header.get_xyzt_units()[0]
    except Exception as error:  # nibabel, gzip and zlib each raise their own
        raise DataError(f"{path}: cannot be read as NIfTI: {_first_line(error)}") from error
    shape = array.shape
    while len(shape) > 2 and shape[-1] == 1:  # a 2D image is often stored as a volume of one slice
        shape = shape[:-1]
    if len(shape) not in (2, 3) or not array.size:
        raise DataError(f"{path}: has shape {array.shape}; a 2D image or a 3D volume is needed")
    millimetres = {"meter": 1e3, "micron": 1e-3}.get(unit, 1.0)
    spacing = tuple(float(z) * millimetres for z in zooms[: len(shape)])
    if not all(0 < s < float("inf") for s in spacing):
        raise DataError(f"{path}: voxel spacing in the header must be positive and finite, got {spacing}")
    return Raw(array.reshape(shape), spacing, np.asarray(image.affine, dtype=np.float64))


def _read_png(path: Path, palette: bool) -> Raw:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            mode, array = image.mode, np.asarray(image)
    except Exception as error:
        raise DataError(f"{path}: cannot be read as PNG: {_first_line(error)}") from error
    if mode == "RGB":
        return Raw(np.moveaxis(array, -1, 0), None, None)
    if mode not in ("1", "L", "I", "I;16") and not (palette and mode == "P"):
        raise DataError(f"{path}: PNG of mode {mode}; use grey (8 or 16 bit) or RGB")
    return Raw(array, None, None)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# ---- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One image with its raters' masks: files, or arrays already in memory."""

    id: str
    patient: str
    image: tuple[Path, ...] | Array  # one file for each channel; (channels, *S)
    labels: (
        tuple[Path | None, ...] | Array
    )  # one file for each rater; (raters, *S), MISSING or None: not drawn
    spacing: tuple[float, ...] | None = None  # overrides the files'
    clean: bool = False  # the labels may be trusted
    ignore: int | None = None  # the value in label files of pixels without a label
    reference: Array | None = None  # (*S) uint8, one to be trusted more than the raters' consensus

    def trusted(self) -> Case:
        """The case with its reference, if it has one, for its only label."""
        return self if self.reference is None else replace(self, labels=self.reference[None])


class Own(NamedTuple):
    """On the grid of the files, where the rest was resampled."""

    target: Array  # (*S) uint8
    spacing: tuple[float, ...]


class Loaded(NamedTuple):
    image: Array  # (channels, *S) float32, z-scored
    target: Array  # (*S) uint8, the raters' consensus; MISSING where nobody labelled the pixel
    spacing: tuple[float, ...]  # one for each of S
    raters: Array  # (raters, *S) uint8, MISSING all over where one did not draw; (0, *S) where not asked for
    own: Own | None = None  # where the rest was resampled


def consensus(labels: Array, classes: int = 2) -> Array:
    """The label most raters gave each pixel; ties go to the larger label.

    labels: (raters, *S) integers in 0..classes-1, or MISSING, which does not vote; returns (*S) uint8, MISSING
    where nobody votes. With two classes: foreground where at least half of the raters drew it.
    """
    if not len(labels):
        return np.zeros(labels.shape[1:], dtype=np.uint8)
    fused: Array = majority_vote(
        labels.astype(np.uint8, copy=False),
        tie="highest",
        num_classes=classes,
        missing=MISSING,
        spatial_dims=labels.ndim - 1,
    )
    return _unless_missing(fused, labels)


def _unless_missing(label: Array, raters: Array) -> Array:
    """The label (*S), MISSING where none of the raters (raters, *S) has one."""
    return np.where((raters == MISSING).all(0), np.uint8(MISSING), label)


def load(case: Case, classes: int = 2) -> Loaded:
    """Read a case and check it. DataError for a missing or unreadable file, a mask whose shape or affine
    differs from its image's, intensities that are not finite, labels out of range, no labelled pixel."""
    image, spacing, first, raw = _load_image(case)
    if isinstance(case.labels, tuple):
        if not any(case.labels):
            raise DataError(f"case {case.id} has no label")
        missing = np.full(image.shape[1:], MISSING, dtype=np.uint8)
        labels = np.stack(
            [
                missing if path is None else _load_mask(path, first, raw, classes, case.ignore)
                for path in case.labels
            ]
        )
    else:
        labels = case.labels
    target = consensus(labels, classes)
    if _missing(target):
        raise DataError(f"case {case.id}: no pixel has a label; it belongs among the unlabelled images")
    return Loaded(zscore(image), target, spacing, labels)


def load_image(case: Case, wanted: Sequence[float] | None = None) -> tuple[Array, tuple[float, ...]]:
    """Only the image of a case, z-scored, and its spacing; resampled to the `wanted` one."""
    image, spacing, _, _ = _load_image(case)
    image = zscore(image)
    if wanted is None:
        return image, spacing
    size = _size(case, image, spacing, wanted)
    return resample.resample_image(image, size), resample.spacing_of(image.shape[1:], spacing, size)


def _size(case: Case, image: Array, spacing: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...]:
    try:
        return resample.size_of(image.shape[1:], spacing, wanted)
    except ValueError as error:
        raise DataError(f"case {case.id}: {error}") from None


def resampled(case: Case, loaded: Loaded, wanted: Sequence[float]) -> Loaded:
    """At the wanted spacing, with what is needed to score on the case's own grid."""
    image, target, spacing, raters, _ = loaded
    size = _size(case, image, spacing, wanted)
    return Loaded(
        resample.resample_image(image, size),
        resample.resample_label(target, size),
        resample.spacing_of(target.shape, spacing, size),
        np.stack([resample.resample_label(r, size) for r in raters])
        if len(raters)
        else np.zeros((0, *size), np.uint8),
        Own(target, spacing),
    )


def zscore(image: Array) -> Array:
    """(channels, *S) with mean 0 and standard deviation 1 in each channel; a constant channel becomes 0."""
    axes = tuple(range(1, image.ndim))
    mean = image.mean(axes, keepdims=True, dtype=np.float64)
    return scaled(image, mean, image.std(axes, keepdims=True, dtype=np.float64))


def scaled(image: Array, mean: Array, deviation: Array) -> Array:
    """float32 (image - mean) / deviation, of float64 mean and deviation that broadcast to the image."""
    result: Array = (image.astype(np.float32) - mean.astype(np.float32)) / np.maximum(deviation, 1e-8)
    return result.astype(np.float32)


def _load_image(case: Case) -> tuple[Array, tuple[float, ...], Path, Raw | None]:
    if not isinstance(case.image, tuple):
        dims = case.image.ndim - 1
        return case.image, case.spacing or (1.0,) * dims, Path(case.id), None
    channels, raw = open_image(case)
    image = np.ascontiguousarray(np.stack(channels))
    return image, spacing_of(case, raw, image.ndim - 1), case.image[0], raw


def open_image(case: Case) -> tuple[list[Array], Raw]:
    """The channels of the files of a case, checked, and the first file as it was read. Each channel (*S) is a view,
    turned to RAS, of what the file holds: of an uncompressed NIfTI file nothing is in memory yet."""
    assert isinstance(case.image, tuple)
    raws = [read(path) for path in case.image]
    first, raw = case.image[0], raws[0]
    for path, other in zip(case.image[1:], raws[1:], strict=True):
        check_geometry(path, other, first, raw)
    for path, other in zip(case.image, raws, strict=True):
        values = other.array
        if values.dtype.kind not in "buif":
            raise DataError(f"{path}: intensities must be real numbers, not {values.dtype}")
        planes = values.swapaxes(0, -1) if values.dtype.kind == "f" else ()
        bad = sum(plane.size - int(np.isfinite(plane).sum()) for plane in planes)
        if bad:
            raise DataError(
                f"{path}: {bad} of {values.size} intensities are not finite; replace NaN and infinity"
            )
    rgb = raw.array.ndim == 3 and raw.affine is None
    channels = [channel for r in raws for channel in (r.array if rgb else r.array[None])]
    return [to_ras(channel, raw.affine) for channel in channels], raw


def spacing_of(case: Case, raw: Raw, dims: int) -> tuple[float, ...]:
    """The spacing of a case whose first file is `raw`, in the order of `to_ras`."""
    spacing = case.spacing or raw.spacing or (1.0,) * dims
    if len(spacing) != dims:
        raise DataError(f'case {case.id}: "spacing" has {len(spacing)} values for {dims} spatial axes')
    return tuple(spacing[axis] for axis in orientation(raw.affine, dims)[0])


def orientation(affine: Array | None, dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How the axes of a file are turned to the nearest of RAS: which of them comes first, second (and third), and of
    these the ones to be reversed. As they lie where there is no affine (PNG), or none that tells."""
    if affine is not None:
        import nibabel

        found = nibabel.orientations.io_orientation(affine)[:dims]
        if np.isfinite(found).all():
            order = tuple(int(axis) for axis in np.argsort(found[:, 0]))
            return order, tuple(i for i, axis in enumerate(order) if found[axis, 1] < 0)
    return tuple(range(dims)), ()


def to_ras(array: Array, affine: Array | None) -> Array:
    """A view of the array (*S) of a file with that affine, turned as `orientation` says."""
    order, reversed_ = orientation(affine, array.ndim)
    return np.flip(array.transpose(order), reversed_)


def from_ras(array: Array, affine: Array | None) -> Array:
    """The inverse of `to_ras`, a view: in the axes of the file."""
    order, reversed_ = orientation(affine, array.ndim)
    return np.flip(array, reversed_).transpose(np.argsort(order))


def _load_mask(path: Path, image_path: Path, image: Raw | None, classes: int, ignore: int | None) -> Array:
    raw = read(path, "label")
    if image is not None:
        check_geometry(path, raw, image_path, image)
    values = raw.array
    if values.dtype.kind not in "buif" or not np.array_equal(values, np.floor(values)):
        raise DataError(f"{path}: labels must be whole numbers")
    ignored = values == ignore if ignore is not None else np.zeros(values.shape, dtype=bool)
    values = np.where(ignored, 0, values)
    if (
        raw.affine is None
        and classes == 2
        and values.max(initial=0) == 255
        and np.isin(values, (0, 255)).all()
    ):
        values = values // 255
    for extreme in (values.min(initial=0), values.max(initial=0)):
        if not 0 <= extreme < classes:
            raise DataError(
                f"{path}: label {int(extreme)} is out of range 0..{classes - 1}; "
                'name the classes in "labels" of dataset.json or the datalist, or, if it marks pixels without a '
                f"label, set ignore_label (--ignore-label {int(extreme)})"
            )
    labels = np.where(ignored, MISSING, values)
    return to_ras(labels, image.affine if image is not None else raw.affine).astype(np.uint8)


def check_geometry(path: Path, raw: Raw, image_path: Path, image: Raw, what: str = "its image") -> None:
    """DataError where a mask's shape or affine differs from that of `what`."""
    shape = raw.array.shape
    expected = image.array.shape[-2:] if image.affine is None else image.array.shape
    if shape != expected and not (raw.affine is None and image.affine is None and shape == image.array.shape):
        raise DataError(f"{path}: shape {shape} differs from {expected} of {what} {image_path}")
    if raw.affine is None or image.affine is None:
        return
    if not np.allclose(raw.affine, image.affine, rtol=1e-4, atol=1e-3):
        raise DataError(
            f"{path}: affine {_rows(raw.affine)} differs from {_rows(image.affine)} "
            f"of {what} {image_path}; resample the mask onto {'the image' if what == 'its image' else 'it'}"
        )


def _rows(affine: Array) -> str:
    return "[" + "; ".join(" ".join(f"{v:.4g}" for v in row) for row in affine[:3]) + "]"


# ---- sets of cases --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A data set, split by patient."""

    training: list[Case]  # labels perhaps wrong
    validation: list[Case]
    test: list[Case]
    classes: int = 2  # background included
    unit: str = "mm"  # of the spacing; "px" where no file says
    source: str = "sample"
    meta: list[Case] = field(default_factory=list)  # cases to train on whose labels may be trusted
    unlabelled: list[Case] = field(default_factory=list)  # images to train on, without labels
    ignore: int | None = None  # the value of pixels without a label, where there may be any

    def split(self, name: str) -> list[Case]:
        """A part with labels, or "all" of them."""
        parts = {
            "training": self.training,
            "validation": self.validation,
            "test": self.test,
            "meta": self.meta,
        }
        if name == "all":
            return [case for part in parts.values() for case in part]
        if name not in parts:
            raise ValueError(f"unknown split {name!r}; choose from {', '.join(parts)}, all")
        return parts[name]


def open_data(
    source: str | Path,
    *,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    meta_fraction: float = 0.0,
    ignore_label: int | None = None,
) -> Data:
    """The sample ("sample"), a folder, a datalist JSON or an .npz, split by patient.

    validation, test: shares of the patients, where the data do not say themselves. meta_fraction: share of the
    remaining training patients whose labels are taken for clean, where no case is marked so. ignore_label: the
    value in masks of pixels without a label, where the data do not name it. Unlabelled images of patients drawn
    for validation or test are left out. Of files, nothing but names is read.
    Raises DataError for a source that is missing, empty or malformed, ValueError for shares out of range.
    """
    if not 0 <= meta_fraction < 1:
        raise ValueError(f"meta_fraction must be at least 0 and below 1, got {meta_fraction}")
    for name, share in (("validation", validation), ("test", test)):
        if not 0 < share < 1:
            raise ValueError(f"{name} must be a share between 0 and 1, got {share}")
    if validation + test >= 1:
        raise ValueError(
            f"validation and test together must leave some training data, got {validation} + {test}"
        )
    if str(source) == "sample":
        data = _sample()
    else:
        path = Path(source)
        if path.is_dir():
            data = _folder(path)
        elif path.is_file():
            data = _arrays(path, ignore_label) if path.suffix == ".npz" else _datalist(path)
        else:
            raise DataError(f'{path}: no such data; pass "sample", a folder, a datalist .json or an .npz')
    if not data.training:
        raise DataError(f"{source}: has no training cases")
    data = _with_meta(_split(_ignoring(data, ignore_label), validation, test, seed), meta_fraction, seed)
    of_validation, of_test, meta = (
        [case.trusted() for case in part] for part in (data.validation, data.test, data.meta)
    )
    return replace(data, validation=of_validation, test=of_test, meta=meta)


def _ignoring(data: Data, value: int | None) -> Data:
    """With the value of pixels without a label in every case."""
    value = data.ignore if value is None else value
    if value is None:
        return data
    if data.ignore not in (None, value):
        raise DataError(
            f'{data.source}: "ignore" in "labels" is {data.ignore}, ignore_label {value}; name one'
        )
    if 0 <= value < data.classes:
        raise DataError(f"{data.source}: ignore_label {value} is one of the classes 0..{data.classes - 1}")
    training, validation, test = (
        [replace(case, ignore=value) for case in part] for part in (data.training, data.validation, data.test)
    )
    return replace(data, training=training, validation=validation, test=test, ignore=value)


def _split(data: Data, validation: float, test: float, seed: int) -> Data:
    need_validation, need_test = not data.validation, not data.test
    patients = sorted({case.patient for case in data.training})
    if len(patients) < 1 + need_validation + need_test:
        raise DataError(
            f"{data.source}: {len(patients)} patient(s) in training, at least "
            f"{1 + need_validation + need_test} are needed for a split by patient"
        )
    shuffled = [patients[i] for i in np.random.default_rng([seed, 0x73706C69]).permutation(len(patients))]
    most = len(patients) - 1 - need_validation
    count_test = min(most, max(1, round(test * len(patients)))) if need_test else 0
    most = len(patients) - 1 - count_test
    count_validation = min(most, max(1, round(validation * len(patients)))) if need_validation else 0
    of_test = set(shuffled[:count_test])
    of_validation = set(shuffled[count_test : count_test + count_validation])
    result = replace(
        data,
        training=[c for c in data.training if c.patient not in of_test | of_validation],
        validation=data.validation or [c for c in data.training if c.patient in of_validation],
        test=data.test or [c for c in data.training if c.patient in of_test],
        unlabelled=[c for c in data.unlabelled if c.patient not in of_test | of_validation],
    )
    parts = (
        ("training", [*result.training, *result.unlabelled]),
        ("validation", result.validation),
        ("test", result.test),
    )
    owner: dict[str, str] = {}
    for name, cases in parts:
        for case in cases:
            if owner.setdefault(case.patient, name) != name:
                raise DataError(
                    f"{data.source}: patient {case.patient} is in both {owner[case.patient]} and {name}"
                )
    return result


def _with_meta(data: Data, fraction: float, seed: int) -> Data:
    """The meta set taken out of the training cases: those marked clean, or those of drawn patients."""
    clean = {case.id for case in data.training if case.clean}
    if fraction and clean:
        raise DataError(
            f"{data.source}: {len(clean)} training cases are marked clean and make the meta set; "
            "leave meta_fraction at 0"
        )
    if fraction:
        patients = sorted({case.patient for case in data.training})
        if len(patients) < 2:
            raise DataError(
                f"{data.source}: {len(patients)} training patient(s) cannot spare any for a meta set"
            )
        order = np.random.default_rng([seed, 0x6D657461]).permutation(len(patients))  # "meta"
        count = min(len(patients) - 1, max(1, round(fraction * len(patients))))
        drawn = {patients[i] for i in order[:count]}
        clean = {case.id for case in data.training if case.patient in drawn}
    rest = [case for case in data.training if case.id not in clean]
    if not rest:
        raise DataError(f"{data.source}: every training case is marked clean; mark only those to be trusted")
    return replace(data, training=rest, meta=[case for case in data.training if case.id in clean])


def _sample() -> Data:
    data = sample_data.load()
    cases = [
        Case(str(nodule), str(patient), image[None], masks, (float(mm), float(mm)))
        for image, masks, patient, nodule, mm in zip(*data, strict=True)
    ]
    return Data(cases, [], [])


def _folder(root: Path) -> Data:
    if not (root / "imagesTr").is_dir():
        from . import atrium

        if atrium.is_atrium(root):
            return atrium.open_atrium(root)
        if any(stem(path).endswith("_image") for path in files(root)):
            return _flat(root)
    if not (root / "imagesTr").is_dir():
        raise DataError(f"{root}: has no folder imagesTr (layout of nnU-Net: imagesTr, labelsTr)")
    patients, clean = _patients(root / "patients.csv")
    classes, ignore = 2, None
    if (root / "dataset.json").is_file():
        classes, ignore = _classes(_json(root / "dataset.json"), root / "dataset.json")
    training = [
        replace(case, clean=case.id in clean)
        for case in _folder_cases(root / "imagesTr", root / "labelsTr", patients)
    ]
    test: list[Case] = []
    if (root / "imagesTs").is_dir() and (root / "labelsTs").is_dir():
        test = _folder_cases(root / "imagesTs", root / "labelsTs", patients)
    unlabelled = _folder_images(root / "imagesUn", patients) if (root / "imagesUn").is_dir() else []
    _check_ids([*training, *test, *unlabelled], root, "rename one")
    return Data(training, [], test, classes, _unit(training), str(root), [], unlabelled, ignore)


def _flat(root: Path) -> Data:
    """A folder of <case>_image, <case>_rater0, <case>_rater1 ... or <case>_label."""
    patients, clean = _patients(root / "patients.csv")
    images: dict[str, Path] = {}
    masks: dict[str, dict[int, Path]] = {}
    for path in files(root):
        name = re.fullmatch(r"(.+)_(?:(image)|label|rater(\d+))", stem(path))
        if name is None:
            raise DataError(f"{path}: is neither CASE_image, CASE_label nor CASE_rater0, _rater1, ...")
        if name[2]:
            images[name[1]] = path
        else:
            masks.setdefault(name[1], {})[int(name[3] or 0)] = path
    for case, of_case in masks.items():
        if case not in images:
            raise DataError(f"{next(iter(of_case.values()))}: has no image {case}_image in {root}")
    raters = sorted({rater for of_case in masks.values() for rater in of_case})
    cases = [
        Case(
            case,
            patients.get(case, case),
            (path,),
            tuple(masks[case].get(r) for r in raters) if case in masks else (),
            clean=case in clean,
        )
        for case, path in sorted(images.items())
    ]
    classes, ignore = 2, None
    if (root / "dataset.json").is_file():
        classes, ignore = _classes(_json(root / "dataset.json"), root / "dataset.json")
    return Data(
        [c for c in cases if c.labels],
        [],
        [],
        classes,
        _unit(cases),
        str(root),
        unlabelled=[c for c in cases if not c.labels],
        ignore=ignore,
    )


def _check_ids(cases: Iterable[Case], source: Path, advice: str) -> None:
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise DataError(f"{source}: two entries have the id {case.id}; {advice}")
        seen.add(case.id)


def _folder_images(images: Path, patients: Mapping[str, str]) -> list[Case]:
    """Cases without labels."""
    channels: dict[str, list[Path]] = {}
    for path in files(images):
        channels.setdefault(re.sub(r"_\d{4}$", "", stem(path)), []).append(path)
    return [
        Case(name, patients.get(name, name), tuple(paths), ()) for name, paths in sorted(channels.items())
    ]


def _folder_cases(images: Path, labels: Path, patients: Mapping[str, str]) -> list[Case]:
    if not labels.is_dir():
        raise DataError(f"{labels}: no such folder")
    masks: dict[str, dict[int, Path]] = {}  # by rater
    for path in files(labels):
        rater = re.fullmatch(r"(.+)_rater(\d+)", stem(path))
        masks.setdefault(rater[1] if rater else stem(path), {})[int(rater[2]) if rater else 0] = path
    raters = sorted({rater for of_case in masks.values() for rater in of_case})
    channels: dict[str, list[Path]] = {}
    for path in files(images):
        # "scan_0001" is a case of its own where a label has that name, else channel 1 of case "scan".
        channel = re.fullmatch(r"(.+)_\d{4}", stem(path))
        name = channel[1] if channel and stem(path) not in masks else stem(path)
        if name not in masks:
            raise DataError(
                f"{path}: has no label {name} in {labels} (as {name}.nii.gz or {name}_rater0.nii.gz, ...); "
                "images without labels belong in imagesUn"
            )
        channels.setdefault(name, []).append(path)
    for name, of_case in masks.items():
        if name not in channels:
            raise DataError(f"{next(iter(of_case.values()))}: has no image {name} in {images}")
    if not channels:
        raise DataError(f"{images}: holds no images ({', '.join(SUFFIXES)})")
    return [
        Case(name, patients.get(name, name), tuple(paths), tuple(masks[name].get(r) for r in raters))
        for name, paths in sorted(channels.items())
    ]


def files(folder: Path) -> list[Path]:
    """The image files in a folder, sorted by name."""
    return sorted(
        p for p in folder.iterdir() if p.name.lower().endswith(SUFFIXES) and not p.name.startswith(".")
    )


def _patients(path: Path) -> tuple[dict[str, str], set[str]]:
    """The patient of each case, and the cases that are marked clean."""
    if not path.is_file():
        return {}, set()
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"case", "patient"} <= set(reader.fieldnames or ()):
            raise DataError(
                f"{path}: needs the columns case,patient, has {','.join(reader.fieldnames or ())}"
            )
        rows = list(reader)
    truth = {"true": True, "1": True, "false": False, "0": False, "": False}
    clean = set()
    for row in rows:
        value = (row.get("clean") or "").strip().lower()
        if value not in truth:
            raise DataError(f'{path}: "clean" of case {row["case"]} must be true or false, got {value!r}')
        if truth[value]:
            clean.add(row["case"])
    return {row["case"]: row["patient"] for row in rows}, clean


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return content


def _classes(content: Mapping[str, Any], path: Path) -> tuple[int, int | None]:
    """The number of classes, and the value of pixels without a label."""
    labels = content.get("labels")
    if labels is None:
        return 2, None
    # nnU-Net writes {"name": 1}, the Decathlon {"1": "name"}.
    try:
        named = [(v, int(k)) if isinstance(v, str) else (k, int(v)) for k, v in labels.items()]
    except (AttributeError, TypeError, ValueError):
        raise DataError(
            f'{path}: "labels" must be like {{"background": 0, "lesion": 1}}, got {labels}'
        ) from None
    values = [value for name, value in named if name != "ignore"]
    if sorted(values) != list(range(len(values))) or not 2 <= len(values) <= 255:
        raise DataError(f'{path}: the values of "labels" must be 0, 1, 2, ..., got {values}')
    return len(values), dict(named).get("ignore")


def _datalist(path: Path) -> Data:
    content = _json(path)
    if not isinstance(content.get("training"), list):
        raise DataError(f'{path}: needs a list "training" of {{"image": ..., "label": ...}}')
    parts = {
        name: [
            _entry(path, name, i, entry)
            for i, entry in enumerate(content.get(name) or [])
            if name != "test" or (isinstance(entry, dict) and "label" in entry)
        ]
        for name in ("training", "validation", "test")
    }
    _check_ids((c for part in parts.values() for c in part), path, 'give them an "id"')
    classes, ignore = _classes(content, path)
    return Data(
        [c for c in parts["training"] if c.labels],
        parts["validation"],
        parts["test"],
        classes,
        _unit(parts["training"]),
        str(path),
        unlabelled=[c for c in parts["training"] if not c.labels],
        ignore=ignore,
    )


def _entry(path: Path, part: str, index: int, entry: Any) -> Case:
    where = f"{path}: {part}[{index}]"
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object with image and label")

    def names(key: str, kinds: tuple[type, ...] = (str,)) -> list[Any]:
        value = entry.get(key)
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not any(found) or not all(isinstance(n, kinds) for n in found):
            raise DataError(f'{where}: "{key}" must be a file name or a list of them')
        return found

    images = tuple(path.parent / n for n in names("image"))
    labels: tuple[Path | None, ...] = ()
    if "label" in entry or part != "training":
        labels = tuple(n and path.parent / n for n in names("label", (str, type(None))))
    clean = entry.get("clean", False)
    if not isinstance(clean, bool):
        raise DataError(f'{where}: "clean" must be true or false, got {clean!r}')
    name = str(entry.get("id", re.sub(r"_0000$", "", stem(images[0]))))
    spacing = entry.get("spacing")
    if spacing is not None:
        try:
            spacing = tuple(float(s) for s in spacing)
        except (TypeError, ValueError):
            spacing = ()
        if not spacing or not all(0 < s < float("inf") for s in spacing):
            raise DataError(f'{where}: "spacing" must be a list of positive numbers, got {entry["spacing"]}')
    return Case(name, str(entry.get("patient", name)), images, labels, spacing, clean)


def _arrays(path: Path, ignore: int | None = None) -> Data:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except Exception as error:
        raise DataError(f"{path}: cannot be read as .npz: {_first_line(error)}") from error
    found = _renamed(found)
    for name in ("image", "mask"):
        if name not in found:
            raise DataError(f"{path}: needs the arrays image and mask, has {', '.join(found) or 'none'}")
    image, mask = found["image"], found["mask"]
    count, size, dims = len(image), image.shape[1:], image.ndim - 1
    if mask.shape == image.shape:
        mask = mask[:, None]
    if dims not in (2, 3) or mask.shape != (count, *mask.shape[1:2], *size):
        raise DataError(
            f"{path}: image must be (N, *S) with 2 or 3 axes S and mask (N, *S) or (N, raters, *S), "
            f"got {image.shape} and {found['mask'].shape}"
        )
    if image.dtype.kind not in "buif" or not np.isfinite(image).all():
        raise DataError(f"{path}: image must hold finite real numbers")
    ignored = mask == ignore if ignore is not None else np.zeros(mask.shape, dtype=bool)
    mask = np.where(ignored, 0, mask)
    if mask.dtype.kind not in "bui" or (mask.size and not 0 <= mask.min() <= mask.max() < MISSING):
        raise DataError(
            f"{path}: mask must hold class numbers from 0 to {MISSING - 1}; if another value marks pixels without a "
            "label, set ignore_label (--ignore-label)"
        )
    reference = found.get("reference", mask[:, :0])
    if reference.shape == image.shape:
        reference = reference[:, None]
    if reference.shape != (count, *reference.shape[1:2], *size):
        raise DataError(
            f"{path}: reference must be {image.shape} or have an axis of experts behind the first"
        )
    if reference.dtype.kind not in "bui" or (
        reference.size and not 0 <= reference.min() <= reference.max() < MISSING
    ):
        raise DataError(f"{path}: reference must hold class numbers from 0 to {MISSING - 1}")

    def optional(name: str, shape: tuple[int, ...], default: Any) -> Array:
        value: Array | None = found.get(name)
        if value is None:
            return np.broadcast_to(np.asarray(default), shape)
        if value.shape != shape:
            raise DataError(f"{path}: {name} must have the shape {shape}, got {value.shape}")
        return value

    present = optional("rater_present", mask.shape[:2], True).astype(bool)
    clean, labelled = (
        optional(n, (count,), d).astype(bool) for n, d in (("clean", False), ("labelled", True))
    )
    labels = mask.astype(np.uint8)  # a copy
    labels[ignored] = MISSING
    labels[~present] = MISSING
    nobody = labelled & ~present.any(1)
    if nobody.any():
        raise DataError(
            f"{path}: no rater is present for image {np.flatnonzero(nobody)[0]}; mark it labelled=False"
        )
    experts = optional("reference_present", reference.shape[:2], True).astype(bool)
    expert = reference.astype(np.uint8)
    expert[~experts] = MISSING
    ids = found.get("case")
    if ids is None and "nodule" in found and "slice_index" in found:
        ids = np.asarray([f"{n}_s{i}" for n, i in zip(found["nodule"], found["slice_index"], strict=True)])
    if ids is None:
        ids = found.get("nodule", np.asarray([f"{path.stem}_{i}" for i in range(count)]))
    ids = ids.astype(str)
    patients = found.get("patient", ids).astype(str)
    if len(ids) != count or len(patients) != count:
        raise DataError(f"{path}: needs one name and one patient for each of {count} images")
    known = "spacing" in found or "pixel_mm" in found
    millimetres = optional("pixel_mm", (count,), 1.0)[:, None]
    spacing = optional("spacing", (count, dims), np.broadcast_to(millimetres, (count, dims)))
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise DataError(f"{path}: spacing and pixel_mm must be positive and finite")
    classes = max(2, 1 + max(int(a[a != MISSING].max(initial=1)) for a in (labels, expert)))
    cases = [
        Case(
            str(ids[i]),
            str(patients[i]),
            image[i][None],
            labels[i] if labelled[i] else (),
            tuple(float(s) for s in spacing[i]),
            bool(clean[i]),
            reference=consensus(expert[i], classes) if experts[i].any() else None,
        )
        for i in range(count)
    ]
    _check_ids(cases, path, 'name them in the array "case"')
    return Data(
        [c for c in cases if len(c.labels)],
        [],
        [],
        classes,
        "mm" if known else "px",
        str(path),
        unlabelled=[c for c in cases if not len(c.labels)],
    )


def _renamed(found: dict[str, Array]) -> dict[str, Array]:
    """The arrays of an .npz by the names of this module, where it has BU-BIL's: a crowd and kinds of experts."""
    kinds = sorted(n for n in found if n.startswith("expert_") and f"{n}_present" in found)
    if "mask" in found or "crowd" not in found:
        return found
    result = {**found, "mask": found["crowd"]}
    if "crowd_present" in found:
        result["rater_present"] = found["crowd_present"]
    if kinds and "reference" not in found:
        result["reference"] = np.concatenate([found[n] for n in kinds], 1)
        result["reference_present"] = np.concatenate([found[f"{n}_present"] for n in kinds], 1)
    if "name" in found and "case" not in found:
        result["case"] = found["name"]
    return result


def _unit(cases: Iterable[Case]) -> str:
    known = (c.spacing or (isinstance(c.image, tuple) and suffix(c.image[0]) != ".png") for c in cases)
    return "mm" if all(known) else "px"


# ---- memory ---------------------------------------------------------------------------------------


@dataclass
class Store:
    """Loaded cases, kept in memory up to `limit` bytes and read again beyond that."""

    classes: int = 2
    limit: int = 4 << 30
    raters: bool = False  # keep what each rater drew, not only the consensus
    spacing: tuple[float, ...] | None = None  # resample to it
    _kept: dict[str, Loaded] = field(default_factory=dict)
    _bytes: int = 0

    def get(self, case: Case) -> Loaded:
        """The case; of an unlabelled one the target is MISSING all over."""
        loaded = self._kept.get(case.id)
        if loaded is None:
            if len(case.labels):
                loaded = load(case, self.classes)
            else:
                image, spacing = load_image(case)
                target = np.full(image.shape[1:], MISSING, dtype=np.uint8)
                loaded = Loaded(image, target, spacing, target[None][:0])
            if not self.raters:
                loaded = loaded._replace(raters=loaded.target[None][:0])
            if self.spacing is not None:
                loaded = resampled(case, loaded, self.spacing)
            size = loaded.image.nbytes + loaded.target.nbytes + loaded.raters.nbytes
            if self._bytes + size <= self.limit:
                self._kept[case.id] = loaded
                self._bytes += size
        return loaded


class Shape(NamedTuple):
    channels: int
    sizes: list[tuple[int, ...]]  # the distinct S of the training images

    @property
    def spatial_dims(self) -> int:
        return len(self.sizes[0])


def check(data: Data, store: Store, seen: Callable[[], None] = lambda: None) -> Shape:
    """Read every case once, so that bad data are told before any work is done; DataError as in `load`.

    All images must have the same number of channels and spatial axes. `seen` is called after each case.
    """
    first: tuple[str, int, int] | None = None
    sizes: set[tuple[int, ...]] = set()
    training = {case.id for part in (data.training, data.meta, data.unlabelled) for case in part}
    for case in [*data.split("all"), *data.unlabelled]:
        image = store.get(case).image
        if first is None:
            first = (case.id, image.shape[0], image.ndim - 1)
        elif first[1:] != (image.shape[0], image.ndim - 1):
            raise DataError(
                f"case {case.id} has {image.shape[0]} channel(s) and {image.ndim - 1} spatial axes, "
                f"case {first[0]} has {first[1]} and {first[2]}; all must agree"
            )
        if case.id in training:
            sizes.add(image.shape[1:])
        seen()
    assert first is not None
    return Shape(first[1], sorted(sizes))


def patch_size(shape: Shape, divisor: int, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """The size of the training patches and of the window at inference.

    wanted: one value for each axis, a multiple of divisor. Without it: the whole image where all are alike,
    fit the network and have at most 512^2 pixels or 96^3 voxels; else 256^2 or 64^3, less where the images
    are smaller.
    """
    dims = shape.spatial_dims
    if wanted is not None:
        patch = tuple(int(w) for w in wanted)
        if len(patch) != dims or any(p < 1 or p % divisor for p in patch):
            raise ValueError(f"patch must be {dims} multiples of {divisor} (the network's), got {patch}")
    elif len(shape.sizes) == 1 and _fits(shape.sizes[0], divisor):
        patch = shape.sizes[0]
    else:
        usual = 256 if dims == 2 else 64
        longest = [max(size[axis] for size in shape.sizes) for axis in range(dims)]
        patch = tuple(min(usual, -(-n // divisor) * divisor) for n in longest)
    if math.prod(patch) <= divisor**dims:
        raise ValueError(
            f"patch {patch} is too small for a network that halves {divisor} to 1; enlarge one side"
        )
    return patch


def _fits(size: tuple[int, ...], divisor: int) -> bool:
    return all(n % divisor == 0 for n in size) and math.prod(size) <= (512**2 if len(size) == 2 else 96**3)


# ---- training set ---------------------------------------------------------------------------------


class TrainingSet(torch.utils.data.Dataset[dict[str, Any]]):
    """The training cases with labels corrupted once and for all, cropped, flipped and turned at random.

    All randomness comes from (seed, epoch, item), so a run does not depend on the number of worker
    processes, and a resumed one goes on as if it had never stopped. An epoch's items are numbers: case
    `number % len(cases)`, for the `number // len(cases)`-th time in that epoch.

    cases: may be corrupted; clean: cases that are trained on likewise but never corrupted; meta, unlabelled:
    what each item brings along, each of them equally often; raters: bring along what each rater drew (of a
    store with raters=True); fuse: makes the label of what each rater drew (raters, *S), once for each case, or
    returns None for the consensus; items: in an epoch, by default each case once.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        store: Store,
        patch: tuple[int, ...],
        *,
        noise_rate: float = 0.0,
        noise_radius: int = 6,
        seed: int = 0,
        clean: Sequence[Case] = (),
        meta: Sequence[Case] = (),
        unlabelled: Sequence[Case] = (),
        fuse: Callable[[Array], Array | None] | None = None,
        items: int | None = None,
    ) -> None:
        self.cases, self.store, self.seed, self.epoch = [*cases, *clean], store, seed, 0
        self.meta, self.unlabelled = meta, unlabelled
        radii = noise.corruption_radii(len(cases), noise_rate, noise_radius, seed)
        self.radii = np.concatenate([radii, np.zeros(len(clean), radii.dtype)])
        self.patch, self.items = patch, items or len(self.cases)
        self.raters = max(len(case.labels) for case in self.cases) if store.raters else 0
        self._fuse = fuse
        self._kept: dict[int, Array] = {}  # what it took work to make
        self._crop = _random_patch(patch)
        self._places: tuple[int, dict[int, int]] = (-1, {})  # an epoch, and where in it each item stands

    def __len__(self) -> int:
        return len(self.cases)

    def labels(self, index: int) -> Array:
        """(1 + raters, *S) uint8: the consensus and each rater's, dilated where the case was drawn for
        corruption."""
        labels = self._kept.get(index)
        if labels is None:
            loaded, radius = self.store.get(self.cases[index]), float(self.radii[index])
            labels = loaded.target[None]
            if self.raters:
                absent = np.full((self.raters, *loaded.target.shape), MISSING, dtype=np.uint8)
                labels = np.concatenate([labels, loaded.raters, absent])[: 1 + self.raters]
            if radius:
                labels = np.stack([_dilated(a, radius) for a in labels])
                self._kept[index] = labels
            fused = self._fuse(labels[1:]) if self._fuse and self.raters else None
            if fused is not None:
                fused = _unless_missing(fused, labels[1:])
                labels = self._kept[index] = np.concatenate([fused[None], labels[1:]])
        return labels

    def label(self, index: int) -> Array:
        """(*S) uint8: the consensus, dilated where the case was drawn for corruption."""
        label: Array = self.labels(index)[0]
        return label

    def order(self, epoch: int) -> list[int]:
        """The item numbers in the order of an epoch."""
        numbers: list[int] = []
        while len(numbers) < self.items:
            lap = len(numbers) // len(self)
            key = [self.seed, 1, epoch, lap] if lap else [self.seed, 1, epoch]
            numbers += (lap * len(self) + np.random.default_rng(key).permutation(len(self))).tolist()
        return numbers[: self.items]

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = number % len(self)
        loaded, labels = self.store.get(self.cases[index]), self.labels(index)
        generator = np.random.default_rng([self.seed, 2, self.epoch, number])
        image, moved = self._view(loaded, labels, generator)
        item: dict[str, Any] = {"image": torch.from_numpy(image), "label": torch.from_numpy(moved[0])}
        item["index"] = index
        if self.raters:
            item["raters"] = torch.from_numpy(moved[1:])
        if self.meta:
            item["meta"] = self.meta_item(number)
        if self.unlabelled:
            _, case, generator = self._companion(self.unlabelled, 4, number)
            image, _, spacing, *_ = self.store.get(case)
            image = _crop_anywhere(image, self.patch, generator)
            item["unlabelled"] = torch.from_numpy(_turn(image, image[:1], spacing, generator)[0])
        return item

    def case_ids(self, number: int) -> dict[str, str]:
        """The cases that an item of this epoch is made of: those of its image, "meta" and "unlabelled"."""
        ids = {"image": self.cases[number % len(self)].id}
        parts: tuple[tuple[str, Sequence[Case], int], ...] = (
            ("meta", self.meta, 3),
            ("unlabelled", self.unlabelled, 4),
        )
        return ids | {
            name: self._companion(cases, stream, number)[1].id for name, cases, stream in parts if cases
        }

    def probe(self, index: int) -> dict[str, Any]:
        """The same part of a case at every call, unturned: its image, label, "raters" if they are brought along, and
        "clean", the label before the corruption."""
        loaded = self.store.get(self.cases[index])
        labels = np.concatenate([self.labels(index), loaded.target[None]])
        image = loaded.image
        if image.shape[1:] != self.patch:
            image, labels = _crop(self._crop, image, labels, self.seed)
        parts = {"image": image, "label": labels[0], "clean": labels[-1]}
        if self.raters:
            parts["raters"] = labels[1:-1]
        return {
            **{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in parts.items()},
            "index": index,
        }

    def meta_item(self, number: int) -> dict[str, Any]:
        """The clean case that an item brings along: image, label and index, its place in the meta set."""
        index, case, generator = self._companion(self.meta, 3, number)
        loaded = self.store.get(case)
        image, labels = self._view(loaded, loaded.target[None], generator)
        return {"image": torch.from_numpy(image), "label": torch.from_numpy(labels[0]), "index": index}

    def _companion(
        self, cases: Sequence[Case], stream: int, number: int
    ) -> tuple[int, Case, np.random.Generator]:
        """The case that an item brings along: those of an epoch run through `cases` lap by lap."""
        if self._places[0] != self.epoch:
            self._places = self.epoch, {n: place for place, n in enumerate(self.order(self.epoch))}
        lap, place = divmod(self._places[1].get(number, number), len(cases))
        index = int(
            np.random.default_rng([self.seed, stream, self.epoch, lap]).permutation(len(cases))[place]
        )
        return index, cases[index], np.random.default_rng([self.seed, stream, self.epoch, number, 1])

    def _view(self, loaded: Loaded, labels: Array, generator: np.random.Generator) -> tuple[Array, Array]:
        """A patch of an image and its labels (k, *S), cropped around what the first of them shows."""
        image = loaded.image
        if image.shape[1:] != self.patch:
            image, labels = _crop(self._crop, image, labels, int(generator.integers(2**31)))
        return _turn(image, labels, loaded.spacing, generator)


def _missing(label: Array) -> bool:
    return bool(label.flat[0] == MISSING and (label == MISSING).all())


def _dilated(label: Array, radius: float) -> Array:
    """Dilated where there are labels; pixels without one stay so."""
    known = label != MISSING
    grown = noise.dilate_labels(label * known, radius)
    return np.where(known, grown, np.uint8(MISSING))


def _random_patch(patch: tuple[int, ...]) -> Any:
    """MONAI's crop around a foreground or a background pixel (even odds), padded where too small; if there is
    "known", around a pixel where it is not 0."""
    from monai import transforms

    keys = ("image", "label", "known", "labels")
    return transforms.Compose(
        [
            transforms.SpatialPadd(keys, patch, allow_missing_keys=True),
            transforms.RandCropByPosNegLabeld(
                keys, "label", patch, pos=1, neg=1, num_samples=1, image_key="known", allow_missing_keys=True
            ),
        ]
    )


def _crop(transform: Any, image: Array, labels: Array, seed: int) -> tuple[Array, Array]:
    transform.set_random_state(seed)
    known = labels[:1] != MISSING
    whole = {"image": image, "label": labels[:1] * known, "labels": labels}
    if not known.all():
        whole["known"] = known.astype(np.uint8)
    (patch,) = transform(whole)
    cropped = np.asarray(patch["labels"])
    for before, after in zip(labels, cropped, strict=True):
        if _missing(before):
            after[:] = MISSING  # where the image was padded, too
    return np.asarray(patch["image"]), cropped.astype(np.uint8)


def _crop_anywhere(image: Array, patch: tuple[int, ...], generator: np.random.Generator) -> Array:
    """A patch of an image without label, padded with 0 where too small."""
    lacking = [max(0, p - n) for n, p in zip(image.shape[1:], patch, strict=True)]
    image = np.pad(image, [(0, 0), *((n // 2, n - n // 2) for n in lacking)])
    starts = [int(generator.integers(n - p + 1)) for n, p in zip(image.shape[1:], patch, strict=True)]
    return image[(slice(None), *(slice(s, s + p) for s, p in zip(starts, patch, strict=True)))]


def _turn(
    image: Array, label: Array, spacing: Sequence[float], generator: np.random.Generator
) -> tuple[Array, Array]:
    """Random flips of every axis, and quarter turns in every plane whose axes are equally long and, within 1 %, equally
    spaced: what is turned has the shape and the spacing that it had.

    Not MONAI's, whose dictionary transforms take 3 ms for what takes NumPy 30 us on a 64x64 patch: more than
    the training step of a small network.
    """
    dims = image.ndim - 1
    axes = tuple(1 + int(a) for a in np.flatnonzero(generator.random(dims) < 0.5))
    image, label = np.flip(image, axes), np.flip(label, axes)
    for a, b in itertools.combinations(range(dims), 2):
        if image.shape[1 + a] == image.shape[1 + b] and math.isclose(spacing[a], spacing[b], rel_tol=0.01):
            turns = int(generator.integers(4))
            image, label = (np.rot90(x, turns, (1 + a, 1 + b)) for x in (image, label))
    return np.ascontiguousarray(image), np.ascontiguousarray(label)
