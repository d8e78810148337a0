"""A training step whose loss, or what it makes of the parameters, is not finite: which image, and which term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import methods
from .model import save

FORMAT = "noisyseg-fast step"  # of nan-step-N.pt


def finite(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Whether the loss and all parameters are finite: a scalar bool on their device, which no one has waited for."""
    most = torch._foreach_norm(list(parameters), torch.inf)
    return torch.isfinite(torch.stack([loss.detach().float(), *(m.float() for m in most)])).all()


def diagnose(
    module: Any, batch: methods.Batch, step: int, cases: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    """What is not finite of each image of the batch, by itself: {"cases": its ids, "inputs": names of the batch's
    parts, "logits": bool, "terms": names of losses}.

    module: the method, its parameters as they were before the step; it is changed by this. Terms are what
    training_step says of that image alone, none where the method cannot do with one image.
    """
    images = []
    for row, ids in enumerate(cases):
        one: Any = _row(batch, row)
        terms: list[str] = []
        with suppress(RuntimeError, ValueError):  # batch norm of one value, pairs of images
            terms = [name for name, value in module.training_step(one, step).items() if not _finite(value)]
        module.eval()
        with torch.no_grad():
            logits = _finite(module(one["image"]))
        module.train()
        inputs = [name for name, value in _flat(one).items() if not _finite(value)]
        images.append({"cases": dict(ids), "inputs": inputs, "logits": not logits, "terms": terms})
    return images


def sentence(images: Sequence[Mapping[str, Any]], losses: Mapping[str, float], parameters: bool) -> str:
    """One line: what of which images. parameters: whether those before the step were finite."""
    if not parameters:
        return "the parameters were not finite before it already"
    shown = []
    for image in images:
        parts = [f"{name} of the data" for name in image["inputs"]]
        parts += ["logits"] if image["logits"] else []
        parts += image["terms"]
        if parts:
            names = dict.fromkeys(image["cases"].values())
            shown.append(f"case {' with '.join(names)} ({', '.join(parts)})")
    wrong = [name for name, value in losses.items() if not torch.isfinite(torch.tensor(value))]
    what = f"not finite: {', '.join(wrong)}" if wrong else "the loss is finite, its gradient is not"
    every = ", ".join(dict.fromkeys(image["cases"]["image"] for image in images))
    return f"{what}; by itself not finite: {', '.join(shown)}" if shown else f"{what}; cases {every}"


def write(
    path: Path,
    batch: methods.Batch,
    step: int,
    epoch: int,
    losses: Mapping[str, float],
    images: Sequence[Mapping[str, Any]],
) -> None:
    """nan-step-N.pt: all of it, for torch.load(path, weights_only=True)."""
    content = {
        "format": FORMAT,
        "step": step,
        "epoch": epoch,
        "losses": dict(losses),
        "images": [dict(image) for image in images],
        "batch": {name: value.cpu() for name, value in _flat(batch).items()},
    }
    save(path, content)


def _row(part: Any, row: int) -> Any:
    return {k: _row(v, row) if isinstance(v, dict) else v[row : row + 1] for k, v in part.items()}


def _flat(batch: Any, before: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in batch.items():
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def parameters_finite(method: nn.Module) -> bool:
    return all(_finite(p) for p in method.parameters())
