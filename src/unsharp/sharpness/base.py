"""What a sharpness rule is: a way from a phase's loss to the gradient that the optimiser steps with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from unsharp.registry import Registry
from unsharp.sharpness.point import Gradients, Point

RULES: Registry[type[Rule]] = Registry("rule", "unsharp.sharpness")


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """How a loss becomes a gradient; independent of what the loss is and of where the gradient may act."""

    registry: ClassVar[Registry[type[Rule]]] = RULES
    source: ClassVar[str]
    formula: ClassVar[str]

    @property
    @abstractmethod
    def passes(self) -> float:
        """Forward–backward passes per step, in the mean over the steps."""

    @property
    def passes_beside(self) -> float:
        """The same where the perturbation comes from an objective of its own."""
        return self.passes

    @abstractmethod
    def gradient(self, point: Point) -> Gradients:
        """The gradient to step with; non-finite in at least one entry if any pass was non-finite."""

    def after_step(self, weights: Sequence[Tensor], memory: dict[str, Any], done: float) -> None:
        """Look at the weights after a step; not called for what `unsharp.SAM` does.

        Args:
            weights: The trainable tensors.
            memory: What the rule keeps from step to step; the same as `Point.memory`.
            done: Share of the run that lies behind, in (0, 1].
        """
        return

    def final_weights(self, memory: Mapping[str, Any]) -> list[Tensor] | None:
        """The weights with which the run ends, inside the phase's region; None leaves those of the last step.

        Statistics of BatchNorm are then taken anew.
        """
        return None

    @abstractmethod
    def turned(self) -> Rule:
        """The same rule with the sign of its sharpness turned, as the forget phase of Sharp MinMax needs it."""


@RULES.register("none")
@dataclass(frozen=True, kw_only=True)
class NoRule(Rule):
    """The plain gradient."""

    source: ClassVar[str] = "—"
    formula: ClassVar[str] = "g = ∇L(w)"

    @property
    def passes(self) -> float:
        return 1

    def gradient(self, point: Point) -> Gradients:
        return point.gradient()

    def turned(self) -> NoRule:
        return self


NO_RULE = NoRule()
