"""L1-sparse: fine-tuning that draws weights to zero, strongly at first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unsharp.data.samples import Batch
from unsharp.errors import UserError
from unsharp.methods.base import METHODS, PhasedMethod, Problem
from unsharp.phases import RETAIN, CrossEntropy, Moment, Objective, Phase


class SparseCrossEntropy(Objective):
    """Mean cross-entropy on retain + strength · ‖w‖₁ over the trainable weights, a shared one counted once.

    Args:
        gamma: Strength γ ≥ 0 in the first epoch.
        free_epochs: Last epochs without the penalty.
    """

    def __init__(self, gamma: float, free_epochs: int) -> None:
        self._gamma = gamma
        self._free_epochs = free_epochs
        self._cross_entropy = CrossEntropy({RETAIN: 1.0})

    @property
    def streams(self) -> tuple[str, ...]:
        return self._cross_entropy.streams

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        strength = self.strength(at)
        yield from self._cross_entropy.terms(model, batches, at)
        if strength > 0:
            yield "l1", strength * l1_norm(model)

    def strength(self, at: Moment) -> float:
        """γ · (1 − e/E) in epoch e from 0 of the E that have a penalty, 0 in the others.

        Raises:
            UserError: if no epoch is left for the penalty.
        """
        penalised = at.epochs - self._free_epochs
        if penalised < 1:
            raise UserError(
                f"l1_free_epochs={self._free_epochs} leaves none of {at.epochs} epochs for the penalty; take fewer"
            )
        return self._gamma * max(0.0, 1 - at.epoch / penalised)


def l1_norm(model: nn.Module) -> Tensor:
    """Σ |w| over the trainable weights (0-d, at least float32); its gradient is sign(w), and 0 at 0."""
    norms = [
        p.abs().sum(dtype=torch.promote_types(p.dtype, torch.float32)) for p in model.parameters() if p.requires_grad
    ]
    return torch.stack([n.to(norms[0].device) for n in norms]).sum()


@METHODS.register("l1_sparse")
@dataclass(frozen=True, kw_only=True)
class L1Sparse(PhasedMethod):
    """Fine-tune on the retained samples under an L1 penalty on the weights that falls linearly to 0.

    Args:
        l1_gamma: Strength γ ≥ 0 of the penalty in the first epoch.
        l1_free_epochs: Last epochs that are left without the penalty.
    """

    source: ClassVar[str] = "Jia et al., NeurIPS 2023 (arXiv 2304.04934); schedule as in its published code"
    formula: ClassVar[str] = "L = mean over retain of CE + γₑ·‖w‖₁;  γₑ = γ·(1 − e/E) in epoch e = 0 … E−1"
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"l1_gamma": (1e-5, 5e-5, 1e-4, 5e-4, 1e-3)}
    nested_epochs: ClassVar[bool] = False

    l1_gamma: float = 5e-4
    l1_free_epochs: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.l1_gamma) and self.l1_gamma >= 0):
            raise UserError(f"l1_gamma must be a finite number of at least 0, got {self.l1_gamma}")
        if self.l1_free_epochs < 0:
            raise UserError(f"l1_free_epochs must be at least 0, got {self.l1_free_epochs}")

    def phases(self, problem: Problem) -> list[Phase]:
        objective = SparseCrossEntropy(self.l1_gamma, self.l1_free_epochs)
        return [Phase(objective=objective, rule=problem.rule, name=RETAIN)]
