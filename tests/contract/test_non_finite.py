"""Contract 6: a loss or gradient that is not finite, in whichever pass, leaves everything as before that step."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import cases
from unsharp.engine import Loop
from unsharp.errors import NonFiniteError
from unsharp.methods import Method
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


@dataclasses.dataclass(frozen=True)
class Place:
    """One evaluation of an objective.

    Args:
        phase: Number of the phase.
        kind: "objective", or "perturb_objective" where the perturbation comes from one of its own.
        step: Step of the run, from 0.
        which: Evaluation of this objective within the step, from 0.
        total: Evaluation of this objective within the run, from 0.
    """

    phase: int
    kind: str
    step: int
    which: int
    total: int


def broken(phases: list[Phase], at: Place, how: Callable[[nn.Module], Any]) -> list[Phase]:
    """The phases, of which one breaks at this evaluation, and only there."""
    evaluations = itertools.count()
    objective = cases.Summed(
        getattr(phases[at.phase], at.kind), lambda model: how(model) if next(evaluations) == at.total else 0.0
    )
    return [dataclasses.replace(p, **{at.kind: objective}) if i == at.phase else p for i, p in enumerate(phases)]


@dataclasses.dataclass(frozen=True)
class Healthy:
    """What a run that does not break holds at the start and after each step, and which evaluations it makes."""

    snapshots: list[dict[str, Any]]
    places: list[Place]

    def of(self, phase: int) -> list[Place]:
        """The evaluations of a phase in its first and its fourth step, or its last one."""
        steps = sorted({place.step for place in self.places if place.phase == phase})
        return [p for p in self.places if p.phase == phase and p.step in (steps[0], steps[min(3, len(steps) - 1)])]

    def at(self, step: int, phase: int = 0) -> Place:
        """The last evaluation of a phase in a step."""
        return [p for p in self.places if (p.phase, p.step, p.kind) == (phase, step, "objective")][-1]


def healthy_run(make: Callable[..., Loop]) -> Healthy:
    counts: dict[tuple[int, str], int] = {}

    def counted(phases: list[Phase]) -> list[Phase]:
        return [dataclasses.replace(phase, **dict(watched(i, phase))) for i, phase in enumerate(phases)]

    def watched(i: int, phase: Phase) -> Iterator[tuple[str, Any]]:
        for kind in ("objective", "perturb_objective"):
            objective = getattr(phase, kind)
            if objective is not None:
                yield (
                    kind,
                    cases.Summed(
                        objective, lambda _, at=(i, kind): float(counts.update({at: counts.get(at, 0) + 1}) or 0)
                    ),
                )

    loop = make(counted, check_every=1)
    places: list[Place] = []

    def note() -> None:
        for (phase, kind), n in counts.items():
            before = sum((p.phase, p.kind) == (phase, kind) for p in places)
            places.extend(Place(phase, kind, loop._stepper.steps, k - before, k) for k in range(before, n))

    cases.before_each_step(loop, note)
    snapshots = [cases.snapshot(loop)]
    # the save after an epoch, which finds the loop at batch 0 again, shows nothing new
    loop.run(save=lambda at: snapshots.append(cases.snapshot(at)) if at.batch else None, save_seconds=0)
    return Healthy(snapshots, places)


def expect_as_before(loop: Loop, step: int, *, expected: list[dict[str, Any]]) -> None:
    with pytest.raises(NonFiniteError, match=f"step {step + 1};"):
        loop.run()
    assert all(torch.isfinite(t).all() for t in loop.model.state_dict().values())
    assert cases.differing(cases.snapshot(loop), expected[step]) == []
    assert all(p.grad is None for p in loop.model.parameters())


def maker(
    method: str | Method,
    rule: str,
    base: Callable[..., torch.optim.Optimizer] = cases.sgd,
    *,
    network: str = "convolutional",
    region: bool = False,
    phase_steps: str = "together",
) -> Callable[..., Loop]:
    """A function from a change of the phases, and settings of the loop, to a loop of three epochs."""

    def make(change: Callable[[list[Phase]], list[Phase]] | None = None, **config: Any) -> Loop:
        model = cases.network(network)
        part = cases.random_region(model) if region else None
        rule_itself = RULES[rule]()
        settings: dict[str, Any] = {"epochs": 3, "phase_steps": phase_steps} | config
        return cases.make_loop(model, method, rule_itself, cases.images(), base, region=part, change=change, **settings)

    return make


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize(("method", "rule"), [("neggrad", "asam"), ("sharp_minmax", "sam"), ("saul", "sam")])
def test_every_kind_of_break_in_any_pass_leaves_everything_as_before(
    method: str, rule: str, how: str, check_every: int
) -> None:
    expect_as_before_everywhere(method, rule, how, check_every)


@functools.cache
def healthy_pair(method: str, rule: str, region: bool = False) -> Healthy:
    return healthy_run(maker(method, rule, region=region))


KINDS = [
    pytest.param(how, check_every, marks=() if how in ("loss", "one entry") and check_every == 5 else pytest.mark.slow)
    for how, check_every in itertools.product(BREAKS, (1, 5))
]


@pytest.mark.parametrize(("how", "check_every"), KINDS)
@pytest.mark.parametrize(("method", "rule"), cases.PHASED)
def test_a_break_in_any_pass_of_any_phase_leaves_everything_as_before(
    method: str, rule: str, how: str, check_every: int
) -> None:
    expect_as_before_everywhere(method, rule, how, check_every)


def expect_as_before_everywhere(method: str, rule: str, how: str, check_every: int) -> None:
    """In each evaluation of an early and of a later step of every phase."""
    make, healthy = maker(method, rule), healthy_pair(method, rule)
    for i in range(len(make().phases)):
        for place in healthy.of(i):
            loop = make(lambda phases, at=place: broken(phases, at, BREAKS[how]), check_every=check_every)
            expect_as_before(loop, place.step, expected=healthy.snapshots)


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("phase_steps", ["separate", "alternate"])
@pytest.mark.parametrize("method", ["sharp_minmax", "saul", "scrub"])
def test_a_break_leaves_everything_as_before_where_phases_step_apart(
    method: str, phase_steps: str, check_every: int
) -> None:
    make = maker(method, "sam", phase_steps=phase_steps)
    healthy = healthy_run(make)
    for i, how in itertools.product(range(len(make().phases)), ("loss", "one entry")):
        for place in healthy.of(i):
            loop = make(lambda phases, at=place, how=how: broken(phases, at, BREAKS[how]), check_every=check_every)
            expect_as_before(loop, place.step, expected=healthy.snapshots)


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
    make, healthy = maker(method, rule, region=True), healthy_pair(method, rule, region=True)
    for place in healthy.of(0):
        loop = make(lambda phases, at=place: broken(phases, at, poisoned(name, masked, NAN)), check_every=check_every)
        expect_as_before(loop, place.step, expected=healthy.snapshots)


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("sharpness_on", ["retain", "separate", "unsigned"])
def test_a_break_in_the_objective_of_the_perturbation_is_noticed_too(sharpness_on: str, check_every: int) -> None:
    make = maker(cases.method_of("neggrad", sharpness_on=sharpness_on), "sam")
    healthy = healthy_run(make)
    assert ("perturb_objective" in {place.kind for place in healthy.places}) == (sharpness_on == "unsigned")
    for place, how in itertools.product(healthy.places[: 3 * len(healthy.places) // 4], ("loss", "one entry")):
        loop = make(lambda phases, at=place, how=how: broken(phases, at, BREAKS[how]), check_every=check_every)
        expect_as_before(loop, place.step, expected=healthy.snapshots)


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
    for method, network, rule in (
        ("neggrad", "convolutional", "sam"),
        ("neggrad", "tied", "none"),
        ("saul", "tied", "sam"),  # two states, of which one rests where its multiplier is 0
    ):
        make = maker(method, rule, OPTIMISERS[optimiser], network=network, region=region)
        healthy = healthy_run(make)
        for step, how in itertools.product((3, 6), ("one entry", "loss")):
            place = healthy.at(step, phase=0 if method == "neggrad" else 1)
            loop = make(lambda phases, at=place, how=how: broken(phases, at, BREAKS[how]), check_every=check_every)
            expect_as_before(loop, step, expected=healthy.snapshots)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "fused adamw", "rmsprop"])
def test_a_tensor_that_gets_a_gradient_in_some_steps_only_keeps_its_step_counter(optimiser: str) -> None:
    make = maker("neggrad", "none", OPTIMISERS[optimiser])

    def changed(phases: list[Phase], *, breaks: bool) -> list[Phase]:
        evaluations = itertools.count()

        def added(model: nn.Module) -> Tensor | float:
            step = next(evaluations)
            if breaks and step == 3:
                return BREAKS["one entry"](model)
            return poisoned("unused", 0, 1.0)(model) if step < 3 else 0.0

        return [dataclasses.replace(phases[0], objective=cases.Summed(phases[0].objective, added))]

    healthy = make(functools.partial(changed, breaks=False))
    snapshots = [cases.snapshot(healthy)]
    healthy.run(save=lambda at: snapshots.append(cases.snapshot(at)) if at.batch else None, save_seconds=0)
    expect_as_before(make(functools.partial(changed, breaks=True), check_every=9), 3, expected=snapshots)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "fused sgd", "fused adamw", "rprop"])
@pytest.mark.parametrize("method", ["neggrad", "saul"])
def test_a_break_at_the_very_first_step_leaves_state_that_starts_anew(method: str, optimiser: str) -> None:
    """Read later or at once, the broken step has left nothing from which a run that goes on would differ."""
    make = maker(method, "sam", OPTIMISERS[optimiser], network="smooth")
    healthy = healthy_run(make)
    for check_every in (1, 5):
        loop = make(lambda phases: broken(phases, healthy.at(0), NAN_IN_THE_FIRST_LAYER), check_every=check_every)
        with pytest.raises(NonFiniteError, match="step 1;"):
            loop.run()
        assert (loop.epoch, loop.batch) == (0, 0)
        loop.run()
        assert cases.differing(cases.snapshot(loop), healthy.snapshots[-1]) == []


NAN_IN_THE_FIRST_LAYER = poisoned("1.weight", 0, NAN)


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("base", [*cases.BASES, "fused sgd", "fused adamw"])
@pytest.mark.parametrize(("method", "rule"), [("sharp_minmax", "asam"), ("saul", "sam"), ("saul", "none")])
def test_a_healthy_run_does_not_depend_on_when_the_flag_is_read(
    method: str, rule: str, base: str, check_every: int
) -> None:
    results = []
    for every in (1, check_every, 100):
        loop = maker(method, rule, OPTIMISERS[base])(check_every=every)
        loop.run()
        results.append(cases.snapshot(loop))
    assert all(cases.differing(results[0], other) == [] for other in results[1:])


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("method", ["neggrad", "saul"])
def test_what_is_saved_after_a_break_is_the_state_before_it(method: str, check_every: int) -> None:
    make = maker(method, "asam", cases.adamw)
    healthy = healthy_run(make)
    loop = make(lambda phases: broken(phases, healthy.at(3), BREAKS["one entry"]), check_every=check_every)
    saved = io.BytesIO()
    with pytest.raises(NonFiniteError):
        loop.run(save=lambda at: torch.save(at.state_dict(), saved), save_seconds=1e9)
    saved.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    assert cases.differing(cases.snapshot(fresh), healthy.snapshots[3]) == []
