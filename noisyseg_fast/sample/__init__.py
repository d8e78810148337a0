"""Real noisy masks inside the package: 514 lung nodules on chest CT, each outlined by four radiologists.

From LIDC-IDRI (CC BY 3.0; attribution, citations and changes in LICENSE-LIDC.txt beside this file), made by
scripts/make_sample.py. Needs NumPy only.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parent / "lidc2d_middle.npz"


class Sample(NamedTuple):
    """N patches of 64x64 pixels, one for each nodule: the slice where the raters' mean area is largest.

    The grey values were scaled slice by slice, so they are not Hounsfield units. Rater k of one patch and
    rater k of another need not be the same person: LIDC's readers are anonymous.
    """

    image: NDArray[np.uint8]  # (N, 64, 64)
    masks: NDArray[np.uint8]  # (N, 4, 64, 64), 0 or 1; all 0 where a rater saw nothing in this slice
    patient: NDArray[np.str_]  # (N,) for splitting by patient
    nodule: NDArray[np.str_]  # (N,) unique
    pixel_mm: NDArray[np.float32]  # (N,) side of a pixel in mm


def load() -> Sample:
    """The sample as arrays."""
    with np.load(FILE) as data:
        return Sample(
            data["image"],
            np.unpackbits(data["masks"], axis=-1),
            data["patient"],
            data["nodule"],
            data["pixel_mm"],
        )
