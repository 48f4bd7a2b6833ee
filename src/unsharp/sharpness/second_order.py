"""Exact gradients of penalties: differentiate a loss, then differentiate the result along a direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unsharp import runtime
from unsharp.sharpness.point import Gradients


def differentiated(loss: Tensor, params: Sequence[Tensor]) -> tuple[Gradients, Gradients]:
    """∇L with its graph, as this process sees it, and without, as the mean over all processes.

    Args:
        loss: 0-d, with its graph.
        params: The tensors by which to differentiate; the gradient of one that L does not reach is None.
    """
    own: Gradients = list(torch.autograd.grad(loss, params, create_graph=True, allow_unused=True))
    everywhere: Gradients = [None if g is None else g.detach().clone() for g in own]
    runtime.mean_over_ranks(everywhere)
    return own, everywhere


def hessian_product(gradient: Gradients, params: Sequence[Tensor], direction: Gradients) -> Gradients:
    """H·v, the mean over all processes, from the gradient with its graph; the graph is freed.

    Args:
        gradient: As the first of `differentiated`.
        params: The same tensors.
        direction: v, the same in all processes.
    """
    pairs = [(g, v) for g, v in zip(gradient, direction) if g is not None and v is not None and g.requires_grad]
    if not pairs:
        return [None] * len(params)
    outputs, vectors = [g for g, _ in pairs], [v for _, v in pairs]
    found = torch.autograd.grad(outputs, params, vectors, allow_unused=True)
    # autograd may return one tensor for several parameters, or one that cannot be written to
    product: Gradients = [None if h is None else h.clone() for h in found]
    runtime.mean_over_ranks(product)
    return product
