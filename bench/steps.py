"""A training step on volumes: DTML with distance targets, ours, as the public code makes them, and with nothing of ours
(plain.py). methods.py has the steps of all methods, on planes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from noisyseg_fast.timing import OURS, Call, Case, Contender, blobs

from .report import PLAIN

CROP = (112, 112, 80)
WIDTH = 4  # of V-Net, the paper's is 16: so that a step takes seconds on a CPU
LABELLED = 2  # and as many without labels

Maps = Callable[..., Any]


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    """Makers of cases, so that only one case's arrays exist at a time. The second's time over the first's is the
    share that the targets have in a step."""
    crop = (48, 48, 32) if quick else CROP
    yield partial(step_case, crop, device, headline=True)
    yield partial(targets_case, crop, device)


def compute_sdf(mask: Any) -> Any:
    """utils/util.py of SASSNet, DTC and DTML, for one volume: each side divided by its own largest distance, 0 on the
    object's inner contour (skimage's find_boundaries, which is an erosion without the outside)."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    inside = mask.astype(bool)
    if not inside.any() or inside.all():
        return np.zeros(mask.shape)
    inner, outer = distance_transform_edt(inside), distance_transform_edt(~inside)
    sdf = outer / outer.max() - inner / inner.max()
    sdf[inside & ~binary_erosion(inside, border_value=1)] = 0
    return sdf


def scipy_maps(volumes: int, target: Any, **options: Any) -> Any:
    """In place of signed_distance_map: to the host, volume by volume, and back; the volumes beyond those of the target,
    which the public code computes from the labels of unlabelled images, are thrown away."""
    import torch

    masks = target.flatten(0, 1).cpu().numpy()
    maps = np.stack([compute_sdf(masks[i % len(masks)]) for i in range(volumes)])
    return torch.from_numpy(maps[: len(masks)].astype(np.float32)).to(target.device).reshape(target.shape)


def makers() -> dict[str, Maps]:
    from noisyseg_fast.distance import signed_distance_map

    return {
        OURS: signed_distance_map,
        "scipy": partial(scipy_maps, LABELLED),
        "scipy, as DTML's code": partial(scipy_maps, 2 * LABELLED),
    }


def step_case(crop: Sequence[int], device: str = "cpu", *, headline: bool = False) -> Case:
    """Forward, losses (supervision "both", so with distance targets), backward and SGD's step of two V-Nets, on 2 crops
    with and 2 without labels. With lr 0, so that every contender finds the same weights."""
    import torch

    from noisyseg_fast.training import methods, networks
    from noisyseg_fast.training.methods import _signed

    from . import plain

    random = torch.Generator().manual_seed(0)
    label = torch.from_numpy(blobs((LABELLED, *crop))).to(device)
    image, unlabelled = (
        torch.randn((LABELLED, 1, *crop), generator=random).to(device) + shown
        for shown in (label[:, None].float(), label.flip(1)[:, None].float())
    )
    batch: Any = {"image": image, "label": label, "index": torch.arange(LABELLED), "unlabelled": unlabelled}
    torch.manual_seed(0)
    inputs = methods.Inputs(3, 1, 1, WIDTH)
    method = methods.create(
        "dtml", {"supervision": "both"}, lambda heads=1: networks.build("vnet", 3, 1, heads, WIDTH), 1, inputs
    ).to(device)
    optimizer = torch.optim.SGD(method.trained(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    method.plan = methods.Plan(optimizer, 6000, 150)

    def prepare(inside: Callable[[], AbstractContextManager[Any]]) -> Call:
        def step() -> Any:
            torch.manual_seed(1)  # of the dropout
            with inside():
                losses = method.training_step(batch, 3000)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            return losses["loss"].detach(), method.map_network.out_conv.weight.grad.clone()

        return step

    contenders = [
        Contender(name, partial(prepare, partial(mock.patch.object, _signed, "signed_distance_map", maps)))
        for name, maps in makers().items()
    ]
    contenders.append(Contender(PLAIN, partial(prepare, plain.swapped)))
    return Case(
        family="steps",
        operation=f"DTML training step, 2 V-Nets of width {WIDTH}",
        input=f"{2 * LABELLED}x1x" + "x".join(map(str, crop)),
        contenders=contenders,
        oracle="scipy",
        tolerance=1e-3,
        moved=4 * (image.numel() + unlabelled.numel()),
        device=device,
        headline=headline,
    )


def targets_case(crop: Sequence[int], device: str = "cpu", *, headline: bool = False) -> Case:
    """The distance targets of that step and nothing else; labels (2, 1, *crop) uint8, maps float32."""
    import torch

    target = torch.from_numpy(blobs((LABELLED, *crop)))[:, None].to(device)

    def prepare(maps: Maps) -> Call:
        return lambda: maps(target, spatial_dims=3, convention="dtc", normalize=False)

    return Case(
        family="steps",
        operation="the distance targets of that step",
        input=f"{LABELLED}x1x" + "x".join(map(str, crop)),
        contenders=[Contender(name, partial(prepare, maps)) for name, maps in makers().items()],
        oracle="scipy",
        tolerance=1e-5,
        moved=5 * target.numel(),
        device=device,
        headline=headline,
    )
