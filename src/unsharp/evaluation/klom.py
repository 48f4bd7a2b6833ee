"""KLoM: for each sample, how far the margins of networks that forgot are from those of retrained ones, over ensembles.

One network says one thing about a sample; many, trained with different seeds, say a distribution of things. Forgetting
is exact where networks that forgot draw their answers from the same distribution as the retrained ones, the oracles.
KLoM is the KL divergence of the two, KL(unlearned ‖ oracles), of the margin log p_y − log(1 − p_y) (`shadow.margins`).

An estimate from few networks is far above 0 even where nothing is left to forget: with ten of each kind the binned
estimate of two *identical* distributions is about 5.6 nats of at most 11.5. So no value is given without its **floor**,
what the same estimate comes to between identical distributions with as many networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, get_args

import numpy as np

from unsharp.difficulty.forget import ForgetSet
from unsharp.errors import UserError, unknown
from unsharp.evaluation.shadow import FLOOR, LEAST
from unsharp.evaluation.shadow_pool import forgotten_columns, margins_of_oracles
from unsharp.pool.store import PoolOutputs

Estimator = Literal["auto", "binned", "gaussian"]
Edge = Literal["closed", "open"]

ENOUGH = 100
"""Networks of each kind from which on "auto" bins, as the authors do; with fewer it fits normal distributions."""
BINS, LARGEST, LEAST_SHARE = 20, 100.0, 1e-5
FEWEST = {"binned": (2, 2), "gaussian": (2, 4)}
DRAWS = 4000
AT_ONCE = 1 << 22
"""Margins that are binned at a time."""
PERCENTILES = (50.0, 95.0, 99.0)

# --- estimates --------------------------------------------------------------------------------------------------------


def binned_kl(unlearned: np.ndarray, oracles: np.ndarray, *, n_bins: int = BINS, edge: Edge = "closed") -> np.ndarray:
    """KL(unlearned ‖ oracles) of each sample from histograms on the joint range of its margins.

    Margins are clipped to ±100. An empty bin of the oracles counts as a share of 1e-5, before shares are normalised, so
    that the largest value is about log 10⁵ = 11.5.

    Args:
        unlearned: (N, n) float, no NaN.
        oracles: (M, n) float, no NaN, on the same samples.
        n_bins: Bins of equal width, ≥ 1.
        edge: "closed" puts the largest margin into the last bin. "open" leaves it out, as the published code does: the
            sample with the joint maximum does not count, and the value is NaN where that leaves no network of a kind.

    Returns:
        (n,) float64 in nats, ≥ 0.

    Raises:
        UserError: if an argument is out of range.

    Source: Georgiev et al. 2024 (arXiv 2410.23232), as in its published benchmark code, with the edge closed.
    """
    unlearned, oracles = _checked(unlearned, oracles, "binned")
    if edge not in get_args(Edge):
        raise unknown("edge", edge, get_args(Edge))
    if n_bins < 1:
        raise UserError(f"n_bins must be at least 1, got {n_bins}; 20 is usual")
    step = max(1, AT_ONCE // (len(unlearned) + len(oracles)))
    starts = range(0, unlearned.shape[1], step)
    parts = [_binned(unlearned[:, i : i + step], oracles[:, i : i + step], n_bins, edge) for i in starts]
    return np.concatenate(parts)


def _binned(unlearned: np.ndarray, oracles: np.ndarray, n_bins: int, edge: Edge) -> np.ndarray:
    low = np.minimum(unlearned.min(0), oracles.min(0))
    high = np.maximum(unlearned.max(0), oracles.max(0))
    high = np.where(high > low, high, low + 1.0)
    p, q = (_shares(margins, low, high, n_bins, edge) for margins in (unlearned, oracles))
    q = np.where(p > 0, np.maximum(q, LEAST_SHARE), q)
    q /= q.sum(axis=1, keepdims=True)
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.maximum((p * np.log(ratio)).sum(axis=1), 0.0)


def _shares(margins: np.ndarray, low: np.ndarray, high: np.ndarray, n_bins: int, edge: Edge) -> np.ndarray:
    """(n, bins): share of the networks in each bin of each sample."""
    n = margins.shape[1]
    # Divided first, so that the largest margin is 1 to the bit. It goes into the last bin, or into one that is cut off.
    place = np.floor((margins - low) / (high - low) * n_bins).astype(np.int64)
    place = np.minimum(place, n_bins - 1 if edge == "closed" else n_bins)
    flat = place + (n_bins + 1) * np.arange(n)
    counts = np.bincount(flat.ravel(), minlength=n * (n_bins + 1)).reshape(n, n_bins + 1)[:, :n_bins]
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)


def gaussian_kl(unlearned: np.ndarray, oracles: np.ndarray) -> np.ndarray:
    """KL(unlearned ‖ oracles) of the normal distributions that are fitted to the margins of each sample.

    log(σ_o/σ_u) + (σ_u² + (μ_u − μ_o)²)/(2σ_o²) − ½, variances with n − 1. Margins are clipped to ±100, and deviations
    floored at a hundredth of the oracles' over all samples, since a sample on which few networks agree would decide.

    Args:
        unlearned: (N, n) float, no NaN, N ≥ 2.
        oracles: (M, n) float, no NaN, M ≥ 4, on the same samples.

    Returns:
        (n,) float64 in nats, ≥ 0.

    Raises:
        UserError: if an argument is out of range.
    """
    unlearned, oracles = _checked(unlearned, oracles, "gaussian")
    least = max(FLOOR * math.sqrt(oracles.var(axis=0, ddof=1).mean()), LEAST)
    u, o = (np.maximum(margins.std(axis=0, ddof=1), least) for margins in (unlearned, oracles))
    apart = unlearned.mean(axis=0) - oracles.mean(axis=0)
    return np.maximum(np.log(o / u) + (u**2 + apart**2) / (2 * o**2) - 0.5, 0.0)


def gaussian_floor(n_unlearned: int, n_oracles: int) -> float:
    """The expectation of `gaussian_kl` where both kinds draw from one normal distribution, exactly.

    ½[ψ(b/2) − log(b/2) − ψ(a/2) + log(a/2)] + ½(1 + 1/N + 1/M) b/(b − 2) − ½, with a = N − 1, b = M − 1 and ψ the
    digamma function.

    Args:
        n_unlearned: N ≥ 2.
        n_oracles: M ≥ 4; with fewer it is infinite.

    Raises:
        UserError: if there are too few.
    """
    from scipy.special import digamma

    _check_numbers(n_unlearned, n_oracles, "gaussian")
    a, b = n_unlearned - 1, n_oracles - 1
    logs = float(digamma(b / 2) - digamma(a / 2)) - math.log(b / a)
    return 0.5 * (logs + (1 + 1 / n_unlearned + 1 / n_oracles) * b / (b - 2) - 1)


@lru_cache(maxsize=32)
def between_identical(
    estimator: Estimator, n_unlearned: int, n_oracles: int, edge: Edge = "closed", seed: int = 0, draws: int = DRAWS
) -> np.ndarray:
    """The estimates for samples whose margins all come from one normal distribution: what is there without any trace.

    Both estimates are unaffected by shift and scale, so the standard normal stands for all.

    Args:
        estimator: "binned" or "gaussian".
        n_unlearned: Networks that forgot.
        n_oracles: Retrained networks.
        edge: As for `binned_kl`.
        seed: Seed of the simulation.
        draws: Samples to simulate, ≥ 1.

    Returns:
        (draws,) float64 in nats, ascending.
    """
    rng = np.random.default_rng(seed)
    u, o = rng.standard_normal((n_unlearned, draws)), rng.standard_normal((n_oracles, draws))
    found = np.sort(_estimates(u, o, estimator, edge))
    found.flags.writeable = False  # others get the same array
    return found


def _estimates(unlearned: np.ndarray, oracles: np.ndarray, estimator: Estimator, edge: Edge) -> np.ndarray:
    if estimator == "gaussian":
        return gaussian_kl(unlearned, oracles)
    return binned_kl(unlearned, oracles, edge=edge)


# --- of two ensembles -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Klom:
    """KLoM of some samples, with what it comes to where nothing is left.

    Attributes:
        values: (n,) float64, nats, of each sample.
        estimator: "binned" or "gaussian".
        n_unlearned: Networks that forgot, for each sample.
        n_oracles: Retrained networks, for each sample.
        edge: As for `binned_kl`.
        seed: Of the simulation of the floor.
    """

    values: np.ndarray
    estimator: Estimator
    n_unlearned: int
    n_oracles: int
    edge: Edge = "closed"
    seed: int = 0

    @property
    def mean(self) -> float:
        """Mean over samples, in nats."""
        return float(self.values.mean())

    @cached_property
    def floor(self) -> float:
        """The mean that identical distributions have: exact for "gaussian", simulated for "binned"."""
        if self.estimator == "gaussian":
            return gaussian_floor(self.n_unlearned, self.n_oracles)
        return float(self._identical.mean())

    def percentile(self, q: float) -> float:
        """The value that q percent of the samples do not exceed, q in [0, 100]."""
        return float(np.percentile(self.values, q))

    def floor_percentile(self, q: float) -> float:
        """The same between identical distributions, of samples that are independent."""
        return float(np.percentile(self._identical, q))

    @property
    def share_above(self) -> float:
        """Share of the samples above the 95th percentile of identical distributions, 0–100; 5 where nothing is left."""
        return 100.0 * float((self.values > self.floor_percentile(95.0)).mean())

    def figures(self, percentiles: Sequence[float] = PERCENTILES) -> dict[str, float]:
        """Mean and percentiles, each with its floor, and the share of samples above the 95th percentile of the floor.

        Args:
            percentiles: In [0, 100].
        """
        found = {"mean": self.mean, "mean_floor": self.floor}
        for q in percentiles:
            found |= {f"p{q:g}": self.percentile(q), f"p{q:g}_floor": self.floor_percentile(q)}
        return found | {"share_above": self.share_above}

    @property
    def _identical(self) -> np.ndarray:
        return between_identical(self.estimator, self.n_unlearned, self.n_oracles, self.edge, self.seed)


def klom(
    unlearned: np.ndarray,
    oracles: np.ndarray,
    *,
    estimator: Estimator = "auto",
    edge: Edge = "closed",
    seed: int = 0,
) -> Klom:
    """KLoM of each sample, from the margins of two ensembles.

    Args:
        unlearned: (N, n) float, margins of networks that were trained on everything and forgot. Infinite ones count as
            ±100.
        oracles: (M, n) float, margins of networks that were trained without the forget set, on the same samples.
        estimator: "binned" as the authors', "gaussian" for few networks, or "auto": "binned" from 100 of each kind on.
        edge: As for `binned_kl`.
        seed: Seed of the simulation of the floor.

    Raises:
        UserError: if shapes differ, a margin is NaN, or there are too few networks.

    Source: Georgiev et al. 2024, "Attribute-to-Delete" (arXiv 2410.23232). The normal fit and the floors are this
    library's.
    """
    if estimator not in get_args(Estimator):
        raise unknown("estimator", estimator, get_args(Estimator))
    if estimator == "auto":
        estimator = "binned" if min(len(unlearned), len(oracles)) >= ENOUGH else "gaussian"
    values = _estimates(unlearned, oracles, estimator, edge)
    return Klom(values, estimator, len(unlearned), len(oracles), edge, seed)


# --- of pools ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KlomBeside:
    """KLoM of some samples, and the same with retrained networks in the place of those that forgot.

    Attributes:
        unlearned: Of the networks that forgot against the oracles.
        retrained: Of every other oracle against the rest: where it is not at its own floor, the margins of these
            networks are not normal enough for the floor. None where there are too few oracles.
    """

    unlearned: Klom
    retrained: Klom | None


def klom_on_pools(
    unlearned: PoolOutputs,
    oracles: PoolOutputs,
    forget: ForgetSet,
    *,
    estimator: Estimator = "auto",
    edge: Edge = "closed",
    seed: int = 0,
) -> dict[str, KlomBeside]:
    """KLoM of the forgotten, the retained and, where the pools were asked about any, the test samples.

    Of a forget sample those networks count that had it, and all oracles; of a retained sample those of both kinds that
    were trained on it. Where this is not the same number for all samples (networks on random subsets), as many count as
    the sample with the fewest has, the first by number: a floor holds for one number of networks.

    Args:
        unlearned: Of the pool that forgot, `unlearned_pool_of(...).outputs()`.
        oracles: Of the networks that were trained without the forget set.
        forget: What was forgotten.
        estimator: As for `klom`.
        edge: As for `binned_kl`.
        seed: Seed of the simulation of the floor.

    Returns:
        "forget", "retain" and "test" (left out where there is none).

    Raises:
        UserError: if the pools are of other samples, an oracle had a forget sample, or there are too few networks.
    """
    columns = forgotten_columns(unlearned, forget)
    never = margins_of_oracles(oracles, unlearned, columns)
    kept = forget.retain_indices(unlearned.inside.shape[1])
    sets = {
        "forget": (_of_those(unlearned.train.margin, unlearned.inside, columns, "unlearned networks"), never),
        "retain": (
            _of_those(unlearned.train.margin, unlearned.inside, kept, "unlearned networks"),
            _of_those(oracles.train.margin, oracles.inside, kept, "oracles"),
        ),
    }
    if unlearned.test is not None and oracles.test is not None:
        if not np.array_equal(unlearned.test.labels, oracles.test.labels):
            raise UserError("the pools were asked about different test samples; give both the same")
        sets["test"] = (unlearned.test.margin, oracles.test.margin)
    return {name: _beside(u, o, estimator, edge, seed) for name, (u, o) in sets.items()}


def _beside(unlearned: np.ndarray, oracles: np.ndarray, estimator: Estimator, edge: Edge, seed: int) -> KlomBeside:
    found = klom(unlearned, oracles, estimator=estimator, edge=edge, seed=seed)
    if len(oracles) < 2 * max(FEWEST[found.estimator]):
        return KlomBeside(found, None)
    return KlomBeside(found, klom(oracles[::2], oracles[1::2], estimator=found.estimator, edge=edge, seed=seed))


def _of_those(margins: np.ndarray, inside: np.ndarray, columns: np.ndarray, whose: str) -> np.ndarray:
    """(m, k): for each column the margins of the first m networks that had the sample, m the fewest of any."""
    had = inside[:, columns]
    count = had.sum(axis=0)
    fewest = int(count.min())
    if fewest < 2:
        raise UserError(
            f"sample {int(columns[count.argmin()])} was in the training set of only {fewest} of {len(had)} {whose}; "
            "KLoM needs several for every sample: train more networks, or on larger subsets (fraction=1 gives all of "
            "them all samples)"
        )
    rows = np.argsort(~had, axis=0, kind="stable")[:fewest]
    return np.take_along_axis(margins[:, columns], rows, axis=0)


# --- arguments --------------------------------------------------------------------------------------------------------


def _checked(unlearned: np.ndarray, oracles: np.ndarray, estimator: str) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, clipped."""
    unlearned, oracles = np.asarray(unlearned), np.asarray(oracles)
    if unlearned.ndim != 2 or oracles.ndim != 2 or unlearned.shape[1] != oracles.shape[1] or not unlearned.shape[1]:
        raise UserError(
            "unlearned and oracles must be (networks, samples) on the same samples, at least one, got shapes "
            f"{unlearned.shape} and {oracles.shape}"
        )
    _check_numbers(len(unlearned), len(oracles), estimator)
    for name, margins in (("unlearned", unlearned), ("oracles", oracles)):
        if np.isnan(margins).any():
            raise UserError(f"{name} has {int(np.isnan(margins).sum()):,} NaN: a network failed; leave its row out")
    u, o = (np.clip(margins.astype(np.float64), -LARGEST, LARGEST) for margins in (unlearned, oracles))
    return u, o


def _check_numbers(n_unlearned: int, n_oracles: int, estimator: str) -> None:
    fewest = FEWEST[estimator]
    if n_unlearned < fewest[0] or n_oracles < fewest[1]:
        raise UserError(
            f"estimator={estimator!r} needs at least {fewest[0]} networks that forgot and {fewest[1]} oracles, got "
            f"{n_unlearned} and {n_oracles}; 100 of each are usual"
        )
