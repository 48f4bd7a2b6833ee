"""What an unlearning method is: phases that the engine runs, or a function of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from torch import nn

from unsharp import masks
from unsharp.artifacts import Workspace
from unsharp.data.samples import Samples
from unsharp.errors import UserError
from unsharp.phases import Phase
from unsharp.progress import SILENT, Progress
from unsharp.registry import Registry
from unsharp.sharpness.base import Rule

if TYPE_CHECKING:
    from unsharp.training import Record

METHODS: Registry[type[Method]] = Registry("method", "unsharp.methods")
"""Every registered method, by name."""


class RunPart(Protocol):
    """Makes a copy of a network forget some samples by another method, under the rule and loop of the whole run."""

    def __call__(
        self,
        model: nn.Module,
        method: Method,
        forget: np.ndarray,
        retain: np.ndarray,
        *,
        stage: str,
        settings: Mapping[str, Any],
    ) -> tuple[nn.Module, Record]:
        """Run the part, go on with it, or find it done.

        Args:
            model: The network to start from; it is left as it is.
            method: The other method.
            forget: (k,) int64 sorted positions to forget.
            retain: Sorted positions to retain.
            stage: Name of the part, under which a killed run finds it again.
            settings: "epochs" and "lr", where they differ from those of the run.

        Returns:
            The network that has forgotten, in evaluation mode, and the record of the part.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a method is asked to solve.

    Args:
        model: The trained network; phases train it in place.
        samples: Its training data.
        forget: (k,) int64 sorted positions of the samples to forget.
        retain: The other positions, sorted; a share of them where `retain_fraction` says so.
        rule: The sharpness rule that the user chose for this method.
        seed: Seed of whatever the method draws.
        retrain: Trains a fresh network on the retained samples; None where it is not known how.
        workspace: Where a mask is kept, so that a killed run goes on with the very same one; None keeps none.
        validation: Samples that the network was not trained on, for methods that choose by them; None where there are
            none.
        n_retained: How many retained samples there are, of which `retain` may be a share; None for all of them.
        batch_size: Largest batch, in which passes are counted.
        progress: Told of work that a method does by itself.
        unlearn: Runs another method on a part of the task; None where nobody can.
        corrected: The forget samples, in their order, as they should have been; None where they are to be removed.
    """

    model: nn.Module
    samples: Samples
    forget: np.ndarray
    retain: np.ndarray
    rule: Rule
    seed: int = 0
    retrain: Callable[[], tuple[nn.Module, Record]] | None = None
    workspace: Workspace | None = None
    validation: Samples | None = None
    n_retained: int | None = None
    batch_size: int = 256
    progress: Progress = SILENT
    unlearn: RunPart | None = None
    corrected: Samples | None = None

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
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Settings, its own or the loop's, that `unsharp tune` searches where the user gives none: the values, in order.

    What a class above declares holds too. A rate of the loop (lr) is meant for SGD."""
    no_retain_fraction: ClassVar[str] = ""
    """Why `retain_fraction` does not apply to the method; empty where it does."""
    corrects: ClassVar[bool] = False
    """Whether it takes samples as they should have been; every other method removes samples."""

    @classmethod
    def admits(cls, rule: str) -> tuple[bool, str]:
        """Whether the method works under the rule, and if not, why."""
        return True, ""

    def check(self, rule: Rule) -> None:
        """Refuse a rule that does not go with these parameters, where `admits` cannot know them.

        Raises:
            UserError: if it does not.
        """
        return


@dataclass(frozen=True, kw_only=True)
class Choice:
    """With the weights of which epoch a run ends.

    Args:
        epoch: Number of the epoch, from 0.
        passes: Forward–backward passes that the choice took; a pass forward alone is a third of one.
        about: What led to it, as plain values for the record.
    """

    epoch: int
    passes: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PhasedMethod(Method):
    """A method that is phases, together or in turn, so that every rule and mask works with it."""

    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.001, 0.003, 0.01, 0.03, 0.1), "epochs": (1, 2, 3, 4, 5)}
    nested_epochs: ClassVar[bool] = True
    """Whether a run passes, under a constant learning rate, through the networks with which shorter runs end."""
    separate_states: ClassVar[bool] = False
    """Whether each phase has an optimiser state of its own."""

    @abstractmethod
    def phases(self, problem: Problem) -> list[Phase]:
        """The phases, in the order in which their batches go forward."""

    def cautions(self, *, scale_free: bool, apart: bool) -> list[str]:
        """What the user is to know before the run: settings that do not do here what they say.

        Args:
            scale_free: Whether the optimiser divides the gradients by their own size, as AdamW does.
            apart: Whether each phase has an optimiser state of its own.
        """
        return []

    def preparation_passes(self, problem: Problem, batch_size: int) -> int:
        """Passes over batches of that size that `phases` itself takes; one forward alone is a third of a pass."""
        return 0

    @property
    def chooses_epoch(self) -> bool:
        """Whether the weights after each epoch are kept until `choose_epoch` has said which of them are the result."""
        return False

    def choose_epoch(
        self, problem: Problem, network: Callable[[int], nn.Module], epochs: int, batch_size: int
    ) -> Choice:
        """Choose the epoch with whose weights the run ends, a pure function of the networks.

        Args:
            problem: What was to be solved.
            network: Gives the network, in evaluation mode, as it was after an epoch (from 0); it is the same object
                each time, so look at it before asking for the next.
            epochs: How many there are.
            batch_size: That of the run, in which passes are counted.
        """
        return Choice(epoch=epochs - 1)


@dataclass(frozen=True, kw_only=True)
class AppliedMethod(Method):
    """A method that does its own work."""

    draws: ClassVar[bool] = True
    """Whether its result depends on the seed."""

    @abstractmethod
    def apply(self, problem: Problem) -> tuple[nn.Module, Record]:
        """The network that has forgotten, and what that took."""


def check_fraction(name: str, value: float, *, low: float = 0.0, high: float = 1.0, open_low: bool = False) -> None:
    """Raises: UserError if `value` is not in [low, high], or (low, high]."""
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside:
        raise UserError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value}")


def alpha_cancels(alpha: float) -> list[str]:
    """The caution where α weighs two losses against each other of which the optimiser sees each by itself."""
    if not 0 < alpha < 1:
        return []
    return [
        f"alpha = {alpha:g} has next to no effect: each of the two losses has weights or a state of its own, and this "
        "optimiser divides gradients by their size; balance them by rates (--phase-lr forget=LR), or take sgd"
    ]
