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
"""Every registered rule, by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """What is known of a phase before its run.

    Args:
        name: The phase's name.
        norms: Per trainable tensor whether it belongs to a normalisation layer.
        region: Per tensor the coordinates that the phase may move, None where all; None for all tensors.
        smallest_batch: Samples in the smallest batch that one process gets of any stream of the phase.
    """

    name: str
    norms: Sequence[bool]
    region: Sequence[Tensor | None] | None
    smallest_batch: int


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """How a loss becomes a gradient; independent of what the loss is and of where the gradient may act."""

    registry: ClassVar[Registry[type[Rule]]] = RULES
    source: ClassVar[str]
    formula: ClassVar[str]
    strengths: ClassVar[tuple[str, ...]] = ("rho", "lam")
    """Fields, of which it may lack some, at whose 0 it is the plain gradient, to the bit and in one pass."""
    draws: ClassVar[bool] = False
    """Whether it draws random numbers of its own, which follow from torch's seed as its docstring tells."""
    starts_at_weights: ClassVar[bool] = True
    """Whether the pass that moves BatchNorm's statistics is at w; otherwise they are those of other weights."""
    perturbs_by_another: ClassVar[bool] = True
    """Whether its perturbation may come from another objective than the update does."""

    @property
    @abstractmethod
    def passes(self) -> float:
        """Forward–backward passes per step, in the mean over the steps."""

    @property
    def pieces(self) -> int:
        """Pieces into which it cuts each batch, which BatchNorm sees one after the other; 1 leaves batches whole."""
        return 1

    @property
    def passes_beside(self) -> float:
        """The same where the perturbation comes from an objective of its own."""
        return self.passes

    def check(self, site: Site) -> None:
        """Refuse a phase in which the rule cannot work, before its first step.

        Raises:
            UserError: if it cannot.
        """
        return

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
