"""Per-pixel meta-gradients: how the loss on a few clean images would change with the weight of each noisy pixel.

A network W trains on the weighted loss (1/N) sum_i R_i L_i(W); the weights R should be such that the step W -> W'
lowers the loss on clean data. The gradient of that clean loss with respect to every R_i is exactly

    dR_i = (1/N) d/dt L_i(W + t u) at t = 0,   u = (dU/dg)^T v,   v = gradient of the clean loss at W' = U(g),

with U the optimizer's update and g = (1/N) sum_i R_i dL_i/dW: one forward-mode pass over the noisy batch, no
double backward, and the memory of an ordinary training step. `pixel_meta_gradient` does it all; `logit_jvp`,
`ce_dual`, `update_vjp` and `head_hypergradient` are its parts, for loops of one's own; `unroll_reference` is the same
by differentiating through the step, slow and large: the definition.

Needs torch. One iteration of MCPM, with the mask network's optimizer `theta_optimizer`:

>>> meta = pixel_meta_gradient(net, x, y, mask_network, x_clean, y_clean, optimizer, keep_graph=True)
>>> meta.objective.backward(); theta_optimizer.step()            # exact: d clean loss / d Theta
>>> weights = mask_network(meta.loss_map.detach())               # with the new Theta
>>> (weights.detach() * meta.loss_map).mean().backward(); optimizer.step()   # no second forward pass

Notes on the passes
- Buffers (batch norm's running statistics) stay as they are; with keep_graph=True the first pass updates them,
  once, as the ordinary pass that it replaces.
- Dropout draws the same masks in the pass over the training batch and in its forward-mode twin. Afterwards the
  random state is that after one ordinary pass over x.
- Autocast works; torch.inference_mode raises; under torch.no_grad gradients are computed all the same.
- Compiled modules run eagerly here: a dual number around a compiled module loses its tangent.
- Reentrant checkpointing (use_reentrant=True) is silently wrong in forward mode, and so is any op registered with
  torch.library and register_autograd: the self-check finds both. Non-reentrant checkpointing works.
- With torch.distributed initialised, pixels are counted and g, v and the clean loss are summed over all
  processes; the gradients of `objective` are this process's share: sum (not average) them over the processes. Where
  every process has the whole batch already (`training.parallel`), `replicated` is set and nothing is summed.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.stateless import _reparametrize_module

from . import losses
from ._update import Update
from .dual_norms import fuse_dual_norms, unfuse_dual_norms  # noqa: F401  # looked for here
from .weight_nets import (  # noqa: F401  # looked for here
    MaskNet,
    MaskNetTheta,
    MWNet,
    MWNetTheta,
    ce_dual,
    mask_net,
    mask_net_vjp,
    mw_net,
    mw_net_vjp,
)

Tensor = torch.Tensor
Tensors = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

MODES = ("forward", "double_vjp")
replicated: ContextVar[bool] = ContextVar("replicated", default=False)


class _Triple(NamedTuple):
    dR: Any
    loss_map: Any
    meta_loss: Tensor


class MetaGradient(_Triple):
    """(dR, loss_map, meta_loss) and two attributes.

    dR (B, *S): the gradient of meta_loss with respect to R. loss_map (B, *S): L at the current weights; with
    keep_graph=True it carries the graph of the first pass, for the real step. meta_loss (): the clean loss at W'.
    Both are lists for several inner steps. R: the weights. objective: a scalar whose gradient, in whatever R was
    computed from, is the meta-gradient; its value means nothing. None if R carries no graph.
    """

    R: Any = None
    objective: Tensor | None = None


def pixel_meta_gradient(
    net: nn.Module,
    x: Any,
    y: Any,
    R: Any,
    x_clean: Tensor,
    y_clean: Tensor,
    update: Any,
    *,
    loss: Loss | None = None,
    clean_loss: Loss | None = None,
    mode: str = "forward",
    attached: bool = False,
    keep_graph: bool = False,
    params: Sequence[str] | None = None,
    clip_grad_norm: float | None = None,
    divisor: float | None = None,
    state: Any = None,
    self_check: bool = True,
) -> MetaGradient:
    """The gradient of the clean loss after one virtual step with respect to each pixel's weight in that step.

    net: any module, x (B, ...) -> logits (B, C, *S). x, y: the noisy batch and its labels. x_clean, y_clean: the
    clean one. R: weights in the loss map's shape; or a function (loss map) -> R, such as a mask network; or None:
    R = 0 and no virtual step, v taken at the current weights (Ren et al. 2018, Mirikharaji et al. 2019; exact
    where a zero gradient leaves the weights alone, as in plain SGD).
    update: the virtual step: a learning rate (plain SGD); torch.optim.SGD, Adam, AdamW or RMSprop, whose
    hyper-parameters and state are read and never changed; or a differentiable function (params, grads, state) ->
    new params, all dictionaries by the parameters' names, with `state` passed on.

    loss: (logits, y) -> loss map, of any shape that R has, such as (B, *S) or (B,); default: cross-entropy, binary
    for one channel, softmax otherwise. clean_loss: the same, or a scalar, for the clean batch; its mean counts.
    mode: "forward" (forward mode; falls back where a layer has no rule for it) or "double_vjp" (double backward).
    attached: R (a function) is differentiated through the loss map too, in the step and in `objective`.
    keep_graph: loss_map carries the first pass's graph, buffers are updated; costs its activations' memory
    during the whole call, saves the real step's forward pass.
    params: the names of the parameters that the virtual step moves; default: all that require a gradient and are
    in the optimizer. clip_grad_norm: the step clips g to this norm, as torch.nn.utils.clip_grad_norm_ does.
    divisor: N, default the number of pixels. self_check: compare the tangents of each model once with reverse mode.

    x, y (and R, unless a function or None) may be lists of K batches: K inner steps, one for each; dR, loss_map
    and R are lists then. The memory of K copies of the parameters, and a forward-over-reverse pass for each.

    Raises TypeError and ValueError for arguments that do not fit, RuntimeError where a tangent is missing or wrong.
    """
    net = _unwrap(net)
    several = isinstance(x, (list, tuple))
    batches = _batches(x, y, R, several)
    _check_call(net, batches, x_clean, mode, attached)
    names = _names(net, params)
    rule = Update(update, names, clip_grad_norm, state, check_names=params is not None)
    loss = cross_entropy_map if loss is None else loss
    run = _Run(net, loss, mode, attached, divisor, self_check)
    with torch.enable_grad(), _eager(net):
        after: _Random | None = None
        steps, weights, states = [], rule.names, rule.states()
        shortcut = batches[0][2] is None
        for k, batch in enumerate(batches):
            random = _Random(run.device)
            if shortcut and not keep_graph:  # the loss map comes from the forward-mode pass
                step = _Step(batch, weights, {}, states, random, None, None, run.count_pixels(batch))
            else:
                step = run.first_pass(batch, weights, states, random, keep_graph and k == 0)
                after = _Random(run.device) if k == 0 else after
            steps.append(step)
            if not shortcut:
                with torch.no_grad():
                    weights, states = rule.step(weights, step.grads, states)
        v, meta_loss = run.clean_pass(weights, x_clean, y_clean, clean_loss)
        del weights, states
        results: list[tuple[Tensor, Tensor, Any, Tensor | None]] = []
        adjoint: Any = None
        for k in reversed(range(len(steps))):
            step, last = steps.pop(), k == 0
            if shortcut:
                step.grads.update({n: torch.zeros_like(step.weights[n]) for n in v})
            if k == len(batches) - 1 and last:
                u = rule.pull(step.weights, step.grads, step.states, v)
            else:
                v, u, adjoint = rule.pull_all(step.weights, step.grads, step.states, v, adjoint)
            step.random.restore()
            L, L_dot, curved = run.tangent(step, u, curvature=not last)
            if not last:
                v = {n: v[n] + curved[n] if n in curved else v[n] for n in v}
            results.append(run.finish(step, L, L_dot))
        if after is not None:  # otherwise the forward-mode pass was the ordinary one
            after.restore()
    results.reverse()
    dR, maps, made, objectives = (list(column) for column in zip(*results, strict=True))
    known = [o for o in objectives if o is not None]
    if several:
        result = MetaGradient(dR, maps, meta_loss)
        result.R = made
    else:
        result = MetaGradient(dR[0], maps[0], meta_loss)
        result.R = made[0]
    result.objective = sum(known[1:], known[0]) if known else None
    return result


def cross_entropy_map(z: Tensor, y: Tensor) -> Tensor:
    """The default loss map (B, *S): cross-entropy of logits z (B, C, *S), binary for C = 1, softmax otherwise."""
    activation = "sigmoid" if z.ndim > 1 and z.shape[1] == 1 else "softmax"
    loss: Tensor = losses.pixel_loss(z, y, activation=activation, reduction="none")
    return loss


# ---- parts ----------------------------------------------------------------------------------------


def logit_jvp(
    net: nn.Module,
    params: Mapping[str, Tensor] | None,
    buffers: Mapping[str, Tensor] | None,
    x: Tensor,
    u: Mapping[str, Tensor],
    mode: str = "forward",
) -> tuple[Tensor, Tensor]:
    """(z, zdot), each (B, C, *S): the net's output and its derivative along u, with no graph.

    params, buffers: by name, in place of the net's own; None: its own, buffers as copies, so that running
    statistics stay. u: by name; parameters left out do not move. mode="forward": forward mode, or the double-vjp
    trick with a warning, once for each net, where a layer has no rule for it; "double_vjp": always that.
    Raises RuntimeError where the tangent comes back as None.
    """
    _check_mode(mode)
    net = _unwrap(net)
    own = dict(net.named_parameters())
    values = {**own, **(params or {})}
    for name, direction in u.items():
        if name not in values:
            raise ValueError(f"u names {name!r}, which is no parameter of net")
        if direction.shape != values[name].shape:
            raise ValueError(
                f"u[{name!r}] has shape {tuple(direction.shape)}; it must be {tuple(values[name].shape)}"
            )
    _refuse_inference(x)
    values = {n: t.detach() for n, t in values.items()}
    with _eager(net):
        if mode == "forward" and _KNOWN.get(net) != "double_vjp":
            random = _Random(x.device)
            try:
                return _forward_jvp(net, values, _copies(net, buffers), x, u)
            except (NotImplementedError, RuntimeError) as error:
                if not _no_rule(error):
                    raise
                _fall_back(net, error)
                random.restore()
        return _double_vjp(net, values, _copies(net, buffers), x, u)


def update_vjp(
    update: Any,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    v: Mapping[str, Tensor] | Callable[[Tensors], Mapping[str, Tensor]],
    *,
    clip_grad_norm: float | None = None,
    state: Any = None,
) -> tuple[Tensors, Tensors]:
    """(new params, u): one step of `update`, and u = (d new params / d grads)^T v. Nothing is changed.

    update, clip_grad_norm, state: as in `pixel_meta_gradient`; params, for an optimizer: its own parameters, by any
    name. v: by name, or a function of the new params that gives it. Optimizers' derivatives are those of
    torch.optim's formulas; where a second moment is 0 its square root counts as constant. The first step of Adam
    and RMSprop hardly depends on the size of the gradient, so that u is tiny, except where the gradient is about
    eps, where it is huge: a RuntimeWarning says so; take a few ordinary steps first.
    """
    rule = Update(update, params, clip_grad_norm, state, check_names=True)
    states, given = rule.states(), {n: g.detach() for n, g in grads.items()}
    values = {n: p.detach() for n, p in params.items()}
    with torch.no_grad():
        new, _ = rule.step(values, given, states)
    direction = dict(v(dict(new)) if callable(v) else v)
    return new, rule.pull(values, given, states, direction)


def head_hypergradient(
    loss: Callable[..., Tensor], z: Tensor, zdot: Tensor, h: Tensor | Sequence[Tensor]
) -> Any:
    """The meta-gradient in any parameter h of the training loss: class weights, soft labels, a Dice loss's pixels.

    loss: (z, *h) -> the scalar training loss F. z, zdot (B, C, *S): logits and their tangent along u, as of
    `logit_jvp`. h: a tensor, or several. Gives d/dh <dF/dz(z, h), zdot>, like h: double backward at the logits alone.
    """
    if z.shape != zdot.shape:
        raise ValueError(f"zdot has shape {tuple(zdot.shape)}; it must be {tuple(z.shape)}, as z")
    many = isinstance(h, (list, tuple))
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (h if many else [h])]  # type: ignore[union-attr]
        leaf = z.detach().requires_grad_()
        value = loss(leaf, *leaves)
        if value.ndim:
            raise ValueError(f"loss must give a scalar, got shape {tuple(value.shape)}")
        slope = torch.autograd.grad(value, leaf, create_graph=True)[0]
        grads = torch.autograd.grad((slope * zdot.detach()).sum(), leaves, materialize_grads=True)
    return list(grads) if many else grads[0]


def unroll_reference(
    net: nn.Module,
    x: Any,
    y: Any,
    R: Any,
    x_clean: Tensor,
    y_clean: Tensor,
    update: Any,
    *,
    loss: Loss | None = None,
    clean_loss: Loss | None = None,
    attached: bool = False,
    params: Sequence[str] | None = None,
    clip_grad_norm: float | None = None,
    divisor: float | None = None,
    state: Any = None,
) -> MetaGradient:
    """`pixel_meta_gradient` by differentiating through the steps (create_graph): the definition; slow and large.

    R = None differentiates at R = 0 through the whole step. One process. The objective is meta_loss itself.
    """
    net, several = _unwrap(net), isinstance(x, (list, tuple))
    batches = _batches(x, y, R, several)
    _check_call(net, batches, x_clean, "forward", attached)
    rule = Update(update, _names(net, params), clip_grad_norm, state, check_names=params is not None)
    loss = cross_entropy_map if loss is None else loss
    with torch.enable_grad(), _eager(net):
        weights = {n: p.detach().requires_grad_() for n, p in net.named_parameters()}
        start, states, made, maps = dict(weights), rule.states(), [], []
        for k, (x_k, y_k, R_k) in enumerate(batches):
            with _at(net, weights, _copies(net)):
                L = loss(_logits(net, x_k), y_k)
            if k == 0:
                after = _Random(x_k.device)
            weight = _weights(R_k, L if attached else L.detach(), L)
            if not weight.requires_grad:
                weight = weight.detach().requires_grad_()  # not the caller's
            shift = torch.zeros_like(weight, requires_grad=True)  # its gradient is that in R
            moved = [n for n in rule.names if n in weights]
            total = ((weight + shift) * L).sum() / (divisor or L.numel())
            grads = torch.autograd.grad(
                total, [weights[n] for n in moved], create_graph=True, allow_unused=True
            )
            used = {n: g for n, g in zip(moved, grads, strict=True) if g is not None}
            new, states = rule.step(weights, used, states)
            weights = {**weights, **new}
            made.append((weight, shift))
            maps.append(L.detach())
        with _at(net, weights, _copies(net)):
            meta_loss = (clean_loss or loss)(_logits(net, x_clean), y_clean).mean()
        shifts = [s for _, s in made]
        dR = list(torch.autograd.grad(meta_loss, shifts, retain_graph=True, materialize_grads=True))
        after.restore()
    del start
    result = MetaGradient(dR if several else dR[0], maps if several else maps[0], meta_loss.detach())
    result.R, result.objective = ([w for w, _ in made] if several else made[0][0]), meta_loss
    return result


# ---- one net, several passes ----------------------------------------------------------------------


class _Step(NamedTuple):
    batch: tuple[Tensor, Tensor, Any]
    weights: Tensors  # at which it starts
    grads: Tensors
    states: Any
    random: _Random
    loss_map: Tensor | None  # None: not known yet
    R: Any
    pixels: float  # N


class _Run:
    """What all passes of one call share."""

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        mode: str,
        attached: bool,
        divisor: float | None,
        self_check: bool,
    ) -> None:
        self.net, self.loss = net, loss
        self.mode, self.attached, self.divisor, self.self_check = mode, attached, divisor, self_check
        self.buffers = {n: b.detach().clone() for n, b in net.named_buffers()}
        self.device = next(net.parameters()).device
        self.distributed = _processes() > 1

    def at(self, weights: Mapping[str, Tensor], own: bool = False) -> contextlib.AbstractContextManager[None]:
        """Net at these weights, with its own buffers or copies of what they were."""
        return _at(self.net, weights, {} if own else _copies(self.net, self.buffers))

    def count_pixels(self, batch: tuple[Tensor, Tensor, Any], loss_map: Tensor | None = None) -> float:
        if self.divisor is not None:
            return self.divisor
        if loss_map is None:
            return math.nan  # counted when the loss map is there
        return self.total(loss_map.numel())

    def total(self, count: int) -> float:
        if not self.distributed:
            return float(count)
        number = torch.tensor(float(count), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(number)
        return float(number)

    def summed(self, tensors: Tensors) -> Tensors:
        """Their sums over the processes, in one message."""
        if not self.distributed or not tensors:
            return tensors
        flat = torch.cat([t.reshape(-1) for t in tensors.values()])
        torch.distributed.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors.values()])
        return {n: part.view(t.shape) for (n, t), part in zip(tensors.items(), parts, strict=True)}

    def first_pass(
        self, batch: tuple[Tensor, Tensor, Any], weights: Tensors, states: Any, random: _Random, keep: bool
    ) -> _Step:
        x, y, R = batch
        leaves = {n: w if w.requires_grad else w.requires_grad_() for n, w in weights.items()}
        with self.at(leaves, own=keep):
            L = self.loss(_logits(self.net, x), y)
            weight = _weights(R, L if self.attached else L.detach(), L)
            N = self.count_pixels(batch, L)
            grads: Tensors = {}
            if R is not None:
                total = ((weight if self.attached else weight.detach()) * L).sum() / N
                given = torch.autograd.grad(
                    total, list(leaves.values()), retain_graph=keep, allow_unused=True
                )
                grads = self.summed({n: g for n, g in zip(leaves, given, strict=True) if g is not None})
        if self.attached:
            weight = weight.detach()
        kept = L if keep else L.detach()
        return _Step(
            batch, {n: w.detach() for n, w in weights.items()}, grads, states, random, kept, weight, N
        )

    def clean_pass(
        self, weights: Tensors, x: Tensor, y: Tensor, clean_loss: Loss | None
    ) -> tuple[Tensors, Tensor]:
        """(v, clean loss) at these weights."""
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        with self.at(leaves):
            loss = (clean_loss or self.loss)(_logits(self.net, x), y).mean()
            if self.distributed:
                loss = loss * (x.shape[0] / self.total(x.shape[0]))
            given = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        if all(g is None for g in given):
            raise ValueError("the clean loss does not depend on the parameters that the virtual step moves")
        v = {
            n: torch.zeros_like(w) if g is None else g
            for (n, w), g in zip(leaves.items(), given, strict=True)
        }
        total = self.summed({"loss": loss.detach()})["loss"]
        return self.summed(v), total

    def tangent(self, step: _Step, u: Tensors, curvature: bool) -> tuple[Tensor, Tensor, Tensors]:
        """(L, dL/dt, H u) at the step's weights along u; H, of the step's training loss, only with `curvature`."""
        x, y, _ = step.batch
        if curvature:
            L, L_dot, curved = self._curvature(step, u)
        else:
            z, z_dot = logit_jvp(self.net, step.weights, self.buffers, x, u, self.mode)
            L, L_dot = _loss_dual(self.loss, z, z_dot, y)
            curved = {}
        if self.self_check and self.mode == "forward" and self.net not in _KNOWN:
            self._check(step, u, L_dot)
        return L, L_dot, curved

    def _curvature(self, step: _Step, u: Tensors) -> tuple[Tensor, Tensor, Tensors]:
        x, y, R = step.batch
        leaves = {n: w.detach().requires_grad_() for n, w in step.weights.items()}

        def total(L: Tensor) -> Tensor:
            R_k = _weights(R, L, L) if self.attached else step.R.detach()
            return (R_k * L).sum() / step.pixels

        if self.mode == "forward" and _KNOWN.get(self.net) != "double_vjp":
            random = _Random(self.device)
            try:
                with forward_ad.dual_level():
                    duals = {n: forward_ad.make_dual(w, u[n]) if n in u else w for n, w in leaves.items()}
                    with self.at(duals):
                        L = self.loss(_logits(self.net, x), y)
                        grads = torch.autograd.grad(total(L), list(leaves.values()), allow_unused=True)
                    pairs = {n: _unpack(g)[1] for n, g in zip(leaves, grads, strict=True) if g is not None}
                    primal, tangent = _unpack(L)
                if tangent is None:
                    raise RuntimeError(_LOST)
                curved = {n: t.detach() for n, t in pairs.items() if t is not None}
                return primal.detach(), tangent.detach(), self.summed(curved)
            except (NotImplementedError, RuntimeError) as error:
                if not _no_rule(error):
                    raise
                _fall_back(self.net, error)
                random.restore()
        with self.at(leaves):
            L = self.loss(_logits(self.net, x), y)
            cotangent = torch.zeros_like(L, requires_grad=True)
            L_dot = _along(L, leaves, cotangent, u, [cotangent], retain_graph=True)[0]
            bent = _along(total(L), leaves, None, u, list(leaves.values()))
        return L.detach(), L_dot, self.summed(dict(zip(leaves, bent, strict=True)))

    def _check(self, step: _Step, u: Tensors, L_dot: Tensor) -> None:
        """<c, J u> must be <J^T c, u>, J the derivative of the loss map in the weights, for a random map c."""
        if not any(bool(t.any()) for t in u.values()):
            return
        x, y, _ = step.batch
        step.random.restore()
        leaves = {n: w.detach().requires_grad_() for n, w in step.weights.items()}
        with self.at(leaves):
            L = self.loss(_logits(self.net, x), y)
            c = torch.randn(L.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(L)
            slopes = torch.autograd.grad(L, [leaves[n] for n in u], c, allow_unused=True)
        pairs = [(s.double(), u[n].double()) for n, s in zip(u, slopes, strict=True) if s is not None]
        expected = float(sum((s * t).sum() for s, t in pairs))
        parts = c.double() * L_dot.double()
        off, scale = abs(float(parts.sum()) - expected), float(parts.abs().sum())
        noise = math.sqrt(
            float(sum((s * s).sum() for s, _ in pairs)) * float(sum((t * t).sum() for _, t in pairs))
        )
        rough = torch.is_autocast_enabled(x.device.type) or L.dtype in (torch.float16, torch.bfloat16)
        rough = rough or any(w.dtype in (torch.float16, torch.bfloat16) for w in leaves.values())
        tolerance = 0.2 if rough else 1e-6 if L.dtype == torch.float64 else 1e-2
        if off > tolerance * (scale + 1e-3 * noise):
            raise RuntimeError(
                f"self-check: forward mode through {type(self.net).__name__} and the loss gives a wrong tangent "
                f"({float(parts.sum()):.3g} along a test direction, reverse mode {expected:.3g}): some layer's "
                "forward-mode rule is missing or wrong (an op of torch.library, reentrant checkpointing); use "
                "mode='double_vjp'"
            )
        _KNOWN[self.net] = "forward"

    def finish(self, step: _Step, L: Tensor, L_dot: Tensor) -> tuple[Tensor, Tensor, Any, Tensor | None]:
        """(dR, loss map, R, objective) of a step."""
        N = step.pixels if not math.isnan(step.pixels) else self.total(L.numel())
        dR, R, objective = L_dot / N, step.R, None
        if step.batch[2] is None:
            R = torch.zeros_like(L)
        if self.attached:
            leaf = L.detach().requires_grad_()
            value = (_weights(step.batch[2], leaf, leaf) * leaf).sum() / N
            slope = torch.autograd.grad(value, leaf, create_graph=True)[0]
            objective = (slope * L_dot).sum()
        elif R.requires_grad:
            objective = (R * dR).sum()
        return dR, L if step.loss_map is None else step.loss_map, R, objective


@contextlib.contextmanager
def _at(net: nn.Module, *tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts these parameters and buffers in the place of net's own, for the backward pass too: checkpointed parts
    run again there, which torch.func.functional_call would let them do at the wrong weights."""
    merged = {n: t for some in tensors for n, t in some.items()}
    with _reparametrize_module(net, merged, tie_weights=True):
        yield


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    z = net(x)
    if not isinstance(z, Tensor):
        raise TypeError(f"net must give a tensor of logits, got {type(z).__name__}; wrap it")
    return z


def _along(
    output: Tensor,
    leaves: Mapping[str, Tensor],
    cotangent: Tensor | None,
    u: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    retain_graph: bool = False,
) -> tuple[Tensor, ...]:
    """The derivative in `inputs` of <d output / d leaves, u>, by double backward."""
    moved = [leaves[n] for n in u]
    slopes = torch.autograd.grad(output, moved, cotangent, create_graph=True, allow_unused=True)
    parts = [(s * u[n]).sum() for n, s in zip(u, slopes, strict=True) if s is not None]
    if not parts:
        raise ValueError("the output of net does not depend on the parameters in u")
    total = torch.stack(parts).sum()
    return torch.autograd.grad(total, inputs, retain_graph=retain_graph, materialize_grads=True)


def _copies(net: nn.Module, buffers: Mapping[str, Tensor] | None = None) -> Tensors:
    """Copies of the buffers, for a pass to write to."""
    given = dict(net.named_buffers()) if buffers is None else buffers
    return {n: b.detach().clone() for n, b in given.items()}


def _weights(R: Any, argument: Tensor, loss_map: Tensor) -> Tensor:
    if R is None:
        return torch.zeros_like(loss_map.detach())
    weight: Any = R(argument) if callable(R) and not isinstance(R, Tensor) else R
    if not isinstance(weight, Tensor):
        raise TypeError(f"R must give a tensor, got {type(weight).__name__}")
    if weight.shape != loss_map.shape:
        raise ValueError(
            f"R has shape {tuple(weight.shape)}; it must have the loss map's, {tuple(loss_map.shape)}"
        )
    return weight


def _loss_dual(loss: Loss, z: Tensor, z_dot: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(L, dL/dt) along z_dot, by forward mode, or by double-vjp where the loss has no rule for it."""
    if loss is cross_entropy_map:
        with torch.no_grad():
            both: tuple[Tensor, Tensor] = ce_dual(z, z_dot, y)
        return both
    try:
        with torch.no_grad(), forward_ad.dual_level():
            L, L_dot = _unpack(loss(forward_ad.make_dual(z.detach(), z_dot.detach().to(z)), y))
        if L_dot is not None:
            return L.detach(), L_dot.detach()
    except (NotImplementedError, RuntimeError) as error:
        if not _no_rule(error):
            raise
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        L = loss(leaf, y)
        cotangent = torch.zeros_like(L, requires_grad=True)
        L_dot = _along(L, {"z": leaf}, cotangent, {"z": z_dot}, [cotangent])[0]
    return L.detach(), L_dot


_LOST = (
    "the forward-mode tangent is lost (None): an op registered with torch.library, a compiled module, a detach() "
    "or torch.no_grad-like wrapper inside net or loss; use mode='double_vjp'"
)
# How each net fares: "forward" (checked) or "double_vjp" (a layer has no forward-mode rule).
_KNOWN: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _forward_jvp(
    net: nn.Module, values: Tensors, buffers: Tensors, x: Tensor, u: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(t, u[n].detach()) if n in u else t for n, t in values.items()}
        with _at(net, duals, buffers):
            z, z_dot = _unpack(_logits(net, x))
        if z_dot is None:
            raise RuntimeError(_LOST)
        return z.detach(), z_dot.detach()


def _double_vjp(
    net: nn.Module, values: Tensors, buffers: Tensors, x: Tensor, u: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaves = {n: t.detach().requires_grad_() if n in u else t for n, t in values.items()}
        with _at(net, leaves, buffers):
            z = _logits(net, x)
            cotangent = torch.zeros_like(z, requires_grad=True)
            z_dot = _along(z, leaves, cotangent, u, [cotangent])[0]
    return z.detach(), z_dot


def _unpack(x: Tensor) -> tuple[Tensor, Tensor | None]:
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, tangent


def _no_rule(error: Exception) -> bool:
    text = str(error)
    return "forward AD" in text or "forward mode AD" in text or "jvp" in text


def _fall_back(net: nn.Module, error: Exception) -> None:
    why = " ".join(str(error).split())[:120]
    warnings.warn(
        f"{type(net).__name__} has a layer without a forward-mode rule ({why}); double backward is used instead",
        RuntimeWarning,
        stacklevel=4,
    )
    _KNOWN[net] = "double_vjp"


class _Random:
    """The state of the random generators that a pass on this device draws from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if self.device else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)  # type: ignore[arg-type]


@contextlib.contextmanager
def _eager(net: nn.Module) -> Iterator[None]:
    """Compiled modules inside net run eagerly."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not any(
        m._compiled_call_impl is not None or isinstance(m, dynamo.OptimizedModule) for m in net.modules()
    ):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _unwrap(net: Any) -> nn.Module:
    """The module itself, without what DistributedDataParallel, torch.compile or Fabric put around it."""
    wrappers = {
        "DistributedDataParallel": "module",
        "OptimizedModule": "_orig_mod",
        "_FabricModule": "module",
    }
    while (attribute := wrappers.get(type(net).__name__)) is not None:
        net = getattr(net, attribute)
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    return net


def _processes() -> int:
    if replicated.get() or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


# ---- checks ---------------------------------------------------------------------------------------


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def _refuse_inference(*tensors: Tensor) -> None:
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in tensors):
        raise RuntimeError("torch.inference_mode loses tangents without a word; call this outside of it")


def _batches(x: Any, y: Any, R: Any, several: bool) -> list[tuple[Tensor, Tensor, Any]]:
    if not several:
        return [(x, y, R)]
    if R is None or callable(R):
        R = [R] * len(x)
    if not isinstance(y, (list, tuple)) or len(y) != len(x) or len(R) != len(x) or not x:
        raise ValueError(f"x is a list of {len(x)} batches; y and R must be lists of as many")
    if any(r is None for r in R) and len(x) > 1:
        raise ValueError("R=None, the weights 0, is for one inner step")
    return list(zip(x, y, R, strict=True))


def _check_call(
    net: nn.Module, batches: Sequence[tuple[Any, Any, Any]], x_clean: Any, mode: str, attached: bool
) -> None:
    _check_mode(mode)
    device = next((p.device for p in net.parameters()), None)
    for name, t in [("x_clean", x_clean), *(("x", x) for x, _, _ in batches)]:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if device is not None and t.device != device:
            raise ValueError(f"{name} is on {t.device}, net on {device}")
        _refuse_inference(t)
    for x, y, R in batches:
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"y must be a tensor of {x.shape[0]} images, as x, got {got}")
        if isinstance(R, Tensor):
            if not R.is_floating_point():
                raise TypeError(f"R must be floating point, got {R.dtype}")
            if R.device != x.device:
                raise ValueError(f"R is on {R.device}, x on {x.device}")
            if R.shape[:1] != x.shape[:1]:
                raise ValueError(f"R has shape {tuple(R.shape)}, but x holds {x.shape[0]} images")
        elif R is not None and not callable(R):
            raise TypeError(
                f"R must be a tensor, a function of the loss map, or None, got {type(R).__name__}"
            )
        if attached and (R is None or isinstance(R, Tensor)):
            raise ValueError("attached=True needs R as a function of the loss map")


def _names(net: nn.Module, params: Sequence[str] | None) -> Tensors:
    own: Tensors = dict(net.named_parameters())
    if params is None:
        chosen = {n: p for n, p in own.items() if p.requires_grad}
        if not chosen:
            raise ValueError("net has no parameter that requires a gradient")
        return chosen
    for name in params:
        if name not in own:
            raise ValueError(f"params names {name!r}, which is no parameter of net")
        if not own[name].requires_grad:
            raise ValueError(f"params names {name!r}, which requires no gradient")
    if not params:
        raise ValueError("params is empty")
    return {n: own[n] for n in params}
