"""Divergences against literal sums and SciPy, their ends, and what becomes of them in the set of results."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from unsharp.errors import UserError
from unsharp.evaluation import Evidence, Outputs, Predictions, gap, measure, reasons
from unsharp.evaluation.divergence import NUMBERS, divergence, divergences

pairs = st.integers(2, 6).flatmap(
    lambda k: st.integers(1, 5).flatmap(
        lambda n: st.tuples(*[hnp.arrays(np.float32, (n, k), elements=st.floats(-12, 12, width=32))] * 2)
    )
)


def softmax(row: np.ndarray) -> list[float]:
    weights = [math.exp(float(z)) for z in row]
    return [w / math.fsum(weights) for w in weights]


@given(pairs)
@settings(max_examples=100, deadline=None)
def test_divergences_equal_their_formulas(drawn) -> None:
    for found, row, other in zip(divergences(*drawn), *drawn):
        p, q = softmax(row), softmax(other)
        m = [(a + b) / 2 for a, b in zip(p, q)]
        assert found[0] == pytest.approx(math.fsum(b * math.log(b / a) for a, b in zip(p, q)), rel=1e-9, abs=1e-12)
        sides = [math.fsum(x * math.log(x / y) for x, y in zip(side, m)) for side in (p, q)]
        assert found[1] == pytest.approx(sum(sides) / 2, rel=1e-9, abs=1e-12)
        assert found[1] <= math.log(2) + 1e-12
        assert found[2] == (0 if row.argmax() == other.argmax() else 100)
        assert found[3] == pytest.approx(math.dist(p, q), rel=1e-9, abs=1e-12)


def test_divergences_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 3, (2, 50, 7))
    p, q = (np.array([softmax(row) for row in z]) for z in (a, b))
    found = divergences(a, b)
    assert found[:, 0] == pytest.approx(entropy(q, p, axis=1))  # of the reference against the model, not the reverse
    assert found[:, 1] == pytest.approx(jensenshannon(p, q, axis=1) ** 2)


def test_by_hand() -> None:
    # p = (¾, ¼), q = (½, ½): KL(q ‖ p) = ½ log ⅔ + ½ log 2
    [[kl, _, churn, l2]] = divergences(np.log([[3.0, 1.0]]), np.zeros((1, 2)))
    assert kl == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert (churn, l2) == (0, pytest.approx(math.sqrt(2) / 4))


def test_ends_and_extreme_logits() -> None:
    a = np.array([[1e4, -1e4, 0], [1e38, -1e38, 0], [2, 2, 2]], np.float32)
    assert np.array_equal(divergences(a, a), np.zeros((3, 4)))
    shifted = divergences(a[2:] + np.float32(5), a[2:])
    assert np.array_equal(shifted, np.zeros((1, 4)))
    opposite = divergences(a[:1], a[:1, ::-1])
    assert opposite[0] == pytest.approx([1e4, math.log(2), 100, math.sqrt(2)])
    assert np.isfinite(divergences(a, a[::-1])).all()


def test_nearly_equal_networks_keep_their_digits() -> None:
    # KL and 4 · JS of neighbouring distributions agree, both ½ Σ d²/p.
    rng = np.random.default_rng(1)
    z = rng.normal(0, 1, (20, 5))
    kl, js, _, _ = divergences(z + 1e-5 * rng.normal(0, 1, z.shape), z).T
    assert 4 * js == pytest.approx(kl, rel=1e-3)
    assert (js > 0).all()


def test_blocks_do_not_matter() -> None:
    k = NUMBERS // 3
    a, b = np.random.default_rng(2).normal(size=(2, 7, k))
    single = np.concatenate([divergences(a[i : i + 1], b[i : i + 1]) for i in range(7)])
    assert np.array_equal(divergences(a, b), single)


def outputs(seed: int) -> Outputs:
    labels = [np.random.default_rng(1).integers(0, 4, n) for n in (30, 10, 20)]
    logits = [np.random.default_rng([seed, i]).normal(0, 3, (len(y), 4)) for i, y in enumerate(labels)]
    return Outputs(*(Predictions(z, y) for z, y in zip(logits, labels)))


def test_in_the_results_the_gap_is_the_value_itself() -> None:
    evidence = Evidence(outputs(0), outputs(1))
    values, reference = measure(evidence, ()), measure(evidence.of_reference(), ())
    found = values["divergence"]
    assert set(found) == {"retain_divergence", "forget_divergence", "test_divergence"}
    for split in ("retain", "forget", "test"):
        ours, theirs = getattr(evidence.model, split), getattr(evidence.reference, split)
        assert found[f"{split}_divergence"] == divergence(ours, theirs)._asdict()
        expected = np.mean([entropy(softmax(b), softmax(a)) for a, b in zip(ours.logits, theirs.logits)])
        assert found[f"{split}_divergence"]["kl"] == pytest.approx(expected)
    assert all(v == 0 for part in reference["divergence"].values() for v in part.values())
    assert gap(values, reference)["divergence"] == found


def test_without_a_retrained_model_there_is_none() -> None:
    alone = Evidence(outputs(0))
    assert set(measure(alone, ())["divergence"].values()) == {None}
    assert "retrained" in reasons(alone, ())["forget_divergence"]


def test_other_samples_are_refused() -> None:
    with pytest.raises(UserError, match="same samples"):
        divergences(np.zeros((3, 2)), np.zeros((4, 2)))
    with pytest.raises(UserError, match="labels differ"):
        divergence(Predictions(np.zeros((2, 2)), np.array([0, 1])), Predictions(np.zeros((2, 2)), np.array([1, 0])))
