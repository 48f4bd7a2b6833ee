"""How a network changes its mind about its training samples when it is tuned on others."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.artifacts import Workspace
from unsharp.difficulty.proxies.base import FORWARD, PROXIES, Cost, Measured, Needs, Proxy, Task
from unsharp.difficulty.proxies.networks import PASSES, Arrays, kept, logits_of, n_batches
from unsharp.engine import OptimizerConfig
from unsharp.errors import NonFiniteError, UserError
from unsharp.training import TrainConfig, train

BATCH = 128


@PROXIES.register("holdout_retraining")
@dataclass(frozen=True, kw_only=True)
class HoldoutRetraining(Proxy):
    """How far the given network's answer on a sample moves while a copy of it is tuned on samples it has not seen.

    Args:
        tuning_passes: How long it is tuned, > 0, in passes over as many samples as it was trained on; rounded to whole
            epochs of the unseen samples, at least one.
        tuning_lr: Learning rate > 0 of the tuning, by SGD, falling to 0 along a cosine.
    """

    title: ClassVar[str] = "change under holdout retraining"
    source: ClassVar[str] = "Carlini, Erlingsson & Papernot, 2019 (arXiv 1910.13427); for unlearning arXiv 2410.16516"
    formula: ClassVar[str] = "KL(p ‖ p′) + KL(p′ ‖ p);  p before, p′ after tuning on unseen samples"
    needs: ClassVar[Needs] = "model"

    tuning_passes: float = 1.0
    tuning_lr: float = 0.01

    def __post_init__(self) -> None:
        for name in ("tuning_passes", "tuning_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a finite number above 0, got {value}")

    def check(self, task: Task) -> None:
        if task.held_out is None or len(task.held_out) == 0:
            raise UserError("holdout_retraining tunes the network on samples that it has not seen; give test samples")

    def cost(self, train: TrainConfig | None) -> Cost:
        return Cost(0, self.tuning_passes + 2 * FORWARD)

    def measure(self, task: Task) -> Measured:
        found = kept(task, "tuned", lambda place: self._tuned(task, place))
        return Measured(raw=found["score"], passes=int(found[PASSES]))

    def how(self, task: Task) -> TrainConfig:
        """How the copy is tuned."""
        assert task.held_out is not None  # by check()
        epochs = max(1, round(self.tuning_passes * len(task.samples) / len(task.held_out)))
        size = min(BATCH, len(task.held_out))
        return TrainConfig(epochs=epochs, batch_size=size, optimizer=OptimizerConfig(lr=self.tuning_lr), seed=task.seed)

    def _tuned(self, task: Task, place: Workspace | None) -> Arrays:
        assert task.model is not None and task.held_out is not None  # noqa: PT018
        before, tuned, how = _log_p(task.model, task), copy.deepcopy(task.model), self.how(task)
        record = train(
            tuned,
            task.held_out,
            np.arange(len(task.held_out)),
            how,
            workspace=place,
            save_seconds=task.save_seconds,
            progress=task.progress,
            label="tuning on unseen samples",
        )
        after = _log_p(tuned, task)
        score = ((before.exp() - after.exp()) * (before - after)).sum(1)
        passes = record.passes + round(2 * FORWARD * n_batches(task))
        return {"score": score.cpu().numpy(), PASSES: np.array(passes)}


def _log_p(model: nn.Module, task: Task) -> Tensor:
    """(n, K) float64 log-probabilities, on the device. Raises: NonFiniteError if a logit is NaN or infinite."""
    found = torch.cat([logits.log_softmax(1) for logits, _ in logits_of(model, task)])
    if not bool(found.isfinite().all()):
        raise NonFiniteError("the network's logits are NaN or infinite; its weights or the inputs are broken")
    return found
