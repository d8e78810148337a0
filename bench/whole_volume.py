"""Peak memory and time of whole-volume inference: python -m bench.whole_volume

An oblique LPS volume of int16 in a .nii.gz, a small network, and one process each for `noisyseg predict`'s way (plane
by plane) and for the image, the logits and the weights held as a whole (MONAI's sliding_window_inference, as in
validation). The masks are compared with each other and with the image's header. Writes memory/whole_volume.json in the
machine's folder. With the default size some 5 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import report

PATCH, OVERLAP, WIDTH = (128, 128, 64), 0.25, 4
WAYS = ("planes", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.whole_volume", description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=3, default=(512, 512, 300), metavar=("X", "Y", "Z"))
    parser.add_argument("--out", type=Path, help="default: bench/results/MACHINE/memory")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # of a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(_measure(options.way, options.folder)))
        return
    size, machine = tuple(options.size), report.machine("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_inputs(folder, size)
        ways = {}
        for way in WAYS:
            command = [sys.executable, "-m", "bench.whole_volume", "--way", way, "--folder", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            ways[way] = json.loads(done.stdout)
            print(way, ways[way], flush=True)
        checks = _compare(folder)
    out = options.out or Path(__file__).parent / "results" / report.slug(machine["processor"]) / "memory"
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine,
        "size": size,
        "file": "int16 .nii.gz, oblique, LPS",
        "network": f"unet, width {WIDTH}",
        "patch": PATCH,
        "overlap": OVERLAP,
        "bound_bytes": _bound(size),
        "ways": ways,
        **checks,
    }
    (out / "whole_volume.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in content.items() if k != "machine"}, indent=1))


def _bound(size: tuple[int, ...]) -> int:
    """What predict.py and windows.py promise beside the network: int16 image, mask, a row of windows."""
    return int(3 * np.prod(size) + 13 * size[0] * size[1] * PATCH[2])


def _write_inputs(folder: Path, size: tuple[int, ...]) -> None:
    import nibabel
    import torch

    from noisyseg_fast.training import model

    generator = np.random.default_rng(0)
    image = np.empty(size, np.int16)
    for z in range(size[2]):
        image[..., z] = generator.normal(40, 20, size[:2])
    x, y, z = (n // 3 for n in size)
    image[x : 2 * x, y : 2 * y, z : 2 * z] += 200
    a = np.deg2rad(12)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ turn @ np.diag([0.7, 0.7, 1.25])
    affine[:3, 3] = (180, 170, -250)
    nibabel.save(nibabel.Nifti1Image(image, affine), folder / "scan.nii.gz")
    spec = model.ModelSpec("ce", "unet", WIDTH, 3, 1, 2, PATCH)
    torch.manual_seed(0)
    content = {"format": model.FORMAT, "model": model.spec_dict(spec)}
    torch.save({**content, "method": spec.build(training=False).state_dict()}, folder / "best.pt")


def _measure(way: str, folder: Path) -> dict[str, Any]:
    """Peak resident memory beyond what the process needs for one window, and seconds."""
    import torch

    from noisyseg_fast.training import data, model, predict

    device = torch.device("cpu")
    method, spec = model.load_model(model.read_checkpoint(folder / "best.pt"), device)
    image = torch.zeros(1, 1, *PATCH)
    model.infer(method, image, PATCH)  # imports, and the network's own memory
    import monai.inferers

    before, start, cpu = _peak(), time.perf_counter(), time.process_time()
    options = predict.Options(overlap=OVERLAP)
    (job,) = predict.jobs([folder / "scan.nii.gz"], folder / way, 1)
    if way == "planes":
        predict.check([job], spec, options)
        journal = predict.Journal(folder / way, folder / "best.pt", options)
        predict.predict(method, spec, [job], device, options=options, journal=journal)
    else:
        with torch.no_grad():
            logits = monai.inferers.sliding_window_inference(
                torch.from_numpy(data.load_image(job.case)[0])[None],
                PATCH,
                1,
                method,
                overlap=OVERLAP,
                mode="gaussian",
            )
        mask = data.from_ras(
            (logits[0, 0] > 0).numpy().astype(np.uint8), data.read(folder / "scan.nii.gz").affine
        )
        predict.write_nifti(job.target, mask, folder / "scan.nii.gz")
    return {
        "peak_bytes": _peak() - before,
        "process_peak_bytes": _peak(),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "threads": torch.get_num_threads(),
    }


def _peak() -> int:
    """The process's high-water mark of resident memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _compare(folder: Path) -> dict[str, Any]:
    import nibabel

    image = nibabel.load(folder / "scan.nii.gz")
    masks = [nibabel.load(folder / way / "scan.nii.gz") for way in WAYS]
    mask = masks[0]
    same = all(
        np.array_equal(mask.header[name], image.header[name])
        for name in ("pixdim", "qform_code", "sform_code", "xyzt_units", "dim")
    )
    labels = [np.asarray(m.dataobj) for m in masks]
    return {
        "differing_labels": int((labels[0] != labels[1]).sum()),
        "foreground": float(labels[0].mean()),
        "geometry_is_the_images": bool(same and np.array_equal(mask.affine, image.affine)),
    }


if __name__ == "__main__":
    main()
