"""The peer's line and ours, side by side: equal answers, and how many times faster ours is here.

    python examples/drop_ins.py [--quick] [--shape 16 16]

Medians of alternating calls, on the CPU, with torch's number of threads. What a peer gets wrong or is not installed is
said, not skipped.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from noisyseg_fast.compat import medpy as our_medpy
from noisyseg_fast.compat import monai as our_monai
from noisyseg_fast.compat import scipy as our_scipy
from noisyseg_fast.timing import duration, pair


def rows(shape: tuple[int, ...]) -> list[tuple[str, str, Callable[[], Any]]]:
    """(peer, the call as one writes it, a maker of (theirs, ours))."""
    pred, target = (x[0] for x in pair((1, *shape)))
    one_hot = [torch.from_numpy(np.stack([1 - x, x])).float()[None] for x in (pred, target)]
    torch.manual_seed(0)
    logits = torch.randn(2, 4, *shape, requires_grad=True)
    labels = torch.randint(0, 4, (2, 1, *shape))

    def scipy(**options: Any) -> Any:
        from scipy import ndimage

        theirs, ours = ndimage.distance_transform_edt, our_scipy.distance_transform_edt
        return lambda: theirs(target, **options), lambda: ours(target, **options)

    def medpy(name: str, *arguments: Any) -> Any:
        from medpy.metric import binary

        theirs, ours = getattr(binary, name), getattr(our_medpy, name)
        return lambda: theirs(pred, target, *arguments), lambda: ours(pred, target, *arguments)

    def monai_metric(name: str, *arguments: Any, **options: Any) -> Any:
        import monai.metrics

        theirs, ours = getattr(monai.metrics, name), getattr(our_monai, name)
        return lambda: theirs(*one_hot, *arguments, **options), lambda: ours(*one_hot, *arguments, **options)

    def monai_loss(name: str, **options: Any) -> Any:
        import monai.losses

        def gradient(loss: Any) -> Any:
            return lambda: torch.autograd.grad(loss(logits, labels), logits)[0]

        both = (getattr(package, name)(**options) for package in (monai.losses, our_monai))
        return tuple(gradient(loss) for loss in both)

    softmax = {"softmax": True, "to_onehot_y": True}
    spacing = (1.0, 1.0, 2.5)[-len(shape) :]
    return [
        ("scipy", "distance_transform_edt(mask)", scipy),
        ("scipy", "distance_transform_edt(mask, sampling)", lambda: scipy(sampling=spacing)),
        *(
            ("MedPy", f"{name}(pred, target, spacing)", lambda name=name: medpy(name, spacing))
            for name in ("hd", "hd95", "assd", "asd")
        ),
        *(
            ("MedPy", f"{name}(pred, target)", lambda name=name: medpy(name))
            for name in ("dc", "jc", "sensitivity", "specificity", "precision", "ravd")
        ),
        (
            "MONAI",
            "compute_hausdorff_distance(p, t, percentile=95)",
            lambda: monai_metric("compute_hausdorff_distance", percentile=95),
        ),
        (
            "MONAI",
            "compute_average_surface_distance(p, t)",
            lambda: monai_metric("compute_average_surface_distance"),
        ),
        ("MONAI", "compute_surface_dice(p, t, [1.0])", lambda: monai_metric("compute_surface_dice", [1.0])),
        *(
            ("MONAI", f"{name}(...), gradient", lambda name=name: monai_loss(name, **softmax))
            for name in ("DiceLoss", "DiceCELoss", "DiceFocalLoss", "GeneralizedDiceLoss", "HausdorffDTLoss")
        ),
        ("MONAI", "FocalLoss(...), gradient", lambda: monai_loss("FocalLoss", to_onehot_y=True)),
    ]


def numbers(x: Any) -> np.ndarray[Any, Any]:
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64)


def median(call: Callable[[], Any], other: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Seconds of one call of each, called in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for one, taken in ((call, times[0]), (other, times[1])):
            start = time.perf_counter()
            one()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small volumes, few repetitions")
    parser.add_argument("--shape", nargs="+", type=int, metavar="N", help="of the images, 2D or 3D")
    options = parser.parse_args()
    quick = options.quick
    shape = tuple(options.shape or ((24, 32, 20) if quick else (112, 112, 80)))
    warnings.simplefilter("ignore")
    table = Table("peer", "call", "largest difference", "theirs", "ours", "faster")
    for peer, call, make in rows(shape):
        try:
            theirs, ours = make()
        except ModuleNotFoundError as missing:
            table.add_row(peer, call, f"{missing.name} is not installed")
            continue
        expected, got = numbers(theirs()), numbers(ours())
        off = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)
        assert off < 1e-5, f"{peer}: {call} differs by {off:.1e} of its largest value"
        taken = median(theirs, ours, 0.05 if quick else 1.0)
        table.add_row(peer, call, f"{off:.0e}", *map(duration, taken), f"{taken[0] / taken[1]:.1f}x")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
