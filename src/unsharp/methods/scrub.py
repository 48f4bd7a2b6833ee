"""SCRUB: disobey the original network on the forget set in some epochs, follow it on retain in all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from unsharp.data.samples import Samples
from unsharp.errors import UserError, listed
from unsharp.methods.base import METHODS, Choice, PhasedMethod, Problem
from unsharp.methods.teacher import Distillation, Teacher, table_passes
from unsharp.phases import FORGET, RETAIN, Phase


@METHODS.register("scrub")
@dataclass(frozen=True, kw_only=True)
class SCRUB(PhasedMethod):
    """Move away from the original network on the forget set, then back towards it on retain, epoch by epoch.

    In each of the first epochs a run through the forget set comes first, a run through retain after it; in the others
    there is retain alone. The divergence is that of the original network from this one, KL(p_original ‖ p), times T².

    Args:
        msteps: Epochs, from the first, in which the forget set is run through; 0 leaves it out.
        gamma: Weight γ ≥ 0 of the cross-entropy on retain.
        beta: Weight β ≥ 0 of the divergence on retain.
        temperature: Temperature T > 0 at which outputs are compared.
        rewind: End with the epoch whose error on the forget set is nearest to the error of the last epoch's network on
            samples held out for validation, weighted to the classes of the forget set (SCRUB+R).
    """

    source: ClassVar[str] = "Kurmanji et al., NeurIPS 2023 (SCRUB, arXiv 2302.09880); defaults of its published code"
    formula: ClassVar[str] = (
        "L_F = − T²·mean over forget of KL(p_original ‖ p), in the first msteps epochs;  "
        "then L_R = γ·mean over retain of CE + β·T²·mean over retain of KL(p_original ‖ p)"
    )
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"msteps": (1, 2, 3, 4, 5)}

    msteps: int = 3
    gamma: float = 1.0
    beta: float = 0.5
    temperature: float = 2.0
    rewind: bool = False

    def __post_init__(self) -> None:
        if self.msteps < 0:
            raise UserError(f"msteps must be at least 0, got {self.msteps}")
        for name in ("gamma", "beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be a finite number of at least 0, got {value}")
        check_temperature(self.temperature)

    def phases(self, problem: Problem) -> list[Phase]:
        if self.rewind:
            check_held_out(problem)
        forget = Teacher(problem.model, problem.samples, problem.forget) if self.msteps > 0 else None
        retain = Teacher(problem.model, problem.samples, problem.retain) if self.beta > 0 else None
        away = Distillation({FORGET: (-1.0 if self.msteps > 0 else 0.0, forget)}, temperature=self.temperature)
        back = Distillation(
            {RETAIN: (self.beta, retain)}, cross_entropy={RETAIN: self.gamma}, temperature=self.temperature
        )
        return [
            Phase(objective=away, rule=problem.rule, turn=0, until=self.msteps, name=FORGET),
            Phase(objective=back, rule=problem.rule, turn=1, name=RETAIN),
        ]

    def preparation_passes(self, problem: Problem, batch_size: int) -> int:
        forget = table_passes(problem.samples, len(problem.forget), batch_size) if self.msteps > 0 else 0
        return forget + (table_passes(problem.samples, len(problem.retain), batch_size) if self.beta > 0 else 0)

    @property
    def nested_epochs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.rewind  # the choice depends on the last epoch

    @property
    def chooses_epoch(self) -> bool:
        return self.rewind

    def choose_epoch(
        self, problem: Problem, network: Callable[[int], nn.Module], epochs: int, batch_size: int
    ) -> Choice:
        held_out = check_held_out(problem)
        wanted = np.flatnonzero(np.isin(held_out.labels, problem.samples.labels[problem.forget]))
        errors = [100 * wrong(network(e), problem.samples, problem.forget).mean() for e in range(epochs)]
        reference = expected_error(
            wrong(network(epochs - 1), held_out, wanted),
            held_out.labels[wanted],
            problem.samples.labels[problem.forget],
        )
        distances = np.abs(np.array(errors) - reference)
        forwards = epochs * -(-len(problem.forget) // batch_size) + -(-len(wanted) // batch_size)
        return Choice(
            epoch=int(np.flatnonzero(distances == distances.min())[-1]),  # of equal ones the best repaired
            passes=math.ceil(forwards / 3),
            about={"forget_errors": [float(e) for e in errors], "reference_error": float(reference)},
        )


def check_temperature(temperature: float) -> None:
    """Raises: UserError if it is not a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"temperature must be a finite number above 0, got {temperature}")


def check_held_out(problem: Problem) -> Samples:
    """The samples held out of the training. Raises: UserError if there are none of a class that is to be forgotten."""
    if problem.validation is None:
        raise UserError(
            "rewind chooses an epoch by samples that the network never saw; train it on data with --validation (in "
            "Python: give validation_set), or leave rewind out"
        )
    if problem.validation.class_names != problem.samples.class_names:
        raise UserError("the validation samples have other classes than the training data; give samples of the same")
    missing = np.setdiff1d(problem.samples.labels[problem.forget], problem.validation.labels)
    if len(missing):
        names = listed([problem.samples.class_names[c] for c in missing])
        raise UserError(f"no validation sample is of class {names}, which is to be forgotten; hold some out of each")
    return problem.validation


def wrong(network: nn.Module, samples: Samples, positions: np.ndarray) -> np.ndarray:
    """(k,) 1 where the network is wrong, else 0."""
    from unsharp.evaluation.accuracy import correctness
    from unsharp.evaluation.predictions import predict

    found = predict(network, samples, positions)
    return 1 - correctness(found.logits, found.labels)


def expected_error(errors: np.ndarray, labels: np.ndarray, forget_labels: np.ndarray) -> float:
    """The error, 0–100, that samples of the forget set's classes would have.

    Args:
        errors: (k,) 0 or 1 for samples held out, of every class of the forget set.
        labels: (k,) their classes.
        forget_labels: (n,) the classes of the forget set.
    """
    classes, counts = np.unique(forget_labels, return_counts=True)
    by_class = np.array([errors[labels == c].mean() for c in classes])
    return float(100 * (by_class * counts).sum() / counts.sum())
