"""Surface metrics of pairs of masks against MONAI, MedPy, and distance transforms on a crop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from noisyseg_fast.timing import Case, surface_case

SHAPES = [(128, 64, 64), (1, 112, 112, 80), (8, 512, 512), (1, 512, 512, 150)]


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    for shape in SHAPES[:2] if quick else SHAPES:
        yield partial(surface_case, shape, device, headline=True, deadline=0.0 if quick else float("inf"))
