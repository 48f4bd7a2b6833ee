"""Direct preference optimisation: another answer is preferred to the forgotten one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from unsharp.language.likelihood import Reduction, answer_losses
from unsharp.language.objectives.base import (
    OBJECTIVES,
    LanguageObjective,
    SampleLoss,
    Task,
    at,
    check_positive,
    check_reduction,
    negative_log_sigmoid,
    preferred_batch,
)
from unsharp.language.samples import TextBatch


@OBJECTIVES.register("dpo")
@dataclass(frozen=True, kw_only=True)
class Preference(LanguageObjective):
    """Direct preference optimisation (DPO): an answer that the data give is preferred to the forgotten one.

    It is scaled by 2/β as NPO is, which is this loss without the preferred answer.

    Args:
        beta: Inverse temperature β > 0.
        reduction: NLL of an answer is the "sum" or the "mean" of its tokens'.
    """

    source: ClassVar[str] = "Rafailov et al., NeurIPS 2023 (arXiv 2305.18290); scaled as in Zhang et al., COLM 2024"
    formula: ClassVar[str] = (
        "d(y) = NLL_before(y) − NLL_θ(y);  "
        "L = mean over samples of −(2/β)·log σ(β·(d(preferred) − d(forget))) + γ·NLL(retain)"
    )
    prefers: ClassVar[str] = "given"

    beta: float = 0.1
    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_reduction(self.reduction)

    def forget_loss(self, task: Task) -> SampleLoss:
        texts = task.preferred_samples()
        lost, won = task.reference(self.reduction), task.reference(self.reduction, preferred=True)

        def loss(model: nn.Module, batch: TextBatch) -> Tensor:
            gained = at(won, batch) - answer_losses(model, preferred_batch(texts, batch), self.reduction)
            kept = at(lost, batch) - answer_losses(model, batch, self.reduction)
            return negative_log_sigmoid(self.beta * (gained - kept)) * (2 / self.beta)

        return loss


@OBJECTIVES.register("idk_dpo")
@dataclass(frozen=True, kw_only=True)
class RefusalPreference(Preference):
    """IdkDPO: a refusal ("I don't know") is preferred to the forgotten answer."""

    source: ClassVar[str] = "Maini et al. (TOFU), COLM 2024 (arXiv 2401.06121); the loss as in DPO"
    prefers: ClassVar[str] = "refusal"
