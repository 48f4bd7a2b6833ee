"""ToW against worked examples, its definition in loops, and the places where the two forms part."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unsharp.evaluation import Evidence, Outputs, Predictions, measure
from unsharp.evaluation.tow import tow, tow_signed

percent = st.floats(0, 100)
triple = st.tuples(percent, percent, percent)
several = settings(max_examples=50, deadline=None)


def with_accuracies(right: tuple[int, int, int], n: int = 10) -> Outputs:
    """Outputs in which exactly `right` of `n` samples of retain, forget, test are classified correctly."""

    def one(k: int) -> Predictions:
        labels = np.arange(n) % 3
        answers = np.where(np.arange(n) < k, labels, (labels + 1) % 3)
        return Predictions(np.eye(3)[answers], labels)

    return Outputs(*(one(k) for k in right))


def test_worked_example() -> None:
    # 1 − |.99 − 1| = .99, 1 − |.30 − .50| = .80, 1 − |.70 − .75| = .95; signed: 1 − (.30 − .50) = 1.20
    assert tow((99, 30, 70), (100, 50, 75)) == pytest.approx(100 * 0.99 * 0.80 * 0.95)
    assert tow_signed((99, 30, 70), (100, 50, 75)) == pytest.approx(100 * 0.99 * 1.20 * 0.95)


@given(triple, triple)
@several
def test_absolute_form_is_the_definition(model, reference) -> None:
    product = 100.0
    for ours, theirs in zip(model, reference):
        difference = ours - theirs if ours > theirs else theirs - ours
        product *= (100.0 - difference) / 100.0
    assert tow(model, reference) == pytest.approx(product, rel=1e-9, abs=1e-9)
    assert 0 <= tow(model, reference) <= 100
    assert tow(model, reference) == tow(reference, model)
    assert tow(model, model) == 100


@given(triple, triple)
@several
def test_both_forms_agree_where_nothing_beats_retraining(model, reference) -> None:
    r, f, t = (min(pair) for pair in zip(model, reference))
    r_star, f_star, t_star = (max(pair) for pair in zip(model, reference))
    assert tow_signed((r, f_star, t), (r_star, f, t_star)) == pytest.approx(tow((r, f_star, t), (r_star, f, t_star)))
    assert tow_signed((r_star, f, t_star), (r, f_star, t)) >= 100 - 1e-9


def test_from_outputs() -> None:
    values = measure(Evidence(with_accuracies((9, 3, 7)), with_accuracies((10, 5, 6))), ())
    assert values["tow"] == pytest.approx(100 * 0.9 * 0.8 * 0.9)
    assert values["tow_signed"] == pytest.approx(100 * 0.9 * 1.2 * 1.1)


def test_none_without_reference_or_test_set() -> None:
    whole = with_accuracies((9, 3, 7))
    for evidence in (Evidence(whole), Evidence(*[Outputs(whole.retain, whole.forget)] * 2)):
        values = measure(evidence, ())
        assert values["tow"] is None
        assert values["tow_signed"] is None
        assert values["forget_accuracy"] == pytest.approx(30)
