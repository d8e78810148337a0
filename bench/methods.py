"""A training step of each method against one of plain cross-entropy: same network, same images, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

from noisyseg_fast.timing import OURS, Case, Contender

BATCH, NETWORK, WIDTH = 8, "unet", 16
STEPS, STEP = 1000, 600  # of a run: where warm-ups and first phases are over
BASELINE = "a step of ce"
QUICK = ("ce", "coplenet", "mcpm", "umanet")


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    from noisyseg_fast.training.methods import METHODS

    for name in QUICK if quick else METHODS:
        yield partial(step_case, name, {}, device)
        if name == "self_learning":
            yield partial(step_case, name, {"crf": True}, device)


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


def _step(name: str, options: Mapping[str, Any], device: str) -> Callable[[], None]:
    """A call that makes one step as the engine does."""
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

    def call() -> None:
        loss = method.training_step(batch, STEP)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(STEP)

    return call


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
            Contender(OURS, partial(_step, name, options, device), error=None),
            Contender(BASELINE, partial(_step, "ce", {}, device), error=None),
        ],
        oracle=lambda: None,  # tests/ hold the methods to their definitions
        tolerance=0.0,
        moved=image.nbytes,
        device=device,
        baseline=BASELINE,
    )
