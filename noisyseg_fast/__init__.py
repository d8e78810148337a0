"""Fast exact operations for segmentation with noisy, scarce or disagreeing masks.

The operations are plain functions on torch, NumPy, CuPy or DLPack arrays, on the CPU or a CUDA GPU.
`noisyseg_fast.training` and the command `noisyseg` train networks with them.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import _core

__version__: str = _core.build_info()["version"]

# Public name -> the module it lives in. Loaded at first use, so that importing the package is quick
# and the losses' need of torch is nobody else's.
_HOME = {
    "distance_transform_edt": "distance",
    "signed_distance_map": "distance",
    "sampled_distance": "distance",
    "surface_metrics": "metrics",
    "overlap_metrics": "metrics",
    "confusion": "metrics",
    "OverlapAccumulator": "metrics",
    "majority_vote": "labels",
    "staple": "labels",
    "simple": "labels",
    "soft_average": "labels",
    "label_sampling": "labels",
    "rater_scores": "labels",
    "agreement": "labels",
    "nr_dice_loss": "losses",
    "NRDiceLoss": "losses",
    "dice_loss": "losses",
    "DiceLoss": "losses",
    "focal_dice_loss": "losses",
    "FocalDiceLoss": "losses",
    "generalized_dice_loss": "losses",
    "GeneralizedDiceLoss": "losses",
    "pixel_loss": "losses",
    "PixelLoss": "losses",
    "dice_ce_loss": "losses",
    "DiceCELoss": "losses",
    "dice_mae_loss": "losses",
    "DiceMAELoss": "losses",
    "boundary_loss": "losses",
    "BoundaryLoss": "losses",
    "consistency_loss": "losses",
    "ConsistencyLoss": "losses",
    "uncertainty_weighted_loss": "task_losses",
    "UncertaintyWeightedLoss": "task_losses",
    "dual_task_loss": "task_losses",
    "DualTaskLoss": "task_losses",
    "quantile": "pixels",
    "topk_threshold": "pixels",
    "topk_mask": "pixels",
    "confident_joint": "pixels",
    "label_errors": "pixels",
    "pixel_meta_gradient": "meta",
    "logit_jvp": "meta",
    "update_vjp": "meta",
    "head_hypergradient": "meta",
    "unroll_reference": "meta",
    "norm_act": "dual_norms",
    "fuse_dual_norms": "dual_norms",
    "unfuse_dual_norms": "dual_norms",
    "ce_dual": "weight_nets",
    "mask_net": "weight_nets",
    "mask_net_vjp": "weight_nets",
    "MaskNet": "weight_nets",
    "MaskNetTheta": "weight_nets",
    "mw_net": "weight_nets",
    "mw_net_vjp": "weight_nets",
    "MWNet": "weight_nets",
    "MWNetTheta": "weight_nets",
}
_MODULES = (
    "compat",
    "distance",
    "labels",
    "dual_norms",
    "losses",
    "meta",
    "metrics",
    "noise",
    "pixels",
    "reference",
    "sample",
    "task_losses",
    "training",
    "weight_nets",
)

__all__ = ["build_info", *_HOME, *_MODULES]


def build_info() -> dict[str, Any]:
    """What this build holds: version, compiler, CUDA version and architectures, instruction sets, threads."""
    return dict(_core.build_info())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value  # found at once from now on
        return value
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
