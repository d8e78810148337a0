"""Bad files and settings: what each command says, exactly, in one line, with exit code 2, and that nothing is written.

The tables below are the source of docs/bad-input.md; `python tests/test_bad_files.py` writes it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for _needed in ("monai", "lightning", "nibabel", "typer", "rich", "h5py"):
    pytest.importorskip(_needed)

import nibabel  # noqa: E402
from folders import blob, save_nifti  # noqa: E402
from PIL import Image  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from noisyseg_fast import cli  # noqa: E402
from noisyseg_fast.training import untrusted  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "bad-input.md"
SIZE = (32, 32)
AFFINE = np.diag([0.5, 0.5, 2.0, 1.0])


class Bad(NamedTuple):
    what: str
    name: str  # of the file
    make: Callable[[Path], Any]  # writes it
    message: str  # FILE stands for its path, DIR for the folder it is in
    commands: tuple[str, ...] = ()


# ---- makers ---------------------------------------------------------------------------------------


def array(values: Any, affine: Any = AFFINE) -> Callable[[Path], Any]:
    return lambda path: save_nifti(path, np.asarray(values), affine)


def content(data: bytes | str) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def plain() -> bytes:
    """A NIfTI file of 32x32 float32 that is all right: 352 + 4096 bytes."""
    return nibabel.Nifti1Image(blob(SIZE, 0)[0], AFFINE).to_bytes()


def patched(at: int, form: str, *values: Any, packed: bool = True) -> Callable[[Path], Any]:
    """That file with other values in its header."""

    def make(path: Path) -> None:
        data = bytearray(plain())
        struct.pack_into("<" + form, data, at, *values)
        path.write_bytes(gzip.compress(data) if packed else bytes(data))

    return make


def image(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        values, _ = blob(SIZE, 0)
        save_nifti(path, change(values), AFFINE)

    return make


def put(value: float, dtype: Any = np.float32) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values = values.astype(dtype)
        values[3, 4] = value
        return values

    return change


def colours(path: Path) -> None:
    pixels = np.zeros((*SIZE, 1), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(pixels, AFFINE), path)


def other_checksum(path: Path) -> None:
    data = bytearray(gzip.compress(plain()))
    data[-8] ^= 1
    path.write_bytes(data)


def extended(path: Path) -> None:
    data = bytearray(plain())
    struct.pack_into("<f", data, 108, 384)
    path.write_bytes(
        bytes(data[:348]) + struct.pack("<4sii24s", b"\1", 2**31 - 16, 4, b"") + bytes(data[352:])
    )


def bomb(path: Path) -> None:
    """100 MB of zeros in 100 KB, and a header that is right."""
    data = bytearray(plain())
    struct.pack_into("<8h", data, 40, 3, 500, 500, 100, 1, 1, 1, 1)
    path.write_bytes(gzip.compress(bytes(data[:352]) + bytes(100_000_000)))


def png(array: Any, mode: str | None = None) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        picture = Image.fromarray(np.asarray(array))
        (picture.convert(mode) if mode else picture).save(path)

    return make


def cut(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def shorter(path: Path) -> None:
        make(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    return shorter


# ---- images ---------------------------------------------------------------------------------------

GREY = (np.arange(1024) % 256).astype(np.uint8).reshape(SIZE)
CUT = "it is cut off or its header is wrong"
NIFTI = "FILE: cannot be read as NIfTI: "
IMAGES = [
    Bad("An empty file", "a.nii.gz", content(b""), NIFTI + "it is empty"),
    Bad("Text", "a.nii", content("no image"), NIFTI + "it does not begin as one, but with b'no i'"),
    Bad("Text named .nii.gz", "a.nii.gz", content("no image"), NIFTI + "it is not compressed by gzip"),
    Bad(
        "Something else, compressed", "a.nii.gz", content(gzip.compress(b"no image")),
        NIFTI + "it does not begin as one, but with b'no i'",
    ),
    Bad(
        "Cut off while compressed", "a.nii.gz", cut(image(lambda a: a)),
        NIFTI + "Compressed file ended before the end-of-stream marker was reached",
    ),
    Bad(
        "Cut off", "a.nii", cut(image(lambda a: a)),
        "FILE: announces 4.45 KB of data, which SIZE in the file cannot hold; " + CUT,
    ),
    Bad("Cut off in the header", "a.nii", content(plain()[:300]), NIFTI + "it ends in its header"),
    Bad(
        "Damaged while compressed", "a.nii.gz", other_checksum,
        NIFTI + "its checksum is wrong",
    ),
    Bad(
        "Another magic", "a.nii.gz", patched(344, "4s", b"ni1\0"),
        NIFTI + "its magic is b'ni1', not b'n+1'; store .hdr and .img as one file",
    ),
    Bad("An unknown data type", "a.nii.gz", patched(70, "h", 777), NIFTI + "its data type 777 is unknown"),
    Bad(
        "A size that no file has", "a.nii.gz", patched(40, "8h", 3, 30000, 30000, 30000, 1, 1, 1, 1),
        "FILE: announces 108 TB of data, which SIZE in the file cannot hold; it is cut off or its header is wrong",
    ),
    Bad(
        "The same, uncompressed", "a.nii", patched(40, "8h", 3, 30000, 30000, 30000, 1, 1, 1, 1, packed=False),
        "FILE: announces 108 TB of data, which SIZE in the file cannot hold; it is cut off or its header is wrong",
    ),
    Bad("A bomb: more than the memory holds", "a.nii.gz", bomb, "FILE: needs 100 MB of memory, there are 50 MB"),
    Bad(
        "Data that begin in the header", "a.nii", patched(108, "f", 0, packed=False),
        NIFTI + "its data begin at byte 0",
    ),
    Bad(
        "A length of a header's extension that cannot be", "a.nii", extended,
        NIFTI + "the extensions of its header are damaged",
    ),
    Bad(
        "A size of 0", "a.nii.gz", patched(40, "8h", 3, 32, 0, 1, 1, 1, 1, 1),
        "FILE: has shape (32, 0, 1); a 2D image or a 3D volume is needed",
    ),
    Bad(
        "Four axes", "a.nii.gz", array(np.zeros((4, 4, 4, 2), np.float32)),
        "FILE: has shape (4, 4, 4, 2); a 2D image or a 3D volume is needed",
    ),
    Bad("Colours", "a.nii.gz", colours, "FILE: holds colours (RGB); grey intensities or labels are needed"),
    Bad(
        "Complex numbers", "a.nii.gz", array(np.ones(SIZE, np.complex64)),
        "FILE: intensities must be real numbers, not complex64",
    ),
    Bad(
        "NaN", "a.nii.gz", image(put(np.nan)),
        "FILE: 1 of 1024 intensities are not finite; replace NaN and infinity",
    ),
    Bad(
        "Infinity", "a.nii", image(put(np.inf)),
        "FILE: 1 of 1024 intensities are not finite; replace NaN and infinity",
    ),
    Bad(
        "Intensities beyond 32-bit floats", "a.nii.gz", image(put(-1e300, np.float64)),
        "FILE: intensities reach 1e+300, beyond 1e+37; scale them down",
    ),
    Bad(
        "A spacing of 0", "a.nii.gz", patched(80, "2f", 0, 0.5),
        "FILE: voxel spacing in the header must be positive and finite, got (0, 0.5)",
    ),
    Bad(
        "A negative spacing", "a.nii.gz", patched(80, "2f", 0.5, -0.5),
        "FILE: voxel spacing in the header must be positive and finite, got (0.5, -0.5)",
    ),
    Bad(
        "A spacing of NaN", "a.nii.gz", patched(80, "2f", float("nan"), 0.5),
        "FILE: voxel spacing in the header must be positive and finite, got (nan, 0.5)",
    ),
    Bad(
        "An affine with NaN", "a.nii.gz", patched(280, "f", float("nan")),
        "FILE: the affine in the header must be finite",
    ),
    Bad(
        "Text named .png", "a.png", content("no image"),
        "FILE: cannot be read as PNG: it is something else, or cut off",
    ),
    Bad(
        "A JPEG named .png", "a.png", lambda path: Image.fromarray(GREY).save(path, "JPEG"),
        "FILE: cannot be read as PNG: it is something else, or cut off",
    ),
    Bad("A PNG cut off", "a.png", cut(png(GREY)), "FILE: cannot be read as PNG: image file is truncated"),
    Bad(
        "A PNG with transparency", "a.png", png(GREY, "RGBA"),
        "FILE: PNG of mode RGBA; use grey (8 or 16 bit) or RGB",
    ),
]  # fmt: skip

# ---- masks ----------------------------------------------------------------------------------------

MASK = blob(SIZE, 0)[1]
TRAIN, ALL = ("train",), ("train", "fuse", "corrupt")
NAMED = '; name the classes in "labels" of dataset.json or the datalist, or, if it marks pixels without a label, set '
MASKS = [
    Bad(
        "Another shape than its image", "a.nii.gz", array(MASK[:, :31]),
        "FILE: shape (32, 31) differs from (32, 32) of its image IMAGE", TRAIN,
    ),
    Bad(
        "Another affine than its image", "a.nii.gz", array(MASK, np.diag([1, 1, 2, 1.0])),
        "FILE: affine [1 0 0 0; 0 1 0 0; 0 0 2 0] differs from [0.5 0 0 0; 0 0.5 0 0; 0 0 2 0] of its image IMAGE; "
        "resample the mask onto the image", TRAIN,
    ),
    Bad(
        "A label that no class has", "a.nii.gz", array(MASK * 3),
        f"FILE: label 3 is out of range 0..1{NAMED}ignore_label (--ignore-label 3)", TRAIN,
    ),
    Bad(
        "A negative label", "a.nii.gz", array(-MASK.astype(np.int16)),
        f"FILE: label -1 is out of range 0..1{NAMED}ignore_label (--ignore-label -1)", TRAIN,
    ),
    Bad(
        "A negative label", "a.nii.gz", array(-MASK.astype(np.int16)),
        "FILE: labels must not be negative, found -1", ("corrupt",),
    ),
    Bad("Fractions", "a.nii.gz", array(MASK * np.float32(0.5)), "FILE: labels must be whole numbers, found 0.5", ALL),
    Bad("NaN", "a.nii.gz", array(put(np.nan)(MASK)), "FILE: labels must be whole numbers, found nan", ALL),
    Bad("Infinity", "a.nii.gz", array(put(np.inf)(MASK)), "FILE: labels must be within 2^31, found inf", ALL),
    Bad(
        "Complex numbers", "a.nii.gz", array(MASK.astype(np.complex64)),
        "FILE: labels must be whole numbers, not complex64", ALL,
    ),
    Bad("Colours", "a.nii.gz", colours, "FILE: holds colours (RGB); grey intensities or labels are needed", ALL),
    Bad("Text named .nii.gz", "a.nii.gz", content("no mask"), NIFTI + "it is not compressed by gzip", ALL),
    Bad("Damaged while compressed", "a.nii.gz", other_checksum, NIFTI + "its checksum is wrong", ALL),
]  # fmt: skip

# ---- sets of data ---------------------------------------------------------------------------------


def write(folder: Path, case: str = "case", raters: bool = False, count: int = 4, mask: Any = None) -> None:
    """imagesTr and labelsTr of 2D NIfTI images."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        values, inside = blob(SIZE, i)
        save_nifti(folder / "imagesTr" / f"{case}{i}.nii.gz", values, AFFINE)
        save_nifti(folder / "labelsTr" / f"{case}{i}.nii.gz", inside if mask is None else mask, AFFINE)


def datalist(entry: dict[str, Any], **more: Any) -> Callable[[Path], Any]:
    """A datalist beside a folder that is all right, of which one entry is changed."""

    def make(path: Path) -> None:
        write(path.parent / "set")
        entries = [
            {"image": f"set/imagesTr/case{i}.nii.gz", "label": f"set/labelsTr/case{i}.nii.gz"}
            for i in range(4)
        ]
        entries[0] |= entry
        path.write_text(json.dumps({"training": entries, **more}))

    return make


def folder(change: Callable[[Path], Any] = lambda path: None, **how: Any) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        write(path, **how)
        change(path)

    return make


def npz(**more: Any) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        images, masks = zip(*(blob(SIZE, i) for i in range(4)), strict=True)
        arrays = {"image": np.stack(images), "mask": np.stack(masks), **more}
        np.savez(path, **{name: value for name, value in arrays.items() if value is not None})

    return make


def member(header: str, data: bytes, packed: bool = False) -> Callable[[Path], Any]:
    """An .npz whose image has that header."""

    def make(path: Path) -> None:
        method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        text = header.encode().ljust(117) + b"\n"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("image.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)

    return make


class Evil:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> Any:
        return os.system, ("touch unpickled",)


def atrium(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The lists of the Left Atrium set; the first case as `change` writes it."""

    def make(path: Path) -> None:
        import h5py

        path.mkdir()
        names = [f"c{i}" for i in range(4)]
        for name in names:
            (path / name).mkdir()
            with h5py.File(path / name / "mri_norm2.h5", "w") as file:
                values, mask = blob((16, 16, 16), 0)
                file["image"], file["label"] = values, mask
        (path / "train.list").write_text("\n".join(names[:3]))
        (path / "test.list").write_text(names[3])
        (path / "labelled.list").write_text("c0\nc1\nc2")
        change(path)

    return make


def hdf5(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """The image of the first case another one."""

    def make(path: Path) -> None:
        import h5py

        with h5py.File(path / "c0" / "mri_norm2.h5", "r+") as file:
            del file["image"]
            change(file)

    return atrium(make)


def linked(file: Any) -> None:
    import h5py

    file["image"] = h5py.ExternalLink("/etc/passwd", "/")


def elsewhere(file: Any) -> None:
    space = [("/etc/passwd", 0, 4096)]
    file.create_dataset("image", (16, 16, 16), "u1", external=space)


def nrrd(head: str, data: bytes = b"") -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        (path / "c0" / "mri_norm2.h5").unlink()
        for name in ("lgemri", "laendo"):
            (path / "c0" / f"{name}.nrrd").write_bytes(f"NRRD0004\n{head}\n\n".encode() + data)

    return atrium(change)


def latin(path: Path) -> None:
    images = os.fsencode(path / "imagesTr")
    os.rename(images + b"/case1.nii.gz", images + b"/\xe9.nii.gz")


SHORT = "type: short\ndimension: 3\nendian: little\n"
H5, NRRD = "FILE/c0/mri_norm2.h5: ", "FILE/c0/lgemri.nrrd: "
OUTSIDE = "move it there, or name a folder that holds all files (--data-root)"
ENTRY = "FILE: training[0]: "
DATA = [
    Bad(
        "Nothing there", "none", lambda path: None,
        'FILE: no such data; pass "sample", a folder, a datalist .json or an .npz',
    ),
    Bad(
        "An empty folder", "set", lambda path: path.mkdir(),
        "FILE: has no folder imagesTr (layout of nnU-Net: imagesTr, labelsTr)",
    ),
    Bad("No images", "set", folder(count=0), "FILE/imagesTr: holds no images (.nii.gz, .nii, .png)"),
    Bad(
        "Two files of one case", "set",
        folder(lambda path: png(GREY)(path / "labelsTr" / "case1.png")),
        "FILE/labelsTr/case1.png: is the same case as case1.nii.gz; leave one of them",
    ),
    Bad(
        "A file gone", "set", folder(lambda path: (path / "labelsTr" / "case1.nii.gz").unlink()),
        "FILE/imagesTr/case1.nii.gz: has no label case1 in FILE/labelsTr (as case1.nii.gz or case1_rater0.nii.gz, "
        "...); images without labels belong in imagesUn",
    ),
    Bad(
        "A symbolic link to nothing", "set",
        folder(lambda path: [
            (path / "imagesTr" / "case1.nii.gz").unlink(),
            (path / "imagesTr" / "case1.nii.gz").symlink_to("nothing"),
        ]),
        "FILE/imagesTr/case1.nii.gz: no such file",
    ),
    Bad(
        "No foreground at all", "set", folder(mask=np.zeros(SIZE, np.uint8)),
        "FILE: the masks to train on are all background; nothing can be learned",
    ),
    Bad(
        "A name that is not UTF-8", "set",
        folder(latin),
        "FILE/imagesTr: the file name b'\\xe9.nii.gz' is not UTF-8; rename it",
    ),
    Bad(
        "A patient's row without a patient", "set",
        folder(lambda path: (path / "patients.csv").write_text("case,patient\ncase0\n")),
        "FILE/patients.csv: row 2 lacks its case or its patient",
    ),
    Bad(
        "A case of two patients", "set",
        folder(lambda path: (path / "patients.csv").write_text("case,patient\ncase0,a\ncase0,b\n")),
        "FILE/patients.csv: case 'case0' has two patients, 'a' and 'b'",
    ),
    Bad("A datalist that is no JSON", "a.json", content("{"),
        "FILE: cannot be read as JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    Bad("JSON nested too deeply", "a.json", content("[" * 100_000), "FILE: cannot be read as JSON: nested too deeply"),
    Bad(
        "JSON in another encoding", "a.json", content(b'{"\xe9": 1}'),
        "FILE: cannot be read as JSON: byte 2 is not UTF-8",
    ),
    Bad("An empty training set", "a.json", content('{"training": []}'), "FILE: has no training cases"),
    Bad(
        "A part that is no list", "a.json", datalist({}, test={"image": "x"}),
        'FILE: "test" must be a list of {"image": ..., "label": ...}',
    ),
    Bad(
        "A path out of the folder", "a.json", datalist({"image": "../../../etc/a.png"}),
        ENTRY + "../../../etc/a.png lies outside DIR; " + OUTSIDE,
    ),
    Bad(
        "An absolute path out of the folder", "a.json", datalist({"label": "/etc/a.nii.gz"}),
        ENTRY + "/etc/a.nii.gz lies outside DIR; " + OUTSIDE,
    ),
    Bad(
        "Another kind of file", "a.json", datalist({"image": "/etc/passwd"}),
        ENTRY + "/etc/passwd lies outside DIR; " + OUTSIDE,
    ),
    Bad(
        "A case twice", "a.json", datalist({"id": "case1"}), 'FILE: two entries have the id case1; give them an "id"',
    ),
    Bad(
        "A spacing of NaN", "a.json", datalist({"spacing": [float("nan"), 1]}),
        ENTRY + '"spacing" must be a list of positive numbers, got [nan, 1]',
    ),
    Bad(
        "A spacing as text", "a.json", datalist({"spacing": "11"}),
        ENTRY + '"spacing" must be a list of positive numbers, got \'11\'',
    ),
    Bad(
        "An id that is a list", "a.json", datalist({"id": [1]}), ENTRY + '"id" must be text or a number, got [1]',
    ),
    Bad("No .npz", "a.npz", content("no arrays"), "FILE: cannot be read as .npz: it is no zip archive, or cut off"),
    Bad("An .npz cut off", "a.npz", cut(npz()), "FILE: cannot be read as .npz: it is no zip archive, or cut off"),
    Bad(
        "A pickle bomb in an .npz", "a.npz", npz(patient=np.array([Evil()] * 4, dtype=object)),
        "FILE: cannot be read as .npz: patient.npy holds Python objects, which are not read",
    ),
    Bad(
        "A pickle named .npz", "a.npz", lambda path: path.write_bytes(pickle.dumps(Evil())),
        "FILE: cannot be read as .npz: it is no zip archive, or cut off",
    ),
    Bad(
        "An .npy named .npz", "a.npz", lambda path: np.save(path.open("wb"), np.ones(3)),
        "FILE: cannot be read as .npz: it is no zip archive, or cut off",
    ),
    Bad(
        "A size that no file has", "a.npz",
        member("{'descr': '<f4', 'fortran_order': False, 'shape': (60000, 60000, 60000)}", bytes(64)),
        "FILE: cannot be read as .npz: image.npy is cut off or its header is wrong",
    ),
    Bad(
        "A bomb: more than the memory holds", "a.npz",
        member("{'descr': '|u1', 'fortran_order': False, 'shape': (100000000,)}", bytes(100_000_000), packed=True),
        "FILE: needs 100 MB of memory, there are 50 MB",
    ),
    Bad(
        "An array of one number", "a.npz", npz(image=np.float32(1)),
        "FILE: image must be (N, *S) with at least one pixel, got ()",
    ),
    Bad("NaN in an .npz", "a.npz", npz(image=np.full((4, *SIZE), np.nan)),
        "FILE: image must hold finite real numbers, within 1e+37"),
    Bad(
        "A list of cases that leads elsewhere", "set",
        atrium(lambda path: (path / "train.list").write_text("../c0\nc1")),
        "FILE/train.list: '../c0' is no name of a folder",
    ),
    Bad(
        "HDF5 cut off", "set", atrium(lambda path: cut(lambda p: None)(path / "c0" / "mri_norm2.h5")),
        H5 + 'cannot be read as HDF5 with "image" and "label": Unable to synchronously open file (truncated file',
    ),
    Bad("HDF5 linked to another file", "set", hdf5(linked), H5 + '"image" is no array of this file'),
    Bad("HDF5 with its data in another file", "set", hdf5(elsewhere), H5 + '"image" is no array of this file'),
    Bad(
        "HDF5 of a size that no file has", "set",
        hdf5(lambda file: file.create_dataset("image", (60000,) * 3, "f4", chunks=(64, 64, 64))),
        H5 + "announces 864 TB of data, which",
    ),
    Bad(
        "HDF5 of text", "set", hdf5(lambda file: file.create_dataset("image", data="no image")),
        H5 + '"image" has shape () and type object; a volume of numbers is needed',
    ),
    Bad(
        "NRRD of a size that no file has", "set", nrrd(SHORT + "sizes: 60000 60000 60000\nencoding: raw"),
        NRRD + "announces 432 TB of data, which 0 bytes in the file cannot hold; it is cut off or its header is wrong",
    ),
    Bad(
        "NRRD with its data in another file", "set",
        nrrd(SHORT + "sizes: 4 4 4\nencoding: raw\ndata file: /etc/passwd"),
        NRRD + "its data are in another file, '/etc/passwd'; store them in one",
    ),
    Bad(
        "NRRD of another encoding", "set", nrrd(SHORT + "sizes: 4 4 4\nencoding: bzip2"),
        NRRD + "encoding 'bzip2' is not read; use raw or gzip, without skips",
    ),
    Bad(
        "NRRD of four axes", "set", nrrd("type: short\ndimension: 4\nsizes: 4 4 4 4\nencoding: raw", bytes(512)),
        NRRD + "has sizes '4 4 4 4' and type 'short'; a volume is needed",
    ),
]  # fmt: skip

# ---- settings, runs, checkpoints ------------------------------------------------------------------

ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
NO = "FILE: is no configuration ({})".format
SETTINGS = [
    Bad("An unknown setting", "a.yaml", content("metod: ce"), NO("unknown setting 'metod'; did you mean 'method'?")),
    Bad("A setting of another type", "a.yaml", content("epochs: 1.5"), NO("epochs must be a whole number, got 1.5")),
    Bad("Text for a number", "a.yaml", content("lr: fast"), NO("lr must be a number, got 'fast'")),
    Bad("A number for text", "a.yaml", content("network: 3"), NO("network must be text, got 3")),
    Bad("Yes for a number", "a.yaml", content("seed: yes"), NO("seed must be a whole number, got True")),
    Bad("A size as text", "a.yaml", content("patch: 96x96"), NO("patch must be a list of whole numbers, got '96x96'")),
    Bad("Options as a list", "a.yaml", content("options: [1]"), NO("options must be NAME: VALUE pairs, got [1]")),
    Bad("lr NaN", "a.yaml", content("lr: .nan"), "lr must be positive and finite, got nan"),
    Bad("lr infinite", "a.yaml", content("lr: .inf"), "lr must be positive and finite, got inf"),
    Bad("A list", "a.yaml", content("[1, 2]"), NO("must hold NAME: VALUE, one a line")),
    Bad("Nothing", "a.yaml", content(""), NO("must hold NAME: VALUE, one a line")),
    Bad(
        "A bomb of aliases", "a.yaml", content(ALIASES),
        NO("YAML aliases, *NAME, are not taken; write the values out"),
    ),
    Bad("Nested too deeply", "a.yaml", content("[" * 90_000), NO("nested too deeply")),
    Bad(
        "Python objects", "a.yaml", content("lr: !!python/object/apply:os.system ['touch unpickled']"),
        NO("could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system', line 1"),
    ),
    Bad("A date that there is not", "a.yaml", content("lr: 2020-13-45"), NO("month must be in 1..12")),
    Bad("Another encoding", "a.yaml", content(b"data: \xe9"), NO("byte 6 is not UTF-8")),
    Bad("More than 100 KB", "a.yaml", content("#" * 100_001), NO("larger than 100 KB")),
]  # fmt: skip

RUN = "FILE: is no configuration of this version ({})".format
RUNS = [
    Bad("No JSON", "config.json", content("no"),
        RUN("cannot be read as JSON: Expecting value: line 1 column 1 (char 0)")),
    Bad("Nested too deeply", "config.json", content("[" * 100_000), RUN("cannot be read as JSON: nested too deeply")),
    Bad("Nothing in it", "config.json", content("{}"), RUN("'config'")),
    Bad("A list in place of settings", "config.json", content('{"config": [16, 16]}'),
        RUN("needs the name of each setting, got [16, 16]")),
    Bad("An unknown setting", "config.json", content('{"config": {"x": 1}}'), RUN("unknown setting 'x'")),
    Bad(
        "Another type", "config.json", content('{"config": {"lr": "x"}}'), RUN("lr must be a number, got 'x'"),
    ),
]  # fmt: skip


def saved(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """A checkpoint, changed."""

    def make(path: Path) -> None:
        state = torch.load(path.parent / "good.pt", weights_only=True)
        change(state)
        torch.save(state, path)

    return make


def packed(path: Path) -> None:
    """A checkpoint whose members are compressed."""
    with (
        zipfile.ZipFile(path.parent / "good.pt") as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))


def bytearrays(path: Path) -> None:
    """A pickle that torch itself would take, of 60 GB."""
    file = io.BytesIO()
    torch.save({"a": 1}, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\xf8\x0d\x85R."
            new.writestr(name, bomb if name.endswith("data.pkl") else old.read(name))


def nan_weight(state: dict[str, Any]) -> None:
    next(iter(state["method"].values())).view(-1)[0] = float("nan")


CHECK = "FILE: cannot be read as a checkpoint: "
CHECKPOINTS = [
    Bad("Nothing there", "none.pt", lambda path: None, "FILE: no such checkpoint"),
    Bad("Text", "a.pt", content("no checkpoint"), CHECK + "it is no zip archive, or cut off"),
    Bad(
        "Cut off", "a.pt", cut(saved(lambda state: None)), CHECK + "it is no zip archive, or cut off",
    ),
    Bad(
        "A pickle bomb", "a.pt", lambda path: torch.save({"format": 1, "method": Evil()}, path),
        CHECK + "it asks for 'posix.system'; only tensors and plain values are read",
    ),
    Bad(
        "A bare pickle", "a.pt", lambda path: path.write_bytes(pickle.dumps(Evil())),
        CHECK + "it is no zip archive, or cut off",
    ),
    Bad(
        "A bomb that torch would load", "a.pt", bytearrays,
        CHECK + "it asks for 'builtins.bytearray'; only tensors and plain values are read",
    ),
    Bad("Compressed members", "a.pt", packed, CHECK + "it is packed, which torch.save never does"),
    Bad("Of another program", "a.pt", lambda path: torch.save({"weights": torch.ones(3)}, path),
        "FILE: is no checkpoint of noisyseg-fast (format 1)"),
    Bad("Without weights", "a.pt", saved(lambda state: state.pop("method")), CHECK + "it has no weights"),
    Bad(
        "Without its model", "a.pt", saved(lambda state: state.pop("model")),
        CHECK + "it does not say what model it is of",
    ),
    Bad(
        "A model of another type", "a.pt", saved(lambda state: state["model"].update(width="x")),
        CHECK + "width must be a whole number, got 'x'",
    ),
    Bad(
        "A model of a size that is not its weights'", "a.pt", saved(lambda state: state["model"].update(width=10**6)),
        CHECK + "its weights are not those of a model with width 1000000",
    ),
    Bad(
        "Weights missing", "a.pt", saved(lambda state: state["method"].popitem()),
        "FILE: cannot be read as a checkpoint: its weights are not those of its model: LAST is missing or another",
    ),
    Bad(
        "Weights that are not finite", "a.pt", saved(nan_weight),
        "FILE: cannot be read as a checkpoint: its weights FIRST are not finite",
    ),
]  # fmt: skip

SECTIONS = {
    "Images": ("`noisyseg train` and `noisyseg predict`", IMAGES),
    "Masks": ("`noisyseg train`, `fuse` and `corrupt`, as named", MASKS),
    "Sets of data": ("`noisyseg train` and `noisyseg evaluate --data`", DATA),
    "Files of settings": ("`noisyseg train --config`", SETTINGS),
    "Runs to resume": ("`noisyseg train --resume`", RUNS),
    "Checkpoints": ("`noisyseg predict` and `noisyseg evaluate`", CHECKPOINTS),
}


# ---- the tests ------------------------------------------------------------------------------------


def ids(rows: list[Bad]) -> list[str]:
    return [row.what.replace(" ", "-") for row in rows]


def refused(message: str, path: Path, *arguments: Any, **names: Path) -> None:
    """The command ends with that line, exit code 2 and nothing written."""
    out = path.parent / ("out.png" if path.suffix == ".png" else "out.nii.gz")
    end = () if "--resume" in arguments else ("--out", out)
    result = CliRunner().invoke(cli.app, [str(a) for a in (*arguments, *end)])
    length = untrusted.size(path.stat().st_size) if path.is_file() else ""
    for word, value in {"FILE": path, "SIZE": length, "DIR": path.parent, **names}.items():
        message = message.replace(word, str(value))
    lines = result.stderr.splitlines()
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and lines[0].startswith(f"noisyseg: {message}"), (result.stderr, message)
    # These end with what a library says.
    open_end = ("(truncated file", "announces 864 TB")
    assert lines[0] == f"noisyseg: {message}" or any(end in message for end in open_end), (lines[0], message)
    assert not out.exists()
    assert not Path("unpickled").exists()


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(untrusted, "memory", lambda: 50_000_000)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny run."""
    root = tmp_path_factory.mktemp("good")
    write(root / "set")
    arguments = [
        "train",
        "--data",
        root / "set",
        "--width",
        2,
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out",
        root / "run",
    ]
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return root / "run" / "best.pt"


@pytest.mark.parametrize("row", IMAGES, ids=ids(IMAGES))
@pytest.mark.parametrize("command", ["train", "predict"])
def test_images(row: Bad, command: str, good: Path, tmp_path: Path) -> None:
    if command == "predict":
        row.make(tmp_path / row.name)
        refused(row.message, tmp_path / row.name, "predict", good, tmp_path / row.name)
        return
    write(tmp_path / "set")
    path = tmp_path / "set" / "imagesTr" / row.name.replace("a", "case0", 1)
    (tmp_path / "set" / "imagesTr" / "case0.nii.gz").unlink()
    row.make(path)
    refused(row.message, path, "train", "--data", tmp_path / "set")


@pytest.mark.parametrize(
    ("row", "command"),
    [
        pytest.param(row, command, id=f"{row.what.replace(' ', '-')}-{command}")
        for row in MASKS
        for command in row.commands
    ],
)
def test_masks(row: Bad, command: str, tmp_path: Path) -> None:
    write(tmp_path / "set")
    folder = tmp_path / "set" / "labelsTr"
    path = folder / "case0.nii.gz"
    row.make(path)
    arguments: dict[str, tuple[Any, ...]] = {
        "train": ("--data", tmp_path / "set"),
        "fuse": (folder / "case0.nii.gz", folder / "case1.nii.gz"),
        "corrupt": (folder, "--noise", "dilate", "--set", "radius=1"),
    }
    image = tmp_path / "set" / "imagesTr" / "case0.nii.gz"
    refused(row.message, path, command, *arguments[command], IMAGE=image)


def test_masks_in_colour(tmp_path: Path) -> None:
    for name in ("a", "b"):
        png(np.stack([GREY] * 3, -1))(tmp_path / f"{name}.png")
    message = "FILE: a mask must be a grey PNG, not RGB"
    refused(message, tmp_path / "a.png", "fuse", tmp_path / "a.png", tmp_path / "b.png")


@pytest.mark.parametrize("row", DATA, ids=ids(DATA))
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_sets_of_data(row: Bad, command: str, good: Path, tmp_path: Path) -> None:
    if command == "evaluate" and row.what in ("No foreground at all", "A symbolic link to nothing"):
        pytest.skip("scores what there is")
    path = tmp_path / row.name
    row.make(path)
    start = ("train",) if command == "train" else ("evaluate", good, "--split", "all")
    refused(row.message, path, *start, "--data", path)


@pytest.mark.parametrize("row", SETTINGS, ids=ids(SETTINGS))
def test_files_of_settings(row: Bad, tmp_path: Path) -> None:
    row.make(tmp_path / row.name)
    refused(row.message, tmp_path / row.name, "train", "--config", tmp_path / row.name)


@pytest.mark.parametrize("row", RUNS, ids=ids(RUNS))
def test_runs_to_resume(row: Bad, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    row.make(tmp_path / "run" / row.name)
    refused(row.message, tmp_path / "run" / row.name, "train", "--resume", tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [row.name]


@pytest.mark.parametrize("row", CHECKPOINTS, ids=ids(CHECKPOINTS))
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_checkpoints(row: Bad, command: str, good: Path, tmp_path: Path) -> None:
    (tmp_path / "good.pt").write_bytes(good.read_bytes())
    row.make(tmp_path / row.name)
    write(tmp_path / "set")
    names = list(torch.load(good, weights_only=True)["method"])
    more = (tmp_path / "set" / "imagesTr",) if command == "predict" else ("--data", tmp_path / "set")
    refused(
        row.message, tmp_path / row.name, command, tmp_path / row.name, *more, FIRST=names[0], LAST=names[-1]
    )


def test_resume_of_a_prediction_with_a_broken_list(good: Path, tmp_path: Path) -> None:
    write(tmp_path / "set")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "predict.json").write_text("[" * 100_000)
    arguments = ["predict", good, tmp_path / "set" / "imagesTr", "--out", tmp_path / "masks", "--resume"]
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert (result.exit_code, result.stderr) == (
        2,
        f"noisyseg: {tmp_path / 'masks' / 'predict.json'}: is no list of masks of this version "
        "(cannot be read as JSON: nested too deeply)\n",
    )


# ---- what is taken --------------------------------------------------------------------------------


def works(*arguments: Any) -> None:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output


LONG = "x" * 240
TINY = ("--width", 2, "--epochs", 1, "--device", "cpu")


@pytest.mark.parametrize("case", ["Größe 腫瘍 ", "a [b] [#c] ", LONG])
def test_names_of_any_kind(case: str, good: Path, tmp_path: Path) -> None:
    """Unicode, spaces, what the terminal's markup would take for its own, and names of 248 bytes."""
    root = tmp_path / "Ünï cøde [/x]"
    write(root / "set", case=case)
    works("train", "--data", root / "set", *TINY, "--out", root / "a run")
    works("evaluate", root / "a run" / "best.pt", "--out", root / "s.csv", "--split", "all")
    assert f"{case}0" in (root / "s.csv").read_text()
    works("predict", good, root / "set" / "imagesTr", "--out", root / "masks")
    assert (root / "masks" / f"{case}0.nii.gz").is_file()
    masks = [root / "set" / "labelsTr" / f"{case}{i}.nii.gz" for i in range(2)]
    works("fuse", *masks, "--out", root / f"{case}.nii.gz")
    works(
        "corrupt",
        root / "set" / "labelsTr",
        "--noise",
        "dilate",
        "--set",
        "radius=1",
        "--out",
        root / "noisy",
    )
    assert (root / "noisy" / f"{case}3.nii.gz").is_file()


def test_paths_that_are_too_long(good: Path, tmp_path: Path) -> None:
    far = tmp_path.joinpath(*["y" * 200] * 30)
    for arguments in (("train", "--data", far), ("train", "--config", far), ("predict", good, far)):
        result = CliRunner().invoke(cli.app, [str(a) for a in (*arguments, "--out", tmp_path / "out")])
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and "too long" in result.stderr
    assert not (tmp_path / "out").exists()


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "far" / "set")
    (tmp_path / "near").mkdir()
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / "near" / name).mkdir()
        for path in (tmp_path / "far" / "set" / name).iterdir():
            (tmp_path / "near" / name / path.name).symlink_to(path)
    works("train", "--data", tmp_path / "near", *TINY, "--out", tmp_path / "run")


def test_a_datalist_with_its_files_elsewhere(tmp_path: Path) -> None:
    """--data-root allows what lies under it, by a relative or an absolute path; evaluate remembers it."""
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "a.json"
    datalist({"image": str(tmp_path / "lists" / "set" / "imagesTr" / "case0.nii.gz")})(path)
    far = tmp_path / "far.json"
    far.write_text(path.read_text())
    arguments = ("train", "--data", far, *TINY, "--out", tmp_path / "run")
    works(*arguments, "--data-root", tmp_path / "lists")
    works("evaluate", tmp_path / "run" / "best.pt")
    refused(
        f"{far}: training[0]: {tmp_path}/lists/set/imagesTr/case0.nii.gz lies outside {tmp_path}/none; {OUTSIDE}",
        tmp_path / "other", "train", "--data", far, "--data-root", tmp_path / "none",
    )  # fmt: skip


def test_a_constant_image_is_zero(tmp_path: Path) -> None:
    from noisyseg_fast.training import data

    save_nifti(tmp_path / "a.nii.gz", np.full(SIZE, 7, np.int16), AFFINE)
    values, spacing = data.load_image(data.Case("a", "a", (tmp_path / "a.nii.gz",), ()))
    assert not values.any() and spacing == (0.5, 0.5)


def test_files_with_a_byte_order_mark(tmp_path: Path) -> None:
    from noisyseg_fast.training import data

    write(tmp_path / "set")
    (tmp_path / "set" / "patients.csv").write_bytes(b"\xef\xbb\xbfcase,patient\ncase0,p\ncase1,p\n")
    (tmp_path / "set" / "dataset.json").write_bytes(b'\xef\xbb\xbf{"labels": {"background": 0, "a": 1}}')
    patients = {case.id: case.patient for case in data.open_data(tmp_path / "set").split("all")}
    assert patients == {"case0": "p", "case1": "p", "case2": "case2", "case3": "case3"}


def test_short_numbers_of_yaml(tmp_path: Path) -> None:
    """1e-3 without a point is text to YAML."""
    from noisyseg_fast.training import engine

    (tmp_path / "a.yaml").write_text("lr: 1e-3\nspacing: [1, 2e0]\n")
    config = engine.load_config(tmp_path / "a.yaml")
    assert (config.lr, config.spacing) == (0.001, (1.0, 2.0))


# ---- the page -------------------------------------------------------------------------------------

INTRO = """# Bad files and settings

What each command says about a file that it cannot use. The line goes to stderr, the exit code is 2, and nothing is
written: everything is read and checked before the first file is. `--debug` adds the traceback. The tables are those of
`tests/test_bad_files.py`, which makes each of these files and compares the line; how many more were tried is in
[Reliability](reliability.md#bad-files-and-settings).

Of a file from elsewhere nothing is run: checkpoints hold tensors and plain values, arrays no objects, settings no tags
and no aliases. A size in a header is compared with the size of the file before memory is taken for it.

A datalist may name files under its own folder, by relative or absolute paths; for others, name the folder that holds
them all: `--data-root`. Symbolic links are followed wherever they lead.

An image that is the same everywhere is taken; it becomes 0. Names may hold spaces and any letters of UTF-8.
"""


def page() -> str:
    parts = [INTRO]
    for title, (who, rows) in SECTIONS.items():
        parts.append(f"\n## {title}\n\nOf {who}.\n\n| What | Line |\n|---|---|\n")
        for row in rows:
            line = row.message.replace("|", "\\|")
            where = f" ({', '.join(row.commands)})" if row.commands else ""
            parts.append(f"| {row.what}{where} | `{line}` |\n")
    return "".join(parts)


def test_the_page_has_these_tables() -> None:
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())
