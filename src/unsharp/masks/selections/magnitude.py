"""By the weights themselves."""

from __future__ import annotations

import numpy as np

from unsharp.masks.base import SELECTIONS, Basis, Choice, ScoredSelection
from unsharp.masks.entries import Mask, refuse_non_finite, trainable


class Magnitude(ScoredSelection):
    """The weights that are largest by absolute value."""

    formula = "|w|, largest"
    source = "baseline of pruning (Han et al., NeurIPS 2015)"

    def scores(self, basis: Basis, indices: np.ndarray, choice: Choice) -> Mask:
        values = {name: p.detach().abs() for name, p in trainable(basis.model).items()}
        refuse_non_finite(values, "a weight")
        return values


SELECTIONS.register("magnitude")(Magnitude())
