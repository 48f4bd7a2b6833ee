"""Bootstrap intervals and families of comparisons: against SciPy, by textbook loops, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from unsharp.errors import UserError
from unsharp.stats import bootstrap_interval, effects_against, mean_interval, paired_difference, paired_effects

several = settings(max_examples=25, deadline=None)
number = st.floats(-1e3, 1e3)


# --- bootstrap --------------------------------------------------------------------------------------------------------


def bca_by_hand(values: np.ndarray, level: float, statistic, resamples: int, seed: int) -> tuple[float, float]:
    """Efron and Tibshirani 1993, equations 14.10, 14.14 and 14.15, one resample after the other."""
    draws, n = np.random.default_rng(seed), len(values)
    found = np.array([statistic(values[draws.integers(0, n, n)]) for _ in range(resamples)])
    figure = statistic(values)
    bias = reference.norm.ppf(((found < figure).mean() + (found <= figure).mean()) / 2)
    without = np.array([statistic(np.delete(values, i)) for i in range(n)])
    d = without.mean() - without
    acceleration = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
    ends = []
    for q in ((1 - level) / 2, (1 + level) / 2):
        z = bias + reference.norm.ppf(q)
        ends.append(np.quantile(found, reference.norm.cdf(bias + z / (1 - acceleration * z))))
    return ends[0], ends[1]


@pytest.mark.parametrize("statistic", [np.mean, np.std])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bca_is_that_of_the_textbook(statistic, level: float) -> None:
    values = np.random.default_rng(1).exponential(2.0, 40)
    found = bootstrap_interval(values, level, statistic=statistic, resamples=4000, seed=3)
    low, high = bca_by_hand(values, level, statistic, 4000, 4)
    width = high - low
    assert found.mean == pytest.approx(statistic(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * width)  # other draws
    assert found.half_width == pytest.approx((found.high - found.low) / 2)
    # The correction is there: for skewed values the interval is not the plain percentiles, nor symmetric.
    assert found.high - found.mean > 1.05 * (found.mean - found.low)


def test_the_seed_alone_decides_the_resamples() -> None:
    values = np.random.default_rng(0).normal(0, 1, 30)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


@pytest.mark.parametrize(("n", "kind", "floor"), [(40, "exponential", 0.91), (40, "normal", 0.925)])
def test_coverage_of_the_bootstrap(n: int, kind: str, floor: float) -> None:
    draws, trials = np.random.default_rng(0), 400
    hits = 0
    for _ in range(trials):
        found = bootstrap_interval(getattr(draws, kind)(size=n), resamples=499)
        hits += found.low <= (1.0 if kind == "exponential" else 0.0) <= found.high
    assert floor - 0.03 <= hits / trials <= 0.975


def test_for_a_few_seeds_it_covers_too_seldom_as_its_page_says() -> None:
    draws, trials = np.random.default_rng(0), 800
    hits = [
        [f.low <= 0 <= f.high for f in (bootstrap_interval(v, resamples=499), mean_interval(v))]
        for v in draws.normal(size=(trials, 5))
    ]
    bootstrap, t = np.mean(hits, axis=0)
    assert bootstrap == pytest.approx(0.84, abs=0.04)
    assert t == pytest.approx(0.95, abs=0.03)


def test_values_without_spread_and_single_values() -> None:
    same = bootstrap_interval([2.0, 2.0, 2.0])
    assert (same.low, same.high, same.half_width) == (2, 2, 0)
    single = bootstrap_interval([2.5])
    assert (single.mean, single.low, single.n) == (2.5, None, 1)
    constant = bootstrap_interval([1.0, 2.0, 3.0], statistic=lambda v, axis: np.zeros(v.shape[:-1])[()])
    assert (constant.mean, constant.low, constant.high) == (0, 0, 0)


def test_bad_bootstraps_are_refused() -> None:
    for values, options, message in (
        ([1.0, math.nan], {}, "finite"),
        ([], {}, "empty"),
        ([1.0, 2.0], {"level": 2}, "level"),
        ([1.0, 2.0], {"resamples": 10}, "resamples must be at least 100"),
    ):
        with pytest.raises(UserError, match=message):
            bootstrap_interval(values, **options)


# --- families of comparisons ------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(2, 8), st.integers(0, 10_000))
@several
def test_effects_equal_scipy(m: int, n: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    pairs = {f"v{i}": (draws.normal(i, 1 + i, n), draws.normal(0, 1, n)) for i in range(m)}
    found = paired_effects(pairs)
    expected = {name: reference.ttest_rel(a, b) for name, (a, b) in pairs.items()}
    assert list(found) == list(pairs)
    for name, effect in found.items():
        own, together = (expected[name].confidence_interval(q) for q in (0.95, 1 - 0.05 / m))
        assert effect.p == pytest.approx(expected[name].pvalue, rel=1e-9)
        assert (effect.difference.low, effect.difference.high) == pytest.approx((own.low, own.high), rel=1e-9)
        assert (effect.simultaneous.low, effect.simultaneous.high) == pytest.approx(
            (together.low, together.high), rel=1e-9
        )
        assert effect.difference == paired_difference(*pairs[name])
    assert {e.family for e in found.values()} == {m}
    assert [e.p_adjusted for e in found.values()] == pytest.approx(holm_by_hand([e.p for e in found.values()]))


def holm_by_hand(p: list[float]) -> list[float]:
    """The least level at which the step-down procedure rejects each, found by running it at every candidate level."""

    def rejected(level: float) -> set[int]:
        out: set[int] = set()
        for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] * (len(p) - rank) > level * (1 + 1e-12):
                break
            out.add(i)
        return out

    levels = sorted({1.0, *(min(1.0, v * k) for v in p for k in range(1, len(p) + 1))})
    return [next(level for level in levels if i in rejected(level) or level == 1.0) for i in range(len(p))]


def null_family(draws: np.random.Generator, m: int, n: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """m methods that are no better than the baseline, with a baseline in common and spreads of their own."""
    base = draws.normal(0, 1, n)
    return {f"v{i}": (draws.normal(0, 0.5 + i / 4, n), base) for i in range(m)}


def test_the_chance_of_any_false_find_is_held() -> None:
    draws, trials, m = np.random.default_rng(0), 1200, 6
    plain = adjusted = covered = 0
    for _ in range(trials):
        found = paired_effects(null_family(draws, m, 5)).values()
        plain += min(e.p for e in found) < 0.05
        adjusted += min(e.p_adjusted for e in found) < 0.05
        covered += all(e.simultaneous.low <= 0 <= e.simultaneous.high for e in found)
    error = 4 * math.sqrt(0.05 * 0.95 / trials)
    assert plain / trials > 0.15  # without the correction, luck finds something
    assert adjusted / trials <= 0.05 + error
    assert covered / trials >= 0.95 - error
    assert adjusted / trials > 0.015  # and the correction does not throw everything away


def test_holm_finds_at_least_what_the_simultaneous_intervals_find() -> None:
    draws = np.random.default_rng(2)
    more = 0
    for _ in range(300):
        pairs = {f"v{i}": (draws.normal(1.2 * i, 1, 6), draws.normal(0, 1, 6)) for i in range(4)}
        for effect in paired_effects(pairs).values():
            by_interval = not effect.simultaneous.low <= 0 <= effect.simultaneous.high
            by_p = effect.p_adjusted < 0.05
            assert by_p or not by_interval
            more += by_p and not by_interval
    assert more > 0


def test_one_comparison_needs_no_correction() -> None:
    (found,) = paired_effects({"a": ([3.0, 4.5, 5.0], [1.0, 2.0, 4.0])}).values()
    assert found.p_adjusted == found.p
    assert found.simultaneous.half_width == pytest.approx(found.difference.half_width)
    assert "all 1 intervals" in found.simultaneous.covers


def test_what_cannot_be_tested_is_not_found_significant() -> None:
    found = paired_effects(
        {
            "equal": ([2.0, 3.0], [1.0, 2.0]),  # always 1: two runs tell nothing of the spread
            "same": ([1.0, 2.0], [1.0, 2.0]),
            "single": ([5.0], [1.0]),
            "real": ([5.0, 6.1, 7.3], [1.0, 2.0, 3.0]),
        }
    )
    assert found["equal"].p is None
    assert found["equal"].p_adjusted is None
    assert found["same"].p == 1
    assert found["single"].p is None
    assert found["single"].simultaneous.low is None
    assert {e.family for e in found.values()} == {3}
    assert found["real"].p_adjusted == pytest.approx(3 * found["real"].p)


def test_effects_against_a_named_one() -> None:
    values = {"plain": [1.0, 2.0, 3.0], "better": [2.0, 3.5, 4.0], "worse": [0.0, 1.0, 1.0]}
    found = effects_against("plain", values)
    assert list(found) == ["better", "worse"]
    assert found["better"].difference.mean == pytest.approx(3.5 / 3)
    assert found["worse"].difference.mean == pytest.approx(-4 / 3)
    with pytest.raises(UserError, match="unknown baseline 'plane'; did you mean 'plain'"):
        effects_against("plane", values)
    with pytest.raises(UserError, match="'better' has 2 values, its baseline 3"):
        effects_against("plain", values | {"better": [1.0, 2.0]})
    with pytest.raises(UserError, match="values of 'better' must be finite"):
        effects_against("plain", values | {"better": [1.0, math.nan, 2.0]})
    with pytest.raises(UserError, match="level"):
        effects_against("plain", values, level=95)
