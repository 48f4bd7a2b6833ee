"""Bad teacher: follow the original network on retain and an untrained one on forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from unsharp.methods.base import METHODS, PhasedMethod, Problem
from unsharp.methods.relabel import check_alpha, share_of_retained
from unsharp.methods.scrub import check_temperature
from unsharp.methods.teacher import Distillation, Teacher, table_passes, untrained
from unsharp.phases import FORGET, RETAIN, Phase


@METHODS.register("bad_teacher")
@dataclass(frozen=True, kw_only=True)
class BadTeacher(PhasedMethod):
    """Answer like the original network on the retained samples and like an untrained one on the forget samples.

    Args:
        alpha: Weight α in [0, 1] of the retain loss beside that of forget; None takes the share of the retained
            samples among all that are read.
        temperature: Temperature T > 0 at which outputs are compared.
    """

    source: ClassVar[str] = "Chundawat et al., AAAI 2023 (arXiv 2205.08096)"
    formula: ClassVar[str] = (
        "L = α·T²·mean over retain of KL(p_original ‖ p) + (1−α)·T²·mean over forget of KL(p_untrained ‖ p)"
    )
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"alpha": (0.5, 0.7, 0.8, 0.9, 0.95)}

    alpha: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_temperature(self.temperature)

    def phases(self, problem: Problem) -> list[Phase]:
        alpha = share_of_retained(self.alpha, problem.retain, problem.forget)
        bad = good = None
        if alpha < 1:
            bad = Teacher(untrained(problem.model, problem.seed), problem.samples, problem.forget)
        if alpha > 0:
            good = Teacher(problem.model, problem.samples, problem.retain)
        objective = Distillation({RETAIN: (alpha, good), FORGET: (1 - alpha, bad)}, temperature=self.temperature)
        return [Phase(objective=objective, rule=problem.rule, name="bad_teacher")]

    def preparation_passes(self, problem: Problem, batch_size: int) -> int:
        alpha = share_of_retained(self.alpha, problem.retain, problem.forget)
        retain = table_passes(problem.samples, len(problem.retain), batch_size) if alpha > 0 else 0
        return retain + (table_passes(problem.samples, len(problem.forget), batch_size) if alpha < 1 else 0)
