"""Curves against enumeration and scikit-learn, intervals against textbooks, simulation and the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from unsharp.errors import UserError
from unsharp.evaluation.roc import (
    Scored,
    auc_difference,
    auc_error,
    auc_interval,
    bootstrap,
    clopper_pearson,
    gaussian_tpr,
    held_out,
    power,
    roc,
)

several = settings(max_examples=60, deadline=None)
tied = st.lists(st.integers(-3, 3).map(lambda v: v / 2), min_size=1, max_size=12).map(np.array)


def pairs(members, others) -> float:
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in members for b in others]))


def normal(seed: int, n: int = 300, m: int = 200, distance: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(distance, 1, n), rng.normal(0, 1, m)


@given(tied, tied)
@several
def test_curve_with_ties_equals_enumeration_and_scikit_learn(members, others) -> None:
    curve = roc(members, others)
    truth, scores = np.repeat([1, 0], [len(members), len(others)]), np.concatenate([members, others])
    assert curve.auc == pytest.approx(pairs(members, others), abs=1e-15)
    assert curve.auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    fpr, tpr, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    assert np.allclose(curve.fpr, fpr)
    assert np.allclose(curve.tpr, tpr)
    assert np.array_equal(curve.thresholds[1:], thresholds[1:])
    for t in (-9.0, -0.5, 0.0, 0.3, 9.0):
        assert curve.balanced_accuracy(t) == pytest.approx(balanced_accuracy_score(truth, scores >= t))
    candidates = [balanced_accuracy_score(truth, scores >= t) for t in [*scores, np.inf]]
    assert curve.best_balanced_accuracy == pytest.approx(max(candidates))


@given(tied, tied, st.sampled_from([0.0, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.9]))
@several
def test_rate_at_a_rate_is_the_best_threshold_that_keeps_to_it(members, others, fpr) -> None:
    found = roc(members, others).at(fpr)
    best = (0.0, 0)
    for t in [*members, *others]:
        wrong = int((others >= t).sum())
        if wrong <= fpr * len(others) + 1e-9:
            best = max(best, (float((members >= t).mean()), wrong))
    if len(others) * fpr < 1 - 1e-9 and fpr > 0:
        assert found.tpr is None
        assert f"{found.needed}" in found.note
    else:
        assert found.tpr == pytest.approx(best[0])
        assert found.false_positives <= fpr * len(others) + 1e-9


def test_a_rate_that_the_numbers_cannot_tell_is_refused() -> None:
    members, others = normal(0, n=5000, m=999)
    found = roc(members, others).at(0.001)
    assert (found.tpr, found.low, found.high) == (None, None, None)
    assert found.needed == 1000
    assert "1,000 are needed" in found.note
    assert roc(members, others).smallest_fpr == 1 / 999
    enough = roc(members, np.append(others, -5.0)).at(0.001)
    assert enough.tpr is not None
    assert enough.false_positives == 1
    # One other of a thousand: the true rate at this threshold may be more than five times what was asked for.
    assert enough.fpr_high == pytest.approx(binomtest(1, 1000).proportion_ci(method="exact").high)
    assert enough.fpr_high > 0.005
    assert roc(members, np.repeat(others, 3)[:2997]).at(0.29).false_positives <= 0.29 * 2997


def test_rounding_of_the_rate_costs_no_threshold() -> None:
    # 0.29 · 100 is 28.999999999999996 in floating point
    assert roc(np.array([0.5]), np.arange(100.0)).at(0.29).false_positives == 29


@given(st.integers(1, 40), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@several
def test_clopper_pearson_equals_scipy(n, share, level) -> None:
    hits = round(share * n)
    expected = binomtest(hits, n).proportion_ci(level, method="exact")
    assert clopper_pearson(hits, n, level) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_rates_of_normal_scores_approach_their_closed_form() -> None:
    members, others = normal(1, 60_000, 60_000, 1.5)
    curve = roc(members, others)
    for fpr in (0.001, 0.01, 0.1, 0.5):
        assert gaussian_tpr(1.5, fpr) == pytest.approx(norm.cdf(1.5 + norm.ppf(fpr)))
        assert curve.at(fpr).tpr == pytest.approx(float(gaussian_tpr(1.5, fpr)), abs=0.02)
    assert curve.auc == pytest.approx(norm.cdf(1.5 / math.sqrt(2)), abs=0.004)


def textbook_delong(members, others) -> float:
    """Variances of the placement values, from the whole matrix of pairs."""
    psi = np.array([[(a > b) + 0.5 * (a == b) for b in others] for a in members])
    return psi.mean(1).var(ddof=1) / len(members) + psi.mean(0).var(ddof=1) / len(others)


@given(tied.filter(lambda s: len(s) > 1), tied.filter(lambda s: len(s) > 1))
@several
def test_delong_equals_its_textbook_form(members, others) -> None:
    assert auc_error(members, others) ** 2 == pytest.approx(textbook_delong(members, others), abs=1e-14)


def test_delong_agrees_with_the_bootstrap_and_with_what_areas_really_do() -> None:
    members, others = normal(2, 150, 120)
    scored = Scored.between(members[None], others[None], same_samples=False)
    drawn = bootstrap(scored, replicates=1500, seed=1)
    assert drawn.areas.std() == pytest.approx(auc_error(members, others), rel=0.1)
    found = auc_interval(members, others)
    assert drawn.auc.low == pytest.approx(found.low, abs=0.015)
    assert drawn.auc.high == pytest.approx(found.high, abs=0.015)
    truth, inside, areas, errors = norm.cdf(1 / math.sqrt(2)), [], [], []
    for seed in range(400):
        a, b = normal(seed, 40, 30)
        inside.append((i := auc_interval(a, b)).low <= truth <= i.high)
        areas.append(i.value)
        errors.append(auc_error(a, b))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.1)


def test_interval_stays_within_bounds_and_owns_up_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    near = auc_interval(np.append(rng.normal(6, 1, 50), 0.0), rng.normal(0, 1, 50))
    assert 0 < near.low < near.value < near.high < 1
    apart = auc_interval(np.array([3.0, 4.0]), np.array([1.0, 2.0]))
    assert (apart.value, apart.low, apart.high) == (1.0, None, None)
    assert "no interval" in apart.covers
    with pytest.raises(UserError, match="at least two"):
        auc_interval(np.array([1.0]), np.array([0.0, 2.0]))


def test_difference_of_paired_areas_equals_a_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    shared = rng.normal(size=300)
    first = (1.0 + shared[:160] + 0.5 * rng.normal(size=160), shared[160:] + 0.5 * rng.normal(size=140))
    second = (0.6 + shared[:160] + 0.5 * rng.normal(size=160), shared[160:] + 0.5 * rng.normal(size=140))
    found = auc_difference(first, second)
    assert found.value == pytest.approx(pairs(*first) - pairs(*second), abs=1e-12)
    drawn = []
    for _ in range(800):
        i, j = rng.integers(0, 160, 160), rng.integers(0, 140, 140)
        drawn.append(roc(first[0][i], first[1][j]).auc - roc(second[0][i], second[1][j]).auc)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * np.std(drawn), rel=0.12)
    # The scores are strongly related, so taking them for independent would be far too wide.
    apart = 1.96 * math.hypot(auc_error(*first), auc_error(*second))
    assert (found.high - found.low) / 2 < 0.8 * apart
    assert auc_difference(first, first).value == 0
    with pytest.raises(UserError, match="same samples"):
        auc_difference(first, (second[0][:-1], second[1]))


def test_bootstrap_over_networks_sees_what_networks_share() -> None:
    rng = np.random.default_rng(4)
    # Each network adds its own constant to all of its 50 scores: only about 12 + 12 draws are independent.
    members, others = (d + rng.normal(0, 2, (12, 1)) + 0.3 * rng.normal(size=(12, 50)) for d in (1.0, 0.0))
    scored = Scored.between(members, others, same_samples=True)
    networks, both = (bootstrap(scored, over, replicates=300).auc for over in ("networks", "both"))
    truth = []
    for _ in range(300):
        a, b = (d + rng.normal(0, 2, (12, 1)) + 0.3 * rng.normal(size=(12, 50)) for d in (1.0, 0.0))
        truth.append(roc(a.ravel(), b.ravel()).auc)
    real = np.std(truth)
    assert (networks.high - networks.low) / 3.92 == pytest.approx(real, rel=0.35)
    assert both.high - both.low >= 0.9 * (networks.high - networks.low)
    assert auc_error(members.ravel(), others.ravel()) < 0.3 * real
    assert "networks" in networks.covers
    assert "not other shadows" in networks.covers


def test_weighted_curves_equal_curves_of_repeated_scores() -> None:
    """A draw of clusters counts each score as often as its cluster was drawn."""
    from unsharp.evaluation.roc import _Clusters, _weighted

    rng = np.random.default_rng(5)
    score, member = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.5
    sample = rng.integers(0, 9, 40)
    clusters = _Clusters.of(
        "sample", np.append(sample, [90, 91, 92, 93]), np.append(member, [True, True, False, False])
    )
    weights = clusters.draw(rng)[:40]
    values, place = np.unique(score, return_inverse=True)
    area, rates = _weighted(weights, member, (len(values) - 1 - place, len(values)), [0.2])
    repeated = np.repeat(np.arange(40), weights.astype(int))
    curve = roc(score[repeated][member[repeated]], score[repeated][~member[repeated]])
    assert area == pytest.approx(curve.auc)
    assert rates[0] == pytest.approx(curve.at(0.2).tpr)
    for s in np.unique(sample):
        assert len(set(weights[sample == s])) == 1


def test_bootstrap_is_repeatable_and_refuses_a_single_network() -> None:
    members, others = normal(6, 40, 40)
    scored = Scored.between(members[None], others[None], same_samples=False)
    assert np.array_equal(
        bootstrap(scored, seed=3, replicates=100).areas, bootstrap(scored, seed=3, replicates=100).areas
    )
    assert 0.01 not in bootstrap(scored, replicates=100).tpr
    rate = bootstrap(scored, fprs=[0.1], replicates=100).tpr[0.1]
    assert rate.low <= rate.value <= rate.high
    with pytest.raises(UserError, match="at least two networks"):
        bootstrap(scored, "networks")
    with pytest.raises(UserError, match="unknown over"):
        bootstrap(scored, "models")
    with pytest.raises(UserError, match="replicates"):
        bootstrap(scored, replicates=5)


def test_scores_know_their_network_and_sample() -> None:
    members = np.array([[1.0, np.nan], [3.0, 4.0]])
    others = np.array([[5.0, 6.0]])
    same = Scored.between(members, others, same_samples=True)
    assert same.score.tolist() == [1, 3, 4, 5, 6]
    assert same.member.tolist() == [True, True, True, False, False]
    assert same.network.tolist() == [0, 1, 1, 2, 2]
    assert same.sample.tolist() == [0, 0, 1, 0, 1]
    other = Scored.between(members[:1, :1], others, same_samples=False)
    assert other.network.tolist() == [0, 0, 0]
    assert other.sample.tolist() == [0, 1, 2]
    pool = Scored.of(np.arange(6.0).reshape(2, 3), np.array([[1, 0, 1], [0, 1, 0]], bool), network=4)
    assert pool.network.tolist() == [4, 4, 4, 5, 5, 5]
    assert pool.of_networks([5]).score.tolist() == [3, 4, 5]


def test_held_out_threshold_of_noise_is_at_chance_where_the_fitted_one_is_not() -> None:
    rng = np.random.default_rng(7)
    fitted, kept = [], []
    for _ in range(60):
        scored = Scored.between(rng.normal(size=(4, 10)), rng.normal(size=(4, 10)), same_samples=True)
        fitted.append(scored.roc.best_balanced_accuracy)
        kept.append(held_out(scored).balanced_accuracy)
    assert np.mean(fitted) > 0.55
    assert np.mean(kept) == pytest.approx(0.5, abs=0.03)


def test_held_out_rates_equal_a_loop_over_folds() -> None:
    rng = np.random.default_rng(8)
    scored = Scored.between(rng.normal(1, 1, (3, 40)), rng.normal(0, 1, (3, 40)), same_samples=True)
    found = held_out(scored, 0.1, by="network", folds=3, seed=2)
    # Each fold has one network that forgot and one that did not; whichever they are, the pooled rates are of all.
    assert 0 <= found.fpr <= 0.3
    assert found.balanced_accuracy == pytest.approx((1 + found.tpr - found.fpr) / 2)
    by_sample = held_out(scored, 0.1, by="sample", folds=2, seed=2)
    rates = []
    order = np.random.default_rng(2).permutation(40)
    fold = np.empty(40, int)
    fold[order] = np.arange(40) % 2
    for turn in range(2):
        judged = fold[scored.sample] == turn
        threshold = roc(scored.score[~judged & scored.member], scored.score[~judged & ~scored.member]).at(0.1).threshold
        rates += (scored.score[judged & ~scored.member] >= threshold).tolist()
    assert by_sample.fpr == pytest.approx(np.mean(rates))
    with pytest.raises(UserError, match="folds"):
        held_out(scored, folds=7)


def test_power_holds_it_all() -> None:
    members, others = normal(9, 400, 400)
    scored = Scored.between(members[None], others[None], same_samples=False)
    found = power(scored, threshold=0.5)
    assert found.auc == auc_interval(members, others)
    assert found.balanced_accuracy == pytest.approx(((members >= 0.5).mean() + (others < 0.5).mean()) / 2)
    assert [at.tpr is None for at in found.at] == [True, False]
    assert found.smallest_fpr == 1 / 400
    assert power(scored).balanced_accuracy is None
    assert power(scored, over="samples").auc.covers != found.auc.covers


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: roc(np.array([]), np.array([1.0])), "members must be"),
        (lambda: roc(np.array([1.0]), np.array([np.inf])), "others must be"),
        (lambda: roc(np.array([1.0]), np.array([0.0])).at(1.0), "fpr must lie"),
        (lambda: roc(np.array([1.0]), np.array([0.0])).at(0.5, level=1.0), "level must lie"),
        (lambda: clopper_pearson(3, 2), "hits must lie"),
        (lambda: Scored.of(np.zeros((1, 2)), np.zeros((1, 2), bool)), "members and of others are needed"),
        (lambda: Scored.of(np.zeros((1, 2)), np.zeros((2, 1), bool)), "must both be"),
        (lambda: Scored(np.array([np.nan, 0]), np.array([True, False]), np.zeros(2), np.zeros(2)), "finite"),
    ],
)
def test_mistakes_are_refused(call, words) -> None:
    with pytest.raises(UserError, match=words):
        call()
