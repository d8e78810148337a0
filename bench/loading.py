"""Training items a second from each kind of cache, beside what the training step takes: python -m bench.loading

Volumes as .nii.gz; each kind of cache is measured in turn, round by round, and the best round counts. What matters is
the last column: below 1, the network waits for data; more --workers, which load side by side, or another cache help.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import torch

from noisyseg_fast.training import data as D
from noisyseg_fast.training.model import ModelSpec

BATCH = 2


def write(root: Path, count: int, size: int) -> None:
    generator = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        image = generator.normal(100, 20, (size, size, size)).astype(np.int16)
        label = np.zeros_like(image, np.uint8)
        label[size // 3 : size // 2, size // 3 : size // 2, size // 3 : size // 2] = 1
        for name, array in (("imagesTr", image + 50 * label), ("labelsTr", label)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / name / f"c{i}.nii.gz")


def step(patch: tuple[int, ...], width: int) -> float:
    """Seconds of one training step."""
    torch.manual_seed(0)
    method = ModelSpec("ce", "unet", width, 3, 1, 2, patch).build().train()
    optimizer = torch.optim.Adam(method.trained(), lr=1e-3)
    batch = {
        "image": torch.randn(BATCH, 1, *patch),
        "label": torch.randint(0, 2, (BATCH, *patch), dtype=torch.uint8),
        "index": torch.arange(BATCH),
    }
    start = time.perf_counter()
    losses = method.training_step(batch, 0)  # type: ignore[arg-type]
    optimizer.zero_grad()
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volumes", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    patch = (options.patch,) * 3
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(root / "set", options.volumes, options.size)
        data = D.open_data(root / "set")
        bytes_ = 5 * options.size**3 * options.volumes  # float32 and a label
        kinds = {
            "memory, all of it": D.Store(),
            "memory, a quarter": D.Store(limit=bytes_ // 4),
            "disk": D.Store(cache="disk", folder=root / "cache"),
            "none": D.Store(cache="none"),
        }
        sets = {}
        for kind, store in kinds.items():
            D.check(data, store)
            sets[kind] = D.TrainingSet(data.training, store, patch)
        best: dict[str, float] = {}
        step(patch, options.width)
        for _ in range(options.rounds):
            best["step"] = min(best.get("step", 1e9), step(patch, options.width) / BATCH)
            for kind, training in sets.items():
                start = time.perf_counter()
                for number in training.order(0):
                    training[number]
                each = (time.perf_counter() - start) / len(training)
                best[kind] = min(best.get(kind, 1e9), each)
    need = 1 / best["step"]
    print(
        f"the training step takes {need:.2f} items/s ({options.patch}^3, batch {BATCH}, unet {options.width})"
    )
    for kind in kinds:
        print(
            f"{kind:<20} {1 / best[kind]:8.2f} items/s {best['step'] / best[kind]:8.2f} of what the step takes"
        )
    if options.out:
        ratios = {kind: best["step"] / best[kind] for kind in kinds}
        content = {
            "items_per_second": {kind: 1 / best[kind] for kind in kinds},
            "step": need,
            "of_the_step": ratios,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
