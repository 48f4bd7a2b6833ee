"""How strongly the loss on some samples pulls at each weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.errors import UserError
from unsharp.masks.entries import Mask, refuse_non_finite, trainable
from unsharp.models.modes import evaluating

if TYPE_CHECKING:
    from unsharp.data.samples import Batch, Samples


def saliency(
    model: nn.Module,
    samples: Samples,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int = 256,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> Mask:
    """How strongly the loss on some samples pulls at each weight: |sum over the samples of ∇CE|.

    Evaluation mode, no augmentation, no autocast; a sum, so that the size of the batches matters only to rounding. The
    model is left as it was: modes, buffers, gradients. A tied weight counts once; one that gets no gradient has 0.

    Args:
        model: Maps (B, ...) inputs to (B, K) logits; on the samples' device.
        samples: Where the inputs come from.
        indices: Positions in `samples`, at least one.
        batch_size: Samples per pass, at least 1.
        loss: Sum (0-d) of the losses of a batch's samples; None is the cross-entropy of the logits.

    Returns:
        For each trainable parameter, by name, its saliency (its shape; float32, or float64 for a float64 parameter).

    Raises:
        UserError: if there is no trainable parameter or no sample.
        NonFiniteError: if a gradient is NaN or infinite.

    Source: Fan et al. 2024 (SalUn), eq. 3; Tang & Khanna 2026, Sharp MinMax.
    """
    from unsharp.data.streams import evaluation_batches

    if len(indices) == 0:
        raise UserError("indices is empty; a saliency needs at least one sample")
    params = trainable(model)
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params.values()]
    device, summed = runtime.device_of(model), loss or _summed_cross_entropy
    with evaluating(model), torch.enable_grad(), runtime.full_float32(), torch.autocast(device.type, enabled=False):
        for batch in evaluation_batches(samples, np.asarray(indices), batch_size):
            found = torch.autograd.grad(summed(model, batch), list(params.values()), allow_unused=True)
            for total, grad in zip(sums, found):
                if grad is not None:
                    total += grad
    values = {name: total.abs_() for name, total in zip(params, sums)}
    refuse_non_finite(values, "saliency")
    return values


def _summed_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch.inputs), batch.labels, reduction="sum")
