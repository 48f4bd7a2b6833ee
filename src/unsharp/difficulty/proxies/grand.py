"""GraNd: the length of a sample's gradient early in training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from unsharp.difficulty.proxies.base import PROXIES, Task
from unsharp.difficulty.proxies.networks import PointProxy, check_early, early_epoch
from unsharp.gradients import SampleGradients, groups_of


@PROXIES.register("grand")
@dataclass(frozen=True, kw_only=True)
class GraNd(PointProxy):
    """The length of a sample's gradient by all trainable weights early in training, averaged over networks.

    Args:
        networks: Networks that are trained, each from other weights and in another order, at least 1; their scores are
            averaged. The paper takes 10.
        early: Fraction of the recipe's epochs, in (0, 1], after which the samples are scored and training ends.
    """

    title: ClassVar[str] = "GraNd score"
    source: ClassVar[str] = "Paul, Ganguli & Dziugaite, NeurIPS 2021 (arXiv 2107.07075)"
    formula: ClassVar[str] = "mean over networks of ‖∇_w CE(x, y; w)‖₂"

    networks: int = 10
    early: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_early(self.early)

    def moments(self, epochs: int) -> Collection[int]:
        return [early_epoch(self.early, epochs)]

    def passes_each(self) -> float:
        return 1.0

    def score(self, model: nn.Module, task: Task, epoch: int) -> Tensor:
        rows = SampleGradients(model, task.samples, groups_of(task.indices, 1, 0), most=task.batch_size)
        found = []
        for batch in rows.batches():
            squares = [g.flatten(1).double().square().sum(1) for g in rows.tensors(batch)]
            found.append(torch.stack(squares).sum(0).sqrt())
        return torch.cat(found)
