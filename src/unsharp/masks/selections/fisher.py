"""By the gradients of single samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from unsharp import runtime
from unsharp.data.streams import evaluation_batches
from unsharp.gradients import SampleGradients, groups_of, importances
from unsharp.masks.base import SELECTIONS, Basis, Choice, ScoredSelection
from unsharp.masks.entries import Mask, refuse_non_finite, trainable
from unsharp.models.modes import evaluating


class Fisher(ScoredSelection):
    """The largest mean squares of the gradients of single samples: the diagonal of the empirical Fisher matrix."""

    reads = "training"
    capped = True
    formula = "mean over samples of (∇CE)², largest"
    source = "Kirkpatrick et al., PNAS 2017; as a stand-in for the Hessian"

    def scores(self, basis: Basis, indices: np.ndarray, choice: Choice) -> Mask:
        trainable(basis.model)
        if basis.loss is not None:
            return _by_loop(basis, indices)
        rows = SampleGradients(basis.model, basis.samples, groups_of(indices, 1, choice.seed), most=basis.batch_size)
        return importances(rows)

    def passes(self, n_batches: int, choice: Choice, model: nn.Module) -> int:
        return n_batches


def _by_loop(basis: Basis, indices: np.ndarray) -> Mask:
    """The mean squares for a loss of the user's own, one sample after the other."""
    assert basis.loss is not None
    params, device = trainable(basis.model), runtime.device_of(basis.model)
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params.values()]
    with (
        evaluating(basis.model),
        torch.enable_grad(),
        runtime.full_float32(),
        torch.autocast(device.type, enabled=False),
    ):
        for batch in evaluation_batches(basis.samples, indices, 1):
            grads = torch.autograd.grad(basis.loss(basis.model, batch), list(params.values()), allow_unused=True)
            for total, g in zip(sums, grads):
                if g is not None:
                    total += g.to(total.dtype) ** 2
    values = {name: total / len(indices) for name, total in zip(params, sums)}
    refuse_non_finite(values, "a sample's gradient")
    return values


SELECTIONS.register("fisher")(Fisher())
