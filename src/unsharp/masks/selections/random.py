"""By chance."""

from __future__ import annotations

from unsharp.masks.base import SELECTIONS, Basis, Choice, Selection
from unsharp.masks.entries import Mask, random_mask


class Random(Selection):
    """Entries drawn uniformly with the seed: the control for every other selection."""

    formula = "drawn uniformly"
    source = "control"

    def mask(self, basis: Basis, choice: Choice) -> Mask:
        return random_mask(basis.model, fraction=choice.fraction, per_layer=choice.per_layer, seed=choice.seed)


SELECTIONS.register("random")(Random())
