"""The two penalties: exact gradients of the penalised losses, found by differences of those losses themselves."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from contract import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_points import Place, network, poisons
from torch import Tensor, nn

from unsharp.errors import UserError
from unsharp.phases import RETAIN, CrossEntropy, Moment, Phase
from unsharp.sharpness import NoRule, Rule, Sharpness
from unsharp.sharpness.curvature import CurvaturePenalty
from unsharp.sharpness.gradient_penalty import GradientPenalty

quick = settings(deadline=None, max_examples=12)
seeds = st.integers(0, 2**31)
weights = st.floats(0.01, 2.0)
lams = st.sampled_from([1.0, 0.5, 2.0])
signs = st.sampled_from(["min", "max"])
scopes = st.sampled_from(["region", "all"])


def expected(place: Place, rule: Any, penalised: Callable[[Tensor], Tensor]) -> Tensor:
    """g₀ + s·λ·(ĝ − g₀), with ĝ by differences."""
    g0, flat = place.gradient(place.w).detach(), place.by_differences(penalised)
    return g0 + {"min": 1, "max": -1}[rule.sign] * rule.lam * (flat - g0)


@quick
@given(seeds, weights, lams, signs, scopes, st.booleans())
def test_the_gradient_penalty_is_the_derivative_of_the_penalised_loss(
    seed: int, penalty: float, lam: float, sign: Any, perturb: Any, masked: bool
) -> None:
    place = network(seed, masked=masked)
    meant = place.moves if perturb == "region" else 1.0
    rule = GradientPenalty(penalty=penalty, lam=lam, sign=sign, perturb=perturb)

    def penalised(w: Tensor) -> Tensor:
        return place.value(w) + penalty * (meant * place.gradient(w).detach()).norm()

    found = place.result(rule)
    torch.testing.assert_close(found, expected(place, rule, penalised), rtol=1e-5, atol=1e-7)
    assert len(place.visited) == 1
    assert not torch.allclose(found, place.result(NoRule()), rtol=1e-3)


@quick
@given(seeds, weights, lams, signs, scopes, st.booleans(), st.floats(0.05, 1.0))
def test_the_curvature_penalty_is_the_derivative_of_the_penalised_loss_with_the_way_held_fixed(
    seed: int, penalty: float, lam: float, sign: Any, perturb: Any, masked: bool, distance: float
) -> None:
    place = network(seed, masked=masked)
    meant = place.moves if perturb == "region" else 1.0
    rule = CurvaturePenalty(penalty=penalty, distance=distance, lam=lam, sign=sign, perturb=perturb)
    way = meant * place.gradient(place.w).detach()
    way = distance * way / way.norm()

    def penalised(w: Tensor) -> Tensor:
        return place.value(w) + penalty * (meant * (place.gradient(w + way) - place.gradient(w)).detach()).norm()

    before = place.w
    found = place.result(rule)
    torch.testing.assert_close(found, expected(place, rule, penalised), rtol=1e-5, atol=1e-6)
    assert torch.equal(place.w, before)
    torch.testing.assert_close(torch.stack(place.visited), torch.stack([before, before + way, before]))
    assert not torch.allclose(found, place.result(NoRule()), rtol=1e-4)


@quick
@given(seeds)
def test_sam_and_the_gradient_penalty_agree_to_first_order_in_the_radius(seed: int) -> None:
    """Half the radius leaves a quarter of the difference."""
    place = network(seed)
    distances = [
        float((place.result(Sharpness(rho=rho)) - place.result(GradientPenalty(penalty=rho))).norm())
        for rho in (2e-3, 1e-3)
    ]
    effects = [
        float((place.result(GradientPenalty(penalty=rho)) - place.result(NoRule())).norm()) for rho in (2e-3, 1e-3)
    ]
    assert distances[0] / distances[1] == pytest.approx(4, rel=0.1)
    assert effects[0] / effects[1] == pytest.approx(2, rel=1e-6)


def test_the_curvature_penalty_of_a_quadratic_is_none_and_of_a_cubic_that_of_the_book() -> None:
    """For L = Σ wᵢ³/6: ∇L = w²/2, H = diag(w), so d = μ(v∘w) + μ²v²/2 and ∇‖d‖ = μ·v∘d/‖d‖."""
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    quadratic = Place(lambda p: (p[0] ** 2).sum(), [w])
    rule = CurvaturePenalty(penalty=0.3, distance=0.2)
    torch.testing.assert_close(quadratic.result(rule), 2 * w, rtol=1e-12, atol=1e-12)

    cubic = Place(lambda p: (p[0] ** 3).sum() / 6, [w])
    v = w**2 / 2 / (w**2 / 2).norm()
    d = 0.2 * v * w + (0.2 * v) ** 2 / 2
    torch.testing.assert_close(cubic.result(rule), w**2 / 2 + 0.3 * 0.2 * v * d / d.norm(), rtol=1e-12, atol=1e-12)


@quick
@given(seeds)
def test_tensors_that_share_a_gradient_or_have_no_second_one(seed: int) -> None:
    """L = f(p + q, s) + ‖r‖₁: autograd hands out one tensor for p and q, and none that can be written to for r."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(4)]

    def loss(p: Sequence[Tensor]) -> Tensor:
        return torch.logsumexp((p[0] + p[1]) ** 2 * p[3].sum(), 0) + p[2].abs().sum() + p[3].sum()

    place = Place(loss, params)
    for rule in (GradientPenalty(penalty=0.5), CurvaturePenalty(penalty=0.5, distance=0.01)):
        way = place.gradient(place.w).detach()
        way = 0.01 * way / way.norm()

        def penalised(w: Tensor, rule: Rule = rule, way: Tensor = way) -> Tensor:
            if isinstance(rule, GradientPenalty):
                return place.value(w) + 0.5 * place.gradient(w).detach().norm()
            return place.value(w) + 0.5 * (place.gradient(w + way) - place.gradient(w)).detach().norm()

        torch.testing.assert_close(place.result(rule), place.by_differences(penalised), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [GradientPenalty(), CurvaturePenalty()])
def test_where_the_gradient_vanishes_nothing_is_added(rule: Rule) -> None:
    place = Place(lambda p: (p[0] ** 3).sum(), [torch.zeros(3, dtype=torch.float64)])
    assert torch.equal(place.result(rule), torch.zeros(3, dtype=torch.float64))
    linear = Place(lambda p: 2 * p[0].sum(), [torch.ones(3, dtype=torch.float64)])
    torch.testing.assert_close(linear.result(rule), torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("rule", [GradientPenalty, CurvaturePenalty])
@pytest.mark.parametrize("strength", ["penalty", "lam"])
def test_strength_zero_is_the_plain_gradient_to_the_bit_in_one_pass(rule: Any, strength: str) -> None:
    place = network(1, masked=True)
    plain = place.result(NoRule())
    off = rule(**{strength: 0.0}, sign="max")
    assert torch.equal(place.result(off), plain)
    assert len(place.visited) == off.passes == 1


@pytest.mark.parametrize(("rule", "evaluations"), [(GradientPenalty(), 1), (CurvaturePenalty(), 3)])
def test_a_break_in_any_pass_shows_in_the_gradient(rule: Any, evaluations: int) -> None:
    for form in (rule, rule.turned(), dataclasses.replace(rule, lam=0.5)):
        for which in range(evaluations):
            for masked in (False, True):
                for poison in poisons():
                    place = network(3, masked=masked)
                    place.poison = {which: poison}
                    before = place.w
                    assert not place.result(form).isfinite().all()
                    assert len(place.visited) == evaluations
                    assert torch.equal(place.w, before)


def penalised_by_hand(model: nn.Module, batch: Any, penalty: float) -> dict[str, Tensor]:
    """∇(L + penalty·‖∇L‖) from autograd through the penalised loss as it is written."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = nn.functional.cross_entropy(model(batch.inputs), batch.labels)
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
    length = sum((g**2).sum() for g in grads if g is not None) ** 0.5
    found = torch.autograd.grad(loss + penalty * length, list(params.values()), allow_unused=True)
    return {n: g for n, g in zip(params, found) if g is not None}


def first_gradients(model: nn.Module, rule: Rule, dtype: torch.dtype = torch.float64, **config: Any) -> dict[str, Any]:
    """The gradients with which the engine takes its first step on retained samples."""
    loop = cases.make_loop(model, "finetune", rule, cases.doubles(dtype=dtype), **config)
    found: dict[str, Any] = {}

    def note(gradients: Any, *args: Any, **kwargs: Any) -> None:
        found.update({n: g.clone() for n, g in zip(loop._names, gradients[0]) if g is not None})
        raise StopIteration

    loop._stepper.step = note  # type: ignore[method-assign]
    with pytest.raises(StopIteration):
        loop.run()
    return found


@pytest.mark.parametrize("name", ["convolutional", "tied"])
def test_in_the_engine_under_batch_norm_and_dropout_it_is_the_penalty_of_the_very_same_draws(name: str) -> None:
    model = cases.network(name, dtype=torch.float64)
    book = copy.deepcopy(model).train()
    found = first_gradients(model, GradientPenalty(penalty=0.3))
    batch = next(cases.streams(cases.doubles())[RETAIN].epoch(0))
    torch.manual_seed(0)
    hand = penalised_by_hand(book, batch, 0.3)
    assert hand.keys() == found.keys()
    for n, g in hand.items():
        torch.testing.assert_close(found[n], g, rtol=1e-9, atol=1e-12)
    for (n, a), (_, b) in zip(model.named_buffers(), book.named_buffers()):
        torch.testing.assert_close(a, b, msg=n)


def test_in_the_engine_the_curvature_penalty_repeats_the_dropout_and_leaves_the_statistics_alone() -> None:
    model = cases.network(dtype=torch.float64)
    book, plain = copy.deepcopy(model).train(), copy.deepcopy(model)
    found = first_gradients(model, CurvaturePenalty(penalty=0.4, distance=0.2))
    first_gradients(plain, NoRule())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))
    batch = next(cases.streams(cases.doubles())[RETAIN].epoch(0))
    params = {n: p for n, p in book.named_parameters() if p.requires_grad}

    def gradient(offset: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        moved = {n: p + offset[n] if n in offset else p for n, p in params.items()}
        out = torch.func.functional_call(book, moved, (batch.inputs,))
        loss = nn.functional.cross_entropy(out, batch.labels)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
        return {n: g for n, g in zip(params, grads) if g is not None}

    g0 = gradient({})
    norm = math.sqrt(sum(float((g.detach() ** 2).sum()) for g in g0.values()))
    there = gradient({n: 0.2 * g.detach() / norm for n, g in g0.items()})
    length = sum(((there[n] - g0[n]) ** 2).sum() for n in g0) ** 0.5
    change = torch.autograd.grad(length, list(params.values()), allow_unused=True)  # type: ignore[arg-type]
    for (n, g), c in zip(g0.items(), [c for c in change if c is not None], strict=True):
        torch.testing.assert_close(found[n], (g + 0.4 * c).detach(), rtol=1e-8, atol=1e-11)


class Attention(nn.Module):
    """One head over the rows of an image, with torch's fused attention or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.inner = nn.Linear(cases.SIDE, 3 * 8)
        self.head = nn.Linear(8, cases.N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x.squeeze(1)).chunk(3, dim=-1)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:
            mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(8), dim=-1) @ v
        return self.head(mixed.mean(1))


@pytest.mark.parametrize("rule", [GradientPenalty(penalty=0.3), CurvaturePenalty(penalty=0.3)])
def test_attention_is_differentiated_twice(rule: Rule) -> None:
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        results.append(first_gradients(Attention(fused), rule, dtype=torch.float32))
    for n, g in results[1].items():
        torch.testing.assert_close(results[0][n], g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", [GradientPenalty(penalty=0.3), CurvaturePenalty(penalty=0.3, distance=0.5)])
def test_under_bfloat16_it_is_nearly_the_same(rule: Rule) -> None:
    def flat(precision: Any, rule: Rule) -> Tensor:
        found = first_gradients(cases.network("smooth"), rule, dtype=torch.float32, precision=precision)
        return torch.cat([g.flatten() for g in found.values()])

    exact, short, plain = flat("float32", rule), flat("bf16", rule), flat("float32", NoRule())
    assert float((short - exact).norm()) < 0.1 * float(exact.norm())
    assert float((short - exact).norm()) < 0.7 * float((plain - exact).norm())


def test_the_curve_shows_the_loss_at_the_weights_once() -> None:
    """Three evaluations of a step, one value: the loss at w of the first step."""
    for rule in (NoRule(), GradientPenalty(), CurvaturePenalty()):
        loop = cases.make_loop(cases.network("smooth"), "finetune", rule, cases.images())
        before = copy.deepcopy(loop.model)
        batch = next(loop.streams[RETAIN].epoch(0))
        ((turn, taken, batches), *_) = list(loop._batches())
        loop._step(turn, taken, batches)
        (total, n) = next(iter(loop._sums.values()))
        (_, term) = next(CrossEntropy({RETAIN: 1.0}).terms(before, {RETAIN: batch}, Moment()))
        assert float(total) == pytest.approx(term.item(), rel=1e-6)
        assert float(n) == 1


@pytest.mark.parametrize("cls", [GradientPenalty, CurvaturePenalty])
def test_what_makes_no_sense_is_refused(cls: Any) -> None:
    for bad in (
        {"penalty": -1.0},
        {"penalty": math.nan},
        {"lam": -0.1},
        {"every": 0},
        {"sign": "up"},
        {"perturb": "x"},
    ):
        with pytest.raises(UserError, match=next(iter(bad))):
            cls(**bad)
    with pytest.raises(UserError, match="perturbation"):
        Phase(objective=CrossEntropy({RETAIN: 1.0}), perturb_objective=CrossEntropy({RETAIN: 2.0}), rule=cls())
    with pytest.raises(UserError, match="distance"):
        CurvaturePenalty(distance=0.0)
    point = network(0).point(value=None)
    with pytest.raises(UserError, match="differentiates twice"):
        cls().gradient(point)
