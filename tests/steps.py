"""Steps of any method on any device, with all that any of them asks for, and a watch over what the host waits for."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from noisyseg_fast.training import methods
from noisyseg_fast.training.methods import several
from noisyseg_fast.training.model import ModelSpec

SHORT = {name: {"history": 2} for name in ("coplenet", "trimmed")}  # so that thresholds come at once
STEPS = 20


def build(name, device="cpu", classes=2, raters=3, side=32):
    """The method on a small U-Net, with a plan of STEPS steps."""
    torch.manual_seed(0)
    spec = ModelSpec(name, "unet", 4, 2, 1, classes, (side, side), SHORT.get(name, {}), raters)
    method = spec.build().to(device).train()
    method.plan = methods.Plan(torch.optim.Adam(method.trained(), lr=1e-3), STEPS, 5)
    return method


def everything(device="cpu", classes=2, raters=3, side=32, size=2):
    """A batch with clean and unlabelled images and several raters' masks."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(size, side, side, dtype=torch.uint8)
    for k in range(1, classes):
        label[:, 4 + 8 * k : 12 + 8 * k, 6:24] = k
    image = label[:, None] + 0.1 * torch.randn(size, 1, side, side, generator=generator)
    part = {"image": image.to(device), "label": label.to(device), "index": torch.arange(size).to(device)}
    drawn = torch.stack([label.roll(m, 1) for m in range(raters)], 1).to(device)
    return {**part, "meta": dict(part), "unlabelled": part["image"].flip(2), "raters": drawn}


def step(method, batch, number):
    """As the engine makes it; the losses."""
    out = method.training_step(batch, number)
    method.plan.optimizer.zero_grad()
    out["loss"].backward()
    method.plan.optimizer.step()
    method.after_step(number)
    return out


def fits(method, batch):
    """Whether the steps of the plan are enough to learn this batch, which one class alone is not."""
    for number in range(method.plan.steps):
        out = step(method, batch, number)
        assert all(value.dim() == 0 for value in out.values())
    right = (several.hard(method.eval()(batch["image"])) == batch["label"]).float().mean()
    background = (batch["label"] == 0).float().mean()
    assert right > 0.85 > 0.8 > background


def trains(name, network, batch, options):
    """Two steps of the method with that network change it, and it predicts."""
    dims, side = batch["image"].dim() - 2, batch["image"].shape[-1]
    spec = ModelSpec(name, network, 4, dims, 1, 2, (side,) * dims, options)
    torch.manual_seed(0)
    method = spec.build()
    method.plan = methods.Plan(torch.optim.Adam(method.trained()), 2, 1)
    before = [p.clone() for p in method.trained()]
    for number in range(2):
        assert torch.isfinite(step(method, batch, number)["loss"])
    assert not all(torch.equal(a, b) for a, b in zip(before, method.trained(), strict=True))
    assert method.eval()(batch["image"]).shape == batch["image"].shape


class _Operations(TorchDispatchMode):
    """Refuses operators whose result, or its size, the host must read from the device."""

    waits = (
        "_local_scalar_dense", "is_nonzero", "aten.equal", "nonzero", "masked_select", "unique", "bincount",
        "repeat_interleave.Tensor",
    )  # fmt: skip

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(word in name for word in self.waits), name
        if "aten.index.Tensor" in name or "aten.index_put" in name:
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]), (
                "index by a mask"
            )
        return function(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Refuses calls that copy between host and device, which on the CPU reach no operator."""

    waits = frozenset({"item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__float__", "__int__"})
    waits |= {"__index__", "tensor", "as_tensor", "from_numpy"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert getattr(function, "__name__", "") not in self.waits, function
        return function(*args, **(kwargs or {}))


class NoWaiting(ExitStack):
    """Inside, on the CPU: whatever would make the host wait for a device fails."""

    def __enter__(self):
        super().__enter__()
        self.enter_context(_Operations())
        self.enter_context(_Calls())
        return self
