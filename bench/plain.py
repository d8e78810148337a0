"""The training methods without us: what one writes in our functions' place with PyTorch, SciPy and SimpleITK.

`PLAIN` maps each function of ours that the methods call to such a one, with the options that they use; the formulas are
those of the other families' "eager" contenders. `swapped()` puts them in place for a while. Networks, optimisers and
teachers are PyTorch's either way.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from noisyseg_fast import reference
from noisyseg_fast.timing import scipy_signed_map, torch_lower_envelope

from . import losses, meta, task_losses
from .steps import compute_sdf


def dual_task_loss(*args: Any, **options: Any) -> Any:
    from noisyseg_fast.task_losses import DualTaskTerms

    return DualTaskTerms(*task_losses.torch_dual_task(*args, **options))


def uncertainty_weighted_loss(*args: Any, **options: Any) -> Any:
    from noisyseg_fast.task_losses import UncertaintyTerms

    return UncertaintyTerms(*task_losses.torch_uncertainty(*args, **options))


def signed_distance_map(
    mask: Any,
    *,
    spatial_dims: int,
    convention: str = "boundary",
    normalize: bool = False,
    num_classes: int | None = None,
    no_site: float = np.inf,
    border: bool = False,
) -> Any:
    """To the host, one mask at a time, and back."""
    import torch

    if num_classes is not None:
        mask = torch.stack([mask == c for c in range(num_classes)], -1 - spatial_dims)
    masks = mask.reshape(-1, *mask.shape[mask.ndim - spatial_dims :]).cpu().numpy() != 0
    maps = [_signed_map(m, convention, no_site, border) for m in masks]
    if normalize:
        maps = [m / max(np.abs(m).max(), 1e-30) for m in maps]
    return torch.from_numpy(np.stack(maps).astype(np.float32)).to(mask.device).reshape(mask.shape)


def _signed_map(mask: Any, convention: str, no_site: float, border: bool) -> Any:
    if border and mask.any():
        return scipy_signed_map(np.pad(mask, 1), convention)[(slice(1, -1),) * mask.ndim]
    if not mask.any() or mask.all():
        far = {"dtc": 1.0, "kervadec": 0.0}.get(convention, no_site)
        return np.full(mask.shape, -far if mask.any() else far)
    return compute_sdf(mask) if convention == "dtc" else scipy_signed_map(mask, convention)


def sampled_distance(values: Any, sites: Any, *, spatial_dims: int) -> Any:
    import torch

    sampled = torch.where(sites, values, torch.inf)
    flat = sampled.reshape(-1, *values.shape[values.ndim - spatial_dims :])
    return torch_lower_envelope(flat).reshape(values.shape)


def quantile(values: Any, q: float, *, mask: Any = None) -> Any:
    """Of up to 16 million values, as torch.quantile's."""
    import torch

    return torch.nanquantile(values, q) if mask is None else torch.quantile(values[mask], q)


def majority_vote(raters: Any, *, tie: str, num_classes: int, missing: int, spatial_dims: int) -> Any:
    votes = np.stack([(raters == c).sum(0) for c in range(num_classes)])
    if tie == "highest":
        return (num_classes - 1 - votes[::-1].argmax(0)).astype(np.uint8)
    return votes.argmax(0).astype(np.uint8)


def staple(
    raters: Any, *, max_iter: int, tol: float, num_classes: int, missing: int, spatial_dims: int
) -> Any:
    """SimpleITK's, of two classes; its own rule says when to stop."""
    import SimpleITK as sitk

    drawn = [sitk.GetImageFromArray(r) for r in raters if (r != missing).any()]
    peer = sitk.STAPLEImageFilter()
    peer.SetForegroundValue(1)
    peer.SetMaximumIterations(max_iter)
    posterior = sitk.GetArrayFromImage(peer.Execute(drawn))
    return SimpleNamespace(labels=(posterior > 0.5).astype(np.uint8))


def pixel_meta_gradient(
    net: Any, x: Any, y: Any, R: Any, x_clean: Any, y_clean: Any, update: Any, *, keep_graph: bool
) -> Any:
    """Through the virtual step, which is plain SGD; for the real step the network runs again, as in the public code."""
    import torch

    from noisyseg_fast.meta import MetaGradient

    if not isinstance(update, float):
        raise TypeError("only plain SGD is unrolled here")
    weights, clean = meta.unrolled(net, x, y, R, x_clean, y_clean, update, loss_map)
    slope = torch.autograd.grad(clean, weights)[0]
    result = MetaGradient(slope, loss_map(net(x), y) if keep_graph else None, clean.detach())
    result.R, result.objective = weights, None if R is None else (weights * slope).sum()
    return result


def loss_map(logits: Any, target: Any) -> Any:
    return losses.pixel(logits, target, reduction="none")


# Where ours lives -> its name -> what is written without it.
PLAIN: dict[str, dict[str, Callable[..., Any]]] = {
    "losses": {
        "pixel_loss": losses.pixel,
        "dice_loss": losses.dice,
        "focal_dice_loss": losses.focal_dice,
        "nr_dice_loss": losses.nr_dice,
        "dice_ce_loss": losses.dice_ce,
        "dice_mae_loss": losses.dice_mae,
        "boundary_loss": losses.boundary,
        "consistency_loss": losses.consistency,
    },
    "task_losses": {
        "dual_task_loss": dual_task_loss,
        "uncertainty_weighted_loss": uncertainty_weighted_loss,
    },
    "distance": {"signed_distance_map": signed_distance_map, "sampled_distance": sampled_distance},
    "pixels": {"quantile": quantile, "label_errors": reference.label_errors},
    "labels": {
        "majority_vote": majority_vote,
        "staple": staple,
    },  # label_sampling is torch's indexing, ours too
    "meta": {"pixel_meta_gradient": pixel_meta_gradient, "cross_entropy_map": loss_map},
    "weight_nets": {"mask_net": reference.mask_net, "mw_net": reference.mw_net},
}


@functools.cache
def _places() -> list[tuple[dict[str, Any], str, Any]]:
    """Where in the package each of ours is bound: a module's names or the table of losses, the name, the plain one."""
    from noisyseg_fast.training.methods.plain import LOSSES

    of = {
        id(getattr(importlib.import_module(f"noisyseg_fast.{home}"), name)): plain
        for home, names in PLAIN.items()
        for name, plain in names.items()
    }
    modules = [vars(m) for name, m in sys.modules.items() if name.split(".")[0] == "noisyseg_fast" and m]
    found = [(names, key, of[id(x)]) for names in modules for key, x in names.items() if id(x) in of]
    table = [(LOSSES, key, x._replace(function=of[id(x.function)])) for key, x in LOSSES.items()]
    return [*found, *table]


@contextmanager
def swapped() -> Iterator[None]:
    """Inside, noisyseg_fast.training runs without our kernels."""
    before = [(names, key, names[key]) for names, key, _ in _places()]
    try:
        for names, key, plain in _places():
            names[key] = plain
        yield
    finally:
        for names, key, ours in before:
            names[key] = ours
