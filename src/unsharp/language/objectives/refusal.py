"""Refusal tuning: learn to answer the forgotten prompts with a refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.language.likelihood import answer_losses
from unsharp.language.objectives.base import OBJECTIVES, LanguageObjective, SampleLoss, Task, preferred_batch


@OBJECTIVES.register("refusal")
@dataclass(frozen=True, kw_only=True)
class RefusalTuning(LanguageObjective):
    """Refusal tuning: the model learns to refuse the forgotten prompts, as it would learn any answer."""

    source: ClassVar[str] = "Maini et al. (TOFU), COLM 2024 (arXiv 2401.06121)"
    formula: ClassVar[str] = "L = NLL(refusal | forgotten prompt) + γ·NLL(retain)"
    prefers: ClassVar[str] = "refusal"

    def forget_loss(self, task: Task) -> SampleLoss:
        texts = task.preferred_samples()
        return lambda model, batch: answer_losses(model, preferred_batch(texts, batch), "mean")
