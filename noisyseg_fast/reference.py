"""The operations, readable and slow: the definition, the tests' oracle, the benchmark's baseline.

Plain PyTorch (and SciPy-free NumPy for the distances); nothing here calls the compiled module.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# ---- losses ---------------------------------------------------------------------------------------


def _probability(logits: Tensor, activation: str) -> Tensor:
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(1)


def _per_class(logits: Tensor, target: Tensor) -> Tensor:
    """Labels (B, *S) as one map for each class (B, C, *S) in the logits' dtype; such maps as they are."""
    if target.shape == logits.shape:
        return target.to(logits.dtype)
    classes = logits.shape[1]
    if classes == 1:
        return target.to(logits.dtype).unsqueeze(1)
    return F.one_hot(target.long(), classes).movedim(-1, 1).to(logits.dtype)


def _pixel_weight(logits: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B, 1, *S): weight where mask is not 0, else 0."""
    w = torch.ones_like(logits[:, :1]) if weight is None else weight.to(logits.dtype).unsqueeze(1)
    return w if mask is None else torch.where(mask.unsqueeze(1) != 0, w, torch.zeros_like(w))


def _ratio_loss(
    numerator: Tensor,
    denominator: Tensor,
    *,
    dice: bool,
    per_image: bool,
    include_background: bool,
    eps: float,
    reduction: str,
) -> Tensor:
    """The loss from (B, C, *S) maps whose sums are the numerator and the denominator."""
    n, d = (x.flatten(2).sum(2) for x in (numerator, denominator))
    if not per_image:
        n, d = n.sum(0), d.sum(0)
    if not include_background and n.shape[-1] > 1:
        n, d = n[..., 1:], d[..., 1:]
    loss = 1 - (n + eps) / (d + eps) if dice else n / (d + eps)
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](loss)


def nr_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    activation: str = "sigmoid",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """sum w |p - g|^gamma / (sum w p^2 + sum w g^2 + eps); Wang et al., TMI 2020, eq. 3."""
    p, g = _probability(logits, activation), _per_class(logits, target)
    w = _pixel_weight(logits, weight, mask)
    d = p**2 + g**2 if denominator == "squared" else p + g
    return _ratio_loss(
        w * (p - g).abs() ** gamma,
        w * d,
        dice=False,
        per_image=per_image,
        include_background=include_background,
        eps=eps,
        reduction=reduction,
    )


def dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str = "sigmoid",
    denominator: str = "squared",
    per_image: bool = True,
    include_background: bool = True,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """1 - (2 sum w p g + eps) / (sum w p^2 + sum w g^2 + eps)."""
    p, g = _probability(logits, activation), _per_class(logits, target)
    w = _pixel_weight(logits, weight, mask)
    d = p**2 + g**2 if denominator == "squared" else p + g
    return _ratio_loss(
        w * 2 * p * g,
        w * d,
        dice=True,
        per_image=per_image,
        include_background=include_background,
        eps=eps,
        reduction=reduction,
    )


def pixel_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: str = "ce",
    activation: str = "softmax",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy map times weight; "mean" divides by the pixels in the mask (or their class weights)."""
    if kind != "ce":
        raise ValueError(f"kind must be ce, got {kind!r}")
    g = _per_class(logits, target)
    shape = (1, -1) + (1,) * (logits.ndim - 2)
    cw = torch.ones(logits.shape[1]) if class_weight is None else torch.as_tensor(class_weight)
    cw = cw.to(logits).reshape(shape)
    labels = target.ndim == logits.ndim - 1
    if activation == "softmax":
        loss = -(cw * g * logits.log_softmax(1)).sum(1)
        count = (cw * g).sum(1) if labels else torch.ones_like(loss)
    else:
        loss = (cw * F.binary_cross_entropy_with_logits(logits, g, reduction="none")).mean(1)
        count = torch.ones_like(loss)
    inside = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask != 0
    loss = torch.where(inside, _pixel_weight(logits, weight, mask)[:, 0] * loss, torch.zeros_like(loss))
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = torch.where(inside, count, torch.zeros_like(count)).sum()
    return loss.sum() / torch.where(total == 0, torch.ones_like(total), total)


# ---- distances ------------------------------------------------------------------------------------

# ---- metrics --------------------------------------------------------------------------------------
