"""The losses in PyTorch's autograd: autograd.Functions in eager mode, registered ops under torch.compile.

Why both: a registered op gives silently zero forward-mode tangents, a Function breaks the compiled graph
(DESIGN.md section 4). The Functions' derivatives are such Functions again: loss -> gradient and loss -> tangent,
both of which differentiate once more through the product with the loss's Hessian, which is symmetric. Third
derivatives raise, as do forward mode and second derivatives of a compiled loss.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _arrays, _core, losses
from .losses import Arrays, Options

Tensor = torch.Tensor
Maybe = Tensor | None


_transforms_active = torch._C._are_functorch_transforms_active


compiling = torch.compiler.is_compiling


def signature(arrays: Arrays, options: Options, ignore_index: Any, reduction: Any) -> Any:
    """What the checks of a call depend on, as the key of a dict; None where the call must be checked in full."""
    if compiling() or _transforms_active() or forward_ad._current_level >= 0:
        return None
    key: list[Any] = [options, ignore_index, reduction]
    try:
        if not arrays[0].is_cpu:
            return None
        for x in arrays:
            if x is None:
                key.append(None)
            elif isinstance(x, (list, tuple)):  # class_weight
                key.append(tuple(float(w) for w in x))
            elif x.layout is not torch.strided or x.is_neg():
                return None
            else:
                key += [type(x), x.shape, x.dtype, x.device, x.stride()]
        found = tuple(key)
        hash(found)
    except (
        AttributeError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # not tensors, not dense ones, a list as an option
        return None
    return found


class Known:
    """A call on CPU tensors that was checked once: another with the same signature needs its addresses alone."""

    def __init__(self, plan: losses.Plan, arrays: Arrays) -> None:
        space, logits = plan.space, arrays[0]
        self.plan = plan
        self.keeps = plan.reduction < 2 and not plan.options.region and logits.dtype == torch.float32
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.shape = losses.loss_shape(logits.shape, plan.options, plan.reduction)
        views = [None if x is None else space.view(x) for x in arrays]
        loss = space.view(torch.empty(self.shape, dtype=self.dtype))
        self.core = _core.LossCall(
            views, plan.options, plan.reduction, loss, space.view(torch.empty_like(logits))
        )

    def __call__(self, arrays: Arrays) -> Tensor:
        arrays = self.plan.arrays(arrays)
        if torch.is_grad_enabled():
            _refuse_gradients(arrays)
            if arrays[0].requires_grad:
                result: Tensor = _Eager.run(self, *arrays)
                return result
        return self.forward(arrays, False)[0]

    def forward(self, arrays: Arrays, keep: bool) -> tuple[Tensor, bytearray, Any]:
        """(loss, sums, gradient or None)"""
        loss = torch.empty(self.shape, dtype=self.dtype)
        grad = self.plan.space.empty_like(arrays[0]) if keep and self.keeps else None
        in_range, kept, sums = self.core.forward(
            _addresses(arrays),
            loss.data_ptr(),
            0 if grad is None else grad.data_ptr(),
            torch.get_num_threads(),
        )
        if not in_range:
            raise losses.bad_label(arrays[0].shape[1])
        return loss, sums, grad if kept else None

    def backward(self, arrays: Arrays, grad_loss: Tensor, sums: bytearray) -> Any:
        if self.shape:  # grad_loss may have strides of its own
            return losses.backward(
                self.plan.space, arrays, self.plan.options, self.plan.reduction, grad_loss, sums
            )
        grad = self.plan.space.empty_like(arrays[0])
        self.core.backward(
            _addresses(arrays), grad_loss.data_ptr(), sums, grad.data_ptr(), torch.get_num_threads()
        )
        return grad

    def value_and_grad(self, arrays: Arrays) -> tuple[Any, Any]:
        arrays = self.plan.arrays(arrays)
        if self.shape:
            return losses.value_and_grad(self.plan.space, arrays, self.plan.options, self.plan.reduction)
        loss = torch.empty(self.shape, dtype=self.dtype)
        grad = self.plan.space.empty_like(arrays[0])
        threads = torch.get_num_threads()
        if not self.core.value_and_grad(
            _addresses(arrays), loss.data_ptr(), grad.data_ptr(), self.keeps, threads
        ):
            raise losses.bad_label(arrays[0].shape[1])
        return loss, grad


def _addresses(arrays: Arrays) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in arrays]


def loss(arrays: Arrays, options: Options, reduction: int) -> Tensor:
    needed = torch.is_grad_enabled()
    if needed:
        _refuse_gradients(arrays)
    if torch.compiler.is_compiling():
        refuse_transforms()
        compiled: Tensor = _op(*arrays, [float(x) for x in options], reduction)[0]
        return compiled
    logits = arrays[0]
    keep = needed and logits.requires_grad
    result: Tensor
    if keep or _transforms_active() or forward_ad._current_level >= 0:
        result = _Loss.call(*arrays, options, reduction, keep)[0]
    else:
        result = losses.forward(_arrays.of_torch(logits), arrays, options, reduction)[0]
    return result


def _refuse_gradients(arrays: Arrays) -> None:
    for i in range(1, 5):
        x = arrays[i]
        if x is not None and x.requires_grad:
            name = ("target", "weight", "mask", "class_weight")[i - 1]
            raise ValueError(f"{name} requires a gradient, but only logits receive one; pass {name}.detach()")


def refuse_transforms() -> None:
    """Raises under forward mode or torch.func inside a compiled function, where an op's tangents are lost."""
    layer = torch._C._functorch.peek_interpreter_stack()
    # not "is None": under Dynamo it never is
    if forward_ad._current_level >= 0 or isinstance(layer, torch._C._functorch.CInterpreter):
        raise NotImplementedError(
            "inside torch.compile this loss has first derivatives in reverse mode only; call torch.func and "
            "forward AD outside of it"
        )


# ---- eager ----------------------------------------------------------------------------------------


def _of_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """backward or jvp, given tensors whose memory holds their values: PyTorch may pass lazily negated ones, and zeros
    that have no memory."""

    def values(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x.resolve_neg()

    return lambda ctx, *grads: function(ctx, *map(values, grads))


class _Function(torch.autograd.Function):
    """A Function whose `call` takes the old style of forward, with ctx, where no transform of torch.func is
    active: the new style binds its arguments by their signature, which costs 80 us a call."""

    _old_style: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("backward", "jvp"):
            if name in cls.__dict__:
                setattr(cls, name, staticmethod(_of_values(cls.__dict__[name].__func__)))

        def forward(ctx: Any, *args: Any) -> Any:
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return output

        members = {name: cls.__dict__[name] for name in ("backward", "jvp") if name in cls.__dict__}
        bases = (torch.autograd.Function,)
        cls._old_style = type(cls.__name__ + "OldStyle", bases, {"forward": staticmethod(forward), **members})

    @classmethod
    def call(cls, *args: Any) -> Any:
        return (cls if _transforms_active() else cls._old_style).apply(*args)


def _by_slices(function: Callable[..., Any]) -> Any:
    """torch.vmap of a Function: one call for each slice."""

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        def slice_of(i: int) -> list[Any]:
            pairs = zip(args, in_dims, strict=True)  # in_dims of the options, a tuple, is a tuple
            return [a.select(d, i) if isinstance(d, int) else a for a, d in pairs]

        results = [function(*slice_of(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        columns = list(zip(*results, strict=True))
        stacked = tuple(None if c[0] is None else torch.stack(c) for c in columns)
        return stacked, tuple(None if c is None else 0 for c in stacked)

    return staticmethod(vmap)


class _Eager(torch.autograd.Function):
    """`Known` where neither torch.func nor forward mode is active: what most training steps need.

    Second derivatives go on from `_Grad`.
    """

    run: Any  # apply, without the layer of Python that looks for torch.func

    @staticmethod
    def forward(ctx: Any, known: Known, *arrays: Any) -> Any:
        loss, sums, kept = known.forward(arrays, True)
        ctx.save_for_backward(*arrays)
        ctx.rest = known, sums, kept
        return loss

    @staticmethod
    @_of_values
    def backward(ctx: Any, grad_loss: Any) -> Any:
        arrays = ctx.saved_tensors
        known, sums, kept = ctx.rest
        if torch.is_grad_enabled() or _transforms_active() or forward_ad._current_level >= 0:
            grad = _Grad.call(grad_loss, None, *arrays, known.plan.options, known.plan.reduction)
        elif kept is not None:  # good for one gradient: it becomes that
            ctx.rest = known, sums, None
            # a float32 on the CPU, read in half the time of item()
            one = ctypes.c_float.from_address(grad_loss.data_ptr()).value == 1
            grad = kept if one else kept.mul_(grad_loss)
        else:
            grad = known.backward(arrays, grad_loss, sums)
        return None, grad, None, None, None, None


_Eager.run = super(torch.autograd.Function, _Eager).apply


class _Loss(_Function):
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
        space = _arrays.of_torch(logits)
        keep = keep and logits.dtype == torch.float32 and not options.region and reduction < 2
        memory = space.empty_like(logits) if keep else None
        arrays = (logits, target, weight, mask, class_weight)
        loss, sums, kept = losses.forward(space, arrays, options, reduction, memory)
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
        if kept is not None and not torch.is_grad_enabled() and not _transforms_active():
            space = _arrays.of_torch(arrays[0])
            grad = losses.backward(space, arrays, ctx.options, ctx.reduction, grad_loss, sums, kept, True)
        else:
            grad = _Grad.call(grad_loss, sums, *arrays, ctx.options, ctx.reduction)
        return grad, *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, logits_dot: Any, *_: Any) -> Any:
        loss_dot = None
        if logits_dot is not None:
            loss_dot = _Tangent.call(logits_dot, *ctx.saved_tensors, ctx.options, ctx.reduction)
        return loss_dot, None, None

    vmap = _by_slices(lambda *args: _Loss.call(*args))


class _Grad(_Function):
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
        space, arrays = _arrays.of_torch(logits), (logits, target, weight, mask, class_weight)
        if sums is None:
            sums = losses.forward(space, arrays, options, reduction)[1]
        return losses.backward(space, arrays, options, reduction, grad_loss, sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        grad_loss, _, *arrays, ctx.options, ctx.reduction = inputs
        ctx.save_for_backward(grad_loss, *arrays)
        ctx.save_for_forward(grad_loss, *arrays)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        if u is None:
            return (None,) * 9
        grad_loss, *arrays = ctx.saved_tensors
        rest = (*arrays, ctx.options, ctx.reduction)
        by_grad_loss = _Tangent.call(u, *rest) if ctx.needs_input_grad[0] else None
        return by_grad_loss, None, _GradTangent.call(grad_loss, None, u, *rest), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, grad_loss_dot: Any, _: Any, logits_dot: Any, *__: Any) -> Any:
        grad_loss, arrays = ctx.saved_tensors[0], ctx.saved_tensors[1:]
        if logits_dot is None:
            logits_dot = torch.zeros_like(arrays[0])
        return _GradTangent.call(grad_loss, grad_loss_dot, logits_dot, *arrays, ctx.options, ctx.reduction)

    vmap = _by_slices(lambda *args: _Grad.call(*args))


class _Tangent(_Function):
    """The loss's derivative along logits_dot."""

    @staticmethod
    def forward(logits_dot: Any, *arguments: Any) -> Any:
        arrays, (options, reduction) = arguments[:5], arguments[5:]
        space = _arrays.of_torch(arrays[0])
        return losses.tangent(space, arrays, options, reduction, logits_dot)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.options, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Any) -> Any:
        if grad_loss is None:
            return (None,) * 8
        logits_dot, *arrays = ctx.saved_tensors
        rest = (*arrays, ctx.options, ctx.reduction)
        by_logits = _GradTangent.call(grad_loss, None, logits_dot, *rest) if ctx.needs_input_grad[1] else None
        return _Grad.call(grad_loss, None, *rest), by_logits, *(None,) * 6

    vmap = _by_slices(lambda *args: _Tangent.call(*args))


class _GradTangent(_Function):
    """The gradient's derivative along (grad_loss_dot, logits_dot)."""

    @staticmethod
    def forward(grad_loss: Any, grad_loss_dot: Any, logits_dot: Any, *arguments: Any) -> Any:
        arrays, (options, reduction) = arguments[:5], arguments[5:]
        space = _arrays.of(logits=arrays[0], logits_dot=logits_dot)
        _, sums = losses.tangent(space, arrays, options, reduction, logits_dot)
        dots = (logits_dot, grad_loss, grad_loss_dot, sums)
        return losses.backward_tangent(space, arrays, options, reduction, *dots)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        raise RuntimeError("noisyseg_fast losses have first and second derivatives, no third ones")

    vmap = _by_slices(lambda *args: _GradTangent.call(*args))


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
    return losses.forward(_arrays.of(logits=logits), arrays, _options(options), reduction)[:2]


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
        _arrays.of(logits=logits), arrays, _options(options), reduction, grad_loss, sums
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

losses.eager = sys.modules[__name__]
