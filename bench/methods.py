"""A training step of each method, with our functions and without (plain.py), beside one of plain cross-entropy: same
network, same images, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import numpy as np

from noisyseg_fast.timing import OURS, Call, Case, Contender

from .plain import swapped
from .report import PLAIN

BATCH, NETWORK, WIDTH = 8, "unet", 16
TOLERANCE = 1e-4  # of the losses and a gradient; of labels: the share that may differ
STEPS, STEP = 1000, 600  # of a run: where warm-ups and first phases are over
BASELINE = "a step of ce"
QUICK = ("ce", "boundary", "coplenet", "mcpm", "umanet")
FUSED = ("majority_vote", "staple")  # their labels are made once for each image, before the first step


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    from noisyseg_fast.training.methods import METHODS

    for name in QUICK if quick else METHODS:
        yield partial(step_case, name, {}, device)
        if name == "self_learning":
            yield partial(step_case, name, {"crf": True}, device)
    for name in FUSED:
        yield partial(labels_case, name, device)


@cache
def _batch(device: str) -> dict[str, Any]:
    """All that any method asks for, of the sample: as many clean and as many unlabelled images as others."""
    import torch

    from noisyseg_fast.training.data import Store, TrainingSet, open_data

    data = open_data("sample", meta_fraction=0.15)
    store = Store(raters=True)
    patch = store.get(data.training[0]).target.shape
    training = TrainingSet(data.training, store, patch, meta=data.meta, unlabelled=data.validation)
    batch = torch.utils.data.default_collate([training[i] for i in range(BATCH)])

    def moved(part: Any) -> Any:
        return {k: moved(v) for k, v in part.items()} if isinstance(part, dict) else part.to(device)

    return moved(batch)


def _step(name: str, options: Mapping[str, Any], device: str, plain: bool = False) -> Call:
    """A call that makes one step as the engine does, with the same random numbers each time. Its answer: all losses,
    and the gradient of the first parameters."""
    import torch

    from noisyseg_fast.training.methods import METHODS, Plan
    from noisyseg_fast.training.model import ModelSpec

    whole, parts = _batch(device), METHODS[name].needs | METHODS[name].wants
    batch: Any = {k: v for k, v in whole.items() if k in {"image", "label", "index"} | parts}
    patch = tuple(batch["image"].shape[2:])
    torch.manual_seed(0)
    spec = ModelSpec(name, NETWORK, WIDTH, len(patch), 1, 2, patch, options, whole["raters"].shape[1])
    method = spec.build().to(device).train()
    optimizer = torch.optim.Adam(method.trained(), lr=1e-3)
    method.plan = Plan(optimizer, STEPS, STEPS // 10)
    _remember(method)

    def call() -> Any:
        torch.manual_seed(1)
        with swapped() if plain else nullcontext():
            losses = method.training_step(batch, STEP)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            method.after_step(STEP)
        slopes = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        return [x.detach() for x in losses.values()], slopes[0].clone()

    return call


def _remember(method: Any) -> None:
    """What a method keeps of the steps before, so that each of its losses counts."""
    import torch

    from noisyseg_fast.training.history import LossHistory

    for module in method.modules():
        if isinstance(module, LossHistory):
            module.values = torch.linspace(0, 1.2, module.steps, device=module.values.device)[:, None]
    if "before" in dict(method.named_buffers()):  # hausdorff_dt: both losses of the epoch before
        method.sums.fill_(1)


def step_case(name: str, options: Mapping[str, Any], device: str = "cpu") -> Case:
    """Forward, backward, Adam and what the method does besides; with all the images that it can use."""
    from noisyseg_fast.training.methods import METHODS

    image = _batch(device)["image"]
    extras = {"meta": "clean", "unlabelled": "unlabelled", "raters": "raters' masks"}
    used = [f"+ {extras[part]}" for part in sorted(METHODS[name].needs | METHODS[name].wants)]
    settings = "".join(f", {key}" for key in options)
    return Case(
        family="methods",
        operation=f"step of {name}{settings}",
        input=" ".join(["x".join(map(str, image.shape)), *used]),
        contenders=[
            Contender(OURS, partial(_step, name, options, device)),
            Contender(PLAIN, partial(_step, name, options, device, plain=True)),
            Contender(BASELINE, partial(_step, "ce", {}, device), error=None),
        ],
        oracle=PLAIN,
        tolerance=TOLERANCE,
        moved=image.nbytes,
        device=device,
        baseline=BASELINE,
    )


def labels_case(name: str, device: str = "cpu") -> Case:
    """The labels that a method makes of the raters' masks of a batch: a host's arrays on any device."""
    from noisyseg_fast.training.methods import METHODS, configure

    raters = _batch(device)["raters"].cpu().numpy()

    def fuse(plain: bool) -> Call:
        method, config = METHODS[name], configure(name)

        def call() -> Any:
            with swapped() if plain else nullcontext():
                return np.stack([np.asarray(method.fuse(config, masks, 2)) for masks in raters])

        return call

    def differing(answer: Any, expected: Any) -> float:
        return float((answer != expected).mean())

    return Case(
        family="methods",
        operation=f"labels of {name}",
        input="x".join(map(str, raters.shape)),
        contenders=[
            Contender(OURS, partial(fuse, False), differing),
            Contender(PLAIN, partial(fuse, True), differing),
        ],
        oracle=PLAIN,
        tolerance=TOLERANCE,
        moved=raters.nbytes,
        device="cpu",
    )
