"""Memorization and influence from networks trained on random subsets (Feldman & Zhang 2020, arXiv 2008.03703).

    mem(i)     = Pr[h(x_i) = y_i | i in S] − Pr[h(x_i) = y_i | i not in S]
    infl(i, j) = Pr[h(x'_j) = y'_j | i in S] − Pr[h(x'_j) = y'_j | i not in S]

over subsets S of one fixed size and the randomness of training; mem(i) = infl(i, i) on the training set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unsharp.difficulty.forget import LEVELS, Level, rank
from unsharp.errors import UserError

ROWS = 1024
"""Rows of the influence matrix that are computed at a time."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Memorization scores as far as the networks tell.

    Attributes:
        memorization: (n,) float64 in [−1, 1], higher is harder; NaN where no network had the sample, or all had.
        standard_error: (n,) float64 > 0, of `memorization`.
        inside: (n,) float64 in [0, 1], share of networks that are right among those that had the sample.
        outside: (n,) float64 in [0, 1], the same among the others.
        n_inside: (n,) int64, networks that had the sample.
        n_outside: (n,) int64, networks that had not.
    """

    memorization: np.ndarray
    standard_error: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    n_inside: np.ndarray
    n_outside: np.ndarray

    def __len__(self) -> int:
        return len(self.memorization)


def memorization(inside: np.ndarray, correct: np.ndarray) -> Estimate:
    """Estimate the memorization of every training sample.

    The two shares are means of independent draws, so the variance of their difference is the sum of p(1 − p)/n. A share
    of 0 or 1 among few networks is no certainty; the variance is therefore taken at (successes + ½)/(n + 1), the mean
    of Jeffreys' posterior.

    Args:
        inside: (m, n) bool, whether network k was trained on sample i.
        correct: (m, n) bool, or a probability in [0, 1]: whether network k is right on sample i.

    Raises:
        UserError: if shapes differ, or there is no network.
    """
    inside, correct = _checked(inside, correct)
    n_inside = inside.sum(0, dtype=np.int64)
    n_outside = len(inside) - n_inside
    hits_inside = np.einsum("mn,mn->n", inside, correct, dtype=np.float64)
    hits_outside = correct.sum(0, dtype=np.float64) - hits_inside
    with np.errstate(invalid="ignore", divide="ignore"):
        within, without = hits_inside / n_inside, hits_outside / n_outside
        variance = _variance(hits_inside, n_inside) + _variance(hits_outside, n_outside)
        return Estimate(within - without, np.sqrt(variance), within, without, n_inside, n_outside)


def influence(inside: np.ndarray, correct: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """The influence of training samples on other samples.

    Args:
        inside: (m, n) bool, whether network k was trained on sample i.
        correct: (m, t) bool, whether network k is right on the other sample j.
        rows: (r,) int64, the training samples that are asked about; all by default.

    Returns:
        (r, t) float32 in [−1, 1]; NaN where no network had the training sample, or all had.

    Raises:
        UserError: if the numbers of networks differ, or there is none.
    """
    inside, correct = np.asarray(inside, bool), np.asarray(correct, np.float32)
    if len(inside) != len(correct) or len(inside) == 0:
        raise UserError(
            f"inside is of {len(inside)} networks, correct of {len(correct)}; both must be of the same ones"
        )
    chosen = inside if rows is None else inside[:, rows]
    weights = chosen.astype(np.float32)
    n_inside = weights.sum(0)[:, None]
    hits = weights.T @ correct
    with np.errstate(invalid="ignore", divide="ignore"):
        return hits / n_inside - (correct.sum(0) - hits) / (len(inside) - n_inside)


def influence_pairs(
    inside: np.ndarray, correct: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs of at least `threshold` in influence, a block of training samples at a time.

    A matrix of 50,000 × 10,000 takes 2 GB, and nearly all of it is noise about 0; the pairs that count are few.

    Args:
        inside: As for `influence`.
        correct: As for `influence`.
        threshold: Least influence that is told, in (0, 1].

    Returns:
        An iterator over (training samples (k,) int64, other samples (k,) int64, influence (k,) float32).
    """
    if not 0 < threshold <= 1:
        raise UserError(f"the least influence that is told must lie in (0, 1], got {threshold}")
    for first in range(0, inside.shape[1], ROWS):
        block = influence(inside, correct, np.arange(first, min(first + ROWS, inside.shape[1])))
        row, column = np.nonzero(block >= threshold)
        yield row + first, column, block[row, column]


def agreement(
    inside: np.ndarray,
    correct: np.ndarray,
    sizes: Mapping[Level, int],
    *,
    splits: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """How well two halves of the networks agree: on the ranking, and on the forget sets that would be chosen.

    Samples of equal score stand in a random order of each half's own, or the order of the ids would look like
    agreement. Each half has half of the networks, so two pools of the full size agree better than this says.

    Args:
        inside: (m, n) bool, whether network k was trained on sample i.
        correct: (m, n) bool, whether network k is right on sample i.
        sizes: Size of the forget set of each level that is asked about.
        splits: Number of random divisions that are averaged.
        seed: Seed of the divisions.

    Returns:
        "spearman": mean rank correlation between the halves, and the mean overlap in [0, 1] of each level's set. NaN
        where the halves have no 20 samples that both can judge.
    """
    rng = np.random.default_rng(seed)
    inside, correct = _checked(inside, correct)
    found: dict[str, list[float]] = {name: [] for name in ("spearman", *sizes)}
    for _ in range(splits):
        order = rng.permutation(len(inside))
        halves = [order[: len(order) // 2], order[len(order) // 2 : len(order) // 2 * 2]]
        first, second = (_scores(inside[half], correct[half]) for half in halves)
        known = np.flatnonzero(np.isfinite(first) & np.isfinite(second))
        if len(known) < max(20, *sizes.values()):
            return dict.fromkeys(found, float("nan"))
        first, second = first[known], second[known]
        found["spearman"].append(spearman(first, second))
        for level, size in sizes.items():
            one, other = (rank(s, rng.permutation(len(known)), level, size, 0.5) for s in (first, second))
            found[level].append(len(np.intersect1d(one, other)) / size)
    return {name: float(np.mean(values)) for name, values in found.items()}


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation in [−1, 1], ties at their mean rank; NaN where one of them is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (first, second)]
    scale = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float(ranks[0] @ ranks[1] / scale) if scale > 0 else float("nan")


def check_levels(levels: Sequence[str]) -> None:
    """Raise UserError for a level that does not exist."""
    for level in levels:
        if level not in LEVELS:
            raise UserError(f"there is no level {level!r}; there are {', '.join(LEVELS)}")


def _checked(inside: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside, correct = np.asarray(inside), np.asarray(correct)
    if inside.ndim != 2 or inside.shape != correct.shape or len(inside) == 0:
        raise UserError(
            f"inside {inside.shape} and correct {correct.shape} must both be (networks ≥ 1, samples); read them from "
            "one pool"
        )
    return inside.astype(bool, copy=False), correct


def _scores(inside: np.ndarray, correct: np.ndarray) -> np.ndarray:
    return memorization(inside, correct).memorization


def _variance(hits: np.ndarray, n: np.ndarray) -> np.ndarray:
    share = (hits + 0.5) / (n + 1)
    return share * (1 - share) / n
