"""SalUn: random labels, with only the weights moving on which the forget set bears most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from unsharp.methods.base import METHODS, Problem
from unsharp.methods.masked import ByMask
from unsharp.methods.random_label import RandomLabel
from unsharp.phases import Region


@METHODS.register("salun")
@dataclass(frozen=True, kw_only=True)
class SalUn(ByMask, RandomLabel):
    """Random labels on the weights that are most salient for the forget set; all other weights stand still.

    Args:
        fraction: Share of the weights in (0, 1] that move.
        select: Which weights move: a selection (`unsharp list selections`), such as largest, the largest forget
            gradients; or "all": every weight, which is random_label.
    """

    source: ClassVar[str] = "Fan et al., ICLR 2024 (SalUn, arXiv 2310.12508)"
    formula: ClassVar[str] = (
        "L = α·mean over retain of CE + (1−α)·mean over forget of CE(random label);  "
        "on the weights with the largest |Σ over forget of ∇CE|"
    )
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"fraction": (0.1, 0.3, 0.5, 0.7, 0.9)}

    fraction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_mask()

    def preparation_passes(self, problem: Problem, batch_size: int) -> int:
        return self._mask_passes(problem, batch_size)

    def _region(self, problem: Problem) -> Region | None:
        return self._mask(problem)
