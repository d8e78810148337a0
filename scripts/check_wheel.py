"""Wheels as they should be: small, complete, free of torch, importable. `python scripts/check_wheel.py dist/*.whl`

For each wheel one line, or one for each fault and exit code 1. Import is tried by the wheel's own Python where that is
on PATH; the platform tag is auditwheel's where it is installed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NEEDED = (
    "noisyseg_fast/py.typed",
    "noisyseg_fast/sample/lidc2d_middle.npz",
    "noisyseg_fast/sample/LICENSE-LIDC.txt",
)
FOREIGN = re.compile(r"torch|c10|\bat::|\b_*cuda[A-Z]|\bcu[A-Z]")
IMPORT = "import noisyseg_fast, sys; print(noisyseg_fast.build_info()['version'], sys.version.split()[0])"


def check(wheel: Path, limit_mb: float) -> tuple[list[str], list[str]]:
    """(facts, faults)"""
    facts, faults = [], []
    size = wheel.stat().st_size / 1e6
    facts.append(f"{size:.1f} MB")
    if size >= limit_mb:
        faults.append(f"{size:.1f} MB, which is not below {limit_mb:g} MB")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(folder)
        faults += [f"{name} is missing" for name in NEEDED if name not in names]
        modules = [n for n in names if re.fullmatch(r"noisyseg_fast/_core\.\S+\.so", n)]
        if len(modules) != 1:
            return facts, [*faults, f"{len(modules)} compiled modules, there must be one"]
        command = ["nm", "-D", "--undefined-only", "--demangle", str(Path(folder) / modules[0])]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        faults += [f"undefined symbol {s.strip()}" for s in symbols.splitlines() if FOREIGN.search(s)][:5]
        tag = re.search(r"cpython-(\d)(\d+)", modules[0])
        python = shutil.which(f"python{tag[1]}.{tag[2]}") if tag else None
        # A shim may stand there without its Python, and a Python without NumPy.
        able = python and not subprocess.run([python, "-c", "import numpy"], capture_output=True).returncode
        here = tag is not None and (int(tag[1]), int(tag[2])) == sys.version_info[:2]
        if here or able:
            command = [
                sys.executable if here else str(python),
                "-I",
                "-c",
                f"import sys; sys.path[:0] = [{folder!r}]; {IMPORT}",
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                faults.append(f"import fails: {done.stderr.strip().splitlines()[-1]}")
            else:
                facts.append("imports on " + done.stdout.split()[1])
        else:
            facts.append(
                f"not imported: no Python {tag[1]}.{tag[2]} with NumPy on PATH" if tag else "not imported"
            )
    audit = shutil.which("auditwheel")
    if audit:
        done = subprocess.run([audit, "show", str(wheel)], capture_output=True, text=True)
        found = re.search(r'"(manylinux\S+|linux\S+)"', done.stdout)
        facts.append(f"auditwheel: {found[1] if found else 'no tag'}")
        if done.returncode or not found or not found[1].startswith("manylinux"):
            faults.append(f"auditwheel: {' '.join((done.stdout + done.stderr).split())[-200:]}")
    return facts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks wheels of noisyseg-fast.")
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--limit-mb", type=float, default=15, help="largest size; 15, of a CPU wheel")
    options = parser.parse_args()
    bad = False
    for wheel in options.wheels:
        facts, faults = check(wheel, options.limit_mb)
        print(f"{wheel.name}: {', '.join(facts)}")
        for fault in faults:
            bad = True
            print(f"{wheel.name}: {fault}", file=sys.stderr)
    sys.exit(bad)


if __name__ == "__main__":
    main()
