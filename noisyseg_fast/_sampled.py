"""sampled_distance in PyTorch's autograd: a Function in eager mode, a registered op under torch.compile (the reasons
are those of _autograd.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _arrays, distance
from ._autograd import _of_values

Tensor = torch.Tensor


def _unflatten(sizes: Sequence[float]) -> list[distance.Spacing]:
    return [(sizes[i], sizes[i + 1], sizes[i + 2]) for i in range(0, len(sizes), 3)]


def _grad(grad: Tensor, apexes: Tensor, sizes: Sequence[distance.Spacing], dims: int) -> Tensor:
    result: Tensor = distance.sampled_backward(_arrays.of(grad=grad), grad.contiguous(), apexes, sizes, dims)
    return result


class _SampledDistance(torch.autograd.Function):
    @staticmethod
    def forward(values: Any, sites: Any, sizes: Any, dims: int) -> Any:
        return distance.sampled_forward(_arrays.of(values=values), values, sites, sizes, dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.sizes, ctx.dims = inputs
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_of_values
    @once_differentiable
    def backward(ctx: Any, grad: Any, _: Any) -> Any:
        if grad is None:
            return (None,) * 4
        return _grad(grad, ctx.saved_tensors[0], ctx.sizes, ctx.dims), None, None, None


@torch.library.custom_op("noisyseg::sampled_distance", mutates_args=())
def _op(values: Tensor, sites: Tensor | None, sizes: Sequence[float], dims: int) -> tuple[Tensor, Tensor]:
    return distance.sampled_forward(_arrays.of(values=values), values, sites, _unflatten(sizes), dims)


@_op.register_fake
def _(values: Any, sites: Any, sizes: Any, dims: int) -> Any:
    shape = distance._apex_shape(values.shape, dims, _unflatten(sizes))
    return values.new_empty(values.shape), values.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("noisyseg::sampled_distance_backward", mutates_args=())
def _backward_op(grad: Tensor, apexes: Tensor, sizes: Sequence[float], dims: int) -> Tensor:
    return _grad(grad, apexes, _unflatten(sizes), dims)


@_backward_op.register_fake
def _(grad: Any, apexes: Any, sizes: Any, dims: int) -> Any:
    return grad.new_empty(grad.shape)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    _, _, ctx.sizes, ctx.dims = inputs


def _vjp(ctx: Any, grad: Any, _: Any) -> Any:
    return _backward_op(grad, ctx.saved_tensors[0], ctx.sizes, ctx.dims), None, None, None


_op.register_autograd(_vjp, setup_context=_context)


def apply(values: Tensor, sites: Tensor | None, sizes: list[distance.Spacing], dims: int) -> Tensor:
    if torch.compiler.is_compiling():
        compiled: Tensor = _op(values, sites, [s for size in sizes for s in size], dims)[0]
        return compiled
    result: Tensor = _SampledDistance.apply(values, sites, sizes, dims)[0]  # type: ignore[no-untyped-call]
    return result
