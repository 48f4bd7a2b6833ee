"""Influence unlearning: one step to where the minimum would be without the forget samples."""

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
from unsharp.errors import NonFiniteError, UserError
from unsharp.gradients import (
    SampleGradients,
    blocks_to_compute,
    groups_of,
    inverse_fisher_product,
    mean_gradient,
    unflattened,
)
from unsharp.methods.base import METHODS, AppliedMethod, Problem

if TYPE_CHECKING:
    from unsharp.training import Record


@METHODS.register("influence")
@dataclass(frozen=True, kw_only=True)
class Influence(AppliedMethod):
    """One Newton step from the minimum on all samples towards that on the retained ones; no training.

    With n samples in all, n_F of them to be forgotten, and ∇L_F, ∇L_R the mean gradients, the gradient of the mean loss
    changes by v = ∇L_D − ∇L_R = (n_F/n)·(∇L_F − ∇L_R) when the forget samples go. The step is +strength·H⁻¹·v, with the
    empirical Fisher matrix of retained samples in the place of the Hessian; at a minimum on all samples (∇L_D = 0) and
    with strength 1 it is Newton's step on L_R.

    Args:
        strength: Multiple of the step, above 0.
        damping: δ > 0, added to the diagonal of the Fisher matrix; published code has 1.
        fisher_samples: Retained samples, drawn with the seed, from which the Fisher matrix is estimated; at least 1.
        fisher_batch: Samples whose mean gradient is one term of the estimate, at least 1.
    """

    source: ClassVar[str] = (
        "Koh & Liang, ICML 2017 (arXiv 1703.04730); Izzo et al., AISTATS 2021 (arXiv 2002.10077); as IU of Jia et al., "
        "NeurIPS 2023 (arXiv 2304.04934), with the matrix of WoodFisher (arXiv 2004.14340)"
    )
    formula: ClassVar[str] = (
        "H = δ·I + mean over retained samples of ∇ℓ·∇ℓᵀ;  w ← w + strength·(n_F/n)·H⁻¹·(∇L_F − ∇L_R)"
    )
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "strength": (0.3, 1.0, 3.0, 10.0, 30.0),
        "damping": (1e-3, 1e-2, 1e-1, 1.0),
    }

    strength: float = 1.0
    damping: float = 1.0
    fisher_samples: int = 1000
    fisher_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("strength", "damping"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a finite number above 0, got {value}")
        for name in ("fisher_samples", "fisher_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def admits(cls, rule: str) -> tuple[bool, str]:
        return rule == "none", "it takes one step by a formula, which no rule changes"

    def apply(self, problem: Problem) -> tuple[nn.Module, Record]:
        from unsharp.training import Record

        started = time.monotonic()
        with runtime.PeakMemory(runtime.device_of(problem.model)) as memory:
            network = copy.deepcopy(problem.model).eval()
            drawn = np.random.default_rng(problem.seed).permutation(problem.retain)[: self.fisher_samples]
            groups = groups_of(np.sort(drawn), self.fisher_batch, problem.seed)
            rows = SampleGradients(network, problem.samples, groups, most=problem.batch_size)
            n_batches = sum(math.ceil(len(part) / problem.batch_size) for part in (problem.forget, problem.retain))
            problem.progress.start("influence", n_batches + blocks_to_compute(len(rows.blocks())))
            try:
                step = self.strength * inverse_fisher_product(
                    rows, self._change(problem, network), self.damping, progress=problem.progress
                )
            finally:
                problem.progress.finish()
            if not bool(step.isfinite().all()):
                raise NonFiniteError("the step is not finite; take more damping, or less strength")
            with torch.no_grad():
                params = list(rows.params.values())
                for p, s in zip(params, unflattened(step, params)):
                    p += s
        seconds = time.monotonic() - started
        passes = n_batches + math.ceil(rows.taken / problem.batch_size)
        row = {"epoch": 1, "step_norm": float(step.norm()), "seconds": seconds, "passes": passes}
        return network, Record(history=[row], seconds=seconds, passes=passes, peak_memory_bytes=memory.bytes)

    def _change(self, problem: Problem, network: nn.Module) -> Tensor:
        """v = (n_F/n)·(∇L_F − ∇L_R), flat."""
        means = [
            mean_gradient(
                network, problem.samples, part, batch_size=problem.batch_size, progress=problem.progress
            ).double()
            for part in (problem.forget, problem.retain)
        ]
        n_retained = len(problem.retain) if problem.n_retained is None else problem.n_retained
        return len(problem.forget) / (len(problem.forget) + n_retained) * (means[0] - means[1])
