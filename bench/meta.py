"""A whole iteration of MCPM against differentiating through the virtual step: by hand, with higher, with TorchOpt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from noisyseg_fast.timing import OURS, Case, Contender

LR = 1e-2
# Spatial axes: batch, edge, widths of the U-Net (META_GRADIENT.md section 2)
SIZES = {2: (16, 64, (32, 64, 128, 256)), 3: (2, 48, (8, 16, 32, 64))}
SMALL = {2: (4, 32, (8, 16, 32, 64)), 3: (1, 16, (4, 8, 16, 32))}


def cases(device: str, quick: bool) -> Iterator[Callable[[], Case]]:
    for dims in (2, 3):
        yield partial(iteration_case, dims, device, SMALL[dims] if quick else SIZES[dims], headline=dims == 2)


class _Setup:
    """A net, a mask net and batches, and what remains of an iteration once d clean loss / d Theta is known."""

    def __init__(self, dims: int, device: str, size: tuple[int, int, tuple[int, ...]]) -> None:
        import torch

        from noisyseg_fast.weight_nets import MaskNet

        batch, edge, widths = size
        torch.manual_seed(0)
        self.net = _unet(dims, widths).to(device).train()
        self.mask_net = MaskNet(spatial_dims=dims).to(device)
        shape = (batch, 1, *(edge,) * dims)
        self.x, self.x_clean = (torch.randn(shape, device=device) for _ in range(2))
        self.y, self.y_clean = (
            torch.randint(0, 2, (batch, *shape[2:]), device=device, dtype=torch.uint8) for _ in range(2)
        )
        self.theta = list(self.mask_net.parameters())
        self.weights = list(self.net.parameters())

    def loss(self, z: Any, y: Any) -> Any:
        """As one writes it; ours computes the same."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(z, y.long(), reduction="none")

    def real_step(self, loss_map: Any) -> Any:
        """The gradients of the real step, with the weights that the mask net gives now."""
        import torch

        R = self.mask_net(loss_map.detach()).detach()
        return torch.autograd.grad((R * loss_map).mean(), self.weights)[0]

    def finish(self, dtheta: Any, loss_map: Any) -> Any:
        return torch_cat(dtheta), self.real_step(loss_map).detach()


def torch_cat(tensors: Any) -> Any:
    import torch

    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _unet(dims: int, widths: tuple[int, ...]) -> Any:
    """Two 3x3 convolutions with batch norm and ReLU at each level; max pooling down, transposed convolutions up."""
    import torch
    from torch import nn

    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    up, pool = (nn.ConvTranspose2d, nn.MaxPool2d) if dims == 2 else (nn.ConvTranspose3d, nn.MaxPool3d)

    def block(a: int, b: int) -> Any:
        layers = [[conv(i, b, 3, padding=1, bias=False), norm(b), nn.ReLU()] for i in (a, b)]
        return nn.Sequential(*layers[0], *layers[1])

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList(block(a, b) for a, b in zip((1, *widths), widths, strict=False))
            pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
            self.rise = nn.ModuleList(up(a, b, 2, stride=2) for a, b in pairs)
            self.up = nn.ModuleList(block(2 * b, b) for _, b in pairs)
            self.pool, self.head = pool(2), conv(widths[0], 2, 1)

        def forward(self, x: Any) -> Any:
            kept = []
            for i, down in enumerate(self.down):
                x = down(x if i == 0 else self.pool(x))
                kept.append(x)
            kept.pop()
            for rise, merge in zip(self.rise, self.up, strict=True):
                x = merge(torch.cat([rise(x), kept.pop()], 1))
            return self.head(x)

    return UNet()


def ours(setup: _Setup, keep_graph: bool, mode: str = "forward", fused: bool = False) -> Callable[[], Any]:
    import copy

    import torch

    from noisyseg_fast.meta import cross_entropy_map, fuse_dual_norms, pixel_meta_gradient

    net = setup.net
    if fused:
        net = copy.deepcopy(setup.net)
        fuse_dual_norms(net)
    weights = list(net.parameters())

    def call() -> Any:
        meta = pixel_meta_gradient(
            net, setup.x, setup.y, setup.mask_net, setup.x_clean, setup.y_clean, LR, keep_graph=keep_graph, mode=mode
        )  # fmt: skip
        dtheta = torch.autograd.grad(meta.objective, setup.theta)
        loss_map = meta.loss_map if keep_graph else cross_entropy_map(net(setup.x), setup.y)
        R = setup.mask_net(loss_map.detach()).detach()
        return torch_cat(dtheta), torch.autograd.grad((R * loss_map).mean(), weights)[0]

    return call


def unrolled(
    net: Any, x: Any, y: Any, R: Any, x_clean: Any, y_clean: Any, lr: float, loss: Callable[..., Any]
) -> tuple[Any, Any]:
    """(R, the clean loss after the step): the common code, create_graph and a functional call at W'. R: a function of
    the loss map, or None: zeros, to differentiate in."""
    import torch
    from torch.func import functional_call

    named = dict(net.named_parameters())
    L = loss(net(x), y)
    weights = torch.zeros_like(L, requires_grad=True) if R is None else R(L.detach())
    grads = torch.autograd.grad((weights * L).mean(), list(named.values()), create_graph=True)
    moved = {n: p - lr * g for (n, p), g in zip(named.items(), grads, strict=True)}
    return weights, loss(functional_call(net, moved, (x_clean,)), y_clean).mean()


def unroll(setup: _Setup) -> Callable[[], Any]:
    def call() -> Any:
        _, clean = unrolled(
            setup.net, setup.x, setup.y, setup.mask_net, setup.x_clean, setup.y_clean, LR, setup.loss
        )
        clean.backward()
        dtheta = torch_cat([p.grad for p in setup.theta])
        for p in (*setup.weights, *setup.theta):
            p.grad = None
        del clean
        return dtheta, setup.real_step(setup.loss(setup.net(setup.x), setup.y))

    return call


def with_higher(setup: _Setup) -> Callable[[], Any]:
    import higher
    import torch

    optimizer = torch.optim.SGD(setup.net.parameters(), LR)

    def call() -> Any:
        with higher.innerloop_ctx(setup.net, optimizer) as (net, inner):
            L = setup.loss(net(setup.x), setup.y)
            inner.step((setup.mask_net(L.detach()) * L).mean())
            clean = setup.loss(net(setup.x_clean), setup.y_clean).mean()
            dtheta = torch.autograd.grad(clean, setup.theta)
        del net, inner, L, clean
        return setup.finish(dtheta, setup.loss(setup.net(setup.x), setup.y))

    return call


def with_torchopt(setup: _Setup) -> Callable[[], Any]:
    import torch
    import torchopt

    def call() -> Any:
        optimizer = torchopt.MetaSGD(setup.net, lr=LR)
        before = torchopt.extract_state_dict(setup.net, by="reference")
        L = setup.loss(setup.net(setup.x), setup.y)
        optimizer.step((setup.mask_net(L.detach()) * L).mean())
        clean = setup.loss(setup.net(setup.x_clean), setup.y_clean).mean()
        dtheta = torch.autograd.grad(clean, setup.theta)
        torchopt.recover_state_dict(setup.net, before)
        setup.weights = list(setup.net.parameters())
        del L, clean, optimizer
        return setup.finish(dtheta, setup.loss(setup.net(setup.x), setup.y))

    return call


def iteration_case(
    dims: int, device: str, size: tuple[int, int, tuple[int, ...]], headline: bool = False
) -> Case:
    """d clean loss / d Theta, then the gradients of the real step; virtual step plain SGD."""
    setup = _Setup(dims, device, size)
    contenders = [
        Contender(OURS, partial(ours, setup, False)),
        Contender("ours, graph kept", partial(ours, setup, True)),
        Contender("ours, norms fused", partial(ours, setup, False, fused=True)),
        Contender("ours, norms fused, graph kept", partial(ours, setup, True, fused=True)),
        Contender("unroll", partial(unroll, setup)),
        Contender("higher", partial(with_higher, setup)),
        Contender("TorchOpt", partial(with_torchopt, setup)),
        Contender("double-vjp", partial(ours, setup, False, "double_vjp")),
    ]
    return Case(
        family="meta",
        operation=f"MCPM iteration, {dims}D U-Net {size[2][0]}..{size[2][-1]}",
        input="x".join(map(str, setup.x.shape)),
        contenders=contenders,
        oracle="unroll",
        tolerance=1e-2,
        moved=4 * setup.x.nbytes,
        device=device,
        headline=headline,
    )
