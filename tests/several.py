"""Several processes in one test, on the CPU by gloo."""

from __future__ import annotations

import multiprocessing
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from noisyseg_fast.training.parallel import Group

# What takes seconds, and is done once for all processes.
IMPORTS = [
    "noisyseg_fast.training.engine",
    "noisyseg_fast.training.report",
    "lightning.fabric",
    "monai.networks.nets",
]


def spread(function, size, folder, *arguments):
    """function(group, *arguments) in `size` processes; what it gave on each. AssertionError with the traceback of the
    first that failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    queue = context.SimpleQueue()
    rendezvous = folder / f"rendezvous{size}-{function.__name__}"
    rendezvous.unlink(missing_ok=True)
    where = f"file://{rendezvous}"
    started = [
        context.Process(target=_one, args=(function, size, rank, where, queue, arguments))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    results = dict(queue.get() for _ in started)
    for process in started:
        process.join()
    for rank in range(size):
        ok, value = results[rank]
        assert ok, f"process {rank} of {size}:\n{value}"
    return [results[rank][1] for rank in range(size)]


def _one(function, size, rank, where, queue, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        value = True, function(Group(size, rank), *arguments)
    except BaseException:
        value = False, traceback.format_exc()
    queue.put((rank, value))
    if dist.is_initialized():
        dist.destroy_process_group()
