"""Membership inference with shadow networks: LiRA, U-LiRA and RMIA, from what networks say about samples.

All of them read **margins**, log p_y − log(1 − p_y) of the true class, of networks whose training sets are known. The
shadows tell how a network speaks about *this* sample when it had it and when it had not, so that a hard sample and an
easy one are not judged by one threshold.

    LiRA     log N(s; μ_in, σ_in²) − log N(s; μ_out, σ_out²)      had the sample, or never had it
    U-LiRA   the same of networks that had it and forgot it, against networks retrained without it
    RMIA     Pr over z of [ (p(x)/p̄(x)) / (p(z)/p̄(z)) ≥ γ ]        against random other samples z

Every score is higher where the sample looks more like one that the network had (for U-LiRA: had and was made to
forget). A network is never its own shadow; the `_leave_one_out` forms see to it where the networks that are attacked
are those of the pool. `unsharp.evaluation.roc` turns scores into curves and intervals.

Numerical care: margins are computed from logits, where they are finite (`margins`); infinite ones, as they come from
probabilities rounded to 0 or 1, count as the largest finite one, and as at least that of the largest double below 1.
Standard deviations are floored at a hundredth of the pooled one: a sample on which few networks happen to agree would
otherwise get a likelihood without bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from unsharp.errors import UserError, unknown

Form = Literal["online", "offline"]
Variance = Literal["auto", "per_sample", "global"]
Tail = Literal["above", "below", "both"]

FEWEST: dict[str, int] = {"per_sample": 8, "global": 2}
"""Networks on each side of a sample, besides the one attacked. Eight values tell a deviation to about a quarter."""
ENOUGH = 32
"""From so many on each side on "auto" fits a deviation to each sample."""
FLOOR, LEAST = 1e-2, 1e-6
SATURATED = math.log(2.0**53 - 1)
"""The margin of the largest double below 1."""


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log p_y − log(1 − p_y) of the true class: its logit less the logsumexp of the others; finite for finite logits.

    Args:
        logits: (n, K) float, K ≥ 2.
        labels: (n,) int in [0, K).

    Returns:
        (n,) float64.

    Source: Carlini et al. 2022, the stable form of the scaled logit.
    """
    rows, others = np.arange(len(labels)), np.array(logits, dtype=np.float64)
    own = others[rows, labels]
    others[rows, labels] = -np.inf
    largest = others.max(axis=1, keepdims=True)
    return own - (largest[:, 0] + np.log(np.exp(others - largest).sum(axis=1)))


def networks_needed(n_samples: int, share: float, each: int, certainty: float = 0.95) -> int:
    """How many networks on random subsets give every sample enough networks that had it and enough that had not.

    Args:
        n_samples: Samples, at least 1.
        share: Share of the samples in each subset, in (0, 1).
        each: Networks on each side of each sample, at least 1; with leave-one-out one more than the attack asks for.
        certainty: Probability that no sample is left short, in (0, 1).

    Raises:
        UserError: if an argument is out of range.
    """
    from scipy.stats import binom

    if not (n_samples >= 1 and 0 < share < 1 and each >= 1 and 0 < certainty < 1):
        raise UserError(
            "n_samples and each must be at least 1, share and certainty in (0, 1); got "
            f"{n_samples}, {each}, {share}, {certainty}. With a share of 1 no network is without a sample"
        )

    def enough(m: int) -> bool:
        short = float(binom.cdf(each - 1, m, share) + binom.sf(m - each, m, share))
        return short < 1 and n_samples * math.log1p(-short) >= math.log(certainty)

    low, high = 2 * each - 1, 2 * each
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# --- LiRA -------------------------------------------------------------------------------------------------------------


def lira(
    margins: np.ndarray,
    inside: np.ndarray,
    target: np.ndarray,
    *,
    form: Form = "online",
    variance: Variance = "auto",
) -> np.ndarray:
    """The likelihood-ratio attack on networks that are none of the shadows.

    Args:
        margins: (m, n) of the shadow networks on the samples.
        inside: (m, n) bool, whether a shadow was trained on a sample.
        target: (t, n) or (n,) of the networks that are attacked.
        form: "online" compares shadows that had the sample with shadows that had not:
            log N(s; μ_in, σ_in²) − log N(s; μ_out, σ_out²). "offline" needs only those that had not:
            (s − μ_out)/σ_out, whose normal probability is the paper's 1 − Pr[Z > s].
        variance: "per_sample" fits a deviation to each sample, "global" one to all (the root of the mean squared
            distance from each sample's own mean), "auto" the former from 32 networks on each side on.

    Returns:
        (t, n) float64, higher for member; "online" has its own threshold, 0.

    Raises:
        UserError: if shapes differ, a margin is NaN, or a sample has too few shadows; it says how many are needed.

    Source: Carlini et al. 2022 (arXiv 2112.03570). The published code takes the median for μ, and for its fixed
    variance one deviation over all margins whatever their sample, the same for both sides.
    """
    inside = _checked_inside(margins, inside)
    known, at = _finite(1, margins=margins, target=target)
    _check_same("target", at, known)
    return _ratios(_Side.of(known, inside), _Side.of(known, ~inside), at, form, variance, "above")


def lira_leave_one_out(
    margins: np.ndarray, inside: np.ndarray, *, form: Form = "online", variance: Variance = "auto"
) -> np.ndarray:
    """The likelihood-ratio attack on every network of a pool, each with the others as its shadows.

    Args:
        margins: (m, n) of the networks.
        inside: (m, n) bool, whether a network was trained on a sample: the truth as well.
        form: As for `lira`.
        variance: As for `lira`.

    Returns:
        (m, n) float64, as `lira`.

    Raises:
        UserError: as `lira`.
    """
    inside = _checked_inside(margins, inside)
    [known] = _finite(1, margins=margins)
    here, there = _Side.of(known, inside), _Side.of(known, ~inside)
    return _left_out(here, there, known, inside, ~inside, form, variance, "above")


# --- U-LiRA -----------------------------------------------------------------------------------------------------------


def u_lira(
    unlearned: np.ndarray,
    retrained: np.ndarray,
    target: np.ndarray,
    *,
    had: np.ndarray | None = None,
    form: Form = "online",
    variance: Variance = "auto",
    tail: Tail = "both",
) -> np.ndarray:
    """The likelihood-ratio attack on unlearning: did this network have the sample and forget it, or never have it?

    Args:
        unlearned: (m1, n) margins of networks that had the samples and were then made to forget them.
        retrained: (m2, n) margins of networks that never had them.
        target: (t, n) or (n,) margins of the networks that are attacked, none of those above.
        had: (m1, n) bool, which of the samples each unlearned network really had; all by default.
        form: "online" compares both; "offline" needs retrained networks alone, and asks how far the target lies from
            them. `unlearned` then only has to have the right number of columns, and may have no row.
        variance: As for `lira`.
        tail: What "offline" holds for a trace: a margin "above" that of retrained networks (still known), "below" it
            (forgotten too well, which gives the sample away as surely), or "both".

    Returns:
        (t, n) float64, higher for had-and-forgot; "online" has its own threshold, 0, and `membership_probability` turns
        it into the paper's p.

    Raises:
        UserError: as `lira`.

    Source: Hayes et al. 2024 (arXiv 2403.01218); Kurmanji et al. 2023 (arXiv 2302.09880). The offline form is that of
    LiRA, made two-sided here.
    """
    unlearned, retrained, had = _checked_worlds(unlearned, retrained, had)
    forgot, never, at = _finite(1, unlearned=unlearned, retrained=retrained, target=target)
    _check_same("target", at, never)
    here, there = _Side.of(forgot, had), _Side.of(never, np.ones(never.shape, bool))
    return _ratios(here, there, at, form, variance, tail)


def u_lira_leave_one_out(
    unlearned: np.ndarray,
    retrained: np.ndarray,
    *,
    had: np.ndarray | None = None,
    form: Form = "online",
    variance: Variance = "auto",
    tail: Tail = "both",
) -> tuple[np.ndarray, np.ndarray]:
    """The attack on every unlearned and every retrained network, each with all others as its shadows.

    Args:
        unlearned: As for `u_lira`.
        retrained: As for `u_lira`.
        had: As for `u_lira`.
        form: As for `u_lira`.
        variance: As for `lira`.
        tail: As for `u_lira`.

    Returns:
        (m1, n) scores of the unlearned networks, NaN where `had` is False, and (m2, n) of the retrained ones: the
        members and the others of a ROC curve.

    Raises:
        UserError: as `lira`.
    """
    unlearned, retrained, had = _checked_worlds(unlearned, retrained, had)
    forgot, never = _finite(2, unlearned=unlearned, retrained=retrained)
    here, there = _Side.of(forgot, had), _Side.of(never, np.ones(never.shape, bool))
    nobody = np.zeros(forgot.shape, bool)
    of_unlearned = _left_out(here, there, forgot, had, nobody, form, variance, tail)
    nobody, all_of_them = np.zeros(never.shape, bool), np.ones(never.shape, bool)
    of_retrained = _left_out(here, there, never, nobody, all_of_them, form, variance, tail)
    return np.where(had, of_unlearned, np.nan), of_retrained


def membership_probability(log_ratio: np.ndarray) -> np.ndarray:
    """N_in / (N_in + N_out) from a log-likelihood ratio, in [0, 1]: the probability of member at even odds."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(log_ratio, np.float64)))


# --- RMIA -------------------------------------------------------------------------------------------------------------


def rmia(
    margins: np.ndarray,
    inside: np.ndarray,
    target: np.ndarray,
    population: np.ndarray,
    target_population: np.ndarray,
    *,
    form: Form = "offline",
    gamma: float = 2.0,
    linear: float = 0.3,
    population_inside: np.ndarray | None = None,
) -> np.ndarray:
    """The robust membership attack on networks that are none of the references: against random other samples.

    Args:
        margins: (m, n) of the reference networks on the samples.
        inside: (m, n) bool, whether a reference was trained on a sample.
        target: (t, n) or (n,) of the networks that are attacked.
        population: (m, k) of the references on k random samples z that no target was trained on.
        target_population: (t, k) or (k,) of the targets on these.
        form: "online" takes p̄(x) = ½ (p̄_in + p̄_out), the mean over references that had x and that had not; "offline"
            needs the latter alone, and takes p̄(x) = ½ ((1 + a) p̄_out + (1 − a)).
        gamma: γ > 0, how much the ratio of x must exceed that of z. The paper's experiments have 2, the published
            code 1; the area under the curve hardly depends on it.
        linear: a in [0, 1] of the line p_in = a p_out + (1 − a); `linear_slope` estimates it where there are
            references of both kinds.
        population_inside: (m, k) bool, which z a reference was trained on; none by default. Where "online" has no
            reference that had z, the line stands in.

    Returns:
        (t, n) float64 in [0, 1], multiples of 1/k: the share of z with (p(x)/p̄(x)) / (p(z)/p̄(z)) ≥ γ; higher for
        member. It has no threshold of its own.

    Raises:
        UserError: if shapes differ, a margin is NaN, an argument is out of range, or a sample has no reference of a
            kind that is needed.

    Source: Zarifzadeh et al. 2024 (arXiv 2312.03262). How the paper treats z in the online form is not settled here: z
    without references that had it is a decision of ours, the published code takes the line for z as well.
    """
    inside, population_inside = _checked_references(margins, inside, population, population_inside)
    _check_rmia(form, gamma, linear)
    known, z, of_x, of_z = _finite(
        2, margins=margins, population=population, target=target, target_population=target_population
    )
    _check_same("target", of_x, known)
    _check_same("target_population", of_z, z)
    if len(of_x) != len(of_z):
        raise UserError(f"target and target_population must be of the same networks, got {len(of_x)} and {len(of_z)}")
    log_p, log_p_z = _log_probability(known), _log_probability(z)
    expected = _expected(_log_means(log_p, inside), _log_means(log_p, ~inside), form, linear, True)
    expected_z = _expected(
        _log_means(log_p_z, population_inside), _log_means(log_p_z, ~population_inside), form, linear, False
    )
    ratio_x, ratio_z = _log_probability(of_x) - expected, _log_probability(of_z) - expected_z
    return np.stack([_share_beaten(x, z, gamma) for x, z in zip(ratio_x, ratio_z)])


def rmia_leave_one_out(
    margins: np.ndarray,
    inside: np.ndarray,
    population: np.ndarray,
    *,
    form: Form = "offline",
    gamma: float = 2.0,
    linear: float = 0.3,
) -> np.ndarray:
    """The robust membership attack on every network of a pool, each with the others as its references.

    Args:
        margins: (m, n) of the networks.
        inside: (m, n) bool, whether a network was trained on a sample: the truth as well.
        population: (m, k) of the networks on samples that none of them was trained on.
        form: As for `rmia`.
        gamma: As for `rmia`.
        linear: As for `rmia`.

    Returns:
        (m, n) float64, as `rmia`.

    Raises:
        UserError: as `rmia`.
    """
    inside, never = _checked_references(margins, inside, population, None)
    _check_rmia(form, gamma, linear)
    known, z = _finite(2, margins=margins, population=population)
    log_p, log_p_z = _log_probability(known), _log_probability(z)
    outs = _log_means_without(log_p, ~inside)
    ins = _log_means_without(log_p, inside) if form == "online" else np.full_like(outs, np.nan)
    of_z = _log_means_without(log_p_z, ~never)
    scores = np.empty(known.shape)
    for j in range(len(known)):
        expected = _expected(ins[j], outs[j], form, linear, True)
        expected_z = _expected(np.full(z.shape[1], np.nan), of_z[j], form, linear, False)
        scores[j] = _share_beaten(log_p[j] - expected, log_p_z[j] - expected_z, gamma)
    return scores


def linear_slope(margins: np.ndarray, inside: np.ndarray) -> float:
    """The a in [0, 1] with which 1 − p_in = a (1 − p_out) fits best over samples, by least squares.

    Args:
        margins: (m, n) of reference networks.
        inside: (m, n) bool, whether a reference was trained on a sample; samples without both kinds are left out.

    Raises:
        UserError: if no sample has references of both kinds.
    """
    inside = _checked_inside(margins, inside)
    [known] = _finite(1, margins=margins)
    both = inside.any(0) & (~inside).any(0)
    if not both.any():
        raise UserError("no sample has both a reference that had it and one that had not; train more on subsets")
    wrong = np.exp(_log_probability(-known[:, both]))  # 1 − p
    use = inside[:, both]
    ins = (wrong * use).sum(0) / use.sum(0)
    outs = (wrong * ~use).sum(0) / (~use).sum(0)
    return float(np.clip((ins * outs).sum() / (outs**2).sum(), 0, 1)) if outs.any() else 1.0


# --- normal fits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Side:
    """Count, mean and summed squared distance from the mean, over the networks of one side, for each sample."""

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, use: np.ndarray) -> _Side:
        """From values (m, n), of which those at `use` count. Row by row: the matrices are large."""
        count = use.sum(0, dtype=np.int64)
        mean, squares = np.zeros(values.shape[1]), np.zeros(values.shape[1])
        for row, used in zip(values, use):
            mean += np.where(used, row, 0.0)
        mean /= np.maximum(count, 1)
        for row, used in zip(values, use):
            squares += np.where(used, row - mean, 0.0) ** 2
        return cls(count, mean, squares)

    def without(self, row: np.ndarray, used: np.ndarray) -> _Side:
        """The same without the values of one network, at the samples where it was `used`."""
        count = self.count - used
        away = np.where(used, row - self.mean, 0.0)
        mean = self.mean - away / np.maximum(count, 1)
        squares = self.squares - away**2 * self.count / np.maximum(count, 1)
        return _Side(count, mean, np.maximum(squares, 0.0))

    def log_density(self, at: np.ndarray, variance: Variance) -> np.ndarray:
        """log N(at; μ, σ²)."""
        deviation = self.deviation(variance)
        return -0.5 * ((at - self.mean) / deviation) ** 2 - np.log(deviation) - 0.5 * math.log(2 * math.pi)

    def deviation(self, variance: Variance) -> np.ndarray:
        """(n,) float64 above 0: of each sample, or of all."""
        freedom = np.maximum(self.count - 1, 0)
        pooled = math.sqrt(self.squares.sum() / max(1, freedom.sum()))
        if variance == "global":
            return np.full(len(self.mean), max(pooled, LEAST))
        return np.maximum(np.sqrt(self.squares / np.maximum(freedom, 1)), max(FLOOR * pooled, LEAST))


def _ratios(here: _Side, there: _Side, at: np.ndarray, form: Form, variance: Variance, tail: Tail) -> np.ndarray:
    """Scores (t, n) of targets that are none of the shadows."""
    chosen = _chosen([here, there], form, variance, 0)
    _check_tail(tail)
    return np.stack([_score(here, there, row, form, chosen, tail) for row in at])


def _left_out(
    here: _Side,
    there: _Side,
    values: np.ndarray,
    in_here: np.ndarray,
    in_there: np.ndarray,
    form: Form,
    variance: Variance,
    tail: Tail,
) -> np.ndarray:
    """Scores (m, n) of networks that are among the shadows of the sides, each taken out of them for its own score."""
    chosen = _chosen([here, there], form, variance, 1)
    _check_tail(tail)
    rows = zip(values, in_here, in_there)
    return np.stack(
        [_score(here.without(row, a), there.without(row, b), row, form, chosen, tail) for row, a, b in rows]
    )


def _score(here: _Side, there: _Side, at: np.ndarray, form: Form, variance: Variance, tail: Tail) -> np.ndarray:
    if form == "online":
        return here.log_density(at, variance) - there.log_density(at, variance)
    away = (at - there.mean) / there.deviation(variance)
    return {"above": away, "below": -away, "both": np.abs(away)}[tail]


def _chosen(sides: list[_Side], form: Form, variance: Variance, taken: int) -> Variance:
    """The variance that is fitted. Raises: UserError if a sample has too few networks besides `taken` of its own."""
    for name, value, known in (("form", form, Form), ("variance", variance, Variance)):
        if value not in get_args(known):
            raise unknown(name, value, get_args(known))
    needed_sides = sides if form == "online" else sides[1:]
    fewest = min(int(side.count.min()) for side in needed_sides) - taken
    if variance == "auto":
        variance = "per_sample" if fewest >= ENOUGH else "global"
    if fewest >= FEWEST[variance]:
        return variance
    have = np.min([side.count for side in needed_sides], axis=0) - taken
    short = np.flatnonzero(have < FEWEST[variance])
    worst = int(have.argmin())
    both = "that had it and as many that had not" if form == "online" else "that had not"
    others = " besides the one attacked" if taken else ""
    ways = [
        *(["take form='offline', which needs only networks that had not"] if form == "online" else []),
        *([f"take variance='global', which needs {FEWEST['global']}"] if variance == "per_sample" else []),
    ]
    raise UserError(
        f"{len(short):,} of {len(have):,} samples have too few shadows (sample {worst}: {max(0, int(have[worst]))}"
        f"{others}); form={form!r} with variance={variance!r} needs at least {FEWEST[variance]} {both}: train more "
        f"networks on random subsets (networks_needed tells how many){''.join(f', or {way}' for way in ways)}"
    )


# --- probabilities ----------------------------------------------------------------------------------------------------


def _log_probability(margin: np.ndarray) -> np.ndarray:
    """log p of a margin log p − log(1 − p), without overflow."""
    return -np.logaddexp(0.0, -margin)


def _log_means(log_p: np.ndarray, use: np.ndarray) -> np.ndarray:
    """(n,) log of the mean of p over the networks in use; NaN where there is none."""
    if not len(log_p):
        return np.full(log_p.shape[1], np.nan)
    return _over_count(np.logaddexp.reduce(np.where(use, log_p, -np.inf), axis=0), use.sum(0))


def _log_means_without(log_p: np.ndarray, use: np.ndarray) -> np.ndarray:
    """(m, n): the same for each network, without itself. From sums before and after it: no term is taken away again."""
    terms = np.where(use, log_p, -np.inf)
    nothing = np.full((1, terms.shape[1]), -np.inf)
    before = np.logaddexp.accumulate(np.concatenate([nothing, terms[:-1]]), axis=0)
    after = np.logaddexp.accumulate(np.concatenate([nothing, terms[:0:-1]]), axis=0)[::-1]
    return _over_count(np.logaddexp(before, after), use.sum(0) - use)


def _over_count(log_sum: np.ndarray, count: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, log_sum - np.log(count), np.nan)


def _expected(ins: np.ndarray, outs: np.ndarray, form: Form, linear: float, strict: bool) -> np.ndarray:
    """log p̄ (n,) from the log means over references that had the sample and that had not.

    Where "online" has none that had it, the line stands in, unless `strict`.
    """
    missing = np.isnan(outs) | (np.isnan(ins) if form == "online" and strict else False)
    if missing.any():
        kinds = "that had it and one that had not" if form == "online" else "that had not"
        raise UserError(
            f"{int(missing.sum()):,} of {len(missing):,} samples lack a reference network {kinds}, besides the one "
            f"attacked; form={form!r} needs at least one: train more networks on random subsets"
            + ("" if form == "offline" else ", or take form='offline'")
        )
    with np.errstate(divide="ignore"):
        line = np.logaddexp(math.log((1 + linear) / 2) + outs, np.log((1 - linear) / 2))
    if form == "offline":
        return line
    return np.where(np.isnan(ins), line, np.logaddexp(np.where(np.isnan(ins), 0.0, ins), outs) - math.log(2))


def _share_beaten(ratio_x: np.ndarray, ratio_z: np.ndarray, gamma: float) -> np.ndarray:
    """For each x the share of z whose log ratio it exceeds by log γ, or equals then."""
    return np.searchsorted(np.sort(ratio_z), ratio_x - math.log(gamma), side="right") / len(ratio_z)


# --- arguments --------------------------------------------------------------------------------------------------------


def _finite(n_targets: int, **arrays: np.ndarray) -> list[np.ndarray]:
    """Matrices in float64, infinities replaced alike in all; the last `n_targets` may be single rows."""
    named = {name: np.asarray(array) for name, array in arrays.items()}
    for name in list(named)[len(named) - n_targets :]:
        named[name] = np.atleast_2d(named[name])
        if not len(named[name]):
            raise UserError(f"{name} has no row; there is no network to attack")
    for name, array in named.items():
        if array.ndim != 2 or array.dtype.kind not in "fiu":
            raise UserError(f"{name} must be numbers of shape (networks, samples), got {array.dtype} {array.shape}")
        if np.isnan(array).any():
            raise UserError(
                f"{name} has {int(np.isnan(array).sum()):,} NaN: a network failed, or is asked about what it cannot "
                "answer; leave its row out"
            )
    largest = max(SATURATED, *(float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) for a in named.values()))
    return [np.nan_to_num(a.astype(np.float64), copy=False, posinf=largest, neginf=-largest) for a in named.values()]


def _check_same(name: str, target: np.ndarray, shadows: np.ndarray) -> None:
    if target.shape[1] != shadows.shape[1]:
        raise UserError(
            f"{name} must be of the same {shadows.shape[1]} samples as those of the shadows, got {target.shape[1]}"
        )


def _checked_inside(margins: np.ndarray, inside: np.ndarray) -> np.ndarray:
    inside = np.asarray(inside)
    if inside.dtype != np.bool_ or np.ndim(margins) != 2 or inside.shape != np.shape(margins):
        raise UserError(
            f"inside must be bool of the shape of margins (networks, samples), got {inside.dtype} {inside.shape} for "
            f"{np.shape(margins)}; read both from one pool"
        )
    return inside


def _checked_worlds(
    unlearned: np.ndarray, retrained: np.ndarray, had: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    unlearned, retrained = np.asarray(unlearned), np.asarray(retrained)
    if unlearned.ndim != 2 or retrained.ndim != 2 or unlearned.shape[1] != retrained.shape[1]:
        raise UserError(
            "unlearned and retrained must be (networks, samples) on the same samples, got "
            f"{unlearned.shape} and {retrained.shape}"
        )
    had = np.ones(unlearned.shape, bool) if had is None else np.asarray(had)
    if had.dtype != np.bool_ or had.shape != unlearned.shape:
        raise UserError(f"had must be bool of the shape of unlearned {unlearned.shape}, got {had.dtype} {had.shape}")
    return unlearned, retrained, had


def _checked_references(
    margins: np.ndarray, inside: np.ndarray, population: np.ndarray, population_inside: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    inside = _checked_inside(margins, inside)
    population = np.asarray(population)
    if population.ndim != 2 or len(population) != len(inside) or not population.shape[1]:
        raise UserError(
            f"population must be (networks, k ≥ 1) of the same {len(inside)} references, got {population.shape}"
        )
    if population_inside is None:
        return inside, np.zeros(population.shape, bool)
    return inside, _checked_inside(population, population_inside)


def _check_rmia(form: Form, gamma: float, linear: float) -> None:
    if form not in get_args(Form):
        raise unknown("form", form, get_args(Form))
    if not (gamma > 0 and math.isfinite(gamma)):
        raise UserError(f"gamma must be a finite number above 0, got {gamma}; 1 or 2 are usual")
    if not 0 <= linear <= 1:
        raise UserError(f"linear must lie in [0, 1], got {linear}; 0.3 is usual, linear_slope estimates it")


def _check_tail(tail: Tail) -> None:
    if tail not in get_args(Tail):
        raise unknown("tail", tail, get_args(Tail))
