"""The losses in PyTorch's autograd: an autograd.Function in eager mode, a registered op under torch.compile.

Why both: a registered op gives silently zero forward-mode tangents, a Function breaks the compiled graph
(DESIGN.md section 4). Forward mode and second derivatives raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _arrays, _core, losses

Tensor = torch.Tensor
Options = tuple[Any, ...]


def _no_gradient(**tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, but only logits receive one; pass {name}.detach()"
                )


def _region_grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    options: Options,
    reduction: int,
    grad_loss: Tensor,
    sums: Tensor,
) -> Tensor:
    space = _arrays.of(logits=logits)
    grad = torch.empty_like(logits)
    _core.region_loss_backward(
        space.view(logits),
        space.view(target),
        losses._view(space, weight),
        losses._view(space, mask),
        options,
        reduction,
        space.view(grad_loss),
        space.view(sums),
        space.view(grad),
        space.exec,
    )
    return grad


def _pixel_grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    class_weight: Tensor | None,
    activation: int,
    reduction: int,
    grad_loss: Tensor,
    sums: Tensor,
) -> Tensor:
    space = _arrays.of(logits=logits)
    grad = torch.empty_like(logits)
    _core.pixel_loss_backward(
        space.view(logits),
        space.view(target),
        losses._view(space, weight),
        losses._view(space, mask),
        losses._view(space, class_weight),
        activation,
        reduction,
        space.view(grad_loss),
        space.view(sums),
        space.view(grad),
        space.exec,
    )
    return grad


class _RegionLoss(torch.autograd.Function):
    @staticmethod
    def forward(logits: Any, target: Any, weight: Any, mask: Any, options: Options, reduction: int) -> Any:
        return losses.region_forward(
            _arrays.of(logits=logits), logits, target, weight, mask, options, reduction
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, target, weight, mask, ctx.options, ctx.reduction = inputs
        ctx.save_for_backward(logits, target, weight, mask, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Any, _: Any) -> Any:
        if grad_loss is None:
            return (None,) * 6
        logits, target, weight, mask, sums = ctx.saved_tensors
        grad = _region_grad(logits, target, weight, mask, ctx.options, ctx.reduction, grad_loss, sums)
        return grad, None, None, None, None, None


class _PixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Any, target: Any, weight: Any, mask: Any, class_weight: Any, activation: int, reduction: int
    ) -> Any:
        return losses.pixel_forward(
            _arrays.of(logits=logits), logits, target, weight, mask, class_weight, activation, reduction
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, target, weight, mask, class_weight, ctx.activation, ctx.reduction = inputs
        ctx.save_for_backward(logits, target, weight, mask, class_weight, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Any, _: Any) -> Any:
        if grad_loss is None:
            return (None,) * 7
        logits, target, weight, mask, class_weight, sums = ctx.saved_tensors
        grad = _pixel_grad(
            logits, target, weight, mask, class_weight, ctx.activation, ctx.reduction, grad_loss, sums
        )
        return grad, None, None, None, None, None, None


# ---- the same as registered ops -------------------------------------------------------------------


@torch.library.custom_op("noisyseg::region_loss", mutates_args=())
def _region_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    kind: int,
    activation: int,
    gamma: float,
    squared: bool,
    per_image: bool,
    include_background: bool,
    eps: float,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    options = (kind, activation, gamma, squared, per_image, include_background, eps)
    return losses.region_forward(_arrays.of(logits=logits), logits, target, weight, mask, options, reduction)


@_region_op.register_fake
def _(logits: Any, target: Any, weight: Any, mask: Any, *rest: Any) -> Any:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(losses.region_shape(logits.shape, rest[:7], rest[7]), dtype=dtype)
    return loss, logits.new_empty((logits.shape[0], logits.shape[1], 2), dtype=torch.float64)


@torch.library.custom_op("noisyseg::region_loss_backward", mutates_args=())
def _region_backward_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    grad_loss: Tensor,
    sums: Tensor,
    kind: int,
    activation: int,
    gamma: float,
    squared: bool,
    per_image: bool,
    include_background: bool,
    eps: float,
    reduction: int,
) -> Tensor:
    options = (kind, activation, gamma, squared, per_image, include_background, eps)
    return _region_grad(logits, target, weight, mask, options, reduction, grad_loss, sums)


@_region_backward_op.register_fake
def _(logits: Any, *rest: Any) -> Any:
    return torch.empty_like(logits)


def _region_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.rest = inputs[4:]


def _region_vjp(ctx: Any, grad_loss: Any, _: Any) -> Any:
    logits, target, weight, mask, sums = ctx.saved_tensors
    grad = _region_backward_op(logits, target, weight, mask, grad_loss, sums, *ctx.rest)
    return grad, *(None,) * 11


_region_op.register_autograd(_region_vjp, setup_context=_region_context)


@torch.library.custom_op("noisyseg::pixel_loss", mutates_args=())
def _pixel_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    class_weight: Tensor | None,
    activation: int,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    return losses.pixel_forward(
        _arrays.of(logits=logits), logits, target, weight, mask, class_weight, activation, reduction
    )


@_pixel_op.register_fake
def _(
    logits: Any, target: Any, weight: Any, mask: Any, class_weight: Any, activation: int, reduction: int
) -> Any:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (logits.shape[0], *logits.shape[2:]) if reduction == 2 else ()
    return logits.new_empty(shape, dtype=dtype), logits.new_empty((2,), dtype=torch.float64)


@torch.library.custom_op("noisyseg::pixel_loss_backward", mutates_args=())
def _pixel_backward_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    class_weight: Tensor | None,
    grad_loss: Tensor,
    sums: Tensor,
    activation: int,
    reduction: int,
) -> Tensor:
    return _pixel_grad(logits, target, weight, mask, class_weight, activation, reduction, grad_loss, sums)


@_pixel_backward_op.register_fake
def _(logits: Any, *rest: Any) -> Any:
    return torch.empty_like(logits)


def _pixel_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.rest = inputs[5:]


def _pixel_vjp(ctx: Any, grad_loss: Any, _: Any) -> Any:
    *tensors, sums = ctx.saved_tensors
    return _pixel_backward_op(*tensors, grad_loss, sums, *ctx.rest), *(None,) * 6


_pixel_op.register_autograd(_pixel_vjp, setup_context=_pixel_context)


# ---- what losses.py calls -------------------------------------------------------------------------


def region_loss(
    space: _arrays.Namespace,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    options: Options,
    reduction: int,
) -> Tensor:
    _no_gradient(target=target, weight=weight, mask=mask)
    if torch.compiler.is_compiling():
        compiled: Tensor = _region_op(logits, target, weight, mask, *options, reduction)[0]
        return compiled
    result: Tensor = _RegionLoss.apply(logits, target, weight, mask, options, reduction)[0]  # type: ignore[no-untyped-call]
    return result


def pixel_loss(
    space: _arrays.Namespace,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    class_weight: Tensor | None,
    activation: int,
    reduction: int,
) -> Tensor:
    _no_gradient(target=target, weight=weight, mask=mask, class_weight=class_weight)
    if torch.compiler.is_compiling():
        compiled: Tensor = _pixel_op(logits, target, weight, mask, class_weight, activation, reduction)[0]
        return compiled
    result: Tensor = _PixelLoss.apply(logits, target, weight, mask, class_weight, activation, reduction)[0]  # type: ignore[no-untyped-call]
    return result
