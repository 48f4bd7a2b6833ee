"""What becomes of samples while a network learns: the counts that several proxies read."""

from __future__ import annotations

import torch
from torch import nn

from unsharp.difficulty.proxies.base import FORWARD, Task
from unsharp.difficulty.proxies.networks import Arrays, Watch, WatchedProxy, n_batches, true_class


class Dynamics(Watch):
    """Counts, after each epoch and without augmentation, which samples the network gets right.

    Its result has a score for each of `forgetting_events`, `learning_epoch` and `mean_confidence`.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__(task, model)
        n = len(task.samples)
        zeros = torch.zeros(n, dtype=torch.int64)
        self.sums = {
            "right": zeros.bool(),
            "ever": zeros.bool(),
            "forgotten": zeros,
            "last_wrong": zeros.clone(),
            "confidence": torch.zeros(n, dtype=torch.float64),
        }

    def look(self) -> None:
        right, p, _ = (t.cpu() for t in true_class(self.model, self.task))
        sums = self.sums
        sums["forgotten"] = sums["forgotten"] + (sums["right"] & ~right)
        sums["ever"] = sums["ever"] | right
        sums["last_wrong"] = torch.where(right, sums["last_wrong"], self.epoch)
        sums["confidence"] = sums["confidence"] + p
        sums["right"] = right
        self.passes += FORWARD * n_batches(self.task)

    def result(self) -> Arrays:
        sums, epochs = self.sums, self.epoch
        # More than half of the evaluations cannot be events, so this is above any count.
        events = torch.where(sums["ever"], sums["forgotten"], epochs)
        return {
            "forgetting_events": events.double().numpy(),
            "learning_epoch": (sums["last_wrong"] + 1).double().numpy(),
            "mean_confidence": (sums["confidence"] / epochs).numpy(),
        }


class DynamicsProxy(WatchedProxy):
    """A proxy that reads one of these counts; the others come with it."""

    needs = "recipe"

    def watch(self, task: Task, model: nn.Module) -> Watch:
        return Dynamics(task, model)
