"""SFRon: forget along the weights that matter more for forgetting than for retaining, and repair on retain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unsharp import masks, runtime
from unsharp.data.samples import Batch
from unsharp.errors import UserError
from unsharp.gradients import SampleGradients, groups_of, importances
from unsharp.methods.base import METHODS, PhasedMethod, Problem
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Moment, Objective, Phase

TINY = 1e-15


@dataclass(frozen=True, kw_only=True)
class AdaptiveAscent(Objective):
    """−weight · Σ cᵢ·ℓᵢ on the forget batch, cᵢ = ℓᵢ^(−power) / Σ ℓⱼ^(−power): what is forgotten already weighs less.

    The coefficients count as constants when the gradient is taken. The weight falls over the epochs, as half a cosine.

    Args:
        weight: Factor above 0 in the first epoch.
        power: λ ≥ 0; 0 is the mean.
    """

    weight: float
    power: float

    @property
    def streams(self) -> tuple[str, ...]:
        return (FORGET,)

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        logits = model(batches[FORGET].inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = nn.functional.cross_entropy(logits, batches[FORGET].labels, reduction="none")
        # a loss that rounding made 0 would outweigh all others, and has no gradient
        inverse = losses.detach().clamp(min=torch.finfo(losses.dtype).eps) ** -self.power
        total = inverse.sum()
        # the mean over processes, so that the mean of their losses is that of the whole batch
        runtime.mean_over_ranks([total])
        yield FORGET, -self.weight * self.decay(at) * (inverse / total * losses).sum()

    @staticmethod
    def decay(at: Moment) -> float:
        """(1 + cos(π·epoch/epochs))/2: 1 in the first epoch."""
        return (1 + math.cos(math.pi * at.epoch / at.epochs)) / 2


@METHODS.register("sfron")
@dataclass(frozen=True, kw_only=True)
class SFRon(PhasedMethod):
    """Climb the forget loss on the weights that matter more for the forget set, then repair on retain, in turn.

    An epoch first runs through the forget set: ascent with adaptive coefficients, on the weights whose Fisher
    information on forget is at least `fisher_ratio` times that on retain. Then it runs through the retained samples:
    descent on all weights. Each of the two has its own optimiser state.

    Args:
        forget_weight: Factor of the forget loss in the first epoch, above 0; it falls to 0 as half a cosine (α of the
            published code).
        loss_power: λ ≥ 0: a sample weighs by its loss to the power of −λ; 0 weighs all alike.
        fisher_ratio: Least ratio γ ≥ 0 of the two Fisher informations at which a weight takes part in forgetting; 0
            lets all weights take part.
        fisher_batch: Samples whose mean gradient is squared, at least 1. 1 gives the diagonal of the Fisher matrix, as
            the formula has it; published code squares the gradients of batches.
    """

    source: ClassVar[str] = (
        "Huang et al., NeurIPS 2024 (Unified gradient-based machine unlearning with remain geometry enhancement), from "
        "its published code"
    )
    formula: ClassVar[str] = (
        "M = [I_F/I_R ≥ fisher_ratio];  in turn: w ← w + M∘∇(forget_weight·Σ cᵢℓᵢ on forget), cᵢ ∝ 1/ℓᵢ^λ;  "
        "then w ← w − ∇CE on retain"
    )
    suggested: ClassVar[dict[str, Any]] = {"schedule": "cosine", "clip_norm": 7.0}
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"forget_weight": (1.0, 3.0, 10.0, 25.0, 50.0)}
    nested_epochs: ClassVar[bool] = False
    separate_states: ClassVar[bool] = True

    forget_weight: float = 25.0
    loss_power: float = 0.5
    fisher_ratio: float = 1.0
    fisher_batch: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.forget_weight) and self.forget_weight > 0):
            raise UserError(f"forget_weight must be a finite number above 0, got {self.forget_weight}")
        for name in ("loss_power", "fisher_ratio"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be a finite number of at least 0, got {value}")
        if self.fisher_batch < 1:
            raise UserError(f"fisher_batch must be at least 1, got {self.fisher_batch}")

    def phases(self, problem: Problem) -> list[Phase]:
        mask = None if self.fisher_ratio == 0 else problem.kept_mask(lambda: self._mask(problem))
        if mask is not None and masks.fraction_of(mask) == 0:
            raise UserError(f"no weight has a Fisher ratio of {self.fisher_ratio:g}; take a smaller fisher_ratio")
        return [
            Phase(
                objective=AdaptiveAscent(weight=self.forget_weight, power=self.loss_power),
                rule=problem.rule,
                region=mask,
                turn=0,
                name=FORGET,
            ),
            Phase(objective=CrossEntropy({RETAIN: 1.0}), rule=problem.rule, turn=1, name=RETAIN),
        ]

    def _mask(self, problem: Problem) -> masks.Mask:
        forget, retain = (
            importances(
                SampleGradients(
                    problem.model,
                    problem.samples,
                    groups_of(part, self.fisher_batch, problem.seed),
                    most=problem.batch_size,
                )
            )
            for part in (problem.forget, problem.retain)
        )
        return {n: (forget[n] + TINY) / (retain[n] + TINY) >= self.fisher_ratio for n in forget}

    def preparation_passes(self, problem: Problem, batch_size: int) -> int:
        return 0 if self.fisher_ratio == 0 else sum(-(-len(p) // batch_size) for p in (problem.forget, problem.retain))
