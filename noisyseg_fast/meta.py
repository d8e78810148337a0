"""Per-pixel meta-gradients: how the loss on a few clean images would change with the weight of each noisy pixel.

A network W trains on the weighted loss (1/N) sum_i R_i L_i(W); the weights R should be such that the step W -> W'
lowers the loss on clean data. The gradient of that clean loss with respect to every R_i is exactly

    dR_i = (1/N) d/dt L_i(W + t u) at t = 0,   u = (dU/dg)^T v,   v = gradient of the clean loss at W' = U(g),

with U the optimizer's update and g = (1/N) sum_i R_i dL_i/dW: one forward-mode pass over the noisy batch, no
double backward, and the memory of an ordinary training step. `pixel_meta_gradient` does it all; `logit_jvp`,
`ce_dual`, `update_vjp` and `head_hypergradient` are its parts, for loops of one's own; `unroll_reference` is the same by differentiating through the step, slow and large: the definition.

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
  processes; the gradients of `objective` are this process's share: sum (not average) them over the processes.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from . import losses

Tensor = torch.Tensor
Tensors = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

MODES = ("forward", "double_vjp")


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
    rule = _Update(update, names, clip_grad_norm, state, check_names=params is not None)
    loss = cross_entropy_map if loss is None else loss
    run = _Run(net, rule.names, loss, mode, attached, divisor, self_check)
    with torch.enable_grad(), _eager(net):
        steps, weights, states = [], run.start(), rule.states()
        shortcut = batches[0][2] is None
        for k, batch in enumerate(batches):
            random = _Random(run.device)
            if shortcut and not keep_graph:  # the loss map comes from the forward-mode pass
                step = _Step(batch, weights, {}, states, random, None, None, run.count_pixels(batch))
            else:
                step = run.first_pass(batch, weights, states, random, keep_graph and k == 0)
            if k == 0:
                after = _Random(run.device)
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
            results.append((*run.finish(step, L, L_dot),))
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


def ce_dual(z: Tensor, zdot: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(L, Ldot), each (B, *S): `cross_entropy_map(z, y)` and its derivative along zdot (B, C, *S)."""
    return _loss_dual(cross_entropy_map, z, zdot, y)


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
    rule = _Update(update, params, clip_grad_norm, state, check_names=True)
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
    rule = _Update(update, _names(net, params), clip_grad_norm, state, check_names=params is not None)
    loss = cross_entropy_map if loss is None else loss
    with torch.enable_grad(), _eager(net):
        weights = {n: p.detach().requires_grad_() for n, p in net.named_parameters()}
        start, states, made, maps = dict(weights), rule.states(), [], []
        for k, (x_k, y_k, R_k) in enumerate(batches):
            L = loss(_call(net, weights, _copies(net), x_k), y_k)
            if k == 0:
                after = _Random(x_k.device)
            weight = _weights(R_k, L if attached else L.detach(), L)
            if not weight.requires_grad:
                weight = weight.requires_grad_()
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
        meta_loss = _clean_loss(clean_loss or loss, _call(net, weights, _copies(net), x_clean), y_clean)
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
        names: Mapping[str, Tensor],
        loss: Loss,
        mode: str,
        attached: bool,
        divisor: float | None,
        self_check: bool,
    ) -> None:
        self.net, self.names, self.loss = net, names, loss
        self.mode, self.attached, self.divisor, self.self_check = mode, attached, divisor, self_check
        self.buffers = {n: b.detach().clone() for n, b in net.named_buffers()}
        self.device = next(iter(names.values())).device
        self.distributed = _processes() > 1

    def start(self) -> Tensors:
        return dict(self.names)

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
        L = self.loss(_call(self.net, leaves, {} if keep else _copies(self.net, self.buffers), x), y)
        weight = _weights(R, L if self.attached else L.detach(), L)
        N = self.count_pixels(batch, L)
        grads: Tensors = {}
        if R is not None:
            total = ((weight if self.attached else weight.detach()) * L).sum() / N
            given = torch.autograd.grad(
                total, list(leaves.values()), retain_graph=keep or None, allow_unused=True
            )
            grads = {n: g for n, g in zip(leaves, given, strict=True) if g is not None}
            if self.attached:
                weight = _weights(R, L.detach(), L)
            grads = self.summed(grads)
        kept = L if keep else L.detach()
        return _Step(
            batch, {n: w.detach() for n, w in weights.items()}, grads, states, random, kept, weight, N
        )

    def clean_pass(
        self, weights: Tensors, x: Tensor, y: Tensor, clean_loss: Loss | None
    ) -> tuple[Tensors, Tensor]:
        """(v, clean loss) at these weights."""
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        z = _call(self.net, leaves, _copies(self.net, self.buffers), x)
        loss = _clean_loss(clean_loss or self.loss, z, y)
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
                    L = self.loss(_call(self.net, duals, _copies(self.net, self.buffers), x), y)
                    grads = torch.autograd.grad(total(L), list(leaves.values()), allow_unused=True)
                    bent = {
                        n: forward_ad.unpack_dual(g)[1]
                        for n, g in zip(leaves, grads, strict=True)
                        if g is not None
                    }
                    primal, tangent = forward_ad.unpack_dual(L)
                if tangent is None:
                    raise RuntimeError(_LOST)
                known = {n: t.detach() for n, t in bent.items() if t is not None}
                return primal.detach(), tangent.detach(), self.summed(known)
            except (NotImplementedError, RuntimeError) as error:
                if not _no_rule(error):
                    raise
                _fall_back(self.net, error)
                random.restore()
        L = self.loss(_call(self.net, leaves, _copies(self.net, self.buffers), x), y)
        cotangent = torch.zeros_like(L, requires_grad=True)
        moved = [leaves[n] for n in u]
        slopes = torch.autograd.grad(L, moved, cotangent, create_graph=True, materialize_grads=True)
        along = sum((s * u[n]).sum() for n, s in zip(u, slopes, strict=True))
        L_dot = torch.autograd.grad(along, cotangent, retain_graph=True, materialize_grads=True)[0]
        slopes = torch.autograd.grad(total(L), moved, create_graph=True, materialize_grads=True)
        along = sum((s * u[n]).sum() for n, s in zip(u, slopes, strict=True))
        bent = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
        return L.detach(), L_dot, self.summed(dict(zip(leaves, bent, strict=True)))

    def _check(self, step: _Step, u: Tensors, L_dot: Tensor) -> None:
        """<c, J u> must be <J^T c, u>, J the derivative of the loss map in the weights, for a random map c."""
        if not any(bool(t.any()) for t in u.values()):
            return
        x, y, _ = step.batch
        step.random.restore()
        leaves = {n: w.detach().requires_grad_() for n, w in step.weights.items()}
        L = self.loss(_call(self.net, leaves, _copies(self.net, self.buffers), x), y)
        generator = torch.Generator().manual_seed(0)
        c = torch.randn(L.shape, generator=generator, dtype=torch.float64).to(L)
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


def _call(net: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor) -> Tensor:
    z = functional_call(net, {**weights, **buffers}, (x,))
    if not isinstance(z, Tensor):
        raise TypeError(f"net must give a tensor of logits, got {type(z).__name__}; wrap it")
    return z


def _copies(net: nn.Module, buffers: Mapping[str, Tensor] | None = None) -> Tensors:
    """Copies of the buffers, for a pass to write to."""
    given = dict(net.named_buffers()) if buffers is None else buffers
    return {n: b.detach().clone() for n, b in given.items()}


def _weights(R: Any, argument: Tensor, loss_map: Tensor) -> Tensor:
    if R is None:
        return torch.zeros_like(loss_map.detach())
    weight = R(argument) if callable(R) and not isinstance(R, Tensor) else R
    if not isinstance(weight, Tensor) or weight.shape != loss_map.shape:
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"R has {got}; it must have the loss map's shape, {tuple(loss_map.shape)}")
    return weight


def _clean_loss(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    return loss(z, y).mean()


def _loss_dual(loss: Loss, z: Tensor, z_dot: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(L, dL/dt) along z_dot, by forward mode, or by double-vjp where the loss has no rule for it."""
    try:
        with torch.no_grad(), forward_ad.dual_level():
            L, L_dot = forward_ad.unpack_dual(loss(forward_ad.make_dual(z.detach(), z_dot.detach().to(z)), y))
        if L_dot is not None:
            return L.detach(), L_dot.detach()
    except (NotImplementedError, RuntimeError) as error:
        if not _no_rule(error):
            raise
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        L = loss(leaf, y)
        cotangent = torch.zeros_like(L, requires_grad=True)
        slope = torch.autograd.grad(L, leaf, cotangent, create_graph=True)[0]
        L_dot = torch.autograd.grad((slope * z_dot).sum(), cotangent)[0]
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
        z, z_dot = forward_ad.unpack_dual(_call(net, duals, buffers, x))
        if z_dot is None:
            raise RuntimeError(_LOST)
        return z.detach(), z_dot.detach()


def _double_vjp(
    net: nn.Module, values: Tensors, buffers: Tensors, x: Tensor, u: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaves = {n: t.detach().requires_grad_() if n in u else t for n, t in values.items()}
        z = _call(net, leaves, buffers, x)
        cotangent = torch.zeros_like(z, requires_grad=True)
        slopes = torch.autograd.grad(
            z, [leaves[n] for n in u], cotangent, create_graph=True, allow_unused=True
        )
        along = [(s * u[n]).sum() for n, s in zip(u, slopes, strict=True) if s is not None]
        if not along:
            raise ValueError("the output of net does not depend on the parameters in u")
        z_dot = torch.autograd.grad(torch.stack(along).sum(), cotangent)[0]
    return z.detach(), z_dot


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
    """The module itself, without DistributedDataParallel and torch.compile around it."""
    while True:
        if isinstance(net, nn.parallel.DistributedDataParallel):
            net = net.module
        elif hasattr(net, "_orig_mod"):
            net = net._orig_mod
        else:
            break
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    return net


def _processes() -> int:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
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


def _names(net: nn.Module, params: Sequence[str] | None) -> dict[str, Tensor]:
    own = dict(net.named_parameters())
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


# ---- updates: torch.optim's, one tensor at a time -------------------------------------------------

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
    return -sign * h["lr"] / (1 - b1**t) * ((1 - b1) - m * by_g / denominator) / denominator


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
    return -(-1 if h["maximize"] else 1) * h["lr"] * (1 - g * by_g / denominator) / denominator


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


class _Update:
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
                s = {
                    n: {k: t.detach().requires_grad_() if _real(t) else t for k, t in own.items()}
                    for n, own in states.items()
                }
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
    return isinstance(t, Tensor) and t.is_floating_point() and t.ndim >= 0 and not t.is_inference()
