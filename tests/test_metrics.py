"""surface_metrics and overlap_metrics against reference.py, MONAI and MedPy."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import noisyseg_fast as nf
from noisyseg_fast import reference

DTYPES = ("bool", "uint8", "int32", "int64")


def ball(shape, centre, radius):
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij", sparse=True)
    return sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2


def box(shape, low, high):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def random_pair(seed):
    """Blobs, noise, thin and border-touching masks; never empty. Returns masks and spacing."""
    rng = np.random.default_rng(seed)
    ndim = int(rng.integers(2, 4))
    shape = tuple(int(n) for n in rng.integers(1 if rng.random() < 0.2 else 6, 60 if ndim == 2 else 26, ndim))

    def mask():
        kind = rng.integers(4)
        if kind == 0:
            out = rng.random(shape) < rng.choice([0.02, 0.3, 0.9])
        else:
            out = np.zeros(shape, bool)
            for _ in range(kind):
                out |= ball(shape, [rng.uniform(0, n) for n in shape], rng.uniform(1, max(shape) / 3))
        out[tuple(rng.integers(0, n) for n in shape)] = True
        return out

    spacing = [None, [0.7] * ndim, [float(s) for s in rng.uniform(0.3, 4, ndim)]][rng.integers(3)]
    return mask(), mask(), spacing


def edge_pairs():
    cube = (20, 24, 22)
    voxel, big = box(cube, (1, 1, 1), (2, 2, 2)), box(cube, (12, 12, 12), (17, 17, 17))
    speck = ball((40, 40, 40), (20, 20, 20), 9)
    full = np.ones((12, 12, 12), bool)
    hole = full.copy()
    hole[5:7, 5:7, 5:7] = False
    slab, beam = (16, 200, 30), (5, 4, 300)
    apart = box(slab, (0, 0, 0), (16, 8, 30)), box(slab, (0, 190, 0), (16, 200, 30))
    ends = box(beam, (0, 0, 0), (5, 4, 3)), box(beam, (1, 1, 290), (4, 3, 299))
    yield "ball and far speck", speck | box((40, 40, 40), (0, 0, 0), (4, 4, 4)), speck, None
    yield "balls, anisotropic", ball(cube, (9, 9, 9), 6), ball(cube, (10, 12, 9), 6), [3.0, 1.0, 1.0]
    yield "single voxel and cube", voxel, big, None
    yield "full and full minus a hole", full, hole, None
    yield "touching the border", box(cube, (0, 0, 0), (5, 24, 9)), box(cube, (0, 3, 0), (9, 24, 22)), None
    yield "equal", big, big, [2.0, 1.0, 0.5]
    yield "far apart", *apart, None
    yield "far apart, anisotropic", *apart, [2.0, 0.5, 1.0]
    yield "far along the rows", *ends, None
    yield "one pixel wide", box((1, 50), (0, 3), (1, 9)), box((1, 50), (0, 5), (1, 30)), None
    yield "single voxels", voxel, box(cube, (19, 23, 21), cube), [0.3, 2.0, 1.0]


EDGES = {name: pair for name, *pair in edge_pairs()}


def monai_metrics(pred, target, spacing, tolerance):
    metrics = pytest.importorskip("monai.metrics")
    from monai.metrics.utils import get_edge_surface_distance

    p, t = torch.tensor(pred)[None, None], torch.tensor(target)[None, None]
    common = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # torch.quantile finds its rank in single precision; MONAI's distances, ranked in double
        _, distances, _ = get_edge_surface_distance(p[0, 0], t[0, 0], spacing=spacing, symmetric=True)
        rough = float(metrics.compute_hausdorff_distance(p, t, percentile=95, **common))
        hd95 = max(float(d.double().quantile(0.95)) for d in distances)
        assert rough == pytest.approx(hd95, rel=1e-4)
        return (
            float(metrics.compute_hausdorff_distance(p, t, percentile=100, **common)),
            hd95,
            float(metrics.compute_average_surface_distance(p, t, **common)),
            float(metrics.compute_average_surface_distance(p, t, symmetric=True, **common)),
            float(metrics.compute_surface_dice(p, t, class_thresholds=[tolerance], **common)),
        )


def medpy_metrics(pred, target, spacing):
    binary = pytest.importorskip("medpy.metric.binary")
    return tuple(getattr(binary, name)(pred, target, spacing) for name in ("hd", "hd95", "asd", "assd"))


def compare_to_peers(pred, target, spacing):
    tolerance = 1.4
    ours = nf.surface_metrics(pred, target, spacing, tolerance=tolerance)
    np.testing.assert_allclose(ours, monai_metrics(pred, target, spacing, tolerance), rtol=1e-6, atol=1e-7)
    ours = nf.surface_metrics(pred, target, spacing, definition="medpy")
    np.testing.assert_allclose(ours[:4], medpy_metrics(pred, target, spacing), rtol=1e-6, atol=1e-7)
    binary = pytest.importorskip("medpy.metric.binary")
    overlap = nf.overlap_metrics(pred, target)
    np.testing.assert_allclose(
        overlap[:5],
        [getattr(binary, f)(pred, target) for f in ("dc", "jc", "sensitivity", "specificity", "precision")],
        rtol=1e-12,
    )


@pytest.mark.parametrize("block", range(4))
def test_200_random_pairs_equal_monai_and_medpy(block):
    for seed in range(50 * block, 50 * block + 50):
        compare_to_peers(*random_pair(seed))


@pytest.mark.parametrize("name", [n for n in EDGES if n != "equal"])
def test_edge_masks_equal_monai_and_medpy(name):
    compare_to_peers(*EDGES[name])


def test_documented_disagreement_of_the_definitions():
    pred, target, _ = EDGES["ball and far speck"]
    assert nf.surface_metrics(pred, target, definition="medpy").hd_percentile == 0
    assert nf.surface_metrics(pred, target).hd_percentile > 14
    assert nf.surface_metrics(*EDGES["full and full minus a hole"][:2]).hd == 4


def masks(draw, shape):
    density = draw(st.sampled_from([0, 1, 3, 40, 97, 100]))
    seed = draw(st.integers(0, 2**31))
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 100, shape) < density)


@st.composite
def cases(draw):
    ndim = draw(st.integers(1, 3))
    longest = (300, 70, 12)[ndim - 1]
    shape = draw(st.lists(st.integers(1, longest), min_size=ndim, max_size=ndim))
    if ndim == 3 and draw(st.booleans()):
        shape[draw(st.integers(0, 2))] = draw(st.integers(1, 140))
    spacing = draw(st.none() | st.lists(st.floats(0.1, 10), min_size=ndim, max_size=ndim))
    return masks(draw, shape), masks(draw, shape), spacing


@settings(deadline=None, max_examples=150)
@given(cases(), st.sampled_from(["monai", "medpy"]), st.sampled_from([0, 12.5, 50, 95, 100]), st.floats(0, 5))
def test_equal_to_reference(case, definition, percentile, tolerance):
    pred, target, spacing = case
    options = {"definition": definition, "percentile": percentile, "tolerance": tolerance}
    ours = nf.surface_metrics(pred, target, spacing, **options)
    expected = reference.surface_metrics(pred, target, spacing, **options)
    torch.testing.assert_close(torch.stack(list(ours)), torch.stack(expected), rtol=1e-12, atol=0)
    overlap = torch.stack(list(nf.overlap_metrics(pred, target)))
    assert torch.equal(overlap, torch.stack(reference.overlap_metrics(pred, target)))
    assert not overlap.isnan().any()


@pytest.mark.parametrize("definition", ["monai", "medpy"])
def test_empty_masks(definition):
    none, some = np.zeros((7, 8, 9), bool), box((7, 8, 9), (1, 1, 1), (3, 4, 5))
    inf = math.inf
    assert nf.surface_metrics(none, none, definition=definition) == (0, 0, 0, 0, 1)
    assert nf.surface_metrics(some, none, definition=definition) == (inf, inf, inf, inf, 0)
    assert nf.surface_metrics(none, some, definition=definition) == (inf, inf, inf, inf, 0)
    assert nf.overlap_metrics(none, none) == (1, 1, 1, 1, 1, 0)
    assert nf.overlap_metrics(some, none)[:3] == (0, 0, 0)
    assert nf.overlap_metrics(some, none).volume_error == inf
    assert nf.overlap_metrics(none, some) == (0, 0, 0, 1, 0, -1)
    full = np.ones((3, 4), bool)
    assert nf.overlap_metrics(full, full) == (1, 1, 1, 1, 1, 0)


@pytest.mark.parametrize(("dims", "lead"), [(2, (3, 2)), (3, (2, 3)), (1, (2, 2, 2)), (2, (5,)), (3, ())])
def test_batch_is_its_items(dims, lead):
    rng = np.random.default_rng(3)
    shape = (*lead, *(17, 33, 70)[:dims])
    pred, target = rng.random(shape) < 0.1, rng.random(shape) < 0.05
    both = nf.surface_metrics(pred, target, 1.5, spatial_dims=dims)
    overlap = nf.overlap_metrics(pred, target, spatial_dims=dims)
    assert both.hd.shape == overlap.dice.shape == lead
    for index in itertools.product(*map(range, lead)):
        assert nf.surface_metrics(pred[index], target[index], 1.5) == tuple(x[index] for x in both)
        assert nf.overlap_metrics(pred[index], target[index]) == tuple(x[index] for x in overlap)


def test_default_of_spatial_dims():
    x = np.ones((2, 3, 8, 9), bool)
    assert nf.surface_metrics(x, x).hd.shape == (2, 3)
    assert nf.surface_metrics(x[..., None], x[..., None]).hd.shape == (2, 3)
    assert nf.surface_metrics(x[0], x[0]).hd.shape == ()
    assert nf.surface_metrics(x[0], x[0], spatial_dims=2).hd.shape == (3,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_dtypes_and_views(dtype, other):
    rng = np.random.default_rng(1)
    pred, target = rng.random((2, 3, 20, 70)) < 0.2, rng.random((2, 3, 20, 70)) < 0.2
    expected = nf.surface_metrics(pred, target, [1, 2]), nf.overlap_metrics(pred, target)

    def views(x, dtype):
        wide = np.zeros((2, 3, 40, 210), dtype)
        wide[..., ::2, ::3] = x * (np.array(-7).astype(dtype) if dtype != "bool" else True)
        yield wide[..., ::2, ::3]
        yield np.asfortranarray(x.astype(dtype))
        yield x[..., ::-1, ::-1].astype(dtype)[..., ::-1, ::-1]

    for p, t in itertools.product(views(pred, dtype), views(target, other)):
        np.testing.assert_allclose(nf.surface_metrics(p, t, [1, 2]), expected[0], rtol=1e-13)
        assert np.array_equal(nf.overlap_metrics(p, t), expected[1])


def test_expanded_target_is_not_copied_or_written():
    target = torch.zeros(1, 1, 30, 30, dtype=torch.uint8)
    target[..., 5:9, 5:9] = 1
    pred = target.roll(2, -1).repeat(4, 1, 1, 1)
    hd = nf.surface_metrics(pred, target.expand(4, 1, 30, 30)).hd
    assert torch.equal(hd, torch.full((4, 1), 2.0, dtype=torch.float64))
    assert target.sum() == 16


def test_kinds_of_arrays():
    mask = np.zeros((6, 6), np.uint8)
    mask[2:4, 2:4] = 1
    out = nf.surface_metrics(mask, mask)
    assert isinstance(out.hd, np.float64)
    out = nf.surface_metrics(torch.from_numpy(mask), torch.from_numpy(mask))
    assert isinstance(out.hd, torch.Tensor)
    assert out.hd.shape == ()
    assert out.hd.dtype == torch.float64
    assert float(out.nsd) == 1

    class Foreign:  # an array that only speaks DLPack
        shape = mask.shape

        def __dlpack__(self, **kwargs):
            return mask.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return mask.__dlpack_device__()

    assert float(nf.overlap_metrics(Foreign(), Foreign()).dice) == 1


def test_same_bits_with_1_and_2_threads():
    pairs = [random_pair(s) for s in range(0, 40)] + list(EDGES.values())
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append([nf.surface_metrics(*p) for p in pairs] + [nf.overlap_metrics(*p[:2]) for p in pairs])
    finally:
        torch.set_num_threads(before)
    assert runs[0] == runs[1] == runs[2]


def test_errors():
    x = np.zeros((4, 5), bool)
    for call in (nf.surface_metrics, nf.overlap_metrics):
        with pytest.raises(ValueError, match=r"pred has shape \(4, 5\) and target \(5, 4\)"):
            call(x, x.T)
        with pytest.raises(TypeError, match="target has dtype float32"):
            call(x, x.astype("float32"))
        with pytest.raises(TypeError, match="pass both as one kind"):
            call(x, torch.zeros(4, 5, dtype=torch.bool))
        with pytest.raises(TypeError, match="pred must be a torch tensor"):
            call([1], x)
        with pytest.raises(ValueError, match="at least one mask of one voxel"):
            call(x[:0], x[:0])
        with pytest.raises(ValueError, match="spatial_dims must be 1, 2 or 3"):
            call(x, x, spatial_dims=3)
        with pytest.raises(ValueError, match="neither one mask nor"):
            call(np.zeros((1,) * 6, bool), np.zeros((1,) * 6, bool))
    with pytest.raises(ValueError, match=r"spacing has 3 values for 2 spatial axes"):
        nf.surface_metrics(x, x, (1, 1, 1))
    with pytest.raises(ValueError, match="spacing must be positive"):
        nf.surface_metrics(x, x, (1, -1))
    with pytest.raises(ValueError, match=r"definition must be one of monai, medpy, got 'deepmind'"):
        nf.surface_metrics(x, x, definition="deepmind")
    with pytest.raises(ValueError, match="percentile must be between 0 and 100"):
        nf.surface_metrics(x, x, percentile=101)
    with pytest.raises(ValueError, match="tolerance must be finite and not negative"):
        nf.surface_metrics(x, x, tolerance=math.nan)
