"""How well an attack tells members from others: exact ROC curves, and what the number of scores allows to be said.

A higher score speaks for member; a score at or above the threshold is called member. Rates are shares in [0, 1].

A true-positive rate at a false-positive rate α rests on about α·n of the n other scores. With fewer than 1/α of them it
cannot be measured at all: `Roc.at` then gives no rate and says how many are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from unsharp.errors import UserError, unknown

FPRS = (0.001, 0.01)
"""False-positive rates at which an attack is reported (Carlini et al. 2022)."""
Unit = Literal["samples", "networks", "both"]
Apart = Literal["network", "sample"]

# --- scores with the truth --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scored:
    """What an attack says, with the truth, and of which network and which sample it says it.

    Args:
        score: (k,) float64, finite; higher speaks for member.
        member: (k,) bool, the truth.
        network: (k,) int64, which network was asked; scores of one network are not independent.
        sample: (k,) int64, which sample it was asked about.

    Raises:
        UserError: if shapes differ, a score is not finite, or there is no member or no other.
    """

    score: np.ndarray
    member: np.ndarray
    network: np.ndarray
    sample: np.ndarray

    def __post_init__(self) -> None:
        score, member = np.asarray(self.score, np.float64), np.asarray(self.member, bool)
        network, sample = np.asarray(self.network), np.asarray(self.sample)
        if score.ndim != 1 or not (score.shape == member.shape == network.shape == sample.shape):
            raise UserError(
                "score, member, network and sample must be one-dimensional and equally long, got shapes "
                f"{score.shape}, {member.shape}, {network.shape}, {sample.shape}"
            )
        if not np.isfinite(score).all():
            raise UserError(f"scores must be finite, got {int((~np.isfinite(score)).sum())} that are not")
        if member.all() or not member.any():
            raise UserError(f"scores of members and of others are needed, got {member.sum()} and {(~member).sum()}")
        for name, value in (("score", score), ("member", member), ("network", network), ("sample", sample)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.score)

    @classmethod
    def of(cls, scores: np.ndarray, member: np.ndarray, *, known: np.ndarray | None = None, network: int = 0) -> Scored:
        """The scores of t networks on n samples as one list.

        Args:
            scores: (t, n) float64.
            member: (t, n) bool, whether the sample is a member for this network.
            known: (t, n) bool, which scores count; all by default.
            network: Number of the first network.
        """
        scores, member = np.asarray(scores), np.asarray(member)
        if scores.ndim != 2 or scores.shape != member.shape or (known is not None and known.shape != scores.shape):
            raise UserError(f"scores {scores.shape} and member {member.shape} must both be (networks, samples)")
        row, column = np.nonzero(np.ones(scores.shape, bool) if known is None else known)
        return cls(scores[row, column], member[row, column], row + network, column)

    @classmethod
    def between(cls, members: np.ndarray, others: np.ndarray, *, same_samples: bool) -> Scored:
        """Scores of members and of others, a row for each network that was asked.

        Args:
            members: (t, n) float64; NaN where a network was not asked.
            others: (u, k) float64, likewise.
            same_samples: Whether the columns of both are the same samples, asked of different networks; else the rows
                are the same networks, asked about different samples.
        """
        parts = [np.atleast_2d(np.asarray(part, np.float64)) for part in (members, others)]
        shift = ((0, 0), (len(parts[0]), 0)) if same_samples else ((0, 0), (0, parts[0].shape[1]))
        score, member, network, sample = [], [], [], []
        for part, (down, right), is_member in zip(parts, shift, (True, False)):
            row, column = np.nonzero(~np.isnan(part))
            score.append(part[row, column])
            member.append(np.full(len(row), is_member))
            network.append(row + down)
            sample.append(column + right)
        return cls(*(np.concatenate(part) for part in (score, member, network, sample)))

    @cached_property
    def roc(self) -> Roc:
        """The exact curve."""
        return roc(self.score[self.member], self.score[~self.member])

    def of_networks(self, networks: Sequence[int]) -> Scored:
        """The scores of some networks alone."""
        rows = np.isin(self.network, networks)
        return Scored(self.score[rows], self.member[rows], self.network[rows], self.sample[rows])


# --- the curve --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure with an interval that says what it covers; `low` and `high` are None where there is none."""

    value: float
    low: float | None
    high: float | None
    level: float
    covers: str


@dataclass(frozen=True)
class AtRate:
    """What an attack reaches where at most a share `fpr` of the others may be called member.

    Attributes:
        fpr: The share that was asked for.
        tpr: Share of members that are found, with no point of the curve interpolated; None where it is not resolved.
        low: Lower end of the Clopper–Pearson interval of `tpr`, with the threshold taken as given.
        high: Upper end.
        threshold: The lowest threshold that keeps to the share; None where only calling nobody member does.
        false_positives: Others that are called member there.
        fpr_low: Lower end of the Clopper–Pearson interval of the true false-positive rate at this threshold.
        fpr_high: Upper end; far above `fpr` where few others stand behind it.
        level: Coverage of both intervals.
        needed: Others that are needed to resolve `fpr`, 1/fpr rounded up.
        note: Why there is no rate; "" where there is one.
    """

    fpr: float
    tpr: float | None
    low: float | None
    high: float | None
    threshold: float | None
    false_positives: int
    fpr_low: float
    fpr_high: float
    level: float
    needed: int
    note: str = ""


@dataclass(frozen=True, eq=False)
class Roc:
    """An exact ROC curve: a point for every distinct score, and straight lines where scores are equal.

    Attributes:
        thresholds: (k + 1,) float64, descending; the first, +∞, calls nobody member.
        true_positives: (k + 1,) int64, members with a score of at least the threshold.
        false_positives: (k + 1,) int64, others with such a score.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray

    @property
    def n_members(self) -> int:
        """Scores of members."""
        return int(self.true_positives[-1])

    @property
    def n_others(self) -> int:
        """Scores of others."""
        return int(self.false_positives[-1])

    @property
    def tpr(self) -> np.ndarray:
        """(k + 1,) float64, ascending from 0 to 1."""
        return self.true_positives / self.n_members

    @property
    def fpr(self) -> np.ndarray:
        """(k + 1,) float64, ascending from 0 to 1."""
        return self.false_positives / self.n_others

    @property
    def smallest_fpr(self) -> float:
        """The least false-positive rate above 0 that can be told: one of the others."""
        return 1.0 / self.n_others

    @property
    def auc(self) -> float:
        """Area under the curve: the share of pairs in which the member scores higher, equal scores counted half."""
        heights = self.true_positives[1:] + self.true_positives[:-1]
        doubled = int(np.dot(np.diff(self.false_positives), heights))
        return doubled / (2 * self.n_members * self.n_others)

    def at(self, fpr: float, level: float = 0.95) -> AtRate:
        """The true-positive rate at a false-positive rate of at most `fpr`.

        Args:
            fpr: In [0, 1).
            level: Coverage of the Clopper–Pearson intervals, in (0, 1).

        Raises:
            UserError: if an argument is out of range.
        """
        if not 0 <= fpr < 1:
            raise UserError(f"fpr must lie in [0, 1), got {fpr}")
        # A relative 1e-12 forgives that 0.29 · 100 falls short of 29.
        allowed = fpr * self.n_others * (1 + 1e-12)
        i = int(np.searchsorted(self.false_positives, allowed, side="right")) - 1
        found, wrong = int(self.true_positives[i]), int(self.false_positives[i])
        fpr_low, fpr_high = clopper_pearson(wrong, self.n_others, level)
        needed = math.ceil(1 / fpr * (1 - 1e-12)) if fpr else 1
        at = float(self.thresholds[i]) if i else None
        if self.n_others < needed:
            note = (
                f"{self.n_others:,} scores of others cannot tell a false-positive rate of {fpr:g}: at least "
                f"{needed:,} are needed; the smallest that these tell is {self.smallest_fpr:.2g}"
            )
            return AtRate(fpr, None, None, None, at, wrong, fpr_low, fpr_high, level, needed, note)
        low, high = clopper_pearson(found, self.n_members, level)
        return AtRate(fpr, found / self.n_members, low, high, at, wrong, fpr_low, fpr_high, level, needed)

    def balanced_accuracy(self, threshold: float) -> float:
        """Mean of the shares of members and of others that are called right, where scores ≥ `threshold` are member."""
        i = int(np.searchsorted(-self.thresholds, -threshold, side="right")) - 1
        return 0.5 * (1 + float(self.tpr[i]) - float(self.fpr[i]))

    @property
    def best_threshold(self) -> float:
        """The threshold of the highest balanced accuracy on these very scores, the highest of equally good ones."""
        # Integers, so that equally good thresholds are found equal.
        advantage = self.true_positives * self.n_others - self.false_positives * self.n_members
        return float(self.thresholds[int(advantage.argmax())])

    @property
    def best_balanced_accuracy(self) -> float:
        """Balanced accuracy at `best_threshold`: fitted to these scores, and so never below ½ even for noise."""
        return self.balanced_accuracy(self.best_threshold)


def roc(members: np.ndarray, others: np.ndarray) -> Roc:
    """The exact ROC curve of scores.

    Args:
        members: (n,) finite scores, n ≥ 1.
        others: (m,) finite scores, m ≥ 1.

    Raises:
        UserError: if there are none, or one is not finite.
    """
    members, others = _scores("members", members), _scores("others", others)
    values, place = np.unique(np.concatenate([members, others]), return_inverse=True)
    of_members = np.bincount(place[: len(members)], minlength=len(values))[::-1].cumsum()
    of_others = np.bincount(place[len(members) :], minlength=len(values))[::-1].cumsum()
    return Roc(np.append(np.inf, values[::-1]), np.append(0, of_members), np.append(0, of_others))


def gaussian_tpr(distance: float, fpr: np.ndarray) -> np.ndarray:
    """The best true-positive rate between two normal distributions of equal variance, Φ(d + Φ⁻¹(α)).

    Args:
        distance: Difference of their means in standard deviations, d ≥ 0.
        fpr: False-positive rates α in [0, 1].
    """
    from scipy.special import ndtr, ndtri

    return ndtr(distance + ndtri(np.asarray(fpr, np.float64)))


# --- intervals --------------------------------------------------------------------------------------------------------


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share: its coverage is at least `level`.

    Args:
        hits: Successes, 0 ≤ hits ≤ n.
        n: Independent trials, at least 1.
        level: In (0, 1).

    Raises:
        UserError: if an argument is out of range.
    """
    from scipy.special import betaincinv

    _check_level(level)
    if not (n >= 1 and 0 <= hits <= n):
        raise UserError(f"hits must lie in [0, n] and n be at least 1, got {hits} of {n}")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits == n else float(betaincinv(hits + 1, n - hits, 1 - tail))
    return low, high


def auc_interval(members: np.ndarray, others: np.ndarray, level: float = 0.95) -> Estimate:
    """The area under the curve with DeLong's interval, taken on the logit scale so that it stays within [0, 1].

    Args:
        members: (n,) finite scores, n ≥ 2.
        others: (m,) finite scores, m ≥ 2.
        level: In (0, 1).

    Returns:
        The area; without an interval where it is 0 or 1, since DeLong's variance is then 0 and no uncertainty.

    Source: DeLong, DeLong & Clarke-Pearson 1988, computed from mid-ranks (Sun & Xu 2014).
    """
    _check_level(level)
    above, below = _shares(members, others)
    area, error = float(above.mean()), math.sqrt(_delong(above, above, below, below))
    if error == 0:
        covers = f"no interval: DeLong's variance is 0 at an area of {area:g}; more scores are needed"
        return Estimate(area, None, None, level, covers)
    centre, half = math.log(area / (1 - area)), _normal_quantile(level) * error / (area * (1 - area))
    covers = (
        f"{100 * level:g} % interval (DeLong, logit) over {len(above):,} members and {len(below):,} others, taken as "
        "independent: covers other scores of this kind, not other networks or other shadows"
    )
    return Estimate(area, _sigmoid(centre - half), _sigmoid(centre + half), level, covers)


def auc_error(members: np.ndarray, others: np.ndarray) -> float:
    """DeLong's standard error of the area under the curve. Args: as `auc_interval`."""
    above, below = _shares(members, others)
    return math.sqrt(_delong(above, above, below, below))


def auc_difference(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], level: float = 0.95
) -> Estimate:
    """The difference of two areas whose scores are of the same samples, in the same order: of two networks, say.

    Args:
        first: Scores of members (n,) and of others (m,) by the first attack or on the first network.
        second: Those of the second, for the same members and others.
        level: In (0, 1).

    Raises:
        UserError: if the numbers differ.

    Source: DeLong, DeLong & Clarke-Pearson 1988, for correlated curves.
    """
    _check_level(level)
    (a, b), (c, d) = _shares(*first), _shares(*second)
    if len(a) != len(c) or len(b) != len(d):
        raise UserError(
            f"both curves must be of the same samples, got {len(a)} and {len(c)} members, {len(b)} and {len(d)} others"
        )
    value = float(a.mean() - c.mean())
    variance = _delong(a, a, b, b) + _delong(c, c, d, d) - 2 * _delong(a, c, b, d)
    half = _normal_quantile(level) * math.sqrt(max(0.0, variance))
    covers = (
        f"{100 * level:g} % interval (DeLong, paired) over {len(a):,} members and {len(b):,} others, taken as "
        "independent: covers other samples, not other networks or other shadows"
    )
    return Estimate(value, value - half, value + half, level, covers)


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Percentile intervals of an attack's figures over resampled samples or networks.

    Attributes:
        auc: The area under the curve.
        tpr: The true-positive rate at each false-positive rate that was asked for and that is resolved.
        areas: (replicates,) float64, the resampled areas.
    """

    auc: Estimate
    tpr: Mapping[float, Estimate]
    areas: np.ndarray = field(repr=False)


def bootstrap(
    scored: Scored,
    over: Unit = "samples",
    *,
    fprs: Sequence[float] = FPRS,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Bootstrap:
    """Intervals that allow for the dependence between scores of one sample, or of one network, or of both.

    Whole samples (or networks, or both at a time, independently of each other) are drawn with replacement, those that
    are only asked about as members, only as others, and as both apart. The shadow networks behind the scores are not
    drawn anew, so their randomness is not covered.

    Args:
        scored: The scores.
        over: What is drawn. "both" is on the wide side (Owen 2007, the pigeonhole bootstrap).
        fprs: False-positive rates; those that are not resolved are left out.
        replicates: Number of draws, at least 100.
        level: In (0, 1).
        seed: Seed of the draws, at least 0.

    Raises:
        UserError: if an argument is out of range, or there is only one of what is to be drawn in a group.
    """
    _check_level(level)
    if over not in get_args(Unit):
        raise unknown("over", over, get_args(Unit))
    if replicates < 100 or seed < 0:
        raise UserError(f"replicates must be at least 100 and seed at least 0, got {replicates} and {seed}")
    clusters = [
        _Clusters.of(name, getattr(scored, name), scored.member)
        for name, units in (("sample", ("samples", "both")), ("network", ("networks", "both")))
        if over in units
    ]
    values, place = np.unique(scored.score, return_inverse=True)
    steps = (len(values) - 1 - place, len(values))  # descending
    resolved = [fpr for fpr in fprs if scored.roc.at(fpr).tpr is not None]
    rng = np.random.default_rng(seed)
    areas, rates = np.empty(replicates), np.empty((replicates, len(resolved)))
    for r in range(replicates):
        weights = np.ones(len(scored))
        for cluster in clusters:
            weights *= cluster.draw(rng)
        areas[r], rates[r] = _weighted(weights, scored.member, steps, resolved)
    what = {"samples": "samples", "networks": "networks", "both": "samples and networks"}[over]
    counts = " and ".join(f"{len(c.stratum):,} {c.name}s" for c in clusters)
    covers = f"{100 * level:g} % percentile interval over {counts}: covers other {what}, not other shadows"

    def estimate(value: float, drawn: np.ndarray) -> Estimate:
        low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return Estimate(value, float(low), float(high), level, covers)

    found = {fpr: estimate(float(scored.roc.at(fpr).tpr or 0.0), rates[:, i]) for i, fpr in enumerate(resolved)}
    return Bootstrap(estimate(scored.roc.auc, areas), found, areas)


@dataclass(frozen=True, eq=False)
class _Clusters:
    """The samples, or the networks, behind scores: `at` says which one each score is of."""

    name: str
    at: np.ndarray
    stratum: np.ndarray

    @classmethod
    def of(cls, name: str, ids: np.ndarray, member: np.ndarray) -> _Clusters:
        at = np.unique(ids, return_inverse=True)[1]
        as_member = np.bincount(at, weights=member) > 0
        as_other = np.bincount(at, weights=~member) > 0
        stratum = as_member.astype(np.int64) + 2 * as_other
        alone = [int((stratum == kind).sum()) for kind in np.unique(stratum)]
        if min(alone) < 2:
            raise UserError(
                f"an interval over {name}s needs at least two {name}s on each side, got {alone}; draw over something "
                "else, or say that it covers nothing of the kind"
            )
        return cls(name, at, stratum)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """How often each score counts."""
        times = np.zeros(len(self.stratum))
        for kind in np.unique(self.stratum):
            rows = np.flatnonzero(self.stratum == kind)
            times[rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)))
        return times[self.at]


def _weighted(
    weights: np.ndarray, member: np.ndarray, steps: tuple[np.ndarray, int], fprs: Sequence[float]
) -> tuple[float, list[float]]:
    """Area and true-positive rates of weighted scores; NaN where the draw left no member or no other."""
    place, n = steps
    true = np.append(0, np.bincount(place, weights * member, n).cumsum())
    false = np.append(0, np.bincount(place, weights * ~member, n).cumsum())
    if true[-1] == 0 or false[-1] == 0:
        return math.nan, [math.nan] * len(fprs)
    area = float(np.dot(np.diff(false), true[1:] + true[:-1]) / (2 * true[-1] * false[-1]))
    at = [int(np.searchsorted(false, fpr * false[-1] * (1 + 1e-12), side="right")) - 1 for fpr in fprs]
    return area, [float(true[i] / true[-1]) for i in at]


# --- thresholds that were not fitted to what they judge ---------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Rates at thresholds that were chosen on other scores.

    Attributes:
        tpr: Share of members that are found.
        fpr: Share of others that are called member: what the threshold really gives, whatever was aimed at.
        balanced_accuracy: Mean of `tpr` and 1 − `fpr`.
    """

    tpr: float
    fpr: float
    balanced_accuracy: float


def held_out(
    scored: Scored, fpr: float | None = None, *, by: Apart = "network", folds: int = 2, seed: int = 0
) -> HeldOut:
    """Choose the threshold on some networks (or samples), and judge the others by it, in turns.

    Args:
        scored: The scores.
        fpr: False-positive rate that the threshold keeps to where it is chosen; None takes the threshold of the
            highest balanced accuracy there.
        by: Whether networks or samples are kept apart.
        folds: Number of turns, at least 2.
        seed: Seed of the division.

    Raises:
        UserError: if there are fewer networks or samples than folds, or a part has no member or no other.
    """
    if by not in get_args(Apart):
        raise unknown("by", by, get_args(Apart))
    distinct, at = np.unique(getattr(scored, by), return_inverse=True)
    if not 2 <= folds <= len(distinct):
        raise UserError(f"folds must lie in [2, {len(distinct)}], the number of {by}s; got {folds}")
    # Those of one kind are spread evenly, so that each part has members and others.
    kind = np.bincount(at, weights=scored.member) / np.bincount(at)
    shuffled = np.random.default_rng(seed).permutation(len(distinct))
    fold = np.empty(len(distinct), np.int64)
    fold[shuffled[np.argsort(kind[shuffled], kind="stable")]] = np.arange(len(distinct)) % folds
    called = np.zeros(len(scored), bool)
    for turn in range(folds):
        judged = fold[at] == turn
        rest = ~judged
        if scored.member[rest].all() or not scored.member[rest].any():
            raise UserError(
                f"a part of the {by}s has no member or no other; take fewer folds, or keep apart the others"
            )
        curve = roc(scored.score[rest & scored.member], scored.score[rest & ~scored.member])
        threshold = curve.best_threshold if fpr is None else curve.at(fpr).threshold
        called[judged] = scored.score[judged] >= (math.inf if threshold is None else threshold)
    tpr, wrong = float(called[scored.member].mean()), float(called[~scored.member].mean())
    return HeldOut(tpr, wrong, 0.5 * (1 + tpr - wrong))


# --- all in one -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power:
    """The figures of an attack.

    Attributes:
        auc: Area under the curve, with an interval.
        at: What it reaches at each false-positive rate.
        balanced_accuracy: At the attack's own threshold, which no score was fitted to; None where it has none.
        best_balanced_accuracy: At the best threshold for these very scores, on the optimistic side.
        smallest_fpr: The least false-positive rate above 0 that can be told.
        n_members: Scores of members.
        n_others: Scores of others.
    """

    auc: Estimate
    at: tuple[AtRate, ...]
    balanced_accuracy: float | None
    best_balanced_accuracy: float
    smallest_fpr: float
    n_members: int
    n_others: int


def power(
    scored: Scored,
    *,
    threshold: float | None = None,
    fprs: Sequence[float] = FPRS,
    over: Unit | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Power:
    """The figures of an attack in one.

    Args:
        scored: The scores.
        threshold: The attack's own: 0 for a log-likelihood ratio; None where it has none.
        fprs: False-positive rates.
        over: What the interval of the area is drawn over; None takes DeLong's, for scores that are independent.
        level: In (0, 1).
        seed: Seed of the draws.
    """
    curve = scored.roc
    if over is None:
        auc = auc_interval(scored.score[scored.member], scored.score[~scored.member], level)
    else:
        auc = bootstrap(scored, over, fprs=(), level=level, seed=seed).auc
    return Power(
        auc=auc,
        at=tuple(curve.at(fpr, level) for fpr in fprs),
        balanced_accuracy=None if threshold is None else curve.balanced_accuracy(threshold),
        best_balanced_accuracy=curve.best_balanced_accuracy,
        smallest_fpr=curve.smallest_fpr,
        n_members=curve.n_members,
        n_others=curve.n_others,
    )


def _scores(name: str, scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise UserError(
            f"{name} must be a one-dimensional array of at least one finite score, got shape {scores.shape}"
        )
    return scores


def _shares(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each member the share of others below it, for each other the share of members above; equal ones count ½."""
    members, others = _scores("members", members), _scores("others", others)
    if min(len(members), len(others)) < 2:
        raise UserError(f"an interval needs at least two members and two others, got {len(members)} and {len(others)}")
    in_order, of_members = np.sort(others), np.sort(members)
    above = (np.searchsorted(in_order, members, "left") + np.searchsorted(in_order, members, "right")) / 2
    below = (np.searchsorted(of_members, others, "left") + np.searchsorted(of_members, others, "right")) / 2
    return above / len(others), 1 - below / len(members)


def _delong(a: np.ndarray, c: np.ndarray, b: np.ndarray, d: np.ndarray) -> float:
    """Covariance of two areas with shares a, c of the same members and b, d of the same others."""

    def covariance(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.dot(x - x.mean(), y - y.mean()) / (len(x) - 1) / len(x))

    return covariance(a, c) + covariance(b, d)


def _normal_quantile(level: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * x))


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise UserError(f"level must lie in (0, 1), got {level}; 0.95 gives a 95 % interval")
