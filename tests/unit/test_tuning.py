"""A search without a retrained network: the target, the choice, the budget, and a share of the retained samples."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from contract import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unsharp import unlearning
from unsharp.artifacts import Workspace
from unsharp.data.draws import draws
from unsharp.data.samples import TensorSamples
from unsharp.data.share import share_of
from unsharp.data.streams import Stream
from unsharp.errors import UserError
from unsharp.methods import METHODS, AppliedMethod, PhasedMethod, Problem
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase
from unsharp.report.tuning import render_tuning
from unsharp.sharpness import RULES
from unsharp.tuning import TuneConfig, search
from unsharp.tuning import target as targets
from unsharp.tuning.search import Goal, Point, Trial, choose, explore
from unsharp.tuning.target import Seen, TargetPlan, Unseen
from unsharp.tuning.trials import nested
from unsharp.unlearning import UnlearnConfig, configure

# --- a share of the retained samples ----------------------------------------------------------------------------------


def labelled(labels: Sequence[int], **source: Any) -> TensorSamples:
    values = np.asarray(labels)
    names = [str(i) for i in range(int(values.max()) + 1)]
    return TensorSamples(torch.arange(len(values), dtype=torch.float32)[:, None], values, names, **source)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_a_share_takes_of_each_class_so_many_and_at_least_one(
    labels: list[int], fraction: float, seed: int, data: st.DataObject
) -> None:
    samples = labelled(labels)
    kept = sorted(data.draw(st.sets(st.integers(0, len(labels) - 1), min_size=1)))
    share = share_of(samples, np.array(kept), fraction, seed)
    assert list(share) == sorted(set(share.tolist()))
    assert set(share.tolist()) <= set(kept)
    for c in set(labels):
        there = sum(labels[i] == c for i in kept)
        # round() of Python goes to the even neighbour, as documented for fractions elsewhere
        assert sum(labels[i] == c for i in share) == (max(1, round(fraction * there)) if there else 0)
    again = share_of(samples, np.array(kept), fraction, seed)
    assert again.tolist() == share.tolist()


def test_a_smaller_share_lies_within_a_larger_one_and_another_seed_draws_another() -> None:
    samples, everything = labelled(np.arange(400) % 4), np.arange(400)
    shares = [set(share_of(samples, everything, f, 3).tolist()) for f in (0.05, 0.2, 0.7, 1.0)]
    assert all(small < large for small, large in itertools.pairwise(shares))
    assert shares[-1] == set(range(400))
    other = set(share_of(samples, everything, 0.2, 4).tolist())
    assert len(other) == len(shares[1]) == 80
    assert len(other & shares[1]) < 40  # 16 are expected of two independent draws


def test_whether_a_sample_is_drawn_depends_on_its_place_in_the_source_alone() -> None:
    """In a slice that leaves out whole classes, the same samples of the others are drawn."""
    labels = np.arange(120) % 3
    whole = share_of(labelled(labels), np.arange(120), 0.3, 7)
    rows = np.flatnonzero(labels < 2)
    part = labelled(labels[rows], source_positions=rows, source_size=120)
    assert rows[share_of(part, np.arange(len(rows)), 0.3, 7)].tolist() == whole[labels[whole] < 2].tolist()


def test_the_draw_of_a_share_has_no_number_in_common_with_the_streams() -> None:
    samples, everything = labelled(np.zeros(1000, int)), np.arange(1000)
    share = set(share_of(samples, everything, 0.1, 0).tolist())
    for epoch in range(3):
        first = next(Stream(samples, everything, 100, 0).epoch(epoch))
        assert len(share & set(first.indices.tolist())) < 30  # 10 are expected of independent draws
        table = draws(0, epoch, 1000)
        for numbers in (*table.T, table.ravel()[:1000]):
            assert len(share & set(np.argsort(numbers)[:100].tolist())) < 30


def smooth_problem() -> tuple[nn.Module, Any]:
    return cases.network("smooth"), cases.images()


@pytest.mark.parametrize("method", ["neggrad", "finetune", "sharp_minmax"])
def test_a_run_reads_its_share_of_the_retained_samples_and_no_other(method: str) -> None:
    model, samples = smooth_problem()
    how = configure(method, epochs=2, batch_size=8, retain_fraction=0.5, seed=5)
    seen: set[int] = set()
    read = samples.batches

    def noted(order: np.ndarray, sizes: Any, *, draws: Any) -> Any:
        seen.update(np.asarray(order).tolist())
        return read(order, sizes, draws=draws)

    samples.batches = noted
    _, record = unlearning.run(model, samples, cases.FORGOTTEN, cases.RETAINED, how)
    share = share_of(samples, cases.RETAINED, 0.5, 5)
    assert seen - set(cases.FORGOTTEN.tolist()) == set(share.tolist())
    assert record.about["retain_fraction"] == 0.5
    assert record.about["n_retained"] == len(share) < len(cases.RETAINED)


def test_a_run_on_a_share_is_a_run_on_those_samples() -> None:
    model, samples = smooth_problem()
    share = share_of(samples, cases.RETAINED, 0.4, 0)
    how = configure("neggrad", rule="sam", epochs=2, batch_size=8)
    by_hand, _ = unlearning.run(model, samples, cases.FORGOTTEN, share, how)
    run, _ = unlearning.run(
        model, samples, cases.FORGOTTEN, cases.RETAINED, dataclasses.replace(how, retain_fraction=0.4)
    )
    whole, _ = unlearning.run(model, samples, cases.FORGOTTEN, cases.RETAINED, how)
    assert weights(run) == weights(by_hand)
    assert weights(run) != weights(whole)


def test_the_share_is_what_a_method_with_work_of_its_own_is_given() -> None:
    seen: list[Problem] = []

    class Own(AppliedMethod):
        def apply(self, problem: Problem) -> Any:
            seen.append(problem)
            return problem.model, unlearning.Record(history=[], seconds=0.0, passes=3, peak_memory_bytes=None)

    model, samples = smooth_problem()
    METHODS._objects["own"] = Own  # type: ignore[attr-defined]
    try:
        how = UnlearnConfig(method=Own(), retain_fraction=0.3, seed=2)
        _, record = unlearning.run(model, samples, cases.FORGOTTEN, cases.RETAINED, how)
    finally:
        del METHODS._objects["own"]  # type: ignore[attr-defined]
    assert seen[0].retain.tolist() == share_of(samples, cases.RETAINED, 0.3, 2).tolist()
    assert record.about["n_retained"] == len(seen[0].retain)


def test_a_killed_run_on_a_share_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model, samples = smooth_problem()
    how = configure("neggrad", epochs=3, batch_size=8, retain_fraction=0.5)

    class Killed(Exception):
        pass

    def stop_after_two(epochs: list[int]) -> Any:
        def look(_: nn.Module) -> dict[str, float]:
            epochs.append(1)
            if len(epochs) == 2:
                raise Killed
            return {}

        return look

    workspace = Workspace(tmp_path)
    with pytest.raises(Killed):
        unlearning.run(
            model, samples, cases.FORGOTTEN, cases.RETAINED, how, workspace=workspace, on_epoch=stop_after_two([])
        )
    resumed, again = unlearning.run(model, samples, cases.FORGOTTEN, cases.RETAINED, how, workspace=workspace)
    straight, once = unlearning.run(model, samples, cases.FORGOTTEN, cases.RETAINED, how)
    assert weights(resumed) == weights(straight)
    assert again.about["n_retained"] == once.about["n_retained"]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_a_share_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"retain_fraction must be in \(0, 1\]"):
        configure("neggrad", retain_fraction=fraction)


@pytest.mark.parametrize("method", ["retrain", "gradient_ascent"])
def test_a_share_is_refused_where_it_would_be_ignored(method: str) -> None:
    with pytest.raises(UserError, match="retain_fraction"):
        configure(method, retain_fraction=0.5)
    configure(method, retain_fraction=1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_reads_no_retained_sample_says_so(name: str) -> None:
    method = METHODS[name]
    if not issubclass(method, PhasedMethod):
        return
    model, samples = smooth_problem()
    problem = Problem(
        model=model, samples=samples, forget=cases.FORGOTTEN, retain=cases.RETAINED, rule=RULES[method.default_rule]()
    )
    default = method()
    reads = any(RETAIN in phase.objective.streams for phase in default.phases(problem))
    assert reads != bool(default.no_retain_fraction), f"{name}: no_retain_fraction says otherwise than the phases"


def weights(model: nn.Module) -> dict[str, Any]:
    return {name: cases.as_bytes(value) for name, value in model.state_dict().items()}


# --- the target -------------------------------------------------------------------------------------------------------

some_labels = st.lists(st.integers(0, 3), min_size=1, max_size=25)


@given(unseen=some_labels, wanted=some_labels)
def test_class_weights_give_each_class_its_share(unseen: list[int], wanted: list[int]) -> None:
    wanted = [c for c in wanted if c in unseen] or [unseen[0]]
    correct = np.random.default_rng(len(unseen)).integers(0, 2, len(unseen))
    found = targets.class_weights(np.array(unseen), np.array(wanted)) @ correct
    # By hand: for each sample that is wanted, the mean over the unseen samples of its class.
    by_hand = sum(np.mean([correct[i] for i, c in enumerate(unseen) if c == want]) for want in wanted) / len(wanted)
    assert found == pytest.approx(by_hand)


@given(
    unseen=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=20),
    wanted=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=12),
    n=st.integers(1, 6),
    share=st.sampled_from([0.1, 0.34, 1.0]),
)
def test_matched_weights_are_means_over_the_nearest_of_the_class(
    unseen: list[tuple[int, int]], wanted: list[tuple[int, int]], n: int, share: float
) -> None:
    wanted = [w for w in wanted if w[0] in {c for c, _ in unseen}] or unseen[:1]
    labels, scores = (np.array(v) for v in zip(*unseen))
    want_labels, want_scores = (np.array(v) for v in zip(*wanted))
    expected = np.zeros(len(unseen))
    for c, score in wanted:
        of_class = sorted((abs(s - score), i) for i, (k, s) in enumerate(unseen) if k == c)
        nearest = of_class[: min(n, math.ceil(share * len(of_class)))]
        for _, i in nearest:
            expected[i] += 1 / len(nearest) / len(wanted)
    ours, theirs = scores.astype(float), want_scores.astype(float)
    found = targets.matched_weights(labels, ours, want_labels, theirs, n, share)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_error_of_a_plain_mean_is_that_of_a_share() -> None:
    correct = np.repeat([1, 0], [70, 30])
    mean, error = targets.weighted(correct, np.full(100, 0.01))
    assert (mean, error) == (pytest.approx(70.0), pytest.approx(100 * math.sqrt(0.7 * 0.3 / 100)))


def test_the_error_of_a_weighted_mean_is_how_much_it_varies() -> None:
    """Answers drawn anew again and again, at one accuracy for all."""
    random = np.random.default_rng(0)
    weights = random.dirichlet(np.ones(300))
    draws = random.random((4000, 300)) < 0.6
    means = [targets.weighted(d.astype(int), weights) for d in draws]
    assert np.mean([e for _, e in means]) == pytest.approx(np.std([m for m, _ in means]), rel=0.05)


def test_chances_by_the_definition_of_the_scores() -> None:
    assert targets.chances(np.array([-0.2, -1.0]), "cscore") == pytest.approx([0.2, 1.0])
    assert targets.chances(np.array([0.9, -0.1, 0.0]), "memorization") == pytest.approx([0.1, 1.0, 1.0])
    for scores, kind in (([-3.0, -0.1], "cscore"), ([2.0], "memorization"), ([0.1], "cscore")):
        with pytest.raises(UserError, match="--target-accuracy"):
            targets.chances(np.array(scores), kind)  # type: ignore[arg-type]


@given(chance=st.lists(st.floats(0, 1), min_size=2, max_size=30), mean=st.floats(0.02, 0.98))
def test_shifted_chances_have_the_mean_and_the_order(chance: list[float], mean: float) -> None:
    values = np.array(chance)
    moved = targets.shifted(values, mean)
    assert moved.mean() == pytest.approx(mean, abs=1e-6)
    order = np.argsort(values, kind="stable")
    assert (np.diff(moved[order]) >= -1e-12).all()
    odds = [np.log(v / (1 - v)) - np.log(m / (1 - m)) for v, m in zip(np.clip(values, 1e-3, 1 - 1e-3), moved)]
    assert np.ptp(odds) < 1e-6  # one number for all, on the logit scale


def test_the_target_by_classes() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    unseen = Unseen(labels=np.array([0, 0, 1, 1, 1, 1]), name="test")
    plan = TargetPlan("auto", Seen(labels=labels, forget=np.array([0, 3, 4])), unseen)
    found = plan.target(np.array([1, 0, 1, 1, 1, 0]))
    assert found.kind == "classes"
    assert found.accuracy == pytest.approx(100 * (1 / 3 * 1 / 2 + 2 / 3 * 3 / 4))
    assert any("by their classes alone" in note for note in found.notes)


def test_a_class_that_is_forgotten_whole_is_aimed_at_0() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    unseen = Unseen(labels=np.array([0, 0, 1, 1]), name="test")
    correct = np.array([1, 1, 1, 0])
    whole = TargetPlan("auto", Seen(labels=labels, forget=np.array([0, 1, 2])), unseen).target(correct)
    assert whole.accuracy == 0.0
    mixed = TargetPlan("auto", Seen(labels=labels, forget=np.array([0, 1, 2, 3])), unseen).target(correct)
    assert mixed.accuracy == pytest.approx(0.25 * 50.0)
    assert any("whole class" in note for note in mixed.notes)
    scores = np.full(8, 0.5)
    by_scores = Seen(labels=labels, forget=np.array([0, 1, 2, 3]), scores=scores)
    assert TargetPlan("scores", by_scores, unseen).target(correct).accuracy == pytest.approx(
        0.25
        * (3 / 8 * 100 + 5 / 8 * 50)  # equal chances are all the accuracy on unseen samples, weighted as in training
    )


def test_a_class_without_unseen_samples_is_left_out_and_said() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    unseen = Unseen(labels=np.array([0, 0, 1, 1]), name="validation")
    seen = Seen(labels=labels, forget=np.array([0, 6]))
    found = TargetPlan("auto", seen, unseen).target(np.array([1, 0, 1, 1]))
    assert found.accuracy == pytest.approx(50.0)
    assert any("classes 2 have no validation sample" in note for note in found.notes)
    with pytest.raises(UserError, match="--target-accuracy"):
        TargetPlan("auto", Seen(labels=labels, forget=np.array([6])), unseen)


def test_which_target_is_taken_by_itself() -> None:
    labels = np.arange(12) % 2
    seen = Seen(labels=labels, forget=np.array([0, 1]), scores=np.linspace(0, 1, 12))
    plain = Unseen(labels=np.array([0, 1, 0, 1]), name="test")
    scored = dataclasses.replace(plain, scores=np.linspace(0, 1, 4))
    assert TargetPlan("auto", seen, plain).kind == "scores"
    assert TargetPlan("auto", seen, scored).kind == "matched"
    assert TargetPlan("classes", seen, scored).kind == "classes"
    assert TargetPlan("auto", dataclasses.replace(seen, scores=None), plain).kind == "classes"
    wild = TargetPlan("auto", dataclasses.replace(seen, scores=np.linspace(0, 9, 12)), plain)
    assert wild.kind == "classes"
    assert any("difficulty is left out" in note for note in wild.notes)
    with pytest.raises(UserError, match="no unseen samples"):
        TargetPlan("auto", seen, None)
    with pytest.raises(UserError, match="--unseen-scores"):
        TargetPlan("matched", seen, plain)
    with pytest.raises(UserError, match="--train-scores"):
        TargetPlan("scores", dataclasses.replace(seen, scores=None), plain)


def test_targets_on_data_whose_held_out_accuracy_is_known() -> None:
    """Each sample has a chance p of being answered rightly when unseen; the hardest tenth is forgotten."""
    random = np.random.default_rng(1)
    chance, unseen_chance = random.beta(2, 1, 4000), random.beta(2, 1, 3000)
    labels, unseen_labels = random.integers(0, 3, 4000), random.integers(0, 3, 3000)
    forget = np.sort(np.argsort(chance)[:400])
    correct = (random.random(3000) < unseen_chance).astype(int)
    seen = Seen(labels=labels, forget=forget, scores=-chance, score_kind="cscore")
    unseen = Unseen(labels=unseen_labels, name="test", scores=-unseen_chance)
    truth = 100 * chance[forget].mean()
    matched = TargetPlan("matched", seen, unseen).target(correct)
    assert abs(matched.accuracy - truth) < 3 * matched.error  # type: ignore[operator]
    by_scores = TargetPlan("scores", seen, unseen).target(correct)
    assert by_scores.accuracy == pytest.approx(truth, abs=2.0)
    by_classes = TargetPlan("classes", seen, unseen).target(correct)
    assert by_classes.accuracy > truth + 30  # what the documentation warns of


# --- the choice -------------------------------------------------------------------------------------------------------

accuracies = st.integers(0, 20).map(lambda i: 5.0 * i)
points_of = st.lists(
    st.builds(
        Point,
        trial=st.integers(0, 5),
        settings=st.just({}),
        retain_accuracy=accuracies,
        forget_accuracy=accuracies,
        unseen_accuracy=st.none(),
        passes=st.integers(1, 4),
        seconds=st.just(1.0),
    ),
    min_size=1,
    max_size=20,
)


def better(a: Point, b: Point, goal: Goal) -> bool:
    """Whether a is to be taken before b, said as a person would."""
    ok_a, ok_b = a.retain_accuracy >= goal.floor, b.retain_accuracy >= goal.floor
    if ok_a != ok_b:
        return ok_a
    away_a, away_b = abs(a.forget_accuracy - goal.target), abs(b.forget_accuracy - goal.target)
    if not ok_a and a.retain_accuracy != b.retain_accuracy:
        return a.retain_accuracy > b.retain_accuracy
    if away_a != away_b:
        return away_a < away_b
    if a.passes != b.passes:
        return a.passes < b.passes
    return a.retain_accuracy > b.retain_accuracy


@settings(max_examples=300)
@given(points=points_of, target=accuracies, floor=accuracies)
def test_the_choice_is_that_of_a_naive_tournament(points: list[Point], target: float, floor: float) -> None:
    goal = Goal(target=target, floor=floor)
    best = points[0]
    for point in points[1:]:
        if better(point, best, goal):
            best = point
    assert choose(points, goal) is best


@given(points=points_of, target=accuracies, floor=accuracies, tolerance=st.integers(0, 6))
def test_within_the_tolerance_the_cheapest_is_chosen(
    points: list[Point], target: float, floor: float, tolerance: int
) -> None:
    goal = Goal(target=target, floor=floor, tolerance=5.0 * tolerance)
    kept = [p for p in points if p.retain_accuracy >= floor]
    if not kept:
        return
    least = min(abs(p.forget_accuracy - target) for p in kept)
    near = [p for p in kept if abs(p.forget_accuracy - target) <= least + goal.tolerance]
    cheapest = [p for p in near if p.passes == min(q.passes for q in near)]
    assert choose(points, goal) in [
        p for p in cheapest if p.retain_accuracy == max(q.retain_accuracy for q in cheapest)
    ]


def test_the_order_in_which_points_are_told_decides_nothing_but_full_ties() -> None:
    goal = Goal(target=50.0, floor=90.0)
    a, b = point(95.0, 45.0, passes=3), point(92.0, 55.0, passes=2)  # equally near: the cheaper one
    assert choose([a, b], goal) is choose([b, a], goal) is b
    c, d = point(89.0, 50.0), point(40.0, 50.0)
    assert choose([d, c], goal) is c  # below the floor both: that which loses least


def point(retain: float, forget: float, *, passes: int = 1, trial: int = 0) -> Point:
    return Point(trial=trial, settings={}, retain_accuracy=retain, forget_accuracy=forget, unseen_accuracy=None,
                 passes=passes, seconds=0.0)  # fmt: skip


# --- the search -------------------------------------------------------------------------------------------------------

axes_strategy = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(
    lambda sizes: {f"axis {k}": tuple(range(n)) for k, n in enumerate(sizes)}
)


class Table:
    """Trials whose answers are a function of the place, and a note of what was asked."""

    def __init__(self, seed: int, dear: int = 5) -> None:
        self.seed, self.dear = seed, dear
        self.asked: list[list[search.Place]] = []

    def cost(self, place: search.Place) -> int:
        return 1 + int(np.random.default_rng([self.seed, *place, 1]).integers(self.dear))

    def run(self, places: Sequence[search.Place], first: int) -> list[Trial]:
        self.asked.append(list(places))
        trials = []
        for number, place in enumerate(places, first):
            retain, forget = np.random.default_rng([self.seed, *place]).uniform(0, 100, 2)
            found = point(retain, forget, passes=self.cost(place), trial=number)
            trials.append(Trial(number=number, place=place, points=(found,), passes=self.cost(place)))
        return trials


@given(axes=axes_strategy, seed=st.integers(0, 99), budget=st.integers(0, 60))
def test_the_budget_is_never_exceeded_and_nothing_is_run_twice(axes: Any, seed: int, budget: int) -> None:
    table, goal = Table(seed), Goal(target=40.0, floor=50.0)
    trials = explore(axes, goal, seed=seed, budget=budget, cost=table.cost, run=table.run)
    assert sum(t.passes for t in trials) <= budget
    assert [t.number for t in trials] == list(range(len(trials)))
    places = [t.place for t in trials]
    assert len(set(places)) == len(places)
    assert all(0 <= i < len(v) for p in places for i, v in zip(p, axes.values(), strict=True))
    affordable = [p for p in search.coarse(axes, seed) if table.cost(p) <= budget]
    assert bool(trials) == bool(affordable)
    again = explore(axes, goal, seed=seed, budget=budget, cost=table.cost, run=Table(seed).run)
    assert again == trials


@settings(deadline=None)
@given(axes=axes_strategy, seed=st.integers(0, 99))
def test_each_round_is_around_the_best_that_has_untried_neighbours(axes: Any, seed: int) -> None:
    table, goal = Table(seed), Goal(target=40.0, floor=50.0)
    trials = explore(axes, goal, seed=seed, budget=1e9, cost=table.cost, run=table.run)
    found = {t.place: t.points[0] for t in trials}
    everywhere = set(itertools.product(*(range(len(v)) for v in axes.values())))
    first, *rounds = table.asked
    assert set(first) == set(search.coarse(axes, seed))
    tried = set(first)
    for asked in rounds:
        by_rank = sorted(tried, key=functools.cmp_to_key(lambda a, b: -1 if better(found[a], found[b], goal) else 1))
        around = [{q for q in everywhere - tried if sum(map(abs, np.subtract(p, q))) == 1} for p in by_rank]
        assert set(asked) == next(places for places in around if places)
        tried |= set(asked)
    assert tried == everywhere


@given(axes=axes_strategy, seed=st.integers(0, 99))
def test_by_itself_the_budget_pays_for_the_coarse_places_and_a_round(axes: Any, seed: int) -> None:
    table, goal = Table(seed, dear=1), Goal(target=40.0, floor=50.0)
    trials = explore(axes, goal, seed=seed, budget=None, cost=table.cost, run=table.run)
    n_coarse = len(search.coarse(axes, seed))
    assert n_coarse <= len(trials) <= n_coarse + 2 * sum(len(v) > 1 for v in axes.values())


def test_where_the_cost_is_not_known_the_first_trial_tells_it() -> None:
    table, goal = Table(0, dear=1), Goal(target=40.0, floor=50.0)
    axes = {"a": (0, 1, 2, 3, 4), "b": (0, 1, 2)}
    trials = explore(axes, goal, seed=0, budget=4, cost=lambda place: None, run=table.run)
    assert [len(asked) for asked in table.asked] == [1, 3]
    assert len(trials) == 4


def test_trials_that_cost_more_than_was_expected_are_followed_by_fewer() -> None:
    table, goal = Table(0, dear=1), Goal(target=40.0, floor=50.0)

    def run(places: Sequence[search.Place], first: int) -> list[Trial]:
        return [dataclasses.replace(t, passes=2) for t in table.run(places, first)]

    axes = {"a": tuple(range(5)), "b": tuple(range(5))}
    trials = explore(axes, goal, seed=0, budget=10, cost=lambda place: 1.0, run=run)
    assert len(trials) == 5  # four at first, for 8 passes; then one for 2, where two would have been expected to fit


def test_the_search_finds_the_bottom_of_a_bowl() -> None:
    axes = {"a": tuple(range(9)), "b": tuple(range(9))}

    def run(places: Sequence[search.Place], first: int) -> list[Trial]:
        return [
            Trial(number=n, place=p, points=(point(99.0, 5.0 * (abs(p[0] - 6) + abs(p[1] - 2)), trial=n),), passes=1)
            for n, p in enumerate(places, first)
        ]

    trials = explore(axes, Goal(target=0.0, floor=90.0), seed=0, budget=40, cost=lambda p: 1, run=run)
    best = choose([p for t in trials for p in t.points], Goal(target=0.0, floor=90.0))
    assert trials[best.trial].place == (6, 2)


def test_broken_trials_cost_what_they_took_and_are_not_chosen() -> None:
    def run(places: Sequence[search.Place], first: int) -> list[Trial]:
        return [Trial(number=n, place=p, points=(), passes=2, failed="NaN") for n, p in enumerate(places, first)]

    trials = explore({"a": (0, 1, 2)}, Goal(target=0, floor=0), seed=0, budget=100, cost=lambda p: 1, run=run)
    assert len(trials) == 3  # and no round around a best that there is not


def test_the_coarse_places_begin_in_the_middle() -> None:
    assert len(search.coarse({"a": (1, 2, 3, 4, 5), "b": (1,)}, seed=0)) == 5  # a small lattice is tried whole
    places = search.coarse({"a": (1, 2, 3, 4, 5, 6, 7), "b": ("x", "y")}, seed=0)
    assert sorted(places) == sorted(itertools.product((1, 3, 5), (0, 1)))
    assert {p[0] for p in places[:2]} == {3}
    assert search.coarse({}, 0) == [()]


# --- axes -------------------------------------------------------------------------------------------------------------


def test_what_is_given_is_not_searched() -> None:
    whole = TuneConfig(method="neggrad").axes()
    assert set(whole) == {"alpha", "lr", "epochs"}
    assert set(TuneConfig(method="neggrad", settings={"lr": 0.1}).axes()) == {"alpha", "epochs"}
    assert TuneConfig(method="neggrad", rule="sam", search={"rho": (0.1, 0.2)}).axes()["rho"] == (0.1, 0.2)
    assert TuneConfig(method="neggrad", search={"lr": (1.0, 2.0)}).axes()["lr"] == (1.0, 2.0)
    adam = TuneConfig(method="neggrad", settings={"optimizer": "adamw"}).axes()
    assert adam["lr"] == pytest.approx([v / 100 for v in whole["lr"]])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "negrad"}, "did you mean 'neggrad'"),
        ({"method": "neggrad", "rule": "samm"}, "did you mean"),
        ({"method": "retrain"}, "nothing to search"),
        ({"method": "finetune", "settings": {"lr": 0.1, "epochs": 2}}, "nothing to search"),
        ({"method": "neggrad", "search": {"alhpa": (0.1, 0.2)}}, "alhpa"),
        ({"method": "neggrad", "search": {"alpha": (0.9, 1.5)}}, "alpha must be in"),
        ({"method": "neggrad", "search": {"alpha": (0.9, 0.9)}}, "each once"),
        ({"method": "neggrad", "search": {"rho": (0.1, 0.2)}}, "rho"),
        ({"method": "neggrad", "settings": {"lr": 0.1}, "search": {"lr": (0.1, 0.2)}}, "leave one out"),
        ({"method": "neggrad", "search": {"epochs": (0, 2)}}, "epochs must be at least 1"),
        ({"method": "neggrad", "target": "best"}, "unknown target"),
        ({"method": "neggrad", "target_accuracy": 101.0}, "target_accuracy"),
        ({"method": "neggrad", "retain_floor": -1.0}, "retain_floor"),
        ({"method": "neggrad", "tolerance": math.nan}, "tolerance"),
        ({"method": "neggrad", "budget": 0.0}, "budget"),
        ({"method": "neggrad", "budget": math.inf}, "budget"),
        ({"method": "neggrad", "target_accuracy": 50.0, "target": "classes"}, "leave target"),
    ],
)
def test_what_cannot_be_searched_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        TuneConfig(**config).axes()


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_declares_can_be_configured(name: str) -> None:
    method = METHODS[name]
    if not search.declared(method):
        assert issubclass(method, AppliedMethod)
        return
    axes = TuneConfig(method=name).axes()
    assert all(len(values) >= 2 for values in axes.values())
    for values in axes.values():
        if all(isinstance(v, (int, float)) for v in values):
            assert list(values) == sorted(values)  # neighbours are neighbours


def test_search_is_read_from_text() -> None:
    assert search.read_search(["lr=0.1, 0.2", "rho-retain=1,2", "select=largest,all"]) == {
        "lr": (0.1, 0.2),
        "rho_retain": (1, 2),
        "select": ("largest", "all"),
    }
    for text in ("lr", "lr=", "=1", "lr=1,,2"):
        with pytest.raises(UserError, match="NAME=VALUE"):
            search.read_search([text])
    with pytest.raises(UserError, match="twice"):
        search.read_search(["lr=1", "lr=2"])


# --- cost and epochs --------------------------------------------------------------------------------------------------


class Staged(PhasedMethod):
    """Phases that take turns, rest, and read one stream or both."""

    source: ClassVar[str] = "a test"
    formula: ClassVar[str] = "a test"

    def phases(self, problem: Problem) -> list[Phase]:
        rule = problem.rule
        return [
            Phase(objective=CrossEntropy({FORGET: -0.1}), rule=rule, name="up", turn=0, until=2),
            Phase(objective=CrossEntropy({RETAIN: 1.0, FORGET: -0.1}), rule=rule, name="both", turn=1),
            Phase(objective=CrossEntropy({RETAIN: 1.0}), name="down", turn=1),
            Phase(objective=CrossEntropy({RETAIN: 0.0}), name="idle", turn=2),
        ]


@pytest.mark.parametrize(
    ("method", "rule"),
    [*((p.values[0], p.values[1]) for p in cases.PHASED if p.values[1] in ("none", "sam")), (Staged(), "sam")],
    ids=str,
)
def test_what_a_run_will_cost_is_known_beforehand(method: Any, rule: str) -> None:
    model, samples = cases.network("smooth"), cases.images()
    loop = cases.make_loop(copy.deepcopy(model), method, RULES[rule](), samples, epochs=3)
    n_batches = {name: stream.n_batches for name, stream in cases.streams(samples).items()}
    expected = search.expected_passes(cases.phases_of(method, RULES[rule](), model, samples), n_batches, 3)
    loop.run()
    assert round(expected) == loop.passes + round(loop.other_forwards / 3) == loop.history[-1]["passes"]


@pytest.mark.parametrize(
    ("method", "rule"), [(p.values[0], p.values[1]) for p in cases.PHASED if p.values[1] in ("none", "sam")]
)
def test_a_longer_run_passes_through_the_ends_of_shorter_ones(method: str, rule: str) -> None:
    """What `nested_epochs` of a method promises; one that breaks it must say so."""
    model, samples = cases.network("convolutional"), cases.images()
    chosen = cases.method_of(method)
    assert isinstance(chosen, PhasedMethod)
    how = UnlearnConfig(method=chosen, rule=RULES[rule](), batch_size=cases.BATCH_SIZE)
    assert nested(how) == chosen.nested_epochs
    if not chosen.nested_epochs:
        return  # it says so

    def ends(epochs: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        def look(network: nn.Module) -> dict[str, float]:
            found.append(weights(network))
            return {}

        config = dataclasses.replace(how, epochs=epochs)
        unlearning.run(model, samples, cases.FORGOTTEN, cases.RETAINED, config, on_epoch=look)
        return found

    long = ends(3)
    for n in (1, 2):
        assert cases.differing(long[n - 1], ends(n)[-1]) == [], f"{method}: set nested_epochs = False"


@pytest.mark.parametrize(
    "changes", [{"schedule": "cosine"}, {"warmup": 0.1}, {"phase_schedule": {"neggrad": "linear"}}]
)
def test_epochs_are_run_apart_where_the_rate_follows_the_length(changes: dict[str, Any]) -> None:
    assert nested(configure("neggrad"))
    assert not nested(configure("neggrad", **changes))


@pytest.mark.parametrize("rule", RULES)
def test_epochs_are_run_apart_under_rules_that_follow_the_run(rule: str) -> None:
    if not METHODS["neggrad"].admits(rule)[0]:
        pytest.skip("not admitted")
    assert nested(configure("neggrad", rule=rule)) == (not cases.ends_elsewhere(RULES[rule]()))


# --- the page ---------------------------------------------------------------------------------------------------------


def choice(**changes: Any) -> dict[str, Any]:
    return {
        "settings": {"alpha": 0.9, "epochs": 2},
        "point": {"retain_accuracy": 95.0, "forget_accuracy": 52.0, "passes": 1234, "seconds": 3.0},
        "trial": 0,
        "met_floor": True,
        "distance": 2.0,
        "target": {"accuracy": 50.0, "kind": "classes", "error": 1.5, "n_unseen": 100, "n_effective": 90.0,
                   "notes": ["a <note>"]},
        "goal": {"target": 50.0, "floor": 90.0, "tolerance": 0.0},
        "original": {"retain_accuracy": 99.0, "forget_accuracy": 98.0, "unseen_accuracy": 60.0},
        "searched": {"alpha": [0.8, 0.9], "epochs": [1, 2]},
        "n_trials": 2,
        "failed": [{"trial": 1, "why": "<broken>"}],
        "budget": {"passes": 9000, "spent_passes": 8000, "passes_per_training_epoch": 100,
                   "spent_training_epochs": 80.0},
        "warnings": ["it <warns>"],
        "unlearn": {"method": {"name": "neggrad", "alpha": 0.9}, "rule": {"name": "sam", "rho": 0.1}, "epochs": 2},
        "forget": {"rule": "3 of 100 samples named by id", "n": 3, "hash": "a" * 64},
        "origin": {"data": {"name": "npz", "dir": "/home/jane/patients.npz"}, "model": {"arch": "small_cnn"},
                   "train": None, "fingerprint": "f" * 64},
        "versions": {"torch": "2.6"},
    } | changes  # fmt: skip


def rows() -> list[dict[str, Any]]:
    def row(epochs: int) -> dict[str, Any]:
        return {
            "trial": 0,
            "settings": {"alpha": 0.9, "epochs": epochs},
            "retain_accuracy": 97.0 - epochs,
            "forget_accuracy": 72.0 - 10 * epochs,
            "unseen_accuracy": None,
            "passes": 617 * epochs,
            "seconds": 1.5 * epochs,
            "distance": 22.0 - 10 * epochs,
            "met_floor": True,
            "chosen": epochs == 2,
        }

    return [row(1), row(2)]


def test_the_page_says_the_choice_and_escapes_what_it_shows() -> None:
    page = render_tuning(choice(), rows())
    for text in ("52.0 %", "a &lt;note&gt;"[2:], "It &lt;warns&gt;", "&lt;broken&gt;", "1,234", "NegGrad", "<svg "):
        assert text in page
    for text in ("<note>", "<warns>", "<broken>", "jane", "patients", "http://", "https://"):
        assert text not in page
    assert page == render_tuning(choice(), rows())
    shown = page[page.index('<section id="trials"') :]
    assert shown.count('<tr class="retrained">') == 1
    assert "<script" not in page


def test_the_page_says_when_the_floor_was_not_kept() -> None:
    assert "less than the 90.0 % that were to be kept" in render_tuning(choice(met_floor=False), rows())


@pytest.fixture(autouse=True)
def _registries_stay_as_they_are() -> Iterator[None]:
    before = dict(METHODS)
    yield
    assert dict(METHODS) == before


def test_settings_are_json_after_a_search() -> None:
    axes = TuneConfig(method="neggrad").axes()
    assert json.loads(json.dumps(axes)) == {k: list(v) for k, v in axes.items()}
