"""A mask by any selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from unsharp.masks.base import Basis, Choice, On
from unsharp.masks.entries import Mask

if TYPE_CHECKING:
    from unsharp.data.samples import Samples


def make_mask(basis: Basis, choice: Choice) -> Mask:
    """The mask that the choice asks for.

    Returns:
        Bool tensors by parameter name, for every trainable parameter.

    Raises:
        UserError: if there is no trainable parameter, or no sample where the selection looks at some.
        NonFiniteError: if a score is NaN or infinite.
    """
    return choice.selection.mask(basis, choice)


def passes(choice: Choice, model: nn.Module, forget: np.ndarray, training: np.ndarray, batch_size: int) -> int:
    """Forward–backward passes over batches of that size that `make_mask` takes on that model."""
    n = len(choice.positions(forget, training))
    return choice.selection.passes(-(-n // batch_size), choice, model)


def saliency_mask(
    model: nn.Module,
    samples: Samples,
    forget_indices: Sequence[int] | np.ndarray,
    *,
    fraction: float,
    select: str = "largest",
    per_layer: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    n_probes: int = 30,
    score_on: On | None = None,
    score_samples: int = 1000,
) -> Mask:
    """The weights that carry the forget set, or others: a fraction of all trainable entries, by any selection.

    Args:
        model: Maps (B, ...) inputs to (B, K) logits; on the samples' device. It is left as it is.
        samples: All that the network was trained on.
        forget_indices: Positions of the forget set in `samples`.
        fraction: Share of the entries that are 1, in (0, 1].
        select: "largest" saliency |Σ over forget of ∇CE|; "smallest", as the published code of Sharp MinMax has it (its
            argsort lacks a minus sign); "random"; or another of `unsharp.masks.SELECTIONS` (docs/masks.md).
        per_layer: Take the fraction of each tensor rather than of all together.
        seed: Seed of what is drawn, at least 0.
        batch_size: Samples per pass, at least 1.
        n_probes: Random vectors of signs for the diagonal of a matrix, at least 1.
        score_on: Samples that the selection looks at: "forget" or "training"; None takes the selection's own.
        score_samples: Most samples that a selection by curvature looks at, at least 1.

    Returns:
        Bool tensors by parameter name, for every trainable parameter; see `select_entries` for the exact count.

    Raises:
        UserError: for an argument out of its range.
        NonFiniteError: if a score is NaN or infinite.
    """
    choice = Choice(
        fraction=fraction,
        select=select,
        per_layer=per_layer,
        seed=seed,
        n_probes=n_probes,
        score_on=score_on,
        score_samples=score_samples,
    )
    basis = Basis(
        model=model, samples=samples, forget=forget_indices, training=np.arange(len(samples)), batch_size=batch_size
    )
    return make_mask(basis, choice)
