"""Attacks with shadow networks: closed forms on normal scores, brute-force loops, and no network its own shadow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from unsharp.errors import UserError
from unsharp.evaluation.roc import Scored, gaussian_tpr
from unsharp.evaluation.shadow import (
    LEAST,
    SATURATED,
    linear_slope,
    lira,
    lira_leave_one_out,
    margins,
    membership_probability,
    networks_needed,
    rmia,
    rmia_leave_one_out,
    u_lira,
    u_lira_leave_one_out,
)
from unsharp.pool.store import answers

several = settings(max_examples=40, deadline=None)


def normal_pool(m: int, n: int, distance: float, seed: int = 0, target: int = 0):
    """Margins that are normal with deviation 1 about a mean of the sample's own, and `distance` higher for members."""
    rng = np.random.default_rng(seed)
    inside = rng.random((m + target, n)) < 0.5
    values = rng.normal(0, 4, n) + rng.normal(size=(m + target, n)) + distance * inside
    return values[:m], inside[:m], values[m:], inside[m:]


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["per_sample", "global"])
def test_power_converges_to_that_of_known_distributions(variance: str) -> None:
    """Equal-variance normals: TPR = Φ(d + Φ⁻¹(FPR)), AUC = Φ(d/√2); the attack knows neither mean nor deviation."""
    best = norm.cdf(1.5 / math.sqrt(2))
    lost = []
    for m in (40, 640):
        known, inside, target, truth = normal_pool(m, 400, 1.5, seed=1, target=40)
        scored = Scored.of(lira(known, inside, target, variance=variance), truth)
        lost.append(best - scored.roc.auc)
        if m == 640:
            assert abs(lost[-1]) < 0.012
            for fpr in (0.01, 0.1):
                assert scored.roc.at(fpr).tpr == pytest.approx(float(gaussian_tpr(1.5, fpr)), abs=0.03)
            # The attack's own threshold needs no fit, and is the best one: Φ(d/2).
            assert scored.roc.balanced_accuracy(0.0) == pytest.approx(norm.cdf(0.75), abs=0.012)
    assert lost[0] > lost[1]
    if variance == "per_sample":
        assert lost[0] > 0.01


def test_a_weak_attack_misses_what_the_likelihood_ratio_finds() -> None:
    known, inside, target, truth = normal_pool(200, 400, 1.5, seed=2, target=20)
    one_threshold_for_all = Scored.of(target, truth).roc
    per_sample = Scored.of(lira(known, inside, target), truth).roc
    assert one_threshold_for_all.auc < 0.65
    assert per_sample.auc > 0.83
    assert per_sample.at(0.01).tpr > 4 * one_threshold_for_all.at(0.01).tpr


def test_u_lira_converges_likewise_and_is_at_chance_on_what_is_retrained() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0, 4, 150)
    unlearned, retrained = (base + d + rng.normal(size=(200, 150)) for d in (-1.0, 0.0))  # forgotten too well
    ours, theirs = u_lira_leave_one_out(unlearned, retrained)
    curve = Scored.between(ours, theirs, same_samples=True).roc
    assert curve.auc == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.012)
    assert curve.at(0.01).tpr == pytest.approx(float(gaussian_tpr(1.0, 0.01)), abs=0.02)
    same, others = u_lira_leave_one_out(base + rng.normal(size=(200, 150)), retrained)
    assert Scored.between(same, others, same_samples=True).roc.auc == pytest.approx(0.5, abs=0.02)
    beside = Scored.between(theirs[::2], theirs[1::2], same_samples=True).roc
    assert beside.auc == pytest.approx(0.5, abs=0.02)


def test_offline_forms_have_the_power_of_their_closed_forms() -> None:
    """With the out distribution known: one-sided z has the optimal curve, two-sided |z| that of a folded normal."""
    known, inside, target, truth = normal_pool(800, 300, 1.5, seed=4, target=40)
    online, offline = (Scored.of(lira(known, inside, target, form=f), truth).roc for f in ("online", "offline"))
    for fpr in (0.05, 0.2):
        assert offline.at(fpr).tpr == pytest.approx(float(gaussian_tpr(1.5, fpr)), abs=0.025)
        assert offline.at(fpr).tpr == pytest.approx(online.at(fpr).tpr, abs=0.025)
    rng = np.random.default_rng(5)
    retrained, forgot, fresh = (rng.normal(d, 1, (400, 120)) for d in (0.0, -1.5, 0.0))
    nobody = np.empty((0, 120))
    for tail, expected in (
        ("both", norm.cdf(-norm.isf(0.05) - 1.5) + norm.cdf(-norm.isf(0.05) + 1.5)),
        ("below", norm.cdf(1.5 + norm.ppf(0.1))),
        ("above", norm.cdf(-1.5 + norm.ppf(0.1))),
    ):
        of = [u_lira(nobody, retrained, target, form="offline", tail=tail) for target in (forgot, fresh)]
        assert Scored.between(*of, same_samples=True).roc.at(0.1).tpr == pytest.approx(expected, abs=0.02)


def test_unequal_deviations_are_used() -> None:
    """Equal means, members narrower by ten: no threshold on the margin helps, the likelihood ratio does."""
    rng = np.random.default_rng(6)
    inside = rng.random((240, 200)) < 0.5
    values = np.where(inside, 0.1, 1.0) * rng.normal(size=inside.shape)
    scored = Scored.of(lira_leave_one_out(values, inside, variance="per_sample"), inside)
    assert Scored.of(values, inside).roc.auc == pytest.approx(0.5, abs=0.02)
    # 0.1 z against z at the crossing |x| = c of the two densities
    c = math.sqrt(2 * math.log(10) / (1 / 0.01 - 1))
    expected = (2 * norm.cdf(c / 0.1) - 1 + 2 * norm.cdf(-c)) / 2
    assert scored.roc.balanced_accuracy(0.0) == pytest.approx(expected, abs=0.02)


# --- textbook loops ---------------------------------------------------------------------------------------------------


def fitted(values, pooled=None):
    return norm(np.mean(values), np.std(values, ddof=1) if pooled is None else pooled)


def pooled_deviation(columns):
    return math.sqrt(sum(((c - c.mean()) ** 2).sum() for c in columns) / sum(len(c) - 1 for c in columns))


@pytest.mark.parametrize("variance", ["per_sample", "global"])
@pytest.mark.parametrize("form", ["online", "offline"])
def test_leave_one_out_equals_a_loop_that_leaves_one_out(form: str, variance: str) -> None:
    values, inside, _, _ = normal_pool(40, 5, 1.0, seed=7)
    values = values.astype(np.float32)
    found = lira_leave_one_out(values, inside, form=form, variance=variance)
    exact = values.astype(np.float64)
    for j in range(40):
        rest = np.arange(40) != j
        ins = [exact[rest & inside[:, i], i] for i in range(5)]
        outs = [exact[rest & ~inside[:, i], i] for i in range(5)]
        both = (pooled_deviation(ins), pooled_deviation(outs)) if variance == "global" else (None, None)
        for i in range(5):
            a, b = fitted(ins[i], both[0]), fitted(outs[i], both[1])
            expected = a.logpdf(exact[j, i]) - b.logpdf(exact[j, i])
            if form == "offline":
                expected = (exact[j, i] - b.mean()) / b.std()
                assert norm.cdf(found[j, i]) == pytest.approx(1 - b.sf(exact[j, i]))
            assert found[j, i] == pytest.approx(expected, rel=1e-9, abs=1e-9)
        other = lira(values[rest], inside[rest], values[j], form=form, variance=variance)
        assert np.allclose(other[0], found[j], rtol=1e-9)


def test_a_network_is_never_its_own_shadow() -> None:
    """Moving one network's margin moves its score, but not by way of the fit; the others see the move in theirs."""
    values, inside, _, _ = normal_pool(40, 3, 1.0, seed=8)
    moved = values.copy()
    moved[5, 0] += 1000.0
    here, there = (lira_leave_one_out(v, inside, form="offline", variance="per_sample") for v in (values, moved))
    outs = values[(np.arange(40) != 5) & ~inside[:, 0], 0]
    assert there[5, 0] - here[5, 0] == pytest.approx(1000.0 / outs.std(ddof=1), rel=1e-9)
    assert (there[np.arange(40) != 5, 0] == here[np.arange(40) != 5, 0]).all() == bool(inside[5, 0])
    assert np.array_equal(here[:, 1:], there[:, 1:])


def test_u_lira_leave_one_out_equals_attacks_on_each_network_alone() -> None:
    rng = np.random.default_rng(9)
    unlearned, retrained = rng.normal(0.7, 1, (24, 4)), rng.normal(size=(12, 4))
    had = rng.random((24, 4)) < 0.7
    ours, theirs = u_lira_leave_one_out(unlearned, retrained, had=had, variance="per_sample")
    assert np.array_equal(np.isnan(ours), ~had)
    for j in range(24):
        rest = np.arange(24) != j
        alone = u_lira(unlearned[rest], retrained, unlearned[j], had=had[rest], variance="per_sample")[0]
        assert np.allclose(alone[had[j]], ours[j][had[j]])
    for j in range(12):
        rest = np.arange(12) != j
        alone = u_lira(unlearned, retrained[rest], retrained[j], had=had, variance="per_sample")[0]
        assert np.allclose(alone, theirs[j])
        p = [fitted(unlearned[had[:, 2], 2]).pdf(retrained[j, 2]), fitted(retrained[rest, 2]).pdf(retrained[j, 2])]
        assert membership_probability(theirs[j, 2]) == pytest.approx(p[0] / sum(p))


# --- RMIA -------------------------------------------------------------------------------------------------------------


def brute_rmia(known, inside, z, target, target_z, *, form, gamma, a, z_inside=None):
    """The definition, one pair at a time, in probabilities."""
    p, pz, t, tz = (1 / (1 + np.exp(-v)) for v in (known, z, target, target_z))

    def expected(p, had):
        out = np.mean([v for v, h in zip(p, had) if not h])
        if form == "online" and any(had):
            return (np.mean([v for v, h in zip(p, had) if h]) + out) / 2
        return ((1 + a) * out + (1 - a)) / 2

    scores = []
    for i in range(len(t)):
        ratio = t[i] / expected(p[:, i], inside[:, i])
        hits = 0
        for k in range(len(tz)):
            had = [False] * len(pz) if z_inside is None else z_inside[:, k]
            hits += ratio / (tz[k] / expected(pz[:, k], had)) >= gamma
        scores.append(hits / len(tz))
    return scores


@pytest.mark.parametrize("form", ["online", "offline"])
@pytest.mark.parametrize(("gamma", "a"), [(1.0, 0.3), (2.0, 0.0), (1.3, 1.0)])
def test_rmia_equals_a_double_loop(form: str, gamma: float, a: float) -> None:
    rng = np.random.default_rng(10)
    known, inside, target, _ = normal_pool(12, 15, 1.0, seed=10, target=2)
    z, target_z, z_inside = rng.normal(0, 4, (12, 30)), rng.normal(0, 4, (2, 30)), rng.random((12, 30)) < 0.4
    for had in (None, z_inside):
        how = {"form": form, "gamma": gamma, "population_inside": had}
        found = rmia(known, inside, target, z, target_z, linear=a, **how)
        for j in range(2):
            assert found[j].tolist() == pytest.approx(
                brute_rmia(known, inside, z, target[j], target_z[j], form=form, gamma=gamma, a=a, z_inside=had)
            )
    scores = rmia_leave_one_out(known, inside, z, form=form, gamma=gamma, linear=a)
    for j in range(12):
        rest = np.arange(12) != j
        expected = brute_rmia(known[rest], inside[rest], z[rest], known[j], z[j], form=form, gamma=gamma, a=a)
        assert scores[j].tolist() == pytest.approx(expected)
    assert len(set(scores.ravel())) > 5


def test_rmia_counts_equal_ratios_as_reached() -> None:
    # p = ½ everywhere, so every ratio is the same number, and γ = 1 is just reached.
    half, never = np.zeros((2, 1)), np.zeros((2, 1), bool)
    assert rmia(half, never, half[:1], half, half[:1], gamma=1.0).tolist() == [[1.0]]
    assert rmia(half, never, half[:1], half, half[:1], gamma=1.0001).tolist() == [[0.0]]


def test_rmia_is_exact_where_probabilities_underflow() -> None:
    """Margins of ±2000: p is 0 in floating point, its logarithm is not."""
    known, z = np.array([[-2000.0], [-2001.0]]), np.array([[-2000.0, -1990.0], [-2001.0, -1990.0]])
    never = np.zeros((2, 1), bool)
    target, target_z = np.array([[-1990.0]]), np.array([[-2000.0, -1990.0]])
    # a = 1: p̄ = p_out. Ratio of x: e^10.38, of the z: e^0.38 and 1.
    found = rmia(known, never, target, z, target_z, gamma=2.0, linear=1.0)
    assert found.tolist() == [[1.0]]
    assert rmia(known, never, target, z, target_z, gamma=math.exp(10.1), linear=1.0).tolist() == [[0.5]]
    huge = rmia(-known, never, -target, -z, -target_z)
    assert np.isfinite(huge).all()


def test_offline_rmia_approaches_the_online_one_with_the_line_that_fits() -> None:
    """Networks whose confidence obeys the line exactly, up to noise: a is found, and both forms score alike."""
    rng = np.random.default_rng(11)
    inside = rng.random((60, 200)) < 0.5
    out = rng.uniform(0.05, 0.9, 200)
    p = (np.where(inside, 0.4 * out + 0.6, out) + 0.01 * rng.normal(size=inside.shape)).clip(0.01, 0.999)
    known = np.log(p / (1 - p))
    a = linear_slope(known, inside)
    assert a == pytest.approx(0.4, abs=0.02)
    z = np.log(out / (1 - out))[None, :] + 0.1 * rng.normal(size=(60, 200))
    online, offline = (rmia_leave_one_out(known, inside, z, form=f, linear=a) for f in ("online", "offline"))
    assert np.abs(online - offline).max() < 0.06
    assert np.abs(online - rmia_leave_one_out(known, inside, z, linear=1.0)).max() > 0.3
    both = [Scored.of(s, inside).roc.auc for s in (online, offline)]
    assert both[0] == pytest.approx(both[1], abs=0.01)
    assert both[0] > 0.8


# --- numerical care ---------------------------------------------------------------------------------------------------


def test_margins_equal_those_of_the_pool_and_the_definition() -> None:
    rng = np.random.default_rng(12)
    logits, labels = rng.normal(0, 5, (30, 4)).astype(np.float32), rng.integers(0, 4, 30)
    p = np.exp(logits.astype(np.float64))
    p = (p / p.sum(1, keepdims=True))[np.arange(30), labels]
    assert np.allclose(margins(logits, labels), np.log(p / (1 - p)))
    assert np.allclose(margins(logits, labels), answers(torch.from_numpy(logits), labels)[0], atol=1e-5)
    assert margins(np.array([[900.0, 0.0], [0.0, 900.0]]), np.array([0, 0])).tolist() == [900.0, -900.0]


def test_infinite_margins_count_as_the_largest() -> None:
    values, inside, _, _ = normal_pool(40, 3, 1.0, seed=13)
    infinite = values.copy()
    infinite[3, 0], infinite[4, 1] = np.inf, -np.inf
    replaced = values.copy()
    replaced[3, 0], replaced[4, 1] = SATURATED, -SATURATED
    assert pytest.approx(math.log((1 - 2**-53) / 2**-53)) == SATURATED
    assert np.array_equal(lira_leave_one_out(infinite, inside), lira_leave_one_out(replaced, inside))
    infinite[5, 2] = replaced[5, 2] = 90.0
    replaced[3, 0], replaced[4, 1] = 90.0, -90.0
    assert np.array_equal(lira_leave_one_out(infinite, inside), lira_leave_one_out(replaced, inside))


def test_agreeing_networks_give_finite_scores() -> None:
    """A sample on which all networks say the same has no deviation; its score is bounded by the floor."""
    values, inside, _, _ = normal_pool(60, 4, 1.0, seed=14)
    values[:, 0] = 7.0
    found = lira_leave_one_out(values, inside, variance="per_sample")
    assert np.isfinite(found).all()
    away = lira(values, inside, np.full((1, 4), 8.0), form="offline", variance="per_sample")[0]
    outs = [values[~inside[:, i], i] for i in range(4)]
    assert away[0] == pytest.approx(1 / (0.01 * pooled_deviation(outs)))
    assert away[1] == pytest.approx((8 - outs[1].mean()) / outs[1].std(ddof=1))
    constant = np.zeros((20, 2))
    half = np.repeat([[True, True], [False, False]], 10, 0)
    assert lira(constant, half, np.full((1, 2), 2.0), form="offline").tolist() == [[2 / LEAST] * 2]
    assert lira(constant, half, np.zeros((1, 2))).tolist() == [[0.0, 0.0]]


def test_auto_takes_per_sample_deviations_where_there_are_enough() -> None:
    for m, expected in ((32, "per_sample"), (31, "global")):
        values = np.random.default_rng(m).normal(size=(2 * m, 3)) * [1, 2, 3]
        inside = np.repeat([[True] * 3, [False] * 3], m, 0)
        target = np.ones((1, 3))
        assert np.array_equal(lira(values, inside, target), lira(values, inside, target, variance=expected))
        other = "global" if expected == "per_sample" else "per_sample"
        assert not np.allclose(lira(values, inside, target), lira(values, inside, target, variance=other))


# --- how many networks, and mistakes ----------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.floats(0.1, 0.9), st.integers(1, 20))
@several
def test_networks_needed_is_the_least_that_is_enough(n: int, share: float, each: int) -> None:
    found = networks_needed(n, share, each)

    def certain(m: int) -> float:
        return float(sum(binom.pmf(k, m, share) for k in range(each, m - each + 1))) ** n

    assert certain(found) >= 0.95 - 1e-9
    assert certain(found - 1) < 0.95 + 1e-9


def test_networks_needed_is_what_random_pools_need() -> None:
    m = networks_needed(100, 0.5, 5)
    rng = np.random.default_rng(15)
    counts = rng.binomial(m, 0.5, (400, 100))
    assert np.mean(((counts >= 5) & (m - counts >= 5)).all(1)) >= 0.92
    with pytest.raises(UserError, match="share"):
        networks_needed(10, 1.0, 2)


def test_too_few_networks_are_refused_with_what_is_needed() -> None:
    values, inside = np.zeros((16, 2)), np.repeat([[True, True], [False, False]], 8, 0)
    lira(values, inside, values[:1], variance="per_sample")
    inside[0, 1] = False
    with pytest.raises(UserError, match=r"1 of 2 samples .*\(sample 1: 7\).* at least 8 .*variance='global'.* needs 2"):
        lira(values, inside, values[:1], variance="per_sample")
    with pytest.raises(UserError, match="7 besides the one attacked"):
        lira_leave_one_out(values, np.repeat([[True, True], [False, False]], 8, 0), variance="per_sample")
    with pytest.raises(UserError, match="form='offline'"):
        lira(values, np.zeros((16, 2), bool), values[:1])
    lira(values, np.zeros((16, 2), bool), values[:1], form="offline")
    with pytest.raises(UserError, match="at least 2 that had not"):
        u_lira(np.empty((0, 2)), values[:1], values[:1], form="offline")
    with pytest.raises(UserError, match="that had it and one that had not"):
        rmia(values, np.zeros((16, 2), bool), values[:1], values, values[:1], form="online")
    with pytest.raises(UserError, match="besides the one attacked"):
        rmia_leave_one_out(values[:2], np.array([[True, True], [False, False]]), values[:2])


GOOD = np.zeros((8, 3)), np.repeat([[True] * 3, [False] * 3], 4, 0), np.zeros((1, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lira(GOOD[0], GOOD[1].astype(int), GOOD[2]), "inside must be bool"),
        (lambda: lira(GOOD[0], GOOD[1][:, :2], GOOD[2]), "inside must be bool"),
        (lambda: lira(GOOD[0], GOOD[1], np.zeros((1, 4))), "target must be of the same 3 samples"),
        (lambda: lira(GOOD[0], GOOD[1], np.empty((0, 3))), "target has no row"),
        (lambda: lira(GOOD[0] * np.nan, GOOD[1], GOOD[2]), "margins has 24 NaN"),
        (lambda: lira(*GOOD, form="live"), "unknown form"),
        (lambda: lira(*GOOD, variance="fixed"), "unknown variance"),
        (lambda: u_lira(GOOD[0], GOOD[0][:, :2], GOOD[2]), "on the same samples"),
        (lambda: u_lira(GOOD[0], GOOD[0], GOOD[2], had=GOOD[1][:2]), "had must be bool"),
        (lambda: u_lira(GOOD[0], GOOD[0], GOOD[2], form="offline", tail="left"), "unknown tail"),
        (lambda: rmia(*GOOD, np.zeros((7, 5)), np.zeros((1, 5))), "same 8 references"),
        (lambda: rmia(*GOOD, np.zeros((8, 5)), np.zeros((1, 4))), "target_population must be of the same 5"),
        (lambda: rmia(*GOOD, np.zeros((8, 5)), np.zeros((2, 5))), "of the same networks"),
        (lambda: rmia(*GOOD, np.zeros((8, 5)), np.zeros((1, 5)), gamma=0.0), "gamma must be"),
        (lambda: rmia(*GOOD, np.zeros((8, 5)), np.zeros((1, 5)), linear=1.5), "linear must lie"),
        (lambda: linear_slope(GOOD[0], np.ones((8, 3), bool)), "no sample has both"),
    ],
)
def test_mistakes_are_refused(call, words) -> None:
    with pytest.raises(UserError, match=words):
        call()
