"""Cross-entropy with its tangent and the weight nets: CUDA against the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast import weight_nets  # noqa: E402
from noisyseg_fast.weight_nets import MaskNet, MWNet, ce_dual  # noqa: E402

SHAPES = [(8, 64, 64), (2, 33, 47), (1, 17, 30, 11), (3, 1, 7)]
BOUND = {torch.float64: 1e-11, torch.float32: 1e-5}


def close(a, b, bound):
    scale = float(b.abs().max()) or 1.0
    assert float((a.cpu().double() - b.double()).abs().max()) <= bound * scale


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["mask_net", "mw_net"])
def test_weight_nets(kind, shape, dtype):
    torch.manual_seed(0)
    net = MaskNet(len(shape) - 1, (16, 5)) if kind == "mask_net" else MWNet()
    theta = [x.detach().to(dtype) for x in net.theta]
    L, dR = 3 * torch.rand(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    forward, vjp = getattr(weight_nets, kind), getattr(weight_nets, f"{kind}_vjp")
    R = forward(L, theta)
    dtheta, dL = vjp(dR, R, L, theta, attached=True)
    on_gpu = [x.cuda() for x in theta]
    R_gpu = forward(L.cuda(), on_gpu)
    close(R_gpu, R, BOUND[dtype])
    results = [vjp(dR.cuda(), R.cuda(), L.cuda(), on_gpu, attached=True) for _ in range(2)]
    close(results[0][1], dL, BOUND[dtype])
    for a, b in zip(results[0][0], dtheta, strict=True):
        assert float((a.cpu() - b).abs().max()) <= 4 * BOUND[dtype] * max(
            float(x.abs().max()) for x in dtheta
        )
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("soft", [False, True])
def test_ce_dual(channels, dtype, soft):
    torch.manual_seed(0)
    z, zdot = (torch.randn(3, channels, 33, 65).to(dtype) for _ in range(2))
    y = torch.rand(z.shape) if soft else torch.randint(0, max(channels, 2), (3, 33, 65)).to(torch.uint8)
    bound = 1e-12 if dtype == torch.float64 else 3e-6
    for a, b in zip(ce_dual(z.cuda(), zdot.cuda(), y.cuda()), ce_dual(z, zdot, y), strict=True):
        close(a, b, bound)
    if not soft:
        L, _ = ce_dual(z.cuda(), zdot.cuda(), y.cuda() + max(channels, 2))
        assert L.isnan().all()


@pytest.mark.small
def test_small():
    """One call of each kernel, for compute-sanitizer."""
    L = torch.rand(2, 9, 10, device="cuda", requires_grad=True)
    for net in (MaskNet(2, 3).cuda(), MWNet(9).cuda()):
        net(L).sum().backward()
    z = torch.randn(2, 2, 9, 10, device="cuda")
    ce_dual(z, z, torch.zeros(2, 9, 10, dtype=torch.uint8, device="cuda"))
    torch.cuda.synchronize()
