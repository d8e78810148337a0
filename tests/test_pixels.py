"""Quantiles, the k largest and confident learning against reference.py, NumPy, torch and cleanlab."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import noisyseg_fast  # noqa: E402
from noisyseg_fast import pixels, reference  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RULES = ("linear", "lower", "higher", "midpoint", "nearest")
SPECIAL = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-30, -3.5, 65504.0]


def same(a, b):
    """Bits, but for the sign of 0 and NaN's."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.nan_to_num(12345), b.nan_to_num(12345))
        and (torch.equal(a.isnan(), b.isnan()))
    )


@st.composite
def values(draw, least=0):
    """(B, *S) of any dtype, with ties, and NaN and the like in some; perhaps not contiguous; a mask or None."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=seed, dtype=torch.float64)
    if draw(st.booleans()):
        x = (x * 2).round()  # ties
    if draw(st.booleans()):
        x = torch.where(
            torch.rand(shape, generator=seed) < 0.3,
            torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=seed)].double(),
            x,
        )
    x = x.to(draw(st.sampled_from(DTYPES)))
    order = draw(st.sampled_from(["contiguous", "transposed", "sliced", "backwards"]))
    if order == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1)
    if order == "sliced":
        x = x.repeat_interleave(2, -1)[..., 1::2]
    if order == "backwards":
        x = x.flip(0)
    mask = (torch.rand(x.shape, generator=seed) < 0.6) if draw(st.booleans()) else None
    return x, mask


qs = st.one_of(st.sampled_from([0, 1, 0.5, 0.25, 1 / 3]), st.floats(0, 1))


@given(values(), st.one_of(qs, st.lists(qs, min_size=1, max_size=19)), st.sampled_from(RULES), st.booleans())
@settings(max_examples=120, deadline=None)
def test_quantile_is_the_references(case, q, rule, per_image):
    x, mask = case
    options = {"per_image": per_image, "mask": mask, "interpolation": rule}
    assert same(pixels.quantile(x, q, **options), reference.quantile(x, q, **options))


@given(values(), st.integers(0, 60), st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_topk_is_the_references(case, k, largest, per_image):
    x, mask = case
    options = {"largest": largest, "per_image": per_image, "mask": mask}
    chosen = pixels.topk_mask(x, k, **options)
    assert torch.equal(chosen, reference.topk_mask(x, k, **options))
    of_array = torch.full((len(x),) if per_image else (), k)
    assert torch.equal(chosen, pixels.topk_mask(x, of_array, **options))
    if k:
        threshold = pixels.topk_threshold(x, k, **options)
        assert same(threshold, reference.topk_threshold(x, k, **options))
        assert same(threshold, pixels.topk_threshold(x, of_array, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 4095, 4096, 300_001])
def test_numpy_and_torch_agree(n, dtype):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    exact = x.double()
    q = [0.0, 0.001, 0.37, 0.5, 0.95, 1.0]
    for rule in RULES:
        expected = torch.from_numpy(np.quantile(exact.numpy(), q, method=rule)).to(dtype)
        assert torch.equal(pixels.quantile(x, q, interpolation=rule), expected)
        assert torch.equal(pixels.quantile(x, 0.37, interpolation=rule), expected[2])
    k = max(1, n // 3)
    top = torch.topk(x, k)
    assert torch.equal(pixels.topk_threshold(x, k), top.values[-1])
    assert torch.equal(pixels.topk_threshold(x, k, largest=False), torch.kthvalue(x, k).values)
    chosen = pixels.topk_mask(x, k)
    assert chosen.sum() == k
    assert torch.equal(x[chosen].sort(descending=True).values, top.values)


def hard_rows(n):
    """Rows that a sample tells little or nothing of, beside easy ones."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g)
    yield x
    yield x.sort().values
    yield x.round(decimals=1)  # ties inside the bracket
    yield (x > 1).float()  # two values
    yield torch.zeros(n)
    yield torch.where(torch.arange(n) % 64 < 16, x, x * 1e-30)  # as periodic as a sample might be
    yield torch.cat([torch.zeros(n // 2), x[: n - n // 2]])
    yield torch.where(torch.rand(n, generator=g) < 0.9, torch.nan, x)
    yield torch.where(torch.arange(n) < 3, x, torch.nan)
    yield torch.full((n,), torch.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16_384, 70_001])
def test_rows_of_every_kind(n, dtype):
    """So long that they are searched in a bracket from a sample."""
    x = torch.stack([row.to(dtype) for row in hard_rows(n)])
    for q in (0, 0.001, 0.5, 0.9, 1):
        for rule in ("linear", "higher"):
            options = {"per_image": True, "interpolation": rule}
            assert same(pixels.quantile(x, q, **options), reference.quantile(x, q, **options))
    for k in (1, 17, n // 10, n // 2, n - 1, n):
        for largest in (True, False):
            options = {"largest": largest, "per_image": True}
            assert torch.equal(pixels.topk_mask(x, k, **options), reference.topk_mask(x, k, **options))
            assert same(pixels.topk_threshold(x, k, **options), reference.topk_threshold(x, k, **options))
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    assert same(pixels.quantile(x, 0.8, mask=mask), reference.quantile(x, 0.8, mask=mask))
    assert torch.equal(pixels.topk_mask(x, n, mask=mask), reference.topk_mask(x, n, mask=mask))


def test_more_values_than_torch_takes():
    many = torch.arange(17 * 2**20, dtype=torch.float32).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(many, 0.5)
    assert pixels.quantile(many, 0.5) == np.quantile(many.numpy().astype(np.float64), 0.5)
    assert pixels.topk_mask(many, 5)[:5].all() and pixels.topk_mask(many, 5).sum() == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_first(dtype):
    x = torch.zeros(3, 50_000, dtype=dtype)
    x[1, ::2] = -0.0
    x[:, 7] = 1
    x[:, 9] = torch.nan
    chosen = pixels.topk_mask(x, 20_000, per_image=True)
    expected = torch.arange(50_000) < 20_001
    expected[9] = False
    assert torch.equal(chosen, expected.expand(3, -1))
    whole = pixels.topk_mask(x, 60_000).flatten()
    places = whole.nonzero()[:, 0]
    # The three 1s, then zeros in their order.
    assert whole.sum() == 60_000 and places.max() == 100_007 and not whole[60_002:100_007].any()
    low = pixels.topk_mask(x, 1, largest=False)
    assert low.nonzero().tolist() == [[0, 0]]


def test_special_values():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    assert pixels.quantile(x, 1) == torch.inf
    assert pixels.quantile(x, 0) == -torch.inf
    assert pixels.quantile(x, 0.5) == 1
    assert pixels.quantile(x, 0.75) == torch.inf  # between 1 and infinity
    assert pixels.quantile(x, 0.25) == -torch.inf
    assert pixels.quantile(x[:2], 0.5).isnan()
    assert pixels.quantile(torch.full((3,), torch.nan), 0.5).isnan()
    assert pixels.quantile(torch.tensor(2.5), 0.3) == 2.5
    assert not pixels.quantile(torch.tensor([-0.0]), 0.3).signbit()
    assert pixels.topk_threshold(x, 9) == -torch.inf
    assert pixels.topk_threshold(x, torch.tensor(0)).isnan()
    assert pixels.topk_threshold(torch.tensor([torch.nan]), 1).isnan()
    huge = torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64)
    assert pixels.quantile(huge, 0.5) == 0


def test_nothing_at_all():
    empty = torch.zeros(2, 0, 3)
    assert pixels.quantile(empty, 0.5).isnan()
    assert pixels.quantile(empty, [0.1, 0.5], per_image=True).isnan().tolist() == [[True, True]] * 2
    assert pixels.quantile(torch.zeros(0, 3), 0.5, per_image=True).shape == (0,)
    assert pixels.topk_mask(empty, 3).shape == (2, 0, 3)
    assert pixels.topk_threshold(empty, 3, per_image=True).isnan().all()
    none = pixels.topk_mask(torch.randn(4), 2, mask=torch.zeros(4))
    assert not none.any()
    assert pixels.confident_joint(torch.zeros(0, 3, 4), torch.zeros(0, 4, dtype=torch.int64)).tolist() == (
        torch.eye(3).long().tolist()
    )
    assert pixels.label_errors(torch.zeros(1, 2, 0), torch.zeros(1, 0, dtype=torch.uint8)).shape == (1, 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, *DTYPES])
def test_masks_of_every_dtype(dtype):
    x = torch.randn(2, 40, 30)
    mask = (torch.randint(0, 3, (2, 30, 40)) - (0 if dtype in (torch.bool, torch.uint8) else 1)).to(dtype)
    mask = mask.transpose(1, 2)
    assert same(pixels.quantile(x, 0.7, mask=mask), reference.quantile(x, 0.7, mask=mask))


def test_kinds_of_arrays():
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    mask = x < 1
    for out, expected in (
        (pixels.quantile(x, [0.2, 0.5], per_image=True), np.quantile(x.reshape(2, -1), [0.2, 0.5], axis=1)),
        (pixels.quantile(x, 0.5, mask=mask), np.quantile(x[mask], 0.5)),
        (pixels.topk_threshold(x, 4), np.sort(x.ravel())[-4]),
    ):
        assert isinstance(out, np.ndarray) and out.dtype == np.float32
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    chosen = pixels.topk_mask(x, np.array([3, 0]), per_image=True)
    assert isinstance(chosen, np.ndarray) and chosen.dtype == bool and chosen.sum((1, 2)).tolist() == [3, 0]
    p = np.stack([1 - (x > 0.5), x > 0.5], 1).astype(np.float64)
    assert isinstance(pixels.label_errors(p, (x > 0).astype(np.uint8)), np.ndarray)
    assert noisyseg_fast.quantile is pixels.quantile
    assert noisyseg_fast.label_errors is pixels.label_errors


def test_same_bits_with_any_number_of_threads():
    x = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    p, label = maps(3, 2, (300, 200), 0)
    before = torch.get_num_threads()
    try:
        found = []
        for n in (1, 4):
            torch.set_num_threads(n)
            found.append(
                [
                    pixels.quantile(x, [0.3, 0.9]),
                    pixels.topk_mask(x, 1234),
                    pixels.topk_mask(x, 1234, per_image=True),
                    pixels.confident_joint(p, label),
                    pixels.label_errors(p, label),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))
    assert same(found[0][0], reference.quantile(x, [0.3, 0.9]))
    assert torch.equal(found[0][1], reference.topk_mask(x, 1234))


# ---- confident learning ---------------------------------------------------------------------------


def maps(batch, classes, size, seed, noise=0.2):
    """Smooth-ish probabilities, and labels that are their draw but for a share `noise`."""
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(batch, classes, *size, generator=generator)).softmax(1)
    label = p.argmax(1)
    wrong = torch.rand(label.shape, generator=generator) < noise
    other = torch.randint(classes, label.shape, generator=generator)
    return p, torch.where(wrong, other, label).byte()


@st.composite
def problems(draw):
    classes = draw(st.integers(2, 6))
    size = draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    batch, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    p, label = maps(batch, classes, size, seed, draw(st.sampled_from([0, 0.2, 1])))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        p = (p * 4).round() / 4  # ties
    if draw(st.booleans()):
        p = torch.where(torch.rand(p.shape, generator=generator) < 0.02, torch.nan, p)
    label = label.to(draw(st.sampled_from([torch.uint8, torch.int32, torch.int64])))
    if draw(st.booleans()):
        unlabelled = torch.rand(label.shape, generator=generator) < 0.3
        label = torch.where(unlabelled, 255 if label.dtype == torch.uint8 else -1, label)
    p = p.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        p = p.movedim(1, -1).contiguous().movedim(-1, 1)
    if draw(st.booleans()):
        label = label.repeat_interleave(2, -1)[..., ::2]
    return p, label


@given(problems(), st.sampled_from(["both", "class", "noise_rate"]))
@settings(max_examples=100, deadline=None)
def test_label_errors_are_the_references(problem, prune):
    p, label = problem
    assert torch.equal(pixels.confident_joint(p, label), reference.confident_joint(p, label))
    assert torch.equal(pixels.label_errors(p, label, prune), reference.label_errors(p, label, prune))


@pytest.mark.parametrize("classes", [2, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_larger_images(classes, dtype):
    p, label = maps(2, classes, (64, 40), classes)
    p = p.to(dtype)
    joint = pixels.confident_joint(p, label)
    assert torch.equal(joint, reference.confident_joint(p, label))
    for prune in ("both", "class", "noise_rate"):
        wrong = pixels.label_errors(p, label, prune)
        assert torch.equal(wrong, reference.label_errors(p, label, prune))
    assert 0 < wrong.sum() < wrong.numel()


def test_saturated_predictions_tie():
    """A network that is sure of everything: the margins are all -1 or 1, and the first pixels are taken."""
    label = torch.zeros(1, 100, 200, dtype=torch.uint8)
    label[:, :, 100:] = 1
    p1 = label.float().clone()
    p1[:, ::3, ::7] = 1 - p1[:, ::3, ::7]
    p = torch.stack([1 - p1, p1], 1)
    for prune in ("both", "class", "noise_rate"):
        wrong = pixels.label_errors(p, label, prune)
        assert torch.equal(wrong, reference.label_errors(p, label, prune))
        assert torch.equal(wrong, p.argmax(1) != label)


@pytest.mark.parametrize("classes", [33, 64])  # more tables than 1024: digits of 4 bits
def test_many_classes(classes):
    p, label = maps(1, classes, (600,), 3)
    assert torch.equal(pixels.confident_joint(p, label), reference.confident_joint(p, label))
    wrong = pixels.label_errors(p, label, "class")  # C searches; the others take the reference C^2 sorts
    assert torch.equal(wrong, reference.label_errors(p, label, "class"))
    if classes == 33:
        assert torch.equal(pixels.label_errors(p, label), reference.label_errors(p, label))


def test_confident_joint_and_errors_by_hand():
    # Six pixels labelled 0, 0, 0, 1, 1, 1; thresholds: mean p_0 of the first, mean p_1 of the last.
    p1 = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.7, 0.1])
    p = torch.stack([1 - p1, p1])[None]
    label = torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.uint8)
    # t_0 = 0.6, t_1 = 0.5333: all six are confident.
    assert pixels.confident_joint(p, label).tolist() == [[2, 1], [1, 2]]
    wrong = [[False, False, True, False, False, True]]
    for prune in ("both", "class", "noise_rate"):
        assert pixels.label_errors(p, label, prune).tolist() == wrong
    label[0, 5] = 255
    assert pixels.confident_joint(p, label).tolist() == [[2, 1], [0, 1]]  # t_1 is now 0.75: 0.7 is not


@pytest.mark.parametrize("filter_by", ["both", "prune_by_class", "prune_by_noise_rate"])
def test_label_errors_equal_cleanlab_where_it_is_installed(filter_by):
    filters = pytest.importorskip("cleanlab.filter")
    from cleanlab.count import compute_confident_joint

    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        p = torch.randn(1, 2, 300, generator=generator).softmax(1).double()
        label = (torch.rand(1, 300, generator=generator) < p[:, 1]).byte()
        theirs = filters.find_label_issues(label[0].numpy(), p[0].T.numpy(), filter_by=filter_by, n_jobs=1)
        prune = filter_by.removeprefix("prune_by_")
        assert pixels.label_errors(p, label, prune)[0].tolist() == theirs.tolist()
        joint = compute_confident_joint(label[0].numpy(), p[0].T.numpy(), calibrate=False)
        assert pixels.confident_joint(p, label).tolist() == joint.tolist()


# ---- errors ---------------------------------------------------------------------------------------

X, P, Y = torch.zeros(2, 3), torch.zeros(2, 2, 3), torch.zeros(2, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pixels.quantile(X, 2), ValueError, "q must lie in [0, 1], got 2"),
        (lambda: pixels.quantile(X, [0.5, torch.nan]), ValueError, "q must lie in [0, 1], got nan"),
        (lambda: pixels.quantile(X, []), ValueError, "q must be a number or several, got none"),
        (lambda: pixels.quantile(X, 0.5, interpolation="cubic"), ValueError, "interpolation must be one of"),
        (lambda: pixels.quantile(X.int(), 0.5), TypeError, "values has dtype int32"),
        (lambda: pixels.quantile([1.0], 0.5), TypeError, "values must be a torch tensor"),
        (
            lambda: pixels.quantile(X, 0.5, mask=X[0]),
            ValueError,
            "mask has shape (3,); it must be that of values",
        ),
        (lambda: pixels.quantile(X, 0.5, mask=np.ones((2, 3))), TypeError, "pass both as one kind"),
        (
            lambda: pixels.quantile(X[0, 0], 0.5, per_image=True),
            ValueError,
            "with per_image it must be (B, *S)",
        ),
        (lambda: pixels.quantile(torch.zeros([1] * 7), 0.5), ValueError, "at most 6 are supported"),
        (lambda: pixels.topk_mask(X, -1), ValueError, "k must be an integer of at least 0, got -1"),
        (lambda: pixels.topk_threshold(X, 0), ValueError, "k must be an integer of at least 1, got 0"),
        (lambda: pixels.topk_mask(X, 1.5), ValueError, "k must be an integer of at least 0, got 1.5"),
        (
            lambda: pixels.topk_mask(X, torch.tensor([1, 2, 3]), per_image=True),
            ValueError,
            "int64 of shape (2,)",
        ),
        (
            lambda: pixels.topk_mask(X, torch.tensor(1, dtype=torch.int32)),
            ValueError,
            "got int32 of shape ()",
        ),
        (lambda: pixels.topk_mask(X, np.array(1)), TypeError, "of the values' kind"),
        (
            lambda: pixels.label_errors(P, Y, "all"),
            ValueError,
            "prune must be both, class or noise_rate, got 'all'",
        ),
        (lambda: pixels.label_errors(P[:, :1], Y), ValueError, "with C from 2 to 255, got shape (2, 1, 3)"),
        (
            lambda: pixels.label_errors(P, Y[0]),
            ValueError,
            "label has shape (3,); for probabilities of shape",
        ),
        (lambda: pixels.confident_joint(P.int(), Y), TypeError, "probabilities has dtype int32"),
        (lambda: pixels.confident_joint(P, Y.float()), TypeError, "label has dtype float32"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
