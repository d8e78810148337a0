"""Cross-entropy with its tangent and the weight nets, against eager PyTorch and torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from noisyseg_fast.timing import OURS, Case, Contender, blobs, compiled, random_logits

SHAPES = [(16, 64, 64), (128, 64, 64), (2, 48, 48, 48)]
HEADLINE = SHAPES[1]
# beyond inputs and outputs nothing: bytes per pixel of forward + vjp
MOVED = {"mask_net": 20, "mw_net": 20}
NAMES = {"mask_net": "MCPM mask net, forward + vjp", "mw_net": "pixel-wise MWNet, forward + vjp"}


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    """Makers of cases, so that only one case's arrays exist at a time."""
    for shape in [HEADLINE] if quick else SHAPES:
        yield partial(ce_dual_case, shape, device, headline=shape == HEADLINE)
    for kind in NAMES:
        for shape in SHAPES[:1] if quick else SHAPES:
            yield partial(net_case, kind, shape, device, headline=shape == HEADLINE)


def ce_dual_case(
    shape: Sequence[int], device: str = "cpu", *, deadline: float = math.inf, headline: bool = False
) -> Case:
    """ce_dual; logits and tangent (B, 2, *S) float32, labels uint8; PyTorch's jvp gets the int64 that it wants."""
    import torch
    from torch.nn.functional import cross_entropy

    from noisyseg_fast import reference
    from noisyseg_fast.weight_nets import ce_dual

    full = (shape[0], 2, *shape[1:])
    z = random_logits(full, device).detach()
    zdot = z.flip(0).contiguous()
    y = torch.from_numpy(blobs(shape)).to(device)
    wide = y.long()

    def plain(z: Any, zdot: Any) -> Any:
        return torch.func.jvp(lambda x: cross_entropy(x, wide, reduction="none"), (z,), (zdot,))

    return Case(
        family="weight_nets",
        operation="cross-entropy and its tangent, C = 2",
        input="x".join(map(str, full)),
        contenders=[
            Contender(OURS, lambda: partial(ce_dual, z, zdot, y)),
            Contender("eager", lambda: partial(plain, z, zdot)),
            compiled(plain, lambda function: partial(function, z, zdot), deadline),
        ],
        oracle=lambda: reference.ce_dual(z.double(), zdot.double(), y),
        tolerance=1e-5,
        moved=25 * y.numel(),
        device=device,
        headline=headline,
    )


def net_case(
    kind: str,
    shape: Sequence[int],
    device: str = "cpu",
    *,
    deadline: float = math.inf,
    headline: bool = False,
) -> Case:
    """R of a loss map (B, *S) float32 and the gradient with respect to all parameters; widths 16, H = 100."""
    import torch

    from noisyseg_fast import reference, weight_nets

    random = torch.Generator().manual_seed(0)
    L = (3 * torch.rand(*shape, generator=random) ** 2).to(device)
    # Of one sign: among terms that cancel, a single pixel at a ReLU's kink would show in the sums.
    dR = torch.rand(*shape, generator=random).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = weight_nets.MaskNet(len(shape) - 1) if kind == "mask_net" else weight_nets.MWNet()
    theta = net.to(device).theta

    def prepare(function: Callable[..., Any], dR: Any = dR, L: Any = L, theta: Any = theta) -> Any:
        def call() -> Any:
            R = function(L, theta)
            return R.detach(), *torch.autograd.grad(R, theta, dR)

        return call

    def oracle() -> Any:
        wide = [x.detach().double().requires_grad_() for x in theta]
        return prepare(getattr(reference, kind), dR.double(), L.double(), wide)()

    plain = getattr(reference, kind)
    return Case(
        family="weight_nets",
        operation=NAMES[kind],
        input="x".join(map(str, shape)),
        contenders=[
            Contender(OURS, partial(prepare, getattr(weight_nets, kind))),
            Contender("eager", partial(prepare, plain)),
            compiled(plain, prepare, deadline),
        ],
        oracle=oracle,
        # The sums over half a million pixels are float32 in PyTorch, and off by 2e-4; ours by 1e-6.
        tolerance=5e-4,
        moved=MOVED[kind] * L.numel(),
        device=device,
        headline=headline,
    )
