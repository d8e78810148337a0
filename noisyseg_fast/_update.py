"""One step of an optimizer as a pure function, and its derivative: the virtual steps of `meta`.

The formulas are torch.optim's, of one tensor at a time. All are elementwise but for clipping, so that the derivative
of the new parameters in the gradients is a diagonal (`_slope`), cheaper than reverse mode through the step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

Tensor = torch.Tensor
Tensors = dict[str, Tensor]
State = dict[str, Any]


def _sgd(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> tuple[Tensor, State]:
    g = -g if h["maximize"] else g
    if h["weight_decay"]:
        g = g + h["weight_decay"] * p
    if h["momentum"]:
        old = s.get("momentum_buffer")
        buffer = g if old is None else h["momentum"] * old + (1 - h["dampening"]) * g
        s = {"momentum_buffer": buffer}
        g = g + h["momentum"] * buffer if h["nesterov"] else buffer
    return p - h["lr"] * g, s


def _sgd_slope(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> Any:
    slope = -h["lr"] * (-1 if h["maximize"] else 1)
    if h["momentum"]:
        k = 1 if s.get("momentum_buffer") is None else 1 - h["dampening"]
        slope = slope * (1 + h["momentum"] * k if h["nesterov"] else k)
    return slope


def _adam(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> tuple[Tensor, State]:
    g = -g if h["maximize"] else g
    if h["weight_decay"] and h["decoupled"]:
        p = p * (1 - h["lr"] * h["weight_decay"])
    elif h["weight_decay"]:
        g = g + h["weight_decay"] * p
    (b1, b2), t = h["betas"], s["step"] + 1
    m = b1 * s["exp_avg"] + (1 - b1) * g
    n = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    new = {"step": t, "exp_avg": m, "exp_avg_sq": n}
    if h["amsgrad"]:
        new["max_exp_avg_sq"] = n = torch.where(s["max_exp_avg_sq"] > n, s["max_exp_avg_sq"], n)
    denominator = _sqrt(n) / (1 - b2**t) ** 0.5 + h["eps"]
    return p - h["lr"] / (1 - b1**t) * m / denominator, new


def _adam_slope(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> Tensor:
    g = -g if h["maximize"] else g
    if h["weight_decay"] and not h["decoupled"]:
        g = g + h["weight_decay"] * p
    (b1, b2), t = h["betas"], s["step"] + 1
    m = b1 * s["exp_avg"] + (1 - b1) * g
    n = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    by_g = (1 - b2) * g
    if h["amsgrad"]:
        old = s["max_exp_avg_sq"]
        by_g, n = torch.where(old > n, torch.zeros_like(by_g), by_g), torch.maximum(old, n)
    root, scale = n.sqrt(), (1 - b2**t) ** 0.5
    denominator = root / scale + h["eps"]
    by_g = _divide(by_g, root) / scale  # of the denominator
    sign = -1 if h["maximize"] else 1
    slope: Tensor = -sign * h["lr"] / (1 - b1**t) * ((1 - b1) - m * by_g / denominator) / denominator
    return slope


def _rmsprop(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> tuple[Tensor, State]:
    g = -g if h["maximize"] else g
    if h["weight_decay"]:
        g = g + h["weight_decay"] * p
    n = h["alpha"] * s["square_avg"] + (1 - h["alpha"]) * g * g
    new = {"square_avg": n}
    if h["centered"]:
        new["grad_avg"] = mean = h["alpha"] * s["grad_avg"] + (1 - h["alpha"]) * g
        n = n - mean * mean
    step = g / (_sqrt(n) + h["eps"])
    if h["momentum"]:
        new["momentum_buffer"] = step = h["momentum"] * s["momentum_buffer"] + step
    return p - h["lr"] * step, new


def _rmsprop_slope(p: Tensor, g: Tensor, s: State, h: Mapping[str, Any]) -> Tensor:
    g = -g if h["maximize"] else g
    if h["weight_decay"]:
        g = g + h["weight_decay"] * p
    n = h["alpha"] * s["square_avg"] + (1 - h["alpha"]) * g * g
    by_g = g
    if h["centered"]:
        mean = h["alpha"] * s["grad_avg"] + (1 - h["alpha"]) * g
        n, by_g = n - mean * mean, g - mean
    root = n.clamp_min(0).sqrt()
    denominator = root + h["eps"]
    by_g = (1 - h["alpha"]) * _divide(by_g, root)
    sign = -1 if h["maximize"] else 1
    slope: Tensor = -sign * h["lr"] * (1 - g * by_g / denominator) / denominator
    return slope


def _sqrt(n: Tensor) -> Tensor:
    """The square root, with slope 0 at 0."""
    positive = n > 0
    return torch.where(positive, torch.where(positive, n, torch.ones_like(n)).sqrt(), torch.zeros_like(n))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return a / torch.where(b > 0, b, torch.full_like(b, math.inf))


_ADAM_STATE = ("exp_avg", "exp_avg_sq")
_RULES: dict[type, tuple[Any, Any, tuple[str, ...]]] = {  # step, its slope in g, what must be in the state
    torch.optim.SGD: (_sgd, _sgd_slope, ()),
    torch.optim.Adam: (_adam, _adam_slope, _ADAM_STATE),
    torch.optim.AdamW: (_adam, _adam_slope, _ADAM_STATE),
    torch.optim.RMSprop: (_rmsprop, _rmsprop_slope, ("square_avg",)),
}
_PLAIN = {"momentum": 0, "dampening": 0, "nesterov": False, "weight_decay": 0, "maximize": False}


class Update:
    """A virtual step. names: the parameters that it moves."""

    def __init__(
        self,
        update: Any,
        named: Mapping[str, Tensor],
        clip: float | None,
        state: Any,
        check_names: bool,
    ) -> None:
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(f"clip_grad_norm must be positive and finite, got {clip}")
        self.clip, self.function, self.user_state = clip, None, state
        self.names, self.groups, self.rule = dict(named), {}, _RULES[torch.optim.SGD]
        self.optimizer: Any = None
        while hasattr(update, "optimizer") and type(update) not in _RULES:  # Lightning's wrappers
            update = update.optimizer
        if isinstance(update, (int, float)) and not isinstance(update, bool):
            if not 0 <= update < math.inf:
                raise ValueError(f"update, a learning rate, must be finite and not negative, got {update}")
            self.groups = {n: {"lr": float(update), **_PLAIN} for n in named}
        elif type(update) in _RULES:
            self.optimizer, self.rule = update, _RULES[type(update)]
            group_of = {id(p): group for group in update.param_groups for p in group["params"]}
            missing = [n for n, p in named.items() if id(p) not in group_of]
            if len(missing) == len(named) or (missing and check_names):
                raise ValueError(f"update does not hold the parameter {missing[0]!r}")
            self.names = {n: p for n, p in named.items() if id(p) in group_of}
            self.groups = {n: self._group(group_of[id(p)]) for n, p in self.names.items()}
        elif callable(update) and not isinstance(update, (type, torch.optim.Optimizer)):
            self.function = update
        else:
            known = ", ".join(t.__name__ for t in _RULES)
            got = update.__name__ if isinstance(update, type) else type(update).__name__
            raise TypeError(
                f"update is {got}; it must be a learning rate, one of torch.optim's {known}, or a function "
                "(params, grads, state) -> new params"
            )

    def _group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        settings = {k: v for k, v in group.items() if k != "params"}
        decoupled = isinstance(self.optimizer, torch.optim.AdamW)
        settings["decoupled"] = decoupled or settings.get("decoupled_weight_decay", False)
        return settings

    def states(self) -> Any:
        """The optimizer's state of each parameter, as it is; zeros where it has none yet."""
        if self.function:
            return self.user_state
        if self.optimizer is None:
            return {n: {} for n in self.names}
        states, cold = {}, False
        for n, p in self.names.items():
            own, h = dict(self.optimizer.state.get(p, {})), self.groups[n]
            cold |= any(key not in own for key in self.rule[2])
            wanted = list(self.rule[2])
            wanted += ["max_exp_avg_sq"] if h.get("amsgrad") else []
            if self.rule[0] is _rmsprop:
                wanted += ["grad_avg"] if h["centered"] else []
                wanted += ["momentum_buffer"] if h["momentum"] else []
            for key in wanted:
                if own.get(key) is None:
                    own[key] = torch.zeros_like(p.detach())
            if self.rule[0] is _adam:
                own["step"] = float(own.get("step", 0))
            states[n] = own
        if cold:
            warnings.warn(
                f"{type(self.optimizer).__name__} has no state yet: its first step hardly depends on the size of the "
                "gradient, so the meta-gradient is degenerate; take a few ordinary steps first",
                RuntimeWarning,
                stacklevel=4,
            )
        return states

    def step(self, params: Tensors, grads: Tensors, states: Any) -> tuple[Tensors, Any]:
        """(new params, new states), differentiable; parameters without a gradient stay, as in torch."""
        grads = self._clipped(grads)
        if self.function:
            new = dict(self.function(dict(params), dict(grads), states))
            for n, p in params.items():
                if n not in new or new[n].shape != p.shape:
                    raise ValueError(f"update must give a new {n!r} of shape {tuple(p.shape)}")
            return new, states
        new, after = dict(params), dict(states)
        for n, g in grads.items():
            new[n], after[n] = self.rule[0](params[n], g, states[n], self.groups[n])
        return new, after

    def pull(self, params: Tensors, grads: Tensors, states: Any, v: Tensors) -> Tensors:
        """u = (d new params / d grads)^T v."""
        if self.function:
            return self.pull_all(params, grads, states, v, None)[1]
        clipped = self._clipped(grads)
        u = {n: self.rule[1](params[n], g, states[n], self.groups[n]) * v[n] for n, g in clipped.items()}
        factor, norm = self._clip_factor(grads)
        if factor is None or norm is None:
            return u
        # of c g, c = clip / (norm + 1e-6): c u - c (g . u) g / (norm (norm + 1e-6)) where it clips
        along = sum((g * u[n]).sum() for n, g in grads.items())
        back = torch.where(factor < 1, factor * along / (norm * (norm + 1e-6)), torch.zeros_like(norm))
        return {n: factor * t - back * grads[n] for n, t in u.items()}

    def pull_all(
        self, params: Tensors, grads: Tensors, states: Any, v: Tensors, adjoint: Any
    ) -> tuple[Tensors, Tensors, Any]:
        """(v, u, adjoint) pulled back to the step's params, grads and states; adjoint: of the new states."""
        with torch.enable_grad():
            w = {n: p.detach().requires_grad_() for n, p in params.items()}
            g = {n: t.detach().requires_grad_() for n, t in grads.items()}
            s = states
            if not self.function:
                s = {n: {k: _leaf(t) for k, t in own.items()} for n, own in states.items()}
            new, after = self.step(w, g, s)
            outputs, cotangents = [new[n] for n in v], [v[n] for n in v]
            for n, own in (adjoint or {}).items():
                for k, t in own.items():
                    outputs.append(after[n][k])
                    cotangents.append(t)
            leaves = [] if self.function else [(n, k) for n in s for k, t in s[n].items() if _real(t)]
            inputs = [*w.values(), *g.values(), *(s[n][k] for n, k in leaves)]
            given = torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)
        first, second = given[: len(w)], given[len(w) : len(w) + len(g)]
        below: dict[str, dict[str, Tensor]] = {}
        for (n, k), t in zip(leaves, given[len(w) + len(g) :], strict=True):
            below.setdefault(n, {})[k] = t
        return dict(zip(w, first, strict=True)), dict(zip(g, second, strict=True)), below

    def _clip_factor(self, grads: Tensors) -> tuple[Tensor | None, Tensor | None]:
        if self.clip is None or not grads:
            return None, None
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]))
        return (self.clip / (norm + 1e-6)).clamp_max(1.0), norm

    def _clipped(self, grads: Tensors) -> Tensors:
        factor, _ = self._clip_factor(grads)
        return grads if factor is None else {n: g * factor for n, g in grads.items()}


def _real(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _leaf(t: Any) -> Any:
    return t.detach().requires_grad_() if _real(t) else t
