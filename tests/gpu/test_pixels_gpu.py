"""Order statistics and confident learning: CUDA against the CPU, the same bits."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast import confident_joint, label_errors, quantile, topk_mask, topk_threshold  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def same(ours, expected):
    assert ours.is_cuda
    assert torch.equal(ours.cpu().nan_to_num(), expected.nan_to_num())


@pytest.mark.small
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 70, 61), (2, 1, 20, 30, 40)])
def test_order_statistics(shape, dtype, per_image):
    x = torch.randn(shape).to(dtype)
    x[0] = x[0].round()
    x.view(-1)[::7] = torch.nan
    mask = torch.rand(shape) < 0.8
    y, inside = x.cuda(), mask.cuda()
    for q in (0.3, [0.0, 0.1, 0.5, 0.77, 1.0]):
        same(quantile(y, q, per_image=per_image), quantile(x, q, per_image=per_image))
    same(quantile(y, 0.9, mask=inside), quantile(x, 0.9, mask=mask))
    for k in (1, 17, 10**7):
        options = {"per_image": per_image, "largest": k != 17}
        same(topk_threshold(y, k, **options), topk_threshold(x, k, **options))
        same(topk_mask(y, k, mask=inside, **options), topk_mask(x, k, mask=mask, **options))


@pytest.mark.small
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 2, 50, 61), (1, 3, 12, 13, 14), (1, 14, 40, 40)])
def test_confident_learning(shape, dtype):
    p = torch.randn(shape).softmax(1).to(dtype)
    p[..., ::5] = p[..., ::5].round()
    label = torch.randint(shape[1] + 1, (shape[0], *shape[2:]), dtype=torch.uint8)
    same(confident_joint(p.cuda(), label.cuda()), confident_joint(p, label))
    for prune in ("both", "class", "noise_rate"):
        same(label_errors(p.cuda(), label.cuda(), prune), label_errors(p, label, prune))


def test_more_than_32_bits_of_values(room):
    room(12)
    x = torch.zeros(2**31 + 1000, dtype=torch.float16, device="cuda")
    x[-5:] = torch.arange(5, device="cuda")
    assert quantile(x, 1).item() == 4
    assert topk_threshold(x, 4).item() == 1
    assert topk_mask(x, 2**31 + 990).sum().item() == 2**31 + 990


def test_nothing_waits_for_the_device():
    x, k = torch.rand(4, 1000, device="cuda"), torch.tensor([1, 2, 3, 4], device="cuda")
    p, label = torch.rand(2, 2, 500, device="cuda"), torch.zeros(2, 500, dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantile(x, 0.5, mask=x > 0.1)
        topk_mask(x, k, per_image=True)
        label_errors(p, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
