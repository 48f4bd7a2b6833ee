"""Lemma 3.1 as a count, thresholds, closed forms: against loops, simulations and the values stated for them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsharp.errors import UserError
from unsharp.theory import thresholds
from unsharp.theory.data import Setup, make_problem
from unsharp.theory.metrics import FirstTime, alpha_star, at_alpha_star, slope, threshold
from unsharp.theory.model import State, start
from unsharp.theory.track import SETS, activation_stats, groups, kappa, summary, zeta
from unsharp.theory.unlearn import Plan, neggrad_weights, pretrain_weights, run

SETUP = Setup(n=12, n_forget=4, n_filters=5, n_test=10, flip=0.2, precision="float64")
INDEPENDENT = dataclasses.replace(SETUP, n_patches=3, noise="independent")


def trained(setup: Setup = SETUP, steps: int = 3) -> State:
    state = start(make_problem(setup, [300], [0, 1]), [1.5, 4.0])
    run(state, Plan(perturb="joint", steps=steps))
    return state


# --- what is recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", [SETUP, INDEPENDENT], ids=["shared", "independent"])
def test_the_summary_is_what_loops_find(setup: Setup) -> None:
    state = trained(setup)
    found, problem = summary(state), state.problem
    for b in range(2):
        for v in range(2):
            k, z, margins = kappa(state)[b, v], zeta(state)[b, v], state.point().margins[b, v]
            assert float(found["kappa_mean"][b, v]) == pytest.approx(float(k.mean()))
            assert float(found["kappa_max"][b, v]) == pytest.approx(max(k.tolist()))
            lists: dict[str, list[float]] = {}
            for f in range(2 * setup.n_filters):
                j = 1 if f < setup.n_filters else -1
                for i in range(setup.n):
                    side = "same" if j == problem.labels[b, i] else "opposite"
                    name = f"zeta_{'forget' if i < setup.n_forget else 'retain'}_{side}"
                    for q in range(setup.n_noises):
                        lists.setdefault(name, []).append(float(z[f, i * setup.n_noises + q]))
            assert len(lists) == 4
            for name, values in lists.items():
                assert float(found[name][b, v]) == pytest.approx(np.mean(values))
            for name, part in (("forget", margins[:4]), ("retain", margins[4:]), ("train", margins)):
                assert float(found[f"{name}_error"][b, v]) == pytest.approx(float((part <= 0).double().mean()))
                losses = [math.log1p(math.exp(-m)) for m in part.tolist()]
                assert float(found[f"{name}_loss"][b, v]) == pytest.approx(np.mean(losses))
            assert float(found["retain_margin"][b, v]) == pytest.approx(float(margins[4:].mean()))


def test_without_forget_samples_their_figures_are_nan() -> None:
    state = trained(dataclasses.replace(SETUP, n_forget=0))
    found = summary(state)
    for name, values in found.items():
        assert bool(values.isnan().all()) is ("forget" in name), name


# --- Lemma 3.1 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", ["joint", "ce", "retain", "sep"])
@pytest.mark.parametrize("setup", [SETUP, INDEPENDENT], ids=["shared", "independent"])
def test_neurons_turned_off_are_counted_one_by_one(setup: Setup, perturb: str) -> None:
    state, plan = trained(setup, steps=1), Plan(perturb=perturb, c=0.4)
    problem, weights = state.problem, neggrad_weights(trained(setup).problem, [0.8])
    found = activation_stats(state, plan, weights)
    terms = {"retain": weights.retain, "forget": weights.forget}
    ascends = {"joint": dict.fromkeys(SETS, (1, 1)), "ce": dict.fromkeys(SETS, (1, -1)),
               "retain": {"retain": (1, 0), "forget": None}, "sep": {"retain": (1, 0), "forget": (0, 1)}}  # fmt: skip
    tau = plan.c * setup.n_filters * setup.n**0.5 / (setup.n_patches * 300**0.5)
    before, checked = state.scores()[..., 1:], 0
    for name in SETS:
        chosen: Any = ascends[perturb][name]
        after = before
        if chosen is not None:
            g = state.point().gradient(chosen[0] * terms["retain"] + chosen[1] * terms["forget"])
            moved = torch.einsum("bvfk,bkl->bvfl", g, problem.gram)
            norm = torch.einsum("bvfk,bvfk->bv", g, moved).sqrt()
            after = before + tau * moved[..., 1:] / norm[..., None, None]
        for side in ("same", "opposite"):
            for b in range(2):
                for v in range(2):
                    on = off = turned_off = turned_on = 0
                    shifts: list[float] = []
                    for f in range(2 * setup.n_filters):
                        j = 1 if f < setup.n_filters else -1
                        for k in range(setup.n * setup.n_noises):
                            i = k // setup.n_noises
                            mine = (i < setup.n_forget) == (name == "forget")
                            if not mine or (j == problem.labels[b, i]) != (side == "same"):
                                continue
                            x, y = float(before[b, v, f, k]), float(after[b, v, f, k])
                            on, off = on + (x > 0), off + (x <= 0)
                            turned_off += x > 0 and y <= 0
                            turned_on += x <= 0 and y > 0
                            shifts.append(y - x)
                    group = f"{name}_{side}"
                    share = turned_off / on if on >= 10 else float("nan")
                    other = turned_on / off if off >= 10 else float("nan")
                    assert float(found[f"deact_{group}"][b, v]) == pytest.approx(share, nan_ok=True)
                    assert float(found[f"react_{group}"][b, v]) == pytest.approx(other, nan_ok=True)
                    assert float(found[f"shift_{group}"][b, v]) == pytest.approx(np.mean(shifts), abs=1e-12)
                    assert float(found[f"active_{group}"][b, v]) == pytest.approx(on / (on + off))
                    checked += 1
    assert checked == 16


def test_few_active_neurons_give_no_share() -> None:
    state = start(make_problem(Setup(n=3, n_forget=1, n_filters=2, n_test=1), [100], [0]), [1.0])
    found = activation_stats(state, Plan(perturb="joint"), neggrad_weights(state.problem, [0.5]))
    assert bool(found["deact_forget_same"].isnan().all())


def test_groups_share_out_every_filter_and_noise_vector() -> None:
    for setup in (SETUP, INDEPENDENT):
        total = sum(groups(trained(setup)).values())
        assert bool((total == 1).all())  # type: ignore[union-attr]


def test_the_share_turned_off_at_first_weights_is_the_error_function() -> None:
    """The closed form against the model, where its assumption holds: equal weights, noise that outweighs the signal."""
    problem = make_problem(Setup(n=40, n_forget=8, n_test=1), [16000], range(6))
    state = start(problem, [0.5])
    for c in (0.25, 0.5, 1.0):
        found = activation_stats(state, Plan(perturb="joint", c=c), neggrad_weights(problem, [0.8]))
        tau = thresholds.sam_radius(10, 40, 2, 1.0, 16000, c)
        expected = thresholds.deactivation_prob(tau, thresholds.first_std(16000), 10, 40)
        assert float(found["deact_retain_same"].mean()) == pytest.approx(expected, abs=0.06)


# --- thresholds -------------------------------------------------------------------------------------------------------


def crossing_by_hand(x: list[float], error: list[float], level: float) -> float:
    for i in range(len(x)):
        if error[i] <= level:
            if i == 0:
                return float("nan")
            return x[i - 1] + (error[i - 1] - level) / (error[i - 1] - error[i]) * (x[i] - x[i - 1])
    return float("nan")


def star_by_hand(x: list[float], error: list[float], level: float) -> float:
    for i in reversed(range(len(x))):
        if error[i] <= level:
            if i == len(x) - 1:
                return float("nan")
            share = (level - error[i]) / (error[i + 1] - error[i])
            return math.exp(math.log(x[i]) + share * math.log(x[i + 1] / x[i]))
    return float("nan")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=1, max_size=4), st.floats(0.05, 0.6))
def test_thresholds_are_the_crossings_of_a_loop(errors: list[list[float]], level: float) -> None:
    grid = [0.1, 0.3, 0.4, 0.8, 1.5, 4.0]
    firsts, stars = threshold(grid, np.array(errors), level), alpha_star(grid, np.array(errors), level)
    other = np.array([list(range(6))] * len(errors), dtype=float)
    there = at_alpha_star(grid, np.array(errors), other, level)
    for i, mine in enumerate(errors):
        assert firsts[i] == pytest.approx(crossing_by_hand(grid, mine, level), nan_ok=True)
        star = star_by_hand(grid, mine, level)
        assert stars[i] == pytest.approx(star, nan_ok=True)
        expected = float("nan") if math.isnan(star) else np.interp(math.log(star), np.log(grid), range(6))
        assert there[i] == pytest.approx(expected, nan_ok=True)


def test_thresholds_of_known_curves() -> None:
    assert threshold([1, 2, 3], np.array([0.3, 0.2, 0.0])) == pytest.approx(2.5)
    assert threshold([1, 2, 3], np.array([0.5, 0.05, 0.5])) == pytest.approx(1 + 0.4 / 0.45)
    assert np.isnan(threshold([1, 2], np.array([0.1, 0.0])))
    assert np.isnan(threshold([1, 2], np.array([0.5, 0.4])))
    assert alpha_star([0.01, 0.1, 1.0], np.array([0.0, 0.0, 0.2])) == pytest.approx(10**-0.5)
    assert np.isnan(alpha_star([0.01, 0.1], np.array([0.0, 0.0])))
    for bad in ([2.0, 1.0], []):
        with pytest.raises(UserError, match="rising"):
            threshold(bad, np.array([0.1] * len(bad)))
    with pytest.raises(UserError, match="above 0"):
        alpha_star([0.0, 1.0], np.array([0.0, 1.0]))
    with pytest.raises(UserError, match="2 values"):
        threshold([1.0, 2.0], np.array([0.1, 0.2, 0.3]))


def test_slopes_are_those_of_powers() -> None:
    x = np.array([10.0, 30.0, 200.0])
    assert slope(x, np.stack([3 * x**-0.25, x])).tolist() == pytest.approx([-0.25, 1.0])
    assert np.isnan(slope(x, np.array([1.0, np.nan, 2.0])))
    assert slope([1.0, 2.0, 4.0], np.array([1.0, 3.0, 5.0])) == pytest.approx(
        np.polyfit(np.log([1, 2, 4]), np.log([1, 3, 5]), 1)[0]
    )


def test_a_coarse_look_sees_the_network_later() -> None:
    state = start(make_problem(Setup(n=12, n_forget=4, n_test=10), [400], range(4)), [3.0])
    run(state, Plan(steps=60))
    fine, coarse = FirstTime(0.5), FirstTime(0.5, every=7)

    def watch(taken: int, now: State) -> None:
        fine(taken, now)
        coarse(taken, now)

    run(state, Plan(steps=140), [0.6], watch)
    assert fine.steps is not None
    assert coarse.steps is not None
    assert (coarse.steps == (fine.steps / 7).ceil() * 7)[fine.steps >= 0].all()


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_closed_forms_have_the_values_that_were_stated() -> None:
    for c, stated in ((0.25, 0.506), (0.5, 0.829), (1.0, 0.994)):
        for d in (1000, 20000):
            tau = thresholds.sam_radius(10, 40, 2, 1.0, d, c)
            found = thresholds.deactivation_prob(tau, thresholds.first_std(d), 10, 40)
            assert found == pytest.approx(stated, abs=5e-4)
            assert found == pytest.approx(math.erf(c * math.sqrt(30) / (math.sqrt(2) * 2)))
    assert thresholds.benign_index(thresholds.sgd_signal_threshold(8000, 40, 4, 0.7), 8000, 40, 4, 0.7) == (
        pytest.approx(1.05**4)
    )
    at = (8000, 20, 2, 1.0)
    assert thresholds.sgd_signal_threshold(*at) == pytest.approx(thresholds.sgd_signal_threshold_paper(*at), rel=0.01)
    assert thresholds.sam_signal_threshold(3, 0.5) == pytest.approx(1.4)
    assert thresholds.snr(7.0, 10000, 3, 0.5) == pytest.approx(0.07)


def test_the_deactivation_formula_is_the_chance_of_a_normal_variable() -> None:
    rng, tau, sigma_0, m, batch = np.random.default_rng(0), 0.3, 0.05, 4, 9
    x = np.abs(sigma_0 * rng.normal(size=400_000))  # in units of σ_p√d
    share = float((x <= tau / math.sqrt(m * batch)).mean())
    assert thresholds.deactivation_prob(tau, sigma_0, m, batch) == pytest.approx(share, abs=3e-3)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 50), st.integers(50, 1000), st.floats(500, 1e5))
def test_the_threshold_of_alpha_under_sam_solves_its_equation(m: int, n_forget: int, steps: int, d: float) -> None:
    x = thresholds.alpha_ce(m=m, n_forget=n_forget, eta=0.1, steps=steps, d=d, patches=3, sigma_p=0.7)
    right = 1.25 * m * math.sqrt(n_forget) * math.log(1 / x) / (0.1 * steps * (2 * 0.7) ** 2 * math.sqrt(d))
    assert x == pytest.approx(right, rel=1e-9)
    assert 0 < x < 1


def test_the_thresholds_of_alpha_have_the_stated_orders() -> None:
    how: dict[str, Any] = {"m": 10, "eta": 0.1, "steps": 200}
    assert thresholds.alpha_sgd(n=40, d=8000, **how) == pytest.approx(0.0098, abs=1e-4)
    assert thresholds.alpha_ce(n_forget=8, d=1000, **how) == pytest.approx(0.119, abs=1e-3)
    assert thresholds.alpha_sgd(n=40, d=8000, **how) / thresholds.alpha_sgd(n=40, d=4000, **how) == pytest.approx(0.5)
    with pytest.raises(UserError, match="n_forget"):
        thresholds.alpha_ce(n_forget=0, d=1000, **how)


def test_the_radius_of_a_plan_is_the_theorems() -> None:
    problem = make_problem(Setup(n=12, n_filters=3, n_patches=4, sigma_p=0.5, n_test=1), [100, 900], [0])
    expected = [0.5 * 3 * 12**0.5 / (4 * 0.5 * d**0.5) for d in (100, 900)]
    assert Plan(c=0.5).radius(problem, 12)[:, 0].tolist() == pytest.approx(expected)
    assert Plan(tau=0.03).radius(problem, 12)[:, 0].tolist() == pytest.approx([0.03, 0.03])
    assert pretrain_weights(problem).n_seen == 12
