"""Calls the key kernels of the compiled module on fixed inputs between the marks of a shared library: run by
test_instruction_counts.py under callgrind, as `python kernels.py MARK.so`. Without NumPy, whose import takes
valgrind seconds."""

from __future__ import annotations

import ctypes
import random
import sys
from array import array
from math import prod
from typing import Any

from noisyseg_fast import _core

U8, I32, I64, F32, F64 = 0, 2, 3, 6, 7  # DType in csrc/include/noisyseg/array.h
LETTER = {U8: "B", I32: "i", I64: "q", F32: "f", F64: "d"}
CPU = (-1, 0, 1)
mark = ctypes.CDLL(sys.argv[1])
source = random.Random(0)
alive: list[Any] = []  # the memory behind the views


def view(shape: tuple[int, ...], dtype: int = F32, values: Any = None) -> Any:
    """(address, dtype, shape, strides) of a new array: zeros, or values() for each element."""
    n = prod(shape)
    memory = array(LETTER[dtype], [0]) * max(n, 1)
    if values is not None:
        memory = array(LETTER[dtype], (values() for _ in range(n)))
    alive.append(memory)
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return memory.buffer_info()[0], dtype, shape, strides


def memory(size: int) -> int:
    return view((size // 8 + 1,), F64)[0]


def bytes_of(size: int) -> Any:
    return view((size,), U8)


def bit() -> int:
    return source.random() < 0.4


def count(name: str, *calls: Any) -> None:
    for call in calls:  # once before: what is set up but once is no part of a call
        call()
    mark.begin()
    for call in calls:
        call()
    mark.end(name.encode())


def losses() -> None:
    shape = (2, 3, 48, 48)
    logits, target, weight = (
        view(shape, F32, source.random),
        view((2, 48, 48), U8, lambda: source.randrange(3)),
        view((2, 48, 48), F32, source.random),
    )
    # In the order of losses.Options.
    nr_dice = (0, 1, 1.0, 1.5, 1.0, 2, 1, 1, 1, 1e-5, 0, 1.0, 0.0, 0.0, 0, 0, 0)
    ce = (1, 0, 1.0, 1.5, 1.0, 2, 1, 1, 1, 1e-5, 1, 1.0, 0.0, 0.0, 0, 0, 0)
    for name, options, w in (
        ("nr_dice_loss, value and gradient", nr_dice, None),
        ("weighted cross-entropy, value and gradient", ce, weight),
    ):
        loss, sums, grad, one = (
            view((), F32),
            view((2, 4, 5), F64),
            view(shape, F32),
            view((), F32, lambda: 1.0),
        )
        work = memory(_core.loss_workspace(logits, CPU))
        given = (logits, target, w, None, None, options, 0)
        count(
            name,
            lambda a=given, x=(loss, sums, None, work): _core.loss_forward(*a, *x, CPU),
            lambda a=given, x=(one, sums, grad, False): _core.loss_backward(*a, *x, CPU),
        )


def distances() -> None:
    shape = (24, 28, 32)
    mask = view(shape, U8, lambda: source.random() < 0.97)
    options = (False, float("inf"), False, False, 1, False, 0)
    out, work = view(shape, F32), memory(_core.distance_workspace(mask, 3, options, False, False, CPU))
    count(
        "distance_transform_edt",
        lambda: _core.distance_transform_edt(mask, 3, (1.0, 1.0, 2.0), options, out, None, work, CPU),
    )


def surfaces() -> None:
    shape = (20, 24, 40)

    def ball(centre: float) -> Any:
        inside = (
            (z - 10) ** 2 + (y - 12) ** 2 + (x - centre) ** 2 < 64 + 8 * bit()
            for z in range(20)
            for y in range(24)
            for x in range(40)
        )
        return view(shape, U8, lambda: next(inside))

    pred, target, out = ball(18), ball(21), view((6, 1), F64)
    surface = bytes_of(_core.surface_extract_workspace(pred, 3, {}, CPU))
    work = bytes_of(_core.surface_extract(pred, target, 3, {}, surface, CPU))
    count(
        "surface_metrics",
        lambda: _core.surface_extract(pred, target, 3, {}, surface, CPU),
        lambda: _core.surface_metrics(pred, 3, {}, surface, work, out, CPU),
    )


def meta() -> None:
    shape = (2, 2, 48, 48)
    z, dot, y = view(shape, F32, source.random), view(shape, F32, source.random), view((2, 48, 48), U8, bit)
    loss, loss_dot = view((2, 48, 48)), view((2, 48, 48))
    count("ce_dual", lambda: _core.ce_dual(z, dot, y, True, loss, loss_dot, CPU))
    small = (2, 24, 24)
    L, R, dR = (view(small, F32, source.random) for _ in range(3))
    shapes = ((16, 3, 3), (16,), (16, 5, 5), (16,), (33,), (1,))
    theta = tuple(view(s, F32, lambda: source.random() - 0.5) for s in shapes)
    packed, work = view((sum(map(prod, shapes)),)), memory(_core.mask_net_workspace(L, theta, False, CPU))
    count(
        "mask_net and its vjp",
        lambda: _core.mask_net(L, theta, R, CPU),
        lambda: _core.mask_net_vjp(dR, R, L, theta, packed, None, work, CPU),
    )


def statistics() -> None:
    shape, slots = (1, 5, 64, 64), 32
    votes, options = view(shape, U8, bit), (2, True, False, False, 0)
    index, counts, work = (
        view((1, 4096), U8),
        view((1, slots), I64),
        bytes_of(_core.vote_patterns_workspace(slots, CPU)),
    )
    values, names, performance = view((1, slots, 1), F64), view((1, slots), I64), view((1, 5, 2, 2), F64)
    rates, status = [view((1, 5, 2), F64) for _ in range(2)], view((1, 2), I32)
    em = bytes_of(_core.staple_workspace(1, slots, 5, 2, CPU))
    count(
        "staple",
        lambda: _core.vote_patterns(votes, None, None, options, index, None, counts, work, CPU),
        lambda: _core.staple(
            None, counts, 5, options, 50, 0.0, None, values, names, performance, *rates, status, em, CPU
        ),
    )
    numbers, out = view((1, 1, 128, 128), F32, source.random), view((1, 1), F32)
    room = bytes_of(_core.selection_workspace(numbers, 2, CPU))
    count("quantile", lambda: _core.quantile(numbers, None, [0.9], 0, out, room, CPU))


for family in (losses, distances, surfaces, meta, statistics):
    family()
