"""The README's Python blocks run, in their order, as one program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("torch", "monai", "lightning"):
    pytest.importorskip(package)
ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_code_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 5
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_readme_names_files_that_exist() -> None:
    for name in re.findall(
        r"`((?:bench|csrc|examples|noisyseg_fast|tests)/[\w./-]+)`", (ROOT / "README.md").read_text()
    ):
        assert (ROOT / name).exists(), name
