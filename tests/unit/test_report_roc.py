"""The figure of ROC curves: its lines are the rates that the curve gives, and the same curves give the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from unsharp.errors import UserError
from unsharp.evaluation.roc import roc
from unsharp.report.html import inline
from unsharp.report.roc import Curve, lowest, roc_curves, staircase


def curves(n: int = 500) -> list[Curve]:
    rng = np.random.default_rng(0)
    others = rng.normal(size=n)
    return [
        Curve("NegGrad < & >", roc(rng.normal(1, 1, n), others)),
        Curve("Retrained", roc(rng.normal(0, 1, n), others), reference=True),
    ]


def test_steps_are_the_rates_of_the_curve() -> None:
    rng = np.random.default_rng(1)
    for members, others in (
        (rng.normal(1, 1, 90), rng.normal(size=70)),
        (rng.integers(0, 5, 90) / 1.0, rng.integers(0, 4, 70) / 1.0),
    ):
        curve = roc(members, others)
        fpr, tpr = staircase(curve)
        assert (np.diff(fpr) > 0).all()
        assert fpr[0] >= curve.smallest_fpr
        assert (fpr[-1], tpr[-1]) == (1.0, 1.0)
        for x, y in zip(fpr[:-1], tpr[:-1]):
            assert curve.at(x).tpr == pytest.approx(y)
        between = (fpr[0] + fpr[1]) / 2
        assert curve.at(between).tpr == pytest.approx(tpr[0])


def test_axes_begin_below_what_can_be_told() -> None:
    assert lowest(curves(500)) == pytest.approx(1e-3)
    assert lowest(curves(1000)) == pytest.approx(1e-3)
    assert lowest(curves(1001)) == pytest.approx(1e-4)
    assert lowest(curves(20)) == pytest.approx(1e-2)


def test_the_figure_names_its_curves_and_is_repeatable() -> None:
    svg = roc_curves(curves())
    assert svg == roc_curves(curves())
    area = curves()[0].roc.auc
    assert f"NegGrad &lt; &amp; &gt; (area {area:.3f})" in svg
    assert "Retrained (area 0.5" in svg
    for text in ("0.1 %", "1 %", "100 %", "false-positive rate"):
        assert f">{text}<" in svg.replace("\n", "")
    assert "<svg" in inline(svg, "roc")
    assert roc_curves(curves()[:1]) != svg


def test_extreme_curves_are_drawn() -> None:
    apart = Curve("apart", roc(np.array([2.0, 3.0]), np.array([0.0, 1.0])))
    backwards = Curve("backwards", roc(np.array([0.0, 1.0]), np.array([2.0, 3.0])))
    equal = Curve("equal", roc(np.zeros(3), np.zeros(3)))
    assert "nan" not in roc_curves([apart, backwards, equal]).lower()
    with pytest.raises(UserError, match="no curve"):
        roc_curves([])
