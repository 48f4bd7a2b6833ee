"""Distances between networks against kernels written out, sums over four samples, and what they must not depend on."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import ortho_group

from unsharp.errors import UserError
from unsharp.evaluation.distance import apart, linear_cka
from unsharp.evaluation.predictions import Predictions


def drawn(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 2.0, (n, d))


def hsic_of_kernels(k: np.ndarray, m: np.ndarray) -> float:
    n = len(k)
    h = np.eye(n) - 1 / n
    return float(np.trace(k @ h @ m @ h))


def hsic_of_four(k: np.ndarray, m: np.ndarray) -> float:
    """The U-statistic of HSIC by its definition, the mean over all four different samples."""
    terms = [
        k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q] for i, j, q, r in permutations(range(len(k)), 4)
    ]
    return float(np.mean(terms))


@pytest.mark.parametrize(("n", "d1", "d2"), [(30, 4, 7), (6, 11, 3), (5, 9, 8), (2, 3, 1)])
def test_cka_by_kernels(n: int, d1: int, d2: int):
    x, y = drawn(n, d1, 0), drawn(n, d2, 1)
    k, m = x @ x.T, y @ y.T
    expected = hsic_of_kernels(k, m) / np.sqrt(hsic_of_kernels(k, k) * hsic_of_kernels(m, m))
    assert linear_cka(x, y).cka == pytest.approx(expected, rel=1e-10)
    assert linear_cka(x, y).n == n


@pytest.mark.parametrize(("n", "d1", "d2"), [(7, 3, 2), (6, 9, 4)])
def test_debiased_cka_by_the_sum_over_four_samples(n: int, d1: int, d2: int):
    x, y = drawn(n, d1, 2), drawn(n, d2, 3)
    y[:, 0] += x[:, 0]
    k, m = x @ x.T, y @ y.T
    expected = hsic_of_four(k, m) / np.sqrt(hsic_of_four(k, k) * hsic_of_four(m, m))
    assert linear_cka(x, y).debiased == pytest.approx(expected, rel=1e-9)


def test_cka_does_not_see_rotation_scale_and_shift_but_stretching():
    x, y = drawn(40, 5, 4), drawn(40, 5, 5)
    y[:, 1] -= x[:, 2]
    turned = 3.7 * x @ ortho_group.rvs(5, random_state=0) - 11.0
    same, other = linear_cka(x, y), linear_cka(turned, y)
    assert other.cka == pytest.approx(same.cka, rel=1e-10)
    assert other.debiased == pytest.approx(same.debiased, rel=1e-9)
    itself = linear_cka(x, turned)
    assert itself.cka == pytest.approx(1.0, rel=1e-12)
    assert itself.debiased == pytest.approx(1.0, rel=1e-12)
    stretched = linear_cka(x * [1, 1, 1, 1, 40], x)
    assert stretched.cka is not None
    assert stretched.cka < 0.7


def test_unrelated_features_are_alike_by_number_alone_unless_debiased():
    found = [linear_cka(drawn(20, 200, s), drawn(20, 200, s + 100)) for s in range(30)]
    assert min(f.cka for f in found if f.cka is not None) > 0.85
    mean = np.mean([f.debiased for f in found])
    assert abs(mean) < 3 * np.std([f.debiased for f in found]) / np.sqrt(30) + 1e-3


def test_a_large_mean_does_not_hide_the_features():
    x, y = drawn(25, 3, 6), drawn(25, 4, 7)
    assert linear_cka(x + 1e7, y).cka == pytest.approx(linear_cka(x, y).cka, rel=1e-6)


def test_features_that_are_all_the_same_have_no_similarity():
    found = linear_cka(np.full((6, 2), 0.1), drawn(6, 2, 0))
    assert (found.cka, found.debiased) == (None, None)
    assert linear_cka(drawn(3, 2, 0), drawn(3, 2, 1)).debiased is None


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2))),
        (np.zeros(3), np.zeros((3, 1))),
        (np.full((3, 1), np.nan), np.zeros((3, 1))),
    ],
)
def test_features_that_cannot_be_compared_are_refused(x: np.ndarray, y: np.ndarray):
    with pytest.raises(UserError, match="must be"):
        linear_cka(x, y)


def test_what_two_networks_say():
    draw = np.random.default_rng(0)
    labels, z1, z2 = draw.integers(0, 4, 9), draw.normal(size=(9, 4)), draw.normal(size=(9, 4))
    features = draw.normal(size=(2, 9, 3))
    found = apart(Predictions(z1, labels, features[0]), Predictions(z2, labels, features[1]))
    p, q = (softmax(z.astype(np.float32).astype(float), axis=1) for z in (z1, z2))
    assert found.probabilities == pytest.approx(np.mean([np.linalg.norm(a - b) for a, b in zip(p, q)]), rel=1e-9)
    assert found.churn == pytest.approx(100 * np.mean(z1.argmax(1) != z2.argmax(1)))
    assert found.features is not None
    assert found.features.cka == pytest.approx(linear_cka(*features.astype(np.float32)).cka)
    assert apart(Predictions(z1, labels), Predictions(z2, labels)).features is None
    same = apart(Predictions(z1, labels), Predictions(z1, labels))
    assert (same.probabilities, same.churn) == (0.0, 0.0)
    with pytest.raises(UserError, match="same samples"):
        apart(Predictions(z1, labels), Predictions(z2, (labels + 1) % 4))
