"""EL2N: the length of the error vector early in training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from unsharp.difficulty.proxies.base import FORWARD, PROXIES, Task
from unsharp.difficulty.proxies.networks import PointProxy, check_early, early_epoch, logits_of


@PROXIES.register("el2n")
@dataclass(frozen=True, kw_only=True)
class EL2N(PointProxy):
    """The length of the error vector early in training, averaged over networks.

    Args:
        networks: Networks that are trained, each from other weights and in another order, at least 1; their scores are
            averaged. The paper takes 10.
        early: Fraction of the recipe's epochs, in (0, 1], after which the samples are scored and training ends. The
            paper's 20 epochs of 200 are a tenth.
    """

    title: ClassVar[str] = "EL2N score"
    source: ClassVar[str] = "Paul, Ganguli & Dziugaite, NeurIPS 2021 (arXiv 2107.07075)"
    formula: ClassVar[str] = "mean over networks of ‖p(· | x) − onehot(y)‖₂"

    networks: int = 10
    early: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_early(self.early)

    def moments(self, epochs: int) -> Collection[int]:
        return [early_epoch(self.early, epochs)]

    def passes_each(self) -> float:
        return FORWARD

    def score(self, model: nn.Module, task: Task, epoch: int) -> Tensor:
        found = []
        for logits, labels in logits_of(model, task):
            error = logits.softmax(1) - nn.functional.one_hot(labels, logits.shape[1])
            found.append(error.norm(dim=1))
        return torch.cat(found)
