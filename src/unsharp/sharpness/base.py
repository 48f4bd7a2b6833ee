"""What a sharpness rule is: a way from a phase's loss to the gradient that the optimiser steps with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

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
    def passes(self) -> int:
        """Forward–backward passes per step."""

    @property
    def passes_beside(self) -> int:
        """The same where the perturbation comes from an objective of its own."""
        return self.passes

    @abstractmethod
    def gradient(self, point: Point) -> Gradients:
        """The gradient to step with; non-finite in at least one entry if any pass was non-finite."""

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
    def passes(self) -> int:
        return 1

    def gradient(self, point: Point) -> Gradients:
        return point.gradient()

    def turned(self) -> NoRule:
        return self


NO_RULE = NoRule()
