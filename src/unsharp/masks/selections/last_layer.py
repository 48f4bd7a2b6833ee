"""By place: the layer that gives the logits."""

from __future__ import annotations

import torch

from unsharp.masks.base import SELECTIONS, Basis, Choice, Selection
from unsharp.masks.entries import Mask, trainable


class LastLayer(Selection):
    """The whole last layer, whatever the fraction: the last module of the network that has trainable parameters."""

    ranks = False
    formula = "the last module, weight and bias"
    source = "baseline in Malekmohammadi, Lee & Xiong 2025 (arXiv 2504.06398)"

    def mask(self, basis: Basis, choice: Choice) -> Mask:
        params = trainable(basis.model)
        own = [[id(p) for p in m.parameters(recurse=False) if p.requires_grad] for m in basis.model.modules()]
        last = next(ids for ids in reversed(own) if ids)
        return {name: torch.full_like(p, id(p) in last, dtype=torch.bool) for name, p in params.items()}


SELECTIONS.register("last_layer")(LastLayer())
