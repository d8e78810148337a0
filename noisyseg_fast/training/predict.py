"""Masks for new images, in the images' own geometry."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import resample
from .data import Array, Case, DataError, files, load_image, stem, suffix
from .files import written
from .methods import Method
from .model import ModelSpec, infer


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


def check(todo: Sequence[Job], spec: ModelSpec, seen: Callable[[], None] = lambda: None) -> None:
    """Read every image once, so that nothing is written when one is bad; DataError as in data.load."""
    for job in todo:
        image, _ = load_image(job.case)
        files_of = job.case.image
        if image.shape[0] != spec.channels or image.ndim - 1 != spec.spatial_dims:
            raise DataError(
                f"{files_of[0]}: has {image.shape[0]} channel(s) and {image.ndim - 1} spatial axes; "
                f"the model takes {spec.channels} and {spec.spatial_dims}"
            )
        seen()


def predict(
    method: Method,
    spec: ModelSpec,
    todo: Sequence[Job],
    device: torch.device,
    seen: Callable[[], None] = lambda: None,
) -> None:
    """Write the mask of every job, uint8: class indices with the image's affine and shape in NIfTI; in PNG 0
    and 255 for two classes, else class indices. Each file appears whole or not at all."""
    for job in todo:
        image, _ = load_image(job.case, spec.spacing)
        mask = infer(method, torch.from_numpy(image)[None].to(device), spec.patch)[0].cpu().numpy()
        if spec.spacing is not None:
            mask = resample.resample_label(mask, load_image(job.case)[0].shape[1:])
        assert isinstance(job.case.image, tuple)
        if job.target.suffix == ".png":
            write_png(job.target, mask * np.uint8(255) if spec.classes == 2 else mask)
        else:
            write_nifti(job.target, mask, job.case.image[0])
        seen()


def write_png(path: Path, mask: Array) -> None:
    """A grey PNG, whole or not at all."""
    from PIL import Image

    with written(path) as temporary:
        Image.fromarray(mask).save(temporary)


def write_nifti(path: Path, mask: Array, like: Path) -> None:
    """A mask or map (*S), or (*S, C) of several, in its own dtype and the geometry of the file `like`; whole or not
    at all."""
    import nibabel

    source: Any = nibabel.load(like)
    channels = mask.shape[len(mask.shape) - (mask.size != math.prod(source.shape)) :]
    image = nibabel.Nifti1Image(mask.reshape(*source.shape, *channels), source.affine, dtype=mask.dtype)
    # Where the codes say what the affine means (scanner, aligned, ...), keep them; other formats have none.
    if isinstance(source, nibabel.Nifti1Image):
        image.header.set_xyzt_units(*source.header.get_xyzt_units())
        image.set_qform(source.get_qform(), int(source.header["qform_code"]))
        image.set_sform(source.get_sform(), int(source.header["sform_code"]))
    with written(path) as temporary:
        nibabel.save(image, temporary)
