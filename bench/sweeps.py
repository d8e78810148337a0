"""How cost grows: with the size, the batch, the classes, the raters and the threads, one of them at a time.

torch.compile's contender in the losses' sweeps is compiled once for all sizes (dynamic=True); in the tables before it
is compiled for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from noisyseg_fast.timing import (
    Case,
    Contender,
    blobs,
    edt_case,
    nr_dice_case,
    surface_case,
    weighted_ce_case,
)

from .labels import staple_case

LOGITS = [2**p for p in (10, 12, 15, 18, 21, 24)]  # elements
BATCHES = [1, 4, 16, 64, 256]  # of 64x64
CLASSES = [2, 4, 8, 16, 32]  # of 64x64x64 voxels
RATERS = [2, 4, 6, 8]  # of 112x112x80
EDGES = [16, 32, 64, 128, 256]  # of a cube
SURFACES = [32, 64, 128]
VOLUME = (4, 112, 112, 80)  # for the threads


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    if quick:
        return
    for n in LOGITS:
        yield partial(_sweep, nr_dice_case, (1, 1, n), device, shared=True)
        yield partial(_sweep, weighted_ce_case, (1, 2, n // 2), device, shared=True)
    for batch in BATCHES:
        yield partial(_sweep, nr_dice_case, (batch, 1, 64, 64), device, shared=True)
    for classes in CLASSES:
        yield partial(_sweep, weighted_ce_case, (1, classes, 64, 64, 64), device, shared=True)
    for raters in RATERS:
        yield partial(_sweep, staple_case, (1, raters, 112, 112, 80), device, 0.0)
    for edge in EDGES:
        yield partial(_distance, edge, device)
    for edge in SURFACES:
        yield partial(_sweep, surface_case, (1, edge, edge, edge), device, deadline=0.0)
    if device == "cpu":
        for threads in sorted({1, _threads()}):
            yield partial(_on_threads, partial(nr_dice_case, (4, 1, *VOLUME[1:]), shared=True), threads)
            yield partial(_on_threads, partial(_volume_distance, device), threads)


def _sweep(make: Callable[..., Case], *arguments: Any, **options: Any) -> Case:
    return replace(make(*arguments, **options), family="sweeps", headline=False)


def _distance(edge: int, device: str) -> Case:
    return _sweep(edt_case, blobs((1, edge, edge, edge)), device=device, deadline=0.0)


def _volume_distance(device: str) -> Case:
    return edt_case(blobs(VOLUME), device=device, deadline=0.0)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _on_threads(make: Callable[[], Case], threads: int) -> Case:
    """The case with that many threads for all contenders; a peer with settings of its own keeps them."""
    import torch

    case = _sweep(make)

    def prepare(contender: Contender) -> Callable[[], Any]:
        call = contender.make()

        def limited() -> Any:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return call()
            finally:
                torch.set_num_threads(before)

        return limited

    return replace(
        case,
        input=f"{case.input}, {threads} thread{'s' * (threads > 1)}",
        contenders=[replace(c, make=partial(prepare, c)) for c in case.contenders],
    )
