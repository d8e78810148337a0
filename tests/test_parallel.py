"""Training on several processes comes to the parameters of one."""

from __future__ import annotations

import copy

import pytest
import torch
from several import spread
from steps import STEPS, everything, step

from noisyseg_fast.training import methods
from noisyseg_fast.training.model import ModelSpec

SHORT = {name: {"history": 2} for name in ("coplenet", "trimmed")}


def build(name, network, start=0):
    torch.manual_seed(0)
    spec = ModelSpec(name, network, 4, 2, 1, 2, (32, 32), SHORT.get(name, {}), 3)
    method = spec.build().double().train()
    method.plan = methods.Plan(torch.optim.Adam(method.trained(), lr=1e-3), STEPS, 5)
    return method


def batch_of(size):
    def double(x):
        if isinstance(x, dict):
            return {k: double(v) for k, v in x.items()}
        return x.double() if x.is_floating_point() else x

    return double(everything(size=size))


def trained(name, network, size, numbers, group=None):
    method, batch = build(name, network), batch_of(size)
    losses = []
    for number in numbers:
        if group is None:
            losses.append(step(method, batch, number))
        else:
            with group.dividing(method):
                losses.append(step(method, batch, number))
    return method, losses


def apart(one, several):
    """The largest difference of two states."""
    return max(
        (
            float((a.double() - b.double()).abs().nan_to_num(0).max())
            for a, b in zip(one.values(), several.values(), strict=True)
            if a.numel()
        ),
        default=0.0,
    )


def compare(group, cases, size, numbers):
    result = {}
    for name, network in cases:
        one, alone = trained(name, network, size, numbers)
        many, losses = trained(name, network, size, numbers, group)
        result[name, network] = apart(one.state_dict(), many.state_dict()), group.messages.total()
    return result
