"""The reduced model against vectors: sums by hand, finite differences, autograd, and `unsharp.SAM` on torch weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import unsharp
from unsharp.errors import UserError
from unsharp.theory import reference
from unsharp.theory.data import Problem, Setup, batch_orders, make_problem
from unsharp.theory.metrics import FirstTime
from unsharp.theory.model import State, error_on_test, start
from unsharp.theory.optim import Ascent, gd_step, sam_step
from unsharp.theory.reference import FullProblem
from unsharp.theory.track import kappa, zeta
from unsharp.theory.unlearn import PERTURBATIONS, Plan, forget_filters, neggrad_weights, pretrain_weights, run

SMALL = Setup(n=7, n_forget=2, n_filters=3, n_test=40, precision="float64")
KINDS = [
    SMALL,
    dataclasses.replace(SMALL, n_patches=4, flip=0.4),
    dataclasses.replace(SMALL, n_patches=4, noise="independent", flip=0.4),
    dataclasses.replace(SMALL, out_scale="sum", sigma_p=0.5, sigma_0=0.05),
]
IN_REFERENCE = [name for name in PERTURBATIONS if name != "sharp_minmax"]


def pair(setup: Setup, seed: int = 0, d: int = 120, phi: float = 4.0) -> tuple[FullProblem, State]:
    """The same problem with vectors and in coordinates of their span."""
    full = reference.make_full_problem(setup, d, phi, seed)
    return full, start(reference.reduce(full), [phi])


def lifted(full: FullProblem, state: State) -> Tensor:
    """The filters as vectors in R^d."""
    vectors = torch.cat([(full.signal / full.signal.norm())[None], full.noise.flatten(0, 1)])
    return full.first + state.coefficients[0, 0] @ vectors


def output_by_hand(setup: Setup, weights: np.ndarray, patches: np.ndarray) -> float:
    """f of one sample, term by term."""
    total = 0.0
    for f, w in enumerate(weights):
        for x in patches:
            total += (1 if f < setup.n_filters else -1) * max(0.0, float(w @ x))
    return total / setup.n_filters if setup.out_scale == "mean" else total


def loss_by_hand(full: FullProblem, weights: np.ndarray, omega: Sequence[float]) -> float:
    """Σ ω log(1 + e^{−yf}), term by term."""
    outputs = [output_by_hand(full.setup, weights, x) for x in full.patches.numpy()]
    return sum(w * np.log1p(np.exp(-y * f)) for w, y, f in zip(omega, full.labels.tolist(), outputs))


# --- outputs and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", KINDS, ids=["P=2", "shared", "independent", "sum"])
def test_outputs_and_losses_are_those_of_the_patches(setup: Setup) -> None:
    full, state = pair(setup)
    weights = full.first.numpy()
    for _ in range(2):
        point = state.point()
        by_hand = [output_by_hand(setup, weights, x) for x in full.patches.numpy()]
        assert point.outputs[0, 0].tolist() == pytest.approx(by_hand, abs=1e-12)
        margins = full.labels.numpy() * by_hand
        assert point.losses[0, 0].tolist() == pytest.approx(np.log1p(np.exp(-margins)), abs=1e-12)
        run(state, Plan(steps=3))
        weights = lifted(full, state).numpy()


@pytest.mark.parametrize("setup", KINDS, ids=["P=2", "shared", "independent", "sum"])
def test_the_gradient_is_the_difference_quotient_of_the_sum_by_hand(setup: Setup) -> None:
    full, state = pair(setup, d=40)
    run(state, Plan(steps=2))
    omega = torch.linspace(-1, 2, setup.n, dtype=torch.float64)
    at = lifted(full, state)
    vectors = torch.cat([(full.signal / full.signal.norm())[None], full.noise.flatten(0, 1)])
    found = (state.point().gradient(omega)[0, 0] @ vectors).numpy()
    rng, step = np.random.default_rng(0), 1e-6
    for _ in range(12):
        way = rng.normal(size=found.shape)
        ends = [loss_by_hand(full, at.numpy() + s * step * way, omega.tolist()) for s in (1, -1)]
        assert (found * way).sum() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-7)


def test_a_score_of_zero_is_active_for_neither_signal() -> None:
    _, state = pair(SMALL)
    scores = torch.zeros_like(state.scores())
    assert state.point(scores).gradient(torch.ones(SMALL.n)).abs().max() == 0


def test_test_error_counts_both_signals_and_ties_as_errors() -> None:
    for setup in KINDS:
        full, state = pair(setup, phi=2.0)
        run(state, Plan(steps=4))
        weights, wrong = lifted(full, state).numpy(), 0
        for noise, sign in itertools.product(full.test_noise.numpy(), (1, -1)):
            others = [noise[0]] * (setup.n_patches - 1) if setup.noise == "shared" else list(noise)
            wrong += sign * output_by_hand(setup, weights, [sign * full.signal.numpy(), *others]) <= 0  # type: ignore[arg-type]
        assert float(error_on_test(state)[0, 0]) == pytest.approx(wrong / (2 * setup.n_test))
        assert error_on_test(state, room=1).tolist() == error_on_test(state).tolist()
    nothing = dataclasses.replace(state.problem, weights=torch.zeros_like(state.problem.weights))
    assert float(error_on_test(start(nothing, [1.0]))[0, 0]) == 1.0


# --- whole runs against autograd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", IN_REFERENCE)
@pytest.mark.parametrize("setup", KINDS, ids=["P=2", "shared", "independent", "sum"])
def test_unlearning_is_that_of_autograd_on_the_vectors(setup: Setup, perturb: str) -> None:
    full, state = pair(setup, d=300)
    run(state, Plan(perturb=perturb, steps=12, eta=0.2, tau=0.3), [0.7])
    *_, weights = reference.neggrad(full, alpha=0.7, tau=0.3, perturb=perturb, eta=0.2, steps=12)
    moved = (weights - full.first).abs().max()
    assert moved > 0.02
    assert (lifted(full, state) - weights).abs().max() <= 1e-10
    solved_kappa, solved_zeta, rest = reference.solve_coefficients(full, weights)
    assert rest <= 1e-10
    assert torch.allclose(kappa(state)[0, 0], solved_kappa, rtol=1e-9, atol=1e-10)
    assert torch.allclose(zeta(state)[0, 0], solved_zeta, rtol=1e-9, atol=1e-8)
    assert float(error_on_test(state)[0, 0]) == pytest.approx(reference.error_on_test(full, weights))


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_training_is_that_of_autograd_on_the_vectors(tau: float) -> None:
    full, state = pair(KINDS[1], d=300)
    run(state, Plan(perturb="joint", steps=15, tau=tau))
    weights = reference.train(full, tau=tau, eta=0.1, steps=15)
    assert (lifted(full, state) - weights).abs().max() <= 1e-10


def test_the_reference_perturbs_as_it_is_written() -> None:
    """The loss and its gradient of the reference against the sum by hand; every ε has length τ."""
    full, _ = pair(KINDS[2], d=30)
    omega = torch.linspace(-1, 1, full.setup.n, dtype=torch.float64)
    by_hand = loss_by_hand(full, full.first.numpy(), omega.tolist())
    assert float(reference.loss(full, full.first, omega)) == pytest.approx(by_hand)
    g = reference.gradient(full, full.first, omega)
    offset = reference.perturbed(full, full.first, omega, 0.4) - full.first
    assert torch.allclose(offset, 0.4 * g / g.norm())


def test_float32_stays_near_float64() -> None:
    single = make_problem(Setup(n=10, n_forget=3), [500], range(3))
    double = make_problem(Setup(n=10, n_forget=3, precision="float64"), [500], range(3))
    assert torch.equal(double.gram.float(), single.gram)
    ends = []
    for problem in (single, double):
        state = start(problem, [2.0, 5.0])
        run(state, Plan(perturb="ce", steps=40), [0.9])
        ends.append(state)
    assert ends[0].coefficients.dtype == torch.float32
    for read in (kappa, zeta):
        a, b = read(ends[0]).double(), read(ends[1])
        assert (a - b).abs().max() <= 2e-4 * b.abs().max()


# --- the forms of a step ----------------------------------------------------------------------------------------------


def torch_sam(
    full: FullProblem, omegas: Sequence[tuple[Tensor, str]], rho: float, lam: float, eta: float, adaptive: bool = False
) -> Tensor:
    """One step of `unsharp.SAM` on torch weights for each part, from the same weights, the moves added."""
    total = full.first.clone()
    for omega, sign in omegas:
        weights = torch.nn.Parameter(full.first.clone())
        optimizer = unsharp.SAM([weights], rho=rho, lam=lam, sign=sign, adaptive=adaptive, lr=eta)  # type: ignore[arg-type]

        def closure(weights: Tensor = weights, omega: Tensor = omega, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = reference.loss(full, weights, omega)
            loss.backward()
            return loss

        optimizer.step(closure)
        total += weights.detach() - full.first
    return total


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.sampled_from([1.0, 0.5, 2.0]), st.sampled_from(["min", "max"]), st.floats(0.01, 1.0))
def test_the_lambda_form_is_that_of_the_optimiser_on_torch_weights(
    seed: int, lam: float, sign: str, tau: float
) -> None:
    full, state = pair(KINDS[1], seed)
    omega = torch.linspace(-1, 1, full.setup.n, dtype=torch.float64)
    sam_step(state, omega, 0.3, Ascent(torch.tensor(tau, dtype=torch.float64), lam), 1 if sign == "min" else -1)
    assert torch.allclose(lifted(full, state), torch_sam(full, [(omega, sign)], tau, lam, 0.3), atol=1e-12)


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_minmax_raises_sharpness_on_forget_alone(lam: float) -> None:
    full, state = pair(SMALL)
    retain, forget = reference.term_weights(full, 0.6)
    run(state, Plan(perturb="minmax", steps=1, tau=0.2, lam=lam), [0.6])
    by_torch = torch_sam(full, [(retain, "min"), (forget, "max")], 0.2, lam, 0.1)
    assert torch.allclose(lifted(full, state), by_torch, atol=1e-12)


def test_gradient_descent_is_sam_of_radius_zero() -> None:
    _, state = pair(SMALL)
    other = state.copy()
    omega = pretrain_weights(state.problem).retain
    gd_step(state, omega, 0.1)
    sam_step(other, omega, 0.1, Ascent(torch.tensor(0.0)))
    assert torch.equal(state.coefficients, other.coefficients)


def test_scaling_by_filter_norms_is_that_of_the_reference() -> None:
    for setup in KINDS:
        full, state = pair(setup)
        run(state, Plan(perturb="retain", steps=6, tau=2.0, adaptive=True), [0.8])
        how: dict[str, Any] = {"alpha": 0.8, "tau": 2.0, "perturb": "retain", "eta": 0.1, "steps": 6}
        *_, weights = reference.neggrad(full, **how, scaling="filter")
        *_, plain = reference.neggrad(full, **how)
        assert (lifted(full, state) - weights).abs().max() <= 1e-10
        assert (weights - plain).abs().max() > 1e-3


def test_scaling_by_single_weights_is_that_of_the_optimiser_and_leaves_the_span() -> None:
    full, _ = pair(SMALL)
    omega = torch.linspace(-1, 1, full.setup.n, dtype=torch.float64)
    at = reference.perturbed(full, full.first, omega, 0.5, "element")
    weights = full.first - 0.1 * reference.gradient(full, at, omega)
    assert torch.allclose(weights, torch_sam(full, [(omega, "min")], 0.5, 1.0, 0.1, adaptive=True), atol=1e-12)
    basis = torch.linalg.qr(torch.cat([full.signal[None], full.noise.flatten(0, 1), full.first]).T)[0]
    offset = at - full.first
    assert (offset - offset @ basis @ basis.T).norm() > 0.1 * offset.norm()


def test_where_the_gradient_is_zero_nothing_moves() -> None:
    _, state = pair(SMALL)
    before = state.coefficients
    for perturb in PERTURBATIONS:
        if perturb != "sharp_minmax":
            other = state.copy()
            run(other, Plan(perturb=perturb, steps=2, tau=1.0), [1.0])
            assert bool(other.coefficients.isfinite().all())
    sam_step(state, torch.zeros(SMALL.n, dtype=torch.float64), 0.1, Ascent(torch.tensor(1.0), adaptive=True))
    assert torch.equal(state.coefficients, before)


def test_alpha_cancels_in_the_ascent_of_a_single_term() -> None:
    """From the same weights, the retain part of `sep` moves in proportion to α."""
    moves = []
    for alpha in (0.2, 0.8):
        _, state = pair(SMALL)
        run(state, Plan(perturb="retain", steps=1, tau=0.3), [alpha])
        _, other = pair(SMALL)
        weights = neggrad_weights(other.problem, [alpha])
        moves.append((state.coefficients + 0.1 * other.point().gradient(weights.forget)) / alpha)
    assert torch.allclose(moves[0], moves[1], atol=1e-12)


# --- regions ----------------------------------------------------------------------------------------------------------


def test_sharp_minmax_splits_the_filters_and_keeps_each_part_to_its_own() -> None:
    full, state = pair(dataclasses.replace(SMALL, n_filters=5), phi=3.0)
    retain, forget = reference.term_weights(full, 0.6)
    mask = forget_filters(state, 0.3)[0, 0]
    norms = reference.gradient(full, full.first, forget).norm(dim=1)
    assert sorted(mask.nonzero().flatten().tolist()) == sorted(norms.argsort(descending=True)[:3].tolist())
    weights = full.first
    for _ in range(5):
        total = torch.zeros_like(weights)
        for omega, sign, kept in ((retain, 1, 1 - mask), (forget, -1, mask)):
            here = reference.gradient(full, weights, omega)
            inside = here * kept[:, None]
            ahead = reference.gradient(full, weights + 0.4 * inside / inside.norm(), omega)
            total += (here + sign * (ahead - here)) * kept[:, None]
        weights = weights - 0.1 * total
    run(state, Plan(perturb="sharp_minmax", steps=5, tau=0.4, fraction=0.3), [0.6])
    assert (lifted(full, state) - weights).abs().max() <= 1e-12


def test_the_split_is_made_once_and_leaves_both_sides_a_filter() -> None:
    _, state = pair(SMALL)
    for fraction, n in ((0.01, 1), (0.5, 3), (0.99, 5)):
        assert float(forget_filters(state, fraction).sum()) == n
    alone = state.copy()
    run(alone, Plan(perturb="sharp_minmax", steps=4, tau=0.1), [1.0])
    still = forget_filters(state, 0.3)[0, 0] == 1
    assert alone.coefficients[0, 0][still].abs().max() == 0  # α = 1 has no forget term
    assert alone.coefficients[0, 0][~still].abs().max() > 0


# --- mini-batches -----------------------------------------------------------------------------------------------------


def test_batches_of_neggrad_zip_retain_with_forget_going_round() -> None:
    setup = Setup(n=13, n_forget=3, n_filters=3, n_test=5, precision="float64")
    full = reference.make_full_problem(setup, 200, 3.0, 0)
    problem = reference.reduce(full)
    state = start(problem, [3.0])
    run(state, Plan(steps=3, batch_size=2), [0.6])
    retain, forget = batch_orders(problem, 3, split=True)
    weights = full.first
    for epoch in range(3):
        assert sorted(retain[0, epoch].tolist()) == list(range(3, 13))
        assert sorted(forget[0, epoch].tolist()) == [0, 1, 2]
        batches = retain[0, epoch].split(2), forget[0, epoch].split(2)
        assert len(batches[0]) == 5
        for r, f in zip(batches[0], itertools.cycle(batches[1])):
            omega = torch.zeros(13, dtype=torch.float64)
            omega[r] = 0.6 / len(r)
            omega[f] = -0.4 / len(f)
            weights = weights - 0.1 * reference.gradient(full, weights, omega)
    assert (lifted(full, state) - weights).abs().max() <= 1e-12
    assert not torch.equal(retain[0, 0], retain[0, 1])


def test_batches_of_training_cover_all_samples_and_set_the_radius() -> None:
    setup = Setup(n=11, n_forget=2, n_filters=3, n_test=5, precision="float64")
    full = reference.make_full_problem(setup, 200, 3.0, 0)
    problem = reference.reduce(full)
    state = start(problem, [3.0])
    run(state, Plan(perturb="joint", steps=2, batch_size=4, c=0.5))
    order, none = batch_orders(problem, 2, split=False)
    assert none.shape == (1, 2, 0)
    weights = full.first
    for epoch in range(2):
        assert sorted(order[0, epoch].tolist()) == list(range(11))
        for chosen in order[0, epoch].split(4):
            omega = torch.zeros(11, dtype=torch.float64)
            omega[chosen] = 1 / len(chosen)
            tau = 0.5 * 3 * len(chosen) ** 0.5 / (2 * 200**0.5)
            weights = weights - 0.1 * reference.gradient(full, reference.perturbed(full, weights, omega, tau), omega)
    assert (lifted(full, state) - weights).abs().max() <= 1e-12


def test_one_batch_of_all_is_no_batches() -> None:
    problem = make_problem(SMALL, [100], range(2))
    ends = []
    for size in (None, SMALL.n):
        state = start(problem, [2.0])
        run(state, Plan(perturb="joint", steps=5, batch_size=size), [0.7])
        ends.append(state.coefficients)
    assert torch.allclose(*ends, atol=1e-14)


# --- the data ---------------------------------------------------------------------------------------------------------


def test_inner_products_have_the_law_of_real_vectors() -> None:
    """Entries of the reduced Gram matrix, first scores, and scores of fresh noise, against vectors in R^d."""
    setup, d, n_draws = Setup(n=3, n_filters=2, n_test=1, sigma_p=1.5, sigma_0=0.3), 12, 400
    problem = make_problem(setup, [d], range(n_draws))
    fresh = (problem.weights @ problem.test_noise)[..., 0]
    rng = np.random.default_rng(1)
    noise, weights = 1.5 * rng.normal(size=(n_draws, 3, d)), 0.3 * rng.normal(size=(n_draws, 4, d))
    new = 1.5 * rng.normal(size=(n_draws, d))
    pairs = {
        "length": (problem.gram[:, 1, 1], (noise[:, 0] ** 2).sum(-1)),
        "last length": (problem.gram[:, 3, 3], (noise[:, 2] ** 2).sum(-1)),
        "inner": (problem.gram[:, 1, 3], (noise[:, 0] * noise[:, 2]).sum(-1)),
        "signal": (problem.gram[:, 0, 2], noise[:, 1, 0]),
        "score": (problem.scores[:, 3, 2], (weights[:, 3] * noise[:, 1]).sum(-1)),
        "score of the signal": (problem.scores[:, 1, 0], weights[:, 1, 0]),
        "fresh": (fresh[:, 2], (weights[:, 2] * new).sum(-1)),
        "filters": ((problem.weights[:, 0] * problem.weights[:, 3]).sum(-1), (weights[:, 0] * weights[:, 3]).sum(-1)),
    }
    for name, (ours, theirs) in pairs.items():
        assert stats.ks_2samp(ours.numpy(), theirs).pvalue > 1e-3, name


def test_a_seed_draws_the_same_whatever_stands_beside_it() -> None:
    alone = make_problem(SMALL, [200], [5])
    among = make_problem(SMALL, [100, 200], [4, 5, 6])
    where = list(zip(among.d, among.seed)).index((200, 5))
    for name in ("clean", "labels", "vectors", "weights", "test_noise", "gram", "scores"):
        assert torch.equal(getattr(alone, name)[0], getattr(among, name)[where])
    run(a := start(alone, [3.0]), Plan(perturb="ce", steps=5), [0.8])
    run(b := start(among, [1.0, 3.0]), Plan(perturb="ce", steps=5), [0.8])
    assert torch.allclose(a.coefficients[0, 0], b.coefficients[where, 1], atol=1e-14)


def test_orders_of_batches_are_the_problems_own() -> None:
    alone, among = make_problem(SMALL, [200], [5]), make_problem(SMALL, [100, 200], [4, 5])
    for split in (True, False):
        one, all_ = batch_orders(alone, 6, split=split), batch_orders(among, 6, split=split)
        for a, b in zip(one, all_):
            assert torch.equal(a[0], b[3])
        assert not torch.equal(all_[0][2], all_[0][3])  # another seed
        assert not torch.equal(all_[0][1], all_[0][3])  # another dimension


def test_what_a_seed_draws_depends_on_d_n_m_alone() -> None:
    base = make_problem(SMALL, [200], [0])
    same = dataclasses.replace(SMALL, sigma_p=2.0, sigma_0=0.1, n_patches=5, n_forget=1, flip=0.5)
    other = make_problem(same, [200], [0])
    assert torch.equal(base.clean, other.clean)
    assert torch.allclose(base.vectors[:, 1:], other.vectors[:, 1:] / 2)
    assert torch.allclose(base.weights * (600**0.5), other.weights * 10)
    for changed, d, seed in ((SMALL, 201, 0), (SMALL, 200, 1), (dataclasses.replace(SMALL, n_filters=4), 200, 0)):
        assert not torch.equal(base.vectors[0, 1, :3], make_problem(changed, [d], [seed]).vectors[0, 1, :3])


def test_flipped_labels_are_flipped_under_a_larger_chance_too() -> None:
    labels = []
    for flip in (0.0, 0.1, 0.3):
        problem = make_problem(Setup(n=400, n_filters=1, flip=flip, n_test=1), [500], range(5))
        labels.append((problem.labels != problem.clean).numpy())
    assert not labels[0].any()
    assert labels[1].mean() == pytest.approx(0.1, abs=0.03)
    assert labels[2].mean() == pytest.approx(0.3, abs=0.04)
    assert (labels[1] <= labels[2]).all()


def test_flipped_labels_are_learnt_as_noise_and_leave_the_test_labels_clean() -> None:
    problem = make_problem(Setup(n=20, flip=0.15), [8000], range(6))
    state = start(problem, [10.0])
    run(state, Plan(steps=300))
    assert float((state.point().margins <= 0).double().mean()) == 0.0
    assert float(error_on_test(state).mean()) < 0.2  # under flipped test labels it could not fall so far


def test_noise_kinds_coincide_for_two_patches_and_differ_for_three() -> None:
    for n_patches, equal in ((2, True), (3, False)):
        ends = []
        for kind in ("shared", "independent"):
            setup = dataclasses.replace(SMALL, n_patches=n_patches, noise=kind)  # type: ignore[arg-type]
            state = start(make_problem(setup, [300], [0]), [3.0])
            run(state, Plan(steps=5), [0.8])
            ends.append(float(kappa(state).sum()))
        assert (ends[0] == ends[1]) is equal


# --- coefficients -----------------------------------------------------------------------------------------------------


def test_coefficients_count_from_the_reference() -> None:
    full, state = pair(SMALL)
    run(state, Plan(steps=5))
    trained = lifted(full, state)
    before = kappa(state), zeta(state)
    state.reset_reference()
    assert kappa(state).abs().max() == 0
    assert zeta(state).abs().max() == 0
    run(state, Plan(steps=4), [0.5])
    solved_kappa, solved_zeta, rest = reference.solve_coefficients(full, lifted(full, state), trained)
    assert rest < 1e-10
    assert torch.allclose(kappa(state)[0, 0], solved_kappa, atol=1e-9)
    assert torch.allclose(zeta(state)[0, 0], solved_zeta, atol=1e-7)
    whole = reference.solve_coefficients(full, lifted(full, state))
    assert torch.allclose(before[0][0, 0] + solved_kappa, whole[0], atol=1e-9)
    assert torch.allclose(before[1][0, 0] + solved_zeta, whole[1], atol=1e-7)


def test_the_other_convention_of_the_noise_coefficients() -> None:
    full, state = pair(KINDS[1])
    run(state, Plan(steps=3))
    vectors = full.noise.flatten(0, 1)
    of_noise = lifted(full, state) - full.first
    of_noise = of_noise - kappa(state)[0, 0][:, None] * state.problem.filter_signs[:, None] * full.signal / 16
    for convention, factor in (("plain", 1.0), ("chen", 1 / 3)):
        found = zeta(state, convention)[0, 0]  # type: ignore[arg-type]
        assert torch.allclose(factor * found @ (vectors / vectors.square().sum(1, keepdim=True)), of_noise, atol=1e-10)
    with pytest.raises(UserError, match="convention"):
        zeta(state, "other")  # type: ignore[arg-type]


def test_the_update_of_the_coefficients_is_the_one_of_the_paper() -> None:
    """κ ← κ − ηj‖φ‖²c_φ and ζ ← ζ − η‖ξ‖²c_i, with c of the gradient in φ and ξ."""
    full, state = pair(SMALL)
    omega = pretrain_weights(state.problem).retain
    g = reference.gradient(full, full.first, omega.expand(SMALL.n))
    columns = torch.cat([full.signal[None], full.noise.flatten(0, 1)]).T
    c = torch.linalg.lstsq(columns, g.T).solution.T
    gd_step(state, omega, 0.1)
    assert torch.allclose(kappa(state)[0, 0], -0.1 * state.problem.filter_signs * 16 * c[:, 0], atol=1e-12)
    lengths = full.noise.flatten(0, 1).square().sum(1)
    assert torch.allclose(zeta(state)[0, 0], -0.1 * lengths * c[:, 1:], atol=1e-10)


def test_the_first_time_is_kept_for_each_network_by_itself() -> None:
    setup = Setup(n=10, n_forget=4, n_test=50)
    problem = make_problem(setup, [400], range(3))
    state, watched, seen = start(problem, [2.0, 4.0]), FirstTime(0.5), []

    def watch(taken: int, now: State) -> None:
        watched(taken, now)
        wrong = (now.point().margins[..., :4] <= 0).double().mean(-1)
        seen.append((wrong, error_on_test(now)))

    run(state, Plan(steps=60, perturb="joint"))
    state.reset_reference()
    run(state, Plan(steps=60), [0.6], watch)
    found = watched.test_error(state)
    assert watched.steps is not None
    for b, v in itertools.product(range(3), range(2)):
        first = next((t for t, (wrong, _) in enumerate(seen) if wrong[b, v] >= 0.5), None)
        assert int(watched.steps[b, v]) == (-1 if first is None else first)
        expected = float("nan") if first is None else float(seen[first][1][b, v])
        assert float(found[b, v]) == pytest.approx(expected, nan_ok=True)
    assert len({int(s) for s in watched.steps.flatten()}) > 1
    assert watched.share_reached() == pytest.approx(float((watched.steps >= 0).double().mean()))


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, Callable[[], object]] = {
    "n must be at least 1": lambda: Setup(n=0),
    "n_forget must lie in": lambda: Setup(n=5, n_forget=5),
    "n_patches must be at least 2": lambda: Setup(n_patches=1),
    "sigma_p must be": lambda: Setup(sigma_p=0.0),
    "sigma_0 must be": lambda: Setup(sigma_0=float("nan")),
    "flip must lie in": lambda: Setup(flip=1.0),
    "noise must be one of": lambda: Setup(noise="both"),  # type: ignore[arg-type]
    "out_scale must be one of": lambda: Setup(out_scale="max"),  # type: ignore[arg-type]
    "precision must be one of": lambda: Setup(precision="float16"),  # type: ignore[arg-type]
    "d must exceed": lambda: make_problem(SMALL, [14], [0]),
    "seeds must be at least 0": lambda: make_problem(SMALL, [100], [-1]),
    "must name at least one": lambda: make_problem(SMALL, [100], []),
    "phi must name": lambda: start(make_problem(SMALL, [100], [0]), [1.0, 0.0]),
    "unknown perturb 'cee'; did you mean 'ce'": lambda: Plan(perturb="cee"),
    "steps must be": lambda: Plan(steps=-1),
    "eta must be": lambda: Plan(eta=0.0),
    "tau must be": lambda: Plan(tau=-0.1),
    "c must be": lambda: Plan(c=float("inf")),
    "lam must be": lambda: Plan(lam=-1.0),
    "batch_size must be": lambda: Plan(batch_size=0),
    "fraction must lie in": lambda: Plan(fraction=1.0),
    "alpha must lie in": lambda: run(start(make_problem(SMALL, [100], [0]), [1.0]), Plan(), [1.1]),
    "needs forget samples": lambda: run(start(make_problem(Setup(), [100], [0]), [1.0]), Plan(), [0.9]),
    "is a way to unlearn": lambda: run(start(make_problem(SMALL, [100], [0]), [1.0]), Plan(perturb="sharp_minmax")),
    "phi must be above 0": lambda: reference.make_full_problem(SMALL, 50, 0.0, 0),
    "the reference knows": lambda: [*reference.neggrad(
        reference.make_full_problem(SMALL, 50, 1.0, 0), alpha=0.5, tau=0.1, perturb="sharp_minmax", eta=0.1, steps=1
    )],
    "scaling must be one of": lambda: reference.perturbed(
        reference.make_full_problem(SMALL, 50, 1.0, 0), torch.ones(6, 50).double(), torch.ones(7), 0.1, "layer"  # type: ignore[arg-type]
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_refused(message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        MISTAKES[message]()


def test_other_labels_may_be_given() -> None:
    problem: Problem = make_problem(SMALL, [100], [0])
    turned = problem.with_labels(-problem.labels)
    assert torch.equal(start(turned, [1.0]).point().margins, -start(problem, [1.0]).point().margins)
