"""Label fusion against SimpleITK and torch. Inputs are (B, M, *S): M raters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from noisyseg_fast import labels
from noisyseg_fast.timing import OURS, Call, Case, Contender, Skipped, blobs, compiled, on_device

SHAPES = [(128, 4, 64, 64), (1, 5, 112, 112, 80), (1, 5, 512, 512, 150)]  # other numbers of raters: sweeps.py
LABELS = [(1, 5, 4, 112, 112, 80)]  # (B, M, classes, *S)


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    deadline = 0.0 if quick else math.inf
    for shape in SHAPES[:2] if quick else SHAPES:
        yield partial(staple_case, shape, device, deadline)
    for shape in SHAPES[1:2] if quick else SHAPES[1:]:
        yield partial(majority_case, shape, device, deadline)
    if not quick:
        yield partial(label_case, LABELS[0], device)


def raters(shape: Sequence[int], classes: int = 2) -> np.ndarray[Any, Any]:
    """uint8 (B, M, *S): smooth truths, each rater wrong in smooth places of 2 to 8 % of the image."""
    batch, count, *size = shape
    truth = sum(blobs((batch, *size), 1 + c, 0.3) for c in range(classes - 1))
    drawn = []
    for m in range(count):
        wrong = blobs((batch, *size), 100 + m, 0.02 + 0.06 * m / max(count - 1, 1))
        drawn.append((truth + wrong) % classes)
    return np.stack(drawn, 1).astype(np.uint8)


def staple_case(shape: Sequence[int], device: str, deadline: float) -> Case:
    masks = raters(shape)
    dims = len(shape) - 2

    def ours() -> Call:
        x = on_device(masks, device)
        return lambda: labels.staple(x, spatial_dims=dims).posterior

    def simpleitk() -> Call:
        import SimpleITK as sitk

        images = [[sitk.GetImageFromArray(rater) for rater in one] for one in masks]
        peer = sitk.STAPLEImageFilter()
        peer.SetForegroundValue(1)
        return lambda: np.stack([sitk.GetArrayFromImage(peer.Execute(one)) for one in images])

    def torch_staple(step: Callable[..., Any]) -> Call:
        """EM over all pixels, as one writes it in PyTorch, for as many iterations as each image takes."""
        import torch

        if masks.size > 1 << 25:
            raise Skipped("takes too much memory and time")
        x = torch.from_numpy(masks).to(device).flatten(2)
        iterations = torch.from_numpy(labels.staple(masks, spatial_dims=dims).iterations)
        going = [(i < iterations)[:, None].to(device) for i in range(int(iterations.max()))]

        def call() -> Any:
            d = x != 0
            w = d.double().mean(1)
            prior = w.mean(1, keepdim=True)
            for on in going:
                w = torch.where(on, step(w, d, prior), w)
            return w

        return call

    contenders = [
        Contender(OURS, ours),
        Contender("eager", partial(torch_staple, em_step)),
        compiled(em_step, torch_staple, deadline),
        Contender("SimpleITK", simpleitk),
    ]
    moved = masks.size + 4 * masks.size // shape[1]
    return _case("STAPLE", shape, device, contenders, "SimpleITK", moved, headline=True)


def em_step(w: Any, d: Any, prior: Any) -> Any:
    """One iteration: w (B, N) float64, d (B, M, N) bool, prior (B, 1)."""
    one = w[:, None]
    p = (one * d).sum(2, keepdim=True) / one.sum(2, keepdim=True)
    q = ((1 - one) * ~d).sum(2, keepdim=True) / (1 - one).sum(2, keepdim=True)
    a = prior * d.double().mul(2 * p - 1).add(1 - p).prod(1)
    b = (1 - prior) * d.double().mul(1 - 2 * q).add(q).prod(1)
    return a / (a + b)


def majority_case(shape: Sequence[int], device: str, deadline: float) -> Case:
    masks = raters(shape)

    def ours() -> Call:
        x = on_device(masks, device)
        return lambda: labels.majority_vote(x, spatial_dims=len(shape) - 2)

    def vote(x: Any) -> Any:
        return (2 * x.sum(1) > x.shape[1]).to(x.dtype)

    def prepare(function: Callable[..., Any]) -> Call:
        import torch

        x = torch.from_numpy(masks).to(device)
        return lambda: function(x)

    def simpleitk() -> Call:
        import SimpleITK as sitk

        images = [[sitk.GetImageFromArray(rater) for rater in one] for one in masks]
        return lambda: np.stack([sitk.GetArrayFromImage(sitk.LabelVoting(one)) for one in images])

    contenders = [
        Contender(OURS, ours),
        Contender("eager", partial(prepare, vote)),
        compiled(vote, prepare, deadline),
        Contender("SimpleITK", simpleitk),
    ]
    return _case("majority vote", shape, device, contenders, "eager", masks.size + masks.size // shape[1])


def label_case(shape: Sequence[int], device: str) -> Case:
    """STAPLE of label images; SimpleITK's stops earlier and computes in single precision: 0.1 % may differ."""
    batch, count, classes, *size = shape
    images = raters((batch, count, *size), classes)

    def ours() -> Call:
        x = on_device(images, device)
        return lambda: labels.staple(x, num_classes=classes, spatial_dims=len(size)).labels

    def simpleitk() -> Call:
        import SimpleITK as sitk

        given = [[sitk.GetImageFromArray(rater) for rater in one] for one in images]
        return lambda: np.stack([sitk.GetArrayFromImage(sitk.MultiLabelSTAPLE(one)) for one in given])

    def differing(answer: Any, expected: Any) -> float:
        return float((np.asarray(answer.cpu() if hasattr(answer, "cpu") else answer) != expected).mean())

    contenders = [Contender(OURS, ours, differing), Contender("SimpleITK", simpleitk, differing)]
    moved = images.size + 5 * images.size // count
    return _case("STAPLE, labels", shape, device, contenders, "SimpleITK", moved, tolerance=1e-3)


def _case(
    operation: str,
    shape: Sequence[int],
    device: str,
    contenders: Sequence[Contender],
    oracle: str,
    moved: int,
    *,
    tolerance: float = 1e-6,
    headline: bool = False,
) -> Case:
    return Case(
        family="labels",
        operation=operation,
        input="x".join(map(str, shape)),
        contenders=contenders,
        oracle=oracle,
        tolerance=tolerance,
        moved=moved,
        device=device,
        headline=headline,
    )
