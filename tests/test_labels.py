"""Label fusion against reference.py, SimpleITK, and worked examples from the literature."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import noisyseg_fast as nf
from noisyseg_fast import labels, reference

KINDS = ("torch", "numpy")
DTYPES = ("bool", "uint8", "int32", "int64")


pytestmark = pytest.mark.usefixtures("one_thread")


def raters(shape, count, seed=0, classes=2, share=0.3):
    """One random truth, drawn by raters of different error rates: uint8 (count, *shape)."""
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random(shape) < share, rng.integers(1, classes, shape), 0)
    wrong = [rng.random(shape) < rng.uniform(0.02, 0.3) for _ in range(count)]
    return np.stack([np.where(w, rng.integers(0, classes, shape), truth) for w in wrong]).astype(np.uint8)


def itk_staple(masks):
    sitk = pytest.importorskip("SimpleITK")
    peer = sitk.STAPLEImageFilter()
    peer.SetForegroundValue(1)
    posterior = sitk.GetArrayFromImage(peer.Execute([sitk.GetImageFromArray(m) for m in masks]))
    return posterior, np.array(peer.GetSensitivity()), np.array(peer.GetSpecificity()), peer


@st.composite
def problems(draw):
    """Annotations (B, M, *S) as NumPy of any dtype and strides, the same with 9 for no vote, and the options."""
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    count, dims, batch = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    classes = draw(st.sampled_from([2, 2, 3, 5]))
    size = tuple(int(n) for n in rng.integers(1, (60, 14, 7)[dims - 1], dims))
    masks = np.stack([raters(size, count, seed + b, classes) for b in range(batch)])
    extreme = draw(st.sampled_from(["", "", "", "empty", "full", "unanimous"]))
    if extreme == "unanimous":
        masks[:] = masks[:, :1]
    elif extreme:
        masks[:] = extreme == "full"
    dtype = draw(st.sampled_from(DTYPES if classes == 2 else DTYPES[1:]))
    options = {"num_classes": None if classes == 2 and draw(st.booleans()) else classes}
    plain = masks.astype(np.int64)
    if draw(st.booleans()) and dtype != "bool":
        lost = rng.random(masks.shape) < 0.2
        masks[lost], plain[lost] = 7, 9
        options["missing"] = 7
    if draw(st.booleans()):
        present = rng.random((batch, count)) < 0.7
        options["present"] = present
        plain[~present] = 9
    masks = masks.astype(dtype)
    if dtype == "uint8" and options["num_classes"] is None and "missing" not in options:
        masks *= 255
    layout = draw(st.sampled_from(["C", "F", "reversed", "last"]))
    if layout == "F":
        masks = np.asfortranarray(masks)
    elif layout == "reversed":
        masks = masks[..., ::-1].copy()[..., ::-1]
    elif layout == "last":
        masks = np.moveaxis(np.moveaxis(masks, 1, -1).copy(), -1, 1)
    return masks, plain, {**options, "spatial_dims": dims}, classes


def as_kind(x, kind):
    return (
        torch.from_numpy(x.copy())
        if kind == "torch" and any(s < 0 for s in x.strides)
        else (torch.from_numpy(x) if kind == "torch" else x)
    )


def numpy_of(x):
    return x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


# ---- every function against its definition --------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(KINDS))
def test_staple_equals_reference(problem, kind):
    masks, plain, options, classes = problem
    found = labels.staple(as_kind(masks, kind), **options, max_iter=40, dtype="float64")
    binary = options["num_classes"] is None
    for b, one in enumerate(plain):
        one = torch.from_numpy(one)
        posterior, theta, iterations, converged = reference.staple(one, classes=classes, max_iter=40)
        got = numpy_of(found.posterior[b])
        np.testing.assert_allclose(got, posterior[1] if binary else posterior, atol=1e-9)
        voted = ((one >= 0) & (one < classes)).flatten(1).any(1).numpy()
        np.testing.assert_allclose(numpy_of(found.performance[b])[voted], theta[voted], atol=1e-8)
        assert np.isnan(numpy_of(found.sensitivity[b])[~voted]).all()
        assert np.isfinite(numpy_of(found.sensitivity[b])[voted]).all()
        assert np.isfinite(numpy_of(found.specificity[b])[voted]).all()
        if binary:
            np.testing.assert_allclose(numpy_of(found.sensitivity[b])[voted], theta[voted, 1, 1], atol=1e-8)
            np.testing.assert_allclose(numpy_of(found.specificity[b])[voted], theta[voted, 0, 0], atol=1e-8)
        assert abs(int(found.iterations[b]) - iterations) <= 1
        assert bool(found.converged[b]) == converged
        clear = (posterior.sort(0).values[-1] - posterior.sort(0).values[-2] > 1e-6).numpy()
        assert np.array_equal(numpy_of(found.labels[b])[clear], posterior.argmax(0).numpy()[clear])
    assert np.isfinite(numpy_of(found.posterior)).all()
    assert type(found.posterior) is type(as_kind(masks, kind))


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from(KINDS), st.sampled_from([0, 1, "lowest", "highest"]))
def test_majority_vote_equals_reference(problem, kind, tie):
    masks, plain, options, classes = problem
    found = labels.majority_vote(as_kind(masks, kind), tie=tie, **options)
    assert str(found.dtype).removeprefix("torch.") == masks.dtype.name
    for b, one in enumerate(plain):
        expected = reference.majority_vote(torch.from_numpy(one), tie=tie, classes=classes)
        assert np.array_equal(numpy_of(found[b]).astype(np.int64), expected)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(KINDS), st.sampled_from([0.0, 0.5, 1.0]))
def test_simple_equals_reference(problem, kind, alpha):
    masks, plain, options, classes = problem
    found = labels.simple(as_kind(masks, kind), alpha=alpha, **options)
    for b, one in enumerate(plain):
        if not ((one >= 0) & (one < classes)).any():
            continue
        expected, kept = reference.simple(torch.from_numpy(one), alpha=alpha, classes=classes)
        assert np.array_equal(numpy_of(found.labels[b]).astype(np.int64), expected)
        assert numpy_of(found.selected[b]).tolist() == kept
        assert ((numpy_of(found.weights[b]) == 0) | np.array(kept)).all()


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(KINDS))
def test_scores_and_agreement_equal_reference(problem, kind):
    masks, plain, options, classes = problem
    fusion = labels.majority_vote(as_kind(masks, kind), **options)
    scores = labels.rater_scores(as_kind(masks, kind), fusion, **options)
    found = labels.agreement(as_kind(masks, kind), **options)
    binary = options["num_classes"] is None
    for b, one in enumerate(plain):
        one = torch.from_numpy(one)
        of_fusion = torch.from_numpy(numpy_of(fusion[b]).astype(np.int64))
        for got, expected in zip(
            scores, reference.rater_scores(one, of_fusion, classes=classes), strict=True
        ):
            np.testing.assert_allclose(numpy_of(got[b]), expected[..., 1] if binary else expected, atol=1e-12)
        dice, kappa, alpha = reference.agreement(one, classes=classes)
        np.testing.assert_allclose(numpy_of(found.dice[b]), dice[..., 1] if binary else dice, atol=1e-12)
        assert float(found.fleiss_kappa[b]) == pytest.approx(kappa, abs=1e-9)
        assert float(found.krippendorff_alpha[b]) == pytest.approx(alpha, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(KINDS), st.booleans())
def test_soft_average_is_the_mean_of_the_votes(problem, kind, weighted):
    masks, plain, options, classes = problem
    weight = np.random.default_rng(0).random(masks.shape[:2]) + 0.1 if weighted else None
    found = numpy_of(labels.soft_average(as_kind(masks, kind), weights=weight, dtype="float64", **options))
    w = np.ones(masks.shape[:2]) if weight is None else weight
    w = w.reshape(*w.shape, *[1] * (masks.ndim - 2)) * (plain < classes)
    total = w.sum(1)
    for c in [1] if options["num_classes"] is None else range(classes):
        expected = np.divide((w * (plain == c)).sum(1), total, out=np.zeros_like(total), where=total > 0)
        np.testing.assert_allclose(
            found if options["num_classes"] is None else found[:, c], expected, atol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_soft_average_of_soft_masks(kind, dtype):
    x = np.random.default_rng(0).random((2, 3, 70, 9)).astype(dtype)
    x[0, 1, :5] = np.nan
    w = np.array([0.5, 2.0, 1.0])
    found = numpy_of(labels.soft_average(as_kind(x, kind), weights=w, spatial_dims=2, dtype="float64"))
    voted = np.isfinite(x) * w[:, None, None]
    np.testing.assert_allclose(
        found, (np.nan_to_num(x.astype(float)) * voted).sum(1) / voted.sum(1), atol=1e-12
    )
    assert labels.soft_average(as_kind(x, kind), spatial_dims=2).dtype in (torch.float32, np.float32)


# ---- peers and worked examples --------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 9))
def test_staple_equals_simpleitk_on_random_raters(count):
    for seed in range(4):
        masks = raters((12, 20, 16), count, seed, share=0.1 + 0.2 * seed)
        posterior, sensitivity, specificity, peer = itk_staple(masks)
        found = nf.staple(masks, dtype="float64", spatial_dims=3)
        np.testing.assert_allclose(found.posterior, posterior, atol=1e-9)
        np.testing.assert_allclose(found.sensitivity, sensitivity, atol=1e-9)
        np.testing.assert_allclose(found.specificity, specificity, atol=1e-9)
        assert found.iterations == peer.GetElapsedIterations() + 1
        assert np.abs(nf.staple(masks, spatial_dims=3).posterior - posterior).max() < 1e-6


def test_staple_equals_simpleitk_on_the_sample():
    """Four radiologists, one image after another and all in one batch."""
    masks = nf.sample.load().masks[::4]
    found = nf.staple(torch.from_numpy(masks), spatial_dims=2)
    assert found.converged.all()
    for b, one in enumerate(masks):
        posterior, sensitivity, specificity, _ = itk_staple(one)
        assert np.abs(found.posterior[b].numpy() - posterior).max() < 1e-6
        assert np.abs(found.sensitivity[b].numpy() - sensitivity).max() < 1e-6
        assert np.abs(found.specificity[b].numpy() - specificity).max() < 1e-6


def test_staple_with_a_given_prior_equals_simpleitk():
    """Its confidence weight scales the prior."""
    sitk = pytest.importorskip("SimpleITK")
    masks = raters((40, 30), 5)
    peer = sitk.STAPLEImageFilter()
    peer.SetForegroundValue(1)
    peer.SetConfidenceWeight(0.5)
    expected = sitk.GetArrayFromImage(peer.Execute([sitk.GetImageFromArray(m) for m in masks]))
    found = nf.staple(masks, prior=0.5 * masks.mean(), dtype="float64")
    np.testing.assert_allclose(found.posterior, expected, atol=1e-9)
    assert abs(found.posterior - nf.staple(masks, dtype="float64").posterior).max() > 1e-3


@pytest.mark.parametrize("classes", [3, 5])
def test_multi_class_staple_agrees_with_simpleitk(classes):
    """MultiLabelSTAPLE stops at changes of 1e-5 and computes in single precision."""
    sitk = pytest.importorskip("SimpleITK")
    masks = raters((40, 50), 7, classes, classes, share=0.5)
    peer = sitk.MultiLabelSTAPLEImageFilter()
    expected = sitk.GetArrayFromImage(peer.Execute([sitk.GetImageFromArray(m) for m in masks]))
    found = nf.staple(masks, num_classes=classes)
    assert (found.labels == expected).mean() > 0.999
    for m in range(len(masks)):
        theirs = np.array(peer.GetConfusionMatrix(m)).reshape(classes + 1, classes)[:classes].T
        np.testing.assert_allclose(found.performance[m], theirs, atol=1e-3)


def test_two_classes_are_a_mask():
    masks = raters((30, 30), 5)
    binary, labelled = nf.staple(masks), nf.staple(masks, num_classes=2)
    np.testing.assert_allclose(labelled.posterior[1], binary.posterior, atol=1e-7)
    np.testing.assert_allclose(labelled.posterior.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(labelled.sensitivity[:, 1], binary.sensitivity, atol=1e-12)
    np.testing.assert_allclose(labelled.specificity[:, 1], binary.specificity, atol=1e-12)


def test_staple_finds_the_bad_rater():
    """Three careful raters and one who marks half of everything: STAPLE knows, and beats the majority of a pair."""
    rng = np.random.default_rng(1)
    truth = rng.random((64, 64)) < 0.3
    masks = np.stack([truth ^ (rng.random(truth.shape) < e) for e in (0.02, 0.05, 0.05, 0.5)])
    found = nf.staple(masks)
    assert found.sensitivity.argmin() == 3 and abs(found.sensitivity[3] - 0.5) < 0.05
    assert found.sensitivity[0] == pytest.approx(0.98, abs=0.02)
    assert (found.labels != truth).mean() < (nf.majority_vote(masks) != truth).mean()
    assert nf.simple(masks).selected.tolist() == [True, True, True, False]


def test_fleiss_kappa_of_the_worked_example():
    """14 raters, 10 subjects, 5 categories: kappa = 0.210 (Wikipedia, after Fleiss 1971)."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    votes = np.array([np.repeat(np.arange(5), row) for row in table], np.int32).T  # (14, 10)
    found = nf.agreement(votes, num_classes=5)  # more patterns than a table holds: the hashed way
    assert found.fleiss_kappa == pytest.approx(0.20993, abs=1e-5)


def test_krippendorff_alpha_of_the_worked_examples():
    """Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, example C: alpha = 0.743; and his example of
    three coders with missing values: 0.691."""
    o = 0
    four = np.array([
        [1, 2, 3, 3, 2, 1, 4, 1, 2, o, o, o], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, o, 3],
        [o, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, o], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, o],
    ])  # fmt: skip
    assert nf.agreement(four, num_classes=6, missing=0).krippendorff_alpha == pytest.approx(0.743, abs=5e-4)
    three = np.array([
        [o, o, o, o, o, 3, 4, 1, 2, 1, 1, 3, 3, o, 3], [1, o, 2, 1, 3, 3, 4, 3, o, o, o, o, o, o, o],
        [o, o, 2, 1, 3, 4, 4, o, 2, 1, 1, 3, 3, o, 4],
    ])  # fmt: skip
    assert nf.agreement(three, num_classes=5, missing=0).krippendorff_alpha == pytest.approx(0.691, abs=5e-4)


def test_scores_are_those_of_overlap_metrics():
    masks, fusion = raters((30, 40), 4), raters((30, 40), 1, 9)[0]
    found = nf.rater_scores(masks, fusion)
    for m, mask in enumerate(masks):
        expected = nf.overlap_metrics(mask, fusion)
        assert found.dice[m] == pytest.approx(float(expected.dice), abs=1e-14)
        assert found.sensitivity[m] == pytest.approx(float(expected.sensitivity), abs=1e-14)
        assert found.specificity[m] == pytest.approx(float(expected.specificity), abs=1e-14)


# ---- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_is_finite_where_nobody_marked_anything(kind, count):
    masks = as_kind(np.zeros((count, 9, 7), np.uint8), kind)
    found = nf.staple(masks)
    assert not numpy_of(found.posterior).any()
    assert (numpy_of(found.sensitivity) == 1).all() and (numpy_of(found.specificity) == 1).all()
    assert bool(found.converged)
    assert not numpy_of(nf.majority_vote(masks)).any() and not numpy_of(nf.simple(masks).labels).any()
    agreed = nf.agreement(masks)
    assert (numpy_of(agreed.dice) == 1).all()
    assert float(agreed.fleiss_kappa) == float(agreed.krippendorff_alpha) == 1
    assert (numpy_of(nf.rater_scores(masks, masks[0]).dice) == 1).all()


def test_everything_marked_and_nobody_there():
    full = nf.staple(np.ones((3, 5, 5), np.uint8))
    assert (full.posterior == 1).all() and np.isfinite(full.specificity).all()
    masks = np.ones((2, 3, 4, 4), np.uint8)
    nobody = np.array([[1, 1, 0], [0, 0, 0]])
    found = nf.staple(masks, present=nobody)
    assert (found.posterior[0] == 1).all() and (found.posterior[1] == 0).all()
    assert np.isnan(found.sensitivity[1]).all() and np.isnan(found.sensitivity[0, 2])
    assert (nf.majority_vote(masks, present=nobody, tie=1)[1] == 1).all()
    assert (nf.majority_vote(masks, present=nobody, tie="highest")[1] == 0).all()
    assert nf.simple(masks, present=nobody).selected.tolist() == [[True, True, False], [False] * 3]
    assert np.isnan(nf.agreement(masks, present=nobody).dice[0, 2, 0])
    assert not nf.soft_average(masks, present=nobody)[1].any()


def test_an_absent_rater_is_as_if_never_there():
    masks = raters((20, 30), 5)
    masks[2] = 1
    without = np.delete(masks, 2, 0)
    for present in ([1, 1, 0, 1, 1], np.array([1, 1, 0, 1, 1], bool)):
        found, expected = nf.staple(masks, present=present), nf.staple(without)
        np.testing.assert_allclose(found.posterior, expected.posterior, atol=1e-7)
        np.testing.assert_allclose(np.delete(found.sensitivity, 2), expected.sensitivity, atol=1e-9)
    tensors = torch.from_numpy(masks)
    here = torch.tensor([True, True, False, True, True])
    assert torch.equal(nf.staple(tensors, present=here).posterior, torch.from_numpy(found.posterior))
    marked = masks.copy()
    marked[2] = 255
    assert np.array_equal(nf.staple(marked, missing=255).posterior, found.posterior)


def test_many_raters_and_labels_hash_their_patterns():
    """More than 65,536 possible patterns, and more than half of the first table (131,072) in use."""
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (30, 90_000)).astype(np.uint8)
    found = nf.staple(masks, max_iter=3, dtype="float64")
    posterior, theta, _, _ = reference.staple(torch.from_numpy(masks), max_iter=3)
    np.testing.assert_allclose(found.posterior, posterior[1], atol=1e-9)
    np.testing.assert_allclose(found.performance, theta, atol=1e-9)
    assert not found.converged and found.iterations == 3
    assert np.array_equal(nf.majority_vote(masks, tie=1), masks.sum(0) >= 15)
    np.testing.assert_allclose(nf.soft_average(masks), masks.mean(0), atol=1e-7)
    few = raters((500,), 9, 2, 9)
    posterior, _, _, _ = reference.staple(torch.from_numpy(few), classes=9, max_iter=30)
    np.testing.assert_allclose(nf.staple(few, num_classes=9, max_iter=30).posterior, posterior, atol=1e-6)
    assert np.array_equal(
        nf.majority_vote(few, num_classes=9), reference.majority_vote(torch.from_numpy(few), classes=9)
    )


def test_hundreds_of_wrong_votes_do_not_underflow():
    """62 raters who are nearly always right: products of error rates near 1e-300."""
    rng = np.random.default_rng(0)
    truth = rng.random(40_000) < 0.5
    masks = np.stack([truth ^ (rng.random(truth.shape) < 1e-4) for _ in range(62 // 2)])
    masks[:, :2] = [[0, 1]] * 15 + [[1, 0]] * 16
    found = nf.staple(masks)
    assert np.isfinite(found.posterior).all()
    assert np.array_equal(found.labels[2:], truth[2:])


def test_ties():
    masks = np.array([[0, 1, 2, 2], [0, 1, 1, 3]], np.uint8)
    vote = nf.majority_vote
    assert vote(masks, num_classes=4, tie=255).tolist() == [0, 1, 255, 255]
    assert vote(masks, num_classes=4, tie="lowest").tolist() == [0, 1, 1, 2]
    assert vote(masks, num_classes=4, tie="highest").tolist() == [0, 1, 2, 3]
    assert vote(masks.astype(np.int32), num_classes=4, tie=-1).tolist() == [0, 1, -1, -1]
    assert vote(masks > 1, tie=1).tolist() == [False, False, True, True]
    from noisyseg_fast.training.data import consensus

    real = nf.sample.load().masks[:50]
    fused = nf.majority_vote(real, tie="highest", spatial_dims=2)
    assert all(np.array_equal(f, consensus(r)) for f, r in zip(fused, real, strict=True))


@pytest.mark.parametrize("shape", [(3, 40), (3, 8, 9), (3, 4, 5, 6), (2, 3, 4, 5, 6)])
def test_axes(shape):
    """Up to four axes are (M, *S), five (B, M, *S); the same by spatial_dims, and by a present of two axes."""
    masks = raters(shape, 1)[0]
    batched = len(shape) == 5
    found = nf.staple(masks)
    assert found.posterior.shape == (shape[:1] + shape[2:] if batched else shape[1:])
    assert found.sensitivity.shape == (shape[:2] if batched else shape[:1])
    if not batched and len(shape) > 2:
        split = nf.staple(masks, spatial_dims=len(shape) - 2)
        assert split.sensitivity.shape == shape[:2]
        both = nf.staple(masks, present=np.ones(shape[:2]))
        np.testing.assert_allclose(both.posterior, split.posterior, atol=1e-7)


def test_same_bits_with_1_and_2_threads():
    code = (
        "import sys, hashlib, torch, numpy as np, noisyseg_fast as nf\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "rng = np.random.default_rng(0)\n"
        "h = hashlib.sha256()\n"
        "for shape, high in (((5, 300, 301), 2), ((3, 4, 90, 90), 2), ((9, 80, 90), 6)):\n"
        "    x = torch.from_numpy(rng.integers(0, high, shape).astype(np.uint8))\n"
        "    n = None if high == 2 else high\n"
        "    r = nf.staple(x, num_classes=n, spatial_dims=2, max_iter=20)\n"
        "    parts = [*r, nf.majority_vote(x, num_classes=n, spatial_dims=2)]\n"
        "    parts += [nf.soft_average(x, num_classes=n, spatial_dims=2)]\n"
        "    parts += [nf.soft_average(x.float(), spatial_dims=2), *nf.agreement(x, num_classes=n, spatial_dims=2)]\n"
        "    for p in parts: h.update(p.contiguous().numpy().tobytes())\n"
        "print(h.hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "passive"},
        ).stdout
        for n in (1, 2)
    }  # fmt: skip
    assert len(digests) == 1


def test_inputs_are_not_written():
    masks = raters((30, 30), 4)
    masks.setflags(write=False)
    before = masks.copy()
    nf.staple(masks), nf.majority_vote(masks), nf.simple(masks), nf.soft_average(masks)
    nf.agreement(masks), nf.rater_scores(masks, masks[0])
    nf.label_sampling(masks, np.random.default_rng(0))
    assert np.array_equal(masks, before)


def test_float_ways_agree():
    """The same shares from labels (by patterns) and from floats (by values)."""
    masks = raters((50, 60), 5)
    assert np.array_equal(nf.soft_average(masks), nf.soft_average(masks.astype(np.float32)))
    assert np.array_equal(
        nf.soft_average(masks, weights=[1, 2, 3, 4, 5]),
        nf.soft_average(masks.astype(np.float64), weights=[1, 2, 3, 4, 5]),
    )


def test_dlpack_arrays():
    """Of a library of which nothing else is known; results are NumPy's, or go through its own from_dlpack."""

    class Foreign:
        def __init__(self, x):
            self.x, self.shape = x, x.shape

        def __dlpack__(self, **options):
            return self.x.__dlpack__()

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    class Own(Foreign):
        def __array_namespace__(self):
            class Library:
                from_dlpack = staticmethod(lambda x: Own(np.from_dlpack(x)))

            return Library

    masks, here = raters((20, 20), 4), np.array([1, 1, 0, 1], np.uint8)
    expected = nf.staple(masks, present=here)
    found = nf.staple(Foreign(masks), present=Foreign(here))
    own = nf.staple(Own(masks), present=Own(here))
    for name, want in expected._asdict().items():
        assert isinstance(getattr(own, name), Own)
        np.testing.assert_array_equal(getattr(found, name), want)
        np.testing.assert_array_equal(getattr(own, name).x, want)
    np.testing.assert_array_equal(nf.simple(Own(masks)).selected.x, nf.simple(masks).selected)
    np.testing.assert_array_equal(nf.agreement(Foreign(masks)).dice, nf.agreement(masks).dice)
    scores = nf.rater_scores(Foreign(masks), Foreign(masks[0]))
    np.testing.assert_array_equal(scores.dice, nf.rater_scores(masks, masks[0]).dice)
    picked = nf.label_sampling(Foreign(masks), np.random.default_rng(0))
    np.testing.assert_array_equal(picked, nf.label_sampling(masks, np.random.default_rng(0)))


# ---- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_label_sampling(kind):
    count, batch = 4, 600
    masks = np.arange(batch * count).reshape(batch, count, 1, 1) + np.zeros((1, 1, 2, 3), np.int64)
    present = np.ones((batch, count), bool)
    present[:, 2] = False
    present[5] = False

    def generator():
        return torch.Generator().manual_seed(3) if kind == "torch" else np.random.default_rng(3)

    found, chosen = nf.label_sampling(
        as_kind(masks, kind), generator(), present=present, spatial_dims=2, return_rater=True
    )
    found, chosen = numpy_of(found), numpy_of(chosen)
    there = np.arange(batch) != 5
    assert np.array_equal(found[there], masks[np.arange(batch), chosen][there])
    assert not found[5].any()
    shares = np.bincount(chosen[there], minlength=count) / (batch - 1)
    assert shares[2] == 0 and np.abs(shares[[0, 1, 3]] - 1 / 3).max() < 0.07
    again = nf.label_sampling(as_kind(masks, kind), generator(), present=present, spatial_dims=2)
    assert np.array_equal(numpy_of(again), found)
    plain, every = nf.label_sampling(as_kind(masks, kind), generator(), spatial_dims=2, return_rater=True)
    assert np.abs(np.bincount(numpy_of(every), minlength=count) / batch - 0.25).max() < 0.07
    assert type(plain) is type(as_kind(masks, kind))
    single = nf.label_sampling(as_kind(masks[0], kind), generator())
    assert single.shape == (2, 3) and numpy_of(single).ravel()[0] in masks[0]


# ---- errors ---------------------------------------------------------------------------------------

OK = np.zeros((3, 8, 8), np.uint8)
ERRORS = [
    (lambda: nf.staple(OK.astype(np.float32)), "pass annotations > 0.5"),
    (lambda: nf.staple(OK.astype(np.int16)), "annotations has dtype int16"),
    (lambda: nf.staple(OK.tolist()), "annotations must be a torch tensor"),
    (lambda: nf.staple(OK[:0]), "at least one rater and one pixel"),
    (lambda: nf.staple(OK[..., :0]), "at least one rater and one pixel"),
    (lambda: nf.staple(OK, spatial_dims=3), "must be (M, *S) or (B, M, *S) with 3 spatial axes"),
    (lambda: nf.staple(OK, present=[1, 0]), "present has shape (2,)"),
    (lambda: nf.staple(OK, num_classes=1), "num_classes must be an integer from 2 to 255, got 1"),
    (lambda: nf.staple(OK, num_classes=256), "num_classes must be an integer from 2 to 255"),
    (lambda: nf.staple(OK, missing=0.5), "missing must be a whole number, got 0.5"),
    (lambda: nf.staple(OK, missing=float("inf")), "missing must be a whole number, got inf"),
    (lambda: nf.staple(OK, missing=float("nan")), "missing must be a whole number, got nan"),
    (lambda: nf.staple(OK, max_iter=0), "max_iter must be a positive integer, got 0"),
    (lambda: nf.staple(OK, tol=-1), "tol must be finite and not negative, got -1"),
    (lambda: nf.staple(OK, prior=2), "prior must be probabilities"),
    (lambda: nf.staple(OK, prior=[0.1] * 3), "prior must be one number, or two"),
    (lambda: nf.staple(OK, prior=0.5, num_classes=3), "prior must be 3 numbers"),
    (lambda: nf.staple(OK, dtype="float16"), "dtype must be float32 or float64, got float16"),
    (lambda: nf.staple(np.zeros((62, 5), np.uint8)), "annotations have 62 raters; at most 61"),
    (lambda: nf.staple(np.zeros((40, 5), np.uint8), missing=2), "with 3 possible votes (no vote included)"),
    (lambda: nf.majority_vote(OK, tie="none"), "tie must be a label or one of lowest, highest, got 'none'"),
    (lambda: nf.majority_vote(OK, tie=256), "tie must be between 0 and 255 for annotations of dtype uint8"),
    (lambda: nf.majority_vote(OK > 0, tie=2), "tie must be between 0 and 1"),
    (lambda: nf.simple(OK, alpha=-1), "alpha must be finite and not negative, got -1"),
    (lambda: nf.simple(OK, max_iter=0), "max_iter must be a positive integer, got 0"),
    (lambda: nf.soft_average(OK, weights=[1, 2]), "weights has shape (2,)"),
    (lambda: nf.soft_average(OK, weights=[1, 2, -1]), "weights must be finite and not negative"),
    (lambda: nf.rater_scores(OK, OK), "fusion has shape (3, 8, 8); for these annotations it must be (8, 8)"),
    (lambda: nf.rater_scores(OK, OK[0].astype(float)), "fusion has dtype float64"),
    (lambda: nf.rater_scores(OK, torch.zeros(8, 8)), "annotations is a numpy array and fusion a torch array"),
    (lambda: nf.label_sampling(torch.zeros(3, 4), 1), "generator must be a torch.Generator"),
    (lambda: nf.label_sampling(OK, 1), "generator must be a numpy.random.Generator"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- noisyseg fuse --------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Three raters' masks on disk with an oblique affine, and the masks."""
    pytest.importorskip("nibabel")
    from folders import save_nifti

    masks = raters((20, 24, 6), 3, 5)
    paths = [tmp_path / f"rater{i}.nii.gz" for i in range(3)]
    for path, mask in zip(paths, masks, strict=True):
        save_nifti(path, mask)
    return paths, masks


def fuse(*arguments):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from noisyseg_fast import cli

    return CliRunner().invoke(cli.app, ["fuse", *(str(a) for a in arguments)], env={"COLUMNS": "200"})


def read(path):
    import nibabel

    image = nibabel.load(path)
    return np.asarray(image.dataobj), image


@pytest.mark.parametrize("method", ["staple", "majority", "simple", "mean"])
def test_fuse(files, tmp_path, method):
    from folders import SPACING, oblique_affine

    paths, masks = files
    out = tmp_path / "new" / "fused.nii.gz"
    result = fuse("--method", method, *paths, "-o", out)
    assert result.exit_code == 0, result.output
    fused, image = read(out)
    expected = {
        "staple": nf.staple(masks).labels,
        "majority": nf.majority_vote(masks),
        "simple": nf.simple(masks).labels,
        "mean": nf.soft_average(masks),
    }[method]
    assert np.array_equal(fused, expected)
    assert fused.dtype == (np.float32 if method == "mean" else np.uint8)
    assert np.allclose(image.affine, oblique_affine(), atol=1e-4)
    assert image.header.get_zooms() == pytest.approx(SPACING, abs=1e-4)
    agreed = nf.agreement(masks)
    dice = nf.rater_scores(masks, (fused >= 0.5).astype(np.uint8)).dice
    assert all(f"{d:.4f}" in result.output for d in dice)
    assert f"Fleiss' kappa {float(agreed.fleiss_kappa):.4f}" in result.output
    assert f"Krippendorff's alpha {float(agreed.krippendorff_alpha):.4f}" in result.output
    if method == "staple":
        assert all(f"{s:.4f}" in result.output for s in nf.staple(masks).sensitivity)
    assert not list(out.parent.glob(".tmp*"))


def test_fuse_writes_the_posterior(files, tmp_path):
    paths, masks = files
    result = fuse(*paths, "-o", tmp_path / "f.nii.gz", "--posterior", tmp_path / "p.nii.gz")
    assert result.exit_code == 0, result.output
    assert np.array_equal(read(tmp_path / "p.nii.gz")[0], nf.staple(masks).posterior)


def test_fuse_labels(tmp_path):
    from folders import save_nifti

    masks = raters((20, 24, 6), 3, 5, 4)
    paths = [tmp_path / f"{i}.nii.gz" for i in range(3)]
    for path, mask in zip(paths, masks, strict=True):
        save_nifti(path, mask.astype(np.float32))  # as many tools write label maps
    out, posterior = tmp_path / "f.nii.gz", tmp_path / "p.nii.gz"
    result = fuse(*paths, "-o", out, "--classes", 4, "--posterior", posterior)
    assert result.exit_code == 0, result.output
    expected = nf.staple(masks, num_classes=4)
    assert np.array_equal(read(out)[0], expected.labels)
    assert np.array_equal(np.moveaxis(read(posterior)[0], -1, 0), expected.posterior)
    assert f"{expected.sensitivity[0, 1:].mean():.4f}" in result.output
    assert fuse(*paths, "-o", out, "--classes", 4, "--method", "majority", "--tie", "highest").exit_code == 0
    assert np.array_equal(read(out)[0], nf.majority_vote(masks, num_classes=4, tie="highest"))
    assert fuse(*paths, "-o", out, "--classes", 4, "--method", "mean").exit_code == 0
    assert np.array_equal(np.moveaxis(read(out)[0], -1, 0), nf.soft_average(masks, num_classes=4))


def test_fuse_png_and_soft_masks(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from folders import save_nifti

    masks = raters((20, 24), 4, 1)
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, mask in zip(paths, masks, strict=True):
        image.fromarray(mask * np.uint8(255)).save(path)
    result = fuse(*paths, "-o", tmp_path / "f.png", "--method", "majority", "--tie", 1)
    assert result.exit_code == 0, result.output
    fused = np.asarray(image.open(tmp_path / "f.png"))
    assert np.array_equal(fused, 255 * nf.majority_vote(masks, tie=1))
    soft = np.random.default_rng(0).random((3, 10, 12, 4)).astype(np.float32)
    paths = [tmp_path / f"{i}.nii.gz" for i in range(3)]
    for path, mask in zip(paths, soft, strict=True):
        save_nifti(path, mask)
    result = fuse(*paths, "-o", tmp_path / "f.nii.gz", "--method", "mean")
    assert result.exit_code == 0, result.output
    assert np.array_equal(read(tmp_path / "f.nii.gz")[0], nf.soft_average(soft))


def test_fuse_errors_are_one_line_and_write_nothing(files, tmp_path):
    from folders import oblique_affine, save_nifti

    (a, b, _), masks = files
    small, moved, soft, many = (tmp_path / f"{n}.nii.gz" for n in ("small", "moved", "soft", "many"))
    save_nifti(small, masks[0][:, :-1])
    save_nifti(moved, masks[0], oblique_affine((0.7, 0.7, 3.0)))
    save_nifti(soft, masks[0] * np.float32(0.5))
    save_nifti(many, masks[0] * np.uint8(9))
    out = tmp_path / "out.nii.gz"
    for arguments, message in (
        ([a], "fuse needs the masks of at least 2 raters, got 1"),
        ([a, tmp_path / "none.nii.gz"], f"{tmp_path / 'none.nii.gz'}: no such file"),
        ([a, small], f"{small}: shape (20, 23, 6) differs from (20, 24, 6) of the first mask {a}"),
        ([a, moved], f"of the first mask {a}; resample the mask onto it"),
        ([a, soft], f"{soft}: labels must be whole numbers"),
        ([a, many, "--classes", 3], f"{many}: label 9 is out of range 0..2"),
        ([a, b, "--classes", 1], "--classes must be 2 to 255, got 1"),
        ([a, b, "--method", "vote"], "unknown method 'vote'; choose from staple, majority, simple, mean"),
        ([a, b, "--tie", "1"], "--tie is for majority and simple; staple has no ties"),
        (
            [a, b, "--method", "majority", "--tie", "2"],
            "--tie must be a label from 0 to 1, lowest or highest",
        ),
        (
            [a, b, "--method", "simple", "--posterior", "p.nii.gz"],
            "--posterior is for staple, got method 'simple'",
        ),
        ([a, b, "--posterior", a], f"{a}: would replace a rater's mask; choose another --posterior"),
    ):
        result = fuse(*arguments, "-o", out)
        assert result.exit_code == 2, arguments
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert not out.exists()
    result = fuse(a, b, "-o", b)
    assert result.stderr == f"noisyseg: {b}: would replace a rater's mask; choose another --out\n"
    assert fuse(a, b, "-o", tmp_path / "out.png").stderr.endswith("must be .nii.gz or .nii, as the masks\n")
    assert "Example: noisyseg fuse" in " ".join(fuse("--help").output.split())


def test_a_batch_of_one_is_not_taken_for_a_volume_of_one_rater():
    raters = np.random.default_rng(0).integers(0, 2, (1, 5, 8, 8), np.uint8)
    with pytest.raises(
        ValueError, match=r"shape \(1, 5, 8, 8\): one rater's volume, or one image of 5 raters"
    ):
        labels.majority_vote(raters)
    assert labels.majority_vote(raters, spatial_dims=2).shape == (1, 8, 8)
    assert labels.majority_vote(raters, spatial_dims=3).shape == (5, 8, 8)
