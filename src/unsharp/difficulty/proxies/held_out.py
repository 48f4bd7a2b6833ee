"""Held-out retraining: what networks say that have not seen the sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from unsharp.artifacts import Workspace
from unsharp.difficulty.proxies.base import (
    FORWARD,
    PROXIES,
    Cost,
    Measured,
    Needs,
    Proxy,
    Task,
    check_count,
    mean_and_error,
)
from unsharp.difficulty.proxies.networks import PASSES, Arrays, kept, train_one, true_class
from unsharp.errors import UserError, unknown
from unsharp.training import TrainConfig

OUTCOMES = ("probability", "correct")


@PROXIES.register("held_out")
@dataclass(frozen=True, kw_only=True)
class HeldOut(Proxy):
    """How sure networks are of a sample that they were not trained on.

    Args:
        folds: Parts into which the samples are cut, at least 2; a network is trained without each. It sees
            1 − 1/folds of the samples.
        repeats: How often they are cut anew, at least 1; the scores are averaged.
        outcome: "probability" of the true class, or whether the prediction is "correct", as the C-score has it.
    """

    title: ClassVar[str] = "held-out score"
    source: ClassVar[str] = (
        "the C-score of Jiang et al., ICML 2021 (arXiv 2002.03206), at one size of the training set, by "
        "cross-validation"
    )
    formula: ClassVar[str] = "mean over networks trained without x of p(y | x), or of [prediction = y]"
    higher_is_harder: ClassVar[bool] = False
    unit_scale: ClassVar[bool] = True
    needs: ClassVar[Needs] = "recipe"

    folds: int = 5
    repeats: int = 1
    outcome: Literal["probability", "correct"] = "probability"

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise UserError(f"folds must be at least 2, got {self.folds}")
        check_count("repeats", self.repeats)
        if self.outcome not in OUTCOMES:
            raise unknown("outcome", self.outcome, OUTCOMES)

    def check(self, task: Task) -> None:
        if self.folds > len(task.samples):
            raise UserError(f"folds is {self.folds}, but there are {len(task.samples)} samples")

    def cost(self, train: TrainConfig | None) -> Cost:
        assert train is not None
        seen = (self.folds - 1) * train.epochs * train.rule.passes
        return Cost(self.folds * self.repeats, self.repeats * (seen + FORWARD))

    def measure(self, task: Task) -> Measured:
        values, passes = np.empty((self.repeats, len(task.samples))), 0
        for repeat in range(self.repeats):
            for fold, part in enumerate(self.parts(task, repeat)):
                number = repeat * self.folds + fold
                found = kept(
                    task,
                    f"network-{number}",
                    lambda place, number=number, part=part: self._of_one(task, number, part, place),
                )
                values[repeat, part] = found["score"]
                passes += int(found[PASSES])
        raw, error = mean_and_error(values)
        return Measured(raw=raw, standard_error=error, networks=self.folds * self.repeats, passes=passes)

    def parts(self, task: Task, repeat: int) -> list[np.ndarray]:
        """The parts of one repeat, each (k,) int64 and ascending; their sizes differ by at most one."""
        order = np.random.default_rng((task.seed, repeat)).permutation(len(task.samples))
        return [np.sort(part) for part in np.array_split(order, self.folds)]

    def _of_one(self, task: Task, number: int, part: np.ndarray, place: Workspace | None) -> Arrays:
        rest = np.setdiff1d(task.indices, part, assume_unique=True)
        label = f"network {number + 1} of {self.folds * self.repeats}"
        model, _, passes = train_one(task, number, label, place, indices=rest)
        right, p, _ = true_class(model, task, part)
        score = (p if self.outcome == "probability" else right).double().cpu().numpy()
        forward = FORWARD * len(part) / task.train.batch_size
        return {"score": score, PASSES: np.array(passes + round(forward))}
