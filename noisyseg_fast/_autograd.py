"""The losses in PyTorch's autograd: autograd.Functions in eager mode, registered ops under torch.compile.

Why both: a registered op gives silently zero forward-mode tangents, a Function breaks the compiled graph
(DESIGN.md section 4). The Functions' derivatives are such Functions again: loss -> gradient and loss -> tangent,
both of which differentiate once more through the product with the loss's Hessian, which is symmetric. Third
derivatives raise, as do forward mode and second derivatives of a compiled loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _arrays, losses
from .losses import Options

Tensor = torch.Tensor
Maybe = Tensor | None


def loss(
    logits: Tensor,
    target: Tensor,
    weight: Maybe,
    mask: Maybe,
    class_weight: Maybe,
    options: Options,
    reduction: int,
) -> Tensor:
    needed = torch.is_grad_enabled()
    for name, x in {"target": target, "weight": weight, "mask": mask, "class_weight": class_weight}.items():
        if needed and x is not None and x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, but only logits receive one; pass {name}.detach()"
            )
    arrays = (logits, target, weight, mask, class_weight)
    if torch.compiler.is_compiling():
        compiled: Tensor = _op(*arrays, [float(x) for x in options], reduction)[0]
        return compiled
    keep = needed and logits.requires_grad
    eager: Tensor = _Loss.apply(*arrays, options, reduction, keep)[0]  # type: ignore[no-untyped-call]
    return eager


# ---- eager ----------------------------------------------------------------------------------------


def _by_slices(function: Callable[..., Any]) -> Any:
    """torch.vmap of a Function: one call for each slice."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def slice_of(i: int) -> list[Any]:
            return [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]

        results = [function(*slice_of(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        columns = list(zip(*results, strict=True))
        stacked = tuple(None if c[0] is None else torch.stack(c) for c in columns)
        return stacked, tuple(None if c is None else 0 for c in stacked)

    return staticmethod(vmap)


class _Loss(torch.autograd.Function):
    """(loss, sums, kept) of the arrays, as losses.forward; `keep` says whether a gradient is likely wanted."""

    @staticmethod
    def forward(
        logits: Any,
        target: Any,
        weight: Any,
        mask: Any,
        class_weight: Any,
        options: Options,
        reduction: int,
        keep: bool,
    ) -> Any:
        space = _arrays.of(logits=logits)
        memory = space.empty_like(logits) if keep and logits.dtype == torch.float32 else None
        arrays = (logits, target, weight, mask, class_weight)
        loss, sums, kept = losses.forward(space, *arrays, options, reduction, memory)
        return loss, sums, memory if kept else None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arrays, ctx.options, ctx.reduction, _ = inputs
        _, sums, ctx.kept = output
        ctx.save_for_backward(*arrays, sums)
        ctx.save_for_forward(*arrays)
        ctx.mark_non_differentiable(sums, *(() if ctx.kept is None else (ctx.kept,)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Any, *_: Any) -> Any:
        *arrays, sums = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * 8
        kept, ctx.kept = ctx.kept, None  # good for one gradient: it becomes that
        if kept is not None and not torch.is_grad_enabled():
            space = _arrays.of(logits=arrays[0])
            grad = losses.backward(space, *arrays, ctx.options, ctx.reduction, grad_loss, sums, kept)
        else:
            grad = _Grad.apply(grad_loss, sums, *arrays, ctx.options, ctx.reduction)  # type: ignore[no-untyped-call]
        return grad, *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, logits_dot: Any, *_: Any) -> Any:
        loss_dot = None
        if logits_dot is not None:
            loss_dot = _Tangent.apply(logits_dot, *ctx.saved_tensors, ctx.options, ctx.reduction)  # type: ignore[no-untyped-call]
        return loss_dot, None, None

    vmap = _by_slices(lambda *args: _Loss.apply(*args))  # type: ignore[no-untyped-call]


class _Grad(torch.autograd.Function):
    """The gradient with respect to logits."""

    @staticmethod
    def forward(
        grad_loss: Any,
        sums: Any,
        logits: Any,
        target: Any,
        weight: Any,
        mask: Any,
        class_weight: Any,
        options: Options,
        reduction: int,
    ) -> Any:
        arrays = (logits, target, weight, mask, class_weight)
        return losses.backward(_arrays.of(logits=logits), *arrays, options, reduction, grad_loss, sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        grad_loss, _, *arrays, ctx.options, ctx.reduction = inputs
        ctx.save_for_backward(grad_loss, *arrays)
        ctx.save_for_forward(grad_loss, *arrays)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Any) -> Any:
        if u is None:
            return (None,) * 9
        grad_loss, *arrays = ctx.saved_tensors
        by_grad_loss, by_logits = _second(u, grad_loss, None, arrays, ctx.options, ctx.reduction)
        return by_grad_loss, None, by_logits, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, grad_loss_dot: Any, _: Any, logits_dot: Any, *__: Any) -> Any:
        grad_loss, *arrays = ctx.saved_tensors
        if logits_dot is None:
            logits_dot = torch.zeros_like(arrays[0])
        return _GradTangent.apply(grad_loss, grad_loss_dot, logits_dot, *arrays, ctx.options, ctx.reduction)  # type: ignore[no-untyped-call]

    vmap = _by_slices(lambda *args: _Grad.apply(*args))  # type: ignore[no-untyped-call]


class _Tangent(torch.autograd.Function):
    """The loss's derivative along logits_dot."""

    @staticmethod
    def forward(logits_dot: Any, *arguments: Any) -> Any:
        *arrays, options, reduction = arguments
        space = _arrays.of(logits=arrays[0])
        return losses.tangent(space, *arrays, options, reduction, logits_dot)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.options, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Any) -> Any:
        if grad_loss is None:
            return (None,) * 8
        logits_dot, *arrays = ctx.saved_tensors
        space = _arrays.of(logits=arrays[0])
        _, sums, _ = losses.forward(space, *arrays, ctx.options, ctx.reduction)
        by_dot = losses.backward(space, *arrays, ctx.options, ctx.reduction, grad_loss, sums)
        by_logits = _second(logits_dot, grad_loss, None, arrays, ctx.options, ctx.reduction)[1]
        return by_dot, by_logits, *(None,) * 6

    vmap = _by_slices(lambda *args: _Tangent.apply(*args))  # type: ignore[no-untyped-call]


class _GradTangent(torch.autograd.Function):
    """The gradient's derivative along (grad_loss_dot, logits_dot)."""

    @staticmethod
    def forward(grad_loss: Any, grad_loss_dot: Any, logits_dot: Any, *arguments: Any) -> Any:
        *arrays, options, reduction = arguments
        return _second(logits_dot, grad_loss, grad_loss_dot, arrays, options, reduction)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        raise RuntimeError("noisyseg_fast losses have first and second derivatives, no third ones")

    vmap = _by_slices(lambda *args: _GradTangent.apply(*args))  # type: ignore[no-untyped-call]


def _second(
    logits_dot: Tensor,
    grad_loss: Tensor,
    grad_loss_dot: Maybe,
    arrays: list[Any],
    options: Options,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """(loss_dot, grad_dot) along logits_dot."""
    space = _arrays.of(logits=arrays[0], logits_dot=logits_dot)
    loss_dot, sums = losses.tangent(space, *arrays, options, reduction, logits_dot)
    dots = (logits_dot, grad_loss, grad_loss_dot, sums)
    return loss_dot, losses.backward_tangent(space, *arrays, options, reduction, *dots)


# ---- compiled -------------------------------------------------------------------------------------


def _options(values: list[float]) -> Options:
    return Options(*values)  # type: ignore[arg-type]  # all numbers, and the kernels take them as such


@torch.library.custom_op("noisyseg::loss", mutates_args=())
def _op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    class_weight: Tensor | None,
    options: list[float],
    reduction: int,
) -> tuple[Tensor, Tensor]:
    arrays = (logits, target, weight, mask, class_weight)
    return losses.forward(_arrays.of(logits=logits), *arrays, _options(options), reduction)[:2]


@_op.register_fake
def _(
    logits: Any, target: Any, weight: Any, mask: Any, class_weight: Any, options: Any, reduction: int
) -> Any:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(losses.loss_shape(logits.shape, _options(options), reduction), dtype=dtype)
    return loss, logits.new_empty(losses.sums_shape(logits.shape), dtype=torch.float64)


@torch.library.custom_op("noisyseg::loss_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    class_weight: Tensor | None,
    options: list[float],
    reduction: int,
    grad_loss: Tensor,
    sums: Tensor,
) -> Tensor:
    arrays = (logits, target, weight, mask, class_weight)
    grad: Tensor = losses.backward(
        _arrays.of(logits=logits), *arrays, _options(options), reduction, grad_loss, sums
    )
    return grad


@_backward_op.register_fake
def _(logits: Any, *rest: Any) -> Any:
    return torch.empty_like(logits)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    *arrays, ctx.options, ctx.reduction = inputs
    ctx.save_for_backward(*arrays, output[1])


def _vjp(ctx: Any, grad_loss: Any, _: Any) -> Any:
    *arrays, sums = ctx.saved_tensors
    return _backward_op(*arrays, ctx.options, ctx.reduction, grad_loss, sums), *(None,) * 6


_op.register_autograd(_vjp, setup_context=_context)
