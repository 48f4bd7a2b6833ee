"""How far retain and forget samples lie among each other in the features of a network.

Four views: variance within the sets against variance between their means; the cost of moving one set onto the other
(Wasserstein); silhouettes; and how well a linear classifier tells the sets apart. The first two are the paper's (Tang &
Khanna 2026), from notes on its published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from unsharp.errors import UserError, unknown
from unsharp.evaluation.features import FeatureSet, Spread
from unsharp.evaluation.predictions import check_seed
from unsharp.stats import mean_interval

Solver = Literal["exact", "sliced", "sinkhorn"]
SOLVERS: tuple[Solver, ...] = ("exact", "sliced", "sinkhorn")
FOLDS = 5
PROJECTIONS = 256
REGULARISATION = 0.01

Rows = tuple[np.ndarray, np.ndarray]
"""Rows of retain samples and rows of forget samples."""


# --- which samples ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which samples a metric looks at that cannot look at all; a function of numbers of samples, labels and seed alone.

    So two networks are judged on the same sub-samples, and the rows are known before any feature is.

    Args:
        limit: Most samples of each set (by class: of each set in each class), ≥ 1.
        draws: Number of sub-samples drawn, ≥ 1; the interval is over them.
        seed: Seed of the draws, ≥ 0.

    Raises:
        UserError: if a value is out of range.
    """

    limit: int = 1000
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_seed(self.seed)

    def takes_all(self, *counts: int) -> bool:
        """Whether sets of these sizes need no sub-sample."""
        return max(counts) <= self.limit

    def _some(self, rows: np.ndarray, draw: int, *purpose: int) -> np.ndarray:
        order = np.random.default_rng([self.seed, draw, *purpose]).permutation(len(rows))
        return rows[order[: self.limit]]

    def pair(self, retain: np.ndarray, forget: np.ndarray, draw: int, label: int = -1) -> Rows:
        """At most `limit` rows of each set, in random order.

        Args:
            retain: (n,) rows to draw from.
            forget: (m,) rows to draw from.
            draw: Number of the draw, ≥ 0.
            label: The class they are of; −1 where they are of all classes.
        """
        return self._some(retain, draw, 0, label + 1), self._some(forget, draw, 1, label + 1)

    def even(self, retain: np.ndarray, forget: np.ndarray, draw: int, label: int = -1) -> Rows:
        """Equally many rows of both sets, at most `limit`: a part of what `pair` gives."""
        first, second = self.pair(retain, forget, draw, label)
        n = min(len(first), len(second))
        return first[:n], second[:n]

    def matched(self, retain: np.ndarray, forget: np.ndarray, draw: int) -> Rows:
        """Equally many rows of both sets with equally many of each class, at most `limit`.

        Args:
            retain: (n,) labels of all retain samples.
            forget: (m,) labels of all forget samples.
            draw: Number of the draw, ≥ 0.
        """
        pairs: list[np.ndarray] = []
        for label in np.intersect1d(retain, forget):
            rows = self.even(np.flatnonzero(retain == label), np.flatnonzero(forget == label), draw, int(label))
            pairs.append(np.stack(rows))
        joined = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.int64)
        chosen = self._some(np.arange(joined.shape[1]), draw, 2)
        return joined[0, chosen], joined[1, chosen]


def needed_rows(
    retain_labels: np.ndarray, forget_labels: np.ndarray, sampling: Sampling | None = None, *, by_class: bool = True
) -> Rows:
    """The rows whose features the metrics of this module will ask for; give them to `read_features` as `keep`.

    Args:
        retain_labels: (n,) labels of all retain samples.
        forget_labels: (m,) labels of all forget samples.
        sampling: As given to the metrics later.
        by_class: Whether the metrics by class are wanted, which need up to limit · draws rows of each class.
    """
    how = sampling or Sampling()
    retain, forget = np.asarray(retain_labels), np.asarray(forget_labels)
    found = [how.pair(np.arange(len(retain)), np.arange(len(forget)), draw) for draw in range(how.draws)]
    found += [how.matched(retain, forget, draw) for draw in range(how.draws)]
    if by_class:
        for label in np.intersect1d(retain, forget):
            of_class = np.flatnonzero(retain == label), np.flatnonzero(forget == label)
            found += [how.pair(*of_class, draw, int(label)) for draw in range(how.draws)]
    ours, theirs = zip(*found)
    return np.unique(np.concatenate(ours)), np.unique(np.concatenate(theirs))


class Estimate(NamedTuple):
    """A value, and by how much other sub-samples might change it.

    Args:
        value: The value, or the mean over draws.
        half_width: Of the 95 % t interval over draws; 0 where all samples were used, None for a single draw. It
            covers the choice of the sub-sample and neither the bias that a small sub-sample has nor other data.
        draws: Number of sub-samples.
    """

    value: float
    half_width: float | None
    draws: int


def _estimate(values: Sequence[float], *, exact: bool = False) -> Estimate:
    if exact:
        return Estimate(values[0], 0.0, 1)
    found = mean_interval(values)
    return Estimate(found.mean, found.half_width, found.n)


def shared_classes(retain: FeatureSet, forget: FeatureSet) -> list[tuple[int, float]]:
    """The classes of which both sets have samples, each with its weight: its share of all samples of such classes."""
    labels = np.intersect1d(retain.moments.classes, forget.moments.classes)
    sizes = [int(retain.moments.n[c] + forget.moments.n[c]) for c in labels]
    return [(int(c), size / sum(sizes)) for c, size in zip(labels, sizes)]


def _check(retain: FeatureSet, forget: FeatureSet) -> None:
    ours, theirs = retain.moments.mean.shape[1], forget.moments.mean.shape[1]
    if ours != theirs:
        raise UserError(f"retain and forget must have features of one length, got {ours} and {theirs}")
    if retain.normalise != forget.normalise:
        raise UserError("retain and forget must be normalised alike, got normalise=True for one of them only")


# --- variance ---------------------------------------------------------------------------------------------------------


class VarianceRatio(NamedTuple):
    """Variance within the two sets against variance between their means.

    Args:
        ratio: within / between, ≥ 0; infinite where the means coincide.
        bounded: within / (within + between) in [0, 1], which is ratio / (1 + ratio); 1 where the means coincide.
        ratio_if_alike: What the ratio is about where membership in the forget set is a matter of chance. It depends on
            the numbers of samples only.
        within: tr Σ_R + tr Σ_F.
        between: ½(‖μ_R − μ‖² + ‖μ_F − μ‖²), μ the mean of both sets together.
    """

    ratio: float
    bounded: float
    ratio_if_alike: float
    within: float
    between: float


def variance_ratio(retain: Spread, forget: Spread) -> VarianceRatio:
    """The variance entanglement of the paper, without the constant by which the published code divides.

    Covariances have n in the denominator. If membership is exchangeable, the expectations of numerator and denominator
    over all ways to split the samples are T(2 − 1/n_R − 1/n_F) and ½·c·T·n/(n_R·n_F), with T the pooled variance,
    n = n_R + n_F and c = (n_R² + n_F²)/n²; their quotient is `ratio_if_alike`, from which T falls out.

    Args:
        retain: Of the retained samples.
        forget: Of the forgotten samples.

    Source: Tang & Khanna 2026 (arXiv 2506.13715), from notes on its code; the bounded form and the value under chance
        are this library's.
    """
    n = retain.n + forget.n
    apart = float(((retain.mean - forget.mean) ** 2).sum())
    unevenness = (retain.n**2 + forget.n**2) / n**2
    within, between = retain.variance + forget.variance, 0.5 * unevenness * apart
    alike = 2 * (2 - 1 / retain.n - 1 / forget.n) * retain.n * forget.n / (unevenness * n)
    ratio = within / between if between > 0 else math.inf
    bounded = within / (within + between) if between > 0 else 1.0
    return VarianceRatio(ratio, bounded, alike, within, between)


def variance_entanglement(retain: FeatureSet, forget: FeatureSet) -> VarianceRatio:
    """`variance_ratio` of two sets of features, all samples counted. Raises: UserError if the sets do not fit."""
    _check(retain, forget)
    return variance_ratio(retain.moments.total(), forget.moments.total())


def variance_entanglement_by_class(retain: FeatureSet, forget: FeatureSet) -> VarianceRatio | None:
    """The weighted mean of every figure of `variance_ratio` over classes; None where no class is in both sets.

    Args:
        retain: Of the retained samples.
        forget: Of the forgotten samples.

    Raises:
        UserError: if the sets do not fit.
    """
    _check(retain, forget)
    shared = shared_classes(retain, forget)
    if not shared:
        return None
    found = [variance_ratio(retain.moments.of_class(c), forget.moments.of_class(c)) for c, _ in shared]
    return VarianceRatio(*(math.fsum(w * v for (_, w), v in zip(shared, column)) for column in zip(*found)))


# --- transport --------------------------------------------------------------------------------------------------------


class Transport(NamedTuple):
    """The cost of moving one set onto the other.

    Args:
        entanglement: 1 − least mean of d^p / max d^p, in [0, 1]; the paper's figure.
        distance: W_p = (least mean of d^p)^(1/p), in the unit of the features.
        entanglement_if_alike: The same where membership is shuffled among the samples at hand.
        distance_if_alike: Likewise; it is not 0, because two samples of one population lie apart.
    """

    entanglement: Estimate
    distance: Estimate
    entanglement_if_alike: Estimate
    distance_if_alike: Estimate


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances (n, m) float64 between the rows of `x` (n, D) and `y` (m, D)."""
    centre = y.mean(axis=0)  # a common offset would cost digits
    a, b = x - centre, y - centre
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None, :] - 2 * (a @ b.T)
    return np.sqrt(np.maximum(squares, 0.0))


def transport_cost(cost: np.ndarray) -> float:
    """The least mean cost of moving n equal weights onto m equal weights, exactly (network simplex).

    Args:
        cost: (n, m) float64, ≥ 0.

    Raises:
        UserError: if the solver does not come to an end.
    """
    import ot

    n, m = cost.shape
    _, log = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), np.ascontiguousarray(cost), numItermax=10**8, log=True)
    if log["warning"] is not None:
        raise UserError(f"exact transport between {n} and {m} points failed ({log['warning']}); lower limit")
    return max(float(log["cost"]), 0.0)


def _sinkhorn_cost(cost: np.ndarray, regularisation: float) -> float:
    import ot

    n, m = cost.shape
    plan: Any = ot.sinkhorn(
        np.full(n, 1 / n), np.full(m, 1 / m), cost, regularisation * max(float(cost.max()), 1e-300),
        method="sinkhorn_log", numItermax=10_000,
    )  # fmt: skip
    return float((plan * cost).sum())


def _sliced_cost(x: np.ndarray, y: np.ndarray, p: int, seed: int) -> float:
    import ot

    found = ot.sliced_wasserstein_distance(x, y, n_projections=PROJECTIONS, p=p, seed=seed)
    return float(found) ** p  # pyright: ignore[reportArgumentType]


def _moved(x: np.ndarray, y: np.ndarray, p: int, solver: Solver, seed: int) -> tuple[float, float]:
    """Entanglement and distance between the rows of x and y."""
    cost = distances(x, y) ** p
    largest = float(cost.max())
    if solver == "exact":
        least = transport_cost(cost)
    elif solver == "sinkhorn":
        least = _sinkhorn_cost(cost, REGULARISATION)
    else:
        least = _sliced_cost(x, y, p, seed)
    # Where all points coincide, nothing sets the sets apart.
    return 1.0 - min(least / largest, 1.0) if largest > 0 else 1.0, least ** (1 / p)


def _shuffled(x: np.ndarray, y: np.ndarray, draw: np.random.Generator) -> Rows:
    both = np.concatenate([x, y])[draw.permutation(len(x) + len(y))]
    return both[: len(x)], both[len(x) :]


def wasserstein(
    retain: FeatureSet,
    forget: FeatureSet,
    p: int = 1,
    sampling: Sampling | None = None,
    *,
    by_class: bool = False,
    solver: Solver = "exact",
) -> Transport | None:
    """Wasserstein entanglement between the features of two sets; None where no class is in both and `by_class`.

    Sets of at most `limit` samples are compared whole. Of larger ones sub-samples are compared, whose distance is
    larger on average than that of the whole sets: see docs/metrics/entanglement.md.

    Args:
        retain: Of the retained samples.
        forget: Of the forgotten samples.
        p: Power ≥ 1 of the distance.
        sampling: How many samples at most, and how many draws.
        by_class: Compare within each class, and take the mean weighted by the size of the classes.
        solver: "exact" (network simplex), "sliced" (mean over directions) or "sinkhorn" (entropic).

    Raises:
        UserError: if the sets do not fit, `p` is below 1, or the solver is unknown.

    Source: Tang & Khanna 2026 (arXiv 2506.13715), from notes on its code, for the entanglement at p = 1; POT solves.
    """
    _check(retain, forget)
    if p < 1:
        raise UserError(f"p must be at least 1, got {p}")
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    how = sampling or Sampling()
    parts = _parts(retain, forget, by_class)
    if not parts:
        return None

    exact = all(how.takes_all(len(rows[0]), len(rows[1])) for _, rows, _ in parts)
    actual, alike = [], []
    for draw in range(how.draws):
        shuffle = np.random.default_rng([how.seed, draw, 3])
        drawn = [(w, *_at(retain, forget, how.pair(*rows, draw, label))) for label, rows, w in parts]
        if not (exact and actual):
            actual.append(_weighted([(w, _moved(x, y, p, solver, how.seed)) for w, x, y in drawn]))
        shuffled = [(w, *_shuffled(x, y, shuffle)) for w, x, y in drawn]
        alike.append(_weighted([(w, _moved(x, y, p, solver, how.seed)) for w, x, y in shuffled]))
    return Transport(
        *(_estimate(column, exact=exact) for column in zip(*actual)), *(_estimate(column) for column in zip(*alike))
    )


def _weighted(values: Sequence[tuple[float, tuple[float, float]]]) -> tuple[float, float]:
    return math.fsum(w * v[0] for w, v in values), math.fsum(w * v[1] for w, v in values)


def _parts(retain: FeatureSet, forget: FeatureSet, by_class: bool) -> list[tuple[int, Rows, float]]:
    """The problems that a figure is the weighted mean of: label (−1 for all), rows, weight."""
    if not by_class:
        return [(-1, (np.arange(len(retain)), np.arange(len(forget))), 1.0)]
    return [(c, (retain.positions(c), forget.positions(c)), w) for c, w in shared_classes(retain, forget)]


def _at(retain: FeatureSet, forget: FeatureSet, rows: Rows) -> Rows:
    return retain.at(rows[0]), forget.at(rows[1])


# --- silhouettes ------------------------------------------------------------------------------------------------------


def silhouettes(x: np.ndarray, y: np.ndarray) -> float:
    """The mean silhouette, in [−1, 1], of two sets of points as two clusters.

    Args:
        x: (n, D) float64, n ≥ 1.
        y: (m, D) float64, m ≥ 1; n + m ≥ 3.

    Source: Rousseeuw 1987; computed by scikit-learn.
    """
    from sklearn.metrics import silhouette_score

    both = np.concatenate([x, y])
    between = distances(both, both)
    np.fill_diagonal(between, 0.0)
    return float(silhouette_score(between, np.repeat([0, 1], [len(x), len(y)]), metric="precomputed"))


def silhouette(
    retain: FeatureSet, forget: FeatureSet, sampling: Sampling | None = None, *, by_class: bool = False
) -> Estimate | None:
    """The mean silhouette of equally many retain and forget samples as two clusters.

    1: two tight clusters far apart; 0: they overlap; below 0: samples lie nearer to the other set than to their own.

    Args:
        retain: Of the retained samples.
        forget: Of the forgotten samples.
        sampling: How many samples at most, and how many draws.
        by_class: Within each class, weighted by size; classes of which a set has but one sample are left out.

    Returns:
        The estimate; None where there are not two samples of each set, by class in no class.

    Raises:
        UserError: if the sets do not fit.
    """
    _check(retain, forget)
    how = sampling or Sampling()
    parts = [part for part in _parts(retain, forget, by_class) if min(map(len, part[1])) >= 2]
    if not parts:
        return None
    whole = math.fsum(w for *_, w in parts)

    def once(draw: int) -> float:
        pairs = ((w, _at(retain, forget, how.even(*rows, draw, label))) for label, rows, w in parts)
        return math.fsum(w * silhouettes(x, y) for w, (x, y) in pairs) / whole

    exact = all(len(a) == len(b) <= how.limit for _, (a, b), _ in parts)
    return _estimate([once(draw) for draw in range(1 if exact else how.draws)], exact=exact)


# --- linear probe -----------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """How well a logistic regression tells forget from retain features on samples it was not fitted to; 50 is chance.

    Args:
        balanced_accuracy: 0–100.
        auc: Area under the ROC curve, 0–100.
    """

    balanced_accuracy: Estimate
    auc: Estimate


def probe(
    retain: FeatureSet, forget: FeatureSet, sampling: Sampling | None = None, *, match_classes: bool = False
) -> Probe | None:
    """Cross-validated accuracy of a linear classifier of forget against retain features.

    Equally many samples of both sets, features standardised on the training folds, an L2 penalty of strength C = 1,
    `FOLDS` stratified folds (fewer where there are fewer samples), drawn anew with each sub-sample.

    Args:
        retain: Of the retained samples.
        forget: Of the forgotten samples.
        sampling: How many samples at most, and how many draws.
        match_classes: Take equally many samples of each class, so that nothing is told by the class.

    Returns:
        The estimates; None where there are not two samples of each set to draw.

    Raises:
        UserError: if the sets do not fit.

    Source: linear probes, Alain & Bengio 2016 (arXiv 1610.01644); computed by scikit-learn.
    """
    _check(retain, forget)
    how = sampling or Sampling()
    found = []
    for draw in range(how.draws):
        if match_classes:
            rows = how.matched(retain.labels, forget.labels, draw)
        else:
            rows = how.even(np.arange(len(retain)), np.arange(len(forget)), draw)
        if len(rows[0]) < 2:
            return None
        found.append(probed(*_at(retain, forget, rows), how.seed + draw))
    return Probe(*(_estimate(column) for column in zip(*found)))


def probed(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float]:
    """Balanced accuracy and AUC (0–100) of a cross-validated logistic regression of `y` (n, D) against `x` (n, D)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_validate
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    folds = StratifiedKFold(min(FOLDS, len(x), len(y)), shuffle=True, random_state=seed)
    labels = np.repeat([0, 1], [len(x), len(y)])
    found = cross_validate(
        classifier, np.concatenate([x, y]), labels, cv=folds, scoring=("balanced_accuracy", "roc_auc")
    )
    return 100 * float(found["test_balanced_accuracy"].mean()), 100 * float(found["test_roc_auc"].mean())
