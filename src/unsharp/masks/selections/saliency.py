"""By the gradient of the loss on the forget set: its largest entries, or its smallest."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from torch import nn

from unsharp.masks.base import SELECTIONS, Basis, Choice, ScoredSelection
from unsharp.masks.entries import Mask
from unsharp.masks.saliency import saliency


class Largest(ScoredSelection):
    """The largest gradients of the summed loss: where the forget set pulls most (saliency)."""

    reads = "forget"
    formula = "|Σ ∇CE|, largest"
    source = "Fan et al., ICLR 2024 (SalUn); Tang & Khanna, ICLR 2026"

    def scores(self, basis: Basis, indices: np.ndarray, choice: Choice) -> Mask:
        return saliency(basis.model, basis.samples, indices, batch_size=basis.batch_size, loss=basis.loss)

    def passes(self, n_batches: int, choice: Choice, model: nn.Module) -> int:
        return n_batches


class Smallest(Largest):
    """The smallest of these gradients, as the published code of Sharp MinMax takes them."""

    formula = "|Σ ∇CE|, smallest"
    source = "published code of Tang & Khanna, ICLR 2026"
    end: ClassVar[Literal["largest", "smallest"]] = "smallest"


SELECTIONS.register("largest")(Largest())
SELECTIONS.register("smallest")(Smallest())
