"""AUROC and average precision by ranks, against the definitions and published values."""

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from noisyseg_fast.training import label_errors as E  # noqa: E402

scored = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


@given(scored)
def test_auroc_is_the_share_of_pairs_in_order(pairs):
    score, positive = (np.asarray(a) for a in zip(*pairs, strict=True))
    high, low = score[positive].astype(float), score[~positive].astype(float)
    if not (len(high) and len(low)):
        assert np.isnan(E.auroc(score, positive))
        return
    gaps = high[:, None] - low
    assert E.auroc(score, positive) == pytest.approx(((gaps > 0) + 0.5 * (gaps == 0)).mean(), abs=1e-12)


@given(scored)
def test_average_precision_by_its_definition(pairs):
    """scikit-learn's: the sum over thresholds of (recall - recall before) * precision."""
    score, positive = (np.asarray(a) for a in zip(*pairs, strict=True))
    if not positive.any():
        assert np.isnan(E.average_precision(score, positive))
        return
    total, before = 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        taken = score >= threshold
        recall = positive[taken].sum() / positive.sum()
        total += (recall - before) * positive[taken].mean()
        before = recall
    assert E.average_precision(score, positive) == pytest.approx(total, abs=1e-12)


def test_known_values():
    score, positive = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert E.auroc(score, positive) == pytest.approx(0.75)  # both from scikit-learn's documentation
    assert E.average_precision(score, positive) == pytest.approx(0.8333333)
    nothing = np.zeros(10)
    assert E.auroc(nothing, np.arange(10) < 3) == 0.5
    assert E.average_precision(nothing, np.arange(10) < 3) == pytest.approx(0.3)
