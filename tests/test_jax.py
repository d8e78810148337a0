"""JAX arrays, the library that DLPack is most wanted for: every operation of docs/arrays.md's table, on the CPU.

JAX comes with the `dev` extra; where it is missing, tests/test_arrays.py has stand-ins for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import noisyseg_fast as n
from noisyseg_fast import _arrays, noise
from noisyseg_fast.compat import medpy, scipy

jax = pytest.importorskip("jax")
jnp = jax.numpy

random = np.random.default_rng(0)
MASK, OTHER = (random.random((2, 2, 9, 10)) < 0.4).astype(np.uint8)
MASK[:, 3:7, 3:7] = 1
RATERS = (random.random((2, 4, 9, 10)) < 0.4).astype(np.uint8)
LOGITS = random.normal(size=(2, 3, 9, 10)).astype(np.float32)
CLASSES = random.integers(0, 3, (2, 9, 10)).astype(np.int32)
P = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
WEIGHT = random.random((2, 9, 10)).astype(np.float32)
SOFT = random.random((2, 4, 9, 10)).astype(np.float32)
NET = [
    random.normal(size=s).astype(np.float32)
    for s in ((2, 3, 3), (2,), (2, 5, 5), (2,), (5,), (1,))  # of mask_net: w3, b3, w5, b5, w1, b1
]
MW = [random.normal(size=s).astype(np.float32) for s in ((7,), (7,), (7,), (1,))]


def plane(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *arrays: function(*arrays, spatial_dims=2, **options)


def loss(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *arrays: function(*arrays, return_grad=True, **options)


OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "distance_transform_edt": (plane(n.distance_transform_edt, dtype="float64"), (MASK,)),
    "distance_transform_edt, indices": (plane(n.distance_transform_edt, return_indices=True), (MASK,)),
    "distance_transform_edt, labels": (plane(n.distance_transform_edt, multi_label=True), (CLASSES,)),
    "signed_distance_map": (plane(n.signed_distance_map, num_classes=3), (CLASSES,)),
    "sampled_distance": (plane(n.sampled_distance), (WEIGHT, MASK)),
    "surface_metrics": (plane(n.surface_metrics), (MASK, OTHER)),
    "surface_metrics, tolerances": (
        plane(n.surface_metrics, num_classes=3, tolerance=(1, 2)),
        (CLASSES, CLASSES[::-1]),
    ),
    "overlap_metrics": (plane(n.overlap_metrics), (MASK, OTHER)),
    "overlap_metrics, logits": (n.overlap_metrics, (LOGITS, CLASSES)),
    "confusion": (plane(n.confusion), (MASK, OTHER)),
    "confusion, one pair": (lambda a, b: n.confusion(a[0], b[0]), (MASK, OTHER)),
    "quantile": (lambda x: n.quantile(x, 0.9), (P,)),
    "topk_threshold": (lambda x: n.topk_threshold(x, 7), (P,)),
    "topk_mask": (lambda x: n.topk_mask(x, 7, per_image=True), (P,)),
    "confident_joint": (n.confident_joint, (P, CLASSES)),
    "label_errors": (n.label_errors, (P, CLASSES)),
    "majority_vote": (n.majority_vote, (RATERS,)),
    "majority_vote, one image": (lambda x: n.majority_vote(x[0], spatial_dims=2), (RATERS,)),
    "staple": (n.staple, (RATERS,)),
    "simple": (n.simple, (RATERS,)),
    "soft_average": (n.soft_average, (RATERS,)),
    "label_sampling": (
        lambda x: n.label_sampling(x, np.random.default_rng(0), return_rater=True),
        (RATERS,),
    ),
    "rater_scores": (lambda a, f: n.rater_scores(a, f, spatial_dims=2), (RATERS, MASK)),
    "agreement": (n.agreement, (RATERS,)),
    **{
        f"noise.{f.__name__}": (plane(f, **options), (MASK,))
        for f, options in (
            (noise.dilate, {"radius": 1.5}),
            (noise.erode, {"radius": 1}),
            (noise.erode_or_dilate, {"radius": 1, "seed": 0}),
            (noise.rater_bias, {"bias": (1, -1), "seed": 0}),
            (noise.shift, {"offset": 2}),
            (noise.elastic_deform, {"sigma": 2, "seed": 0}),
            (noise.flip_square, {"size": 3, "seed": 0}),
            (noise.erase_component, {"seed": 0}),
            (noise.connected_components, {}),
            (noise.polygonize, {"vertices": 4}),
            (noise.distort_boundary, {"radius": 1, "seed": 0}),
        )
    },
    "noise.dilate, nothing": (plane(noise.dilate, radius=0), (MASK,)),
    "noise.shift, nothing": (plane(noise.shift, offset=0), (MASK,)),
    "noise.mixture": (plane(noise.mixture, noises=[noise.Noise("shift", offset=1), None], seed=0), (MASK,)),
    "noise.each_label": (lambda x: noise.each_label(noise.Noise("dilate", radius=1), x), (CLASSES,)),
    "noise.calibrate": (
        lambda x: noise.calibrate("dilate", x, 0.8, tolerance=0.05, spatial_dims=2)(x, seed=1),
        (MASK,),
    ),
    "noise.simulate_raters": (lambda x: noise.simulate_raters(x, seed=0).annotations, (MASK,)),
    "noise.corrupt": (lambda x: noise.corrupt(x, 0.5, 2, seed=0, spatial_dims=2)[0], (MASK,)),
    "noise.dilate_labels": (lambda x: noise.dilate_labels(x[0], 1), (CLASSES,)),
    **{
        f.__name__: (loss(f), (LOGITS, CLASSES))
        for f in (
            n.nr_dice_loss,
            n.dice_loss,
            n.focal_dice_loss,
            n.generalized_dice_loss,
            n.dice_ce_loss,
            n.dice_mae_loss,
        )
    },
    "pixel_loss": (
        lambda z, y, w: n.pixel_loss(z, y, kind="gce", weight=w, reduction="none", return_grad=True),
        (LOGITS, CLASSES, WEIGHT),
    ),
    "pixel_loss, value": (n.pixel_loss, (LOGITS, CLASSES)),
    "boundary_loss": (loss(n.boundary_loss), (LOGITS, LOGITS[::-1])),
    "consistency_loss": (loss(n.consistency_loss), (LOGITS, LOGITS[::-1])),
    "uncertainty_weighted_loss": (loss(n.uncertainty_weighted_loss), (LOGITS[:, :1], RATERS, SOFT)),
    "dual_task_loss": (loss(n.dual_task_loss), (LOGITS[:, :1], LOGITS[:, 1:2], MASK)),
    "ce_dual": (n.ce_dual, (LOGITS, LOGITS[::-1], CLASSES)),
    "mask_net": (lambda x, *theta: n.mask_net(x, theta), (WEIGHT, *NET)),
    "mask_net_vjp": (
        lambda d, r, x, *theta: n.mask_net_vjp(d, r, x, theta, attached=True),
        (WEIGHT, P[:, 0], WEIGHT, *NET),
    ),
    "mw_net": (lambda x, *theta: n.mw_net(x, theta), (WEIGHT, *MW)),
    "compat.scipy": (lambda x: scipy.distance_transform_edt(x[0], return_indices=True), (MASK,)),
    "compat.scipy, full": (
        lambda x: scipy.distance_transform_edt(x[0] > 9, return_indices=True),
        (-CLASSES,),
    ),
    "compat.scipy, all object": (
        lambda x: scipy.distance_transform_edt(x[0] + 1, (1, 2), return_indices=True),
        (MASK,),
    ),
    **{
        f"compat.medpy.{name}": (lambda a, b, name=name: getattr(medpy, name)(a[0], b[0]), (MASK, OTHER))
        for name in (
            "hd",
            "hd95",
            "asd",
            "assd",
            "dc",
            "jc",
            "precision",
            "sensitivity",
            "specificity",
            "ravd",
        )
    },
}
NUMBERS = {name for name in OPERATIONS if "medpy" in name}  # Python's floats


@pytest.fixture
def x64() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def leaves(x: Any) -> list[Any]:
    return [leaf for part in x for leaf in leaves(part)] if isinstance(x, (tuple, list)) else [x]


def same(name: str, narrow: bool) -> None:
    call, given = OPERATIONS[name]
    expected = leaves(call(*given))
    found = leaves(call(*(jnp.asarray(x) for x in given)))
    assert len(found) == len(expected)
    for theirs, ours in zip(found, expected, strict=True):
        if ours is None or name in NUMBERS:
            assert theirs == ours
            continue
        assert isinstance(theirs, jax.Array), type(theirs)
        dtype = {"float64": "float32", "int64": "int32"}.get(str(ours.dtype)) if narrow else None
        ours = ours.astype(dtype) if dtype else np.asarray(ours)
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        np.testing.assert_array_equal(np.asarray(theirs), ours)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.usefixtures("x64")
def test_the_same_as_from_numpy(name: str) -> None:
    same(name, narrow=False)


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_x64_jax_narrows_the_result(name: str) -> None:
    same(name, narrow=True)


def test_the_address_is_jaxs_own() -> None:
    x = jnp.arange(6, dtype="float32").reshape(2, 3)
    space = _arrays.of(x=x)
    assert (space.name, space.dtype(x), space.view(x)[2:]) == ("dlpack", "float32", ((2, 3), (3, 1)))
    assert space.view(x)[0] == x.unsafe_buffer_pointer()


def test_inputs_are_left_alone() -> None:
    """JAX's arrays are never written by anybody; nor are the results, which share NumPy's memory."""
    mask = jnp.asarray(MASK)
    found = n.distance_transform_edt(mask, spatial_dims=2)
    before = np.array(found)
    n.distance_transform_edt(jnp.asarray(OTHER), spatial_dims=2)
    np.testing.assert_array_equal(np.asarray(found), before)
    np.testing.assert_array_equal(np.asarray(mask), MASK)
    with pytest.raises(TypeError, match="immutable"):
        scipy.distance_transform_edt(mask[0], distances=jnp.zeros((9, 10)), float64_distances=False)


def test_views_and_transposes() -> None:
    mask = jnp.asarray(MASK)
    for view in (lambda x: x[:, ::2, ::-1], lambda x: x.swapaxes(1, 2), lambda x: x[0][None]):
        found = n.distance_transform_edt(view(mask), spatial_dims=2)
        np.testing.assert_array_equal(found, n.distance_transform_edt(view(MASK), spatial_dims=2))


def test_other_dtypes() -> None:
    """float16 is read as it is, bfloat16 has no way through NumPy."""
    half = jnp.asarray(LOGITS, "float16")
    value, grad = n.dice_loss(half, jnp.asarray(CLASSES), return_grad=True)
    expected = n.dice_loss(LOGITS.astype(np.float16), CLASSES, return_grad=True)
    assert (grad.dtype, float(value)) == ("float16", float(expected[0]))
    np.testing.assert_array_equal(np.asarray(grad), expected[1])
    with pytest.raises(
        TypeError, match=r"dtype bfloat16, which NumPy lacks; pass logits.astype\('float32'\)"
    ):
        n.dice_loss(half.astype("bfloat16"), jnp.asarray(CLASSES), return_grad=True)


def test_a_traced_array_is_refused_and_a_callback_works() -> None:
    with pytest.raises(Exception, match=r"mask"):
        jax.jit(lambda x: n.distance_transform_edt(x, spatial_dims=2))(jnp.asarray(MASK))
    like = jax.ShapeDtypeStruct(MASK.shape, "float32")
    inside = jax.jit(
        lambda x: 2 * jax.pure_callback(lambda m: n.distance_transform_edt(m, spatial_dims=2), like, x)
    )
    np.testing.assert_allclose(
        inside(jnp.asarray(MASK)), 2 * n.distance_transform_edt(MASK, spatial_dims=2), rtol=1e-6
    )


def test_kinds_are_not_mixed() -> None:
    with pytest.raises(TypeError, match="pass both as one kind"):
        n.surface_metrics(jnp.asarray(MASK), OTHER, spatial_dims=2)
