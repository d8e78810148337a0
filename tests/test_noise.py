"""Simulated label noise: what each operator must do, its seeds, and its edge cases."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from noisyseg_fast import _arrays, _core, noise, sample, timing
from noisyseg_fast.distance import distance_transform_edt
from noisyseg_fast.noise import Noise

SEEDED = [
    Noise("erode_or_dilate", radius=(1, 4)),
    Noise("elastic_deform", sigma=3, rotation=20, translation=4, scaling=0.2),
    Noise("flip_square", size=7),
    Noise("polygonize", vertices=5),
    Noise("polygonize", vertices=4, edges="spline"),
    Noise("erase_component", probability=0.7),
    Noise("distort_boundary", radius=(1, 3), share=0.2),
]
ALL = [*SEEDED, Noise("dilate", radius=2), Noise("erode", radius=1), Noise("shift", offset=3)]
SPACING = st.sampled_from([0.5, 1.0, 2.5])


@st.composite
def masks(draw: st.DrawFn, dims: int | None = None) -> np.ndarray:
    """A batch of random masks: dense, sparse, empty, full, of one pixel; any label dtype."""
    space = draw(st.integers(1, 3)) if dims is None else dims
    shape = (draw(st.integers(1, 3)), *(draw(st.integers(1, 14)) for _ in range(space)))
    share = draw(st.sampled_from([0.0, 0.05, 0.4, 0.8, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (random.random(shape) < share).astype(draw(st.sampled_from(["bool", "uint8", "int32", "int64"])))


def blobs(count: int, *spatial: int) -> np.ndarray:
    """Different masks, none of them empty or full."""
    return np.concatenate([timing.blobs((1, *spatial), seed) for seed in range(count)])


# ---- growing and shrinking --------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(masks(), st.floats(0, 6), st.tuples(SPACING, SPACING, SPACING))
def test_dilation_is_distance_at_most_r_and_erosion_its_dual(mask, radius, spacing):
    dims = mask.ndim - 1
    before, spacing = mask.copy(), spacing[:dims]
    grown = noise.dilate(mask, radius, spacing, spatial_dims=dims)
    for one, item in zip(mask != 0, grown, strict=True):
        distance = (
            ndimage.distance_transform_edt(~one, sampling=spacing)
            if one.any()
            else np.full(one.shape, np.inf)
        )
        assert np.array_equal(item != 0, np.float32(distance) <= np.float32(radius))
    shrunk = noise.erode(mask, radius, spacing, spatial_dims=dims)
    outside = noise.dilate((mask == 0).astype(mask.dtype), radius, spacing, spatial_dims=dims)
    assert np.array_equal(shrunk != 0, outside == 0)
    assert grown.dtype == shrunk.dtype == mask.dtype
    assert np.array_equal(mask, before)


def test_radii_for_each_item():
    masks = blobs(3, 30, 31)
    for operator in (noise.dilate, noise.erode):
        together = operator(masks, [1, 0, 2.5], spatial_dims=2)
        for item, mask, r in zip(together, masks, (1, 0, 2.5), strict=True):
            assert np.array_equal(item, operator(mask, r))


@pytest.mark.parametrize("shape", [(2, 70), (3, 40, 200), (2, 9, 130, 67), (1, 40, 3, 300)])
@pytest.mark.parametrize("spacing", [None, (0.7, 1.3, 2.1)])
def test_rows_of_bits_give_what_distances_give(shape, spacing):
    """Radii that reach over no, one or several words of 64 pixels, equal to a distance or not, and beyond what is
    done in bits."""
    dims, random = len(shape) - 1, np.random.default_rng(0)
    spacing = spacing and spacing[:dims]
    masks = timing.blobs(shape, share=0.1)
    masks[0] &= random.random(shape[1:]) < 0.02
    distance = distance_transform_edt(masks == 0, spacing, spatial_dims=dims)
    depth = distance_transform_edt(masks, spacing, spatial_dims=dims)
    some = [float(d) for d in random.choice(distance[0].ravel(), 4)]
    bits = 0
    for radius in [0, 0.99, 1, 1.5, 3, 17, 64, 150, *some]:
        sizes = (*(1.0,) * (3 - dims), *(spacing or (1.0,) * dims))
        lead = masks.reshape((shape[0], *(1,) * (3 - dims), *shape[1:]))
        views = [_arrays.of(x=x).view(x) for x in (lead, np.float32([radius]))]
        bits += _core.dilate_workspace(*views, sizes, (-1, 0, 1)) > 0
        assert np.array_equal(noise.dilate(masks, radius, spacing, spatial_dims=dims), distance <= radius)
        assert np.array_equal(noise.erode(masks, radius, spacing, spatial_dims=dims), depth > radius)
    assert bits >= 5
    radii = [1.5, 0, 70][: shape[0]]
    for item, r, d in zip(
        noise.dilate(masks, radii, spacing, spatial_dims=dims), radii, distance, strict=True
    ):
        assert np.array_equal(item, d <= r)


def test_dilation_with_any_number_of_threads():
    masks = torch.from_numpy(timing.blobs((2, 20, 50, 70)))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((noise.dilate(masks, 4, spatial_dims=3), noise.erode(masks, 2, spatial_dims=3)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_erode_or_dilate_does_one_or_the_other():
    masks = blobs(40, 32, 32)
    noisy = noise.erode_or_dilate(masks, 2, seed=1, spatial_dims=2)
    grown, shrunk = noise.dilate(masks, 2, spatial_dims=2), noise.erode(masks, 2, spatial_dims=2)
    is_grown, is_shrunk = (noisy == grown).all((1, 2)), (noisy == shrunk).all((1, 2))
    assert (is_grown ^ is_shrunk).all()
    assert 8 < is_grown.sum() < 32
    assert np.array_equal(noise.erode_or_dilate(masks, 2, dilation=1, seed=1, spatial_dims=2), grown)
    assert np.array_equal(noise.erode_or_dilate(masks, 2, dilation=0, seed=1, spatial_dims=2), shrunk)
    areas = noise.erode_or_dilate(masks[:1].repeat(40, 0), (0, 6), dilation=1, seed=1, spatial_dims=2).sum(
        (1, 2)
    )
    assert len(set(areas)) > 10  # a radius of its own for each


def test_rater_bias_is_systematic():
    masks = blobs(6, 40, 40)
    drawn = noise.rater_bias(masks, [2, 0, -1.5], seed=0, spatial_dims=2)
    assert drawn.shape == (6, 3, 40, 40) and drawn.dtype == masks.dtype
    assert np.array_equal(drawn[:, 0], noise.dilate(masks, 2, spatial_dims=2))
    assert np.array_equal(drawn[:, 1], masks)
    assert np.array_equal(drawn[:, 2], noise.erode(masks, 1.5, spatial_dims=2))
    spread = noise.rater_bias(masks[:1].repeat(50, 0), [3, -3], 1.0, seed=0, spatial_dims=2)
    areas = spread.sum((2, 3))
    assert areas[:, 0].std() > 0 and (areas[:, 0] > masks[0].sum()).mean() > 0.9
    assert (areas[:, 1] < masks[0].sum()).mean() > 0.9


# ---- moving -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(masks(), st.lists(st.integers(-16, 16), min_size=3, max_size=3))
def test_shift_moves_exactly_and_fills_zeros(mask, offset):
    dims = mask.ndim - 1
    moved = noise.shift(mask, offset[:dims], spatial_dims=dims)
    expected = ndimage.shift(mask.astype(float), [0, *offset[:dims]], order=0, cval=0)
    assert np.array_equal(moved, expected.astype(mask.dtype))
    right = noise.shift(mask, offset[0], spatial_dims=dims)
    assert np.array_equal(right, noise.shift(mask, [0] * (dims - 1) + [offset[0]], spatial_dims=dims))


def reference_place(shape, displacement, affine):
    """The places that deform samples, by SciPy: (dims, *S)."""
    dims = len(shape)
    index = np.indices(shape).astype(float)
    grid = np.stack(
        [i * (p - 1) / max(n - 1, 1) for i, p, n in zip(index, displacement.shape[1:], shape, strict=True)]
    )
    u = np.stack([ndimage.map_coordinates(d, grid, order=3, mode="mirror") for d in displacement])
    return np.tensordot(affine[:, :dims], index, 1) + affine[:, dims].reshape((-1,) + (1,) * dims) + u


@pytest.mark.parametrize(
    ("shape", "points"),
    [((41, 56), (3, 5)), ((300, 7), (2, 2)), ((9, 20, 31), (3, 2, 6)), ((50,), (4,)), ((1, 9), (3, 3))],
)
def test_deform_is_scipys_map_coordinates(shape, points):
    random = np.random.default_rng(0)
    dims = len(shape)
    displacement = random.normal(0, 3, (2, dims, *points))
    affine = np.eye(dims, dims + 1) + random.normal(0, 0.05, (2, dims, dims + 1))
    images = random.random((2, *shape))
    labels = random.integers(0, 9, (2, *shape))
    soft = noise.deform(images, displacement, 1, affine=affine, fill=0.25, spatial_dims=dims)
    single = noise.deform(images.astype(np.float32), displacement, 1, affine=affine, spatial_dims=dims)
    hard = noise.deform(labels, displacement, affine=affine, fill=7, spatial_dims=dims)
    assert hard.dtype == labels.dtype and soft.dtype == np.float64 and single.dtype == np.float32
    for i in range(2):
        place = reference_place(shape, displacement[i], affine[i])
        expected = ndimage.map_coordinates(images[i], place, order=1, mode="grid-constant", cval=0.25)
        np.testing.assert_allclose(soft[i], expected, atol=1e-11)
        rounded = np.floor(place + 0.5).astype(int)
        inside = np.all([(r >= 0) & (r < n) for r, n in zip(rounded, shape, strict=True)], 0)
        clipped = tuple(np.clip(r, 0, n - 1) for r, n in zip(rounded, shape, strict=True))
        near_half = np.any(np.abs(place - np.floor(place) - 0.5) < 1e-9, 0)
        wrong = hard[i] != np.where(inside, labels[i][clipped], 7)
        assert not (wrong & ~near_half).any()


def test_deform_equals_elasticdeform():
    elasticdeform = pytest.importorskip("elasticdeform", exc_type=ImportError)
    displacement = np.random.default_rng(1).normal(0, 4, (2, 3, 5))
    mask, image = blobs(1, 64, 80)[0], np.random.default_rng(2).random((64, 80))
    inner = (slice(16, -16), slice(16, -16))  # at the edge it counts pixels partly outside as outside
    assert np.array_equal(
        noise.deform(mask, displacement)[inner], elasticdeform.deform_grid(mask, displacement, order=0)[inner]
    )
    np.testing.assert_allclose(
        noise.deform(image, displacement, 1)[inner],
        elasticdeform.deform_grid(image, displacement, order=1)[inner],
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float32", "float64"])
def test_no_deformation_changes_nothing(dtype):
    image = np.random.default_rng(0).integers(0, 2, (2, 13, 14)).astype(dtype)
    same = noise.elastic_deform(image, 0, seed=0, spatial_dims=2)
    assert np.array_equal(same, image) and same.dtype == image.dtype
    soft = noise.elastic_deform(image, 0, order=1, seed=0, spatial_dims=2)
    assert np.array_equal(soft, image.astype(float))
    assert soft.dtype == ("float64" if dtype == "float64" else "float32")


def test_elastic_deform_rotates_translates_and_scales():
    image = np.zeros((200, 41, 41), np.uint8)
    image[:, 20, 30] = 1  # 10 pixels from the centre
    turned = noise.elastic_deform(image, 0, rotation=180, seed=0, spatial_dims=2)
    where = np.argwhere(turned)
    distance = np.hypot(where[:, 1] - 20, where[:, 2] - 20)
    assert abs(distance - 10).max() < 1 and len({tuple(w[1:]) for w in where}) > 30
    moved = np.argwhere(noise.elastic_deform(image, 0, translation=4, seed=0, spatial_dims=2))
    assert len(moved) == 200 and abs(moved[:, 1:] - (20, 30)).max() == 4
    square = np.zeros((200, 41, 41), np.uint8)
    square[:, 10:31, 10:31] = 1
    areas = noise.elastic_deform(square, 0, scaling=0.5, seed=0, spatial_dims=2).sum((1, 2))
    assert 100 < areas.min() < 150 and 900 < areas.max() < 1000
    wide = noise.elastic_deform(square, 4, seed=0, spatial_dims=2)
    assert 0.5 < noise.dice_of(wide, square, spatial_dims=2).mean() < 0.95


# ---- mistakes ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(masks(), st.integers(0, 16), st.integers(0, 2**63))
def test_flip_square_reverses_exactly_a_square(mask, size, seed):
    dims = mask.ndim - 1
    changed = (noise.flip_square(mask, size, seed=seed, spatial_dims=dims) != 0) ^ (mask != 0)
    for item in changed:
        if size == 0:
            assert not item.any()
            continue
        where = np.argwhere(item)
        low, high = where.min(0), where.max(0) + 1
        assert np.array_equal(high - low, np.minimum(size, item.shape))
        assert item[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].all()
        assert item.sum() == math.prod(high - low)


def test_flip_square_is_everywhere():
    where = noise.flip_square(np.zeros((300, 9, 9), np.uint8), 8, seed=0, spatial_dims=2)
    assert {tuple(np.argwhere(w)[0]) for w in where} == {(0, 0), (0, 1), (1, 0), (1, 1)}


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from(["full", "face"]))
def test_connected_components_are_scipys(mask, connectivity):
    dims = mask.ndim - 1
    labels = noise.connected_components(mask, connectivity=connectivity, spatial_dims=dims)
    structure = np.ones((3,) * dims) if connectivity == "full" else None
    for item, got in zip(mask, labels, strict=True):
        expected, count = ndimage.label(item, structure)
        for number in range(1, count + 1):
            where = np.flatnonzero(expected == number)
            assert (got.reshape(-1)[where] == where[0] + 1).all()
        assert np.array_equal(got != 0, item != 0)


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from(["random", "largest", "smallest"]), st.sampled_from(["full", "face"]))
def test_erase_removes_exactly_one_component(mask, which, connectivity):
    dims = mask.ndim - 1
    noisy = noise.erase_component(mask, which=which, connectivity=connectivity, seed=0, spatial_dims=dims)
    structure = np.ones((3,) * dims) if connectivity == "full" else None
    for before, after in zip(mask != 0, noisy != 0, strict=True):
        labels, count = ndimage.label(before, structure)
        if not count:
            assert not after.any()
            continue
        gone = before & ~after
        numbers = np.unique(labels[gone])
        assert (
            len(numbers) == 1 and np.array_equal(gone, labels == numbers[0]) and not (after & ~before).any()
        )
        sizes = np.bincount(labels.reshape(-1))[1:]
        if which != "random":
            assert gone.sum() == (sizes.max() if which == "largest" else sizes.min())


def test_erase_component_has_a_probability_and_takes_any():
    two = np.zeros((400, 8, 8), np.uint8)
    two[:, 1, 1] = two[:, 5:7, 5] = 1
    noisy = noise.erase_component(two, 0.25, seed=0, spatial_dims=2)
    hit = (noisy != two).any((1, 2))
    assert 70 < hit.sum() < 130
    assert 0.3 < noisy[hit, 1, 1].mean() < 0.7


def contour(mask):
    return (mask != 0) & (ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] <= 1)


@settings(max_examples=60, deadline=None)
@given(masks(2), st.integers(3, 9), st.floats(0, 0.999), st.booleans())
def test_polygon_vertices_lie_on_the_contour(mask, n, phase, largest):
    batch = noise._batch(mask, 2)
    found = noise._object(batch)
    points, first, owner = noise._vertices(batch, found, n, np.full(len(mask), phase), largest)
    assert len(points) == len(owner) == first[-1]
    counts = [ndimage.label(m, np.ones((3, 3)))[1] for m in mask]
    assert np.array_equal(np.diff(first), np.minimum(counts, 1) if largest else counts)
    for polygon, item in zip(points, owner, strict=True):
        labels, _ = ndimage.label(mask[item], np.ones((3, 3)))
        rows, columns = polygon.T
        assert contour(mask[item])[rows, columns].all()
        assert len(np.unique(labels[rows, columns])) == 1


def test_polygon_vertices_have_equal_arc_length():
    square = np.zeros((1, 30, 30), np.uint8)
    square[0, 3:24, 5:26] = 1  # a contour of 80 steps
    batch = noise._batch(square, 2)
    points, _, _ = noise._vertices(batch, noise._object(batch), 4, np.zeros(1), False)
    assert np.array_equal(points[0], [(3, 5), (3, 25), (23, 25), (23, 5)])
    points, _, _ = noise._vertices(batch, noise._object(batch), 4, np.array([0.5]), False)
    assert np.array_equal(points[0], [(3, 15), (13, 25), (23, 15), (13, 5)])
    assert np.array_equal(noise.polygonize(square, 4, spatial_dims=2), square)
    disk = (np.hypot(*(np.indices((101, 101)) - 50)) <= 40).astype(np.uint8)
    for n in (3, 5, 12):  # a regular polygon in the circle
        area = noise.polygonize(disk, n).sum() / disk.sum()
        assert area == pytest.approx(n / (2 * math.pi) * math.sin(2 * math.pi / n), abs=0.03)
        assert noise.polygonize(disk, n, edges="spline").sum() > noise.polygonize(disk, n).sum()
    assert noise.dice_of(noise.polygonize(disk, 8, edges="spline"), disk)[0] > 0.99


def test_polygons_are_filled_as_opencv_does():
    cv2 = pytest.importorskip("cv2")
    random = np.random.default_rng(0)
    for n in (1, 2, 3, 7, 30):
        v = random.integers(-3, 40, (2, n, 2))
        out = np.zeros((1, 37, 38), np.uint8)
        fill(v * 256, out)
        inside = np.zeros(out[0].shape, bool)
        for polygon in v:
            line = polygon[:, ::-1].astype(np.float32).reshape(-1, 1, 2)
            for y, x in np.ndindex(inside.shape):
                if n > 2 and crossings_wind(polygon, y, x):
                    inside[y, x] = True
                if cv2.pointPolygonTest(line, (x, y), False) == 0:
                    inside[y, x] = True
        assert np.array_equal(out[0] != 0, inside), n


def fill(vertices, out):
    space = noise._batch(out, 2).space
    memory = np.zeros(1 << 12)
    arguments = (np.ascontiguousarray(vertices, np.int32), np.array([0, len(vertices)]), out)
    noise._run(_core.fill_polygons, space, *arguments, memory.ctypes.data)


def crossings_wind(polygon, y, x):
    """The winding number of a polygon around a point off its edges."""
    turns = 0.0
    p = polygon - (y, x)
    for a, b in zip(p, np.roll(p, -1, 0), strict=True):
        turns += math.atan2(a[0] * b[1] - a[1] * b[0], a[0] * b[0] + a[1] * b[1])
    return round(turns / (2 * math.pi)) != 0


def test_polygonize_of_odd_objects():
    for shape in ([(2, 3)], [(2, 3), (2, 4)], [(1, 1), (2, 2), (3, 3)], [(0, 0), (0, 6), (6, 0)]):
        mask = np.zeros((7, 7), np.uint8)
        mask[tuple(np.transpose(shape))] = 1
        assert np.array_equal(noise.polygonize(mask, 6), mask)
    two = np.zeros((20, 20), np.uint8)
    two[2:5, 2:5] = two[8:18, 8:18] = 1
    assert np.array_equal(noise.polygonize(two, 40), two)
    kept = noise.polygonize(two, 40, components="largest")
    assert kept[8:18, 8:18].all() and kept.sum() == 100
    ring = two.copy()
    ring[11:15, 11:15] = 0
    assert np.array_equal(noise.polygonize(ring, 40), two)  # holes are filled
    assert np.array_equal(
        noise.polygonize(np.stack([two, ring]), 40), np.stack([two, two])
    )  # a volume: its slices


def test_distort_boundary_adds_and_removes_disks():
    masks = blobs(20, 48, 48)
    noisy = noise.distort_boundary(masks, (2, 4), 0.1, seed=0, spatial_dims=2)
    for mask, after in zip(masks, noisy, strict=True):
        changed = mask != after
        distance = ndimage.distance_transform_edt(~contour_of(mask))
        assert changed.any() and distance[changed].max() <= 4
        added, gone = changed & (after != 0), changed & (after == 0)
        assert added.any() and gone.any()
    for radius in (4, 4), (0, 16):  # by transforms of masks, and by one of a function
        far = noise.distort_boundary(masks, radius, 0.02, seed=0, spatial_dims=2)
        batch = noise._batch(masks, 2)
        keys = [int(g.integers(2**63)) for g in noise._generators(0, 20)]
        disks = []
        for turn in (0, 1):
            chosen, size = (
                noise._uniforms(batch, keys, 2 * turn) < 0.02,
                noise._uniforms(batch, keys, 2 * turn + 1),
            )
            here = np.zeros(masks.shape, bool)
            for i, y, x in np.argwhere(chosen & np.stack([contour_of(m) for m in masks])):
                r = radius[0] + int(size[i, y, x] * np.float32(radius[1] - radius[0] + 1))
                here[i] |= np.hypot(*(np.indices((48, 48)) - np.reshape((y, x), (2, 1, 1)))) <= r
            disks.append(here)
        assert np.array_equal(far != 0, ((masks != 0) | disks[0]) & ~disks[1])
    assert np.array_equal(noise.distort_boundary(masks, 3, 0, seed=0, spatial_dims=2), masks)
    every = noise.distort_boundary(masks, 3, 1, seed=0, spatial_dims=2)
    for mask, after in zip(masks, every, strict=True):
        near = ndimage.distance_transform_edt(~contour_of(mask)) <= 3
        assert np.array_equal(after != 0, (mask != 0) & ~near)


def contour_of(mask):
    return (mask != 0) & (ndimage.distance_transform_edt(mask) == 1)


def test_uniforms_are_philox():
    """The known answer of Random123 for key and counter 0, and moments."""
    out = np.empty((1, 6), np.float32)
    space = noise._batch(out, 1).space
    noise._run(_core.uniforms, space, np.zeros(1, np.int64), 0, out)
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert out[0, :4].tolist() == [(w >> 8) / 2**24 for w in words]
    many = np.empty((3, 100_001), np.float32)
    noise._run(_core.uniforms, space, np.arange(3), 1, many)
    assert abs(many.mean(1) - 0.5).max() < 0.005 and abs(many.var(1) - 1 / 12).max() < 0.002
    assert abs(np.corrcoef(many)[0, 1]) < 0.02 and many.min() >= 0 and many.max() < 1


# ---- seeds, kinds of arrays, edge cases ---------------------------------------------------------------


def apply(operator, masks, seed=7, dims=2):
    return operator(masks, seed=seed, spatial_dims=dims)


@pytest.mark.parametrize("operator", SEEDED, ids=repr)
def test_seeds_and_streams(operator):
    masks = blobs(8, 40, 40)
    first = apply(operator, masks)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert np.array_equal(apply(operator, masks), first)
    finally:
        torch.set_num_threads(before)
    assert not np.array_equal(apply(operator, masks, 8), first)
    assert np.array_equal(apply(operator, masks[:3]), first[:3])  # however many follow
    own = apply(operator, masks, list(range(10, 18)))
    order = [5, 0, 7, 3]
    assert np.array_equal(
        apply(operator, masks[order], [10 + i for i in order]), own[order]
    )  # whatever the order
    numpy_seeded = [apply(operator, masks, np.random.default_rng(3)) for _ in range(2)]
    torch_seeded = [apply(operator, masks, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert np.array_equal(*numpy_seeded) and np.array_equal(*torch_seeded)
    generator = np.random.default_rng(3)
    assert not np.array_equal(apply(operator, masks, generator), apply(operator, masks, generator))


def test_every_instruction_set_gives_the_same_bits():
    code = """
import hashlib, numpy as np
from noisyseg_fast import noise, timing
masks = timing.blobs((6, 61, 150))
parts = [noise.elastic_deform(masks, 4, rotation=9, order=order, seed=1, spatial_dims=2) for order in (0, 1)]
parts += [noise.distort_boundary(masks, seed=1, spatial_dims=2), noise.polygonize(masks, 5, seed=1, spatial_dims=2)]
print(hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "NOISYSEG_ISA": isa},
        ).stdout
        for isa in ("baseline", "avx2", "avx512")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("operator", ALL, ids=repr)
@pytest.mark.parametrize("dims", [2, 3])
def test_every_kind_of_array_and_edge_masks(operator, dims):
    spatial = (17, 16) if dims == 2 else (5, 17, 16)
    masks = np.zeros((5, *spatial), np.uint8)
    masks[0] = blobs(1, *spatial)[0]
    masks[1] = 1
    masks[2][tuple(n // 2 for n in spatial)] = 1
    masks[4] = blobs(1, *spatial)[0][::-1]
    kept = masks.copy()
    result = apply(operator, masks, dims=dims)
    assert result.shape == masks.shape and result.dtype == masks.dtype and set(np.unique(result)) <= {0, 1}
    for dtype in (torch.uint8, torch.bool, torch.int64):
        tensor = torch.from_numpy(masks).to(dtype)
        got = apply(operator, tensor, dims=dims)
        assert isinstance(got, torch.Tensor) and got.dtype == dtype
        assert np.array_equal(got.numpy().astype(np.uint8), result)
    strided = np.asfortranarray(masks)
    assert np.array_equal(apply(operator, strided, dims=dims), result)
    nested = apply(operator, masks.reshape((1, 5, *spatial)), dims=dims)
    assert np.array_equal(nested[0], result)
    assert np.array_equal(masks, kept)
    none = apply(operator, masks[:0], dims=dims)
    assert none.shape == (0, *spatial) and none.dtype == masks.dtype
    if operator.name not in ("flip_square",):
        assert not result[3].any()  # nothing comes from an empty mask


def test_a_foreign_array_comes_back_as_its_kind():
    class Foreign:  # what JAX and others offer
        def __init__(self, x):
            self.x, self.shape, self.ndim, self.dtype = x, x.shape, x.ndim, x.dtype

        def __dlpack__(self, **options):
            return self.x.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

        def __array_namespace__(self):
            return type("library", (), {"from_dlpack": staticmethod(lambda x: Foreign(np.from_dlpack(x)))})

    mask = blobs(1, 20, 20)[0]
    got = noise.flip_square(Foreign(mask), 5, seed=0)
    assert isinstance(got, Foreign) and np.array_equal(got.x, noise.flip_square(mask, 5, seed=0))


def test_label_maps():
    labels = np.zeros((1, 20, 20), np.int64)
    labels[0, 2:8, 2:8], labels[0, 10:18, 10:18] = 1, 3
    moved = noise.shift(labels, 4, spatial_dims=2)
    assert set(np.unique(moved)) == {0, 1, 3} and np.array_equal(moved[:, :, 4:], labels[:, :, :-4])
    assert set(np.unique(noise.elastic_deform(labels, 2, seed=0, spatial_dims=2))) == {0, 1, 3}
    for operator in ALL:
        if operator.name in ("shift", "elastic_deform"):
            continue
        with pytest.raises(ValueError, match=r"masks? holds more labels than 0 and 3; use noise\.each_label"):
            apply(operator, labels)
    each = noise.each_label(Noise("dilate", radius=2), labels, spatial_dims=2)
    assert np.array_equal(each[0] == 1, noise.dilate(labels[0] == 1, 2))
    assert np.array_equal(each[0] == 3, noise.dilate(labels[0] == 3, 2) & (each[0] != 1))


# ---- combinations -------------------------------------------------------------------------------------


def test_mixture_takes_each_with_its_probability():
    masks = blobs(300, 24, 24)
    parts = [Noise("dilate", radius=2), None, Noise("shift", offset=3)]
    noisy = noise.mixture(masks, parts, [0.5, 0.2, 0.2], seed=0, spatial_dims=2)
    grown, moved = noise.dilate(masks, 2, spatial_dims=2), noise.shift(masks, 3, spatial_dims=2)
    kinds = np.stack([(noisy == x).all((1, 2)) for x in (grown, masks, moved)])
    assert (kinds.sum(0) == 1).all()
    assert np.abs(kinds.mean(1) - (0.5, 0.3, 0.2)).max() < 0.07
    assert np.array_equal(noise.mixture(masks[:9], parts, [0.5, 0.2, 0.2], seed=0, spatial_dims=2), noisy[:9])
    tensor = noise.mixture(torch.from_numpy(masks), parts, [0.5, 0.2, 0.2], seed=0, spatial_dims=2)
    assert np.array_equal(tensor.numpy(), noisy)
    assert np.array_equal(noise.mixture(masks, [None], seed=0, spatial_dims=2), masks)


@pytest.fixture(scope="module")
def nodules() -> np.ndarray:
    masks = sample.load().masks[:, 0]
    return masks[masks.any((1, 2))][:100]


@pytest.mark.parametrize("name", [n for n in noise.OPERATORS if n != "distort_boundary"])
@pytest.mark.parametrize("target", [0.8, 0.7])
def test_calibrate_hits_the_mean_dice(name, target, nodules):
    found = noise.calibrate(name, nodules, target, seed=3)
    noisy = found(nodules, seed=3, spatial_dims=2)
    mean = noise.dice_of(noisy, nodules, spatial_dims=2).mean()
    assert abs(mean - target) < 0.01
    assert abs(mean - found.dice) < 1e-9
    other = noise.dice_of(found(nodules, seed=4, spatial_dims=2), nodules, spatial_dims=2).mean()
    assert abs(other - target) < (
        0.2 if name == "erase_component" else 0.1
    )  # other places, the same strength


def test_calibrate_of_a_function_of_torch_and_of_the_unreachable(nodules):
    masks = torch.from_numpy(nodules[:60])

    def cut(masks, magnitude, *, seed, spatial_dims):
        return masks * (torch.arange(masks.shape[-1]) >= magnitude)

    found = noise.calibrate(cut, masks, 0.8, bounds=(0, 64))
    assert found.name == "cut" and abs(found.dice - 0.8) < 0.01
    assert isinstance(found(masks, spatial_dims=2), torch.Tensor)
    spline = Noise("polygonize", edges="spline")
    with pytest.raises(
        ValueError, match=r"polygonize gives a mean Dice from 0.99. .* target_dice 0.3 is outside"
    ):
        noise.calibrate(spline, nodules, 0.3)
    closest = noise.calibrate(spline, nodules, 0.3, unreachable="closest")
    assert closest.low == closest.high == 1 and closest.dice > 0.7
    ignored = noise.calibrate("dilate", np.concatenate([nodules[:50], 0 * nodules[:50]]), 0.8)
    assert ignored.dice == noise.calibrate("dilate", nodules[:50], 0.8).dice  # empty masks have no Dice


def test_simulated_raters(nodules):
    raters = noise.simulate_raters(nodules[:60], 0.8, seed=0)
    assert raters.annotations.shape == (60, 5, 64, 64)
    assert [c.name for c in raters.calibrations] == [n.name for n in noise.RATERS]
    for k, found in enumerate(raters.calibrations):
        mean = noise.dice_of(raters.annotations[:, k], nodules[:60], spatial_dims=2).mean()
        assert mean == pytest.approx(found.dice) and abs(mean - 0.8) < (0.06 if k == 3 else 0.01)
    again = noise.simulate_raters(nodules[:60], 0.8, seed=0)
    assert np.array_equal(again.annotations, raters.annotations)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: noise.erode(m, -1), "radius must be finite and not negative, got -1"),
        (lambda m: noise.erode(m, 1, (1, 0)), "spacing must be positive and finite"),
        (
            lambda m: noise.erode_or_dilate(m, (4, 1), seed=0),
            "radius must be finite, not negative and rising, got (4, 1)",
        ),
        (lambda m: noise.erode_or_dilate(m, "x", seed=0), "radius must be a number or (low, high), got 'x'"),
        (lambda m: noise.erode_or_dilate(m, 1, dilation=2, seed=0), "dilation must be from 0 to 1, got 2"),
        (lambda m: noise.rater_bias(m, [], seed=0), "bias must be one finite number for each rater, got []"),
        (lambda m: noise.rater_bias(m, [1], -1, seed=0), "spread must be finite and not negative, got -1"),
        (lambda m: noise.shift(m, 1.5), "offset must be one integer, or one for each of 2 axes, got 1.5"),
        (
            lambda m: noise.shift(m, (1, 2, 3)),
            "offset must be one integer, or one for each of 2 axes, got (1, 2, 3)",
        ),
        (lambda m: noise.elastic_deform(m, -1, seed=0), "sigma must be finite and not negative, got -1"),
        (lambda m: noise.elastic_deform(m, points=1, seed=0), "points must be 2 to 64"),
        (lambda m: noise.elastic_deform(m, scaling=1, seed=0), "scaling must be from 0 to below 1, got 1"),
        (
            lambda m: noise.elastic_deform(m, order=3, seed=0),
            "order must be 0 (nearest) or 1 (linear), got 3",
        ),
        (lambda m: noise.deform(m, np.zeros((3, 3, 3))), "displacement must be (2, *points)"),
        (lambda m: noise.deform(m, np.full((2, 3, 3), np.nan)), "displacement and affine must be finite"),
        (lambda m: noise.deform(m, np.zeros((2, 3, 3)), affine=np.eye(2)), "affine must be (2, 3)"),
        (lambda m: noise.flip_square(m, -1, seed=0), "size must be an integer >= 0"),
        (lambda m: noise.erase_component(m, 1.1, seed=0), "probability must be from 0 to 1, got 1.1"),
        (
            lambda m: noise.erase_component(m, which="any", seed=0),
            "which must be random, largest or smallest, got 'any'",
        ),
        (
            lambda m: noise.erase_component(m, connectivity=8, seed=0),
            "connectivity must be full or face, got 8",
        ),
        (lambda m: noise.polygonize(m, 2), "vertices must be an integer of 3 or more, got 2"),
        (lambda m: noise.polygonize(m, 3, edges="round"), "edges must be straight or spline, got 'round'"),
        (lambda m: noise.polygonize(m, 3, components="one"), "components must be all or largest, got 'one'"),
        (lambda m: noise.polygonize(m[0], 3), "polygonize needs 2 or 3 spatial axes, got 1"),
        (lambda m: noise.distort_boundary(m, share=2, seed=0), "share must be from 0 to 1, got 2"),
        (lambda m: noise.mixture(m, [], seed=0), "probabilities must be one for each of 0 noises, got 0"),
        (
            lambda m: noise.mixture(m, [None], [1.5], seed=0),
            "probabilities must not be negative and sum up to at most 1",
        ),
        (lambda m: Noise("blur"), "unknown noise 'blur'; choose from dilate, erode"),
        (lambda m: Noise("shift", radius=1), "shift has no option 'radius'; it takes offset"),
        (lambda m: noise.calibrate("dilate", m[None], 1.0), "target_dice must be between 0 and 1, got 1.0"),
        (
            lambda m: noise.calibrate("dilate", m[None], 0.8),
            "masks hold no object: there is no Dice to reach",
        ),
        (lambda m: noise.calibrate(lambda *a: 0, m[None], 0.8), "bounds are needed for a function"),
        (
            lambda m: noise.calibrate("dilate", m[None], 0.8, bounds=(2, 1)),
            "bounds must be rising, got (2, 1)",
        ),
        (
            lambda m: noise.calibrate("dilate", m[None], 0.8, unreachable="x"),
            "unreachable must be error or closest",
        ),
        (lambda m: noise.flip_square(m, 3, seed=[1, 2]), "seed has 2 values for 1 items"),
        (
            lambda m: noise.flip_square(m, 3, seed=0, spatial_dims=3),
            "spatial_dims must be 1 to 2 for masks of shape (6, 6), got 3",
        ),
        (lambda m: noise.shift(np.zeros((1, 2, 3, 4)), 1), "pass spatial_dims (at most 3)"),
        (lambda m: noise.shift(np.zeros((0, 3)), 1), "masks has a spatial axis of size 0: shape (0, 3)"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call(np.zeros((6, 6), np.uint8))


def test_type_errors():
    mask = np.zeros((6, 6), np.uint8)
    with pytest.raises(TypeError, match="masks has dtype float32; pass labels"):
        noise.flip_square(mask.astype(np.float32), 2, seed=0)
    for seed in (-1, 1.5, True, None):
        with pytest.raises(TypeError, match="seed must be an integer from 0"):
            noise.flip_square(mask, 2, seed=seed)
    with pytest.raises(TypeError, match="noise must be a name, a Noise or a function, not int"):
        noise.calibrate(3, mask[None], 0.8)
