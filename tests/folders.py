"""Small data sets on disk for the tests: bright blobs in noise, drawn by several raters."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

SPACING = (0.7, 0.7, 2.5)


def oblique_affine(spacing=SPACING):
    """A rotation about two axes times the spacing, with an origin off zero."""
    a, b = np.deg2rad(20), np.deg2rad(-35)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing)
    affine[:3, 3] = (-91.5, 12.25, 300.0)
    return affine


def blob(shape, seed):
    """An image (float32) and its object (uint8)."""
    generator = np.random.default_rng(seed)
    center = [n * generator.uniform(0.4, 0.6) for n in shape]
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    radius = 0.28 * min(shape)
    inside = sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) <= radius**2
    image = 100 * inside + generator.normal(0, 10, shape)
    return image.astype(np.float32), inside.astype(np.uint8)


def save_nifti(path: Path, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, oblique_affine() if affine is None else affine), path)


def nifti_folder(root: Path, cases=6, shape=(32, 32), raters=2) -> Path:
    """imagesTr/labelsTr of `cases` images with an oblique affine; the raters differ by a column."""
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for i in range(cases):
        image, mask = blob(shape, i)
        save_nifti(root / "imagesTr" / f"case{i}_0000.nii.gz", image)
        for rater in range(raters):
            name = f"case{i}_rater{rater}" if raters > 1 else f"case{i}"
            save_nifti(root / "labelsTr" / f"{name}.nii.gz", np.roll(mask, rater, axis=0))
    return root


def png_folder(root: Path, cases=6, shape=(32, 32)) -> Path:
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for i in range(cases):
        image, mask = blob(shape, i)
        Image.fromarray(np.clip(image + 60, 0, 255).astype(np.uint8)).save(root / "imagesTr" / f"case{i}.png")
        Image.fromarray(mask * np.uint8(255)).save(root / "labelsTr" / f"case{i}.png")
    return root
