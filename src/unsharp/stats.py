"""Figures over seeds: means with an interval that says what it covers, and paired differences."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unsharp.errors import UserError, unknown


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval; `low`, `high` and `half_width` are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    half_width: float | None
    n: int
    covers: str


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of independent values (one per seed) and its Student t interval.

    Args:
        values: n ≥ 1 finite numbers; None and NaN are refused, since leaving them out would change what the mean means.
        level: Coverage of the interval, in (0, 1).

    Returns:
        mean ± t_{n−1}((1 + level)/2) · s/√n, where s is the standard deviation with n − 1 in the denominator.

    Raises:
        UserError: if `values` is empty or holds anything but finite numbers, or `level` is outside (0, 1).
    """
    return _interval(_numbers("values", values), level, "mean")


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of a − b over pairs (the same seeds in the same order), and its Student t interval.

    Args:
        a: n ≥ 1 finite numbers.
        b: Equally many, paired with `a` by position.
        level: Coverage of the interval, in (0, 1).

    Raises:
        UserError: as `mean_interval`, or if `a` and `b` have different lengths.
    """
    first, second = _numbers("a", a), _numbers("b", b)
    if len(first) != len(second):
        raise UserError(f"a and b must be pairs, got {len(first)} and {len(second)} values; keep the seeds both have")
    return _interval(first - second, level, "mean paired difference")


def bootstrap_interval(
    values: Sequence[float],
    level: float = 0.95,
    *,
    statistic: Callable[..., Any] = np.mean,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """A figure of independent values and its bootstrap interval, bias-corrected and accelerated (BCa).

    For many values of no normal shape: sample losses, ages, times. For the handful of seeds of an experiment take
    `mean_interval`: at n = 5 normal values a BCa interval of 95 % covers the mean in about 84 % of the cases.

    Args:
        values: n ≥ 1 finite numbers.
        level: Coverage of the interval, in (0, 1).
        statistic: From an array and `axis` to the figure along that axis, such as `np.mean` or `np.median`.
        resamples: Resamples with replacement, at least 100.
        seed: Of the resamples; equal seeds give equal intervals.

    Returns:
        The figure under `mean`, with low ≤ high and half their distance as `half_width`. Where all values are equal, or
        the figure is the same without any one of them and in every resample, both ends are the figure itself.

    Raises:
        UserError: as `mean_interval`, for too few resamples, or where the interval is not defined for these values.

    Source: Efron 1987, "Better bootstrap confidence intervals"; computed by `scipy.stats.bootstrap`.
    """
    found, n = _numbers("values", values), len(values)
    _check_level(level)
    if resamples < 100:
        raise UserError(f"resamples must be at least 100, got {resamples}; 9999 are usual")
    figure = float(statistic(found, axis=0))
    if n == 1:
        return Interval(figure, None, None, None, 1, "a single value: no interval")
    low, high = _bca(found, level, statistic, resamples, seed, figure)
    covers = (
        f"{100 * level:g} % BCa bootstrap interval ({resamples} resamples) over n = {n} values: covers the variation "
        "between the values given, taken as independent, and nothing that was the same in all of them"
    )
    return Interval(figure, low, high, (high - low) / 2, n, covers)


@dataclass(frozen=True)
class Effect:
    """What one of several things does beside a baseline, over the runs that both have.

    Args:
        difference: Mean of the paired differences to the baseline, with the t interval of this difference alone.
        simultaneous: The same with an interval for which all intervals of the family cover together.
        p: Two-sided p-value of the paired t test; None for fewer than two pairs, or where all differences are equal and
            not 0, which tells nothing of their spread.
        p_adjusted: After Holm's correction for the family.
        family: How many differences were tested with it.
    """

    difference: Interval
    simultaneous: Interval
    p: float | None
    p_adjusted: float | None
    family: int


def paired_effects(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], level: float = 0.95
) -> dict[str, Effect]:
    """Mean paired differences of a family of comparisons, with the chance of finding one by luck held for all of them.

    Among m true hypotheses of no difference one falls below 0.05 with a chance of up to 1 − 0.95^m. Holm's adjusted
    p-values keep the chance that *any* true one falls below 0.05 at most 0.05, and the simultaneous intervals (t
    intervals of level 1 − (1 − level)/m: Bonferroni's) *all* cover with at least `level`. Both hold for any dependence
    between the comparisons, as where they share a baseline, for different numbers of pairs and unequal spreads, if
    each comparison's differences are roughly normal. Methods that use the dependence (Dunnett's, the largest of
    permuted t statistics) are narrower, but with five seeds there are only 32 permutations of signs, and no p-value
    below 0.06.

    Args:
        pairs: By name, the values of one thing and those of its baseline for the same runs in the same order.
        level: Of each interval, and of all simultaneous ones together, in (0, 1).

    Returns:
        The effects by name, in the same order. Comparisons of a single pair have no interval, and do not count.

    Raises:
        UserError: as `paired_difference`, naming the comparison.

    Source: Holm 1979; Dunn 1961, "Multiple comparisons among means".
    """
    _check_level(level)
    differences = {name: _pair(name, a, b) for name, (a, b) in pairs.items()}
    family = sum(len(d) > 1 for d in differences.values())
    together = 1 - (1 - level) / max(1, family)
    p = {name: _t_test(d) for name, d in differences.items() if len(d) > 1}
    # What cannot be tested counts as the least significant: it makes the others' correction no smaller.
    adjusted = dict(zip(p, holm(np.array([1.0 if v is None else v for v in p.values()]))))
    return {
        name: Effect(
            difference=_interval(d, level, "mean paired difference"),
            simultaneous=_simultaneous(d, together, level, family),
            p=p.get(name),
            p_adjusted=float(adjusted[name]) if p.get(name) is not None else None,
            family=family,
        )
        for name, d in differences.items()
    }


def effects_against(baseline: str, values: Mapping[str, Sequence[float]], level: float = 0.95) -> dict[str, Effect]:
    """The paired effect of each of several things beside a named one of them; see `paired_effects`.

    Args:
        baseline: Name of the thing beside which the others are put.
        values: By name, one value per run, the same runs in the same order for all.
        level: As for `paired_effects`.

    Raises:
        UserError: for an unknown baseline; as `paired_effects`.
    """
    if baseline not in values:
        raise unknown("baseline", baseline, values)
    others = {name: (own, values[baseline]) for name, own in values.items() if name != baseline}
    return paired_effects(others, level)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction of the p-values of m tests: below α of any one at most with probability α if all are null.

    Args:
        p: (m,) float in [0, 1], of tests that may depend on each other in any way.

    Returns:
        (m,) float64 in [0, 1], not below `p`: the running maximum of (m − i) p_(i), i = 0 for the smallest.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def _numbers(name: str, values: Sequence[float]) -> np.ndarray:
    bad = [i for i, v in enumerate(values) if v is None or not math.isfinite(v)]
    if bad:
        raise UserError(
            f"{name} must be finite numbers, got {values[bad[0]]} at position {bad[0]}; mend or drop that run"
        )
    if len(values) == 0:
        raise UserError(f"{name} is empty; at least one number is needed")
    return np.asarray(values, dtype=np.float64)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise UserError(f"level must lie in (0, 1), got {level}; 0.95 gives a 95 % interval")


def _pair(name: str, a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """The differences of a named comparison."""
    own, base = _numbers(f"values of {name!r}", a), _numbers(f"baseline of {name!r}", b)
    if len(own) != len(base):
        raise UserError(f"{name!r} has {len(own)} values, its baseline {len(base)}; keep the runs both have")
    return own - base


def _t_test(differences: np.ndarray) -> float | None:
    """The two-sided p-value of a mean of 0; None where equal differences tell nothing of their spread."""
    from scipy.special import stdtr

    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))
    if (differences == differences[0]).all():
        return 1.0 if mean == 0 else None
    return float(2 * stdtr(len(differences) - 1, -abs(mean) / error))


def _simultaneous(differences: np.ndarray, each: float, level: float, family: int) -> Interval:
    """The interval of one of `family` differences, each of level `each`, all of them together of `level`."""
    found = _interval(differences, each, "mean paired difference")
    if found.n == 1:
        return found
    covers = (
        f"{100 * level:g} % simultaneous t interval (Bonferroni) of the mean paired difference over n = {found.n} "
        f"runs: all {family} intervals of the family cover together, each for the variation between the runs given"
    )
    return replace(found, covers=covers)


def _bca(
    values: np.ndarray, level: float, statistic: Callable[..., Any], resamples: int, seed: int, figure: float
) -> tuple[float, float]:
    if (values == values[0]).all():
        return figure, figure
    from scipy import stats

    until_scipy_1_15 = "rng" not in inspect.signature(stats.bootstrap).parameters
    seeded: dict[str, Any] = {"random_state" if until_scipy_1_15 else "rng": np.random.default_rng(seed)}
    # Rows of resamples at a time, so that memory stays below some 80 MB.
    rows = max(1, 10_000_000 // len(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a figure that does not move: told below, and in our words
        found = stats.bootstrap(
            (values,),
            statistic,
            confidence_level=level,
            n_resamples=resamples,
            batch=rows,
            method="BCa",
            **seeded,
        )
    if (found.bootstrap_distribution == figure).all():
        return figure, figure
    low, high = map(float, found.confidence_interval)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError("no BCa interval: the figure hardly moves between resamples of so few values; give more values")
    return low, high


def _interval(values: np.ndarray, level: float, what: str) -> Interval:
    _check_level(level)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return Interval(mean, None, None, None, 1, "a single run: no interval")
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1.0 + level) / 2.0) * values.std(ddof=1) / math.sqrt(n))
    covers = (
        f"{100 * level:g} % t interval of the {what} over n = {n} runs: covers the variation between the runs given, "
        "taken as independent and roughly normal, and nothing that was the same in all of them"
    )
    return Interval(mean, mean - half, mean + half, half, n, covers)
