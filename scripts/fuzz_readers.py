"""Broken files by the million: every reader must read each, or refuse it in one line that names it.

    python scripts/fuzz_readers.py                            every target, 100000 executions each
    python scripts/fuzz_readers.py nifti json --executions 1000 --seed 3
    python scripts/fuzz_readers.py npz --atheris --seconds 600        steered by coverage, where atheris is installed

Valid small files are mutated: bits, bytes, numbers that are often borders, pieces cut, doubled, moved and put in from
another file; a packed one also inside, and packed again. Bad, and reported with the file kept in --out: any other
exception, a message of several lines or without the file's name, memory that could not be had, more than SECONDS, a
crash. Each batch runs in a process of its own, so that a crash of a library is a finding and not the end.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 20  # for one file at most
BATCH = 2000  # executions in one process
MEMORY = 1 << 30  # bytes that a process may grow by


class Bad(BaseException):
    """A finding. No Exception, so that no reader takes it for an error of its own."""


# ---- valid files ----------------------------------------------------------------------------------


def _nifti(array: np.ndarray[Any, Any], second: bool = False) -> bytes:
    import nibabel

    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    return kind(array, np.diag([0.7, 0.7, 2.5, 1])).to_bytes()


def _npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _png(array: np.ndarray[Any, Any]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def _h5() -> list[bytes]:
    import h5py

    found = []
    for options in ({}, {"compression": "gzip"}):
        file = io.BytesIO()
        with h5py.File(file, "w") as h5:
            h5.create_dataset("image", data=np.arange(64, dtype=np.float32).reshape(4, 4, 4), **options)
            h5.create_dataset("label", data=np.ones((4, 4, 4), np.uint8), **options)
        found.append(file.getvalue())
    return found


def _nrrd(packed: bool) -> bytes:
    data = np.arange(64, dtype="<i2").tobytes()
    head = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 4 4\n"
        "space directions: (0.6,0,0) (0,0.6,0) (0,0,0.6)\nkinds: domain domain domain\nendian: little\n"
        f"encoding: {'gzip' if packed else 'raw'}\nspace origin: (0,0,0)\n\n"
    )
    return head.encode() + (gzip.compress(data) if packed else data)


def checkpoint() -> bytes:
    """What a tiny run saves."""
    import dataclasses

    import torch

    from noisyseg_fast.training.engine import Config
    from noisyseg_fast.training.model import FORMAT, ModelSpec, spec_dict

    spec = ModelSpec("ce", "unet", 1, 2, 1, 2, (16, 16))
    content = {
        "format": FORMAT,
        "version": "0",
        "model": spec_dict(spec),
        "config": dataclasses.asdict(Config()),
        "method": dict(list(spec.build().state_dict().items())[:6]),
        "epoch": 1,
    }
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


_ENTRY = {
    "image": "a.nii.gz",
    "label": ["b.nii.gz", None],
    "patient": "p",
    "id": 3,
    "clean": True,
    "spacing": [1, 2],
}
_CASES = [{**_ENTRY, "id": i, "patient": f"p{i}", "clean": not i} for i in range(4)]
_LIST = {"training": _CASES, "labels": {"a": 0, "b": 1}}
_SETTINGS = (
    b"method: mean_teacher\noptions: {decay: 0.9}\nlr: 1.0e-3\nepochs: 3\npatch: [32, 32]\nspacing: null\n"
)
_ARRAYS: dict[str, Any] = {
    "image": np.arange(64, dtype=np.float32).reshape(4, 4, 4),
    "mask": np.eye(4, dtype=np.uint8)[None].repeat(4, 0),
}


def _read(path: Path) -> None:
    from noisyseg_fast.training import data

    for what in ("image", "label"):
        data.whole_numbers(path, data.read(path, what)) if what == "label" else data.open_image(
            data.Case("a", "a", (path,), ())
        )


def _open(path: Path) -> None:
    from noisyseg_fast.training import data

    data.open_data(path)


def _patients(path: Path) -> None:
    from noisyseg_fast.training import data

    data._patients(path)


def _settings(path: Path) -> None:
    from noisyseg_fast.training import engine

    engine.load_config(path)


def _run(path: Path) -> None:
    from noisyseg_fast.training import engine

    engine.read_config(path.parent)


def _checkpoint(path: Path) -> None:
    from noisyseg_fast.training import model

    model.spec_of(model.read_checkpoint(path))


# name: file name, valid files, reader
TARGETS: dict[str, tuple[str, Callable[[], list[bytes]], Callable[[Path], None]]] = {
    "nifti": (
        "a.nii",
        lambda: [
            _nifti(np.arange(60, dtype=np.int16).reshape(3, 4, 5)),
            _nifti(np.ones((3, 4), np.float32)),
            _nifti(np.ones((3, 4, 2), np.uint8), second=True),
        ],
        _read,
    ),
    "nifti_gz": (
        "a.nii.gz",
        lambda: [gzip.compress(_nifti(np.arange(60, dtype=t).reshape(3, 4, 5))) for t in ("f4", "u1")],
        _read,
    ),
    "png": (
        "a.png",
        lambda: [_png(np.arange(48, dtype=t).reshape(6, 8)) for t in (np.uint8, np.uint16)],
        _read,
    ),
    "npz": (
        "a.npz",
        lambda: [
            _npz(**_ARRAYS),
            _npz(**_ARRAYS, patient=np.arange(4), case=np.array(list("abcd")), spacing=np.ones((4, 2))),
        ],
        _open,
    ),
    "json": ("a.json", lambda: [json.dumps(_LIST).encode(), json.dumps(_LIST, indent=1).encode()], _open),
    "csv": ("patients.csv", lambda: [b"case,patient,clean\na,1,true\nb,2,\nc,2,false\n"], _patients),
    "settings": (
        "a.yaml",
        lambda: [_SETTINGS, b'{"config": {"lr": 1}, "method_options": {"a": 1}}'],
        _settings,
    ),
    "run": (
        "config.json",
        lambda: [b'{"config": {"data": "sample", "lr": 0.1, "patch": [16, 16], "options": {"a": "1"}}}'],
        _run,
    ),
    "checkpoint": ("a.pt", lambda: [checkpoint()], _checkpoint),
    "h5": ("a.h5", _h5, _read),
    "nrrd": ("a.nrrd", lambda: [_nrrd(False), _nrrd(True)], _read),
}
_WORDS = (
    b'null true false NaN Infinity -1 1e999 [] {} [[[[ "" \\u0000 ../../etc/passwd & * &a *a << : - # !!python/object '
    b"&a [*a,*a] 0x .nii.gz _0000 case patient"
).split(b" ")
_NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
)


# ---- mutation -------------------------------------------------------------------------------------


def mutated(seeds: list[bytes], generator: random.Random) -> bytes:
    """One of the files, with one to five changes."""
    content = generator.choice(seeds)
    if content[:2] == b"\x1f\x8b" and generator.random() < 0.6:
        return gzip.compress(_changed(gzip.decompress(content), seeds, generator), 1)
    if content[:4] == b"PK\x03\x04" and generator.random() < 0.6:
        return _repacked(content, seeds, generator)
    return _changed(content, seeds, generator)


def _repacked(content: bytes, seeds: list[bytes], generator: random.Random) -> bytes:
    """The archive with one member changed, and checksums that are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        members = old.infolist()
        chosen = generator.randrange(len(members))
        for i, member in enumerate(members):
            part = old.read(member)
            kind = zipfile.ZIP_DEFLATED if generator.random() < 0.05 else zipfile.ZIP_STORED
            new.writestr(member.filename, _changed(part, seeds, generator) if i == chosen else part, kind)
    return out.getvalue()


def _changed(content: bytes, seeds: list[bytes], generator: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(generator.randint(1, 5)):
        # Headers stand at the beginning: half of the changes go there.
        end = len(data) if generator.random() < 0.5 else min(len(data), 400)
        at = generator.randrange(end + 1)
        kind = generator.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = generator.randrange(256)
        elif kind == 2:
            form = generator.choice("<>") + generator.choice("BHIQ")
            width = struct.calcsize(form)
            value = generator.choice(_NUMBERS) % (1 << 8 * width)
            data[at : at + width] = struct.pack(form, value)
        elif kind == 3:
            value = generator.choice(
                (0.0, -0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"), -float("inf"))
            )
            data[at : at + 4] = struct.pack(generator.choice("<>") + "f", value)
        elif kind == 4:
            del data[at : at + generator.choice((1, 2, 4, 16, 100))]
        elif kind == 5:
            piece = data[at : at + generator.choice((1, 2, 8, 40))]
            data[at:at] = piece * generator.choice((1, 1, 2, 50))
        elif kind == 6:
            del data[at:]
        elif kind == 7:
            data[at:at] = generator.choice(_WORDS)
        else:
            other = generator.choice(seeds)
            start = generator.randrange(len(other) + 1)
            length = generator.choice((4, 16, 64, 348))
            data[at : at + length] = other[start : start + length]
    return bytes(data)


# ---- execution ------------------------------------------------------------------------------------


def execute(target: str, content: bytes, folder: Path) -> bool:
    """Whether the file was read; False where it was refused as it should be. Bad otherwise."""
    name, _, reader = TARGETS[target]
    path = folder / name
    path.write_bytes(content)
    try:
        reader(path)
    except ValueError as error:  # DataError among them
        text = str(error)
        # Of a list that can be read, a wrong share or size needs no file's name.
        if len(text.splitlines()) != 1 or (str(folder) not in text and str(path) not in text):
            raise Bad(f"message {text!r}") from error
        if "Unable to allocate" in text or "MemoryError" in text:
            raise Bad(f"memory: {text}") from error
        return False
    except Exception as error:
        raise Bad(f"{type(error).__name__}: {error}") from error
    return True


def _late(number: int, frame: Any) -> None:
    raise Bad(f"more than {SECONDS} s")


Result = tuple[int, int, list[str]]  # executions, files read, findings


def batch(target: str, seeds: list[bytes], count: int, seed: int, folder: Path, out: Path) -> Result:
    """`count` mutated files."""
    generator, read, bad = random.Random(seed), 0, []
    signal.signal(signal.SIGALRM, _late)
    for _ in range(count):
        content = mutated(seeds, generator)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read += execute(target, content, folder)
        except Bad as error:
            out.mkdir(parents=True, exist_ok=True)
            kept = out / f"{target}-{seed}-{len(bad)}"
            kept.write_bytes(content)
            bad.append(f"{kept}: {error}")
            if len(bad) > 20:
                break
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return count, read, bad


def isolated(*arguments: Any) -> Result:
    """`batch` in a process of its own, whose memory is bounded."""
    target, _, count, seed, folder, out = arguments
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        result = batch(*arguments)
        with os.fdopen(writing, "w") as file:
            json.dump(result, file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if not text:
        kept = out / f"{target}-{seed}-crash"
        out.mkdir(parents=True, exist_ok=True)
        kept.write_bytes((folder / TARGETS[target][0]).read_bytes())
        return count, 0, [f"{kept}: the process ended with status {status}"]
    executions, read, bad = json.loads(text)
    return executions, read, bad


def fuzz(target: str, executions: int, seconds: float, seed: int, folder: Path, out: Path) -> Result:
    seeds = TARGETS[target][1]()
    for content in seeds:
        try:
            if not execute(target, content, folder):  # imports all that is needed, before the forks
                return 1, 0, ["a valid file was refused"]
        except Bad as error:
            return 1, 0, [f"a valid file: {error}"]
    done, read, bad, start = 0, 0, [], time.monotonic()
    while done < executions and time.monotonic() - start < seconds and len(bad) < 100:
        count = min(BATCH, executions - done)
        result = isolated(target, seeds, count, seed * 1_000_003 + done, folder, out)
        done, read, bad = done + result[0], read + result[1], bad + result[2]
    return done, read, bad


def by_atheris(target: str, executions: int, seconds: float, folder: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(
        include=["noisyseg_fast.training.data", "noisyseg_fast.training.untrusted"]
    ):
        import noisyseg_fast.training.data
        import noisyseg_fast.training.untrusted  # noqa: F401
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, content in enumerate(TARGETS[target][1]()):
        (corpus / str(i)).write_bytes(content)

    def one(content: bytes) -> None:
        execute(target, content, folder)

    options = [
        f"-runs={executions}",
        f"-max_total_time={int(seconds)}",
        "-max_len=8192",
        f"-timeout={SECONDS}",
    ]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=4096", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--executions", type=int, default=100_000, help="of each target")
    parser.add_argument("--seconds", type=float, default=1e9, help="for each target at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--atheris", action="store_true")
    chosen = parser.parse_args()
    total = found = 0
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        for target in chosen.targets or TARGETS:
            if target not in TARGETS:
                parser.error(f"unknown target {target!r}; choose from {', '.join(TARGETS)}")
            start = time.monotonic()
            if chosen.atheris:
                by_atheris(target, chosen.executions, chosen.seconds, Path(name))
            done, read, bad = fuzz(
                target, chosen.executions, chosen.seconds, chosen.seed, Path(name), chosen.out.absolute()
            )
            print(
                f"{target}: {done} executions, {read} read, {done - read - len(bad)} refused, {len(bad)} bad, "
                f"{time.monotonic() - start:.0f} s"
            )
            for line in bad:
                print(f"  {line}")
            sys.stdout.flush()
            total, found = total + done, found + len(bad)
    print(f"{total} executions, {found} bad")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
