"""What an objective of language unlearning is: a loss of each forgotten sample, and one of each retained sample."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from unsharp.data.samples import Batch
from unsharp.errors import UserError, unknown
from unsharp.language.likelihood import Reduction, answer_losses, reference_losses
from unsharp.language.samples import TextBatch, TextSamples
from unsharp.phases import Moment, Objective
from unsharp.registry import Registry
from unsharp.sharpness.correction import check_strength

OBJECTIVES: Registry[type[LanguageObjective]] = Registry("objective", "unsharp.language.objectives")
SampleLoss = Callable[[nn.Module, TextBatch], Tensor]
"""(model, batch) → (B,), a loss of each sample that depends on no other sample of the batch."""
Activations = Callable[[TextBatch, int], Tensor]
"""(batch, layer) → (B, T, D), the activations of a model that is not trained."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleLosses(Objective):
    """Σ over streams of weight · mean over the batch of a loss of each sample.

    Args:
        losses: Per stream its weight and its loss; a stream of weight 0 is not read.
        micro_batch: Samples that go forward and backward at a time; their gradients add up to that of the whole batch
            before any rule looks at it. None takes all at once.
        forwards: Batches that another network sends forward in a step.
    """

    losses: Mapping[str, tuple[float, SampleLoss]]
    micro_batch: int | None = None
    forwards: int = 0

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(stream for stream, (weight, _) in self.losses.items() if weight != 0)

    @property
    def other_forwards(self) -> int:
        return self.forwards

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        for stream in self.streams:
            (weight, loss), whole = self.losses[stream], batches[stream]
            n = len(whole.labels)
            for part in [whole] if self.micro_batch is None else whole.split(-(-n // self.micro_batch)):
                assert isinstance(part, TextBatch)
                yield stream, weight * loss(model, part).sum() / n


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an objective is asked to solve.

    Args:
        model: The model as it was before the first step; in evaluation mode or not, it is not yet trained.
        samples: All texts.
        preferred: At the positions of the forgotten texts, the same prompts with the answers to give in their place;
            None where there are none.
        original: Makes what gives the activations of the model before the first step.
        batch_size: Samples of a pass without gradient.
    """

    model: nn.Module
    samples: TextSamples
    preferred: TextSamples | None = None
    original: Callable[[], Activations] | None = None
    batch_size: int = 8
    _kept: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def preferred_samples(self) -> TextSamples:
        """`preferred`. Raises: UserError if there are none."""
        if self.preferred is None:
            raise UserError("this objective needs an answer to give in place of each forgotten one; give preferred")
        return self.preferred

    def reference(self, reduction: Reduction, *, preferred: bool = False) -> Tensor:
        """−log p (n,) of the answers to forget, or of the preferred ones, under the model before the first step."""
        key = (reduction, preferred)
        if key not in self._kept:
            texts = self.preferred_samples() if preferred else self.samples
            self._kept[key] = reference_losses(
                self.model, texts, self.samples.forget, reduction, batch_size=self.batch_size
            )
        return self._kept[key]

    @property
    def forwards(self) -> int:
        """Batches that went forward for references so far."""
        return len(self._kept) * math.ceil(len(self.samples.forget) / self.batch_size)


@dataclass(frozen=True, kw_only=True)
class LanguageObjective(ABC):
    """What a language model is to lose; its fields are its parameters.

    Args:
        gamma: Weight γ ≥ 0 of the loss on the retained texts; 0 reads none of them.
    """

    registry: ClassVar[Registry[type[LanguageObjective]]] = OBJECTIVES
    source: ClassVar[str]
    formula: ClassVar[str]
    prefers: ClassVar[str] = ""
    """Where its preferred answers come from: "" it has none, "given" from the data, "refusal" from the refusals."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_strength("gamma", self.gamma)

    @abstractmethod
    def forget_loss(self, task: Task) -> SampleLoss:
        """The loss of each forgotten sample, to be minimised; what it compares with is computed here, once."""

    def retain_loss(self, task: Task) -> SampleLoss:
        """The loss of each retained sample."""
        return lambda model, batch: answer_losses(model, batch, "mean")

    @property
    def forwards(self) -> tuple[int, int]:
        """Batches that the original model sends forward beside one of forget, and beside one of retain."""
        return (0, 0)


def check_positive(name: str, value: float) -> None:
    """Raises: UserError unless `value` is a finite number above 0."""
    check_strength(name, value)
    if value == 0:
        raise UserError(f"{name} must be above 0, got {value!r}")


def check_reduction(value: str) -> None:
    """Raises: UserError unless `value` is a reduction."""
    if value not in ("sum", "mean"):
        raise unknown("reduction", value, ("sum", "mean"))


def at(table: Tensor, batch: TextBatch) -> Tensor:
    """The entries of a table (n,) that belong to a batch."""
    return table[batch.indices.to(table.device)]


def preferred_batch(samples: TextSamples, batch: TextBatch) -> TextBatch:
    """The preferred texts of a batch's samples."""
    return samples.batch(np.asarray(batch.indices))


def negative_log_sigmoid(x: Tensor) -> Tensor:
    """−log σ(x)."""
    return -nn.functional.logsigmoid(x)
