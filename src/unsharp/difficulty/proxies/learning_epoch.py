"""The epoch from which on a sample is right for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.difficulty.proxies.base import PROXIES
from unsharp.difficulty.proxies.dynamics import DynamicsProxy


@PROXIES.register("learning_epoch")
@dataclass(frozen=True, kw_only=True)
class LearningEpoch(DynamicsProxy):
    """The epoch from which on a sample is right after every epoch."""

    title: ClassVar[str] = "learning epoch"
    source: ClassVar[str] = "a statistic of the evaluations of Toneva et al., ICLR 2019 (arXiv 1812.05159)"
    formula: ClassVar[str] = "1 + the last epoch after which the sample is wrong"
