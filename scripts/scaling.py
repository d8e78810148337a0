"""What a training step of each method sends, computes and copies on 1 to 64 processes: python scripts/scaling.py

Everything is counted, by running the step of one process of so many with messages that go nowhere: messages and bytes
(parallel.Group), floating-point operations of convolutions and matrix products, bytes that torch's operators read and
write, and how many operators there are; our own kernels and Python's time are not in it. That is done with one and with
two images for each process; what others have follows from it, but for some bytes between the parts of a message.
--check N counts the same with N real processes, which must agree to the last byte. From the counts and assumed speeds
of H200 GPUs a step's time is modelled; --measure times real steps on this machine's CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from noisyseg_fast import meta
from noisyseg_fast.training import methods
from noisyseg_fast.training.model import ModelSpec
from noisyseg_fast.training.parallel import Group

# Assumed, for the model. Rates are what is reached, not the data sheet's.
FLOPS = 60e12  # of float32 convolutions in TF32, a second
MEMORY = 3e12  # bytes a second, of 4.8e12
LAUNCH = 8e-6  # seconds for one operator, as Python calls it
NVLINK, IN_NODE = 300e9, 20e-6  # bytes a second and seconds a message among the 8 GPUs of a node, of 450e9
NETWORK, OUT_OF_NODE = 40e9, 40e-6  # of a GPU's 400 Gbit/s InfiniBand port


@dataclass
class Counts:
    flops: int
    copied: int
    operators: int
    messages: Counter[str]
    bytes: Counter[str]


class Dry(Group):
    """One process of many that are not there: it hears from each what it says itself, as if all had the same images."""

    def send_gather(self, every: Any, mine: Any) -> None:
        every.view(self.size, -1).copy_(mine)

    def send_sum(self, flat: Any) -> None:
        flat.mul_(self.size)


class Operators(TorchDispatchMode):
    """Bytes read and written, and the number of operators; not those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if not function.is_view and "detach" not in str(function):
            tensors = [
                x for x in (*leaves, *torch.utils._pytree.tree_leaves(made)) if isinstance(x, torch.Tensor)
            ]
            self.bytes += sum(x.nbytes for x in tensors)
            self.count += 1
        return made


def build(name: str, network: str | None, width: int, side: int, dims: int) -> methods.Method:
    torch.manual_seed(0)
    network = network or methods.get(name).network_default[0]
    spec = ModelSpec(name, network, width, dims, 1, 2, (side,) * dims, {}, 3)
    method = spec.build().train()
    method.plan = methods.Plan(torch.optim.Adam(method.trained(), lr=1e-3), 20, 5)
    meta._KNOWN[method.network] = "forward"  # no self-check: it would compare processes that are not there
    return method


def batch_of(method: methods.Method, size: int, side: int, dims: int) -> Any:
    """What the engine gives this method: `size` images with labels, and what comes along."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros((size, *(side,) * dims), dtype=torch.uint8)
    label[(slice(None), *(slice(side // 4, side // 2),) * dims)] = 1
    image = label[:, None] + 0.1 * torch.randn((size, 1, *(side,) * dims), generator=generator)
    batch: Any = {"image": image, "label": label, "index": torch.arange(size)}
    parts = method.needs | method.wants
    if "meta" in parts:
        batch["meta"] = dict(batch)
    if "raters" in parts:
        batch["raters"] = torch.stack([label.roll(m, 1) for m in range(3)], 1)
    if "unlabelled" in parts:
        batch["unlabelled"] = image.flip(2)
    return batch


def step(group: Group, method: methods.Method, batch: Any, number: int) -> None:
    rows = group.divide(len(batch["image"]))
    mine = torch.utils._pytree.tree_map(lambda x: x[rows.start : rows.start + rows.run], batch)
    (whole,) = group.batches(iter([mine]), [rows.rows])
    with group.dividing(method):
        loss = method.training_step(whole, number)["loss"]
        method.plan.optimizer.zero_grad()
        loss.backward()
        method.plan.optimizer.step()
        method.after_step(number)


def counted(group: Group, name: str, options: argparse.Namespace, number: int = 12) -> Counts:
    """Of the second step, before which optimisers have their moments."""
    method = build(name, options.network, options.width, options.side, options.dims)
    batch = batch_of(method, options.batch, options.side, options.dims)
    step(group, method, batch, number)
    group.messages.clear()
    group.bytes.clear()
    with FlopCounterMode(display=False) as flops, Operators() as operators:
        step(group, method, batch, number + 1)
    return Counts(
        flops.get_total_flops(),
        operators.bytes,
        operators.count,
        Counter(group.messages),
        Counter(group.bytes),
    )


def seconds(counts: Counts, size: int) -> tuple[dict[str, float], str]:
    """The model: the parts of a step's time, and which is the longest. Work and messages follow each other."""
    fast, start = (NVLINK, IN_NODE) if size <= 8 else (NETWORK, OUT_OF_NODE)
    # A gather brings each process what the others have, a sum (reduce-scatter, gather) twice that.
    sums = counts.bytes["gradients"]
    moved = (sum(counts.bytes.values()) + sums) * (size - 1) / size
    parts = {
        "arithmetic": counts.flops / FLOPS,
        "memory": counts.copied / MEMORY,
        "launches": counts.operators * LAUNCH,
        "bandwidth": moved / fast if size > 1 else 0.0,
        "latency": sum(counts.messages.values()) * start if size > 1 else 0.0,
    }
    # The GPU works while Python launches what comes next.
    work = max(parts["arithmetic"] + parts["memory"], parts["launches"])
    parts["step"] = work + parts["bandwidth"] + parts["latency"]
    bound = max(("arithmetic", "memory", "launches", "bandwidth", "latency"), key=parts.__getitem__)
    return parts, bound


def between(near: Counts, far: Counts, rows: float, sizes: tuple[int, int], size: int) -> Counts:
    """The counts of a process with so many rows, of `size` processes, from those with 2 and with 1 row. Work is affine
    in the rows, and the bytes of messages in the processes, by the statistics of batch norm."""

    def affine(two: int, one: int) -> int:
        return round(one + (two - one) * (rows - 1))

    bytes_of = {
        what: round(n + (n - near.bytes[what]) / (sizes[1] - sizes[0]) * (size - sizes[1]))
        for what, n in far.bytes.items()
    }
    flops, copied = affine(near.flops, far.flops), affine(near.copied, far.copied)
    return Counts(flops, copied, far.operators, far.messages, Counter(bytes_of))


def told(name: str, options: argparse.Namespace, sizes: list[int]) -> dict[int, Counts]:
    """The counts on so many processes."""
    ends = options.batch // 2, options.batch
    near, far = (counted(Dry(w, 0), name, options) for w in ends)
    every = {w: between(near, far, options.batch / w, ends, w) for w in sizes}
    if 1 in every:  # which has torch's own batch norm and dropout
        alone = argparse.Namespace(**{**vars(options), "batch": 2})
        every[1].operators = counted(Group(1, 0), name, alone).operators
    return every


def table(options: argparse.Namespace) -> None:
    sizes = options.processes
    if options.batch % 2:
        raise SystemExit("--batch must be even")
    print("| method | messages | batch | outputs | gradients | other |", end="")
    print("".join(f" {w} |" for w in sizes), "bound |")
    print("|---|" + "---:|" * (5 + len(sizes)) + "---|")
    rows: dict[str, list[str]] = {}  # methods of one kind share a row
    for name in options.methods:
        every = told(name, options, sizes)
        last = every[sizes[-1]]
        other = sum(n for what, n in last.bytes.items() if what not in ("batch", "outputs", "gradients"))
        shown = [f"{last.bytes[what] / 1e6:.2f}" for what in ("batch", "outputs", "gradients")]
        times, bounds = zip(*(seconds(counts, w) for w, counts in every.items()), strict=True)
        cells = [str(sum(last.messages.values())), *shown, f"{other / 1e6:.2f}"]
        cells += [f"{1e3 * parts['step']:.1f}" for parts in times]
        rows.setdefault(f"{' | '.join(cells)} | {', '.join(dict.fromkeys(bounds))}", []).append(name)
    for row, names in rows.items():
        print(f"| {', '.join(names)} | {row} |")


def _real(rank: int, size: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/{size}", rank=rank, world_size=size)
    for name in options.methods:
        real = counted(Group(size, rank), name, options)
        said = counted(Dry(size, rank), name, options)
        same = (real.messages, real.bytes, real.flops) == (said.messages, said.bytes, said.flops)
        if rank == 0:
            sent = sum(real.messages.values()), sum(real.bytes.values())
            what = f"{sent[0]} messages, {sent[1]} bytes, {real.flops} operations"
            print(f"{size} processes, {name}: {what}; as told: {same}", flush=True)
        if not same:
            sys.exit(f"{name}: {real} is not {said}")


def _timed(rank: int, size: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    group = Group(size, rank)
    if size > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/{size}", rank=rank, world_size=size)
    for name in options.methods:
        method = build(name, options.network, options.width, options.side, options.dims)
        batch = batch_of(method, options.batch, options.side, options.dims)
        taken = []
        for number in range(12, 18):
            start = time.perf_counter()
            step(group, method, batch, number)
            taken.append(time.perf_counter() - start)
        if rank == 0:
            print(f"{size} processes, {name}: {1e3 * min(taken):.0f} ms", flush=True)


def spawned(function: Any, size: int, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(function, (size, folder, options), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("methods", nargs="*", help="all by default")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--network", help="the method's own by default")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--dims", type=int, default=2)
    parser.add_argument("--check", type=int, metavar="N", help="count with N real processes")
    parser.add_argument("--measure", action="store_true", help="time steps on this CPU, one thread a process")
    options = parser.parse_args()
    options.methods = options.methods or list(methods.METHODS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.check:
        spawned(_real, options.check, options)
    elif options.measure:
        for size in options.processes:
            spawned(_timed, size, options)
    else:
        table(options)


if __name__ == "__main__":
    main()
