"""Broken files: each is read, or refused in one line that names it; some of scripts/fuzz_readers.py.

The numbers that hypothesis draws steer the script's mutations, so that it can make a failing file small.
"""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
for _needed in ("monai", "lightning", "nibabel", "h5py"):
    pytest.importorskip(_needed)
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("fuzz_readers", ROOT / "scripts" / "fuzz_readers.py")
fuzz = importlib.util.module_from_spec(_spec)
sys.modules["fuzz_readers"] = fuzz
_spec.loader.exec_module(fuzz)

SEEDS: dict = {}
EXAMPLES = {"checkpoint": 40, "h5": 100, "settings": 150}


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_valid_files_are_read(target, tmp_path):
    for content in fuzz.TARGETS[target][1]():
        assert fuzz.execute(target, content, tmp_path)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_broken_files(target, tmp_path):
    seeds = fuzz.TARGETS[target][1]()

    @settings(
        max_examples=EXAMPLES.get(target, 200), deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def broken(generator):
        try:
            fuzz.execute(target, fuzz.mutated(seeds, generator), tmp_path)
        except fuzz.Bad as error:
            raise AssertionError(str(error)) from error

    broken()


@given(st.binary(max_size=600))
@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_any_bytes(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for target in fuzz.TARGETS:
        if target not in ("checkpoint", "h5"):
            fuzz.execute(target, content, folder)


def test_what_is_bad_is_seen(tmp_path, monkeypatch):
    """Another exception, two lines, no name, no memory."""
    name, seeds, _ = fuzz.TARGETS["json"]
    for error in (
        KeyError("x"),
        ValueError(f"{tmp_path}: a\nb"),
        ValueError("no name"),
        ValueError(f"{tmp_path}: MemoryError"),
    ):

        def reader(path, error=error):
            raise error

        monkeypatch.setitem(fuzz.TARGETS, "json", (name, seeds, reader))
        with pytest.raises(fuzz.Bad):
            fuzz.execute("json", b"", tmp_path)


def test_a_crash_is_a_finding(tmp_path, monkeypatch):
    import faulthandler
    import os

    def crash(path):
        faulthandler.disable()  # pytest's would fill the log
        os.kill(os.getpid(), 11)

    monkeypatch.setitem(fuzz.TARGETS, "json", ("a.json", lambda: [b"{}"], crash))
    done, _, bad = fuzz.isolated("json", [b"{}"], 10, 0, tmp_path, tmp_path / "out")
    assert done == 10 and "ended with status" in bad[0] and list((tmp_path / "out").iterdir())


@pytest.mark.soak
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_hundred_thousand_broken_files(target, tmp_path):
    done, _, bad = fuzz.fuzz(
        target, 100_000, 1e9, random.randrange(1 << 30), tmp_path, ROOT / "fuzz-findings"
    )
    assert done == 100_000 and not bad, bad
