"""Entanglement against written-out loops, linear programmes, closed forms and scikit-learn by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import norm, ortho_group, wasserstein_distance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, silhouette_samples
from sklearn.model_selection import StratifiedKFold

from unsharp.errors import UserError
from unsharp.evaluation import METRICS, Evidence, Outputs, Predictions, gap, measure, reasons
from unsharp.evaluation.entanglement import (
    Sampling,
    Transport,
    distances,
    needed_rows,
    probe,
    probed,
    shared_classes,
    silhouette,
    silhouettes,
    transport_cost,
    variance_entanglement,
    variance_entanglement_by_class,
    wasserstein,
)
from unsharp.evaluation.entanglement_metrics import GROUP
from unsharp.evaluation.features import FeatureSet, streamed

several = settings(max_examples=25, deadline=None)
WHOLE = Sampling(limit=10_000, draws=2)


def points(n: int, dim: int = 3, seed: int = 0, at: float = 0.0) -> np.ndarray:
    return np.random.default_rng([seed, n, dim]).normal(at, 1, (n, dim))


def features(x: np.ndarray, labels: object = None, *, normalise: bool = False) -> FeatureSet:
    return FeatureSet.of(x, np.zeros(len(x), dtype=int) if labels is None else np.asarray(labels), normalise=normalise)


def transport(x: np.ndarray, y: np.ndarray, p: int = 1, sampling: Sampling = WHOLE, **how) -> Transport:
    found = wasserstein(features(x), features(y), p, sampling, **how)
    assert found is not None
    return found


# --- variance ---------------------------------------------------------------------------------------------------------


def by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """The paper's ratio, written out."""

    def mean(rows: list[list[float]]) -> list[float]:
        return [math.fsum(column) / len(rows) for column in zip(*rows)]

    def squared(a: list[float], b: list[float]) -> float:
        return math.fsum((s - t) ** 2 for s, t in zip(a, b))

    retain, forget = x.tolist(), y.tolist()
    mu_r, mu_f, mu = mean(retain), mean(forget), mean(retain + forget)
    traces = [math.fsum(squared(row, m) for row in rows) / len(rows) for rows, m in ((retain, mu_r), (forget, mu_f))]
    return sum(traces) / (0.5 * (squared(mu_r, mu) + squared(mu_f, mu)))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
@several
def test_variance_ratio_equals_loops(n: int, m: int, dim: int, seed: int, normalise: bool) -> None:
    x, y = points(n, dim, seed), points(m, dim, seed + 1, at=0.5)
    found = variance_entanglement(features(x, normalise=normalise), features(y, normalise=normalise))
    if normalise:
        x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    if ((x.mean(0) - y.mean(0)) ** 2).sum() < 1e-12:
        return  # on a line two unit vectors may coincide
    assert found.ratio == pytest.approx(by_loops(x, y), rel=1e-9, abs=1e-12)
    assert found.bounded == pytest.approx(found.ratio / (1 + found.ratio), rel=1e-12)
    assert 0 <= found.bounded <= 1


def test_variance_ratio_of_gaussians_has_its_closed_form() -> None:
    x, y = points(100_000, 3), points(50_000, 3, seed=1) * 2 + 3
    third, two = 1 / 3, 2 / 3
    distance = 3 * 3.0**2
    expected = (3 * 1 + 3 * 4) / (0.5 * (third**2 + two**2) * distance)
    assert variance_entanglement(features(x), features(y)).ratio == pytest.approx(expected, rel=0.01)


@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 10**6))
@several
def test_the_value_if_alike_is_that_of_the_mean_over_all_splits(n: int, m: int, seed: int) -> None:
    from itertools import combinations

    both = points(n + m, 2, seed)
    within, between = [], []
    for chosen in combinations(range(n + m), n):
        rest = sorted(set(range(n + m)) - set(chosen))
        found = variance_entanglement(features(both[list(chosen)]), features(both[rest]))
        within.append(found.within)
        between.append(found.between)
    assert np.mean(within) / np.mean(between) == pytest.approx(found.ratio_if_alike, rel=1e-9)


def test_equal_means_are_entangled_whole() -> None:
    x = np.array([[1.0, 0], [-1, 0]])
    found = variance_entanglement(features(x), features(x))
    assert (found.ratio, found.bounded) == (math.inf, 1.0)
    apart = variance_entanglement(features(np.zeros((3, 2))), features(np.ones((2, 2))))
    assert (apart.ratio, apart.bounded) == (0.0, 0.0)
    dead = variance_entanglement(features(np.zeros((3, 2))), features(np.zeros((2, 2))))
    assert dead.bounded == 1.0


def test_by_class_is_the_mean_weighted_by_size() -> None:
    x, y = points(30, 3), points(20, 3, seed=1, at=1)
    ours, theirs = [0] * 10 + [1] * 15 + [2] * 5, [0] * 3 + [1] * 9 + [3] * 8
    retain, forget = features(x, ours), features(y, theirs)
    assert shared_classes(retain, forget) == [(0, 13 / 37), (1, 24 / 37)]
    found = variance_entanglement_by_class(retain, forget)
    assert found is not None
    parts = [by_loops(x[:10], y[:3]), by_loops(x[10:25], y[3:12])]
    assert found.ratio == pytest.approx((13 * parts[0] + 24 * parts[1]) / 37, rel=1e-10)
    assert found.bounded == pytest.approx((13 * parts[0] / (1 + parts[0]) + 24 * parts[1] / (1 + parts[1])) / 37)
    moved = wasserstein(retain, forget, 1, WHOLE, by_class=True)
    assert moved is not None
    each = [transport(x[:10], y[:3]), transport(x[10:25], y[3:12])]
    for name in ("distance", "entanglement"):
        a, b = (getattr(part, name).value for part in each)
        assert getattr(moved, name).value == pytest.approx((13 * a + 24 * b) / 37, rel=1e-9)
    alone = features(y, [7] * 20)
    assert variance_entanglement_by_class(retain, alone) is None
    assert wasserstein(retain, alone, by_class=True) is None
    assert silhouette(retain, alone, by_class=True) is None
    assert probe(retain, alone, match_classes=True) is None


# --- transport --------------------------------------------------------------------------------------------------------


def programme(cost: np.ndarray) -> float:
    """The least cost as a linear programme."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    found = linprog(
        cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.r_[np.full(n, 1 / n), np.full(m, 1 / m)], method="highs"
    )
    assert found.success
    return found.fun


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(0, 10**6))
@several
def test_transport_equals_a_linear_programme(n: int, m: int, dim: int, p: int, seed: int) -> None:
    x, y = points(n, dim, seed), points(m, dim, seed + 1, at=0.3)
    cost = np.array([[np.linalg.norm(a - b) ** p for b in y] for a in x])
    assert transport_cost(cost) == pytest.approx(programme(cost), rel=1e-7, abs=1e-9)
    found = transport(x, y, p)
    assert found.distance.value == pytest.approx(programme(cost) ** (1 / p), rel=1e-6, abs=1e-8)
    assert found.entanglement.value == pytest.approx(1 - programme(cost) / cost.max(), rel=1e-6, abs=1e-8)
    assert found.distance.half_width == found.entanglement.half_width == 0


@given(st.integers(1, 12), st.integers(1, 12), st.floats(-1e6, 1e6), st.integers(0, 10**6))
@several
def test_distances_equal_differences_even_far_from_the_origin(n: int, m: int, at: float, seed: int) -> None:
    x, y = points(n, 4, seed, at), points(m, 4, seed + 1, at)
    expected = np.linalg.norm(x[:, None] - y[None, :], axis=2)
    assert distances(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-7)


def test_transport_on_a_line_equals_scipy_and_the_closed_form_of_gaussians() -> None:
    x, y = points(60, 1), points(45, 1, seed=1, at=2) * 1.5
    assert transport(x, y).distance.value == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-9)
    quantiles = norm.ppf((np.arange(400) + 0.5) / 400)[:, None]
    found = transport(quantiles, 3 + 2 * quantiles, 2)
    # W₂² of two Gaussians on a line: (m₁ − m₂)² + (s₁ − s₂)²
    assert found.distance.value == pytest.approx(math.sqrt(3**2 + (2 - 1) ** 2), rel=0.01)
    assert transport(x, x + 0.25).distance.value == pytest.approx(0.25, rel=1e-9)  # a shift costs its length


def test_transport_between_sets_that_are_equal_or_points() -> None:
    x = points(20, 4)
    found = transport(x, x[::-1])
    assert found.distance.value == pytest.approx(0, abs=1e-7)
    assert found.entanglement.value == pytest.approx(1, abs=1e-7)
    assert found.distance_if_alike.value > 0.1
    apart = transport(np.zeros((3, 2)), np.ones((4, 2)))
    assert apart.entanglement.value == pytest.approx(0, abs=1e-12)
    dead = transport(np.zeros((3, 2)), np.zeros((4, 2)))
    assert (dead.entanglement.value, dead.distance.value) == (1, 0)


@pytest.mark.parametrize("p", [1, 2])
def test_the_value_if_alike_is_met_by_one_population(p: int) -> None:
    both = points(240, 8)
    found = transport(both[:200], both[200:], p, Sampling(limit=500, draws=6))
    assert found.distance_if_alike.half_width is not None
    assert found.distance.value == pytest.approx(found.distance_if_alike.value, rel=0.06)
    apart = transport(both[:200], both[200:] + 1.5, p, Sampling(limit=500, draws=6))
    assert apart.distance.value > apart.distance_if_alike.value + 1


def test_other_solvers_are_options() -> None:
    x, y = points(30, 1), points(30, 1, seed=1, at=1)
    exact, sliced = (transport(x, y, solver=s).distance.value for s in ("exact", "sliced"))
    assert sliced == pytest.approx(exact, rel=1e-9)  # there is but one direction on a line
    x, y = points(30, 3), points(25, 3, seed=1, at=1)
    exact, entropic = (transport(x, y, solver=s).distance.value for s in ("exact", "sinkhorn"))
    assert exact < entropic < 1.1 * exact
    assert transport(x, y, solver="sliced").distance.value < exact
    with pytest.raises(UserError, match="did you mean 'sinkhorn'"):
        transport(x, y, solver="sinkhorm")
    with pytest.raises(UserError, match="p must be at least 1, got 0"):
        transport(x, y, 0)


def test_a_transport_that_does_not_end_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import ot

    monkeypatch.setattr(ot, "emd", lambda *_, **__: (None, {"warning": "numItermax reached", "cost": 1.0}))
    with pytest.raises(UserError, match="numItermax reached"):
        transport_cost(np.ones((2, 2)))


# --- invariances ------------------------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[FeatureSet, FeatureSet], float]] = {
    "variance": lambda r, f: variance_entanglement(r, f).ratio,
    "wasserstein_1": lambda r, f: wasserstein(r, f, 1, WHOLE).entanglement.value,  # type: ignore[union-attr]
    "wasserstein_2": lambda r, f: wasserstein(r, f, 2, WHOLE).distance.value,  # type: ignore[union-attr]
    "silhouette": lambda r, f: silhouette(r, f, WHOLE).value,  # type: ignore[union-attr]
}


@pytest.mark.parametrize("figure", FIGURES)
def test_rotations_change_nothing_and_lengths_nothing_under_normalisation(figure: str) -> None:
    x, y, compute = points(14, 5), points(14, 5, seed=1, at=0.7), FIGURES[figure]
    turn = ortho_group.rvs(5, random_state=0)
    draw = np.random.default_rng(2)
    for normalise in (True, False):
        before = compute(features(x, normalise=normalise), features(y, normalise=normalise))
        turned = compute(features(x @ turn, normalise=normalise), features(y @ turn, normalise=normalise))
        assert turned == pytest.approx(before, rel=1e-8)
    # Each vector by a factor of its own: nothing changes where directions count, much where they do not.
    long, wide = x * draw.uniform(0.1, 9, (14, 1)), y * draw.uniform(0.1, 9, (14, 1))
    directions = compute(features(x, normalise=True), features(y, normalise=True))
    assert compute(features(long, normalise=True), features(wide, normalise=True)) == pytest.approx(
        directions, rel=1e-8
    )
    assert compute(features(long), features(wide)) != pytest.approx(compute(features(x), features(y)), rel=1e-3)


def test_sets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="one length, got 3 and 2"):
        variance_entanglement(features(points(4)), features(points(4, 2)))
    with pytest.raises(UserError, match="normalised alike"):
        wasserstein(features(points(4)), features(points(4), normalise=True))


# --- sub-samples ------------------------------------------------------------------------------------------------------


def test_sub_samples_are_of_the_right_sizes_and_depend_on_nothing_else() -> None:
    ours, theirs = np.arange(100) % 4, np.arange(30) % 5
    how = Sampling(limit=20, draws=3, seed=5)
    retain, forget = how.pair(np.arange(100), np.arange(30), 0)
    assert len(set(retain)) == len(set(forget)) == 20
    again = how.pair(np.arange(100), np.arange(30), 0)
    assert np.array_equal(retain, again[0])
    assert np.array_equal(forget, again[1])
    others = [
        how.pair(np.arange(100), np.arange(30), 1),
        Sampling(limit=20, seed=6).pair(np.arange(100), np.arange(30), 0),
    ]
    assert all(set(retain) != set(other[0]) for other in others)
    first, second = how.even(np.arange(100), np.arange(12), 0)
    assert (len(first), sorted(second)) == (12, list(range(12)))
    first, second = Sampling(limit=1000).matched(ours, theirs, 0)
    assert np.array_equal(ours[first], theirs[second])
    assert len(first) == 24 == len(set(first)) == len(set(second))
    assert [len(rows) for rows in how.matched(ours, theirs, 0)] == [20, 20]
    for name in ("limit", "draws"):
        with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
            Sampling(**{name: 0})
    with pytest.raises(UserError, match="seed must be"):
        Sampling(seed=-1)


def test_streamed_sets_with_the_needed_rows_give_the_same_figures() -> None:
    x, y = points(300, 4).astype(np.float32), points(80, 4, seed=1, at=0.4).astype(np.float32)
    ours, theirs = np.arange(300) % 3, np.arange(80) % 3
    how = Sampling(limit=15, draws=2, seed=3)
    keep = needed_rows(ours, theirs, how)
    assert len(keep[0]) < 200

    def read(keep: tuple[np.ndarray, np.ndarray]) -> list[FeatureSet]:
        return [
            streamed(((a[i : i + 31], c[i : i + 31]) for i in range(0, len(a), 31)), 3, keep=rows)
            for a, c, rows in ((x, ours, keep[0]), (y, theirs, keep[1]))
        ]

    parts = read(keep)
    whole = features(x, ours, normalise=True), features(y, theirs, normalise=True)
    for compute in (
        variance_entanglement,
        variance_entanglement_by_class,
        lambda r, f: wasserstein(r, f, 1, how),
        lambda r, f: wasserstein(r, f, 2, how, by_class=True),
        lambda r, f: silhouette(r, f, how),
        lambda r, f: silhouette(r, f, how, by_class=True),
        lambda r, f: probe(r, f, how),
        lambda r, f: probe(r, f, how, match_classes=True),
    ):
        assert np.asarray(compute(*parts), dtype=float) == pytest.approx(
            np.asarray(compute(*whole), dtype=float), rel=1e-9, abs=1e-12
        )
    fewer = needed_rows(ours, theirs, how, by_class=False)
    assert len(fewer[0]) < len(keep[0])
    parts = read(fewer)
    assert probe(*parts, how, match_classes=True) == probe(*whole, how, match_classes=True)
    assert wasserstein(*parts, 1, how) == wasserstein(*whole, 1, how)
    with pytest.raises(UserError, match="not kept"):
        wasserstein(*parts, 1, how, by_class=True)


def test_the_interval_over_sub_samples_covers_the_full_value_where_few_dimensions_leave_no_bias() -> None:
    covered = widths = 0
    for seed in range(20):
        x, y = points(150, 2, seed), points(120, 2, seed + 100, at=4)
        full = transport(x, y).distance.value
        part = transport(x, y, sampling=Sampling(limit=40, draws=5, seed=seed)).distance
        assert part.half_width is not None
        covered += abs(part.value - full) <= part.half_width
        widths += part.half_width
    assert covered >= 16  # 95 % of 20 is 19
    assert 0.01 < widths / 20 < 0.6


def test_sub_samples_lie_farther_apart_than_the_whole() -> None:
    x, y = points(200, 12), points(200, 12, seed=1)
    full = transport(x, y).distance.value
    part = transport(x, y, sampling=Sampling(limit=30)).distance
    assert part.half_width is not None
    assert part.value - part.half_width > full  # the interval does not cover the bias, and the page says so


def test_a_single_draw_has_no_interval() -> None:
    found = transport(points(20), points(20), sampling=Sampling(limit=5, draws=1))
    assert found.distance.half_width is None
    assert found.distance.draws == 1


# --- silhouettes and probes -------------------------------------------------------------------------------------------


def test_silhouettes_equal_their_formula() -> None:
    x, y = points(6, 3), points(9, 3, seed=1, at=1.5)
    values = []
    for own, other in ((x, y), (y, x)):
        for i, point in enumerate(own):
            a = np.mean([np.linalg.norm(point - q) for j, q in enumerate(own) if j != i])
            b = np.mean([np.linalg.norm(point - q) for q in other])
            values.append((b - a) / max(a, b))
    assert silhouettes(x, y) == pytest.approx(np.mean(values), rel=1e-9)
    assert silhouettes(x, y) == pytest.approx(silhouette_samples(np.vstack([x, y]), [0] * 6 + [1] * 9).mean(), rel=1e-9)


def test_silhouette_uses_equally_many_of_both() -> None:
    x, y = points(9, 3), points(9, 3, seed=1, at=1.5)
    exact = silhouette(features(x), features(y))
    assert exact is not None
    assert exact.half_width == 0
    assert exact.value == pytest.approx(silhouettes(x, y), rel=1e-12)
    uneven = silhouette(features(np.vstack([x, points(40, 3, seed=2)])), features(y), Sampling(draws=4))
    assert uneven is not None
    assert uneven.draws == 4
    assert uneven.half_width
    labels = [0] * 4 + [1] * 4 + [2]
    by_class = silhouette(features(x, labels), features(y, labels), by_class=True)
    assert by_class is not None
    expected = (silhouettes(x[:4], y[:4]) + silhouettes(x[4:8], y[4:8])) / 2
    assert by_class.value == pytest.approx(expected, rel=1e-9)  # the class of one sample is left out
    assert silhouette(features(x), features(y[:1])) is None


def test_probe_equals_a_loop_over_folds() -> None:
    x, y = points(25, 4), points(25, 4, seed=1, at=0.8)
    both, labels = np.vstack([x, y]), np.repeat([0, 1], 25)
    accuracies, areas = [], []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=3).split(both, labels):
        mean, std = both[train].mean(axis=0), both[train].std(axis=0)
        fitted = LogisticRegression(max_iter=10_000).fit((both[train] - mean) / std, labels[train])
        scores = fitted.decision_function((both[test] - mean) / std)
        accuracies.append(balanced_accuracy_score(labels[test], scores > 0))
        areas.append(roc_auc_score(labels[test], scores))
    assert probed(x, y, 3) == pytest.approx((100 * np.mean(accuracies), 100 * np.mean(areas)), rel=1e-9)


def test_a_probe_is_fooled_by_classes_unless_they_are_matched() -> None:
    ours, theirs = np.repeat([0, 1], [180, 20]), np.repeat([0, 1], [20, 80])
    centres = np.array([[0.0, 0, 0], [4, 4, 4]])
    x, y = points(200, 3) + centres[ours], points(100, 3, seed=1) + centres[theirs]
    how = Sampling(draws=3)
    plain = probe(features(x, ours), features(y, theirs), how)
    matched = probe(features(x, ours), features(y, theirs), how, match_classes=True)
    assert plain is not None
    assert matched is not None
    assert plain.auc.value > 75
    assert plain.balanced_accuracy.half_width is not None
    assert 30 < matched.auc.value < 70
    assert probe(features(x, ours), features(y[:1], theirs[:1])) is None


# --- as registered ----------------------------------------------------------------------------------------------------

NAMES = {
    "variance_entanglement": {"ratio", "bounded", "ratio_if_alike"},
    "wasserstein_1": {
        f"{what}{end}" for what in ("entanglement", "distance") for end in ("", "_half_width", "_if_alike")
    },
    "feature_silhouette": {"silhouette", "silhouette_half_width"},
}
NAMES["wasserstein_2"] = NAMES["wasserstein_1"]
NAMES |= {f"{name}_by_class": keys for name, keys in NAMES.items()}
KEYS = {f"{what}{end}" for what in ("balanced_accuracy", "auc") for end in ("", "_half_width")}
NAMES |= {"feature_probe": KEYS, "feature_probe_matched": KEYS}


def outputs(seed: int, at: float, *, with_features: bool = True) -> Outputs:
    labels = [np.arange(n) % 2 for n in (40, 12, 10)]
    x = [points(len(y), 4, seed) + k * at + 1 for k, y in enumerate(labels)]
    return Outputs(*(Predictions(a[:, :2], y, a if with_features else None) for a, y in zip(x, labels)))


def test_metrics_come_with_the_features_and_with_gaps() -> None:
    evidence = Evidence(outputs(0, 0.5), outputs(1, 0.1), seed=4)
    value = measure(evidence, ())
    found = value[GROUP]
    assert {name: set(figures) for name, figures in found.items()} == NAMES
    assert {m.name for m in METRICS.values() if m.group == GROUP} == set(NAMES)
    sets = [FeatureSet.of(p.features, p.labels) for p in (evidence.model.retain, evidence.model.forget)]
    expected = wasserstein(*sets, 1, Sampling(seed=4))
    assert expected is not None
    assert found["wasserstein_1"]["distance"] == expected.distance.value
    assert found["wasserstein_1"]["entanglement_if_alike"] == expected.entanglement_if_alike.value
    assert found["variance_entanglement"]["ratio"] == variance_entanglement(*sets).ratio
    reference = measure(evidence.of_reference(), ())
    apart = gap(value, reference)[GROUP]
    theirs = reference[GROUP]
    assert (
        apart["wasserstein_2"]["distance"] == found["wasserstein_2"]["distance"] - theirs["wasserstein_2"]["distance"]
    )
    assert apart["variance_entanglement"]["ratio_if_alike"] == 0
    width = "auc_half_width"
    ours, others = found["feature_probe"][width], theirs["feature_probe"][width]
    assert apart["feature_probe"][width] == pytest.approx(math.sqrt(ours**2 + others**2))
    assert all(math.isfinite(v) for figures in found.values() for v in figures.values())


def test_without_features_the_results_are_what_they_were() -> None:
    bare = Evidence(outputs(0, 0.5, with_features=False), outputs(1, 0.1))
    assert GROUP not in measure(bare, ())
    assert not set(reasons(bare, ())) & set(NAMES)
    metric = METRICS["wasserstein_1"]
    assert metric(bare) is None
    assert metric.lacks(bare) == "the penultimate features were not collected"
    # A reference whose features nobody collected leaves values without gaps.
    half = Evidence(outputs(0, 0.5), outputs(1, 0.1, with_features=False))
    value, reference = measure(half, ()), measure(half.of_reference(), ())
    assert value[GROUP]["wasserstein_1"]["distance"] > 0
    assert gap(value, reference)[GROUP]["wasserstein_1"]["distance"] is None


def test_networks_that_died_and_classes_without_partner_give_figures_that_can_be_written() -> None:
    labels = np.zeros(8, dtype=int)
    dead = Predictions(np.zeros((8, 2)), labels, np.zeros((8, 3)))
    other = Predictions(np.zeros((8, 2)), labels + 1, np.zeros((8, 3)))
    found = measure(Evidence(Outputs(dead, other)), ())[GROUP]
    assert found["variance_entanglement"]["ratio"] is None
    assert found["variance_entanglement"]["bounded"] == 1
    assert found["wasserstein_1"]["entanglement"] == 1
    assert found["feature_probe"]["auc"] == pytest.approx(50)
    for name in NAMES:
        if name.endswith(("_by_class", "_matched")):
            assert set(found[name].values()) == {None}
