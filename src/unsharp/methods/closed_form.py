"""What the closed-form updates share: a step, by a formula, from samples as they were to samples as they should be."""

from __future__ import annotations

import copy
import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.errors import NonFiniteError, UserError
from unsharp.gradients import mean_gradient, unflattened
from unsharp.methods.base import AppliedMethod, Problem
from unsharp.methods.masked import ALL, ByMask

if TYPE_CHECKING:
    from unsharp.training import Record

SOURCE = (
    "Warnecke et al., NDSS 2023 (Machine Unlearning of Features and Labels), from notes on its published code; "
    "on a part of the weights: Malekmohammadi, Lee & Xiong 2025 (arXiv 2504.06398), from its abstract"
)


@dataclass(frozen=True)
class Step:
    """A step in the chosen weights.

    Args:
        change: (number of trainable weights,) float64, what is added; 0 outside the mask.
        passes: Passes over batches that finding it took.
        about: Figures for the history.
    """

    change: Tensor
    passes: int = 0
    about: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ClosedForm(ByMask, AppliedMethod):
    """A step along v = Σ over the forget samples of ∇ℓ(as it should be) − ∇ℓ(as it was), in the chosen weights.

    Without corrections the first term is missing, and the samples are removed.

    Args:
        steps: How often the step is taken, each from where the last one ended, at least 1; 1 is the closed form.
        select: Which weights move: "all", or a selection (`unsharp list selections`) such as hessian, of which
            `fraction` is the share.
    """

    source: ClassVar[str] = SOURCE
    corrects: ClassVar[bool] = True

    steps: int = 1
    fraction: float = 0.05
    select: str = ALL

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")
        self._check_mask()

    @classmethod
    def admits(cls, rule: str) -> tuple[bool, str]:
        return rule == "none", "it takes a step by a formula, which no rule changes"

    @abstractmethod
    def _step(self, problem: Problem, network: nn.Module, v: Tensor, chosen: Tensor | None) -> Step:
        """The step.

        Args:
            problem: What is to be solved.
            network: As it is before the step.
            v: (number of trainable weights,) float64, 0 outside the chosen weights.
            chosen: (number of trainable weights,) bool; None for all.
        """

    @abstractmethod
    def _products(self) -> int:
        """Units of progress of a step beside the batches of the gradients."""

    def apply(self, problem: Problem) -> tuple[nn.Module, Record]:
        from unsharp.training import Record

        started, history = time.monotonic(), []
        passes = self._mask_passes(problem, problem.batch_size)
        with runtime.PeakMemory(runtime.device_of(problem.model)) as memory:
            network = copy.deepcopy(problem.model).eval()
            mask = self._mask(problem)
            chosen = None if mask is None else torch.cat([m.flatten() for m in mask.values()])
            problem.progress.start("closed form", self.steps * (self._batches(problem) + self._products()))
            try:
                for step in range(self.steps):
                    row, took = self._take(problem, network, chosen)
                    passes += took
                    history.append({"epoch": step + 1, **row, "seconds": time.monotonic() - started, "passes": passes})
            finally:
                problem.progress.finish()
        seconds = time.monotonic() - started
        return network, Record(history=history, seconds=seconds, passes=passes, peak_memory_bytes=memory.bytes)

    def _take(self, problem: Problem, network: nn.Module, chosen: Tensor | None) -> tuple[dict[str, float], int]:
        """Take a step in place; its figures, and the passes that it took."""
        v = self._difference(problem, network)
        whole = float(v @ v)
        if chosen is not None:
            v = torch.where(chosen, v, 0.0)
        step = self._step(problem, network, v, chosen)
        if not bool(step.change.isfinite().all()):
            raise NonFiniteError("the step is not finite; take more damping, or a smaller tau or strength")
        params = [p for p in network.parameters() if p.requires_grad]
        places = [None] * len(params) if chosen is None else chosen.split([p.numel() for p in params])
        with torch.no_grad():
            for p, s, at in zip(params, unflattened(step.change, params), places):
                moved = p + s
                p.copy_(moved if at is None else torch.where(at.view(p.shape), moved, p))  # not even -0.0 may change
        share = float(v @ v) / whole if whole else 0.0
        row = {"step_norm": float(step.change.norm()), "gradient_share": share, **(step.about or {})}
        return row, self._batches(problem) + step.passes

    def _batches(self, problem: Problem) -> int:
        return (1 if problem.corrected is None else 2) * math.ceil(len(problem.forget) / problem.batch_size)

    def _difference(self, problem: Problem, network: nn.Module) -> Tensor:
        """v, flat."""
        how: dict[str, Any] = {"batch_size": problem.batch_size, "progress": problem.progress}
        n = len(problem.forget)
        v = -n * mean_gradient(network, problem.samples, problem.forget, **how).double()
        if problem.corrected is not None:
            v += n * mean_gradient(network, problem.corrected, np.arange(n), **how).double()
        return v
