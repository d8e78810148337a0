"""Kernels run without Python's global lock: other threads, such as those that load data, go on meanwhile."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from noisyseg_fast import _core, distance, labels, metrics, noise

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "python").glob("*.cpp"))
# That compute a size, or set something, and no more.
QUICK = re.compile(r".*_workspace|build_info|use_huge_pages|overlap_result|cell_areas")


def definitions():
    """(name, text) of every function of the compiled module."""
    for source in SOURCES:
        for part in re.split(r"\bm\.def\(", source.read_text())[1:]:
            name = re.match(r'\s*"(\w+)"', part)
            assert name, part[:80]
            depth, end = 1, 0
            while depth:
                depth += {"(": 1, ")": -1}.get(part[end], 0)
                end += 1
            yield name[1], part[:end]


def test_every_kernel_says_so():
    found = dict(definitions())
    assert len(found) > 30
    release = re.compile(r"release_gil\(\)|gil_scoped_release release;")
    assert [
        name for name, text in found.items() if not release.search(text) and not QUICK.fullmatch(name)
    ] == []


MASKS = np.random.default_rng(0).random((4, 96, 96, 96)) < 0.3
CALLS = {
    "distance_transform_edt": lambda: distance.distance_transform_edt(MASKS[0]),
    "majority_vote": lambda: labels.majority_vote(MASKS.view(np.uint8)),
    "connected_components": lambda: noise.connected_components(MASKS[0]),
    "overlap_metrics": lambda: metrics.overlap_metrics(MASKS[0], MASKS[1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_thread_goes_on_meanwhile(monkeypatch, name):
    """Python's own switching is off, so that the other thread counts only while a call has let go of the lock."""
    count, seen, done = 0, 0, False

    def counting():
        nonlocal count
        while not done:
            count += 1
            time.sleep(0)  # lets go of the lock

    for kernel, function in vars(_core).items():
        if callable(function) and not QUICK.fullmatch(kernel) and not kernel.startswith("_"):

            def watched(*args, function=function):
                nonlocal seen
                before = count
                result = function(*args)
                seen += count - before
                return result

            monkeypatch.setattr(_core, kernel, watched)
    interval, thread = sys.getswitchinterval(), threading.Thread(target=counting, daemon=True)
    sys.setswitchinterval(30)
    try:
        thread.start()
        for _ in range(200):
            CALLS[name]()
            if seen:
                break
    finally:
        done = True
        sys.setswitchinterval(interval)
        thread.join()
    assert seen
