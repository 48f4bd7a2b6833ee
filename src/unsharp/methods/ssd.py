"""SSD: dampen the weights that matter far more for the forget samples than for the training data."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.errors import UserError
from unsharp.gradients import SampleGradients, groups_of, importances
from unsharp.methods.base import METHODS, AppliedMethod, Problem

if TYPE_CHECKING:
    from unsharp.training import Record


@METHODS.register("ssd")
@dataclass(frozen=True, kw_only=True)
class SelectiveSynapticDampening(AppliedMethod):
    """Shrink the weights whose importance for the forget set is many times that for the training data; no training.

    Args:
        selection_weight: A weight is selected where its importance for the forget set is more than so many times that
            for the training data (α of the paper), above 0.
        dampening: The selected weight is multiplied by min(dampening·I_D/I_F, 1) (λ of the paper), at least 0.
        fisher_batch: Samples whose mean gradient is squared, at least 1. 1 gives the diagonal of the Fisher matrix, as
            the formula has it; published code squares the gradients of batches.
    """

    source: ClassVar[str] = "Foster, Schoepf & Brintrup, AAAI 2024 (arXiv 2308.07707)"
    formula: ClassVar[str] = (
        "I = mean over samples of (∂CE/∂w)², on D (retain and forget) and on F (forget);  "
        "w ← min(dampening·I_D/I_F, 1)·w where I_F > selection_weight·I_D"
    )
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "selection_weight": (1.5, 2.0, 3.0, 5.0, 8.0),
        "dampening": (0.3, 1.0, 3.0, 10.0),
    }
    draws: ClassVar[bool] = False

    selection_weight: float = 10.0
    dampening: float = 1.0
    fisher_batch: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.selection_weight) and self.selection_weight > 0):
            raise UserError(f"selection_weight must be a finite number above 0, got {self.selection_weight}")
        if not (math.isfinite(self.dampening) and self.dampening >= 0):
            raise UserError(f"dampening must be a finite number of at least 0, got {self.dampening}")
        if self.fisher_batch < 1:
            raise UserError(f"fisher_batch must be at least 1, got {self.fisher_batch}")

    @classmethod
    def admits(cls, rule: str) -> tuple[bool, str]:
        return rule == "none", "it takes no step that a rule could change"

    def apply(self, problem: Problem) -> tuple[nn.Module, Record]:
        from unsharp.training import Record

        share = self._forget_share(problem)
        started = time.monotonic()
        with runtime.PeakMemory(runtime.device_of(problem.model)) as memory:
            network = copy.deepcopy(problem.model).eval()
            forget = self._rows(problem, network, problem.forget)
            other = problem.retain if self.fisher_batch == 1 else np.union1d(problem.retain, problem.forget)
            rows = self._rows(problem, network, other)
            problem.progress.start("importances", len(forget.batches()) + len(rows.batches()))
            try:
                for_forget = importances(forget, progress=problem.progress)
                for_all = importances(rows, progress=problem.progress)
            finally:
                problem.progress.finish()
            if self.fisher_batch == 1:  # the mean over D, without a second pass over the forget set
                for_all = {n: share * for_forget[n] + (1 - share) * i for n, i in for_all.items()}
            n_dampened = self._dampen(forget.params, for_forget, for_all)
        seconds = time.monotonic() - started
        passes = math.ceil(forget.taken / problem.batch_size) + math.ceil(rows.taken / problem.batch_size)
        row = {"epoch": 1, "dampened": n_dampened / forget.length, "seconds": seconds, "passes": passes}
        return network, Record(history=[row], seconds=seconds, passes=passes, peak_memory_bytes=memory.bytes)

    def _forget_share(self, problem: Problem) -> float:
        """The share of the forget set in the training data. Raises: UserError where no weight could be selected."""
        n_retained = len(problem.retain) if problem.n_retained is None else problem.n_retained
        share = len(problem.forget) / (len(problem.forget) + n_retained)
        if self.fisher_batch == 1 and self.selection_weight * share >= 1:
            raise UserError(
                f"selection_weight {self.selection_weight:g} selects no weight: the forget set is {share:.3g} of the "
                f"training data, so that no weight matters more than {1 / share:.3g} times as much for it; take less"
            )
        return share

    def _rows(self, problem: Problem, network: nn.Module, indices: np.ndarray) -> SampleGradients:
        groups = groups_of(indices, self.fisher_batch, problem.seed)
        return SampleGradients(network, problem.samples, groups, most=problem.batch_size)

    @torch.no_grad()
    def _dampen(
        self, params: Mapping[str, Tensor], for_forget: Mapping[str, Tensor], for_all: Mapping[str, Tensor]
    ) -> int:
        """Multiply the selected weights, in place; their number."""
        n_selected = 0
        for name, p in params.items():
            selected = for_forget[name] > self.selection_weight * for_all[name]
            factor = (self.dampening * for_all[name] / for_forget[name]).clamp_(max=1)
            p.copy_(torch.where(selected, p * factor.to(p.dtype), p))
            n_selected += int(selected.count_nonzero())
        return n_selected
