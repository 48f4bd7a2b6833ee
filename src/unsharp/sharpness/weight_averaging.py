"""Weight averaging: end with the mean of the weights through which the last part of the run went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unsharp.errors import UserError
from unsharp.sharpness.base import RULES, Gradients, Rule
from unsharp.sharpness.correction import check_count
from unsharp.sharpness.point import Point

MEAN, N_AVERAGED, N_LATE = "mean", "n_averaged", "n_late"


@RULES.register("weight_averaging")
@dataclass(frozen=True, kw_only=True)
class WeightAveraging(Rule):
    """Weight averaging: plain steps, and at the end the mean of late weights, which lies flatter than the last ones.

    It has no sign: where a method raises sharpness, as in the forget phase of Sharp MinMax, it averages all the same.

    Args:
        start: Share in [0, 1] of the run after which averaging starts; 1 averages nothing and is rule `none`.
        interval: Of the steps after the start, the first is averaged, and then every so many.
    """

    source: ClassVar[str] = (
        "Izmailov et al., UAI 2018 (arXiv 1803.05407); for unlearning: Fan et al., ICML 2025 (arXiv 2502.05374)"
    )
    formula: ClassVar[str] = "g = ∇L(w);  at the end w = mean of w_t over every interval-th step t after the start"
    strengths: ClassVar[tuple[str, ...]] = ()
    perturbs_by_another: ClassVar[bool] = False

    start: float = 0.75
    interval: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1:
            raise UserError(f"start must be a share of the run in [0, 1], got {self.start!r}")
        check_count("interval", self.interval)

    @property
    def passes(self) -> float:
        return 1

    def gradient(self, point: Point) -> Gradients:
        return point.gradient()

    def turned(self) -> Rule:
        return self

    @torch.no_grad()
    def after_step(self, weights: Sequence[Tensor], memory: dict[str, Any], done: float) -> None:
        if done <= self.start:
            return
        late: int = memory.get(N_LATE, 0)
        memory[N_LATE] = late + 1
        if late % self.interval:
            return
        n: int = memory.get(N_AVERAGED, 0) + 1
        memory[N_AVERAGED] = n
        now = [w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True) for w in weights]
        before: list[Tensor] | None = memory.get(MEAN)
        memory[MEAN] = now if before is None else list(torch._foreach_lerp(before, now, 1 / n))

    def final_weights(self, memory: Mapping[str, Any]) -> list[Tensor] | None:
        return memory.get(MEAN)
