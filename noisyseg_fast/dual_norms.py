"""Normalisation and activation in one step, with their tangent: y = act(norm(x) * weight + bias).

In forward-mode passes (`noisyseg_fast.meta`, `torch.autograd.forward_ad`) PyTorch composes the tangent of a norm and
its activation from some twenty operations over whole feature maps. Here value and tangent come from one kernel: both
inputs are read once for the statistics and once more for the results. `fuse_dual_norms(net)` puts it into a network;
`norm_act` is the function.

Which computations are fused: the plain forward pass; the forward and backward pass of ordinary training (what is kept
for it: x and four numbers a channel); forward mode by `torch.autograd.forward_ad` while no gradient is recorded, in
one kernel; `torch.func.jvp`, in two. All others are right too, by torch's own operations (`reference.norm_act`):
second derivatives (`create_graph=True`), batched gradients, forward over reverse, `torch.func.grad`, `vjp` and
`vmap`, `torch.compile`, scripting and tracing, running statistics of instance norm in training, tensor subclasses,
and devices and dtypes that the kernels do not know. Under autocast the result has x's dtype, where torch's group norm
on CUDA gives float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import _arrays, _core, reference
from ._autograd import _Function, _of_values

Tensor = torch.Tensor

_NORMS = ("batch", "instance", "group")
_FLOATS = frozenset(getattr(torch, name) for name in _arrays.FLOATS)
_transforms_active = torch._C._are_functorch_transforms_active


def _wrapped(t: Tensor) -> bool:
    """Whether a transform holds t: of torch.func, or of is_grads_batched."""
    of = torch._C._functorch
    return of.is_functorch_wrapped_tensor(t) or of.is_legacy_batchedtensor(t)


def norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "batch",
    groups: int = 1,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float | Tensor = 1.0,
) -> Any:
    """act(norm(x) * weight + bias), x (B, C, *S) floating, contiguous or channels_last (other strides are copied).

    norm: "batch", "instance" or "group" (of `groups` groups); the arguments up to eps as those of torch's batch_norm,
    instance_norm and group_norm, which also say what running_mean and running_var are for. slope: of the activation
    for negative inputs: 1 no activation, 0 ReLU, another number leaky ReLU, a tensor (C,) or (1,) PReLU. float16 and
    bfloat16 are computed in float32; weight, bias, slope and running statistics may be float32 all the same.
    Differentiable with respect to x, weight, bias and slope as the module's text says.

    Raises TypeError for a wrong kind or dtype, ValueError for shapes and options, and what torch raises where there
    is but one value to take statistics of.

    Extra memory: 4 bytes per number of a float32 x, the result's: as much as x.

    >>> y = norm_act(x, bn.weight, bn.bias, slope=0.0)   # batch norm with the batch's statistics, then ReLU
    """
    tensors = (x, weight, bias, slope if isinstance(slope, Tensor) else None)
    _check(tensors, norm, groups, running_mean, running_var, training, momentum, eps, slope)
    options = _Options(norm, groups, running_mean, running_var, training, momentum, eps, slope)
    if not options.kernels_know(tensors):
        return options.composed(*tensors)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if _transforms_active():
        stack = torch._C._functorch.get_interpreter_stack()
        alone = stack is not None and len(stack) == 1
        if not alone or stack[0].key() != torch._C._functorch.TransformType.Jvp or gradient:
            return options.composed(*tensors)
        return _Norm.call(*tensors, options)[0]
    if forward_ad._current_level >= 0:
        duals = [(t, None) if t is None else tuple(forward_ad.unpack_dual(t)) for t in tensors]
        if any(dot is not None for _, dot in duals):
            if gradient:
                return options.composed(*tensors)
            y, y_dot, _ = options.forward([p for p, _ in duals], [dot for _, dot in duals])
            return forward_ad.make_dual(y, y_dot)
    if gradient:
        return _Trained.run(options, *tensors)
    return options.forward(tensors)[0]


def _check(
    tensors: tuple[Tensor | None, ...],
    norm: str,
    groups: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    slope: Any,
) -> None:
    x = tensors[0]
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch tensor, not {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"x must be (B, C, *S), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating, got {x.dtype}")
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
    channels = x.shape[1]
    if norm == "group" and (groups < 1 or channels % groups != 0):
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    named = {
        "weight": tensors[1],
        "bias": tensors[2],
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, v in named.items():
        if v is not None and tuple(v.shape) != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(v.shape)}; x has {channels} channels: pass ({channels},)"
            )
    if tensors[3] is not None and tuple(tensors[3].shape) not in ((channels,), (1,)):
        raise ValueError(f"slope has shape {tuple(tensors[3].shape)}; pass (1,) or ({channels},)")
    if tensors[3] is None and not isinstance(slope, (int, float)):
        raise TypeError(f"slope must be a number or a tensor, not {type(slope).__name__}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("pass running_mean and running_var both or neither")
    if norm != "group" and not training and running_mean is None:
        raise ValueError("training=False needs running_mean and running_var")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    size = list(x.shape)
    if norm == "batch" and training:
        F._verify_batch_size(x.shape)  # type: ignore[attr-defined]
    elif norm == "instance" and training:
        F._verify_spatial_size(x.shape)  # type: ignore[attr-defined]
    elif norm == "group":
        F._verify_batch_size([size[0] * channels // groups, groups, *size[2:]])  # type: ignore[attr-defined]


def _plain(*tensors: Any) -> bool:
    """Whether the kernels may take these: no transform, no tangent, no gradient to be recorded through them."""
    grad, level = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for t in tensors:
        if t is None:
            continue
        if _wrapped(t) or (grad and t.requires_grad):
            return False
        if level and forward_ad.unpack_dual(t).tangent is not None:
            return False
    return True


class _Options:
    """What norm_act was asked for, and its kernels' calls."""

    def __init__(
        self,
        norm: str,
        groups: int,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        slope: Any,
    ) -> None:
        self.norm, self.groups, self.training, self.momentum, self.eps = norm, groups, training, momentum, eps
        self.running = (running_mean, running_var) if norm != "group" else (None, None)
        self.slope = 1.0 if isinstance(slope, Tensor) else float(slope)

    def kernels_know(self, tensors: tuple[Tensor | None, ...]) -> bool:
        x, buffers = tensors[0], [v for v in self.running if v is not None]
        jit: Any = torch.jit
        if torch.compiler.is_compiling() or jit.is_scripting() or jit.is_tracing():
            return False
        if self.norm == "instance" and self.training and buffers:  # averages over the batch, in torch alone
            return False
        return (
            x is not None
            and x.dim() <= _arrays.MAX_RANK
            and x.device.type in ("cpu", "cuda")
            and x.numel() > 0
            and all(
                t.device == x.device and t.dtype in _FLOATS and t.layout is torch.strided
                for t in tensors
                if t is not None
            )
            and all(v.device == x.device and v.dtype in (torch.float32, torch.float64) for v in buffers)
            and not any(_wrapped(v) for v in buffers)
            and (x.device.type == "cpu" or _core.build_info()["cuda"] is not None)
            and all(type(t) in (Tensor, nn.Parameter) for t in tensors if t is not None)
        )

    def composed(self, x: Any, weight: Any, bias: Any, slope: Any, update: bool = True) -> Any:
        """By torch's operations. update=False leaves the running statistics alone."""
        mean, var = self.running if update or not self.training else (None, None)
        return reference.norm_act(
            x,
            weight,
            bias,
            norm=self.norm,
            groups=self.groups,
            running_mean=mean,
            running_var=var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            slope=self.slope if slope is None else slope.to(x.dtype),
        )

    @property
    def given(self) -> bool:
        return self.norm != "group" and not self.training

    def _numbers(self, channels: int) -> tuple[float, ...]:
        over_batch = self.norm == "batch" or self.given
        groups = channels if self.norm == "instance" else self.groups
        return (float(over_batch), float(groups), float(self.given), self.momentum, self.eps, self.slope)

    def _statistics(self, x: Tensor) -> int:
        if self.norm == "batch" or self.given:
            return x.shape[1]
        return x.shape[0] * (x.shape[1] if self.norm == "instance" else self.groups)

    def forward(self, tensors: Any, dots: Any = None, *, value: bool = True, update: bool = True) -> Any:
        """(y, y_dot, stats) of plain tensors; dots: their directions, None where there is none."""
        dual = dots is not None
        x, layout = _dense(tensors[0].detach().resolve_neg())
        parameters = [None if t is None else t.detach().resolve_neg() for t in tensors[1:]]
        directions = [
            None if d is None or d._is_zerotensor() else d.detach().resolve_neg() for d in dots or (None,) * 4
        ]
        x_dot = directions[0]
        if x_dot is not None:
            x_dot = x_dot.to(x.dtype).resolve_neg().contiguous(memory_format=layout)
        space = _arrays.of(x=x)
        view = _view(space)
        mean, var = self.running if self.given or (update and self.training) else (None, None)
        pairs = zip(parameters, directions[1:], strict=True)
        arrays = (view(x), view(x_dot), *(view(t) for pair in pairs for t in pair), view(mean), view(var))
        numbers = self._numbers(x.shape[1])
        stats = torch.empty((self._statistics(x), 4), dtype=torch.float64, device=x.device)
        memory = _workspace(space, arrays, numbers)
        y = space.empty_like(x) if value else None
        y_dot = space.empty_like(x) if dual else None
        views = (view(y), view(y_dot), view(stats))
        _core.norm_forward(arrays, numbers, *views, 0 if memory is None else memory.data_ptr(), space.exec)
        if mean is not None and not self.given and not mean.is_inference():
            torch.autograd.graph.increment_version([v for v in (mean, var) if v is not None])
        return y, y_dot, stats

    def backward(self, tensors: Any, stats: Tensor, grad_y: Tensor, needed: Any) -> tuple[Tensor | None, ...]:
        x, layout = _dense(tensors[0].detach().resolve_neg())
        parameters: list[Any] = [None if t is None else t.detach().resolve_neg() for t in tensors[1:]]
        grad_y = grad_y.detach().to(x.dtype).resolve_neg().contiguous(memory_format=layout)
        space = _arrays.of(x=x)
        view = _view(space)
        weight, bias, slope = parameters
        arrays = (view(x), None, view(weight), None, view(bias), None, view(slope), None, None, None)
        numbers = self._numbers(x.shape[1])
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        grad_x = space.empty_like(x) if needed[0] else None
        grads = [
            torch.empty(t.shape, dtype=wide, device=x.device) if t is not None and need else None
            for t, need in zip(parameters, needed[1:], strict=False)
        ]
        memory = _workspace(space, arrays, numbers)
        views = (view(stats), view(grad_x), *map(view, grads))
        address = 0 if memory is None else memory.data_ptr()
        _core.norm_backward(arrays, numbers, view(grad_y), *views, address, space.exec)
        return grad_x, *(None if g is None else g.to(t.dtype) for g, t in zip(grads, parameters, strict=True))


def _dense(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """x, contiguous or channels_last, and which; a copy where it is neither."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = layouts.get(x.dim(), torch.contiguous_format)
    if x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        return x.contiguous(), torch.contiguous_format
    return x, layout


def _view(space: _arrays.Namespace) -> Callable[[Tensor | None], Any]:
    return lambda t: None if t is None else space.view(t)


def _workspace(space: Any, arrays: Any, numbers: Any) -> Any:
    """None on the CPU, where the compiled module takes what it needs."""
    if space.device < 0:
        return None
    return space.empty((_core.norm_workspace(arrays, numbers, space.exec),), "uint8")


def _pulled_back(options: _Options, tensors: Any, stats: Tensor, grad_y: Tensor, needed: Any) -> Any:
    """The gradients with respect to four tensors, None where none is needed."""
    if _plain(grad_y, *tensors):
        return options.backward(tensors, stats, grad_y, needed)
    wanted = [i for i in range(4) if needed[i]]

    def value(*chosen: Any) -> Any:
        x, weight, bias, slope = (chosen[wanted.index(i)] if i in wanted else tensors[i] for i in range(4))
        return options.composed(x, weight, bias, slope, update=False)

    pulled: Any = torch.func.vjp(value, *(tensors[i] for i in wanted))
    grads = dict(zip(wanted, pulled[1](grad_y), strict=True))
    return tuple(grads.get(i) for i in range(4))


class _Trained(torch.autograd.Function):
    """y where neither torch.func nor forward mode is active: `_Norm` with half of its Python."""

    run: Any  # apply, without the layer of Python that looks for torch.func

    @staticmethod
    def forward(ctx: Any, options: _Options, *tensors: Any) -> Any:
        y, _, ctx.stats = options.forward(tensors)
        ctx.options = options
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    @_of_values
    def backward(ctx: Any, grad_y: Any) -> Any:
        return None, *_pulled_back(
            ctx.options, ctx.saved_tensors, ctx.stats, grad_y, ctx.needs_input_grad[1:]
        )


_Trained.run = super(torch.autograd.Function, _Trained).apply


class _Norm(_Function):
    """(y, stats) of x, weight, bias, slope, under torch.func."""

    @staticmethod
    def forward(x: Any, weight: Any, bias: Any, slope: Any, options: _Options) -> Any:
        y, _, stats = options.forward((x, weight, bias, slope))
        return y, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Any, _: Any) -> Any:
        if grad_y is None:
            return (None,) * 5
        *tensors, stats = ctx.saved_tensors
        return *_pulled_back(ctx.options, tensors, stats, grad_y, ctx.needs_input_grad[:4]), None

    @staticmethod
    def jvp(ctx: Any, x_dot: Any, weight_dot: Any, bias_dot: Any, slope_dot: Any, _: Any) -> Any:
        tensors = ctx.saved_tensors[:4]
        dots = (x_dot, weight_dot, bias_dot, slope_dot)
        if all(d is None for d in dots):
            return None, None
        return _Tangent.call(*tensors, *dots, ctx.options), None


class _Tangent(_Function):
    """y_dot of four tensors and their directions: a Function, so that torch.func unwraps them."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, options = arguments
        return options.forward(tensors[:4], tensors[4:], value=False, update=False)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


# ---- in a network ---------------------------------------------------------------------------------


class FusedActivation(nn.Module):
    """Stands where an activation was that the norm before it now computes; holds its parameter, if it has one."""

    _fused: _Fused

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.__dict__["_fused"] = _Fused(activation)
        self.weight = activation.weight if isinstance(activation, nn.PReLU) else None
        self.training = activation.training

    def slope(self) -> Any:
        of = self._fused.activation
        if isinstance(of, nn.PReLU):
            return self.weight
        return float(of.negative_slope) if isinstance(of, nn.LeakyReLU) else 0.0

    def forward(self, x: Any) -> Any:
        if self._fused.joined():
            return x
        of, slope = self._fused.activation, self.slope()
        if isinstance(of, nn.PReLU):
            return F.prelu(x, slope)
        return F.leaky_relu(x, slope) if isinstance(of, nn.LeakyReLU) else F.relu(x)

    def extra_repr(self) -> str:
        return f"{self._fused.activation} in the norm before"


class _Fused:
    """An activation, the norms that compute it, and the dropouts between."""

    def __init__(self, activation: Any) -> None:
        self.activation = activation
        self.norms: list[Any] = []
        self.between: list[Any] = []

    def joined(self) -> bool:
        """Not while a dropout between them drops, or somebody's hook wants to see the norm's own output."""
        return not (
            any(d.training and d.p > 0 for d in self.between)
            or any(_hooked(m) for m in (*self.norms, *self.between))
        )


class DualNorm(nn.Module):
    """What fuse_dual_norms makes of a norm: of the same class besides, with the same parameters and buffers."""

    def _apply_norm(self, x: Tensor, **options: Any) -> Any:
        stand_in: Any = self.__dict__.get("_dual_activation", (None,))[0]
        slope = stand_in.slope() if stand_in is not None and stand_in._fused.joined() else 1.0
        return norm_act(x, self.weight, self.bias, eps=self.eps, slope=slope, **options)  # type: ignore[arg-type]


class _DualBatchNorm(DualNorm):
    def forward(self, x: Any) -> Any:
        of: Any = self
        of._check_input_dim(x)
        momentum = 0.0 if of.momentum is None else of.momentum
        if of.training and of.track_running_stats and of.num_batches_tracked is not None:
            of.num_batches_tracked.add_(1)
            if of.momentum is None:
                momentum = 1.0 / float(of.num_batches_tracked)
        use = not of.training or of.track_running_stats
        mean, var = (of.running_mean, of.running_var) if use else (None, None)
        training = of.training or (of.running_mean is None and of.running_var is None)
        return self._apply_norm(x, running_mean=mean, running_var=var, training=training, momentum=momentum)


class _DualInstanceNorm(DualNorm):
    def forward(self, x: Any) -> Any:
        of: Any = self
        of._check_input_dim(x)
        single = x.dim() == of._get_no_batch_dim()
        y = self._apply_norm(
            x.unsqueeze(0) if single else x,
            norm="instance",
            running_mean=of.running_mean,
            running_var=of.running_var,
            training=of.training or not of.track_running_stats,
            momentum=of.momentum if of.momentum is not None else 0.0,
        )
        return y.squeeze(0) if single else y


class _DualGroupNorm(DualNorm):
    def forward(self, x: Any) -> Any:
        return self._apply_norm(x, norm="group", groups=self.num_groups)


class DualBatchNorm1d(_DualBatchNorm, nn.BatchNorm1d):
    pass


class DualBatchNorm2d(_DualBatchNorm, nn.BatchNorm2d):
    pass


class DualBatchNorm3d(_DualBatchNorm, nn.BatchNorm3d):
    pass


class DualInstanceNorm1d(_DualInstanceNorm, nn.InstanceNorm1d):
    pass


class DualInstanceNorm2d(_DualInstanceNorm, nn.InstanceNorm2d):
    pass


class DualInstanceNorm3d(_DualInstanceNorm, nn.InstanceNorm3d):
    pass


class DualGroupNorm(_DualGroupNorm, nn.GroupNorm):
    pass


_DUAL: dict[type, type] = {
    nn.BatchNorm1d: DualBatchNorm1d,
    nn.BatchNorm2d: DualBatchNorm2d,
    nn.BatchNorm3d: DualBatchNorm3d,
    nn.InstanceNorm1d: DualInstanceNorm1d,
    nn.InstanceNorm2d: DualInstanceNorm2d,
    nn.InstanceNorm3d: DualInstanceNorm3d,
    nn.GroupNorm: DualGroupNorm,
}
_PLAIN = {dual: plain for plain, dual in _DUAL.items()}
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

# Blocks whose forward calls every one of the norms with the activation right behind it, and it nowhere else.
_BLOCKS = {
    "monai.networks.blocks.segresnet_block.ResBlock": (("norm1", "norm2"), "act"),
    "monai.networks.blocks.dynunet_block.UnetBasicBlock": (("norm1", "norm2"), "lrelu"),
}


def fuse_dual_norms(net: nn.Module) -> nn.Module:
    """Puts norm_act into net, in place, for its batch, instance and group norms; returns net.

    An activation right behind a norm (ReLU, leaky ReLU, PReLU) is computed with it: neighbours in an nn.Sequential,
    also with dropouts between them (then only while these do nothing), so all of MONAI's ADN blocks (UNet, BasicUNet,
    ...), and the blocks of MONAI's SegResNet and DynUNet (without residuals). Norms without such a neighbour are
    replaced alone.

    Parameters, buffers, the keys of state_dict and isinstance of the norms stay as they are; in an activation's place
    comes a `FusedActivation`. Modules with hooks, subclasses, parametrised and lazy norms, SyncBatchNorm and layer norm
    are left alone, and so is a norm's activation when the norm is used in several places. Calling it again changes
    nothing; `unfuse_dual_norms` takes it back.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be an nn.Module, not {type(net).__name__}")
    modules = list(net.modules())
    uses: dict[nn.Module, int] = {}
    for m in modules:
        for child in m._modules.values():
            if child is not None:
                uses[child] = uses.get(child, 0) + 1
    for m in modules:
        if type(m) in _DUAL and not _hooked(m):
            m.__class__ = _DUAL[type(m)]
    for parent in modules:
        for norms, between, name in _pairs(parent):
            activation = parent._modules[name]
            if all(type(n) in _PLAIN and uses[n] == 1 and not _joined(n) for n in norms) and not any(
                map(_hooked, (*norms, *between, activation))
            ):
                stand_in = FusedActivation(activation)  # type: ignore[arg-type]
                stand_in._fused.norms, stand_in._fused.between = norms, between
                parent._modules[name] = stand_in
                for n in norms:
                    n.__dict__["_dual_activation"] = (stand_in,)
    return net


def unfuse_dual_norms(net: nn.Module) -> nn.Module:
    """Takes fuse_dual_norms back, in place; returns net."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be an nn.Module, not {type(net).__name__}")
    for m in list(net.modules()):
        for name, child in m._modules.items():
            if isinstance(child, FusedActivation):
                activation = child._fused.activation
                if child.weight is not None:
                    activation.weight = child.weight
                m._modules[name] = activation.train(child.training)
        if type(m) in _PLAIN:
            m.__class__ = _PLAIN[type(m)]
            m.__dict__.pop("_dual_activation", None)
    return net


def _joined(norm: nn.Module) -> bool:
    return "_dual_activation" in norm.__dict__


def _hooked(m: Any) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def _pairs(parent: nn.Module) -> list[tuple[list[Any], list[Any], str]]:
    """(norms, dropouts between, name of the activation) among parent's children."""
    found: list[tuple[list[Any], list[Any], str]] = []
    block = _BLOCKS.get(f"{type(parent).__module__}.{type(parent).__qualname__}")
    if block is not None:
        norms = [parent._modules[n] for n in block[0]]
        if type(parent._modules[block[1]]) in _ACTIVATIONS:
            found.append((norms, [], block[1]))
    elif isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
        norm: Any = None
        between: list[Any] = []
        for name, m in parent._modules.items():
            if type(m) in _ACTIVATIONS and norm is not None:
                found.append(([norm], between, name))
                norm = None
            elif type(m) in _DROPOUTS:
                between = [*between, m]
            elif type(m) is not nn.Identity or _hooked(m):
                norm, between = (m if type(m) in _PLAIN else None), []
    return found
