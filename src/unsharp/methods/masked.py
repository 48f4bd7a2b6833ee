"""What methods share that act on a part of the weights, chosen before they start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unsharp import masks
from unsharp.errors import unknown
from unsharp.methods.base import Problem

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class ByMask:
    """The settings of a mask, and the mask.

    Args:
        fraction: Share of the weights in (0, 1] that the mask marks.
        select: Which weights those are: a selection (`unsharp list selections`), such as largest, the largest forget
            gradients; or "all": every weight.
        per_layer: Take the fraction within each tensor rather than over all.
        n_probes: Random vectors for selections by the diagonal of a matrix (hessian, ggn), at least 1.
        score_on: Samples that the selection looks at: forget or training; the selection's own, if left out.
        score_samples: Most samples that selections by curvature (hessian, ggn, fisher) look at, drawn with the seed; at
            least 1.
    """

    fraction: float = 0.3
    select: str = "largest"
    per_layer: bool = False
    n_probes: int = 30
    score_on: masks.On | None = None
    score_samples: int = 1000

    def _check_mask(self) -> None:
        if self.select not in (*masks.SELECTIONS, ALL):
            raise unknown("select", self.select, (*masks.SELECTIONS, ALL))
        if self.select != ALL:
            self._choice(0)

    def _choice(self, seed: int) -> masks.Choice:
        return masks.Choice(
            fraction=self.fraction,
            select=self.select,
            per_layer=self.per_layer,
            n_probes=self.n_probes,
            score_on=self.score_on,
            score_samples=self.score_samples,
            seed=seed,
        )

    def _mask(self, problem: Problem) -> masks.Mask | None:
        """The mask, made once for the run; None where every weight is marked."""
        if self.select == ALL:
            return None
        basis = masks.Basis(
            model=problem.model,
            samples=problem.samples,
            forget=problem.forget,
            training=np.union1d(problem.retain, problem.forget),
        )
        return problem.kept_mask(lambda: masks.make_mask(basis, self._choice(problem.seed)))

    def _mask_passes(self, problem: Problem, batch_size: int) -> int:
        """Passes over batches of that size that making the mask takes."""
        if self.select == ALL:
            return 0
        training = np.union1d(problem.retain, problem.forget)
        return masks.passes(self._choice(problem.seed), problem.model, problem.forget, training, batch_size)
