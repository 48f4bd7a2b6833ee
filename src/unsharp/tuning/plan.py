"""What a search is asked for, and what can be settled or refused before any network is asked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.config import digest
from unsharp.data import Splits
from unsharp.data.share import share_of
from unsharp.difficulty import ForgetSet, load_scores
from unsharp.difficulty.kinds import ScoreKind
from unsharp.difficulty.scores import DEFAULT_KIND, read_scores
from unsharp.errors import UserError
from unsharp.masks import Mask
from unsharp.methods.base import METHODS, PhasedMethod, Problem, check_fraction
from unsharp.phases import FORGET, RETAIN
from unsharp.subject import Subject
from unsharp.tuning import search as lattice
from unsharp.tuning.search import Place, Point, Trial
from unsharp.tuning.target import Seen, TargetKind, TargetPlan, Unseen, check_target
from unsharp.tuning.trials import Bench, nested, unseen_of
from unsharp.unlearning import UnlearnConfig, configure


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What is searched, at what the search aims, and what it may cost.

    Args:
        method: Name of the method.
        rule: Name of the rule; None takes the method's default.
        settings: Settings of method, rule, optimiser and loop that have a value; they are not searched.
        search: Values of settings, in order, in place of those that the method declares as tunable.
        target: How the forget accuracy that is aimed at is found: auto, classes, matched or scores.
        target_accuracy: That accuracy, 0–100; None finds it.
        train_scores: Difficulty scores of the training samples, FILE[:KEY]; None takes those by which the forget set
            was chosen.
        unseen_scores: Difficulty scores of the unseen samples, FILE[:KEY], of the same kind.
        score_kind: What the scores are; None takes what they were when the forget set was chosen.
        retain_floor: Retain accuracy that must be kept, 0–100; None is the original's less 5 points.
        tolerance: Points by which a distance may exceed the least one and still count as equal.
        budget: What all trials may cost, in epochs of training; None is what the first trials and one round around the
            best take.
        seed: Seed of every trial, and of the order in which they are tried.
    """

    method: str
    rule: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    target: TargetKind = "auto"
    target_accuracy: float | None = None
    train_scores: str | None = None
    unseen_scores: str | None = None
    score_kind: Literal["memorization", "cscore"] | None = None
    retain_floor: float | None = None
    tolerance: float = 0.0
    budget: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_target(self.target)
        for name in ("target_accuracy", "retain_floor"):
            value = getattr(self, name)
            if value is not None:
                check_fraction(name, value, high=100.0)
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise UserError(f"tolerance must be a number of points of at least 0, got {self.tolerance}")
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget > 0):
            raise UserError(f"budget must be a number of epochs above 0, got {self.budget}")
        if self.target_accuracy is not None and (self.target != "auto" or self.unseen_scores is not None):
            raise UserError("target_accuracy says what is aimed at; leave target and unseen_scores out")

    def at(self, settings: Mapping[str, Any]) -> UnlearnConfig:
        """The configuration with some settings of the search. Raises: UserError for one that nobody takes."""
        return configure(self.method, rule=self.rule, seed=self.seed, **(self.settings | dict(settings)))

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """What is searched, values by name, each tried out in a configuration. Raises: UserError."""
        method = METHODS[self.method]
        sgd = str(self.settings.get("optimizer", "sgd")).lower() == "sgd"
        axes = lattice.axes_of(method, self.settings, self.search, sgd=sgd)
        if any(how.stop_at is not None for how in self.tried(axes)):
            raise UserError("stop_at ends a run at a forget accuracy, and tune looks at every epoch; leave it out")
        return axes

    def tried(self, axes: Mapping[str, Sequence[Any]]) -> list[UnlearnConfig]:
        """A configuration with each value of each axis, beside the first values of the others. Raises: UserError."""
        first = {name: values[0] for name, values in axes.items()}
        return [self.at(first | {name: value}) for name, values in axes.items() for value in values]


class Plan:
    """Everything that can be settled, and refused, before any network is asked.

    Args:
        subject: The original network with its data.
        forget: The forget set.
        how: What is searched.

    Raises:
        UserError: if something is unknown or missing, or the budget pays for no trial.
    """

    def __init__(self, subject: Subject, forget: ForgetSet, how: TuneConfig) -> None:
        self.subject, self.forget, self.how = subject, forget, how
        self.all_axes = how.axes()
        self.first = how.at({name: values[0] for name, values in self.all_axes.items()})
        self.nested = all(nested(c) for c in how.tried(self.all_axes))
        self.axes = dict(self.all_axes)
        # Where shorter runs are parts of longer ones, epochs cost nothing to search: they are read from one run.
        self.epochs = self.axes.pop("epochs", (self.first.epochs,)) if self.nested else ()
        self.bench = Bench(subject=subject, forget=forget, unseen=unseen_of(subject))
        self.unseen_name = "validation" if subject.splits.validation is not None else "test"
        self.lost: str | None = None
        """Why the scores of the training samples could not be read."""
        self.score_kind: ScoreKind
        scores, self.score_kind = self._train_scores()
        unseen_scores = self._unseen_scores()
        self.scores_digest = [None if s is None else _digest_of(s) for s in (scores, unseen_scores)]
        self.target = self._target(scores, unseen_scores)
        self.unit = lattice.epoch_passes(len(subject.splits.train), self.first.batch_size)
        self._cost: dict[str, float] = {}
        self.budget = self._budget()

    def trial(self, number: int, place: Place, value: Mapping[str, Any]) -> Trial:
        """What became of the trial at a place. Args: as `Bench.run` returned it."""
        settings = lattice.settings_at(self.axes, place)
        points = tuple(
            Point(
                trial=number,
                settings=settings | ({"epochs": row["epochs"]} if "epochs" in self.all_axes else {}),
                retain_accuracy=row["retain_accuracy"],
                forget_accuracy=row["forget_accuracy"],
                unseen_accuracy=row.get("unseen_accuracy"),
                passes=row["passes"],
                seconds=row["seconds"],
            )
            for row in value["points"]
            if not self.nested or row["epochs"] in self.epochs
        )
        return Trial(number=number, place=place, points=points, passes=value["passes"], failed=value["failed"])

    # --- target ---

    def _train_scores(self) -> tuple[np.ndarray | None, ScoreKind]:
        chosen = self.forget.config
        kind = self.how.score_kind or (chosen.score_kind if chosen is not None else None)
        if self.how.train_scores is not None:
            found = read_scores(self.how.train_scores, self.subject.splits.train, kind=kind)
            return found.difficulty, found.kind
        if chosen is None or chosen.scores is None or self.how.target_accuracy is not None:
            return None, kind or DEFAULT_KIND
        try:
            found = read_scores(chosen.scores, self.subject.splits.train, kind=kind)
            return found.difficulty, found.kind
        except UserError as error:
            if self.how.target in ("scores", "matched") or self.how.unseen_scores is not None:
                raise
            self.lost = f"the scores by which the forget set was chosen cannot be read: {error}"
            return None, kind or DEFAULT_KIND

    def _unseen_scores(self) -> np.ndarray | None:
        if self.how.unseen_scores is None:
            return None
        if self.bench.unseen is None:
            raise UserError("--unseen-scores: there are no unseen samples, neither held out nor a test set")
        return load_scores(self.how.unseen_scores, self.bench.unseen, kind=self.score_kind)

    def _target(self, scores: np.ndarray | None, unseen_scores: np.ndarray | None) -> TargetPlan | None:
        if self.how.target_accuracy is not None:
            return None
        if unseen_scores is not None and scores is None:
            raise UserError("--unseen-scores needs the scores of the training samples beside it; give --train-scores")
        labels = self.subject.splits.train.labels
        seen = Seen(labels=labels, forget=self.forget.indices, scores=scores, score_kind=self.score_kind)
        unseen = None
        if self.bench.unseen is not None:
            unseen = Unseen(labels=self.bench.unseen.labels, name=self.unseen_name, scores=unseen_scores)
        plan = TargetPlan(self.how.target, seen, unseen)
        if self.lost is not None:
            plan.notes.append(self.lost)
        return plan

    # --- cost ---

    def config_at(self, place: Place) -> UnlearnConfig:
        """What the trial at a place runs: for all epochs, where shorter runs are parts of longer ones."""
        more = {"epochs": max(self.epochs)} if self.nested else {}
        return self.how.at(lattice.settings_at(self.axes, place) | more)

    def cost(self, place: Place) -> float | None:
        """The passes that the trial at a place will take; None where only a first one can tell."""
        how = self.config_at(place)
        if not isinstance(how.method, PhasedMethod):
            return None
        key = digest(how.method, how.rule, how.batch_size, how.epochs, how.retain_fraction)
        if key not in self._cost:
            subject = self.subject
            found = passes_of(how, subject.model, subject.splits, self.forget.indices, self.bench.retained)
            assert found is not None  # a method of phases
            self._cost[key] = found
        return self._cost[key]

    def _budget(self) -> float | None:
        """The budget in passes; None where only a first trial can tell. Raises: UserError if it pays for no trial."""
        costs = [self.cost(place) for place in lattice.coarse(self.axes, self.how.seed)]
        known = [c for c in costs if c is not None]
        if self.how.budget is None:
            return lattice.whole_budget(known, self.axes) if len(known) == len(costs) else None
        budget = self.how.budget * self.unit
        if known and min(known) > budget + lattice.ROUNDING:
            raise UserError(
                f"a budget of {self.how.budget:g} epochs of training pays for no trial: the smallest that works is "
                f"{math.ceil(100 * min(known) / self.unit) / 100:g}; raise --budget, or try fewer epochs (--epochs, "
                "--search epochs=...) or a share of the retained samples (--retain-fraction)"
            )
        return budget

    def estimate(self) -> list[str]:
        """What the search will take, in lines for the user."""
        what = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in self.all_axes.items())
        places = lattice.coarse(self.axes, self.how.seed)
        costs = [c for place in places if (c := self.cost(place)) is not None]
        lines = [f"searching {what}"] + [f"warning: {line}" for line in self.first.cautions()]
        if not costs or self.budget is None:
            return [*lines, f"{len(places)} trials at first; what they take, the first one will tell"]
        dear = " to ".join(f"{c / self.unit:.3g}" for c in sorted({min(costs), max(costs)}))
        line = (
            f"{len(places)} trials at first, each as dear as {dear} epochs of training; in all at most "
            f"{self.budget / self.unit:.4g} epochs, {self.budget:,.0f} passes over {self.first.batch_size} samples"
        )
        train = self.subject.origin.train
        if train is None:
            return [*lines, line]
        retraining = train.epochs * lattice.epoch_passes(len(self.bench.retained), self.first.batch_size)
        line += f"; retraining would take {retraining / self.unit:.4g}"
        return [*lines, line + (": if you can retrain, do, it needs no search" if self.budget >= retraining else "")]


def passes_of(
    how: UnlearnConfig, model: nn.Module, splits: Splits, forget: np.ndarray, retained: np.ndarray
) -> float | None:
    """The passes that a run of unlearning will take, if it runs for all of its epochs; None where only it can tell.

    Args:
        how: What is run; of a method that is no list of phases nothing is known before.
        model: The network, of which only the architecture matters.
        splits: Its data.
        forget: (k,) int64 positions of the forget set.
        retained: Positions of all retained samples.
    """
    method = how.method
    if not isinstance(method, PhasedMethod):
        return None
    retain = share_of(splits.train, retained, how.retain_fraction, how.seed)
    problem = _Sketch(
        model=model,
        samples=splits.train,
        forget=forget,
        retain=retain,
        rule=how.rule,
        seed=how.seed,
        validation=splits.validation,
        n_retained=len(retained),
        batch_size=how.batch_size,
    )
    n_batches = {RETAIN: _batches(retain, how), FORGET: _batches(forget, how)}
    passes = lattice.expected_passes(method.phases(problem), n_batches, how.epochs)
    return passes + method.preparation_passes(problem, how.batch_size)


class _Sketch(Problem):
    """A problem from which a method is to say what its phases are, without the work of finding a mask."""

    def kept_mask(self, make: Any) -> Mask:
        return {name: _half(p) for name, p in self.model.named_parameters() if p.requires_grad}


def _batches(indices: np.ndarray, how: UnlearnConfig) -> int:
    return -(-len(indices) // how.batch_size)


def _half(p: Tensor) -> Tensor:
    return torch.arange(p.numel(), device=p.device).reshape(p.shape) < (p.numel() + 1) // 2


def _digest_of(scores: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(scores).tobytes()).hexdigest()
