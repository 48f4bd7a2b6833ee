"""What one step does: signed losses on batches (the what), a rule (the how), a region (the where)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unsharp.data.samples import Batch
from unsharp.errors import UserError
from unsharp.sharpness.base import NO_RULE, Rule

RETAIN, FORGET = "retain", "forget"
Region = Mapping[str, Tensor]


class Objective(ABC):
    """A signed loss on batches of named streams; the engine minimises it."""

    @property
    @abstractmethod
    def streams(self) -> tuple[str, ...]:
        """The streams that it reads, in the order in which their batches go forward."""

    @abstractmethod
    def terms(self, model: nn.Module, batches: Mapping[str, Batch]) -> Iterator[tuple[str, Tensor]]:
        """The named signed terms whose sum is the loss.

        Each term is sent backward before the next one is asked for, so that only one graph is alive at a time.
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

    def terms(self, model: nn.Module, batches: Mapping[str, Batch]) -> Iterator[tuple[str, Tensor]]:
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
            the same streams in the same order.
        name: For curves and messages.
    """

    objective: Objective
    rule: Rule = NO_RULE
    region: Region | None = None
    perturb_objective: Objective | None = None
    name: str = "loss"

    def __post_init__(self) -> None:
        if self.perturb_objective is not None and self.perturb_objective.streams != self.objective.streams:
            raise UserError(
                f"phase {self.name!r}: perturb_objective reads {self.perturb_objective.streams}, the objective "
                f"{self.objective.streams}; both must read the same streams in the same order"
            )

    @property
    def passes(self) -> int:
        """Forward–backward passes per step, one for each batch and evaluation."""
        passes = self.rule.passes if self.perturb_objective is None else self.rule.passes_beside
        return passes * len(self.objective.streams)


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
