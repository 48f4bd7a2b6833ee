"""SalUn: random labels, with only the weights moving on which the forget set bears most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from unsharp import masks
from unsharp.errors import unknown
from unsharp.methods.base import METHODS, Problem, check_fraction
from unsharp.methods.random_label import RandomLabel
from unsharp.phases import Region


@METHODS.register("salun")
@dataclass(frozen=True, kw_only=True)
class SalUn(RandomLabel):
    """Random labels on the weights that are most salient for the forget set; all other weights stand still.

    Args:
        fraction: Share of the weights in (0, 1] that move.
        select: Which weights move: those with the largest forget gradient, the smallest, random ones; or "all": every
            weight, which is random_label.
        per_layer: Take the fraction within each tensor rather than over all.
    """

    source: ClassVar[str] = "Fan et al., ICLR 2024 (SalUn, arXiv 2310.12508)"
    formula: ClassVar[str] = (
        "L = α·mean over retain of CE + (1−α)·mean over forget of CE(random label);  "
        "on the weights with the largest |Σ over forget of ∇CE|"
    )
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"fraction": (0.1, 0.3, 0.5, 0.7, 0.9)}

    fraction: float = 0.5
    select: Literal["largest", "smallest", "random", "all"] = "largest"
    per_layer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("fraction", self.fraction, open_low=True)
        if self.select not in (*masks.SELECTS, "all"):
            raise unknown("select", self.select, (*masks.SELECTS, "all"))

    def preparation_passes(self, problem: Problem, batch_size: int) -> int:
        return 0 if self.select in ("random", "all") else -(-len(problem.forget) // batch_size)

    def _region(self, problem: Problem) -> Region | None:
        return None if self.select == "all" else problem.kept_mask(lambda: self._mask(problem))

    def _mask(self, problem: Problem) -> masks.Mask:
        if self.select == "all":
            raise ValueError("no mask is made where all weights move")
        return masks.saliency_mask(
            problem.model,
            problem.samples,
            problem.forget,
            fraction=self.fraction,
            select=self.select,
            per_layer=self.per_layer,
            seed=problem.seed,
        )
