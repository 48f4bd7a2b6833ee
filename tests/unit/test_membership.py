"""The features against literal formulas, the threshold against brute force, the SVC against scikit-learn itself."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import ks_2samp
from sklearn.metrics import balanced_accuracy_score
from sklearn.svm import SVC

from unsharp.errors import UserError
from unsharp.evaluation import Evidence, Outputs, Predictions, attacks, measure
from unsharp.evaluation.membership import (
    FEATURES,
    Cut,
    balanced,
    best_cut,
    confidence,
    entropy,
    modified_entropy,
    probability,
    svc_attack,
    threshold_attack,
)

several = settings(max_examples=100, deadline=None)
logits_and_labels = st.integers(2, 6).flatmap(
    lambda k: st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float32, (n, k), elements=st.floats(-12, 12, width=32)),
            hnp.arrays(np.int64, n, elements=st.integers(0, k - 1)),
        )
    )
)
scores = st.lists(st.integers(-4, 4).map(lambda v: v / 2), min_size=1, max_size=9).map(np.array)


def softmax(row: np.ndarray) -> list[float]:
    weights = [math.exp(float(z)) for z in row]
    return [w / math.fsum(weights) for w in weights]


@given(logits_and_labels)
@several
def test_features_equal_their_formulas(drawn) -> None:
    logits, labels = drawn
    for i, (row, y) in enumerate(zip(logits, labels)):
        p = softmax(row)
        literal = -(1 - p[y]) * math.log(p[y])
        literal -= sum(p[j] * math.log(1 - p[j]) for j in range(len(p)) if j != y)
        # 1 − p of the literal formula cancels for p near 1: its own error is about ε/(1 − p) ≤ 1e-5 here.
        assert modified_entropy(logits, labels)[i] == pytest.approx(literal, rel=1e-4, abs=1e-9)
        assert entropy(logits, labels)[i] == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-12, abs=1e-12)
        assert confidence(logits, labels)[i] == pytest.approx(p[y], rel=1e-12)
        assert probability(logits, labels)[i] == pytest.approx(p, rel=1e-12)


def test_modified_entropy_by_hand_and_where_one_minus_p_cancels() -> None:
    # p = (¾, ¼), true class 0: −¼ log ¾ − ¼ log ¾; true class 1: −¾ log ¼ − ¾ log ¼
    logits = np.log([[3.0, 1.0], [3.0, 1.0]])
    expected = [-0.5 * math.log(0.75), -1.5 * math.log(0.25)]
    assert modified_entropy(logits, np.array([0, 1])) == pytest.approx(expected, rel=1e-14)
    # Two classes 60 apart, wrong label: p of the other class rounds to 1, yet log(1 − p) = −60, so the value is 120.
    assert modified_entropy(np.array([[60.0, 0.0]]), np.array([1])) == pytest.approx([120.0], rel=1e-12)


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_finite_on_extreme_logits(feature: str) -> None:
    rows = [[1e4, -1e4, 0], [-1e4, -1e4, 1e4], [1e4, 1e4, 1e4], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]]
    for y in range(3):
        found = FEATURES[feature][0](np.array(rows, dtype=np.float32), np.full(len(rows), y))
        assert np.isfinite(found).all()
        assert (found >= 0).all()
    assert modified_entropy(np.array([[1e4, -1e4]]), np.array([1])) == pytest.approx([4e4])


@given(logits_and_labels, st.randoms(use_true_random=False))
@several
def test_features_do_not_depend_on_the_order_of_classes_or_on_other_rows(drawn, random) -> None:
    logits, labels = drawn
    order = np.array(random.sample(range(logits.shape[1]), logits.shape[1]))
    for feature in (confidence, entropy, modified_entropy):
        renamed = feature(logits[:, order], np.argsort(order)[labels])
        assert renamed == pytest.approx(feature(logits, labels), rel=1e-9, abs=1e-15)
        assert feature(logits[:1], labels[:1])[0] == feature(logits, labels)[0]


def brute_force(members: np.ndarray, others: np.ndarray) -> tuple[float, int]:
    """The best balanced accuracy over every cut and direction, and the most samples that such a cut calls member."""
    found = []
    values = np.unique([*members, *others])
    for cut in [values[0] - 1, *((values[1:] + values[:-1]) / 2), values[-1] + 1]:
        for sign in (1, -1):
            called = [sum(sign * v > sign * cut for v in group) for group in (members, others)]
            hits = called[0] * len(others) + (len(others) - called[1]) * len(members)
            found.append((hits, sum(called)))
    best = max(found)
    return 50 * best[0] / (len(members) * len(others)), int(best[1])


@given(scores, scores)
@several
def test_best_cut_equals_brute_force(members: np.ndarray, others: np.ndarray) -> None:
    cut = best_cut(members, others)
    accuracy, n_called = brute_force(members, others)
    assert cut.accuracy == pytest.approx(accuracy, rel=1e-12)
    hit, missed = cut.members(members), cut.members(others)
    assert 50 * (hit.mean() + (~missed).mean()) == pytest.approx(cut.accuracy)
    assert hit.sum() + missed.sum() == n_called
    assert cut == best_cut(members[::-1], others[::-1])


@given(scores, scores)
@several
def test_direction_does_not_matter(members: np.ndarray, others: np.ndarray) -> None:
    assert best_cut(-members, -others).accuracy == best_cut(members, others).accuracy
    assert best_cut(others, members).accuracy == best_cut(members, others).accuracy


def test_best_cut_is_the_kolmogorov_smirnov_distance() -> None:
    draw = np.random.default_rng(0)
    for members, others in [(draw.normal(0.4, 1, 700), draw.normal(0, 2, 900)), (draw.random(50), draw.random(3))]:
        assert best_cut(members, others).accuracy == pytest.approx(50 + 50 * ks_2samp(members, others).statistic)


def test_cut_lies_midway_and_ties_are_broken_towards_member() -> None:
    assert best_cut([3.0, 4.0], [1.0, 2.0]) == Cut(2.5, True, 100.0)
    assert best_cut([1.0, 2.0], [3.0, 4.0]) == Cut(2.5, False, 100.0)
    # Cuts at 0.5 and at 1.5 (above) both reach 75 %; the one at 0.5 calls more samples member.
    assert best_cut([2.0, 1.0], [0.0, 1.0]) == Cut(0.5, True, 75.0)
    # Equal scores carry no information: everything is called member.
    assert threshold_attack(np.ones(3), np.ones(4), np.array([0.0, 1.0, 9.0])) == (0.0, 50.0)
    # Between neighbouring floats there is no number, and still both are told apart.
    first = 1.0
    second = np.nextafter(first, 2.0)
    third = np.nextafter(second, 2.0)
    for low, high in ((first, second), (second, third)):  # the middle rounds to the lower, then to the upper
        assert best_cut([high], [low]).members(np.array([low, high])).tolist() == [False, True]
        assert best_cut([low], [high]).members(np.array([low, high])).tolist() == [True, False]


def test_threshold_attack_counts_forget_samples_called_non_member() -> None:
    assert threshold_attack(np.array([3.0, 4]), np.array([1.0, 2]), np.array([0.0, 2.4, 2.6, 9])) == (50.0, 100.0)


@pytest.mark.parametrize("bad", [[], [[1.0]], [np.nan]])
def test_bad_scores_are_refused(bad: list) -> None:
    with pytest.raises(UserError, match="members must be"):
        best_cut(np.array(bad), np.array([1.0]))


def evidence(n_retain: int, n_test: int, n_forget: int = 30, seed: int = 0) -> Evidence:
    draw = np.random.default_rng(seed)

    def some(n: int, margin: float) -> Predictions:
        labels = draw.integers(0, 4, n)
        return Predictions(draw.normal(0, 1.5, (n, 4)) + margin * np.eye(4)[labels], labels)

    return Evidence(Outputs(some(n_retain, 4), some(n_forget, 2), some(n_test, 2)), seed=5)


@pytest.mark.parametrize("feature", FEATURES)
def test_svc_equals_scikit_learn_called_directly(feature: str) -> None:
    given_sets = evidence(120, 120).model
    values = []
    for predictions in (given_sets.retain, given_sets.test, given_sets.forget):
        p = np.array([softmax(row) for row in predictions.logits])
        rows, y = np.arange(len(p)), predictions.labels
        # The literal formula, matrix form: log(1 − p) everywhere, log p and 1 − p at the true class.
        terms = p * np.log(1 - p)
        terms[rows, y] = (1 - p[rows, y]) * np.log(p[rows, y])
        values.append(
            {
                "correctness": (p.argmax(1) == y).astype(float)[:, None],
                "confidence": p[rows, y][:, None],
                "entropy": -(p * np.log(p)).sum(1)[:, None],
                "modified_entropy": -terms.sum(1)[:, None],
                "probability": p,
            }[feature]
        )
    members, others, forget = values
    x, y = np.concatenate([members, others]), np.r_[np.ones(120), np.zeros(120)]
    classifier = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y)
    found = measure(Evidence(given_sets), [f"svc_{feature}"])["mia"][f"svc_{feature}"]
    assert found["attack_accuracy"] == pytest.approx(100 * balanced_accuracy_score(y, classifier.predict(x)))
    assert found["mia"] == pytest.approx(100 * np.mean(classifier.predict(forget) == 0))
    assert 50 < found["attack_accuracy"] <= 100


def test_svc_handles_repeated_rows() -> None:
    members, others, forget = (
        np.array([1.0] * 9 + [0.0]),
        np.array([1.0] * 4 + [0.0] * 6),
        np.array([0.0, 1.0, 1.0, 0.0]),
    )
    assert svc_attack(members, others, forget) == (50.0, pytest.approx(100 * (0.9 + 0.6) / 2))


@pytest.mark.parametrize(("n_retain", "n_test"), [(50, 20), (20, 50), (30, 30)])
def test_balanced_draws_equally_many_without_replacement(n_retain: int, n_test: int) -> None:
    # Each logit tells which row it came from.
    sets = [Predictions(np.arange(2.0 * n).reshape(n, 2), np.arange(n) % 2) for n in (n_retain, n_test)]
    for limit, n in ((10_000, min(n_retain, n_test)), (7, 7)):
        drawn = balanced(*sets, seed=3, limit=limit)
        for full, part in zip(sets, drawn):
            rows = (part.logits[:, 0] / 2).astype(int)
            assert len(rows) == len(set(rows)) == n
            assert np.array_equal(full.labels[rows], part.labels)
        again = balanced(*sets, seed=3, limit=limit)
        assert all(np.array_equal(a.logits, b.logits) for a, b in zip(drawn, again))
    other = balanced(*sets, seed=4, limit=7)
    assert not np.array_equal(other[0].logits, balanced(*sets, seed=3, limit=7)[0].logits)


def test_threshold_uses_every_sample_and_matches_features() -> None:
    given_sets = evidence(200, 60)
    found = measure(given_sets, ["threshold_modified_entropy"])["mia"]["threshold_modified_entropy"]
    parts = [getattr(given_sets.model, s) for s in ("retain", "test", "forget")]
    expected = threshold_attack(*(modified_entropy(p.logits, p.labels) for p in parts))
    assert found == {"mia": expected.mia, "attack_accuracy": expected.attack_accuracy}


def test_results_do_not_depend_on_the_order_of_samples() -> None:
    given_sets, draw = evidence(80, 80), np.random.default_rng(0)

    def shuffled(p: Predictions) -> Predictions:
        order = draw.permutation(len(p))
        return Predictions(p.logits[order], p.labels[order])

    model = given_sets.model
    mixed = Evidence(Outputs(shuffled(model.retain), shuffled(model.forget), shuffled(model.test)))
    names = [name for name in attacks() if name != "svc_probability"]
    assert measure(mixed, names)["mia"] == measure(given_sets, names)["mia"]
