"""Norm + activation, plain, with its tangent and with its gradients, and a U-Net's whole forward-mode pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from noisyseg_fast.timing import OURS, Call, Case, Contender, compiled, relative_error

SHAPES = [(16, 32, 64, 64), (16, 64, 32, 32), (16, 256, 4, 4), (2, 32, 48, 48, 48)]
HEADLINE = SHAPES[0]
SLOPE = 0.01  # nnU-Net's leaky ReLU
TOLERANCE = 2e-5  # of the largest value
PASSES = {
    "value": 2,
    "value and tangent": 6,
    "forward + backward": 7,
}  # how often x's memory must be moved at least


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    """Makers of cases, so that only one case's arrays exist at a time."""
    for shape in [HEADLINE] if quick else SHAPES:
        for what in list(PASSES)[1:] if quick else PASSES:
            yield partial(
                layer_case, what, shape, device, headline=shape == HEADLINE and what == list(PASSES)[1]
            )
    # compiling the network takes minutes
    yield partial(network_case, device, deadline=0.0 if quick else math.inf, headline=True)


def layer_case(
    what: str,
    shape: Sequence[int],
    device: str = "cpu",
    *,
    deadline: float = math.inf,
    headline: bool = False,
) -> Case:
    """Batch norm with the batch's statistics and leaky ReLU on x (B, C, *S) float32."""
    import torch
    from torch.autograd import forward_ad

    from noisyseg_fast import norm_act, reference

    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Any:
        return torch.randn(size, generator=g).to(device)

    values = [draw(*shape), draw(shape[1]), draw(shape[1])]
    dots = [draw(*v.shape) for v in values]
    # Nothing comes back through pixels whose sign the allowed error can turn.
    if what == "forward + backward":
        exact = reference.norm_act(*(v.double() for v in values), slope=SLOPE)
        dots[0] *= exact.abs() > TOLERANCE * exact.abs().max()

    def with_tangent(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(values: Any, dots: Any) -> Any:
            with forward_ad.dual_level():  # inside, as a compiled function needs it
                duals = [forward_ad.make_dual(v, d) for v, d in zip(values, dots, strict=True)]
                return tuple(forward_ad.unpack_dual(function(*duals, slope=SLOPE)))

        return run

    def with_value(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda values, _: function(*values, slope=SLOPE)

    def prepare(function: Callable[..., Any], values: Any = values, dots: Any = dots) -> Call:
        if what != "forward + backward":

            def call() -> Any:
                with torch.no_grad():
                    return function(values, dots)

            return call
        leaves = [v.detach().requires_grad_() for v in values]

        def both() -> Any:
            y = function(leaves, dots)
            return (y.detach(), *torch.autograd.grad(y, leaves, dots[0]))

        return both

    of = with_tangent if what == "value and tangent" else with_value
    wide = [[t.double() for t in tensors] for tensors in (values, dots)]
    return Case(
        family="norms",
        operation=f"batch norm + leaky ReLU, {what}",
        input="x".join(map(str, shape)),
        contenders=[
            Contender(OURS, partial(prepare, of(norm_act)), beside_the_kink),
            Contender("eager", partial(prepare, of(reference.norm_act)), beside_the_kink),
            replace(compiled(of(reference.norm_act), prepare, deadline), error=beside_the_kink),
        ],
        oracle=prepare(of(reference.norm_act), *wide),
        tolerance=TOLERANCE,
        moved=PASSES[what] * 4 * values[0].numel(),
        device=device,
        headline=headline,
    )


def beside_the_kink(answer: Any, expected: Any) -> float:
    """relative_error without the derivatives of pixels whose value's sign is a matter of the error that is allowed."""
    if not isinstance(expected, tuple):
        return relative_error(answer, expected)
    clear = expected[0].abs() > TOLERANCE * expected[0].abs().max()
    pairs = [
        (a * clear, b * clear) if b.shape == clear.shape else (a, b)
        for a, b in zip(answer, expected, strict=True)
    ]
    return max(relative_error(a, b) for a, b in pairs)


def whole_error(answer: Any, expected: Any) -> float:
    """|answer - expected| / |expected|, the largest over a tuple's tensors: few pixels may lie at a ReLU's kink."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(answer, expected, strict=True))


def network_case(device: str = "cpu", *, deadline: float = math.inf, headline: bool = False) -> Case:
    """MONAI's BasicUNet, 32 to 256 channels, batch norm and ReLU, 16x1x64x64: logits and their tangent.

    Direction: one for each parameter. The peers are the same network without fuse_dual_norms.
    """
    import torch
    from monai.networks.nets import BasicUNet
    from torch.autograd import forward_ad
    from torch.func import functional_call

    from noisyseg_fast import fuse_dual_norms

    torch.manual_seed(0)
    plain = BasicUNet(2, 1, 2, (32, 32, 64, 128, 256, 32), act="relu", norm="batch").to(device)
    x = torch.randn(16, 1, 64, 64).to(device)
    dots = {n: torch.randn_like(p) * 0.01 for n, p in plain.named_parameters()}

    def forward_mode(net: Any) -> Callable[..., Any]:
        def run(parameters: Any, x: Any, dots: Any) -> Any:
            with forward_ad.dual_level():
                duals = {n: forward_ad.make_dual(p, dots[n]) for n, p in parameters.items()}
                return tuple(forward_ad.unpack_dual(functional_call(net, duals, (x,))))

        return run

    def prepare(run: Callable[..., Any], dtype: Any = torch.float32) -> Call:
        parameters = {n: p.detach().to(dtype) for n, p in plain.named_parameters()}
        directions = {n: d.to(dtype) for n, d in dots.items()}

        def call() -> Any:
            with torch.no_grad():
                return run(parameters, x.to(dtype), directions)

        return call

    fused = fuse_dual_norms(copy.deepcopy(plain))
    return Case(
        family="norms",
        operation="U-Net forward-mode pass",
        input="BasicUNet 16x1x64x64",
        contenders=[
            Contender(OURS, partial(prepare, forward_mode(fused)), whole_error),
            Contender("eager", partial(prepare, forward_mode(plain)), whole_error),
            replace(compiled(forward_mode(plain), prepare, deadline), error=whole_error),
        ],
        oracle=prepare(forward_mode(copy.deepcopy(plain).double()), torch.float64),
        tolerance=1e-2,
        moved=2 * sum(4 * p.numel() for p in plain.parameters())
        + 20 * x.numel(),  # parameters, directions, x, logits
        device=device,
        headline=headline,
    )
