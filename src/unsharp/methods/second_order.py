"""The second-order update: Newton's step from samples as they were to those that should be, or to none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.errors import UserError, unknown
from unsharp.methods.base import METHODS, Problem
from unsharp.methods.closed_form import ClosedForm, Step

MATRICES = ("hessian", "ggn")


@METHODS.register("second_order")
@dataclass(frozen=True, kw_only=True)
class SecondOrder(ClosedForm):
    """Newton's step from wrong samples to right ones or, without corrections, one that takes the samples back.

    Args:
        strength: Multiple of the step, above 0.
        damping: δ > 0, added to the diagonal of the matrix; a weight decay of the training belongs here too.
        matrix: "hessian", as the paper has it, or "ggn": its Gauss–Newton part, with which the step is defined whatever
            the network.
        hessian_samples: Training samples, drawn with the seed, whose mean loss gives the matrix, at least 1.
        cg_steps: Most products with the matrix in a solution by conjugate gradients, at least 1.
        cg_tolerance: Residual, relative to v, at which a solution ends, above 0.
    """

    formula: ClassVar[str] = (
        "v = Σ over forget of ∇ℓ(corrected) − ∇ℓ(as it was);  H = δ·I + ∇² of the mean training loss;  "
        "w ← w − (strength/n)·H⁻¹·v within the chosen weights"
    )
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "strength": (0.3, 1.0, 3.0, 10.0),
        "damping": (1e-3, 1e-2, 1e-1, 1.0),
    }

    strength: float = 1.0
    damping: float = 0.1
    matrix: Literal["hessian", "ggn"] = "ggn"
    hessian_samples: int = 1000
    cg_steps: int = 50
    cg_tolerance: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strength", "damping", "cg_tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a finite number above 0, got {value}")
        for name in ("hessian_samples", "cg_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.matrix not in MATRICES:
            raise unknown("matrix", self.matrix, MATRICES)

    def _products(self) -> int:
        return self.cg_steps

    def _step(self, problem: Problem, network: nn.Module, v: Tensor, chosen: Tensor | None) -> Step:
        from unsharp.evaluation.curvature import CurvatureMatrix
        from unsharp.evaluation.mean_loss import MeanLoss, subsample

        training = np.union1d(problem.retain, problem.forget)
        drawn = subsample(training, self.hessian_samples, problem.seed)
        around = MeanLoss(network, problem.samples, drawn, batch_size=problem.batch_size)
        curved = CurvatureMatrix(around, self.matrix)

        def product(vector: Tensor) -> Tensor:
            found = (curved @ vector.to(curved.dtype)).double()
            problem.progress.advance()
            return self.damping * vector + (found if chosen is None else torch.where(chosen, found, 0.0))

        solved = conjugate_gradients(product, v, self.cg_tolerance, self.cg_steps)
        if solved.lowest <= 0:
            raise UserError(
                f"the Hessian with damping {self.damping:g} is not positive definite: along a direction it is "
                f"{solved.lowest:.3g}; take more damping, or matrix ggn"
            )
        n_retained = len(problem.retain) if problem.n_retained is None else problem.n_retained
        change = -self.strength / (len(problem.forget) + n_retained) * solved.solution
        # a product is a pass, and the graph on which it is taken another
        passes = 2 * solved.products * len(around.batches)
        return Step(change, passes, {"cg_residual": solved.residual, "cg_steps": solved.products})


@dataclass(frozen=True)
class Solved:
    """A solution of A·x = b.

    Args:
        solution: x, as far as it was found.
        residual: ‖b − A·x‖/‖b‖, as the recursion carries it.
        lowest: Smallest pᵀAp/pᵀp of the directions p that were taken; where it is not above 0, A is not positive
            definite, and x is what it was before that direction.
        products: Products with A that it took.
    """

    solution: Tensor
    residual: float
    lowest: float
    products: int


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, tolerance: float, most: int) -> Solved:
    """Solve A·x = b for a symmetric positive definite A that is known by its products.

    Args:
        product: From a vector to A times it, in float64.
        b: (P,) float64.
        tolerance: Residual, relative to b, at which to end, > 0.
        most: Most products, at least 1.

    Source: Hestenes & Stiefel 1952.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, square, lowest = r.clone(), float(r @ r), math.inf
    start, products = square, 0
    while products < most and square > tolerance**2 * start:
        q = product(p)
        products += 1
        along = float(p @ q)
        lowest = min(lowest, along / float(p @ p))
        if not lowest > 0:
            break
        x += square / along * p
        r -= square / along * q
        former, square = square, float(r @ r)
        p = r + square / former * p
    return Solved(x, math.sqrt(square / start) if start else 0.0, lowest, products)
