"""The losses of several maps in PyTorch: autograd.Functions in eager mode, registered ops under torch.compile.

terms -> _Terms; its derivatives -> _Gradient (reverse) and _Tangent (forward); theirs -> _GradientTangent, which ends
the family: with the gradient g of the terms, the Hessian is symmetric, so that the derivative of the gradient along a
direction serves the double backward too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import _arrays, task_losses
from ._autograd import _by_slices, _Function, _transforms_active, refuse_transforms
from .task_losses import Options

Tensor = torch.Tensor
_CONSTANTS = {"uncertainty": ("annotations", "raters", "mask"), "dual_task": ("target", "labelled", "mask")}


def _forward(tensors: Any, kind: str, options: Options, direction: Any = (None, None)) -> Any:
    return task_losses.forward(kind, _arrays.of(logits=tensors[0]), tensors, options, direction)


def _backward(
    tensors: Any,
    kind: str,
    options: Options,
    grad_terms: Any,
    sums: Any,
    need: tuple[bool, bool],
    direction: Any = (None, None),
    grad_terms_dot: Any = None,
) -> tuple[Tensor, Tensor]:
    """An empty tensor stands for a gradient that is not needed."""
    space = _arrays.of(logits=tensors[0])
    grads = tuple(
        space.empty_like(x) if n else x.new_empty(0) for x, n in zip(tensors[:2], need, strict=True)
    )
    wanted = tuple(g if needed else None for g, needed in zip(grads, need, strict=True))
    task_losses.backward(
        kind,
        space,
        tensors,
        options,
        grad_terms,
        grad_terms_dot,
        sums,
        (wanted[0], wanted[1]),
        direction,
    )
    return grads[0], grads[1]


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


class _Terms(_Function):
    @staticmethod
    def forward(a: Any, b: Any, c: Any, d: Any, e: Any, kind: str, options: Options) -> Any:
        return _forward((a, b, c, d, e), kind, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.kind, ctx.options = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.save_for_forward(*tensors, output[2])
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_terms: Any, *_: Any) -> Any:
        if grad_terms is None:
            return (None,) * 7
        *tensors, sums = ctx.saved_tensors
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        if torch.is_grad_enabled() or _transforms_active():
            grads = _Gradient.call(*tensors, grad_terms, sums, ctx.kind, ctx.options, *need)
        else:
            grads = _backward(tensors, ctx.kind, ctx.options, grad_terms, sums, need)
        return *(g if needed else None for g, needed in zip(grads, need, strict=True)), *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, a_dot: Any, b_dot: Any, *_: Any) -> Any:
        if a_dot is None and b_dot is None:
            return None, None, None
        *tensors, _sums = ctx.saved_tensors
        tangent = _Tangent.call(*tensors, a_dot, b_dot, ctx.kind, ctx.options)
        return tangent, None, None

    vmap = _by_slices(lambda *args: _Terms.apply(*args))  # type: ignore[no-untyped-call]


class _Gradient(_Function):
    """Of the terms, weighted by grad_terms, with respect to a and b."""

    @staticmethod
    def forward(
        a: Any, b: Any, c: Any, d: Any, e: Any, grad_terms: Any, sums: Any, kind: str, options: Options,
        need_a: bool, need_b: bool,
    ) -> Any:  # fmt: skip
        return _backward((a, b, c, d, e), kind, options, grad_terms, sums, (need_a, need_b))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, _sums, ctx.kind, ctx.options, need_a, need_b = inputs
        ctx.need = need_a, need_b
        ctx.save_for_backward(*tensors, _sums)
        ctx.save_for_forward(*tensors, _sums)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, a_bar: Any, b_bar: Any) -> Any:
        a_bar, b_bar = (x if n else None for x, n in zip((a_bar, b_bar), ctx.need, strict=True))
        if a_bar is None and b_bar is None:
            return (None,) * 11
        *tensors, grad_terms, _sums = ctx.saved_tensors
        need = ctx.needs_input_grad
        grads: Any = (None, None)
        if need[0] or need[1]:
            grads = _GradientTangent.call(
                *tensors, a_bar, b_bar, grad_terms, ctx.kind, ctx.options, need[0], need[1]
            )
            grads = tuple(g if n else None for g, n in zip(grads, need[:2], strict=True))
        by_terms = None
        if need[5]:
            by_terms = _Tangent.call(*tensors, a_bar, b_bar, ctx.kind, ctx.options)
        return *grads, None, None, None, by_terms, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, a_dot: Any, b_dot: Any, c: Any, d: Any, e: Any, grad_dot: Any, *_: Any) -> Any:
        *tensors, grad_terms, sums = ctx.saved_tensors
        rest = (ctx.kind, ctx.options, *ctx.need)
        tangents: Any = (None, None)
        if a_dot is not None or b_dot is not None:
            tangents = _GradientTangent.call(*tensors, a_dot, b_dot, grad_terms, *rest)
        if grad_dot is not None:
            linear = _Gradient.call(*tensors, grad_dot, sums, *rest)
            tangents = tuple(_sum(x, y) for x, y in zip(tangents, linear, strict=True))
        return tangents

    vmap = _by_slices(lambda *args: _Gradient.apply(*args))  # type: ignore[no-untyped-call]


class _Tangent(_Function):
    """The terms' derivative along (a_dot, b_dot)."""

    @staticmethod
    def forward(
        a: Any, b: Any, c: Any, d: Any, e: Any, a_dot: Any, b_dot: Any, kind: str, options: Options
    ) -> Any:
        return _forward((a, b, c, d, e), kind, options, (a_dot, b_dot))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.kind, ctx.options = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, bar: Any) -> Any:
        if bar is None:
            return (None,) * 9
        *tensors, a_dot, b_dot = ctx.saved_tensors
        need = ctx.needs_input_grad
        kind, options = ctx.kind, ctx.options
        first: Any = (None, None)
        if need[0] or need[1]:
            first = _GradientTangent.call(*tensors, a_dot, b_dot, bar, kind, options, need[0], need[1])
            first = tuple(g if n else None for g, n in zip(first, need[:2], strict=True))
        second: Any = (None, None)
        if need[5] or need[6]:
            sums = _Terms.call(*tensors, kind, options)[2]
            second = _Gradient.call(*tensors, bar, sums, kind, options, need[5], need[6])
            second = tuple(g if n else None for g, n in zip(second, need[5:7], strict=True))
        return *first, None, None, None, *second, None, None

    vmap = _by_slices(lambda *args: _Tangent.apply(*args))  # type: ignore[no-untyped-call]


class _GradientTangent(_Function):
    """The gradient's derivative along (a_dot, b_dot), grad_terms fixed. Third derivatives raise."""

    @staticmethod
    def forward(
        a: Any, b: Any, c: Any, d: Any, e: Any, a_dot: Any, b_dot: Any, grad_terms: Any, kind: str,
        options: Options, need_a: bool, need_b: bool,
    ) -> Any:  # fmt: skip
        tensors, direction = (a, b, c, d, e), (a_dot, b_dot)
        sums = _forward(tensors, kind, options, direction)[2]
        return _backward(tensors, kind, options, grad_terms, sums, (need_a, need_b), direction)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("the losses of several maps have no third derivatives")

    vmap = _by_slices(lambda *args: _GradientTangent.apply(*args))  # type: ignore[no-untyped-call]


# ---- the same as registered ops -------------------------------------------------------------------


@torch.library.custom_op("noisyseg::task_terms", mutates_args=())
def _terms_op(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, e: Tensor | None, kind: str, options: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    terms, scores, sums = _forward((a, b, c, d, e), kind, tuple(options))
    return terms, scores, sums


@_terms_op.register_fake
def _(a: Any, b: Any, c: Any, d: Any, e: Any, kind: str, options: list[float]) -> Any:
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    terms, scores, sums = task_losses.shapes(kind, (a, b, c, d, e), tuple(options))
    return (
        a.new_empty(terms, dtype=dtype),
        a.new_empty(scores, dtype=dtype),
        a.new_empty(sums, dtype=torch.float64),
    )


@torch.library.custom_op("noisyseg::task_gradient", mutates_args=())
def _gradient_op(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, e: Tensor | None, grad_terms: Tensor, sums: Tensor,
    kind: str, options: list[float], need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _backward((a, b, c, d, e), kind, tuple(options), grad_terms, sums, (need_a, need_b))


@_gradient_op.register_fake
def _(a: Any, b: Any, *rest: Any) -> Any:
    return tuple(torch.empty_like(x) if n else x.new_empty(0) for x, n in zip((a, b), rest[-2:], strict=True))


def _op_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.rest = inputs[5:]


def _op_vjp(ctx: Any, grad_terms: Any, *_: Any) -> Any:
    *tensors, sums = ctx.saved_tensors
    need = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    grads = _gradient_op(*tensors, grad_terms, sums, *ctx.rest, *need)
    return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 5


_terms_op.register_autograd(_op_vjp, setup_context=_op_context)


# ---- what task_losses.py calls --------------------------------------------------------------------


def terms(kind: str, tensors: Any, options: Options) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The terms and scores one by one."""
    if torch.is_grad_enabled():
        for name, x in zip(_CONSTANTS[kind], tensors[2:], strict=True):
            if x is not None and x.requires_grad:
                receivers = "uncertainty" if kind == "uncertainty" else "sdf"
                raise ValueError(
                    f"{name} requires a gradient, but only logits and {receivers} receive one; pass {name}.detach()"
                )
    if torch.compiler.is_compiling():
        refuse_transforms()
        values, scores, _ = _terms_op(*tensors, kind, list(options))
    elif (
        _transforms_active()
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and (tensors[0].requires_grad or tensors[1].requires_grad))
    ):
        values, scores, _ = _Terms.call(*tensors, kind, options)
    else:
        values, scores, _ = _forward(tensors, kind, options)
    return values.unbind(0), scores.unbind(0)
