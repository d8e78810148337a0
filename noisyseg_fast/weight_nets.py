"""The pixel work of a per-pixel meta-gradient: cross-entropy with its tangent, and the nets that weigh pixels.

A weight net makes a map of weights R in (0, 1) from a loss map L, both (B, *S). Its hidden activations, which a
composition of convolutions writes to memory and reads back several times, exist a few pixels at a time: forward reads
L and writes R, the vjp reads three maps. Parameters (`theta`) are named tuples of plain arrays.

Maps and parameters are float32 or float64, all alike; any strides. With torch tensors `mask_net` and `mw_net` are
differentiable with respect to theta and L, eagerly and under torch.compile; higher derivatives, forward mode and
torch.func go through plain PyTorch (`noisyseg_fast.reference`, the definitions). With NumPy or CuPy arrays they return
values. The vjp's sums are taken in an order that depends on the shapes alone.

Raises TypeError for wrong dtypes or mixed kinds of arrays, ValueError for shapes, devices and labels out of range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import _arrays, _core
from ._module import Module


class MaskNetTheta(NamedTuple):
    """Of `mask_net`: w3 (K3, 3, 3) or (K3, 3, 3, 3), b3 (K3,), w5 (K5, 5, 5) or (K5, 5, 5, 5), b5 (K5,),
    w1 (K3 + K5 + 1,), b1 (1,)."""

    w3: Any
    b3: Any
    w5: Any
    b5: Any
    w1: Any
    b1: Any


class MWNetTheta(NamedTuple):
    """Of `mw_net`: w1, b1, w2 (H,), b2 (1,)."""

    w1: Any
    b1: Any
    w2: Any
    b2: Any


def ce_dual(z: Any, zdot: Any, y: Any, *, activation: str | None = None) -> tuple[Any, Any]:
    """(L, Ldot): each pixel's cross-entropy and its derivative along zdot, in one pass.

    z, zdot (B, C, *S): logits and their tangent, float16, bfloat16, float32 or float64. y: class numbers (B, *S) or
    (B, 1, *S), uint8 (the cheapest), bool, int32 or int64, or soft labels (B, C, *S). L, Ldot (B, *S), float64 if z
    or zdot is, else float32. activation: "sigmoid" (each channel for itself, L their mean), "softmax", or None:
    sigmoid for one channel, softmax for several. L is `pixel_loss(z, y, reduction="none")`.

    Labels out of range raise ValueError; on CUDA, where looking would mean waiting, such pixels are NaN. Where a
    gradient with respect to z or zdot is asked for, plain PyTorch computes it.

    Extra memory: 8 bytes per pixel, the results' (16 in float64).

    >>> L, Ldot = ce_dual(z, zdot, y)      # z, zdot (16, 2, 64, 64), y (16, 64, 64) uint8
    """
    for name, x in (("z", z), ("zdot", zdot), ("y", y)):
        if x is None:
            raise TypeError(f"{name} must be an array, not None")
    space = _arrays.of(z=z, zdot=zdot, y=y)
    shape = tuple(z.shape)
    if not 2 <= len(shape) <= _arrays.MAX_RANK or shape[1] < 1:
        raise ValueError(f"z must be (B, C, *S) with 2 to {_arrays.MAX_RANK} dimensions, got shape {shape}")
    _arrays.check_dtype("z", space.dtype(z), _arrays.FLOATS)
    _arrays.check_dtype("zdot", space.dtype(zdot), _arrays.FLOATS)
    if tuple(zdot.shape) != shape:
        raise ValueError(f"zdot has shape {tuple(zdot.shape)}; it must be {shape}, as z")
    if activation is None:
        activation = "softmax" if shape[1] > 1 else "sigmoid"
    if activation not in ("sigmoid", "softmax"):
        raise ValueError(f"activation must be sigmoid, softmax or None, got {activation!r}")
    if activation == "softmax" and shape[1] == 1:
        raise ValueError("activation 'softmax' over one channel is constant; use activation='sigmoid'")
    pixels, given = (shape[0], *shape[2:]), tuple(y.shape)
    labels = space.dtype(y) in _arrays.LABELS
    if given == (shape[0], 1, *shape[2:]) and labels:
        y, given = y[:, 0], pixels
    if given == pixels and not labels:
        raise TypeError(
            f"y has dtype {space.dtype(y)} for class numbers of shape {given}; "
            f"use one of {', '.join(_arrays.LABELS)}, or soft labels of shape {shape}"
        )
    if given not in (pixels, shape):
        raise ValueError(f"y has shape {given}; for z of shape {shape} it must be {pixels} or {shape}")
    softmax = activation == "softmax"
    if space.name == "torch":
        from . import _net_autograd

        both: tuple[Any, Any] = _net_autograd.ce_dual(z, zdot, y, softmax)
        return both
    loss, loss_dot = ce_values(space, z, zdot, y, softmax)
    return space.back(loss), space.back(loss_dot)


def mask_net(L: Any, theta: MaskNetTheta | Sequence[Any]) -> Any:
    """R = sigmoid(w1 . [relu(conv3(L) + b3), relu(conv5(L) + b5), L] + b1): MCPM's weight map, its sec. 3.2.

    L (B, H, W) or (B, D, H, W); `theta`: `MaskNetTheta`, of as many spatial axes; R as L. The convolutions are those
    of PyTorch (cross-correlations), zeros around L. What the paper leaves open (widths, activations, biases) is
    METHODS.md's choice: 16 channels each, ReLU, sigmoid. L is detached in MCPM: pass `L.detach()`.

    Extra memory: 4 bytes per pixel, the result's (8 in float64).
    """
    return _net("mask_net", L, theta)


def mask_net_vjp(
    dR: Any, R: Any, L: Any, theta: MaskNetTheta | Sequence[Any], *, attached: bool = False
) -> Any:
    """dtheta = (dR/dtheta)^T dR, a `MaskNetTheta`, for R = mask_net(L, theta); outside autograd.

    dR, R and L (B, *S) alike. attached=True gives (dtheta, dL).

    Extra memory: 12 bytes per pixel of 2D float32 maps with attached=True (the result's and sums by tiles), 0 without.
    """
    return _net_vjp("mask_net", dR, R, L, theta, attached)


def mw_net(L: Any, theta: MWNetTheta | Sequence[Any]) -> Any:
    """R = sigmoid(w2 . relu(w1 L + b1) + b2), for each number: Meta-Weight-Net (Shu et al. 2019), pixel-wise.

    L: any shape of 1 to 6 axes, a loss map (B, *S) or the images' losses (B,); theta: `MWNetTheta`, H up to 1024.
    Before the sigmoid such a function of one number is piecewise linear. On the CPU it is evaluated so: the segments
    are found by table, at a cost that does not grow with H, and the vjp needs only each segment's sums of s and s L,
    s = dR R (1 - R). The same numbers but for the order of additions.

    Extra memory: 4 bytes per pixel, the result's (8 in float64).
    """
    return _net("mw_net", L, theta)


def mw_net_vjp(dR: Any, R: Any, L: Any, theta: MWNetTheta | Sequence[Any], *, attached: bool = False) -> Any:
    """dtheta, a `MWNetTheta`, for R = mw_net(L, theta); attached=True gives (dtheta, dL). Outside autograd.

    Extra memory: 0 bytes per pixel, with attached=True as much as L.
    """
    return _net_vjp("mw_net", dR, R, L, theta, attached)


class MaskNet(Module):
    """`mask_net` with its parameters, those of `MaskNetTheta`, initialised as PyTorch's convolutions.

    width: channels of the two convolutions, one number or (K3, K5).

    >>> net = MaskNet(spatial_dims=2)
    >>> R = net(L.detach())                # (B, H, W) float32
    """

    w3: Any
    b3: Any
    w5: Any
    b5: Any
    w1: Any
    b1: Any

    def __init__(self, spatial_dims: int = 2, width: int | tuple[int, int] = 16) -> None:
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
        widths = (width, width) if isinstance(width, int) else tuple(width)
        if len(widths) != 2 or not all(isinstance(k, int) and k > 0 for k in widths):
            raise ValueError(f"width must be a positive integer or two of them, got {width!r}")
        _need_torch()
        super().__init__()
        k3, k5 = widths
        self.spatial_dims, self.widths = spatial_dims, (k3, k5)
        _add_parameters(
            self,
            {
                "w3": (k3, *[3] * spatial_dims),
                "b3": (k3,),
                "w5": (k5, *[5] * spatial_dims),
                "b5": (k5,),
                "w1": (k3 + k5 + 1,),
                "b1": (1,),
            },
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fans = (3**self.spatial_dims, 5**self.spatial_dims, sum(self.widths) + 1)
        _uniform(self.theta, [fan for fan in fans for _ in range(2)])

    @property
    def theta(self) -> MaskNetTheta:
        return MaskNetTheta(self.w3, self.b3, self.w5, self.b5, self.w1, self.b1)

    def forward(self, L: Any) -> Any:
        return mask_net(L, self.theta)

    def extra_repr(self) -> str:
        return f"spatial_dims={self.spatial_dims}, width={self.widths}"


class MWNet(Module):
    """`mw_net` with its parameters, those of `MWNetTheta`, initialised as PyTorch's linear layers.

    >>> R = MWNet()(L.detach())
    """

    w1: Any
    b1: Any
    w2: Any
    b2: Any

    def __init__(self, hidden: int = 100) -> None:
        if not isinstance(hidden, int) or not 1 <= hidden <= MOST_HIDDEN:
            raise ValueError(f"hidden must be an integer in 1..{MOST_HIDDEN}, got {hidden!r}")
        _need_torch()
        super().__init__()
        _add_parameters(self, {"w1": (hidden,), "b1": (hidden,), "w2": (hidden,), "b2": (1,)})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _uniform(self.theta, [1, 1, len(self.w1), len(self.w1)])

    @property
    def theta(self) -> MWNetTheta:
        return MWNetTheta(self.w1, self.b1, self.w2, self.b2)

    def forward(self, L: Any) -> Any:
        return mw_net(L, self.theta)

    def extra_repr(self) -> str:
        return f"hidden={len(self.w1)}"


def _need_torch() -> None:
    if Module is object:
        raise ImportError("the modules need torch: pip install 'noisyseg-fast[torch]'")


def _add_parameters(module: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    for name, shape in shapes.items():
        module.register_parameter(name, torch.nn.Parameter(torch.empty(shape)))


def _uniform(theta: Sequence[Any], fans: Sequence[int]) -> None:
    """U(-1, 1) / sqrt(fan_in), weights and biases, as torch.nn.Conv2d and Linear."""
    import torch

    with torch.no_grad():
        for x, fan in zip(theta, fans, strict=True):
            x.uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan))


# ---- checks ---------------------------------------------------------------------------------------

MOST_HIDDEN = 1024  # most_hidden in meta.h
TYPES: dict[str, Any] = {"mask_net": MaskNetTheta, "mw_net": MWNetTheta}
_WIDE = ("float32", "float64")


def _checked(
    kind: str, maps: dict[str, Any], theta: Sequence[Any]
) -> tuple[_arrays.Namespace, tuple[Any, ...]]:
    """The namespace and theta, contiguous. maps: name -> array, L the last."""
    type_ = TYPES[kind]
    for name, x in maps.items():
        if x is None:
            raise TypeError(f"{name} must be an array, not None")
    if not isinstance(theta, (tuple, list)) or len(theta) != len(type_._fields):
        raise TypeError(
            f"theta must be a {type_.__name__} or {len(type_._fields)} arrays, got {type(theta).__name__}"
        )
    named = dict(zip((f"theta.{f}" for f in type_._fields), theta, strict=True))
    for name, x in named.items():
        if x is None:
            raise TypeError(f"{name} must be an array, not None")
    space = _arrays.of(**maps, **named)
    L = maps["L"]
    shape, dtype = tuple(L.shape), space.dtype(L)
    _arrays.check_dtype("L", dtype, _WIDE)
    for name, x in (*maps.items(), *named.items()):
        if space.dtype(x) != dtype:
            raise TypeError(f"{name} has dtype {space.dtype(x)}; it must be {dtype}, as L")
    for name, x in maps.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}, as L")
    given = [tuple(x.shape) for x in theta]
    if kind == "mask_net":
        dims = len(given[0]) - 1
        k3, k5 = given[0][:1], given[2][:1]
        if dims not in (2, 3) or not k3 or k3[0] < 1:
            raise ValueError(f"theta.w3 must be (K, 3, 3) or (K, 3, 3, 3), got shape {given[0]}")
        if not k5 or k5[0] < 1:
            raise ValueError(f"theta.w5 must be (K, 5, 5) or (K, 5, 5, 5), got shape {given[2]}")
        wanted = [(*k3, *[3] * dims), k3, (*k5, *[5] * dims), k5, (k3[0] + k5[0] + 1,), (1,)]
        if len(shape) != dims + 1:
            raise ValueError(
                f"L has shape {shape}; with {dims}-dimensional theta.w3 it must be (B, {'DHW'[-dims:]})"
            )
    else:
        hidden = given[0][0] if len(given[0]) == 1 else 0
        if not 1 <= hidden <= MOST_HIDDEN:
            raise ValueError(f"theta.w1 must be (H,) with H in 1..{MOST_HIDDEN}, got shape {given[0]}")
        wanted = [(hidden,)] * 3 + [(1,)]
        if not 1 <= len(shape) <= _arrays.MAX_RANK - 2:
            raise ValueError(f"L must have 1 to {_arrays.MAX_RANK - 2} axes, got shape {shape}")
    for name, a, b in zip(named, given, wanted, strict=True):
        if a != b:
            raise ValueError(f"{name} has shape {a}; it must be {b}")
    return space, tuple(_contiguous(space, x) for x in theta)


def _contiguous(space: _arrays.Namespace, x: Any) -> Any:
    if space.name == "torch":
        return x.contiguous()
    _, _, shape, strides = space.view(x)
    step = 1
    for n, s in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and s != step:
            copy = space.empty(shape, space.dtype(x))
            copy[...] = x
            return copy
        step *= n
    return x


# ---- calls of the compiled module -----------------------------------------------------------------


def _net(kind: str, L: Any, theta: Any) -> Any:
    space, arrays = _checked(kind, {"L": L}, theta)
    if space.name == "torch":
        from . import _net_autograd

        return _net_autograd.net(kind, L, arrays)
    return space.back(forward(kind, space, L, arrays))


def _net_vjp(kind: str, dR: Any, R: Any, L: Any, theta: Any, attached: bool) -> Any:
    space, arrays = _checked(kind, {"dR": dR, "R": R, "L": L}, theta)
    if space.name == "torch":
        from . import _net_autograd

        packed, dL = _net_autograd.vjp(kind, dR, R, L, arrays, bool(attached))
    else:
        packed, dL = vjp(kind, space, dR, R, L, arrays, bool(attached))
    dtheta = TYPES[kind](*(space.back(x) for x in parts(packed, arrays)))
    return (dtheta, space.back(dL)) if attached else dtheta


def parts(packed: Any, theta: Sequence[Any]) -> list[Any]:
    """A packed gradient as views in the shapes of theta."""
    result, at = [], 0
    for x in theta:
        size = math.prod(x.shape)
        result.append(packed[at : at + size].reshape(tuple(x.shape)))
        at += size
    return result


def size(theta: Sequence[Any]) -> int:
    return sum(math.prod(x.shape) for x in theta)


def _map(kind: str, space: _arrays.Namespace, x: Any) -> _arrays.View:
    """(B, *S) as the kernels of this kind take it."""
    view = space.view(x)
    if kind == "mask_net":
        return view
    address, code, shape, strides = view
    if len(shape) == 1:
        return address, code, (1, 1, *shape), (0, 0, *strides)
    return address, code, (shape[0], 1, *shape[1:]), (strides[0], 0, *strides[1:])


def _workspace(
    kind: str, space: _arrays.Namespace, L: _arrays.View, theta: Any, *attached: bool
) -> tuple[Any, int]:
    memory = space.empty(
        (getattr(_core, f"{kind}_workspace")(L, theta, *attached, space.exec) // 8,), "float64"
    )
    return memory, space.view(memory)[0]


def forward(kind: str, space: _arrays.Namespace, L: Any, theta: Sequence[Any]) -> Any:
    R = space.empty(tuple(L.shape), space.dtype(L))
    view, views = _map(kind, space, L), tuple(space.view(x) for x in theta)
    if kind == "mask_net":
        _core.mask_net(view, views, space.view(R), space.exec)
    else:
        memory, address = _workspace(kind, space, view, views)
        _core.mw_net(view, views, _map(kind, space, R), address, space.exec)
        del memory
    return R


def vjp(
    kind: str, space: _arrays.Namespace, dR: Any, R: Any, L: Any, theta: Sequence[Any], attached: bool
) -> tuple[Any, Any]:
    """(dtheta packed into one array, dL or None)."""
    dtype = space.dtype(L)
    packed = space.empty((size(theta),), dtype)
    dL = space.empty(tuple(L.shape), dtype) if attached else None
    views = tuple(space.view(x) for x in theta)
    maps = [_map(kind, space, x) for x in (dR, R, L)]
    memory, address = _workspace(kind, space, maps[2], views, *([attached] if kind == "mask_net" else []))
    getattr(_core, f"{kind}_vjp")(
        *maps,
        views,
        space.view(packed),
        None if dL is None else _map(kind, space, dL),
        address,
        space.exec,
    )
    del memory
    return packed, dL


def ce_values(space: _arrays.Namespace, z: Any, zdot: Any, y: Any, softmax: bool) -> tuple[Any, Any]:
    dtype = "float64" if "float64" in (space.dtype(z), space.dtype(zdot)) else "float32"
    shape = (z.shape[0], *z.shape[2:])
    loss, loss_dot = space.empty(shape, dtype), space.empty(shape, dtype)
    good = _core.ce_dual(
        *(space.view(x) for x in (z, zdot, y)), softmax, space.view(loss), space.view(loss_dot), space.exec
    )
    if not good:
        raise ValueError(
            f"y holds a label outside 0..{max(int(z.shape[1]) - 1, 1)}, the classes that z has channels for"
        )
    return loss, loss_dot
