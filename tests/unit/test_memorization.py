"""The estimator of memorization against every subset written out, and its parts against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from unsharp.difficulty.memorization import agreement, influence, influence_pairs, memorization, spearman
from unsharp.errors import UserError
from unsharp.pool.subsets import Subsets


def nearest(points, labels, chosen):
    """1-nearest-neighbour answers on all points, from the chosen ones: a learner whose answer is exact."""
    distance = np.linalg.norm(points[:, None] - points[None, chosen], axis=2)
    return labels[chosen][distance.argmin(1)] == labels


def noisy(right, rng):
    """The same answers from a learner that errs by chance, as training does."""
    return right ^ (rng.random(len(right)) < 0.1)


def exact(points, labels, size, flip):
    """Memorization over all subsets of the size; flip is the learner's chance to err."""
    n = len(points)
    hits, counts = np.zeros((2, n)), np.zeros((2, n))
    for subset in itertools.combinations(range(n), size):
        chosen = np.array(subset)
        right = nearest(points, labels, chosen)
        chance = np.where(right, 1 - flip, flip)
        inside = np.zeros(n, int)
        inside[chosen] = 1
        for i in range(n):
            hits[inside[i], i] += chance[i]
            counts[inside[i], i] += 1
    return hits[1] / counts[1] - hits[0] / counts[0]


@pytest.mark.parametrize("flip", [0.0, 0.1])
def test_the_estimate_converges_to_all_subsets_within_its_own_standard_error(flip):
    rng = np.random.default_rng(11)
    scores = []
    for trial in range(12):
        points, labels = rng.normal(size=(9, 2)), rng.integers(0, 3, 9)
        truth = exact(points, labels, 6, flip)
        subsets = Subsets(n=9, fraction=6 / 9, seed=trial)
        inside = subsets.inside(range(600))
        right = np.stack([nearest(points, labels, np.flatnonzero(row)) for row in inside])
        correct = np.stack([noisy(row, rng) for row in right]) if flip else right
        found = memorization(inside, correct)
        scores.append((found.memorization - truth) / found.standard_error)
    z = np.concatenate(scores)
    assert np.abs(z).max() < 4.0
    moving = z[np.abs(z) > 1e-9]
    # Where the learner errs, the standard error is neither too small nor too large by much.
    if flip:
        assert 0.8 < np.sqrt((moving**2).mean()) < 1.2


def test_the_estimate_equals_means_written_out():
    rng = np.random.default_rng(0)
    inside, correct = rng.random((23, 11)) < 0.6, rng.random((23, 11)) < 0.5
    found = memorization(inside, correct)
    for i in range(11):
        within = [c for a, c in zip(inside[:, i], correct[:, i]) if a]
        without = [c for a, c in zip(inside[:, i], correct[:, i]) if not a]
        assert found.memorization[i] == pytest.approx(np.mean(within) - np.mean(without), abs=1e-15)
        assert (found.n_inside[i], found.n_outside[i]) == (len(within), len(without))


def test_a_probability_can_take_the_place_of_right_and_wrong():
    rng = np.random.default_rng(1)
    inside, chance = rng.random((20, 5)) < 0.6, rng.random((20, 5))
    found = memorization(inside, chance)
    for i in range(5):
        expected = chance[inside[:, i], i].mean() - chance[~inside[:, i], i].mean()
        assert found.memorization[i] == pytest.approx(expected, abs=1e-12)


def test_a_sample_that_no_network_lacked_has_no_score_and_no_finite_error():
    inside = np.array([[True, True, False], [True, False, False]])
    found = memorization(inside, np.ones((2, 3), bool))
    assert np.isnan(found.memorization).tolist() == [True, False, True]
    assert not np.isfinite(found.standard_error[0])


def test_few_networks_that_all_agree_are_not_certain():
    inside = np.array([[True], [True], [False], [False]])
    assert memorization(inside, inside).standard_error[0] > 0.2


def test_influence_equals_means_written_out_and_its_diagonal_is_memorization():
    rng = np.random.default_rng(2)
    inside, other = rng.random((17, 6)) < 0.6, rng.random((17, 4)) < 0.5
    matrix = influence(inside, other)
    for i, j in itertools.product(range(6), range(4)):
        expected = other[inside[:, i], j].mean() - other[~inside[:, i], j].mean()
        assert matrix[i, j] == pytest.approx(expected, abs=1e-6)
    own = rng.random((17, 6)) < 0.5
    assert np.allclose(np.diag(influence(inside, own)), memorization(inside, own).memorization, atol=1e-6)
    assert np.array_equal(influence(inside, other, np.array([4, 1])), matrix[[4, 1]])


def test_the_pairs_are_those_of_the_matrix(monkeypatch):
    monkeypatch.setattr("unsharp.difficulty.memorization.ROWS", 4)
    rng = np.random.default_rng(3)
    inside, other = rng.random((15, 10)) < 0.6, rng.random((15, 7)) < 0.5
    rows, columns, values = (np.concatenate(parts) for parts in zip(*influence_pairs(inside, other, 0.3)))
    matrix = influence(inside, other)
    assert set(zip(rows.tolist(), columns.tolist())) == set(zip(*(a.tolist() for a in np.nonzero(matrix >= 0.3))))
    assert np.array_equal(values, matrix[rows, columns])
    with pytest.raises(UserError, match="must lie in"):
        next(influence_pairs(inside, other, 0.0))


def test_the_rank_correlation_is_that_of_scipy():
    rng = np.random.default_rng(4)
    for _ in range(5):
        a, b = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
        assert spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_halves_agree_on_what_is_there_and_not_on_noise():
    rng = np.random.default_rng(5)
    n, m = 400, 120
    inside = rng.random((m, n)) < 0.7
    truth = np.where(np.arange(n) < 40, 0.9, 0.1)
    correct = rng.random((m, n)) < np.where(inside, 0.95, 0.95 - truth)
    found = agreement(inside, correct, {"high": 40})
    assert found["high"] > 0.9
    noise = agreement(inside, rng.random((m, n)) < 0.5, {"high": 40, "low": 40})
    # Chance alone gives 40 / 400.
    assert abs(noise["spearman"]) < 0.1
    assert noise["high"] < 0.25
    assert noise["low"] < 0.25


def test_ties_are_no_agreement():
    rng = np.random.default_rng(6)
    inside = rng.random((40, 300)) < 0.5
    found = agreement(inside, np.ones((40, 300), bool), {"low": 30})
    assert found["low"] < 0.25


def test_too_few_networks_have_no_agreement():
    inside = np.eye(4, 100, dtype=bool)
    assert np.isnan(agreement(inside, inside, {"high": 5})["high"])


@pytest.mark.parametrize("shape", [(0, 3), (2, 4)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(UserError, match="one pool"):
        memorization(np.ones(shape, bool), np.ones((2, 3), bool))


class TestSubsets:
    def test_each_has_the_size_and_is_a_function_of_seed_and_member(self):
        subsets = Subsets(n=50, fraction=0.7, seed=3)
        for member in (0, 5, 1000):
            chosen = subsets.indices(member)
            assert len(chosen) == 35
            assert len(np.unique(chosen)) == 35
            assert (np.diff(chosen) > 0).all()
            assert np.array_equal(chosen, Subsets(n=50, fraction=0.7, seed=3).indices(member))
        assert not np.array_equal(subsets.indices(0), subsets.indices(1))
        assert not np.array_equal(subsets.indices(0), Subsets(n=50, fraction=0.7, seed=4).indices(0))
        assert np.array_equal(subsets.inside([2, 0])[1].nonzero()[0], subsets.indices(0))

    def test_samples_and_pairs_of_samples_are_drawn_alike(self):
        inside = Subsets(n=12, fraction=0.5, seed=0).inside(range(4000))
        assert np.abs(inside.mean(0) - 0.5).max() < 4.5 * np.sqrt(0.25 / 4000)
        pairs = (inside[:, :, None] & inside[:, None, :]).mean(0)
        expected = 6 / 12 * 5 / 11
        off = pairs[~np.eye(12, dtype=bool)]
        assert np.abs(off - expected).max() < 4.5 * np.sqrt(expected * (1 - expected) / 4000)

    def test_training_seeds_differ(self):
        subsets = Subsets(n=5, fraction=0.5, seed=0)
        assert len({subsets.training_seed(j) for j in range(500)}) == 500

    @pytest.mark.parametrize("given", [{"fraction": 0.0}, {"fraction": 1.2}, {"seed": -1}, {"fraction": 0.01}])
    def test_what_cannot_be_is_refused(self, given):
        with pytest.raises(UserError):
            Subsets(**({"n": 10, "fraction": 0.5, "seed": 0} | given))
