"""Intervals against SciPy, and their coverage by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from unsharp.errors import UserError
from unsharp.stats import mean_interval, paired_difference

several = settings(max_examples=50, deadline=None)
number = st.floats(-1e3, 1e3)


@given(st.lists(number, min_size=2, max_size=12).filter(lambda v: np.std(v) > 1e-3), st.floats(0.5, 0.999))
@several
def test_mean_interval_equals_scipy(values: list[float], level: float) -> None:
    found = mean_interval(values, level)
    expected = reference.ttest_1samp(values, 0).confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)
    assert found.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-9)
    assert found.half_width == pytest.approx((found.high - found.low) / 2)
    assert found.n == len(values)


@given(st.lists(st.tuples(number, number), min_size=2, max_size=12).filter(lambda v: np.std(np.diff(v)) > 1e-3))
@several
def test_paired_difference_equals_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs)
    found = paired_difference(a, b)
    expected = reference.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


def test_by_hand() -> None:
    # s = 1, n = 3, t with 2 degrees of freedom at 97.5 % = 4.302653
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert "95 % t interval" in found.covers
    assert "n = 3" in found.covers
    assert mean_interval([2, 2, 2]).half_width == 0
    assert paired_difference([5, 6, 8], [1, 2, 4]).mean == 4


@pytest.mark.parametrize(("n", "level"), [(3, 0.95), (5, 0.8)])
def test_coverage(n: int, level: float) -> None:
    draws, trials = np.random.default_rng(0), 4000
    hits = sum(i.low <= 7.0 <= i.high for i in (mean_interval(draws.normal(7, 3, n), level) for _ in range(trials)))
    assert abs(hits / trials - level) < 4 * math.sqrt(level * (1 - level) / trials)


def test_pairing_removes_what_both_share() -> None:
    draws = np.random.default_rng(0)
    shared, noise = draws.normal(0, 10, 6), draws.normal(0, 0.1, 6)
    paired = paired_difference(shared + 1 + noise, shared)
    assert paired.half_width < mean_interval(shared).half_width / 10
    assert paired.low < 1 < paired.high


def test_one_value_has_no_interval() -> None:
    for found in (mean_interval([3.5]), paired_difference([4.5], [1.0])):
        assert (found.mean, found.n) == (3.5, 1)
        assert (found.low, found.high, found.half_width) == (None, None, None)
        assert "no interval" in found.covers


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_missing_values_are_an_error(bad: float) -> None:
    with pytest.raises(UserError, match=r"values must be finite numbers, got .* at position 1"):
        mean_interval([1.0, bad])
    with pytest.raises(UserError, match="b must be finite"):
        paired_difference([1.0, 2.0], [1.0, bad])


def test_bad_arguments_are_an_error() -> None:
    with pytest.raises(UserError, match="empty"):
        mean_interval([])
    with pytest.raises(UserError, match="2 and 1 values"):
        paired_difference([1, 2], [1])
    for level in (0.0, 1.0, 95):
        with pytest.raises(UserError, match="level must lie"):
            mean_interval([1, 2], level)
