"""Random labels: go on training with the forget samples under labels drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from unsharp.methods.base import METHODS, PhasedMethod, Problem
from unsharp.methods.relabel import RandomLabels, Relabelled, check_alpha, share_of_retained
from unsharp.phases import Phase, Region


@METHODS.register("random_label")
@dataclass(frozen=True, kw_only=True)
class RandomLabel(PhasedMethod):
    """Train on with the retained samples and with the forget samples under random labels, drawn anew in each epoch.

    Args:
        alpha: Weight α in [0, 1] of the retain loss beside that of forget; None takes the share of the retained
            samples among all that are read.
        other_classes: New labels are of other classes than the sample's own; False lets that one in, as the published
            code does.
    """

    source: ClassVar[str] = (
        "Golatkar et al., CVPR 2020 (baseline); Graves et al., AAAI 2021 (Amnesiac Unlearning); "
        "as in the published code of SalUn"
    )
    formula: ClassVar[str] = "L = α·mean over retain of CE + (1−α)·mean over forget of CE(random label)"
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"alpha": (0.5, 0.7, 0.8, 0.9, 0.95)}

    alpha: float | None = None
    other_classes: bool = True

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def phases(self, problem: Problem) -> list[Phase]:
        labels = RandomLabels(problem.samples, other_classes=self.other_classes)
        alpha = share_of_retained(self.alpha, problem.retain, problem.forget)
        name = METHODS.name_of(type(self))
        return [Phase(objective=Relabelled(alpha, labels), rule=problem.rule, region=self._region(problem), name=name)]

    def _region(self, problem: Problem) -> Region | None:
        return None
