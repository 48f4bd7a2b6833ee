"""RMU: turn the activations on forgotten texts into one random direction, and keep those on the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unsharp.errors import UserError
from unsharp.language.likelihood import forward
from unsharp.language.objectives.base import OBJECTIVES, LanguageObjective, SampleLoss, Task, check_positive
from unsharp.language.samples import TextBatch

DEPTH = 7 / 32
"""Layer 7 of 32, where the original steers."""


@OBJECTIVES.register("rmu")
@dataclass(frozen=True, kw_only=True)
class RepresentationMisdirection(LanguageObjective):
    """Representation misdirection (RMU): activations on forgotten texts go to one random direction, others stay.

    All tokens of a text count alike, its prompt too; padding does not. The layers above the steered one do not move;
    a mask can narrow down which weights below it do.

    Args:
        gamma: Weight γ ≥ 0 of the distance from the original activations on retained texts, α in the paper.
        layer: The layer whose output is steered, from 1; None takes that at 7/32 of the depth, and at least 1.
        steering: Length c > 0 of the target.
        target_seed: Seed of the direction u.
    """

    source: ClassVar[str] = "Li et al. (WMDP), ICML 2024 (arXiv 2403.03218)"
    formula: ClassVar[str] = (
        "L = mean‖h(forget) − c·u‖²/D + γ·mean‖h(retain) − h_before(retain)‖²/D, means over tokens, then samples;  "
        "u uniform in [0, 1)^D, divided by its length"
    )

    gamma: float = 1200.0
    layer: int | None = None
    steering: float = 6.5
    target_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("steering", self.steering)
        if self.layer is not None and self.layer < 1:
            raise UserError(f"layer must be at least 1, got {self.layer}")
        if self.target_seed < 0:
            raise UserError(f"target_seed must be at least 0, got {self.target_seed}")

    @property
    def forwards(self) -> tuple[int, int]:
        return (0, 1)

    def forget_loss(self, task: Task) -> SampleLoss:
        layer, width = self._layer_of(task.model)
        generator = torch.Generator().manual_seed(self.target_seed)
        direction = torch.rand(width, generator=generator)
        target = (self.steering * direction / direction.norm()).to(task.samples.device)
        return lambda model, batch: distance(activations(model, batch, layer), target, batch)

    def retain_loss(self, task: Task) -> SampleLoss:
        layer, _ = self._layer_of(task.model)
        if task.original is None:
            raise UserError("rmu compares with the activations of the original model; give original")
        original = task.original()
        return lambda model, batch: distance(activations(model, batch, layer), original(batch, layer), batch)

    def _layer_of(self, model: nn.Module) -> tuple[int, int]:
        """The steered layer, and how wide it is."""
        config: Any = model.config
        n, width = config.num_hidden_layers, config.hidden_size
        if self.layer is not None and self.layer > n:
            raise UserError(f"layer must be in 1..{n} for this model, got {self.layer}")
        return self.layer or max(1, round(DEPTH * n)), width


def activations(model: nn.Module, batch: TextBatch, layer: int) -> Tensor:
    """The output (B, T, D) of a layer, counted from 1, in at least float32."""
    found = forward(model, batch, output_hidden_states=True).hidden_states[layer]
    return found.to(torch.promote_types(found.dtype, torch.float32))


def distance(here: Tensor, there: Tensor, batch: TextBatch) -> Tensor:
    """The mean squared difference (B,) over the tokens and the channels of each text."""
    of_tokens = (here - there).square().mean(2) * batch.mask
    return of_tokens.sum(1) / batch.mask.sum(1)
