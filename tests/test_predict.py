import itertools
import json
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for _needed in ("monai", "lightning", "nibabel", "typer", "rich"):
    pytest.importorskip(_needed)

import nibabel  # noqa: E402
from folders import blob, oblique_affine, save_nifti  # noqa: E402
from monai.inferers import sliding_window_inference  # noqa: E402
from PIL import Image  # noqa: E402
from scipy import ndimage  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from noisyseg_fast import cli  # noqa: E402
from noisyseg_fast.training import data, model, predict, resample, windows  # noqa: E402
from noisyseg_fast.training.predict import Journal, Options  # noqa: E402

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(torch.nn.Module):
    """A convolution that sees where its windows end, and counts them."""

    def __init__(self, dims=3, outputs=1, channels=1):
        super().__init__()
        torch.manual_seed(7)
        kind = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims]
        self.convolution = kind(channels, outputs, 5, padding=2, bias=False)
        self.passes = self.windows = 0
        self.stop_at = None
        self.stop = KeyboardInterrupt

    def forward(self, image):
        if self.stop_at is not None and self.windows >= self.stop_at:
            raise self.stop
        self.passes += 1
        self.windows += len(image)
        return self.convolution(image)


def spec(dims=3, patch=(16, 16, 16), classes=2, channels=1):
    return model.ModelSpec("ce", "unet", 4, dims, channels, classes, patch)


def planes(net, image, patch, **more):
    parts = windows.label_planes(net, lambda a, b: image[..., a:b], image.shape[2:], patch, **more)
    return torch.cat(list(parts), -1)


def of_file(net, path, out, settings=None, options=None, journal=None):
    """The mask that is written for a file."""
    settings = settings or spec()
    todo = predict.jobs([path], out, settings.channels)
    if journal:
        todo = journal.left(todo)
    predict.check(todo, settings, options)
    predict.predict(net, settings, todo, CPU, options=options, journal=journal)
    return nibabel.load(out / path.name) if path.suffix == ".gz" else None


# ---- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    ("shape", "patch", "overlap"),
    [
        ((1, 40, 33, 50), (16, 16, 16), 0.5),
        ((1, 40, 33, 50), (16, 24, 8), 0.25),
        ((1, 10, 40, 12), (16, 16, 16), 0.5),
        ((2, 18, 19, 37), (16, 16, 16), 0.75),
        ((1, 20, 20, 20), (16, 16, 16), 0.0),
        ((1, 16, 16, 16), (16, 16, 16), 0.5),
        ((3, 70, 45), (32, 16), 0.5),
        ((3, 20, 10), (32, 16), 0.5),
    ],
)
def test_planes_equal_monai_on_the_whole_image(shape, patch, overlap, outputs):
    net = Net(len(patch), outputs)
    image = torch.randn(shape[0], 1, *shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = sliding_window_inference(image, patch, 1, net, overlap=overlap, mode="gaussian")
    expected = logits[:, 0] > 0 if outputs == 1 else logits.argmax(1)
    assert torch.equal(planes(net, image, patch, overlap=overlap), expected.to(torch.uint8))


def test_going_on_at_any_plane_gives_the_same_bits():
    net, image = Net(outputs=3), torch.randn(1, 1, 20, 18, 45)
    whole = planes(net, image, (16, 16, 16), overlap=0.7)
    for first in range(0, 45, 2):
        assert torch.equal(planes(net, image, (16, 16, 16), overlap=0.7, first=first), whole[..., first:])


def test_only_a_row_of_windows_is_read_at_a_time():
    asked, image = [], torch.randn(1, 1, 20, 18, 100)

    def read(low, high):
        asked.append((low, high))
        return image[..., low:high]

    parts = windows.label_planes(Net(), read, image.shape[2:], (16, 16, 16))
    assert [p.shape[-1] for p in parts] == [8] * 10 + [4, 16]
    assert asked == [(z, z + 16) for z in [*range(0, 81, 8), 84]]


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_flips_average_probabilities(dims, outputs):
    net, image = Net(dims, outputs), torch.randn(1, 1, *(16,) * dims)
    found = planes(net, image, (16,) * dims, flips=True)
    assert net.passes == 2**dims
    shares = []
    with torch.no_grad():
        for axes in itertools.chain(
            *(itertools.combinations(range(2, 2 + dims), k) for k in range(dims + 1))
        ):
            logits = net(image.flip(axes))
            shares.append((logits.sigmoid() if outputs == 1 else logits.softmax(1)).flip(axes))
    mean = sum(s.double() for s in shares) / len(shares)
    expected = mean[:, 0] > 0.5 if outputs == 1 else mean.argmax(1)
    assert torch.equal(found, expected.to(torch.uint8))
    assert not torch.equal(found, planes(net, image, (16,) * dims))
    for axis in range(1, 1 + dims):  # what is averaged over flips does not know them
        assert torch.equal(planes(net, image.flip(axis + 1), (16,) * dims, flips=True), found.flip(axis))


# ---- orientation ----------------------------------------------------------------------------------


def stored(array, affine, order, reversed_):
    """The same scan with its axes in another order and direction."""
    ornt = np.array([[order.index(i), -1 if i in reversed_ else 1] for i in range(3)])
    image = nibabel.Nifti1Image(array, affine).as_reoriented(ornt)
    return np.asarray(image.dataobj), image.affine


def test_masks_of_any_orientation_lie_on_their_image(tmp_path):
    array, _ = blob((20, 18, 34), 3)
    net = Net()
    for affine in (np.diag([0.7, 0.8, 2.5, 1.0]), oblique_affine((0.7, 0.8, 2.5))):
        expected = None
        for order in itertools.permutations(range(3)):
            for reversed_ in ((), (0, 1), (0, 1, 2)):  # (0, 1): LPS
                values, turned = stored(array, affine, order, reversed_)
                image = nibabel.Nifti1Image(values, turned)
                image.set_qform(turned, 1)
                image.set_sform(turned, 2)
                image.header.set_xyzt_units("mm", "sec")
                nibabel.save(image, tmp_path / "scan.nii.gz")
                mask = of_file(net, tmp_path / "scan.nii.gz", tmp_path / "masks")
                assert mask.shape == image.shape
                assert np.array_equal(mask.affine, image.affine)
                for name in ("qform_code", "sform_code", "xyzt_units", "pixdim"):
                    assert np.array_equal(mask.header[name], image.header[name]), name
                back = nibabel.as_closest_canonical(mask)
                found = np.asarray(back.dataobj)
                expected = found if expected is None else expected
                assert np.array_equal(found, expected)
                assert np.allclose(back.affine, affine, atol=1e-4)
        assert 0.1 < expected.mean() < 0.9


@pytest.mark.parametrize("reversed_", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_2d_nifti_of_any_orientation(order, reversed_, tmp_path):
    array = blob((40, 33), 3)[0][:, :, None]
    net, flat = Net(2), spec(2, (16, 16))
    save_nifti(tmp_path / "plain.nii.gz", array, np.diag([0.7, 0.9, 1, 1]))
    expected = of_file(net, tmp_path / "plain.nii.gz", tmp_path / "masks", flat)
    save_nifti(tmp_path / "turned.nii.gz", *stored(array, np.diag([0.7, 0.9, 1, 1]), order, reversed_))
    mask = of_file(net, tmp_path / "turned.nii.gz", tmp_path / "masks", flat)
    back = nibabel.as_closest_canonical(mask)
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(expected.dataobj))


def test_training_sees_scans_of_any_orientation_alike(tmp_path):
    array, mask = blob((20, 18, 12), 3)
    first = None
    for order, reversed_ in (((0, 1, 2), ()), ((0, 1, 2), (0, 1)), ((2, 0, 1), (1,))):
        paths = []
        for name, a in (("image", array), ("mask", mask)):
            values, affine = stored(a, oblique_affine((0.7, 0.8, 2.5)), order, reversed_)
            paths.append(tmp_path / f"{name}{len(paths)}.nii.gz")
            save_nifti(paths[-1], values, affine)
        case = data.Case("a", "a", (paths[0],), (paths[1],))
        loaded = data.load(case)
        first = first or loaded
        assert np.array_equal(loaded.image, first.image)
        assert np.array_equal(loaded.target, first.target)
        assert loaded.spacing == pytest.approx((0.7, 0.8, 2.5), abs=1e-5)
        spaced = data.load(replace(case, spacing=tuple(np.array([1.0, 2.0, 3.0])[list(order)])))
        assert spaced.spacing == (1, 2, 3)  # of a datalist, in the file's axes
    assert first.target.sum() == mask.sum()
    assert first.image[0][first.target > 0].mean() > 1


def test_an_affine_that_tells_no_orientation_leaves_the_axes():
    array = np.arange(24).reshape(2, 3, 4)
    affine = np.diag([1.0, 0.0, 1.0, 1.0])
    assert data.orientation(affine, 3) == ((0, 1, 2), ())
    assert np.array_equal(data.to_ras(array, affine), array)


# ---- reading --------------------------------------------------------------------------------------


def test_planes_are_read_as_whole_images_are(tmp_path):
    generator = np.random.default_rng(0)
    for name, dtype, slope in (("a", np.int16, None), ("b", np.float32, None), ("c", np.int16, 0.37)):
        image = nibabel.Nifti1Image(
            generator.integers(-900, 900, (70, 9, 21)).astype(dtype), oblique_affine()
        )
        if slope:
            image.header.set_slope_inter(slope, -3)
        for suffix in (".nii", ".nii.gz"):
            path = tmp_path / (name + suffix)
            nibabel.save(image, path)
            case = data.Case("a", "a", (path, path), ())
            scan = predict.Scan(case)
            whole, spacing = data.load_image(case)
            assert scan.shape == whole.shape[1:] and scan.spacing == spacing
            assert np.allclose(scan.read(scan.moments(), 4, 11)[0], whole[..., 4:11], rtol=0, atol=1e-6)


def test_an_uncompressed_file_is_not_held_in_memory(tmp_path):
    save_nifti(tmp_path / "a.nii", np.zeros((8, 8, 8), np.int16))
    (channel,) = predict.Scan(data.Case("a", "a", (tmp_path / "a.nii",), ())).channels
    while channel.base is not None and not isinstance(channel, np.memmap):
        channel = channel.base
    assert isinstance(channel, np.memmap)


def test_empty_volume_is_refused(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", np.zeros((8, 0, 8), np.int16))
    with pytest.raises(data.DataError, match=r"has shape .*; a 2D image or a 3D volume is needed"):
        of_file(Net(), tmp_path / "a.nii.gz", tmp_path / "masks")


def test_4d_image_is_refused(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", np.zeros((8, 8, 8, 2), np.int16))
    with pytest.raises(data.DataError, match=r"has shape \(8, 8, 8, 2\)"):
        of_file(Net(), tmp_path / "a.nii.gz", tmp_path / "masks")


# ---- 2D models on volumes -------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize(("axis", "across"), [(None, 1), ("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_slice_by_slice(axis, across, flips, tmp_path):
    shape = (20, 37, 18)
    arrays = [blob(shape, seed)[0] for seed in (1, 2)]
    for i, array in enumerate(arrays):
        save_nifti(tmp_path / f"a_000{i}.nii.gz", array, np.diag([-0.7, 2.5, 0.7, 1]))
    net = Net(2, 3, channels=2)
    todo = predict.jobs([tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"], tmp_path / "masks", 2)
    settings, options = spec(2, (16, 24), 3, 2), Options(axis=axis, flips=flips)
    predict.check(todo, settings, options)
    predict.predict(net, settings, todo, CPU, options=options)
    found = nibabel.load(tmp_path / "masks" / "a.nii.gz")
    assert np.array_equal(found.affine, nibabel.load(tmp_path / "a_0000.nii.gz").affine)
    image = np.stack(arrays)[:, ::-1]  # stored from right to left
    expected = [
        planes(net, torch.from_numpy(data.zscore(plane))[None], (16, 24), flips=flips)[0].numpy()
        for plane in np.moveaxis(image, 1 + across, 0)
    ]
    expected = np.moveaxis(np.stack(expected), 0, across)[::-1]
    assert np.array_equal(np.asarray(found.dataobj), expected)
    assert len(np.unique(expected)) == 3


def test_of_equal_spacings_slices_lie_across_the_last_axis(tmp_path):
    array, _ = blob((20, 18, 22), 0)
    for name, spacing in (("equal", (1, 1, 1)), ("nearly", (1.0001, 1, 1))):
        save_nifti(tmp_path / f"{name}.nii.gz", array, np.diag([*spacing, 1]))
    flat = spec(2, (16, 16))
    axial = of_file(Net(2), tmp_path / "equal.nii.gz", tmp_path / "a", flat, Options(axis="axial"))
    for name in ("equal", "nearly"):
        found = of_file(Net(2), tmp_path / f"{name}.nii.gz", tmp_path / "b", flat)
        assert np.array_equal(np.asarray(found.dataobj), np.asarray(axial.dataobj))


# ---- largest component ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 40), (12, 14, 16)])
def test_largest_component_of_each_class(shape):
    for seed in range(5):
        mask = (np.random.default_rng(seed).random(shape) < (0.35 if len(shape) == 2 else 0.12)).astype(
            np.uint8
        )
        mask[mask > 0] = np.random.default_rng(seed).integers(1, 3, int(mask.sum()))
        expected = np.zeros_like(mask)
        for label in (1, 2):
            components, count = ndimage.label(mask == label, np.ones((3,) * mask.ndim))
            expected[components == 1 + np.bincount(components.ravel())[1:].argmax()] = label
            assert count > 3
        predict.largest_component(mask, 3)
        assert np.array_equal(mask, expected)


def test_largest_component_touches_at_corners_and_of_equals_is_the_first():
    mask = np.zeros((6, 6), np.uint8)
    mask[0, 1] = mask[1, 2] = 1
    mask[4, 4] = mask[4, 5] = 1
    predict.largest_component(mask, 2)
    assert [tuple(p) for p in np.argwhere(mask)] == [(0, 1), (1, 2)]
    empty = np.zeros((4, 4, 4), np.uint8)
    predict.largest_component(empty, 3)
    assert not empty.any()


def test_largest_component_option(tmp_path):
    array = np.zeros((20, 18, 34), np.float32)
    array[3:8, 3:8, 3:8] = array[10:16, 10:16, 20:30] = 1
    save_nifti(tmp_path / "a.nii.gz", array)
    net = Net()
    net.convolution.weight.data.fill_(1)  # foreground around what is bright
    for on in (False, True):
        options = Options(largest_component=on)
        mask = np.asarray(of_file(net, tmp_path / "a.nii.gz", tmp_path / "masks", options=options).dataobj)
        assert mask[12, 12, 25] == 1
        assert mask[5, 5, 5] == (not on)


# ---- runs that are interrupted --------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path):
    """Three scans, and a file in place of a checkpoint."""
    (tmp_path / "scans").mkdir()
    for i in range(3):
        save_nifti(tmp_path / "scans" / f"s{i}.nii.gz", blob((20, 18, 60), i)[0])
    (tmp_path / "best.pt").write_bytes(b"weights")
    return tmp_path


def run(scans, net, resume, options=None, out="masks"):
    options = options or Options()
    journal = Journal(scans / out, scans / "best.pt", options, resume)
    left = journal.left(predict.jobs([scans / "scans"], scans / out, 1))
    predict.predict(net, spec(), left, CPU, options=options, journal=journal)


def arrays(folder):
    return [np.asarray(nibabel.load(p).dataobj) for p in sorted(folder.glob("[!.]*.nii.gz"))]


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


ROW = 4  # windows, 2 x 2 of 16 x 16 in 20 x 18
SCAN = 7 * ROW  # starts 0, 8, ..., 40, 44


def test_interrupted_run_goes_on(scans):
    whole = Net()
    run(scans, whole, False, out="whole")
    assert whole.windows == 3 * SCAN
    cut = Net()
    cut.stop_at = SCAN + 3 * ROW  # in the second scan, with three rows done
    with pytest.raises(KeyboardInterrupt):
        run(scans, cut, False)
    assert [p.name for p in (scans / "masks").glob("s*")] == ["s0.nii.gz"]
    assert hidden(scans / "masks") == [".partial-s1.nii.gz"]
    before = (scans / "masks" / "s0.nii.gz").stat().st_mtime_ns
    rest = Net()
    run(scans, rest, True)
    assert rest.windows == 2 * SCAN - 2 * ROW  # of the rows done the last reaches into what is left
    assert (scans / "masks" / "s0.nii.gz").stat().st_mtime_ns == before
    assert hidden(scans / "masks") == []
    for a, b in zip(arrays(scans / "whole"), arrays(scans / "masks"), strict=True):
        assert np.array_equal(a, b)
    idle = Net()
    run(scans, idle, True)
    assert idle.windows == 0


class Deadly(Net):
    """Kills its process once it has seen so many windows."""

    def forward(self, image):
        if self.windows >= SCAN + 4 * ROW:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(image)


def test_killed_run_goes_on(scans):
    # Forked, since importing torch and MONAI anew takes longer than all the rest.
    process = multiprocessing.get_context("fork").Process(target=run, args=(scans, Deadly(), False))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert hidden(scans / "masks") == [".partial-s1.nii.gz"]
    rest = Net()
    run(scans, rest, True)
    assert rest.windows == 2 * SCAN - 3 * ROW
    run(scans, Net(), False, out="whole")
    for a, b in zip(arrays(scans / "whole"), arrays(scans / "masks"), strict=True):
        assert np.array_equal(a, b)


def test_torn_or_foreign_planes_are_done_again(scans):
    run(scans, Net(), False, out="whole")
    expected = arrays(scans / "whole")
    cut = Net()
    cut.stop_at = 5 * ROW
    with pytest.raises(KeyboardInterrupt):
        run(scans, cut, False)
    torn = scans / "masks" / ".partial-s0.nii.gz"
    content = torn.read_bytes()
    for changed in (
        content[:10],
        content[:-1],
        content[:-40] + bytes(40),
        content[: content.index(b"\n") + 5],
        content.replace(b"weights", b"another"),
        b"{}" + content,
        content + b"\1\0",
    ):
        torn.write_bytes(changed)
        run(scans, Net(), True)
        for a, b in zip(expected, arrays(scans / "masks"), strict=True):
            assert np.array_equal(a, b)
        (scans / "masks" / "s0.nii.gz").unlink()


def test_a_fresh_run_uses_nothing_of_an_interrupted_one(scans):
    cut = Net()
    cut.stop_at = SCAN + 3 * ROW
    with pytest.raises(KeyboardInterrupt):
        run(scans, cut, False)
    fresh = Net()
    run(scans, fresh, False)
    assert fresh.windows == 3 * SCAN


def test_a_changed_image_is_predicted_again(scans):
    run(scans, Net(), False)
    save_nifti(scans / "scans" / "s1.nii.gz", blob((20, 18, 60), 9)[0])
    again = Net()
    run(scans, again, True)
    assert again.windows == SCAN


def test_masks_of_a_fresh_run_that_was_cut_are_not_taken_for_its_own(scans):
    """Of an older run with another model in the same folder."""
    run(scans, Net(), False)
    (scans / "best.pt").write_bytes(b"others")
    cut = Net()
    cut.stop_at = SCAN
    with pytest.raises(KeyboardInterrupt):
        run(scans, cut, False)
    rest = Net()
    run(scans, rest, True)
    assert rest.windows == 2 * SCAN


def test_slices_are_resumed_too(scans):
    flat = spec(2, (256, 256))  # 16 slices at a time
    image = scans / "scans" / "s0.nii.gz"
    expected = of_file(Net(2), image, scans / "whole", flat)
    cut = Net(2)
    cut.stop_at = 32
    with pytest.raises(KeyboardInterrupt):
        of_file(
            cut, image, scans / "masks", flat, None, Journal(scans / "masks", scans / "best.pt", Options())
        )
    rest = Net(2)
    journal = Journal(scans / "masks", scans / "best.pt", Options(), True)
    mask = of_file(rest, image, scans / "masks", flat, None, journal)
    assert rest.windows == 60 - 32
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(expected.dataobj))


def test_resume_refuses_another_run(scans):
    run(scans, Net(), False)
    where = scans / "masks" / "predict.json"
    with pytest.raises(
        ValueError, match="were made with flips False, not True; choose another --out or leave"
    ):
        run(scans, Net(), True, Options(flips=True))
    (scans / "best.pt").write_bytes(b"others")
    with pytest.raises(ValueError, match="were made with another checkpoint; choose another --out"):
        run(scans, Net(), True)
    where.write_text("[]")
    with pytest.raises(ValueError, match="is no list of masks of this version"):
        run(scans, Net(), True)
    where.unlink()
    with pytest.raises(
        data.DataError, match=r"s0.nii.gz: is there without .*predict.json; leave out --resume"
    ):
        run(scans, Net(), True)


# ---- the command ----------------------------------------------------------------------------------


def checkpoint(path, settings):
    torch.manual_seed(0)
    content = {"format": model.FORMAT, "model": model.spec_dict(settings)}
    torch.save({**content, "method": settings.build(training=False).state_dict()}, path)
    return path


def command(*arguments):
    return CliRunner().invoke(cli.app, ["predict", *(str(a) for a in arguments), "--device", "cpu"])


def fails(*arguments, message):
    result = command(*arguments)
    assert (result.exit_code, result.stderr) == (2, f"noisyseg: {message}\n")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    flat = checkpoint(folder / "flat.pt", spec(2, (32, 32)))
    return flat, checkpoint(folder / "volume.pt", spec(3, (32, 32, 16)))


def test_command_with_every_option(models, scans):
    out = ("--out", scans / "masks")
    options = ("--flips", "--largest-component", "--overlap", 0.25)
    result = command(models[0], scans / "scans", *out, *options, "--axis", "coronal", "--resume")
    assert result.exit_code == 0, result.output
    content = json.loads((scans / "masks" / "predict.json").read_text())
    assert {k: content[k] for k in ("overlap", "flips", "largest_component", "axis")} == {
        "overlap": 0.25, "flips": True, "largest_component": True, "axis": "coronal",
    }  # fmt: skip
    assert sorted(content["masks"]) == ["s0.nii.gz", "s1.nii.gz", "s2.nii.gz"]
    assert [a.shape for a in arrays(scans / "masks")] == [(20, 18, 60)] * 3
    (scans / "masks" / "s1.nii.gz").unlink()
    result = command(models[0], scans / "scans", *out, *options, "--axis", "coronal", "--resume")
    assert "3 mask(s) (2 of them were there)" in result.output
    assert len(arrays(scans / "masks")) == 3


def test_command_says_how_to_go_on(models, scans, monkeypatch):
    def stop(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict", stop)
    result = command(models[1], scans / "scans", "--out", scans / "masks")
    assert result.exit_code == 130
    assert result.stderr == "noisyseg: interrupted; the same command with --resume goes on\n"


def test_options_without_sense_are_refused_before_any_work(models, scans):
    flat, volume = models
    out = ("--out", scans / "masks")
    for value in (1, -0.1, "nan"):
        fails(
            flat, scans / "scans", *out, "--overlap", value,
            message=f"overlap must be at least 0 and below 1, got {value}",
        )  # fmt: skip
    fails(
        flat, scans / "scans", *out, "--axis", "z",
        message="unknown axis 'z'; choose from sagittal, coronal, axial",
    )  # fmt: skip
    fails(
        volume, scans / "scans", *out, "--axis", "axial",
        message="axis axial is for a 2D model, slice by slice; this model takes volumes",
    )  # fmt: skip
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(scans / "flat.png")
    fails(
        flat, scans / "flat.png", *out, "--axis", "axial",
        message="axis axial is for volumes, slice by slice; there are only 2D images",
    )  # fmt: skip
    assert not (scans / "masks").exists()


# ---- models of one spacing ------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_images_are_resampled_to_the_models_spacing(dims, tmp_path):
    """And their masks brought back: as if the network had taken the resampled image."""
    array, _ = blob((20, 18, 24), 3)
    save_nifti(tmp_path / "a.nii.gz", array[:, :, ::-1], np.diag([1, 1.5, -2, 1]))
    settings = replace(spec(dims, (16, 16, 16)[:dims]), spacing=(0.8, 1.0, 2.5)[:dims])
    found = np.asarray(of_file(Net(dims), tmp_path / "a.nii.gz", tmp_path / "masks", settings).dataobj)[
        :, :, ::-1
    ]
    if dims == 3:
        size = (25, 27, 19)
        image = torch.from_numpy(resample.resample_image(data.zscore(array[None]), size))
        expected = resample.resample_label(planes(Net(), image[None], (16,) * 3)[0].numpy(), array.shape)
    else:
        slices = []
        for plane in np.moveaxis(array, 2, 0):
            image = torch.from_numpy(resample.resample_image(data.zscore(plane[None]), (25, 27)))
            labels = planes(Net(2), image[None], (16, 16))[0].numpy()
            slices.append(resample.resample_label(labels, plane.shape))
        expected = np.stack(slices, 2)
    assert np.array_equal(found, expected)
