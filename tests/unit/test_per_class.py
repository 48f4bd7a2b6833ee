"""Classes against loops and exact tests of SciPy; the worst of many by chance, and what is more than that."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from unsharp.errors import UserError
from unsharp.evaluation import Evidence, Outputs, Predictions, gap, measure, reasons
from unsharp.evaluation.per_class import PerClass, lowest_by_chance, mcnemar, per_class
from unsharp.report.classes import classes_to_markdown
from unsharp.stats import holm


def predictions(labels: np.ndarray, right: np.ndarray, k: int) -> Predictions:
    """Logits that are right exactly where they should be."""
    logits = np.zeros((len(labels), k))
    logits[np.arange(len(labels)), np.where(right, labels, (labels + 1) % k)] = 1.0
    return Predictions(logits, labels)


def evidence(k: int = 6, forgotten: tuple[int, ...] = (1, 2), seed: int = 0, hurt: int | None = None) -> Evidence:
    """Class 4 has no test sample; `hurt` names a class in which the network is wrong throughout."""
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, k, 300), rng.choice(forgotten, 20), rng.choice([c for c in range(k) if c != 4], 240)]
    sides = []
    for side in range(2):
        right = [rng.random(len(y)) < 0.8 for y in labels]
        if hurt is not None and side == 0:
            right = [r & (y != hurt) for r, y in zip(right, labels)]
        sides.append(Outputs(*(predictions(y, r, k) for y, r in zip(labels, right))))
    return Evidence(*sides, seed=seed)


@pytest.mark.parametrize("split", ["retain", "test"])
def test_per_class_equals_a_loop(split) -> None:
    given_ = evidence()
    found = per_class(given_, split)
    ours, theirs = getattr(given_.model, split), getattr(given_.reference, split)
    assert found.classes.tolist() == ([0, 1, 2, 3, 5] if split == "test" else list(range(6)))
    for i, c in enumerate(found.classes):
        rows = [j for j in range(len(ours)) if ours.labels[j] == c]
        right = [(ours.logits[j].argmax() == c, theirs.logits[j].argmax() == c) for j in rows]
        assert found.n[i] == len(rows)
        assert found.n_forget[i] == sum(y == c for y in given_.model.forget.labels)
        assert found.model[i] == pytest.approx(100 * sum(a for a, _ in right) / len(rows))
        assert found.reference[i] == pytest.approx(100 * sum(b for _, b in right) / len(rows))
        assert found.gap[i] == pytest.approx(found.model[i] - found.reference[i], abs=1e-9)
        lost, won = sum(b and not a for a, b in right), sum(a and not b for a, b in right)
        assert (found.lost[i], found.won[i]) == (lost, won)
        assert found.p[i] == pytest.approx(binomtest(int(won), int(won + lost)).pvalue)
    gaps = dict(zip(found.classes.tolist(), found.gap))
    assert found.mean_gap(True) == pytest.approx((gaps[1] + gaps[2]) / 2)
    assert found.mean_gap(False) == pytest.approx(np.mean([g for c, g in gaps.items() if c not in (1, 2)]))
    assert gaps[int(found.classes[found.worst])] == min(gaps.values())


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_mcnemar_equals_scipy(drawn) -> None:
    lost, won = np.array(drawn).T
    expected = [1.0 if a + b == 0 else binomtest(b, a + b).pvalue for a, b in drawn]
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_is_the_closed_test_of_bonferroni(p) -> None:
    """The adjusted value is the largest of Bonferroni's over all sets of hypotheses that hold this one."""
    m = len(p)
    found = holm(np.array(p))
    for i in range(m):
        largest = 0.0
        for members in range(1 << m):
            if members >> i & 1:
                chosen = [p[j] for j in range(m) if members >> j & 1]
                largest = max(largest, min(1.0, len(chosen) * min(chosen)))
        assert found[i] == pytest.approx(largest)


def test_the_lowest_by_chance_equals_all_outcomes() -> None:
    differing, n = np.array([2, 0, 3]), np.array([10, 5, 20])
    exact = 0.0
    for a in range(3):
        for b in range(4):
            weight = math.comb(2, a) * math.comb(3, b) / 2**5
            exact += weight * min(100 * (2 * a - 2) / 10, 0.0, 100 * (2 * b - 3) / 20)
    found = lowest_by_chance(differing, n, seed=1, draws=20_000)
    assert found.mean() == pytest.approx(exact, abs=4 * found.std() / math.sqrt(20_000))
    assert (found <= 0).all()
    only = lowest_by_chance(np.array([1]), np.array([1]), seed=1, draws=2000)
    assert set(only.tolist()) == {-100.0, 100.0}  # no class stands still, so the lowest gap may be above 0
    assert np.array_equal(lowest_by_chance(np.zeros(3, int), n, 0), np.zeros(1000))
    assert np.array_equal(lowest_by_chance(differing, n, 3), lowest_by_chance(differing, n, 3))


def test_a_lost_class_is_found_and_chance_is_not() -> None:
    found = per_class(evidence(hurt=3))
    assert found.classes[found.worst] == 3
    assert found.lower().tolist() == [3]
    assert found.worst_p < 0.01
    assert found.gap[found.worst] < found.worst_if_alike < 0
    # Without a difference hardly one of 40 reports has a class below; the plain tests would in a fifth of them.
    plain = [per_class(evidence(seed=s)) for s in range(40)]
    assert sum(len(f.lower()) + len(f.higher()) > 0 for f in plain) <= 4
    assert np.mean([f.worst_p for f in plain]) > 0.3
    assert np.mean([f.gap.min() for f in plain]) == pytest.approx(np.mean([f.worst_if_alike for f in plain]), abs=2)


def test_rows_table_and_sentence() -> None:
    found = per_class(evidence(hurt=3))
    names = ["ape", "bat", "cat", "d|g", "eel", "fox"]
    rows = found.rows(names)
    assert rows[0]["class"] == "d|g"
    assert [r["gap"] for r in rows] == sorted(found.gap.tolist())
    assert all(type(v) in (str, int, float) for r in rows for v in r.values())
    text = classes_to_markdown(found, names, most=2)
    lines = text.splitlines()
    assert lines[2].startswith("| d\\|g |")
    assert len([line for line in lines if line.startswith("|")]) == 4
    assert "class d|g has the lowest gap of 5 classes: 0.0 % against" in lines[-1]
    assert "1 classes are lower and 0 higher" in lines[-1]
    assert "classes with forgotten samples" in lines[-1]
    assert "On test samples class 3 " in found.sentence()


def test_in_the_results_a_network_beside_itself_has_no_gap() -> None:
    given_ = evidence(hurt=3)
    values, reference = measure(given_, ()), measure(given_.of_reference(), ())
    found, whole = values["per_class"], per_class(given_)
    assert found["test_classes"]["worst_gap"] == whole.gap.min()
    assert found["test_classes"]["classes_lower"] == 1
    assert found["test_classes"]["forget_classes_gap"] == whole.mean_gap(True)
    assert found["retain_classes"]["other_classes_gap"] == per_class(given_, "retain").mean_gap(False)
    assert all(v == 0 for part in reference["per_class"].values() for v in part.values())
    assert gap(values, reference)["per_class"] == found
    everywhere = measure(evidence(forgotten=tuple(range(6))), ())["per_class"]["retain_classes"]
    assert everywhere["other_classes_gap"] is None


def test_what_is_missing_is_said() -> None:
    given_ = evidence()
    alone = Evidence(given_.model)
    assert set(measure(alone, ())["per_class"].values()) == {None}
    assert "retrained" in reasons(alone, ())["test_classes"]
    with pytest.raises(UserError, match="retrained"):
        per_class(alone)
    with pytest.raises(UserError, match="'retain' or 'test'"):
        per_class(given_, "forget")  # pyright: ignore[reportArgumentType]
    assert isinstance(per_class(given_), PerClass)
