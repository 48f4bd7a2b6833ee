"""What an unlearning method is: phases that the engine runs, or a function of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from unsharp import masks
from unsharp.artifacts import Workspace
from unsharp.data.samples import Samples
from unsharp.errors import UserError
from unsharp.phases import Phase
from unsharp.registry import Registry
from unsharp.sharpness.base import Rule

if TYPE_CHECKING:
    from unsharp.training import Record

METHODS: Registry[type[Method]] = Registry("method", "unsharp.methods")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a method is asked to solve.

    Args:
        model: The trained network; phases train it in place.
        samples: Its training data.
        forget: (k,) int64 sorted positions of the samples to forget.
        retain: The other positions, sorted.
        rule: The sharpness rule that the user chose for this method.
        seed: Seed of whatever the method draws.
        retrain: Trains a fresh network on the retained samples; None where it is not known how.
        workspace: Where a mask is kept, so that a killed run goes on with the very same one; None keeps none.
    """

    model: nn.Module
    samples: Samples
    forget: np.ndarray
    retain: np.ndarray
    rule: Rule
    seed: int = 0
    retrain: Callable[[], tuple[nn.Module, Record]] | None = None
    workspace: Workspace | None = None

    def kept_mask(self, make: Callable[[], masks.Mask]) -> masks.Mask:
        """The mask that `make` gives, made once for the run and found again after a kill."""
        if self.workspace is None:
            return make()
        path = self.workspace.file(masks.FILE)
        if not path.exists():
            masks.save(make(), path)
        return masks.load(path, self.model)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to make a network forget samples; its fields are its parameters."""

    registry: ClassVar[Registry[type[Method]]] = METHODS
    source: ClassVar[str]
    formula: ClassVar[str]
    default_rule: ClassVar[str] = "none"
    suggested: ClassVar[Mapping[str, Any]] = {}
    """Settings of the loop (epochs, lr) with which this method is usually run, where they differ from the defaults."""

    @classmethod
    def admits(cls, rule: str) -> tuple[bool, str]:
        """Whether the method works under the rule, and if not, why."""
        return True, ""


@dataclass(frozen=True, kw_only=True)
class PhasedMethod(Method):
    """A method that is phases, together or in turn, so that every rule and mask works with it."""

    separate_states: ClassVar[bool] = False
    """Whether each phase has an optimiser state of its own."""

    @abstractmethod
    def phases(self, problem: Problem) -> list[Phase]:
        """The phases, in the order in which their batches go forward."""

    def preparation_passes(self, problem: Problem, batch_size: int) -> int:
        """Forward–backward passes over batches of that size that `phases` itself takes."""
        return 0


@dataclass(frozen=True, kw_only=True)
class AppliedMethod(Method):
    """A method that does its own work."""

    @abstractmethod
    def apply(self, problem: Problem) -> tuple[nn.Module, Record]:
        """The network that has forgotten, and what that took."""


def check_fraction(name: str, value: float, *, low: float = 0.0, high: float = 1.0, open_low: bool = False) -> None:
    """Raises: UserError if `value` is not in [low, high], or (low, high]."""
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside:
        raise UserError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value}")
