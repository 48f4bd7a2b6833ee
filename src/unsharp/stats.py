"""Figures over seeds: means with an interval that says what it covers, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unsharp.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided t interval; `low`, `high` and `half_width` are None for a single value."""

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


def _numbers(name: str, values: Sequence[float]) -> np.ndarray:
    bad = [i for i, v in enumerate(values) if v is None or not math.isfinite(v)]
    if bad:
        raise UserError(
            f"{name} must be finite numbers, got {values[bad[0]]} at position {bad[0]}; mend or drop that run"
        )
    if len(values) == 0:
        raise UserError(f"{name} is empty; at least one number is needed")
    return np.asarray(values, dtype=np.float64)


def _interval(values: np.ndarray, level: float, what: str) -> Interval:
    if not 0.0 < level < 1.0:
        raise UserError(f"level must lie in (0, 1), got {level}; 0.95 gives a 95 % interval")
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
