"""Phases in turn, states of their own, factors and memories: the loop against plain torch written out by hand."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unsharp.data import TensorSamples
from unsharp.data.samples import Batch
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig, OptimizerConfig
from unsharp.errors import NonFiniteError, UserError
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Moment, Phase, Scale
from unsharp.sharpness import Gradients, Point, Rule, Sharpness
from unsharp.sharpness.step import MemoryGuard

N, FORGOTTEN = 23, 6
OTHERS = np.arange(FORGOTTEN, N)
LR, DECAY = 0.1, 0.05


def samples() -> TensorSamples:
    generator = torch.Generator().manual_seed(1)
    return TensorSamples(torch.randn(N, 4, generator=generator, dtype=torch.float64), torch.arange(N) % 3)


def streams() -> dict[str, Stream]:
    """Five batches of retain, two of forget."""
    return {RETAIN: Stream(samples(), OTHERS, 4, 0), FORGET: Stream(samples(), np.arange(FORGOTTEN), 4, 0)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def sgd(named: list[tuple[str, nn.Parameter]], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=LR, momentum=0.9, weight_decay=DECAY, **options)


def make(phases: list[Phase], *, separate: bool = True, model: nn.Module | None = None, **settings: Any) -> Loop:
    base, alternate = settings.pop("base", sgd), settings.pop("alternate", False)
    config = LoopConfig(**{"epochs": 3, "batch_size": 4, "seed": 0, **settings})
    return Loop(
        network() if model is None else model,
        phases,
        streams(),
        config,
        make_optimizer=base,
        separate_states=separate,
        alternate=alternate,
    )


def retain(**settings: Any) -> Phase:
    return Phase(**{"objective": CrossEntropy({RETAIN: 1.0}), "name": RETAIN} | settings)


def forget(**settings: Any) -> Phase:
    return Phase(**{"objective": CrossEntropy({FORGET: -0.3}), "name": FORGET} | settings)


def halves(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two regions that together are all weights."""
    generator = torch.Generator().manual_seed(5)
    one = {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()}
    return one, {n: ~m for n, m in one.items()}


def state_of(loop: Loop) -> dict[str, Any]:
    """Weights, both optimisers' states and the memories, by name."""
    found: dict[str, Any] = dict(loop.model.state_dict())
    for k, optimizer in enumerate(loop.optimizers):
        for i, entries in optimizer.state_dict()["state"].items():
            found |= {f"{k}/{i}/{key}": value for key, value in entries.items()}
    found |= {f"memory {i}/{k}": v for i, m in enumerate(loop.state_dict()["memories"]) for k, v in m.items()}
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def same(a: Any, b: Any) -> bool:
    """Equality to the bit of tensors, plain values, and lists and dicts of them."""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


# --- turns -----------------------------------------------------------------------------------------------------------


class Noted(CrossEntropy):
    """Writes down when it is evaluated, and on which samples."""

    log: ClassVar[list[tuple[Moment, dict[str, list[int]]]]] = []

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        self.log.append((at, {s: batches[s].indices.tolist() for s in self.streams}))
        return super().terms(model, batches, at)


def test_turns_follow_one_another_each_through_its_leading_stream_and_rest_when_they_are_told_to() -> None:
    Noted.log.clear()
    phases = [
        retain(objective=Noted({RETAIN: 1.0}), turn=4),
        forget(objective=Noted({FORGET: -0.1}), turn=4),
        Phase(objective=Noted({FORGET: -1.0}), turn=2, until=2, name="before"),
    ]
    loop = make(phases, separate=False)
    steps: list[int] = []
    loop.run(save=lambda at: steps.append(at.batch), save_seconds=0)

    expected = []
    for epoch in range(3):
        read = streams()
        if epoch < 2:
            expected += [{FORGET: b.indices.tolist()} for b in read[FORGET].epoch(epoch)]
        for r, f in zip(read[RETAIN].epoch(epoch), read[FORGET].epoch(epoch, n_batches=5), strict=True):
            expected += [{RETAIN: r.indices.tolist()}, {FORGET: f.indices.tolist()}]
    assert [seen for _, seen in Noted.log] == expected
    assert [at.epoch for at, _ in Noted.log] == [0] * 12 + [1] * 12 + [2] * 10
    assert {(at.epochs, at.seed) for at, _ in Noted.log} == {(3, 0)}
    assert [loop.steps_in(epoch) for epoch in range(3)] == [7, 7, 5]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 0]
    assert loop.passes == len(expected)
    assert [set(row) - {"epoch", "lr", "seconds", "passes"} for row in loop.history] == [
        {RETAIN, FORGET, f"before/{FORGET}"}
    ] * 2 + [{RETAIN, FORGET}]


def test_a_phase_knows_how_many_steps_it_has_taken_itself() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Steps(Rule):
        seen: list[int]
        passes = 1.0  # type: ignore[assignment]

        def gradient(self, point: Point) -> Gradients:
            self.seen.append(point.step)
            return point.gradient()

        def turned(self) -> Rule:
            return self

    one, two = Steps(seen=[]), Steps(seen=[])
    make([forget(rule=one, until=2), retain(rule=two, turn=1)]).run()
    assert (one.seen, two.seen) == (list(range(2 * 2)), list(range(3 * 5)))


@pytest.mark.parametrize(("turns", "alternate"), [((0, 0), False), ((0, 0), True), ((0, 1), False), ((1, 0), True)])
@pytest.mark.parametrize("masked", [False, True])
def test_separate_states_are_two_optimisers_of_torch_one_after_the_other(
    turns: tuple[int, int], alternate: bool, masked: bool
) -> None:
    """Momentum and weights; where both phases of a step move a weight, the first alone decays it."""
    model = network()
    regions = halves(model) if masked else (None, None)
    phases = [retain(turn=turns[0], region=regions[0]), forget(turn=turns[1], region=regions[1])]
    loop = make(phases, model=model, separate=not alternate, alternate=alternate)
    loop.run()

    expected = network()
    named = dict(expected.named_parameters())
    together = turns[0] == turns[1]
    at_once = together and not alternate
    optimizers = [
        torch.optim.SGD(named.values(), lr=LR, momentum=0.9, weight_decay=DECAY),
        torch.optim.SGD(named.values(), lr=LR, momentum=0.9, weight_decay=0.0 if at_once and not masked else DECAY),
    ]

    def gradient(weight: float, batch: Batch) -> list[Tensor]:
        loss = weight * nn.functional.cross_entropy(expected(batch.inputs), batch.labels)
        return list(torch.autograd.grad(loss, list(named.values())))

    def update(k: int, grads: list[Tensor]) -> None:
        region = regions[k]
        kept = {n: p.detach().clone() for n, p in named.items()}
        for (n, p), g in zip(named.items(), grads):
            p.grad = g if region is None else g * region[n]
        optimizers[k].step()
        for n, p in named.items():
            if region is not None:
                p.data = torch.where(region[n], p.data, kept[n])
                buffer = optimizers[k].state[p]["momentum_buffer"]
                buffer.copy_(torch.where(region[n], buffer, 0.0))

    for epoch in range(3):
        read = streams()
        if together:
            for r, f in zip(read[RETAIN].epoch(epoch), read[FORGET].epoch(epoch, n_batches=5)):
                first, second = gradient(1.0, r), gradient(-0.3, f)
                update(0, first)
                update(1, second if at_once else gradient(-0.3, f))
            continue
        for k in (0, 1) if turns[0] < turns[1] else (1, 0):
            for batch in read[(RETAIN, FORGET)[k]].epoch(epoch):
                update(k, gradient((1.0, -0.3)[k], batch))
    for p, q in zip(model.parameters(), named.values()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(loop.optimizers, optimizers, strict=True):
            buffer = mine.state[p]["momentum_buffer"]
            torch.testing.assert_close(buffer, theirs.state[q]["momentum_buffer"], rtol=1e-9, atol=1e-12)


def test_one_state_carries_its_momentum_from_turn_to_turn() -> None:
    loop = make([forget(), retain(turn=1)], separate=False)
    loop.run()
    assert len(loop.optimizers) == 1

    expected = network()
    optimizer = sgd(list(expected.named_parameters()))
    for epoch in range(3):
        for weight, stream in ((-0.3, FORGET), (1.0, RETAIN)):
            for batch in streams()[stream].epoch(epoch):
                optimizer.zero_grad()
                (weight * nn.functional.cross_entropy(expected(batch.inputs), batch.labels)).backward()
                optimizer.step()
    for p, q in zip(loop.model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("turns", "alternate", "overlap", "expected"),
    [
        ((0, 0), False, True, [DECAY, 0.0]),
        ((0, 0), False, False, [DECAY, DECAY]),
        ((0, 1), False, True, [DECAY, DECAY]),
        ((0, 0), True, True, [DECAY, DECAY]),
    ],
)
def test_no_weight_is_decayed_twice_in_a_step(
    turns: tuple[int, int], alternate: bool, overlap: bool, expected: list[float]
) -> None:
    model = network()
    one, other = halves(model)
    if overlap:
        other = {n: m.clone() for n, m in other.items()}
        first = next(iter(one))
        other[first][one[first].nonzero()[0].unbind()] = True
    phases = [retain(region=one, turn=turns[0]), forget(region=other, turn=turns[1])]
    loop = make(phases, model=model, alternate=alternate)
    assert [optimizer.param_groups[0]["weight_decay"] for optimizer in loop.optimizers] == expected


@dataclass(frozen=True)
class Never(Scale):
    def factor(self, loss: Tensor, memory: dict[str, Any]) -> Tensor:
        return torch.zeros_like(loss)


@pytest.mark.parametrize("case", ["first rests at last", "second rests at last", "first never acts", "a chain"])
def test_every_weight_is_decayed_once_in_a_step_also_where_a_phase_rests(case: str) -> None:
    """Losses of next to no weight: what is left is w·(1 − lr·decay) in each of the 15 steps."""
    model, tiny = network(), {s: CrossEntropy({s: 1e-200}) for s in (RETAIN, FORGET)}
    one, other = halves(model)
    between = {n: torch.rand(m.shape, generator=torch.Generator().manual_seed(9)) < 0.5 for n, m in one.items()}
    phases = {
        "first rests at last": [forget(until=1), retain()],
        "second rests at last": [retain(), forget(until=2)],
        "first never acts": [forget(scale=Never()), retain()],
        "a chain": [retain(region=one), forget(region=between), retain(region=other, name="third")],
    }[case]
    phases = [replace(phase, objective=tiny[phase.objective.streams[0]]) for phase in phases]
    expected = {n: p.detach() * (1 - LR * DECAY) ** 15 for n, p in model.named_parameters()}
    loop = make(phases, model=model, base=None, optimizer=OptimizerConfig(lr=LR, momentum=0.0, weight_decay=DECAY))
    loop.run()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, expected[n], rtol=1e-12, atol=0)


def test_turns_with_different_regions_and_one_state_are_refused() -> None:
    model = network()
    one, other = halves(model)
    for regions in ((one, other), (None, one), (one, None)):
        phases = [forget(region=regions[0]), retain(region=regions[1], turn=1)]
        with pytest.raises(UserError, match="state each"):
            make(phases, separate=False, model=model)
        assert len(make(phases, model=model).optimizers) == 2
    for regions in ((None, None), (one, dict(one)), (one, {n: m.clone() for n, m in one.items()})):
        make([forget(region=regions[0]), retain(region=regions[1], turn=1)], separate=False, model=model)
    make([forget(region=one), retain(region=other)], separate=False, model=model)  # together, nothing is carried over


# --- learning rates --------------------------------------------------------------------------------------------------


def test_each_phase_has_its_rate_and_its_schedule_and_these_are_torchs() -> None:
    loop = make(
        [retain(), forget()],
        separate=False,
        base=None,
        optimizer=OptimizerConfig(lr=0.2),
        schedule="cosine",
        phase_lr={FORGET: 0.05},
        phase_schedule={FORGET: "linear"},
    )
    seen: list[list[float]] = [[], []]
    for optimizer, rates in zip(loop.optimizers, seen, strict=True):
        optimizer.register_step_pre_hook(lambda o, *_, rates=rates: rates.append(o.param_groups[0]["lr"]))
    loop.run()
    total = 15
    bases = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr) for lr in (0.2, 0.05)]
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(bases[0], total),
        torch.optim.lr_scheduler.LinearLR(bases[1], start_factor=1.0, end_factor=0.0, total_iters=total),
    ]
    for base, scheduler, rates in zip(bases, schedulers, seen):
        expected = []
        for _ in range(total):
            expected.append(base.param_groups[0]["lr"])
            base.step()
            scheduler.step()
        assert rates == pytest.approx(expected)


def test_a_schedule_runs_over_the_steps_of_all_turns() -> None:
    loop = make([forget(until=1), retain(turn=1)], schedule="linear", phase_schedule={RETAIN: "constant"})
    rates: list[tuple[int, float]] = []
    for k, optimizer in enumerate(loop.optimizers):
        optimizer.register_step_pre_hook(lambda o, *_, k=k: rates.append((k, o.param_groups[0]["lr"])))
    loop.run()
    total = 2 + 3 * 5
    assert rates[:2] == [(0, pytest.approx(LR)), (0, pytest.approx(LR * (1 - 1 / total)))]
    assert rates[2:] == [(1, pytest.approx(LR))] * 15


@pytest.mark.parametrize("setting", ["phase_lr", "phase_schedule"])
def test_settings_of_a_phase_that_is_not_there_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match="forgot"):
        make([retain(), forget()], **{setting: {"forgot": 0.1 if setting == "phase_lr" else "linear"}})
    with pytest.raises(UserError, match="above 0"):
        LoopConfig(phase_lr={RETAIN: 0.0})
    with pytest.raises(UserError, match="schedule of retain"):
        LoopConfig(phase_schedule={RETAIN: "cosin"})  # type: ignore[dict-item]


def test_fp16_with_several_states_is_refused() -> None:
    with pytest.raises(UserError, match="bf16"):
        make([retain(), forget()], precision="fp16")


# --- resuming --------------------------------------------------------------------------------------------------------


def in_turn() -> list[Phase]:
    return [
        forget(rule=Sharpness(rho=0.1, every=2), until=2),
        retain(rule=Sharpness(rho=0.1, every=3), turn=1),
        Phase(objective=CrossEntropy({FORGET: -0.1}), name="scaled", turn=1, scale=Scripted()),
    ]


@dataclass(frozen=True)
class Scripted(Scale):
    """Factors 1, 0, 0, 2, over and over; a counter and a sum of losses are kept."""

    def factor(self, loss: Tensor, memory: dict[str, Any]) -> Tensor:
        n = memory.get("n", 0)
        memory["n"] = n + 1
        before = memory.get("sum", torch.zeros_like(loss))
        memory["sum"] = torch.where(loss.isfinite(), before + loss, before)
        memory["last two"] = [*memory.get("last two", [loss]), loss][-2:]
        return loss.new_tensor((1.0, 0.0, 0.0, 2.0)[n % 4])


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("check_every", [1, 4])
def test_a_run_that_is_killed_at_any_step_of_any_turn_goes_on_to_the_same_bits(
    check_every: int, alternate: bool
) -> None:
    states: list[bytes] = []

    def save(at: Loop) -> None:
        file = io.BytesIO()
        torch.save(at.state_dict(), file)
        states.append(file.getvalue())

    whole = make(in_turn(), check_every=check_every, schedule="cosine", alternate=alternate)
    whole.run(save=save, save_seconds=0)
    retaining = 10 if alternate else 5
    assert len(states) == (2 + retaining) + 1 + (2 + retaining) + 1 + retaining + 1
    for state in states:
        other = make(in_turn(), check_every=check_every, schedule="cosine", alternate=alternate)
        with torch.no_grad():
            for p in other.model.parameters():
                p.zero_()
        other.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        other.run()
        assert same(state_of(other), state_of(whole))
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in loop.history] for loop in (other, whole)]
        assert rows[0] == rows[1]
        assert other.passes == whole.passes


def test_a_run_ends_where_it_is_told_to_and_stays_ended_after_it_was_resumed() -> None:
    saved = io.BytesIO()

    def save(at: Loop) -> None:
        saved.seek(0)
        torch.save(at.state_dict(), saved)

    loop, told = make(in_turn(), epochs=5), []

    def stop(row: Mapping[str, float]) -> bool:
        told.append(row["epoch"])
        return row["epoch"] == 2

    loop.run(stop=stop, save=save, on_epoch=lambda: {"extra": 1.0})
    assert told == [1, 2]
    assert [row["extra"] for row in loop.history] == [1.0, 1.0]
    at_the_end = state_of(loop)
    again = make(in_turn(), epochs=5)
    saved.seek(0)
    again.load_state_dict(torch.load(saved, weights_only=True))
    again.run(stop=stop, save=save)
    assert told == [1, 2]
    assert len(again.history) == 2
    assert same(state_of(again), at_the_end)


# --- breaks ----------------------------------------------------------------------------------------------------------


class Breaks(CrossEntropy):
    """Cross-entropy that is NaN at one evaluation of the whole run, in the value or in one gradient alone."""

    evaluations: ClassVar[itertools.count[int]] = itertools.count()
    at: ClassVar[int] = -1
    how: ClassVar[str] = "loss"

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        broken = next(self.evaluations) == self.at
        for name, term in super().terms(model, batches, at):
            if broken and self.how == "gradient":
                next(model.parameters()).register_hook(once(lambda g: g * float("nan")))
            yield name, term + float("nan") if broken and self.how == "loss" else term


def once(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor | None]:
    left = [change]
    return lambda g: left.pop()(g) if left else None


@pytest.mark.parametrize("check_every", [1, 3, 50])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_break_in_any_pass_of_any_turn_leaves_weights_states_and_memories_as_before(
    how: str, check_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def phases() -> list[Phase]:
        return [
            forget(objective=Breaks({FORGET: -0.3}), rule=Remembering()),
            retain(objective=Breaks({RETAIN: 1.0}), rule=Sharpness(rho=0.1), turn=1),
            Phase(objective=Breaks({FORGET: -0.1}), rule=Remembering(), name="scaled", turn=1, scale=Scripted()),
        ]

    monkeypatch.setattr(Breaks, "how", how)
    healthy = make(phases(), epochs=2)
    states, places, evaluations = [state_of(healthy)], [], 0
    take = healthy._stepper.step

    def noting(*args: Any, **kwargs: Any) -> None:
        nonlocal evaluations
        now = next(Breaks.evaluations)
        monkeypatch.setattr(Breaks, "evaluations", itertools.count(now))
        places.extend((healthy._stepper.steps, k) for k in range(evaluations, now))
        evaluations = now
        take(*args, **kwargs)

    monkeypatch.setattr(Breaks, "evaluations", itertools.count())
    healthy._stepper.step = noting  # type: ignore[method-assign]
    healthy.run(save=lambda at: states.append(state_of(at)) if at.batch else None, save_seconds=0)
    assert len(places) == 2 * (2 * 1 + 5 * (2 + 1))
    assert len(states) == 1 + 2 * 7

    for step, evaluation in places:
        monkeypatch.setattr(Breaks, "evaluations", itertools.count())
        monkeypatch.setattr(Breaks, "at", evaluation)
        loop = make(phases(), epochs=2, check_every=check_every)
        with pytest.raises(NonFiniteError, match=f"step {step + 1};"):
            loop.run()
        monkeypatch.setattr(Breaks, "at", -1)
        assert same(state_of(loop), states[step]), (step, evaluation)
        assert loop._done() == step
        loop.run()  # and goes on from there
        assert same(state_of(loop), states[-1])


@dataclass(frozen=True, kw_only=True)
class Remembering(Rule):
    """The plain gradient; keeps what a rule may keep: tensors, lists of them, plain values, from passes and weights."""

    passes = 1.0  # type: ignore[assignment]

    def gradient(self, point: Point) -> Gradients:
        g = point.gradient()
        point.memory["steps"] = point.memory.get("steps", 0) + 1
        point.memory["last"] = [None if x is None else x.clone() for x in g]
        if point.step == 1:
            point.memory["late"] = torch.ones(())
        return g

    def after_step(self, weights: Any, memory: dict[str, Any], done: float) -> None:
        before = memory.get("mean", torch.zeros(()).double())
        memory["mean"] = 0.5 * before + 0.5 * weights[0].detach().mean()
        memory["done"] = done
        memory.pop("late" if done > 0.5 else "nothing", None)

    def turned(self) -> Rule:
        return self


def test_what_a_step_did_to_a_memory_is_undone_where_the_step_does_not_count() -> None:
    good, bad = torch.tensor(True), torch.tensor(False)
    guard, memory = MemoryGuard(), {"kept": torch.zeros(2), "list": [torch.zeros(2), None], "plain": 1, "gone": "x"}

    def change(step: int, flag: Tensor, **new: Any) -> None:
        before = dict(memory)
        memory.update(new)
        memory.pop("gone", None)
        guard.keep(before, memory, flag, step)

    change(0, good, kept=torch.ones(2), list=[torch.ones(2), None], plain=2)
    assert torch.equal(memory["kept"], torch.ones(2))
    change(1, bad, kept=torch.full((2,), 7.0), list=[torch.full((2,), 7.0), None], plain=3, fresh=torch.ones(3))
    change(2, bad, kept=torch.ones(3), plain=4, fresh=torch.zeros(3))
    guard.settle(1)
    assert memory.keys() == {"kept", "list", "plain"}
    assert torch.equal(memory["kept"], torch.ones(2))
    assert torch.equal(memory["list"][0], torch.ones(2))
    assert memory["list"][1] is None
    assert memory["plain"] == 2
    guard.settle(0)  # nothing is left to undo
    assert memory["plain"] == 2


# --- factors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("options", [{}, {"fused": True}])
@pytest.mark.parametrize("first", [0, 1])
def test_a_phase_of_factor_0_rests_with_its_state(first: int, options: dict[str, Any], check_every: int) -> None:
    """No momentum, no decay, no step; without a state of its own it only adds nothing."""

    @dataclass(frozen=True)
    class Factors(Scale):
        def factor(self, loss: Tensor, memory: dict[str, Any]) -> Tensor:
            memory["n"] = memory.get("n", first - 1) + 1
            return loss.new_tensor(factors[memory["n"]])

    factors = [0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.5, 0.0] * 3
    loop = make([retain(), forget(scale=Factors())], base=lambda named: sgd(named, **options), check_every=check_every)
    loop.run()

    expected = network()
    named = dict(expected.named_parameters())
    optimizers = [torch.optim.SGD(named.values(), lr=LR, momentum=0.9, weight_decay=decay) for decay in (DECAY, 0.0)]
    factor = iter(factors[first:])
    for epoch in range(3):
        read = streams()
        for r, f in zip(read[RETAIN].epoch(epoch), read[FORGET].epoch(epoch, n_batches=5)):
            grads = []
            for weight, batch in ((1.0, r), (-0.3, f)):
                loss = weight * nn.functional.cross_entropy(expected(batch.inputs), batch.labels)
                grads.append(torch.autograd.grad(loss, list(named.values())))
            for optimizer, grad, by in zip(optimizers, grads, (1.0, next(factor))):
                for p, g in zip(named.values(), grad):
                    p.grad = by * g
                if by > 0:
                    optimizer.step()
    for p, q in zip(loop.model.parameters(), named.values()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(loop.optimizers, optimizers, strict=True):
            found, wanted = mine.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


# --- pieces of a batch -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InPieces(Rule):
    """The mean of the gradients on n pieces of the batch."""

    n: int

    @property
    def passes(self) -> float:
        return 1

    @property
    def pieces(self) -> int:
        return self.n

    def gradient(self, point: Point) -> Gradients:
        parts = [part.gradient() for part in point.parts(self.n)]
        return [torch.stack([g for g in together if g is not None]).mean(0) for together in zip(*parts)]

    def turned(self) -> Rule:
        return self


def test_the_mean_over_equal_pieces_is_the_gradient_on_the_whole_batch() -> None:
    data = {RETAIN: Stream(samples(), np.arange(16), 8, 0), FORGET: Stream(samples(), np.arange(16, 20), 4, 0)}

    def run(n: int) -> Loop:
        phase = Phase(objective=CrossEntropy({RETAIN: 1.0, FORGET: -0.2}), rule=InPieces(n=n), name="loss")
        loop = Loop(network(), [phase], data, LoopConfig(epochs=2, batch_size=8), make_optimizer=sgd)
        loop.run()
        return loop

    whole = run(1)
    for n in (2, 4):
        loop = run(n)
        for p, q in zip(loop.model.parameters(), whole.model.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        assert loop.passes == whole.passes == 2 * 2 * 2
        for row, other in zip(loop.history, whole.history, strict=True):
            assert {k: v for k, v in row.items() if k != "seconds"} == pytest.approx(
                {k: v for k, v in other.items() if k != "seconds"}
            )
    with pytest.raises(UserError, match="4 samples cannot be cut into 5"):
        run(5)


# --- ends ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EndsAtZero(Rule):
    """Ends with weights of 0.5 in its region."""

    @property
    def passes(self) -> float:
        return 1

    def gradient(self, point: Point) -> Gradients:
        return point.gradient()

    def after_step(self, weights: Any, memory: dict[str, Any], done: float) -> None:
        memory["final"] = [torch.full_like(w, 0.5) for w in weights]

    def final_weights(self, memory: Mapping[str, Any]) -> list[Tensor] | None:
        return memory["final"]

    def turned(self) -> Rule:
        return self


@pytest.mark.parametrize("until", [None, 1])
def test_final_weights_stand_in_their_region_and_statistics_are_taken_anew_at_them(until: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    one, other = halves(model)
    phases = [retain(rule=EndsAtZero(), region=one, until=until), forget(region=other, until=until)]
    loop = make(phases, model=model)
    last: list[dict[str, Tensor]] = []
    loop.run(save=lambda at: last.append({n: p.detach().clone() for n, p in at.model.named_parameters()}))
    for n, p in model.named_parameters():
        assert bool((p[one[n]] == 0.5).all())
        assert torch.equal(p[other[n]], last[-1][n][other[n]])
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    means = [model[0](batch.inputs).mean(0) for batch in streams()[RETAIN].epoch(3)]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0).detach())
    assert norm.num_batches_tracked == len(means)
