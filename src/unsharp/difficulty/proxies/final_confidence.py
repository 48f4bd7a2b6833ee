"""What a trained network lacks in confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.difficulty.proxies.base import FORWARD, PROXIES, Cost, Measured, Needs, Proxy, Task
from unsharp.difficulty.proxies.networks import n_batches, true_class
from unsharp.training import TrainConfig


@PROXIES.register("final_confidence")
@dataclass(frozen=True, kw_only=True)
class FinalConfidence(Proxy):
    """What the given network lacks in confidence: one minus the probability of the true class."""

    title: ClassVar[str] = "confidence gap"
    source: ClassVar[str] = "the loss of the trained network on a scale of probabilities"
    formula: ClassVar[str] = "1 − p(y | x)"
    unit_scale: ClassVar[bool] = True
    needs: ClassVar[Needs] = "model"

    def cost(self, train: TrainConfig | None) -> Cost:
        return Cost(0, FORWARD)

    def measure(self, task: Task) -> Measured:
        assert task.model is not None
        _, _, rest = true_class(task.model, task)
        return Measured(raw=rest.cpu().numpy(), passes=round(FORWARD * n_batches(task)))
