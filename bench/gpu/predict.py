"""What an H200 should need for each operation, from the compiler's resource report, counted bytes and a model:
python -m bench.gpu.predict [--compare RESULTS_FOLDER]

Prints a table and writes bench/gpu/predictions.json. With a folder of results of `python -m bench` on a GPU: predicted,
measured and their ratio for each case, so that the run confirms the model or refutes it.

The model, for each launch: the longest of
- memory: bytes over what the resident threads can keep under way (Little's law: bytes in flight over the latency), at
  most the copy bandwidth; what an earlier launch has left in L2 (60 MB, of which half is counted on) at twice that,
- special functions: exponentials, divisions and square roots, 16 a cycle and multiprocessor,
plus the time that any kernel takes, and never less than the host needs to issue a launch. A call takes the longer of
that and of the host's own Python. Occupancy: registers (allocated by 256 a warp), shared memory and threads of sm_90.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PINS = ROOT / "tests" / "cuda_resources.json"
PREDICTIONS = Path(__file__).parent / "predictions.json"

# H200 SXM: NVIDIA's data sheet and CUDA's programming guide, table of technical specifications for 9.0
PROCESSORS, CLOCK = 132, 1.98e9
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32
RESERVED_SHARED = 1024  # of each block
COPY_BANDWIDTH, L2 = 4.3e12, 60e6  # read and written; bytes
# Assumed, for the first run to correct
LATENCY, LAUNCH, KERNEL = 700e-9, 2.5e-6, 1.5e-6  # of memory; host time of a launch; least time of a kernel
HOST_AUTOGRAD, HOST_CALL = 60e-6, 12e-6  # Python of a forward and backward, and of a plain call


@dataclass(frozen=True)
class Launch:
    """One kernel: elements, and for each of them bytes from memory, bytes that L2 may hold, special functions, and
    bytes that a thread keeps under way."""

    kernel: str
    elements: float
    memory: float
    cached: float = 0.0
    special: float = 0.0
    in_flight: float = 32.0
    threads: int = 256
    blocks: int | None = None  # of the grid; None: enough to fill the device
    dynamic: int = 0  # bytes of shared memory that the launch asks for


@dataclass(frozen=True)
class Prediction:
    family: str
    operation: str
    input: str
    launches: int
    occupancy: float  # of the longest launch, resident threads over 2048
    megabytes: float
    device_s: float
    call_s: float
    bound: str  # what the longest launch waits for


def resources() -> dict[str, Any]:
    return json.loads(PINS.read_text(encoding="utf-8"))["kernels"]


def blocks_resident(kernel: str, threads: int, dynamic: int = 0) -> int:
    """Blocks of that many threads that a multiprocessor of sm_90 holds at once."""
    registers, static = resources()[kernel]["sm_90"]
    warps = math.ceil(threads / 32)
    of_warp = 256 * math.ceil(registers * 32 / 256)
    by_registers = REGISTERS // of_warp // warps
    by_shared = SHARED // (static + dynamic + RESERVED_SHARED)
    return max(min(by_registers, by_shared, THREADS // (32 * warps), BLOCKS), 0)


def occupancy(launch: Launch) -> float:
    return blocks_resident(launch.kernel, launch.threads, launch.dynamic) * launch.threads / THREADS


def seconds(launch: Launch) -> tuple[float, str]:
    """Of one launch on the device, without what any kernel takes, and what it waits for."""
    held = PROCESSORS * blocks_resident(launch.kernel, launch.threads, launch.dynamic)
    resident = launch.threads * min(held, launch.blocks or held, math.ceil(launch.elements / launch.threads))
    bandwidth = min(COPY_BANDWIDTH, resident * launch.in_flight / LATENCY)
    fast = min(2 * COPY_BANDWIDTH, resident * launch.in_flight / LATENCY)
    kept = min(
        1.0, L2 / 2 / max(launch.elements * launch.cached, 1.0)
    )  # the share of them that is still there
    from_memory = launch.elements * (launch.memory + (1 - kept) * launch.cached)
    memory = from_memory / bandwidth + launch.elements * kept * launch.cached / fast
    special = launch.elements * launch.special / (PROCESSORS * 16 * CLOCK)
    return (special, "special functions") if special > memory else (memory, "memory")


def predict(family: str, operation: str, input: str, launches: list[Launch], host: float) -> Prediction:
    each = [seconds(launch) for launch in launches]
    device = sum(max(LAUNCH, KERNEL + s) for s, _ in each)
    longest = max(range(len(each)), key=lambda i: each[i][0])
    moved = sum(x.elements * (x.memory + x.cached) for x in launches)
    bound = each[longest][1] if each[longest][0] > KERNEL else "launches"
    return Prediction(
        family,
        operation,
        input,
        len(launches),
        occupancy(launches[longest]),
        moved / 1e6,
        device,
        max(device, host),
        "the host" if host > device else bound,
    )


# ---- the operations, as csrc/cuda/*.cu launches them and the comments there count their bytes ---------

# A kernel's pin names its Mode by number: losses.cu has sigmoid, two, softmax; distance.cu sites, two_classes.


def cases() -> Iterator[Prediction]:
    from bench import labels, losses, metrics, task_losses

    for shape in losses.SHAPES:
        n, pixels = math.prod(shape), math.prod(shape) / shape[1]
        # logits 4 and labels 1; the gradient pass reads them again, through L2 where they fit, and writes 4
        label = pixels / n
        steps = [
            Launch("loss_pass<float, (Mode)0, 1, 1>", n, 4 + label, special=3),
            Launch("finish_loss<double>", 512, 8, blocks=1, threads=512),
            Launch("loss_pass<float, (Mode)0, 1, 2>", n, 4, cached=4 + label, special=3),
        ]
        yield predict("losses", "NR-Dice, forward + backward", _name(shape), steps, HOST_AUTOGRAD)
    for shape in losses.CE_SHAPES:
        n, pixels = math.prod(shape), math.prod(shape) / shape[1]
        steps = [  # logits, labels and weights once, the gradient; the gradient's factor is 1
            Launch(
                f"loss_pass<float, (Mode){1 if shape[1] == 2 else 2}, 2, 3>", n, 8 + 5 * pixels / n, special=2
            ),
            Launch("finish_loss<double>", 512, 8, blocks=1, threads=512),
            Launch("scale_grad", 1, 8, blocks=1),
        ]
        yield predict("losses", "weighted CE, forward + backward", _name(shape), steps, HOST_AUTOGRAD)
    for shape in task_losses.SHAPES:
        n, raters = math.prod(shape), task_losses.RATERS
        read = 4 + 5 * raters
        steps = [
            Launch("uncertainty_parts<float>", n, read, special=2 + 2 * raters),
            Launch("add_parts", 4096, 8),
            Launch("uncertainty_value<double>", 256, 8, blocks=1),
            Launch("uncertainty_grad<float>", n, 4 + 4 * raters, cached=read, special=2 + 2 * raters),
        ]
        name = f"UMA-Net loss, M = {raters}, forward + backward"
        yield predict("task_losses", name, _name(shape), steps, HOST_AUTOGRAD)
        steps = [
            Launch("dual_task_parts<float>", n, 9, special=4),
            Launch("add_parts", 4096, 8),
            Launch("dual_task_value<double>", 256, 8, blocks=1),
            Launch("dual_task_grad<float>", n, 8, cached=9, special=4),
        ]
        yield predict("task_losses", "dual-task loss, forward + backward", _name(shape), steps, HOST_AUTOGRAD)
    for shape in ((128, 64, 64), (4, 112, 112, 80), (32, 256, 256), (1, 512, 512, 300)):
        n = math.prod(shape)
        for operation, mode in (("distance transform", 0), ("signed distance map, two_sided", 1)):
            if math.prod(shape[1:]) <= 64 * 64:  # in shared memory; a block an image
                held = 8 * math.prod(shape[1:])
                steps = [
                    Launch(f"small_volume<(Mode){mode}>", n, 5, in_flight=4, blocks=shape[0], dynamic=held)
                ]
            else:
                steps = [
                    Launch(f"sweep_columns<float, (Mode){mode}>", n, 5, cached=8, in_flight=8),
                    Launch(f"search_rows<float, (Mode){mode}>", n, 4, cached=4, in_flight=8),
                ]
                if len(shape) == 4:
                    steps.append(Launch(f"search_planes<float, (Mode){mode}>", n, 4, cached=4, in_flight=8))
            yield predict("distance", operation, _name(shape), steps, HOST_CALL)
    for shape in labels.SHAPES:
        batch, raters, *size = shape
        n = batch * math.prod(size)
        steps = [
            Launch("clear_counts", 2**raters * batch, 8, blocks=1),
            Launch("count_votes<unsigned char, unsigned char>", n, raters + 1, in_flight=raters),
            Launch("fit_staple", batch * 512 * 30, 0, special=4, threads=512, blocks=batch),
            Launch("spread_values<unsigned char, double, float>", n, 4, cached=1, in_flight=4),
        ]
        yield predict("labels", "STAPLE", _name(shape), steps, HOST_CALL)
    for shape in labels.SHAPES[1:]:
        batch, raters, *size = shape
        steps = [
            Launch("vote_on_patterns<unsigned char>", 2**raters, 1, blocks=1),
            Launch("vote_on_pixels<unsigned char>", batch * math.prod(size), raters + 1, in_flight=raters),
        ]
        yield predict("labels", "majority vote", _name(shape), steps, HOST_CALL)
    for shape in metrics.SHAPES:  # about one voxel in 40 is a surface element; a ring's bits are in L1 and L2
        n = math.prod(shape)
        search = Launch("search_rings<long>", n / 20, 8, cached=128, in_flight=4, dynamic=0)
        steps = [
            Launch("pack_masks", n, 2.25, in_flight=1),
            Launch("extract_surfaces", n / 32, 8, cached=32, in_flight=8),
            Launch("make_rings<long>", 1024, 12, threads=1024, blocks=1),
            search,
            *[
                Launch(k, 1, 8)
                for k in ("map_planes<long>", "close_open<long, true>", "close_open<long, false>")
            ]
            * 2,
            Launch("count_within<long>", n / 20, 12, in_flight=12),
            Launch("write_results<long>", n / 20, 24, threads=512, blocks=shape[0]),
        ]
        yield predict("metrics", "surface metrics", _name(shape), steps, HOST_CALL)
    for shape in metrics.CLASSES:
        n, pixels = math.prod(shape), math.prod(shape) / shape[1]
        steps = [
            Launch("zero_counts", 3 * shape[0] * shape[1], 8, blocks=1),
            Launch("count_overlap<(OverlapOptions::Pred)1>", n, 4 + pixels / n, in_flight=4 * shape[1]),
            Launch("write_overlap", shape[0] * shape[1], 72, blocks=1),
        ]
        yield predict("metrics", "overlap metrics, logits", _name(shape), steps, HOST_CALL)


def _name(shape: Any) -> str:
    return "x".join(map(str, shape))


def compare(predictions: list[dict[str, Any]], runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The predictions that GPU results have a row for, with `measured_s` and `ratio`, measured over predicted."""
    times = {
        (family, c["operation"], c["input"]): c["contenders"]["ours"]["p50"]
        for family, run in runs.items()
        for c in run["cases"]
        if c["device"] == "cuda"
    }
    found = []
    for p in predictions:
        measured = times.get((p["family"], p["operation"], p["input"]))
        if measured:
            found.append({**p, "measured_s": measured, "ratio": measured / p["call_s"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.predict", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--compare", type=Path, help="results of a GPU run, to compare with the predictions on file"
    )
    options = parser.parse_args()
    from bench import report

    if options.compare:  # what was predicted before the run, not after it
        on_file = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
        rows = compare(on_file, report.read(options.compare))
        print(report.prediction_table(rows) if rows else "no results of a GPU to compare with")
        return
    rows = [asdict(p) for p in cases()]
    PREDICTIONS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(report.prediction_table(rows))


if __name__ == "__main__":
    main()
