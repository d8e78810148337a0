"""These tests need a CUDA device and a build with CUDA kernels; everywhere else they are skipped.

The CPU kernels are the oracle: tests/ holds them to reference.py and to the peers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def _missing() -> str | None:
    import noisyseg_fast

    try:
        import torch
    except ImportError:
        return "needs torch"
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if noisyseg_fast.build_info()["cuda"] is None:
        return "needs a build with CUDA kernels (FORCE_CUDA=1)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    reason = _missing() if here else None
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "small: part of what compute-sanitizer watches (bench/gpu/run.sh)")


@pytest.fixture
def room() -> object:
    """room(gigabytes) skips the test when the device has less free memory."""

    def need(gigabytes: float) -> None:
        import torch

        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GiB of free device memory, {free:.0f} are there")

    return need
