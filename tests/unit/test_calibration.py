"""Calibration against loops over bins and scikit-learn, and its bias where confidence is right by construction."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from unsharp.errors import UserError
from unsharp.evaluation import Evidence, Outputs, Predictions, gap, measure
from unsharp.evaluation.accuracy import accuracy
from unsharp.evaluation.calibration import (
    BINS,
    brier_scores,
    calibration,
    equal_mass,
    equal_width,
    expected_calibration_error,
    squared_calibration_error,
)

shares = st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=60)


def brute_force_width(confidence, correct, n_bins: int) -> float:
    total = 0.0
    for i in range(n_bins):
        inside = [(c, r) for c, r in zip(confidence, correct) if i / n_bins < c <= (i + 1) / n_bins]
        if inside:
            total += abs(sum(c for c, _ in inside) - sum(r for _, r in inside))
    return 100 * total / len(confidence)


@given(shares)
@settings(max_examples=100, deadline=None)
def test_equal_width_equals_a_loop_with_values_on_the_edges_too(drawn) -> None:
    confidence, correct = [c / 30 for c, _ in drawn], [float(r) for _, r in drawn]
    found = expected_calibration_error(equal_width(np.array(confidence), np.array(correct)))
    assert found == pytest.approx(brute_force_width(confidence, correct, BINS), abs=1e-9)


@pytest.mark.parametrize(("n", "n_bins"), [(60, 15), (61, 15), (7, 3), (100, 7), (31, 15)])
def test_equal_mass_without_ties_equals_a_loop_over_ranks(n: int, n_bins: int) -> None:
    rng = np.random.default_rng(n)
    confidence = rng.permutation(np.linspace(0.2, 0.9, n))
    correct = rng.random(n) < 0.6
    bins: dict[int, list[int]] = {}
    for rank, i in enumerate(sorted(range(n), key=lambda i: confidence[i])):
        bins.setdefault(math.floor(n_bins * (rank + 0.5) / n), []).append(i)
    assert max(map(len, bins.values())) - min(map(len, bins.values())) <= 1
    assert equal_mass(confidence, correct, n_bins).n.tolist() == [len(bins[b]) for b in sorted(bins)]
    plain = debiased = 0.0
    for rows in bins.values():
        c, r = (math.fsum(values[i] for i in rows) / len(rows) for values in (confidence, correct))
        plain += len(rows) / n * abs(c - r)
        debiased += len(rows) / n * ((c - r) ** 2 - np.var([correct[i] for i in rows], ddof=1) / len(rows))
    found = equal_mass(confidence, correct, n_bins)
    assert expected_calibration_error(found) == pytest.approx(100 * plain)
    assert squared_calibration_error(found) == pytest.approx(debiased)


@given(shares, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_equal_mass_keeps_ties_together_and_has_no_single_sample(drawn, random) -> None:
    confidence, correct = np.array([c / 30 for c, _ in drawn]), np.array([r for _, r in drawn])
    found = equal_mass(confidence, correct)
    assert found.n.sum() == len(drawn)
    assert found.n.min() >= min(2, len(drawn))
    assert len(found.n) <= len(np.unique(confidence))
    assert (np.diff(found.confidence) > 0).all()
    order = list(range(len(drawn)))
    random.shuffle(order)
    again = equal_mass(confidence[order], correct[order])
    assert all(np.allclose(a, b) for a, b in zip(found, again))


def test_the_square_is_unbiased_and_the_plain_error_is_not() -> None:
    rng = np.random.default_rng(0)
    confidence = np.linspace(0.3, 0.99, 150)
    bins = [equal_mass(confidence, rng.random(150) < confidence) for _ in range(2000)]
    square = np.array([squared_calibration_error(b) for b in bins])
    assert abs(square.mean()) < 4 * square.std() / math.sqrt(2000)
    assert np.mean([expected_calibration_error(b) for b in bins]) > 5  # points, where there is no error at all
    off = [squared_calibration_error(equal_mass(confidence, rng.random(150) < confidence - 0.2)) for _ in range(2000)]
    assert np.mean(off) == pytest.approx(0.04, abs=4 * np.std(off) / math.sqrt(2000))


@pytest.mark.parametrize("k", [2, 5])
def test_brier_scores_equal_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(k)
    logits, labels = rng.normal(0, 2, (80, k)), np.concatenate([np.arange(k), rng.integers(0, k, 80 - k)])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = brier_score_loss(labels, p, labels=list(range(k)), scale_by_half=False)
    assert brier_scores(logits, labels).mean() == pytest.approx(expected)
    if k == 2:
        assert brier_scores(logits, labels).mean() / 2 == pytest.approx(brier_score_loss(labels, p[:, 1]))


def test_by_hand_and_ends() -> None:
    # Two samples of confidence 0.8, one right: |0.5 − 0.8|. Brier (0.04 + 0.04 + 0.64 + 0.64)/2.
    found = calibration(Predictions(np.log([[4.0, 1.0], [4.0, 1.0]]), np.array([0, 1])))
    assert found.ece == found.ece_equal_mass == pytest.approx(30, abs=1e-4)
    assert found.overconfidence == pytest.approx(30, abs=1e-4)
    assert found.brier == pytest.approx(0.68, abs=1e-6)
    assert found.rms_debiased == 0  # 0.09 − 0.25 < 0
    sure = np.array([[1e4, -1e4], [-1e4, 1e4]])
    assert calibration(Predictions(sure, np.array([0, 1]))) == (0, 0, 0, 0, 0)
    wrong = calibration(Predictions(sure, np.array([1, 0])))
    assert wrong == (100, 100, 100, 100, 2)
    assert calibration(Predictions(sure[:1], np.array([0]))).rms_debiased is None


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="confidence must lie"):
        equal_width(np.array([0.0, 0.5]), np.array([0, 1]))
    with pytest.raises(UserError, match="equally long"):
        equal_mass(np.array([0.5]), np.array([0, 1]))
    with pytest.raises(UserError, match="n_bins"):
        equal_width(np.array([0.5]), np.array([1]), 0)


def test_in_the_results_beside_the_retrained_model() -> None:
    rng = np.random.default_rng(3)
    labels = [rng.integers(0, 4, n) for n in (30, 10, 20)]
    ours, theirs = (Outputs(*(Predictions(rng.normal(0, 3, (len(y), 4)), y) for y in labels)) for _ in range(2))
    evidence = Evidence(ours, theirs)
    values, reference = measure(evidence, ()), measure(evidence.of_reference(), ())
    for split in ("retain", "forget", "test"):
        found = values["calibration"][f"{split}_calibration"]
        assert found == calibration(getattr(ours, split))._asdict()
        one = getattr(ours, split)
        p = np.exp(one.logits.astype(float))
        confidence = (p / p.sum(1, keepdims=True)).max(1)
        assert found["overconfidence"] == pytest.approx(100 * confidence.mean() - accuracy(one))
    gaps = gap(values, reference)["calibration"]["forget_calibration"]
    assert gaps["brier"] == pytest.approx(calibration(ours.forget).brier - calibration(theirs.forget).brier)
    alone = measure(Evidence(Outputs(ours.retain, ours.forget)), ())["calibration"]
    assert alone["test_calibration"] is None
    assert alone["forget_calibration"] == values["calibration"]["forget_calibration"]
