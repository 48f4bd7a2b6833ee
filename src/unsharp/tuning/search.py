"""Which settings are tried, in which order, and which of what was tried is chosen; plain functions of tables."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unsharp.errors import UserError
from unsharp.methods.base import Method
from unsharp.phases import RETAIN, Phase

Axes = Mapping[str, tuple[Any, ...]]
Place = tuple[int, ...]
"""A point of the lattice: for each axis the number of its value."""
WHOLE = 9
"""A lattice of no more places than this is tried whole."""
AXIS_WHOLE = 3
"""In a larger one, of an axis with more values than this every second is tried at first."""
NOT_SGD = 0.01
"""What a declared learning rate is multiplied by for an optimiser that normalises its steps."""
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Point:
    """A network that a trial passed through, and what it took to get there.

    Args:
        trial: Number of the trial, in the order in which trials were planned.
        settings: What was searched, by name, the number of epochs among it.
        retain_accuracy: 0–100, on retained samples.
        forget_accuracy: 0–100, on all of the forget set.
        unseen_accuracy: 0–100, on unseen samples; None where there are none. It takes no part in the choice.
        passes: Forward–backward passes of a run that ends here.
        seconds: Its wall time.
    """

    trial: int
    settings: dict[str, Any]
    retain_accuracy: float
    forget_accuracy: float
    unseen_accuracy: float | None
    passes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one trial.

    Args:
        number: In the order in which trials were planned, from 0.
        place: Where on the lattice.
        points: Networks that it passed through.
        passes: What it took.
        failed: Why it broke off, or None.
    """

    number: int
    place: Place
    points: tuple[Point, ...]
    passes: int
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a good point is.

    Args:
        target: Forget accuracy that is aimed at, 0–100.
        floor: Retain accuracy that must be kept, 0–100.
        tolerance: Points by which a distance may exceed the least one and still count as equal, at least 0.
    """

    target: float
    floor: float
    tolerance: float = 0.0

    def distance(self, point: Point) -> float:
        """How far the forget accuracy is from the target, in points."""
        return abs(point.forget_accuracy - self.target)

    def met_by(self, point: Point) -> bool:
        """Whether the retain accuracy is at the floor or above."""
        return point.retain_accuracy >= self.floor - ROUNDING


def choose(points: Sequence[Point], goal: Goal) -> Point:
    """The point whose forget accuracy is nearest to the target, among those that keep the floor.

    Of equally near ones the cheapest in passes is taken, then the one with the highest retain accuracy, then the first.
    Where no point keeps the floor, it is the one that loses least: the highest retain accuracy, then the nearest, the
    cheapest, the first.

    Raises:
        ValueError: if there is no point.
    """
    kept = [p for p in points if goal.met_by(p)]
    if not kept:
        return min(points, key=lambda p: (-p.retain_accuracy, goal.distance(p), p.passes))
    least = min(map(goal.distance, kept))
    near = [p for p in kept if goal.distance(p) <= least + goal.tolerance + ROUNDING]
    return min(near, key=lambda p: (p.passes, -p.retain_accuracy))


# --- axes -------------------------------------------------------------------------------------------------------------


def declared(method: type[Method]) -> dict[str, tuple[Any, ...]]:
    """What a method and the classes above it declare as tunable, the method's own first."""
    found: dict[str, tuple[Any, ...]] = {}
    for cls in method.__mro__:
        for name, values in vars(cls).get("tunable", {}).items():
            found.setdefault(name, tuple(values))
    return found


def axes_of(
    method: type[Method], given: Mapping[str, Any], search: Mapping[str, Sequence[Any]], *, sgd: bool = True
) -> dict[str, tuple[Any, ...]]:
    """What is searched: what the method declares and nobody gave a value for, and what the user wants searched.

    Args:
        method: The method.
        given: Settings that have a value already.
        search: Values of settings, in order; they take the place of declared ones.
        sgd: Whether the optimiser is SGD, for which declared rates are meant; for another they are a hundredth.

    Raises:
        UserError: if a setting is both given and searched, has no or equal values, or nothing is left to search.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    for name, values in declared(method).items():
        if name not in given:
            scaled = name == "lr" and not sgd
            axes[name] = tuple(float(f"{NOT_SGD * v:.3g}") for v in values) if scaled else values
    for name, values in search.items():
        if name in given:
            raise UserError(f"{name} is both given ({given[name]}) and to be searched; leave one out")
        if len({json.dumps(v) for v in values}) < max(len(values), 1):
            raise UserError(f"--search {name} needs values, each once, got {', '.join(map(str, values)) or 'none'}")
        axes[name] = tuple(values)
    if not any(len(values) > 1 for values in axes.values()):
        raise UserError(
            "there is nothing to search: every setting that this method declares as tunable is given; leave one out, "
            "or name values, such as --search lr=0.003,0.01,0.03"
        )
    return axes


def read_search(texts: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """`NAME=VALUE,VALUE,...` as values by name; numbers are numbers. Raises: UserError for another form."""
    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name or not all(v.strip() for v in values.split(",")):
            raise UserError(f"--search must be NAME=VALUE,VALUE,..., such as lr=0.003,0.01,0.03; got {text!r}")
        if name in found:
            raise UserError(f"--search names {name} twice; name all of its values at once")
        found[name] = tuple(_value(v.strip()) for v in values.split(","))
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


# --- the lattice ------------------------------------------------------------------------------------------------------


def coarse(axes: Axes, seed: int) -> list[Place]:
    """The first trials, from the middle outwards: all of a small lattice; else every second value of a long axis.

    Args:
        axes: Values by name.
        seed: Orders what lies equally far from the middle.
    """
    most = AXIS_WHOLE if math.prod(len(v) for v in axes.values()) > WHOLE else WHOLE
    lines = [range(len(v)) if len(v) <= most else range(1, len(v), 2) for v in axes.values()]
    places = list(itertools.product(*lines))
    middle = [(line[0] + line[-1]) / 2 for line in lines]
    by_chance = np.random.default_rng(seed).random(len(places))
    away = [sum(abs(i - m) / max(len(v) - 1, 1) for i, m, v in zip(p, middle, axes.values())) for p in places]
    return [places[i] for i in sorted(range(len(places)), key=lambda i: (round(away[i], 9), by_chance[i]))]


def neighbours(axes: Axes, place: Place, seed: int) -> list[Place]:
    """The places one step away along one axis, in an order that the seed decides."""
    found = []
    for k, values in enumerate(axes.values()):
        found += [(*place[:k], i, *place[k + 1 :]) for i in (place[k] - 1, place[k] + 1) if 0 <= i < len(values)]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def settings_at(axes: Axes, place: Place) -> dict[str, Any]:
    """The settings at a place of the lattice."""
    return {name: values[i] for (name, values), i in zip(axes.items(), place)}


def affordable(places: Sequence[Place], costs: Sequence[float], left: float) -> list[Place]:
    """The places in their order, as far as what is left pays for them; one that is too dear is passed over."""
    found = []
    for place, cost in zip(places, costs):
        if cost <= left + ROUNDING:
            found.append(place)
            left -= cost
    return found


# --- the search -------------------------------------------------------------------------------------------------------


def explore(
    axes: Axes,
    goal: Goal,
    *,
    seed: int,
    budget: float | None,
    cost: Callable[[Place], float | None],
    run: Callable[[Sequence[Place], int], Sequence[Trial]],
) -> list[Trial]:
    """Try the coarse places, then the neighbours of the best so far, round by round, until the budget is spent.

    Where all neighbours of the best were tried, those of the next best are. What was tried decides what is tried next,
    so that the same answers of `run` give the same search.

    Args:
        axes: Values by name.
        goal: What a good point is.
        seed: Orders what is equal.
        budget: Passes for all trials; None is what the coarse places and one round of neighbours take.
        cost: The passes that a trial is expected to take; None where only a trial can tell. Then the first one is run
            alone, the dearest so far stands for those to come, and the last may exceed the budget.
        run: Runs trials at some places and numbers them from the number given.

    Returns:
        The trials, in the order of their numbers; none where the budget pays for none.
    """
    trials: list[Trial] = []
    places = coarse(axes, seed)

    def expected(place: Place) -> float:
        known = cost(place)
        if known is None:
            return float(max((t.passes for t in trials), default=0))
        # a rule may take passes that nobody can foresee; what trials took so far tells of those to come
        return known * max([1.0, *(t.passes / c for t in trials if (c := cost(t.place)))])

    if cost(places[0]) is None:
        trials += run(places[:1], 0)
    limit = whole_budget([expected(p) for p in places], axes) if budget is None else budget
    fresh = [p for p in places if p not in {t.place for t in trials}] or _around(trials, axes, goal, seed)
    while fresh:
        left = limit - sum(t.passes for t in trials)
        chosen = affordable(fresh, [expected(p) for p in fresh], left)
        if not chosen:
            break
        trials += run(chosen, len(trials))
        fresh = _around(trials, axes, goal, seed)
    return trials


def _around(trials: Sequence[Trial], axes: Axes, goal: Goal, seed: int) -> list[Place]:
    """The untried neighbours of the best trial that has any."""
    tried, left = {t.place for t in trials}, {t.number: t for t in trials if t.points}
    while left:
        best = left.pop(choose([p for t in left.values() for p in t.points], goal).trial)
        fresh = [p for p in neighbours(axes, best.place, seed) if p not in tried]
        if fresh:
            return fresh
    return []


def whole_budget(costs: Sequence[float], axes: Axes) -> float:
    """What the coarse places and one round of neighbours take, these as dear as the dearest of those."""
    around = 2 * sum(len(values) > 1 for values in axes.values())
    left = math.prod(len(values) for values in axes.values()) - len(costs)
    return sum(costs) + max(costs) * min(around, left)


# --- cost -------------------------------------------------------------------------------------------------------------


def expected_passes(phases: Sequence[Phase], n_batches: Mapping[str, int], epochs: int) -> float:
    """The passes that a run of these phases takes, without its preparation.

    Args:
        phases: As a method makes them.
        n_batches: Of each stream, batches in which each sample comes once.
        epochs: Epochs of the run.
    """
    acting = [phase for phase in phases if phase.objective.streams]
    total = forwards = 0.0
    for epoch in range(epochs):
        turns: dict[int, list[Phase]] = {}
        for phase in acting:
            if phase.acts_in(epoch):
                turns.setdefault(phase.turn, []).append(phase)
        for members in turns.values():
            used = {stream for phase in members for stream in phase.objective.streams}
            steps = n_batches[RETAIN if RETAIN in used else min(used)]
            total += steps * sum(phase.passes for phase in members)
            forwards += steps * sum(map(_forwards, members))
    return total + forwards / 3  # a pass forward alone is a third of a pass


def _forwards(phase: Phase) -> int:
    """Batches that a step of the phase sends forward alone: through teachers, or for a perturbation from other data."""
    apart = phase.perturbs_apart and phase.rule.passes_beside > 1
    return phase.objective.other_forwards + (len(phase.objective.streams) if apart else 0)


def epoch_passes(n_samples: int, batch_size: int) -> int:
    """Passes of one epoch of plain training on so many samples: the unit of a budget."""
    return math.ceil(n_samples / batch_size)
