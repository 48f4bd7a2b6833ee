"""Randomised smoothing: against the same noise summed by hand, and against what its mean is for polynomials."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from contract import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_points import Place, network, poisons
from torch import Tensor

from unsharp import runtime
from unsharp.errors import UserError
from unsharp.phases import RETAIN, CrossEntropy, Phase
from unsharp.sharpness import NoRule
from unsharp.sharpness.randomized_smoothing import RandomizedSmoothing

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
sigmas = st.floats(1e-3, 1.0)
lams = st.sampled_from([1.0, 0.5, 2.0])
signs = st.sampled_from(["min", "max"])


def noise_by_hand(place: Place, torch_seed: int, step: int, n: int) -> list[Tensor]:
    """n draws of standard normal noise for all weights, from the seed and the step alone."""
    words = np.random.SeedSequence(torch_seed, spawn_key=(step,)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(words[0]) // 2)
    return [
        torch.cat([torch.randn(p.shape, generator=generator, dtype=p.dtype).flatten() for p in place.params])
        for _ in range(n)
    ]


@quick
@given(
    seeds,
    sigmas,
    lams,
    signs,
    st.sampled_from(["region", "all"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_it_is_the_mean_over_the_noise_summed_by_hand(
    seed: int, sigma: float, lam: float, sign: Any, perturb: Any, masked: bool, antithetic: bool, n: int, step: int
) -> None:
    place = network(seed, masked=masked)
    meant = place.moves if perturb == "region" else 1.0
    rule = RandomizedSmoothing(sigma=sigma, n_samples=n, antithetic=antithetic, lam=lam, sign=sign, perturb=perturb)
    torch.manual_seed(seed)
    found = place.result(rule, step=step)
    offsets = [sigma * meant * z for z in noise_by_hand(place, seed, step, n)]
    if antithetic:
        offsets = [s * o for o in offsets for s in (1, -1)]
    g0 = place.gradient(place.w).detach()
    flat = torch.stack([place.gradient(place.w + o).detach() for o in offsets]).mean(0)
    expected = g0 + {"min": 1, "max": -1}[sign] * lam * (flat - g0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(torch.stack(place.visited[1:]), torch.stack([place.w + o for o in offsets]))
    assert len(place.visited) == rule.passes == 1 + len(offsets)
    assert torch.equal(place.visited[0], place.w)


def quadratic() -> Place:
    torch.manual_seed(0)
    a = torch.randn(4, 4, dtype=torch.float64)
    return Place(lambda p: p[0] @ (a + a.T) @ p[0] / 2, [torch.randn(4, dtype=torch.float64)])


def cubic() -> tuple[Place, Tensor]:
    """L = Σ T_ijk w_i w_j w_k for a symmetric T, and T."""
    torch.manual_seed(1)
    t = torch.randn(3, 3, 3, dtype=torch.float64)
    t = sum(t.permute(*order) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)))  # type: ignore[assignment]

    def loss(p: Sequence[Tensor]) -> Tensor:
        return torch.einsum("ijk,i,j,k", t, p[0], p[0], p[0])

    return Place(loss, [torch.randn(3, dtype=torch.float64)]), t


def test_the_mean_over_noise_of_a_quadratic_is_its_gradient() -> None:
    """Linear gradients: with each draw and its opposite to the last digit, else within the noise's own spread."""
    place = quadratic()
    plain = place.result(NoRule())
    torch.testing.assert_close(place.result(RandomizedSmoothing(sigma=0.5, antithetic=True)), plain)
    n = 2000
    a = torch.stack([place.gradient(e) - place.gradient(0 * e) for e in torch.eye(4, dtype=torch.float64)]).detach()
    spread = 0.5 * a.norm(dim=1) / math.sqrt(n)
    far = (place.result(RandomizedSmoothing(sigma=0.5, n_samples=n)) - plain) / spread
    assert far.abs().max() < 4
    assert far.abs().max() > 0.1


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_mean_over_noise_of_a_cubic_is_the_closed_form(antithetic: bool) -> None:
    """∇ᵢ = 3·T_ijk w_j w_k, and E over noise adds 3σ²·T_ijj."""
    place, t = cubic()
    n, sigma = 3000, 0.7
    found = place.result(RandomizedSmoothing(sigma=sigma, n_samples=n, antithetic=antithetic))
    gradients = torch.stack([place.gradient(at).detach() for at in place.visited[1:]])
    if antithetic:
        gradients = gradients.view(n, 2, -1).mean(1)
    spread = gradients.std(0) / math.sqrt(n)
    exact = place.gradient(place.w).detach() + 3 * sigma**2 * torch.einsum("ijj->i", t)
    assert ((found - exact) / spread).abs().max() < 4
    assert ((found - place.result(NoRule())) / spread).abs().max() > 10


def test_the_noise_is_a_function_of_seed_and_step_and_of_nothing_else() -> None:
    """Processes whose dropout took other amounts of randomness draw the same; a state put back brings it back."""
    rule, place = RandomizedSmoothing(sigma=0.3), network(0)

    def at(seed: int, step: int, used: int = 0) -> Tensor:
        torch.manual_seed(seed)
        torch.rand(used)
        before = torch.get_rng_state()
        found = place.result(rule, step=step)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    first = at(5, 3)
    assert torch.equal(at(5, 3, used=17), first)
    assert not torch.allclose(at(5, 4), first)
    assert not torch.allclose(at(6, 3), first)
    torch.manual_seed(5)
    state = runtime.rng_state(torch.device("cpu"))
    torch.manual_seed(99)
    runtime.set_rng_state(state, torch.device("cpu"))
    assert torch.equal(place.result(rule, step=3), first)


def test_the_draws_of_a_step_and_of_steps_are_independent_normal_numbers() -> None:
    place = Place(lambda p: (p[0] ** 2).sum(), [torch.zeros(500, dtype=torch.float64)])
    draws = []
    for step in range(20):
        place.result(RandomizedSmoothing(sigma=2.0, n_samples=2), step=step)
        draws += place.visited[1:]
    z = torch.stack(draws) / 2
    assert float(z.mean()) == pytest.approx(0, abs=4 / math.sqrt(z.numel()))
    assert float(z.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / z.numel()))
    correlation = torch.corrcoef(z) - torch.eye(40)
    assert correlation.abs().max() < 5 / math.sqrt(500)


def test_in_the_engine_statistics_and_dropout_are_those_of_rule_none() -> None:
    states = []
    for rule in (NoRule(), RandomizedSmoothing(sigma=0.05)):
        loop = cases.make_loop(cases.network(), "finetune", rule, cases.images(), epochs=1)
        ((turn, taken, batches), *_) = list(loop._batches())
        loop._step(turn, taken, batches)
        states.append(({n: b.clone() for n, b in loop.model.named_buffers()}, torch.get_rng_state()))
    (buffers, state), (plain, plain_state) = states
    assert all(torch.equal(buffers[n], plain[n]) for n in plain)
    assert torch.equal(state, plain_state)


@pytest.mark.parametrize("strength", ["sigma", "lam"])
def test_strength_zero_is_the_plain_gradient_to_the_bit_in_one_pass(strength: str) -> None:
    place = network(1, masked=True)
    plain = place.result(NoRule())
    off = RandomizedSmoothing(**{strength: 0.0}, sign="max")  # type: ignore[arg-type]
    assert torch.equal(place.result(off), plain)
    assert len(place.visited) == off.passes == 1


def test_a_break_in_any_pass_shows_in_the_gradient() -> None:
    rule = RandomizedSmoothing(n_samples=2, antithetic=True)
    for form in (rule, rule.turned(), dataclasses.replace(rule, lam=0.5)):
        for which in range(5):
            for poison in poisons():
                place = network(3, masked=True)
                place.poison = {which: poison}
                before = place.w
                assert not place.result(form).isfinite().all()
                assert torch.equal(place.w, before)


def test_what_makes_no_sense_is_refused() -> None:
    for bad in ({"sigma": -1.0}, {"sigma": math.inf}, {"n_samples": 0}, {"lam": math.nan}, {"every": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            RandomizedSmoothing(**bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="perturbation"):
        Phase(
            objective=CrossEntropy({RETAIN: 1.0}),
            perturb_objective=CrossEntropy({RETAIN: 2.0}),
            rule=RandomizedSmoothing(),
        )
