"""Images and the masks that raters drew on them: the sample, folders of NIfTI or PNG, MONAI datalists.

A folder has the layout of nnU-Net and the Medical Segmentation Decathlon:

    DIR/imagesTr/<case>.nii.gz                     or <case>_0000.nii.gz, _0001 ... for several channels;
    DIR/labelsTr/<case>.nii.gz                     .nii and .png work alike
    DIR/labelsTr/<case>_rater0.nii.gz, _rater1 ...    instead, when several raters drew
    DIR/imagesTs/, DIR/labelsTs/                   optional: the test set (otherwise a share of the patients)
    DIR/dataset.json                               optional: {"labels": {"background": 0, "lesion": 1, ...}}
    DIR/patients.csv                               optional: case,patient (otherwise each case is a patient)

A datalist is MONAI's JSON, with paths relative to it:

    {"training": [{"image": "a.nii.gz", "label": ["a_rater0.nii.gz", "a_rater1.nii.gz"],
                   "patient": "p1"}, ...],
     "validation": [...], "test": [...], "labels": {...}}

where "image" may be a list of channels, "label" a list of raters, "patient" and "id" are optional, as are
"validation" and "test" (otherwise shares of the patients); "test" entries without a label are passed over.

NIfTI's voxel spacing (mm) comes from the header. PNG has none: one pixel counts as 1, unless the entry in a
datalist has "spacing". A binary PNG mask may hold 0 and 255. Without "labels" there are two classes, 0 and 1.
Intensities are z-scored, image by image and channel by channel.
"""

from __future__ import annotations

import csv
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

SUFFIXES = (".nii.gz", ".nii", ".png")
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


def read(path: Path) -> Raw:
    """One file of one image or mask. PNG is read as rows and columns, NIfTI in its own axis order."""
    kind = suffix(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return _read_png(path) if kind == ".png" else _read_nifti(path)


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
    if len(shape) not in (2, 3):
        raise DataError(f"{path}: has shape {array.shape}; a 2D image or a 3D volume is needed")
    millimetres = {"meter": 1e3, "micron": 1e-3}.get(unit, 1.0)
    spacing = tuple(float(z) * millimetres for z in zooms[: len(shape)])
    if not all(0 < s < float("inf") for s in spacing):
        raise DataError(f"{path}: voxel spacing in the header must be positive and finite, got {spacing}")
    return Raw(array.reshape(shape), spacing, np.asarray(image.affine, dtype=np.float64))


def _read_png(path: Path) -> Raw:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            mode, array = image.mode, np.asarray(image)
    except Exception as error:
        raise DataError(f"{path}: cannot be read as PNG: {_first_line(error)}") from error
    if mode == "RGB":
        return Raw(np.moveaxis(array, -1, 0), None, None)
    if mode not in ("1", "L", "I", "I;16"):
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
    labels: tuple[Path, ...] | Array  # one file for each rater; (raters, *S)
    spacing: tuple[float, ...] | None = None  # overrides the files'


class Loaded(NamedTuple):
    image: Array  # (channels, *S) float32, z-scored
    target: Array  # (*S) uint8, the raters' consensus
    spacing: tuple[float, ...]  # one for each of S


def consensus(labels: Array, classes: int = 2) -> Array:
    """The label most raters gave each pixel; ties go to the larger label.

    labels: (raters, *S) integers in 0..classes-1; returns (*S) uint8. With two classes: foreground where at
    least half of the raters drew it.
    """
    best = np.zeros(labels.shape[1:], dtype=np.uint8)
    votes = (labels == 0).sum(0)
    for label in range(1, classes):
        count = (labels == label).sum(0)
        wins = count >= votes
        wins &= count > 0
        best[wins] = label
        votes = np.where(wins, count, votes)
    return best


def load(case: Case, classes: int = 2) -> Loaded:
    """Read a case and check it. DataError for a missing or unreadable file, a mask whose shape or affine
    differs from its image's, intensities that are not finite, labels out of range."""
    image, spacing, first, raw = _load_image(case)
    if isinstance(case.labels, tuple):
        if not case.labels:
            raise DataError(f"case {case.id} has no label")
        masks = [_load_mask(path, first, raw, classes) for path in case.labels]
        labels = np.stack(masks)
    else:
        labels = case.labels
    return Loaded(zscore(image), consensus(labels, classes), spacing)


def load_image(case: Case) -> tuple[Array, tuple[float, ...]]:
    """Only the image of a case, z-scored, and its spacing."""
    image, spacing, _, _ = _load_image(case)
    return zscore(image), spacing


def zscore(image: Array) -> Array:
    """(channels, *S) with mean 0 and standard deviation 1 in each channel; a constant channel becomes 0."""
    axes = tuple(range(1, image.ndim))
    mean = image.mean(axes, keepdims=True, dtype=np.float64)
    deviation = image.std(axes, keepdims=True, dtype=np.float64)
    scaled: Array = (image.astype(np.float32) - mean.astype(np.float32)) / np.maximum(deviation, 1e-8)
    return scaled.astype(np.float32)


def _load_image(case: Case) -> tuple[Array, tuple[float, ...], Path, Raw | None]:
    if not isinstance(case.image, tuple):
        dims = case.image.ndim - 1
        return case.image, case.spacing or (1.0,) * dims, Path(case.id), None
    raws = [read(path) for path in case.image]
    first, raw = case.image[0], raws[0]
    for path, other in zip(case.image[1:], raws[1:], strict=True):
        check_geometry(path, other, first, raw)
    for path, other in zip(case.image, raws, strict=True):
        values = other.array
        if values.dtype.kind not in "buif":
            raise DataError(f"{path}: intensities must be real numbers, not {values.dtype}")
        bad = int(np.size(values) - np.isfinite(values).sum())
        if bad:
            raise DataError(
                f"{path}: {bad} of {values.size} intensities are not finite; replace NaN and infinity"
            )
    rgb = raw.array.ndim == 3 and raw.affine is None
    image = np.concatenate([r.array if rgb else r.array[None] for r in raws])
    dims = image.ndim - 1
    spacing = case.spacing or raw.spacing or (1.0,) * dims
    if len(spacing) != dims:
        raise DataError(f'case {case.id}: "spacing" has {len(spacing)} values for {dims} spatial axes')
    return image, spacing, first, raw


def _load_mask(path: Path, image_path: Path, image: Raw | None, classes: int) -> Array:
    raw = read(path)
    if image is not None:
        check_geometry(path, raw, image_path, image)
    values = raw.array
    if values.dtype.kind not in "buif" or not np.array_equal(values, np.floor(values)):
        raise DataError(f"{path}: labels must be whole numbers")
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
                'name the classes in "labels" of dataset.json or the datalist'
            )
    return values.astype(np.uint8)


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

    training: list[Case]
    validation: list[Case]
    test: list[Case]
    classes: int = 2  # background included
    unit: str = "mm"  # of the spacing; "px" where no file says
    source: str = "sample"

    def split(self, name: str) -> list[Case]:
        parts = {"training": self.training, "validation": self.validation, "test": self.test}
        if name == "all":
            return [case for part in parts.values() for case in part]
        if name not in parts:
            raise ValueError(f"unknown split {name!r}; choose from {', '.join(parts)}, all")
        return parts[name]


def open_data(source: str | Path, *, validation: float = 0.1, test: float = 0.2, seed: int = 0) -> Data:
    """The sample ("sample"), a folder or a datalist JSON, split by patient.

    validation, test: shares of the patients, where the data do not say themselves. Nothing but names is read.
    Raises DataError for a source that is missing, empty or malformed, ValueError for shares out of range.
    """
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
            data = _datalist(path)
        else:
            raise DataError(f'{path}: no such data; pass "sample", a folder or a datalist .json')
    if not data.training:
        raise DataError(f"{source}: has no training cases")
    return _split(data, validation, test, seed)


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
    )
    parts = (("training", result.training), ("validation", result.validation), ("test", result.test))
    owner: dict[str, str] = {}
    for name, cases in parts:
        for case in cases:
            if owner.setdefault(case.patient, name) != name:
                raise DataError(
                    f"{data.source}: patient {case.patient} is in both {owner[case.patient]} and {name}"
                )
    return result


def _sample() -> Data:
    data = sample_data.load()
    cases = [
        Case(str(nodule), str(patient), image[None], masks, (float(mm), float(mm)))
        for image, masks, patient, nodule, mm in zip(*data, strict=True)
    ]
    return Data(cases, [], [])


def _folder(root: Path) -> Data:
    if not (root / "imagesTr").is_dir():
        raise DataError(f"{root}: has no folder imagesTr (layout of nnU-Net: imagesTr, labelsTr)")
    patients = _patients(root / "patients.csv")
    classes = 2
    if (root / "dataset.json").is_file():
        classes = _classes(_json(root / "dataset.json"), root / "dataset.json")
    training = _folder_cases(root / "imagesTr", root / "labelsTr", patients)
    test: list[Case] = []
    if (root / "imagesTs").is_dir() and (root / "labelsTs").is_dir():
        test = _folder_cases(root / "imagesTs", root / "labelsTs", patients)
    return Data(training, [], test, classes, _unit(training), str(root))


def _folder_cases(images: Path, labels: Path, patients: Mapping[str, str]) -> list[Case]:
    if not labels.is_dir():
        raise DataError(f"{labels}: no such folder")
    masks: dict[str, list[Path]] = {}
    for path in files(labels):
        rater = re.fullmatch(r"(.+)_rater\d+", stem(path))
        masks.setdefault(rater[1] if rater else stem(path), []).append(path)
    channels: dict[str, list[Path]] = {}
    for path in files(images):
        # "scan_0001" is a case of its own where a label has that name, else channel 1 of case "scan".
        channel = re.fullmatch(r"(.+)_\d{4}", stem(path))
        name = channel[1] if channel and stem(path) not in masks else stem(path)
        if name not in masks:
            raise DataError(
                f"{path}: has no label {name} in {labels} (as {name}.nii.gz or {name}_rater0.nii.gz, ...)"
            )
        channels.setdefault(name, []).append(path)
    for name, paths in masks.items():
        if name not in channels:
            raise DataError(f"{paths[0]}: has no image {name} in {images}")
    if not channels:
        raise DataError(f"{images}: holds no images ({', '.join(SUFFIXES)})")
    return [
        Case(name, patients.get(name, name), tuple(paths), tuple(masks[name]))
        for name, paths in sorted(channels.items())
    ]


def files(folder: Path) -> list[Path]:
    """The image files in a folder, sorted by name."""
    return sorted(
        p for p in folder.iterdir() if p.name.lower().endswith(SUFFIXES) and not p.name.startswith(".")
    )


def _patients(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"case", "patient"} <= set(reader.fieldnames or ()):
            raise DataError(
                f"{path}: needs the columns case,patient, has {','.join(reader.fieldnames or ())}"
            )
        return {row["case"]: row["patient"] for row in reader}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return content


def _classes(content: Mapping[str, Any], path: Path) -> int:
    labels = content.get("labels")
    if labels is None:
        return 2
    # nnU-Net writes {"name": 1}, the Decathlon {"1": "name"}.
    try:
        values = [int(k) if isinstance(v, str) else int(v) for k, v in labels.items()]
    except (AttributeError, TypeError, ValueError):
        raise DataError(
            f'{path}: "labels" must be like {{"background": 0, "lesion": 1}}, got {labels}'
        ) from None
    if sorted(values) != list(range(len(values))) or not 2 <= len(values) <= 255:
        raise DataError(f'{path}: the values of "labels" must be 0, 1, 2, ..., got {values}')
    return len(values)


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
    seen: set[str] = set()
    for case in (c for part in parts.values() for c in part):
        if case.id in seen:
            raise DataError(f'{path}: two entries have the id {case.id}; give them an "id"')
        seen.add(case.id)
    return Data(
        parts["training"],
        parts["validation"],
        parts["test"],
        _classes(content, path),
        _unit(parts["training"]),
        str(path),
    )


def _entry(path: Path, part: str, index: int, entry: Any) -> Case:
    where = f"{path}: {part}[{index}]"
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object with image and label")

    def paths(key: str) -> tuple[Path, ...]:
        value = entry.get(key)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise DataError(f'{where}: "{key}" must be a file name or a list of them')
        return tuple(path.parent / name for name in names)

    images = paths("image")
    name = str(entry.get("id", re.sub(r"_0000$", "", stem(images[0]))))
    spacing = entry.get("spacing")
    if spacing is not None:
        try:
            spacing = tuple(float(s) for s in spacing)
        except (TypeError, ValueError):
            spacing = ()
        if not spacing or not all(0 < s < float("inf") for s in spacing):
            raise DataError(f'{where}: "spacing" must be a list of positive numbers, got {entry["spacing"]}')
    return Case(name, str(entry.get("patient", name)), images, paths("label"), spacing)


def _unit(cases: Iterable[Case]) -> str:
    known = (c.spacing or (isinstance(c.image, tuple) and suffix(c.image[0]) != ".png") for c in cases)
    return "mm" if all(known) else "px"


# ---- memory ---------------------------------------------------------------------------------------


@dataclass
class Store:
    """Loaded cases, kept in memory up to `limit` bytes and read again beyond that."""

    classes: int = 2
    limit: int = 4 << 30
    _kept: dict[str, Loaded] = field(default_factory=dict)
    _bytes: int = 0

    def get(self, case: Case) -> Loaded:
        loaded = self._kept.get(case.id)
        if loaded is None:
            loaded = load(case, self.classes)
            size = loaded.image.nbytes + loaded.target.nbytes
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
    training = {case.id for case in data.training}
    for case in data.split("all"):
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

    All randomness comes from (seed, epoch, case), so a run does not depend on the number of worker
    processes, and a resumed one goes on as if it had never stopped.
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
    ) -> None:
        self.cases, self.store, self.seed, self.epoch = cases, store, seed, 0
        self.radii = noise.corruption_radii(len(cases), noise_rate, noise_radius, seed)
        self.patch = patch
        self._corrupted: dict[int, Array] = {}
        self._crop = _random_patch(patch)

    def __len__(self) -> int:
        return len(self.cases)

    def label(self, index: int) -> Array:
        """(*S) uint8: the consensus, dilated where the case was drawn for corruption."""
        if not self.radii[index]:
            return self.store.get(self.cases[index]).target
        label = self._corrupted.get(index)
        if label is None:
            target = self.store.get(self.cases[index]).target
            label = self._corrupted[index] = noise.dilate_labels(target, float(self.radii[index]))
        return label

    def order(self, epoch: int) -> list[int]:
        """The case indices in the order of an epoch."""
        return [int(i) for i in np.random.default_rng([self.seed, 1, epoch]).permutation(len(self))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.store.get(self.cases[index]).image, self.label(index)[None]
        generator = np.random.default_rng([self.seed, 2, self.epoch, index])
        if image.shape[1:] != self.patch:
            image, label = _crop(self._crop, image, label, int(generator.integers(2**31)))
        image, label = _turn(image, label, generator)
        return {"image": torch.from_numpy(image), "label": torch.from_numpy(label)[0], "index": index}


def _random_patch(patch: tuple[int, ...]) -> Any:
    """MONAI's crop around a foreground or a background pixel (even odds), padded where too small."""
    from monai import transforms

    keys = ("image", "label")
    return transforms.Compose(
        [
            transforms.SpatialPadd(keys, patch),
            transforms.RandCropByPosNegLabeld(keys, "label", patch, pos=1, neg=1, num_samples=1),
        ]
    )


def _crop(transform: Any, image: Array, label: Array, seed: int) -> tuple[Array, Array]:
    transform.set_random_state(seed)
    (patch,) = transform({"image": image, "label": label})
    return np.asarray(patch["image"]), np.asarray(patch["label"])


def _turn(image: Array, label: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Random flips of every axis, and quarter turns of the first two where they are equally long.


    Not MONAI's, whose dictionary transforms take 3 ms for what takes NumPy 30 us on a 64x64 patch: more than
    the training step of a small network.
    """
    axes = tuple(1 + int(a) for a in np.flatnonzero(generator.random(image.ndim - 1) < 0.5))
    turns = int(generator.integers(4)) if image.shape[1] == image.shape[2] else 0
    moved = (np.rot90(np.flip(a, axes), turns, (1, 2)) for a in (image, label))
    image, label = (np.ascontiguousarray(a) for a in moved)
    return image, label
