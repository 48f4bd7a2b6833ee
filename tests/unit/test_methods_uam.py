"""UAM against a loop written out by hand: whose gradient moves the weights, where it is taken, what BatchNorm sees."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.data import TensorSamples
from unsharp.data.samples import Batch
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig
from unsharp.errors import NonFiniteError, UserError
from unsharp.methods import METHODS, Problem
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase
from unsharp.sharpness import NO_RULE, RULES, Rule

N, FORGOTTEN, LR = 23, 7, 0.1


def samples(dtype: torch.dtype = torch.float64) -> TensorSamples:
    generator = torch.Generator().manual_seed(1)
    return TensorSamples(torch.randn(N, 4, generator=generator).to(dtype), torch.arange(N) % 3)


def streams(data: TensorSamples) -> dict[str, Stream]:
    """Four batches of retain, two of forget, which cycle."""
    return {
        RETAIN: Stream(data, np.arange(FORGOTTEN, N), 4, 0),
        FORGET: Stream(data, np.arange(FORGOTTEN), 4, 0),
    }


def network(dtype: torch.dtype = torch.float64, *, norm: bool = True, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)]
    return nn.Sequential(*layers).to(dtype)


def phases(rule: Rule, model: nn.Module, data: TensorSamples) -> list[Phase]:
    problem = Problem(model=model, samples=data, forget=np.arange(FORGOTTEN), retain=np.arange(FORGOTTEN, N), rule=rule)
    return METHODS["uam"]().phases(problem)


def make(rule: Rule, model: nn.Module | None = None, **settings: Any) -> Loop:
    model = network() if model is None else model
    data = samples(next(model.parameters()).dtype)
    config = LoopConfig(**{"epochs": 2, "batch_size": 4} | settings)

    def base(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in named], lr=LR, momentum=0.9, weight_decay=0.01)

    loop = Loop(model, phases(rule, model, data), streams(data), config, make_optimizer=base)
    runtime.seed_all(0)
    return loop


def by_hand(model: nn.Module, rho: float, *, lam: float, scale: Callable[[Tensor], Tensor], epochs: int = 2) -> None:
    """Ascend the forget loss by ρ, take the retain gradient there, come back, step."""
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=0.01)
    model.train()

    def slope(batch: Batch) -> list[Tensor]:
        return list(torch.autograd.grad(nn.functional.cross_entropy(model(batch.inputs), batch.labels), params))

    for epoch in range(epochs):
        read = streams(samples())
        for retain, forget in zip(read[RETAIN].epoch(epoch), read[FORGET].epoch(epoch, n_batches=4), strict=True):
            plain, up = slope(retain), slope(forget)
            length = torch.cat([(scale(p) * g).flatten() for p, g in zip(params, up)]).norm()
            kept = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, g in zip(params, up):
                    p += rho * scale(p) ** 2 * g / length
            there = slope(retain)
            with torch.no_grad():
                for p, w, a, b in zip(params, kept, plain, there):
                    p.copy_(w)
                    p.grad = a + lam * (b - a)
            optimizer.step()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("rule", "scale"),
    [
        (RULES["sam"](rho=0.5), torch.ones_like),
        (RULES["sam"](rho=0.5, lam=0.7), torch.ones_like),
        (RULES["asam"](rho=2.0), lambda w: w.detach().abs()),
    ],
    ids=["sam", "half way", "asam"],
)
def test_the_steps_are_those_of_the_textbook(rule: Any, scale: Callable[[Tensor], Tensor], norm: bool) -> None:
    loop, expected = make(rule, network(norm=norm)), network(norm=norm)
    loop.run()
    by_hand(expected, rule.rho, lam=rule.lam, scale=scale)
    for p, q in zip(loop.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_forget_samples_leave_no_trace_but_the_direction() -> None:
    """BatchNorm sees the retain batches at w, once each, and nothing else; the draws of dropout go on as for retain."""

    def buffers(rule: Rule) -> tuple[dict[str, Tensor], Tensor]:
        model = network(dropout=0.3)
        data = samples()
        config = LoopConfig(epochs=2, batch_size=4)

        def still(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for _, p in named], lr=0.0)

        loop = Loop(model, phases(rule, model, data), streams(data), config, make_optimizer=still)
        runtime.seed_all(0)
        loop.run()
        return {n: b.clone() for n, b in model.named_buffers()}, torch.get_rng_state()

    plain, state = buffers(NO_RULE)
    assert int(plain["1.num_batches_tracked"]) == 2 * 4
    for rule in (RULES["sam"](rho=3.0), RULES["sam"](rho=3.0, lam=0.5), RULES["asam"](rho=3.0)):
        found, after = buffers(rule)
        assert all(torch.equal(found[n], b) for n, b in plain.items())
        assert torch.equal(after, state)


def test_both_passes_on_retain_see_the_same_dropout() -> None:
    """With ρ so small that it changes nothing, g₀ + λ·(g₁ − g₀) is g₀ whatever λ is."""
    results = []
    for rule in (NO_RULE, *(RULES["sam"](rho=1e-13, lam=lam) for lam in (1.0, 30.0))):
        loop = make(rule, network(dropout=0.5), epochs=1)
        loop.run()
        results.append(torch.cat([p.detach().flatten() for p in loop.model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results[2], results[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("lam", "per_step"), [(1.0, 2), (0.5, 3)])
def test_passes_are_counted_as_they_are_taken(lam: float, per_step: int) -> None:
    loop = make(RULES["sam"](rho=0.5, lam=lam))
    backwards = 0

    def count(*_: Any) -> None:
        nonlocal backwards
        backwards += 1

    def watch(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(count)

    loop.model.register_forward_hook(watch)
    loop.run()
    assert loop.passes == backwards == 8 * per_step == 8 * loop.phases[0].passes
    assert loop.other_forwards == 8  # of the retain batches, for BatchNorm


def test_radius_0_is_fine_tuning_to_the_bit() -> None:
    found = make(RULES["sam"](rho=0.0), network(torch.float32, dropout=0.3))
    found.run()
    model = network(torch.float32, dropout=0.3)
    loop = make(NO_RULE, model)
    loop.phases[0] = Phase(objective=CrossEntropy({RETAIN: 1.0}), name=RETAIN)
    loop.run()
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), model.parameters(), strict=True))
    assert found.passes == loop.passes == 8


def test_a_killed_run_goes_on_to_the_same_bits() -> None:
    rule = RULES["sam"](rho=0.5)
    whole, states = make(rule, network(torch.float32, dropout=0.3)), []

    def save(at: Loop) -> None:
        file = io.BytesIO()
        torch.save(at.state_dict(), file)
        states.append(file.getvalue())

    whole.run(save=save, save_seconds=0)
    for state in (states[2], states[6]):  # within the forget stream's second cycle, and in the second epoch
        again = make(rule, network(torch.float32, dropout=0.3))
        torch.manual_seed(99)
        again.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        again.run()
        assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True))
        assert again.other_forwards == whole.other_forwards


def test_a_forget_loss_that_is_not_finite_stops_the_run_and_changes_nothing() -> None:
    class Broken(CrossEntropy):
        def terms(self, *args: Any) -> Any:
            for name, term in super().terms(*args):
                yield name, term * float("nan")

    loop = make(RULES["sam"](rho=0.5))
    loop.phases[0] = dataclasses.replace(loop.phases[0], perturb_objective=Broken({FORGET: 1.0}))
    before = {n: t.clone() for n, t in loop.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="step 1;"):
        loop.run()
    assert all(torch.equal(t, before[n]) for n, t in loop.model.state_dict().items())


def test_only_rules_whose_perturbation_may_follow_another_loss_are_taken() -> None:
    admitted = {name for name in RULES if METHODS["uam"].admits(name)[0]}
    assert {"sam", "asam"} <= admitted
    assert "none" not in admitted
    data = samples()
    for name in admitted:
        (phase,) = phases(RULES[name](), network(norm=False), data)
        assert phase.streams == (RETAIN, FORGET)
        loop = make(RULES[name](), network(norm=False), epochs=1)
        loop.run()


def test_an_objective_that_shares_some_of_the_streams_cannot_perturb() -> None:
    with pytest.raises(UserError, match="as many different ones"):
        Phase(objective=CrossEntropy({RETAIN: 1.0}), perturb_objective=CrossEntropy({RETAIN: 1.0, FORGET: 1.0}))
