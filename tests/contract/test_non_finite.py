"""Contract 6: a loss or gradient that is not finite, in whichever pass, leaves everything as before that step."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import cases
from unsharp.engine import Loop
from unsharp.errors import NonFiniteError
from unsharp.methods import METHODS
from unsharp.phases import Phase
from unsharp.sharpness import RULES

NAN, INF = float("nan"), float("inf")


class _PoisonedEntry(torch.autograd.Function):
    """0, with a gradient of `value` at one entry of the weights and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, entry: int, value: float) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.entry, ctx.value = weights.shape, entry, value
        return weights.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        grad = torch.zeros(ctx.shape)
        grad.view(-1)[ctx.entry] = ctx.value
        return grad, None, None


def poisoned(name: str, entry: int, value: float) -> Callable[[nn.Module], Tensor]:
    return lambda model: _PoisonedEntry.apply(dict(model.named_parameters())[name], entry, value)  # type: ignore[return-value]


BREAKS: dict[str, Callable[[nn.Module], Tensor | float]] = {
    "loss": lambda model: NAN,
    "infinite loss": lambda model: -INF,
    "loss and gradient": lambda model: NAN * dict(model.named_parameters())["head.weight"].sum(),
    "one entry": poisoned("head.weight", 5, NAN),
    "infinite entry": poisoned("head.weight", 5, INF),
    "infinite entry that no other pass feels": poisoned("unused", 0, INF),
}


def broken(phases: list[Phase], i: int, step: int, which: int, how: Callable[[nn.Module], Any]) -> list[Phase]:
    """The phases, of which the i-th breaks at this step (from 0) in this pass (from 0), and only there."""
    target, evaluations = step * phases[i].rule.passes + which, itertools.count()
    objective = cases.Summed(phases[i].objective, lambda model: how(model) if next(evaluations) == target else 0.0)
    return [dataclasses.replace(p, objective=objective) if j == i else p for j, p in enumerate(phases)]


def snapshots(loop: Loop) -> list[dict[str, Any]]:
    """What the loop holds at the start and after each of its steps."""
    found = [cases.snapshot(loop)]
    # the save after an epoch, which finds the loop at batch 0 again, shows nothing new
    loop.run(save=lambda at: found.append(cases.snapshot(at)) if at.batch else None, save_seconds=0)
    return found


def expect_as_before(make: Callable[[bool], Loop], step: int, *, expected: list[dict[str, Any]]) -> None:
    loop = make(True)
    with pytest.raises(NonFiniteError, match=f"step {step + 1};"):
        loop.run()
    assert all(torch.isfinite(t).all() for t in loop.model.state_dict().values())
    assert cases.differing(cases.snapshot(loop), expected[step]) == []
    assert all(p.grad is None for p in loop.model.parameters())


def maker(
    method: str,
    rule: str,
    base: Callable[..., torch.optim.Optimizer],
    make_broken: Callable[[list[Phase]], list[Phase]],
    *,
    network: str = "convolutional",
    region: bool = False,
    **config: Any,
) -> Callable[[bool], Loop]:
    def make(breaks: bool) -> Loop:
        model, samples = cases.network(network), cases.images()
        chosen = METHODS[method](**({"alpha": 0.6} if method in ("neggrad", "sharp_minmax") else {}))
        phases = cases.phases_of(chosen, RULES[rule](), model, samples)
        if region:
            phases = cases.within(phases, cases.random_region(model))
        settings = {"epochs": 3} | (config if breaks else {})
        return cases.make_loop(model, make_broken(phases) if breaks else phases, samples, base, **settings)

    return make


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_a_break_in_any_pass_of_any_phase_leaves_everything_as_before(
    method: str, rule: str, how: str, check_every: int
) -> None:
    healthy = snapshots(maker(method, rule, cases.sgd, list)(False))
    n_phases = len(cases.phases_of(METHODS[method](), RULES[rule](), cases.network(), cases.images()))
    for i, which, step in itertools.product(range(n_phases), range(RULES[rule]().passes), (0, 3, 5)):
        make = maker(
            method,
            rule,
            cases.sgd,
            lambda phases, at=(i, step, which): broken(phases, *at, BREAKS[how]),
            check_every=check_every,
        )
        expect_as_before(make, step, expected=healthy)


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("coordinate", [("norm.weight", 0), ("head.weight", None)], ids=["idle tensor", "one entry"])
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_a_masked_coordinate_that_is_not_finite_is_noticed(
    method: str, rule: str, coordinate: tuple[str, int | None], check_every: int
) -> None:
    name, entry = coordinate
    region = cases.random_region(cases.network())[name].flatten()
    masked = int(torch.nonzero(~region)[0]) if entry is None else entry
    assert not region[masked]
    healthy = snapshots(maker(method, rule, cases.sgd, list, region=True)(False))
    for which in range(RULES[rule]().passes):
        make = maker(
            method,
            rule,
            cases.sgd,
            lambda phases, which=which: broken(phases, 0, 3, which, poisoned(name, masked, NAN)),
            region=True,
            check_every=check_every,
        )
        expect_as_before(make, 3, expected=healthy)


def plain(cls: type[torch.optim.Optimizer], **options: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda named: cls([p for _, p in named], **options)


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **cases.BASES,
    "fused sgd": lambda named: cases.sgd(named, fused=True),
    "fused adamw": lambda named: cases.adamw(named, fused=True),
    "fused adagrad": plain(torch.optim.Adagrad, fused=True),
    "foreach adamw": lambda named: cases.adamw(named, foreach=True),
    "amsgrad": lambda named: cases.adamw(named, amsgrad=True),
    "plain sgd": plain(torch.optim.SGD, lr=0.05),
    "nadam": plain(torch.optim.NAdam),
    "radam": plain(torch.optim.RAdam),
    "asgd": plain(torch.optim.ASGD),
    "rprop": plain(torch.optim.Rprop),
    "rmsprop": plain(torch.optim.RMSprop, centered=True, momentum=0.9),
    "adadelta": plain(torch.optim.Adadelta),
    "adamax": plain(torch.optim.Adamax),
    "adafactor": plain(torch.optim.Adafactor),
}


@pytest.mark.parametrize("region", [False, True], ids=["everywhere", "masked"])
@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_weights_state_and_step_counters_are_as_before_under_every_kind_of_optimiser(
    optimiser: str, check_every: int, region: bool
) -> None:
    base = OPTIMISERS[optimiser]
    for network, rule in (("convolutional", "sam"), ("tied", "none")):
        healthy = snapshots(maker("neggrad", rule, base, list, network=network, region=region)(False))
        for step, how in itertools.product((3, 6), ("one entry", "loss")):
            make = maker(
                "neggrad",
                rule,
                base,
                lambda phases, step=step, how=how: broken(phases, 0, step, phases[0].rule.passes - 1, BREAKS[how]),
                network=network,
                region=region,
                check_every=check_every,
            )
            expect_as_before(make, step, expected=healthy)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "fused adamw", "rmsprop"])
def test_a_tensor_that_gets_a_gradient_in_some_steps_only_keeps_its_step_counter(optimiser: str) -> None:
    def make(breaks: bool) -> Loop:
        evaluations = itertools.count()

        def added(model: nn.Module) -> Tensor | float:
            step = next(evaluations)
            if breaks and step == 3:
                return BREAKS["one entry"](model)
            return poisoned("unused", 0, 1.0)(model) if step < 3 else 0.0

        model, samples = cases.network(), cases.images()
        (phase,) = cases.phases_of("neggrad", RULES["none"](), model, samples)
        phases = [dataclasses.replace(phase, objective=cases.Summed(phase.objective, added))]
        return cases.make_loop(model, phases, samples, OPTIMISERS[optimiser], epochs=3, check_every=9 if breaks else 1)

    expect_as_before(make, 3, expected=snapshots(make(False)))


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "fused sgd", "fused adamw", "rprop"])
def test_a_break_at_the_very_first_step_leaves_state_that_starts_anew(optimiser: str) -> None:
    """Read later or at once, the broken step has left nothing from which a run that goes on would differ."""
    base = OPTIMISERS[optimiser]
    expected = snapshots(maker("neggrad", "sam", base, list, network="smooth")(False))
    for check_every in (1, 5):
        loop = maker(
            "neggrad", "sam", base, lambda p: broken(p, 0, 0, 1, NAN_IN_THE_FIRST_LAYER), network="smooth",
            check_every=check_every,
        )(True)  # fmt: skip
        with pytest.raises(NonFiniteError, match="step 1;"):
            loop.run()
        loop.epoch = loop.batch = 0
        loop.run()
        assert cases.differing(cases.snapshot(loop), expected[-1]) == []


NAN_IN_THE_FIRST_LAYER = poisoned("1.weight", 0, NAN)


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("base", cases.BASES)
def test_a_healthy_run_does_not_depend_on_when_the_flag_is_read(base: str, check_every: int) -> None:
    results = []
    for every in (1, check_every, 100):
        loop = maker("sharp_minmax", "asam", cases.BASES[base], list, check_every=every)(True)
        loop.run()
        results.append(cases.snapshot(loop))
    assert all(cases.differing(results[0], other) == [] for other in results[1:])


@pytest.mark.parametrize("check_every", [1, 5])
def test_what_is_saved_after_a_break_is_the_state_before_it(check_every: int) -> None:
    expected = snapshots(maker("neggrad", "asam", cases.adamw, list)(False))[3]
    make = maker(
        "neggrad",
        "asam",
        cases.adamw,
        lambda phases: broken(phases, 0, 3, 1, BREAKS["one entry"]),
        check_every=check_every,
    )
    saved = io.BytesIO()
    with pytest.raises(NonFiniteError):
        make(True).run(save=lambda at: torch.save(at.state_dict(), saved), save_seconds=1e9)
    saved.seek(0)
    fresh = make(False)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    assert cases.differing(cases.snapshot(fresh), expected) == []
