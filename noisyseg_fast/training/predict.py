"""Masks for new images, in the images' own geometry.

The network sees an image turned to RAS (data.py) and resampled to the spacing that the model was trained at, if to
any; its mask is brought back. A 2D model takes a volume slice by slice, each z-scored by itself as the images it was
trained on.

Memory, for an image of any length: what its file holds, in the file's type (of an uncompressed file without scaling
only the parts in use; 8 bytes for each voxel of a file whose header scales it), one byte for each voxel of the mask,
and one row of windows (windows.py; of a 2D model on a volume, SLICES slices); where a volume is resampled, the
resampled image, in float32, and its mask besides. The largest component takes some 20
bytes more for each voxel of a class, and 5 for each of the box around it.

The folder of the masks gets a file predict.json: the model, the options and, for each mask written, the images it is
of. With it an interrupted run can be resumed: masks that are there are kept, and of a volume that was under way the
finished planes, which stand in a hidden file beside the mask until this is whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import noise
from . import resample
from .data import (
    Array,
    Case,
    DataError,
    files,
    from_ras,
    load_image,
    nifti,
    open_image,
    scaled,
    spacing_of,
    stem,
    suffix,
    zscore,
)
from .files import beside, digest, write_json, written
from .methods import Method
from .model import ModelSpec
from .untrusted import first_line, parse_json, short
from .windows import label_planes, windows_at_once

SLICES = 16  # at most, of a volume that go through a 2D model together
AXES = ("sagittal", "coronal", "axial")  # slices across the first, second and third axis of RAS


@dataclass(frozen=True)
class Options:
    """How masks are made. ValueError names the one that is wrong."""

    overlap: float = 0.5  # share of a window that the next one covers too
    flips: bool = False  # average the probabilities over all 4 (2D) or 8 (3D) flips, a pass for each
    largest_component: bool = False  # of each class; see largest_component
    axis: str | None = None  # of AXES, for a 2D model on volumes; None: across the largest spacing

    def check(self, spec: ModelSpec) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {self.overlap:g}")
        if self.axis is None:
            return
        if self.axis not in AXES:
            raise ValueError(f"unknown axis {self.axis!r}; choose from {', '.join(AXES)}")
        if spec.spatial_dims == 3:
            raise ValueError(f"axis {self.axis} is for a 2D model, slice by slice; this model takes volumes")


@dataclass(frozen=True)
class Job:
    """An image (one file for each channel) and the file its mask goes to."""

    case: Case
    target: Path


def jobs(inputs: Sequence[Path], out: Path, channels: int) -> list[Job]:
    """What there is to predict. inputs: files, or folders of them; <case>_0000, _0001, ... are channels of
    one case for a model of several channels. The mask of <case>[_0000].<suffix> is out/<case>.png for PNG,
    else .nii.gz.

    DataError for inputs that are missing, empty or would write the same mask twice or over their own image.
    """
    paths: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = files(path)
            if not found:
                raise DataError(f"{path}: holds no images (.nii.gz, .nii, .png)")
            paths += found
        elif path.is_file():
            suffix(path)
            paths.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        name = stem(path)
        base = re.sub(r"_\d{4}$" if channels > 1 else r"_0000$", "", name)
        groups.setdefault((path.parent, base), []).append(path)
    result: list[Job] = []
    sources: dict[Path, Path] = {}
    for (_, name), group in groups.items():
        target = out / (name + (".png" if suffix(group[0]) == ".png" else ".nii.gz"))
        if target in sources:
            raise DataError(f"{group[0]} and {sources[target]} would both be written to {target}")
        if any(target.resolve() == path.resolve() for path in group):
            raise DataError(f"{target}: would replace its own image; choose another --out")
        sources[target] = group[0]
        result.append(Job(Case(name, name, tuple(sorted(group)), ()), target))
    return result


class Scan:
    """The opened image of a case, its axes turned to RAS."""

    def __init__(self, case: Case) -> None:
        """DataError as in data.load_image."""
        self.channels, first = open_image(case)
        self.shape = self.channels[0].shape
        self.affine = first.affine  # of the file as it is, None for PNG
        self.spacing = spacing_of(case, first, len(self.shape))

    def moments(self) -> list[tuple[Array, Array]]:
        """Mean and standard deviation, float64, of each channel; plane by plane, so that they need no memory and do
        not depend on how the file stores its axes."""
        result = []
        for channel in self.channels:
            planes = partial(_float64_planes, channel)
            mean = sum(plane.sum() for plane in planes()) / channel.size
            square = sum(((plane - mean) ** 2).sum() for plane in planes()) / channel.size
            result.append((np.asarray(mean), np.sqrt(square)))
        return result

    def read(self, moments: Sequence[tuple[Array, Array]], low: int, high: int) -> Tensor:
        """Planes low..high across the last axis, z-scored with those moments: (1, channels, *S[:-1], high - low)."""
        out = np.empty((1, len(self.channels), *self.shape[:-1], high - low), np.float32)
        for c, (channel, (mean, deviation)) in enumerate(zip(self.channels, moments, strict=True)):
            for i in range(0, self.shape[0], 32):  # scaled() works in float64
                out[0, c, i : i + 32] = scaled(channel[i : i + 32, ..., low:high], mean, deviation)
        return torch.from_numpy(out)

    def slices(self, axis: int, low: int, high: int) -> Tensor:
        """Slices low..high across an axis, each z-scored by itself: (high - low, channels, *S without the axis)."""
        moved = [np.moveaxis(channel, axis, 0)[low:high] for channel in self.channels]
        return torch.from_numpy(np.stack([zscore(np.ascontiguousarray(m)) for m in moved], 1))


class Resampled(Scan):
    """The image at the model's spacing, z-scored: 4 bytes in memory for each of its voxels."""

    def __init__(self, case: Case, wanted: Sequence[float] | None) -> None:
        super().__init__(case)
        self.image, self.spacing = load_image(case, wanted)
        self.shape = self.image.shape[1:]

    def moments(self) -> list[tuple[Array, Array]]:
        return []

    def read(self, moments: Sequence[tuple[Array, Array]], low: int, high: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.image[None, ..., low:high]))


def _float64_planes(channel: Array) -> Iterator[Array]:
    for i in range(channel.shape[-1]):
        yield np.ascontiguousarray(channel[..., i], dtype=np.float64)


def check(
    todo: Sequence[Job],
    spec: ModelSpec,
    options: Options | None = None,
    seen: Callable[[], None] = lambda: None,
) -> None:
    """Read every image once, so that nothing is written when one is bad; DataError as in data.load."""
    options = options or Options()
    options.check(spec)
    volumes = 0
    for job in todo:
        scan, files_of = Scan(job.case), job.case.image
        channels, dims = len(scan.channels), len(scan.shape)
        volumes += dims == 3
        if channels != spec.channels or dims < spec.spatial_dims:
            raise DataError(
                f"{files_of[0]}: has {channels} channel(s) and {dims} spatial axes; "
                f"the model takes {spec.channels} and {spec.spatial_dims}"
            )
        seen()
    if todo and options.axis is not None and not volumes:
        raise DataError(f"axis {options.axis} is for volumes, slice by slice; there are only 2D images")


def predict(
    method: Method,
    spec: ModelSpec,
    todo: Sequence[Job],
    device: torch.device,
    seen: Callable[[float], None] = lambda share: None,
    *,
    options: Options | None = None,
    journal: Journal | None = None,
) -> None:
    """Write the mask of every job, uint8: class indices with the image's affine and shape in NIfTI; in PNG 0
    and 255 for two classes, else class indices. Each file appears whole or not at all.

    seen: called with the share of an image that is done since the last call. journal: what makes the run one that can
    be resumed; it must have been asked for `left` before.
    """
    options = options or Options()
    options.check(spec)
    if journal:
        journal.write()
    for job in todo:
        scan = Scan(job.case)
        whole = spec.spacing is None or len(scan.shape) > spec.spatial_dims
        kept = journal.planes(job) if journal else None
        looked_at = scan if whole else Resampled(job.case, spec.spacing)
        mask = _mask(method, spec, looked_at, device, seen, options, kept)
        mask = resample.resample_label(mask, scan.shape)
        if options.largest_component:
            largest_component(mask, spec.classes)
        mask = from_ras(mask, scan.affine)
        assert isinstance(job.case.image, tuple)
        if job.target.suffix == ".png":
            write_png(job.target, mask * np.uint8(255) if spec.classes == 2 else mask)
        else:
            write_nifti(job.target, mask, job.case.image[0])
        if journal:
            journal.add(job)


def _mask(
    method: Method,
    spec: ModelSpec,
    scan: Scan,
    device: torch.device,
    seen: Callable[[float], None],
    options: Options,
    kept: _Planes | None,
) -> Array:
    """The mask (*S) uint8 of a scan, in RAS."""
    axis = len(scan.shape) - 1
    sliced = len(scan.shape) > spec.spatial_dims
    if sliced:
        # Of spacings that are equal but for rounding, the last.
        widest = max(range(3), key=lambda a: (round(scan.spacing[a] / max(scan.spacing), 3), a))
        axis = widest if options.axis is None else AXES.index(options.axis)
    mask = np.empty(scan.shape, np.uint8)
    planes = np.moveaxis(mask, axis, 0)  # a view
    done = 0

    def put(piece: Array) -> None:
        nonlocal done
        planes[done : done + len(piece)] = piece
        done += len(piece)
        seen(len(piece) / len(planes))

    for piece in kept.read(planes.shape[1:]) if kept else ():
        put(piece)
    pieces = _by_slices if sliced else _by_planes
    for piece in pieces(method, spec, scan, device, options, axis, done):
        if kept and done + len(piece) < len(planes):
            kept.add(piece)
        put(piece)
    return mask


def _by_planes(
    method: Method, spec: ModelSpec, scan: Scan, device: torch.device, options: Options, axis: int, first: int
) -> Iterator[Array]:
    """Label planes (n, *S[:-1]) of an image that the model takes as it is."""
    moments = scan.moments()
    for labels in label_planes(
        method,
        lambda low, high: scan.read(moments, low, high).to(device),
        scan.shape,
        spec.patch,
        overlap=options.overlap,
        flips=options.flips,
        first=first,
    ):
        yield labels[0].movedim(-1, 0).numpy()


def _by_slices(
    method: Method, spec: ModelSpec, scan: Scan, device: torch.device, options: Options, axis: int, first: int
) -> Iterator[Array]:
    """Labels (n, *S without the axis) of a volume's slices."""
    some = min(SLICES, windows_at_once(spec.patch))
    flat, spacing = (tuple(np.delete(values, axis)) for values in (scan.shape, scan.spacing))
    size = flat if spec.spacing is None else resample.size_of(flat, spacing, spec.spacing)
    for low in range(first, scan.shape[axis], some):
        slices = scan.slices(axis, low, min(low + some, scan.shape[axis])).numpy()
        images = torch.from_numpy(np.stack([resample.resample_image(s, size) for s in slices])).to(device)

        def read(a: int, b: int, images: Tensor = images) -> Tensor:
            return images[..., a:b]

        parts = label_planes(
            method, read, images.shape[2:], spec.patch, overlap=options.overlap, flips=options.flips
        )
        labels = torch.cat(list(parts), -1).numpy()
        yield np.stack([resample.resample_label(label, flat) for label in labels])


def largest_component(mask: Array, classes: int) -> None:
    """Leave of each class 1..classes-1 of a mask (*S) uint8 only its largest component, in place: with full
    connectivity (8 neighbours in 2D, 26 in 3D), of equals the first in reading order; the others become 0."""
    for label in range(1, classes):
        found = mask == label
        across = [found.any(tuple(a for a in range(mask.ndim) if a != axis)) for axis in range(mask.ndim)]
        if not across[0].any():
            continue
        box = tuple(slice(int(line.argmax()), len(line) - int(line[::-1].argmax())) for line in across)
        components = noise.connected_components(np.ascontiguousarray(found[box]), connectivity="full")
        names, sizes = np.unique(components[components > 0], return_counts=True)
        mask[box][(components > 0) & (components != names[sizes.argmax()])] = 0


# ---- runs that can be resumed ---------------------------------------------------------------------


class Journal:
    """predict.json in the folder of the masks: with what and of what they were made."""

    def __init__(self, folder: Path, checkpoint: Path, options: Options, resume: bool = False) -> None:
        """resume: go on with what is there. ValueError where that was made with another model or other options."""
        self.path = folder / "predict.json"
        self.settings: dict[str, Any] = {"checkpoint": digest(checkpoint), **asdict(options)}
        self.masks: dict[str, list[str]] = {}  # of each mask the digests of its images
        self.resume = resume
        if not resume or not self.path.is_file():
            return
        try:
            content = parse_json(self.path)
            self.masks = dict(content["masks"])
            before: Mapping[str, Any] = {name: content[name] for name in self.settings}
        except (KeyError, TypeError, ValueError) as error:
            line = first_line(error).removeprefix(f"{self.path}: ")
            raise ValueError(f"{self.path}: is no list of masks of this version ({line})") from error
        for name, value in self.settings.items():
            if before[name] != value:
                what = (
                    "another checkpoint"
                    if name == "checkpoint"
                    else f"{name} {short(before[name])}, not {value}"
                )
                raise ValueError(
                    f"{self.path}: these masks were made with {what}; choose another --out or leave out --resume"
                )

    def left(self, todo: Sequence[Job]) -> list[Job]:
        """The jobs whose masks are not there yet. DataError, with resume, for a mask of unknown origin."""
        if not self.resume:
            return list(todo)
        for job in todo:
            if job.target.exists() and not self.path.is_file():
                raise DataError(
                    f"{job.target}: is there without {self.path}; leave out --resume to replace it"
                )
        return [
            job for job in todo if not job.target.is_file() or self.masks.get(job.target.name) != _images(job)
        ]

    def add(self, job: Job) -> None:
        self.masks[job.target.name] = _images(job)
        self.write()
        _hidden(job.target).unlink(missing_ok=True)

    def write(self) -> None:
        write_json(self.path, {**self.settings, "masks": self.masks})

    def planes(self, job: Job) -> _Planes:
        what = json.dumps([self.settings, _images(job)])
        return _Planes(_hidden(job.target), what.encode(), self.resume)


def _images(job: Job) -> list[str]:
    assert isinstance(job.case.image, tuple)
    return [digest(path) for path in job.case.image]


def _hidden(target: Path) -> Path:
    return target.with_name(beside(".partial-", target.name))


class _Planes:
    """The finished planes of a mask that is not whole yet: a file with a line that says what they are of, then for
    each piece the numbers of its planes and of its bytes, and those, by zlib, whose checksum tells a torn one."""

    numbers = struct.Struct("<II")

    def __init__(self, path: Path, what: bytes, resume: bool) -> None:
        self.path, self.what, self.resume = path, what + b"\n", resume
        self.whole = 0  # bytes that are good

    def read(self, shape: Sequence[int]) -> Iterator[Array]:
        """The pieces (n, *shape) uint8 that are there, up to one that is torn."""
        if not self.resume or not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            if file.readline() != self.what:
                return
            self.whole = file.tell()
            while len(head := file.read(self.numbers.size)) == self.numbers.size:
                count, size = self.numbers.unpack(head)
                try:
                    content = zlib.decompressobj().decompress(file.read(size), count * math.prod(shape) + 1)
                    piece = np.frombuffer(content, np.uint8).reshape(count, *shape)
                except (zlib.error, ValueError):
                    return
                self.whole = file.tell()
                yield piece

    def add(self, piece: Array) -> None:
        """The next piece, after all that were read; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = zlib.compress(np.ascontiguousarray(piece).tobytes(), 1)
        with open(self.path, "r+b" if self.whole else "wb") as file:
            if self.whole:
                file.truncate(self.whole)
                file.seek(self.whole)
            else:
                file.write(self.what)
            file.write(self.numbers.pack(len(piece), len(content)) + content)
            file.flush()
            os.fsync(file.fileno())
            self.whole = file.tell()


def write_png(path: Path, mask: Array) -> None:
    """A grey PNG, whole or not at all."""
    from PIL import Image

    with written(path) as temporary:
        Image.fromarray(mask).save(temporary)


def write_nifti(path: Path, mask: Array, like: Path) -> None:
    """A mask or map (*S), or (*S, C) of several, in its own dtype and the geometry of the file `like`; whole or not
    at all."""
    import nibabel

    with nifti(like, whole=False) as source:
        channels = mask.shape[len(mask.shape) - (mask.size != math.prod(source.shape)) :]
        image = nibabel.Nifti1Image(mask.reshape(*source.shape, *channels), source.affine, dtype=mask.dtype)
        # The codes say what the affine means: scanner, aligned, ...
        image.header["xyzt_units"] = source.header["xyzt_units"]
        image.set_qform(source.get_qform(), int(source.header["qform_code"]))
        image.set_sform(source.get_sform(), int(source.header["sform_code"]))
    with written(path) as temporary:
        nibabel.save(image, temporary)
