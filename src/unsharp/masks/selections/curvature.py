"""By the diagonal of the Hessian or its Gauss–Newton part: where a small move changes the loss most."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from unsharp.masks.base import SELECTIONS, Basis, Choice, ScoredSelection
from unsharp.masks.entries import Mask, refuse_non_finite, trainable


class Diagonal(ScoredSelection):
    """The largest entries of the diagonal of a matrix of second derivatives, estimated by random signs.

    Args:
        matrix: "hessian" or "ggn".
        absolute: Whether an entry counts by its absolute value.
    """

    reads = "training"
    capped = True

    def __init__(self, matrix: Any, *, absolute: bool = False) -> None:
        self.matrix, self.absolute = matrix, absolute

    def scores(self, basis: Basis, indices: np.ndarray, choice: Choice) -> Mask:
        from unsharp.evaluation.curvature import CurvatureMatrix, diagonal
        from unsharp.evaluation.mean_loss import MeanLoss

        trainable(basis.model)
        make = basis.mean_loss or MeanLoss
        around = make(basis.model, basis.samples, indices, batch_size=basis.batch_size)
        found = diagonal(CurvatureMatrix(around, self.matrix), choice.n_probes, choice.seed)
        values: list[Tensor] = around.split(found.values)
        named = {name: v.abs() if self.absolute else v for name, v in zip(around.names, values)}
        refuse_non_finite(named, "curvature")
        return named

    def passes(self, n_batches: int, choice: Choice, model: nn.Module) -> int:
        from unsharp.evaluation.curvature import at_once

        params = list(trainable(model).values())
        graphs = -(-choice.n_probes // at_once(sum(p.numel() for p in params), params[0].element_size()))
        return n_batches * (graphs + choice.n_probes)


class Hessian(Diagonal):
    """The largest diagonal entries of the Hessian: the sharpest coordinates; negative curvature comes last."""

    formula = "diag ∇²L ≈ mean over probes of z∘(∇²L·z), largest"
    source = "Malekmohammadi, Lee & Xiong 2025 (arXiv 2504.06398), from its abstract; Hutchinson 1989"

    def __init__(self) -> None:
        super().__init__("hessian")


class AbsoluteHessian(Diagonal):
    """The diagonal entries of the Hessian that are largest by absolute value."""

    formula = "|diag ∇²L|, largest"
    source = "variant of hessian"

    def __init__(self) -> None:
        super().__init__("hessian", absolute=True)


class GaussNewton(Diagonal):
    """The largest diagonal entries of the Gauss–Newton matrix: the part of the Hessian that is never below 0."""

    formula = "diag Jᵀ∇²ℓJ ≈ mean over probes of z∘(Jᵀ∇²ℓJ·z), largest"
    source = "Schraudolph 2002; Hutchinson 1989"

    def __init__(self) -> None:
        super().__init__("ggn")


SELECTIONS.register("hessian")(Hessian())
SELECTIONS.register("hessian_abs")(AbsoluteHessian())
SELECTIONS.register("ggn")(GaussNewton())
