"""Rebuild noisyseg_fast/sample/lidc2d_middle.npz from the 64x64 LIDC patches.

    python scripts/make_sample.py --source DIR/lidc2d

reads DIR/lidc2d/lidc2d_64.npz and keeps one patch for each nodule: the slice on which the raters'
mean area is largest. The same source gives the same bytes (with the same zlib).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

HOME = Path(__file__).resolve().parent.parent / "noisyseg_fast" / "sample" / "lidc2d_middle.npz"


def make(source: Path, out: Path) -> int:
    """Write the sample and return its number of patches."""
    with np.load(source / "lidc2d_64.npz") as data:
        middle = np.flatnonzero(data["is_middle"])
        arrays = {
            "image": data["image"][middle],
            "masks": np.packbits(data["mask"][middle] > 0, axis=-1),  # 8 pixels of a row in one byte
            "patient": data["patient"][middle],
            "nodule": data["nodule"][middle],
            "pixel_mm": data["pixel_mm"][middle].astype(np.float32),
        }
    temporary = out.with_name(out.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, out)
    return len(middle)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="folder that holds lidc2d_64.npz")
    parser.add_argument("--out", type=Path, default=HOME, help="file to write (default: in the package)")
    options = parser.parse_args()
    if not (options.source / "lidc2d_64.npz").is_file():
        print(f"make_sample: no file {options.source / 'lidc2d_64.npz'}", file=sys.stderr)
        sys.exit(2)
    count = make(options.source, options.out)
    print(f"{options.out}: {count} patches, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
