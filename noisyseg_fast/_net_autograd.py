"""`ce_dual` and the weight nets in PyTorch: an autograd.Function in eager mode, registered ops under torch.compile.

First derivatives in reverse mode are the kernels'; what is rarer (create_graph, forward mode, torch.func) is computed
by the plain compositions of `reference`, which PyTorch differentiates as often as one likes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from . import _arrays, reference, weight_nets
from ._autograd import _Function, _transforms_active, refuse_transforms

Tensor = torch.Tensor


def _plain(kind: str, loss: Tensor, theta: Any) -> Tensor:
    result: Tensor = getattr(reference, kind)(loss, theta)
    return result


def _has_tangent(*tensors: Tensor) -> bool:
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors if x.is_floating_point()
    )


class _Net(_Function):
    """R of (kind, L, *theta)."""

    @staticmethod
    def forward(kind: str, loss: Any, *theta: Any) -> Any:
        return weight_nets.forward(kind, _arrays.of(L=loss), loss, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kind, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        loss, *theta, weight = ctx.saved_tensors
        need = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph
            wanted = [x for x, n in zip((loss, *theta), need, strict=True) if n]
            found = iter(torch.autograd.grad(_plain(ctx.kind, loss, theta), wanted, grad, create_graph=True))
            return None, *(next(found) if n else None for n in need)
        packed, by_loss = weight_nets.vjp(
            ctx.kind, _arrays.of(L=loss), grad, weight, loss, theta, attached=need[0]
        )
        by_theta = zip(weight_nets.parts(packed, theta), need[1:], strict=True)
        return None, by_loss, *(g if n else None for g, n in by_theta)


def net(kind: str, loss: Tensor, theta: Any) -> Tensor:
    if torch.compiler.is_compiling():
        refuse_transforms()
        compiled: Tensor = _op(kind, loss, list(theta))
        return compiled
    if _transforms_active() or _has_tangent(loss, *theta):
        return _plain(kind, loss, theta)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (loss, *theta)):
        eager: Tensor = _Net.call(kind, loss, *theta)
        return eager
    value: Tensor = weight_nets.forward(kind, _arrays.of(L=loss), loss, theta)
    return value


def vjp(
    kind: str, grad: Tensor, weight: Tensor, loss: Tensor, theta: Any, attached: bool
) -> tuple[Tensor, Tensor]:
    """(dtheta packed, dL or nothing), without a graph."""
    if torch.compiler.is_compiling():
        both: tuple[Tensor, Tensor] = _vjp_op(kind, grad, weight, loss, list(theta), attached)
        return both
    return weight_nets.vjp(kind, _arrays.of(L=loss), grad, weight, loss, theta, attached)


def ce_dual(z: Tensor, zdot: Tensor, y: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    compiling = torch.compiler.is_compiling()
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (z, zdot, y))
    if compiling:
        refuse_transforms()
    if differentiable or (not compiling and (_transforms_active() or _has_tangent(z, zdot, y))):
        dtype = torch.float64 if torch.float64 in (z.dtype, zdot.dtype) else torch.float32
        return reference.ce_dual(z.to(dtype), zdot.to(dtype), y, "softmax" if softmax else "sigmoid")
    if compiling:
        both: tuple[Tensor, Tensor] = _ce_op(z, zdot, y, softmax)
        return both
    return weight_nets.ce_values(_arrays.of(z=z), z, zdot, y, softmax)


# ---- the same as registered ops -------------------------------------------------------------------


@torch.library.custom_op("noisyseg::ce_dual", mutates_args=())
def _ce_op(z: Tensor, zdot: Tensor, y: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    return weight_nets.ce_values(_arrays.of(z=z), z, zdot, y, softmax)


@_ce_op.register_fake
def _(z: Any, zdot: Any, y: Any, softmax: bool) -> Any:
    dtype = torch.float64 if torch.float64 in (z.dtype, zdot.dtype) else torch.float32
    shape = (z.shape[0], *z.shape[2:])
    return z.new_empty(shape, dtype=dtype), z.new_empty(shape, dtype=dtype)


@torch.library.custom_op("noisyseg::weight_net", mutates_args=())
def _op(kind: str, loss: Tensor, theta: list[Tensor]) -> Tensor:
    value: Tensor = weight_nets.forward(kind, _arrays.of(L=loss), loss, theta)
    return value


@_op.register_fake
def _(kind: str, loss: Any, theta: Any) -> Any:
    return loss.new_empty(loss.shape)


@torch.library.custom_op("noisyseg::weight_net_vjp", mutates_args=())
def _vjp_op(
    kind: str, grad: Tensor, weight: Tensor, loss: Tensor, theta: list[Tensor], attached: bool
) -> tuple[Tensor, Tensor]:
    packed, by_loss = weight_nets.vjp(kind, _arrays.of(L=loss), grad, weight, loss, theta, attached)
    return packed, loss.new_empty(0) if by_loss is None else by_loss


@_vjp_op.register_fake
def _(kind: str, grad: Any, weight: Any, loss: Any, theta: Any, attached: bool) -> Any:
    size = sum(x.numel() for x in theta)
    return loss.new_empty(size), loss.new_empty(loss.shape if attached else 0)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.kind, loss, theta = inputs
    ctx.save_for_backward(loss, *theta, output)


def _backward(ctx: Any, grad: Any) -> Any:
    loss, *theta, weight = ctx.saved_tensors
    attached = ctx.needs_input_grad[1]
    packed, by_loss = _vjp_op(ctx.kind, grad, weight, loss, theta, attached)
    return None, by_loss if attached else None, weight_nets.parts(packed, theta)


_op.register_autograd(_backward, setup_context=_context)
