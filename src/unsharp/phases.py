"""What one step does: signed losses on batches (the what), a rule (the how), a region (the where)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unsharp.data.samples import Batch
from unsharp.errors import UserError
from unsharp.sharpness.base import NO_RULE, Rule

RETAIN, FORGET = "retain", "forget"
Region = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a step is taken; what an objective that changes over the run may depend on.

    Args:
        epoch: Number of the epoch, from 0.
        epochs: Epochs of the whole run.
        seed: Seed of the run.
    """

    epoch: int = 0
    epochs: int = 1
    seed: int = 0


class Objective(ABC):
    """A signed loss on batches of named streams; the engine minimises it."""

    @property
    @abstractmethod
    def streams(self) -> tuple[str, ...]:
        """The streams that it reads, in the order in which their batches go forward."""

    @property
    def other_forwards(self) -> int:
        """How many batches other networks, such as teachers, send forward in a step."""
        return 0

    @abstractmethod
    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        """The named signed terms whose sum is the loss, a pure function of the arguments.

        Each term is sent backward before the next one is asked for, so that only one graph is alive at a time. Terms of
        one name are parts of one sum, as the parts of a batch that does not fit in memory give them.
        """


class Scale(ABC):
    """A factor ≥ 0 on a phase's gradient that follows the run; where it is 0, a phase with a state of its own rests."""

    @abstractmethod
    def factor(self, loss: Tensor, memory: dict[str, Any]) -> Tensor:
        """The factor of this step, 0-d on the loss's device.

        Args:
            loss: The phase's signed loss (0-d) at the point of its last evaluation. It may be non-finite; what is kept
                in the memory must not become so.
            memory: What the scale keeps from step to step: tensors and plain values.
        """


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Σ over streams of weight · mean cross-entropy of the batch.

    Args:
        weights: Signed weight per stream; a stream of weight 0 is not read at all.
        label_smoothing: Mass in [0, 1) that is spread over all classes.
    """

    weights: Mapping[str, float]
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for stream, weight in self.weights.items():
            if not math.isfinite(weight):
                raise UserError(f"the weight of the {stream} loss must be finite, got {weight}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(stream for stream, weight in self.weights.items() if weight != 0)

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        for stream in self.streams:
            batch = batches[stream]
            logits = model(batch.inputs)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = nn.functional.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
            yield stream, self.weights[stream] * loss


@dataclass(frozen=True, kw_only=True, eq=False)
class Phase:
    """An objective, the rule under which its gradient is taken, and the region that this gradient may move.

    Args:
        objective: What is minimised.
        rule: How the loss becomes a gradient.
        region: Bool tensors by parameter name, True where the weight may move; None for all trainable weights.
        perturb_objective: The objective from which the rule's perturbation comes, if not `objective` itself. It reads
            the same streams in the same order, or as many others; the pass on others leaves no trace, and where a step
            begins with it the batches of `objective` go forward once, without a gradient, so that BatchNorm sees them
            at w and nothing else, as under rule none.
        name: For curves and messages, and for settings of this phase alone; each phase of a method has another.
        turn: Phases of the same turn run together; in an epoch the turns follow one another, each with a run of its own
            through its leading stream.
        until: Epochs after which the phase rests; None for the whole run.
        scale: A factor on its gradient that follows the run.
        leak: Let the gradient at w act outside the region as well, and keep the perturbed one to it alone, as the
            published code of Sharp MinMax does. The region then masks no weight.
    """

    objective: Objective
    rule: Rule = NO_RULE
    region: Region | None = None
    perturb_objective: Objective | None = None
    name: str = "loss"
    turn: int = 0
    until: int | None = None
    scale: Scale | None = None
    leak: bool = False

    def __post_init__(self) -> None:
        if self.perturb_objective is not None and not self.rule.perturbs_by_another:
            raise UserError(
                f"phase {self.name!r}: {self.rule!r} takes its perturbation from the loss itself; choose rule sam or "
                "asam"
            )
        if self.perturb_objective is not None and self.perturb_objective.streams != self.objective.streams:
            mine, others = self.objective.streams, self.perturb_objective.streams
            if len(mine) != len(others) or set(mine) & set(others):
                raise UserError(
                    f"phase {self.name!r}: perturb_objective reads {others}, the objective {mine}; both must read the "
                    "same streams in the same order, or as many different ones"
                )

    @property
    def streams(self) -> tuple[str, ...]:
        """All streams that it reads."""
        others = () if self.perturb_objective is None else self.perturb_objective.streams
        return tuple(dict.fromkeys((*self.objective.streams, *others)))

    @property
    def perturbs_apart(self) -> bool:
        """Whether the perturbation comes from other batches than the update."""
        return self.streams != self.objective.streams

    @property
    def passes(self) -> float:
        """Forward–backward passes per step in the mean, one for each batch and evaluation."""
        passes = self.rule.passes if self.perturb_objective is None else self.rule.passes_beside
        return passes * len(self.objective.streams)

    def acts_in(self, epoch: int) -> bool:
        """Whether the phase takes part in this epoch (from 0)."""
        return self.until is None or epoch < self.until


def region_tensors(model_params: Mapping[str, Tensor], region: Region | None) -> list[Tensor | None] | None:
    """The region as bool tensors in the order of the parameters, laid out in memory like them.

    Raises:
        UserError: if a parameter is missing from the region or a shape differs.
    """
    if region is None:
        return None
    tensors: list[Tensor | None] = []
    for name, p in model_params.items():
        if name not in region:
            raise UserError(f"the mask has no entry for parameter {name!r}; make it for this model")
        if region[name].shape != p.shape:
            raise UserError(f"the mask of {name!r} has shape {tuple(region[name].shape)}, the weight {tuple(p.shape)}")
        tensors.append(torch.empty_like(p, dtype=torch.bool).copy_(region[name]))
    return tensors


def union(regions: list[list[Tensor | None] | None]) -> list[Tensor | None] | None:
    """The coordinates that at least one of the regions may move; None for all."""
    if not regions or any(r is None for r in regions):
        return None
    out: list[Tensor | None] = []
    for masks in zip(*(r for r in regions if r is not None)):
        whole = masks[0]
        for m in masks[1:]:
            whole = None if whole is None or m is None else whole | m
        out.append(whole)
    return out
