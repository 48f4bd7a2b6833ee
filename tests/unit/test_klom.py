"""KLoM against loops and known divergences, its floors, and what of two pools is compared."""

import math

import numpy as np
import pytest
from scipy.stats import entropy

from unsharp.data import ImageSamples
from unsharp.difficulty.forget import from_indices
from unsharp.errors import UserError
from unsharp.evaluation.klom import (
    Klom,
    between_identical,
    binned_kl,
    gaussian_floor,
    gaussian_kl,
    klom,
    klom_on_pools,
)
from unsharp.pool.store import Answers, PoolOutputs


def drawn(n_networks: int, n: int, mean: float = 0.0, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, scale, (n_networks, n))


# --- estimates --------------------------------------------------------------------------------------------------------


def literal(p: np.ndarray, q: np.ndarray, *, closed: bool, n_bins: int = 20) -> float:
    """One sample by np.digitize, which puts the joint maximum into a bin of its own, and SciPy's entropy."""
    p, q = np.clip(p, -100, 100), np.clip(q, -100, 100)
    low, high = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(low, high if high > low else low + 1, n_bins + 1)
    shares = []
    for values in (p, q):
        places = np.digitize(values, edges)
        if closed:
            places = np.minimum(places, n_bins)
        counts = [int(np.sum(places == i)) for i in range(1, n_bins + 1)]
        shares.append([c / sum(counts) if sum(counts) else math.nan for c in counts])
    floored = [max(b, 1e-5) if a > 0 else b for a, b in zip(*shares)]
    return float(entropy(shares[0], floored))


@pytest.mark.parametrize("edge", ["closed", "open"])
@pytest.mark.parametrize(("n_unlearned", "n_oracles", "shift"), [(12, 12, 0.0), (30, 17, 1.0), (5, 40, 9.0)])
def test_binned_equals_a_loop(edge, n_unlearned: int, n_oracles: int, shift: float) -> None:
    u, o = drawn(n_unlearned, 30, shift, 3.0), drawn(n_oracles, 30, seed=1)
    expected = [literal(u[:, i], o[:, i], closed=edge == "closed") for i in range(30)]
    assert binned_kl(u, o, edge=edge) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    other = [literal(u[:, i], o[:, i], closed=edge != "closed") for i in range(30)]
    assert binned_kl(u, o, edge=edge) != pytest.approx(other)


def test_binned_ends() -> None:
    u, o = np.full((10, 1), 3.0), np.full((10, 1), -3.0)
    assert binned_kl(u, o) == pytest.approx([math.log(1e5 + 1)])
    assert np.isnan(binned_kl(u, o, edge="open")).all()  # every network that forgot is at the maximum, and left out
    assert binned_kl(u, u).tolist() == [0.0]
    assert binned_kl(np.full((4, 1), np.inf), np.full((4, 1), 500.0)).tolist() == [0.0]  # both clipped to 100
    wide = drawn(50, 3)
    assert binned_kl(wide, wide).tolist() == [0.0] * 3


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    u, o = drawn(9, 20), drawn(8, 20, seed=1)
    whole = binned_kl(u, o)
    monkeypatch.setattr("unsharp.evaluation.klom.AT_ONCE", 40)
    assert np.array_equal(binned_kl(u, o), whole)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (0.7, 1.0), (0.0, 1.5), (-1.0, 0.5)])
def test_many_networks_give_the_known_divergence(mean: float, scale: float) -> None:
    known = -math.log(scale) + (scale**2 + mean**2) / 2 - 0.5
    u, o = drawn(100_000, 2, mean, scale), drawn(100_000, 2, seed=1)
    assert gaussian_kl(u, o) == pytest.approx(known, abs=0.02)
    assert binned_kl(u, o) == pytest.approx(known, abs=0.05)


def test_gaussian_equals_a_loop_and_floors_a_deviation() -> None:
    u, o = drawn(6, 10, 1.0, 2.0), drawn(7, 10, seed=1)
    for i, found in enumerate(gaussian_kl(u, o)):
        s, t = np.std(u[:, i], ddof=1), np.std(o[:, i], ddof=1)
        literal_ = math.log(t / s) + (s**2 + (u[:, i].mean() - o[:, i].mean()) ** 2) / (2 * t**2) - 0.5
        assert found == pytest.approx(literal_)
    o[:, 0] = 5.0
    pooled = math.sqrt(np.mean(o.var(axis=0, ddof=1)))
    expected = ((u[:, 0].mean() - 5) ** 2 + u[:, 0].var(ddof=1)) / (2 * (0.01 * pooled) ** 2)
    assert gaussian_kl(u, o)[0] == pytest.approx(expected, rel=1e-2)
    assert np.isfinite(gaussian_kl(np.ones((4, 2)), np.ones((4, 2)))).all()


@pytest.mark.parametrize("estimator", ["binned", "gaussian"])
def test_shift_and_scale_do_not_matter(estimator) -> None:
    u, o = drawn(11, 8), drawn(9, 8, seed=1)
    same, moved = klom(u, o, estimator=estimator), klom(3 * u - 7, 3 * o - 7, estimator=estimator)
    assert moved.values == pytest.approx(same.values, rel=1e-6)


# --- floors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "floor"), [(10, 5.6), (20, 3.0), (30, 1.8), (100, 0.35)])
def test_the_binned_floor(n: int, floor: float) -> None:
    found = between_identical("binned", n, n)
    assert found.mean() == pytest.approx(floor, abs=0.1 if n < 100 else 0.01)
    other = [literal(u, o, closed=True) for u, o in zip(drawn(n, 300, seed=2).T, drawn(n, 300, seed=3).T)]
    assert found.mean() == pytest.approx(np.mean(other), abs=5 * np.std(other) / math.sqrt(300))


@pytest.mark.parametrize(("n_unlearned", "n_oracles"), [(10, 10), (100, 100), (5, 30), (30, 12)])
def test_the_gaussian_floor_is_the_mean_of_the_simulation(n_unlearned: int, n_oracles: int) -> None:
    found = between_identical("gaussian", n_unlearned, n_oracles, draws=40_000)
    assert gaussian_floor(n_unlearned, n_oracles) == pytest.approx(found.mean(), abs=4 * found.std() / 200)


def test_the_gaussian_floor_by_hand() -> None:
    # a = b: the logarithms cancel. N = M = 10: ½ · 1.2 · 9/7 − ½.
    assert gaussian_floor(10, 10) == pytest.approx(0.5 * 1.2 * 9 / 7 - 0.5)


@pytest.mark.parametrize("estimator", ["binned", "gaussian"])
def test_figures_of_identical_ensembles_are_at_their_floors(estimator) -> None:
    found = klom(drawn(20, 4000), drawn(20, 4000, seed=1), estimator=estimator)
    figures = found.figures()
    assert figures["mean"] == pytest.approx(found.values.mean())
    for name in ("mean", "p50", "p95", "p99"):
        assert figures[name] == pytest.approx(figures[f"{name}_floor"], rel=0.1)
    assert figures["share_above"] == pytest.approx(5, abs=1.5)
    assert found.percentile(95) == np.percentile(found.values, 95)
    apart = klom(drawn(20, 50, 3.0), drawn(20, 50, seed=1), estimator=estimator)
    assert apart.mean > apart.floor + 1
    assert apart.share_above > 90
    again = klom(drawn(20, 50, 3.0), drawn(20, 50, seed=1), estimator=estimator)
    assert again.figures() == apart.figures()


def test_few_networks_are_fitted_and_many_are_binned() -> None:
    u, o = drawn(100, 3), drawn(100, 3, seed=1)
    assert klom(u, o).estimator == "binned"
    assert klom(u[:99], o).estimator == "gaussian"
    assert np.array_equal(klom(u, o[:99]).values, gaussian_kl(u, o[:99]))


# --- of pools ---------------------------------------------------------------------------------------------------------

N, FORGOTTEN = 12, np.array([2, 5, 7])
KEPT = np.setdiff1d(np.arange(N), FORGOTTEN)
SAMPLES = ImageSamples(np.arange(N * 4, dtype=np.uint8).reshape(N, 2, 2, 1), np.arange(N) % 2)
FORGET = from_indices(FORGOTTEN, SAMPLES)


def pool(m: int, seed: int, share: float = 1.0, without: bool = False, shift: float = 0.0) -> PoolOutputs:
    rng = np.random.default_rng(seed)
    inside = rng.random((m, N)) < share
    inside[:, FORGOTTEN] &= not without
    margin = rng.normal(0, 1, (m, N)).astype(np.float32)
    margin[:, FORGOTTEN] += shift
    margin[~inside] += 50 * (not without)  # whoever reads these where it should not will notice
    train = Answers(margin, np.zeros((m, N), np.int16), SAMPLES.labels)
    test = Answers(rng.normal(0, 1, (m, 6)).astype(np.float32), np.zeros((m, 6), np.int16), np.zeros(6, np.int64))
    return PoolOutputs(np.arange(m), inside, train, test)


def test_pools_that_had_all_samples() -> None:
    unlearned, oracles = pool(20, 0, shift=4.0), pool(24, 1, without=True)
    found = klom_on_pools(unlearned, oracles, FORGET)
    assert set(found) == {"forget", "retain", "test"}
    expected = {
        "forget": gaussian_kl(unlearned.train.margin[:, FORGOTTEN], oracles.train.margin[:, FORGOTTEN]),
        "retain": gaussian_kl(unlearned.train.margin[:, KEPT], oracles.train.margin[:, KEPT]),
        "test": gaussian_kl(unlearned.test.margin, oracles.test.margin),
    }
    for name, beside in found.items():
        assert beside.unlearned.values == pytest.approx(expected[name], rel=1e-9)  # sums in another order
        assert (beside.unlearned.n_unlearned, beside.unlearned.n_oracles) == (20, 24)
        assert isinstance(beside.retrained, Klom)
        assert (beside.retrained.n_unlearned, beside.retrained.n_oracles) == (12, 12)
    halves = oracles.train.margin[:, FORGOTTEN]
    assert found["forget"].retrained.values == pytest.approx(gaussian_kl(halves[::2], halves[1::2]), rel=1e-9)
    assert found["forget"].unlearned.mean > found["forget"].unlearned.floor + 1
    assert found["retain"].unlearned.mean < 1
    assert klom_on_pools(unlearned, oracles, FORGET, estimator="binned")["test"].unlearned.estimator == "binned"


def test_pools_on_random_subsets_compare_those_that_had_the_sample() -> None:
    unlearned, oracles = pool(30, 0, share=0.7), pool(30, 1, share=0.7, without=True)
    found = klom_on_pools(unlearned, oracles, FORGET)
    fewest = min(int(unlearned.inside[:, j].sum()) for j in FORGOTTEN)
    assert (found["forget"].unlearned.n_unlearned, found["forget"].unlearned.n_oracles) == (fewest, 30)
    for i, j in enumerate(FORGOTTEN):
        had = unlearned.train.margin[unlearned.inside[:, j], j][:fewest, None]
        alone = gaussian_kl(had, oracles.train.margin[:, [j]])
        assert found["forget"].unlearned.values[i] == pytest.approx(alone[0], rel=1e-6)
    kept = found["retain"].unlearned
    assert kept.n_unlearned == min(int(unlearned.inside[:, j].sum()) for j in KEPT)
    assert kept.n_oracles == min(int(oracles.inside[:, j].sum()) for j in KEPT)
    assert kept.mean < 1


def test_few_oracles_have_nothing_beside() -> None:
    found = klom_on_pools(pool(6, 0), pool(7, 1, without=True), FORGET)
    assert found["forget"].retrained is None


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_refused() -> None:
    u = drawn(6, 3)
    with pytest.raises(UserError, match="on the same samples"):
        klom(u, drawn(6, 4))
    with pytest.raises(UserError, match="unlearned has 1 NaN"):
        klom(np.where(np.arange(3) == np.arange(6)[:, None], [np.nan] + [0] * 2, u), u)
    with pytest.raises(UserError, match="at least 2 networks that forgot and 4 oracles, got 6 and 3"):
        klom(u, u[:3])
    with pytest.raises(UserError, match="'binned'"):
        klom(u, u, estimator="bined")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="'closed'"):
        binned_kl(u, u, edge="close")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="n_bins"):
        binned_kl(u, u, n_bins=0)
    with pytest.raises(UserError, match="were trained on a sample of the forget set"):
        klom_on_pools(pool(6, 0), pool(6, 1), FORGET)
    with pytest.raises(UserError, match="none of the unlearned networks"):
        klom_on_pools(pool(6, 0, without=True), pool(6, 1, without=True), FORGET)
    with pytest.raises(UserError, match="was in the training set of only"):
        klom_on_pools(pool(6, 0, share=0.1), pool(6, 1, without=True), FORGET)
