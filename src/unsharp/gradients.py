"""Gradients of a network on single samples or small groups, and what is made of them.

All of it in evaluation mode, without augmentation or autocast; the network is left as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unsharp import runtime
from unsharp.data.samples import Samples
from unsharp.data.streams import evaluation_batches
from unsharp.errors import NonFiniteError, UserError
from unsharp.models.modes import evaluating
from unsharp.progress import SILENT, Progress

BLOCK = 2**27
"""So many numbers of gradients, at most, are in memory together (512 MiB in float32), if it is more than one row."""
COLUMNS = 2**20


class SampleGradients:
    """The gradients of a network's mean cross-entropy on groups of samples, a row each, computed when they are wanted.

    Groups of one sample are taken many at a time, where the network allows that; else one after the other.

    Args:
        model: Maps (B, ...) inputs to (B, K) logits; on the samples' device.
        samples: Where the inputs come from.
        groups: Positions in `samples`, an array for each row.
        most: Rows that are computed together, at least 1; fewer where they are long.

    Raises:
        UserError: if there is no trainable parameter or no group.
    """

    def __init__(self, model: nn.Module, samples: Samples, groups: Sequence[np.ndarray], *, most: int = 256) -> None:
        self.model, self.samples, self.groups = model, samples, list(groups)
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise UserError("the model has no trainable parameter; set requires_grad on those that may change")
        if not self.groups:
            raise UserError("there is no sample to take a gradient of; give at least one")
        self.length = sum(p.numel() for p in self.params.values())
        self.fitting = max(1, BLOCK // self.length)
        """Rows that may be in memory together."""
        self.taken = 0
        """Samples whose gradient was taken so far, each as often as it was."""
        self._at_once = min(most, self.fitting)
        self._many = max(map(len, self.groups)) == 1 and self._at_once > 1

    def __len__(self) -> int:
        return len(self.groups)

    def blocks(self) -> list[range]:
        """The numbers of the rows, in blocks that fit in memory."""
        return _cut(range(len(self)), self.fitting)

    def batches(self) -> list[range]:
        """The numbers of the rows, in parts that are computed together."""
        return _cut(range(len(self)), self._at_once)

    def tensors(self, rows: range) -> list[Tensor]:
        """The gradients of these rows: per trainable parameter (rows, *shape), in at least float32.

        Raises:
            NonFiniteError: if one is NaN or infinite.
        """
        with _as_it_is(self.model):
            parts = [self._computed([self.groups[i] for i in part]) for part in _cut(rows, self._at_once)]
        found = parts[0] if len(parts) == 1 else [torch.cat(of_one) for of_one in zip(*parts)]
        if not bool(torch.stack([g.isfinite().all() for g in found]).all()):
            raise NonFiniteError("a sample's gradient is NaN or infinite; the weights or the inputs are broken")
        return found

    def matrix(self, rows: range) -> Tensor:
        """The gradients of these rows as (rows, number of weights)."""
        return torch.cat([g.flatten(1) for g in self.tensors(rows)], dim=1)

    def _computed(self, positions: list[np.ndarray]) -> list[Tensor]:
        self.taken += sum(map(len, positions))
        found = self._together(positions) if self._many and len(positions) > 1 else None
        if found is None:
            each = [self._of(group) for group in positions]
            found = [torch.stack(of_one) for of_one in zip(*each)]
        return [g.to(torch.promote_types(g.dtype, torch.float32)) for g in found]

    def _of(self, group: np.ndarray) -> list[Tensor]:
        (batch,) = self.samples.batches(group, [len(group)], draws=None)
        loss = nn.functional.cross_entropy(self.model(batch.inputs), batch.labels)
        grads = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params.values(), grads)]

    def _together(self, positions: Sequence[np.ndarray]) -> list[Tensor] | None:
        """The gradients of single samples, many at a time; None where the network cannot be mapped over samples."""
        (batch,) = self.samples.batches(np.concatenate(positions), [len(positions)], draws=None)

        def loss(params: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.model, params, (one.unsqueeze(0),))
            return nn.functional.cross_entropy(logits, label.unsqueeze(0))

        detached = {name: p.detach() for name, p in self.params.items()}
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the other forms of attention are slow when mapped
                grads = each(detached, batch.inputs, batch.labels)
        except (RuntimeError, NotImplementedError, ValueError):  # an operation that has no form for many, or no memory
            self._many = False
            return None
        return [grads[name].detach() for name in self.params]


def groups_of(indices: np.ndarray, size: int, seed: int) -> list[np.ndarray]:
    """The samples in groups of at most `size`, of nearly equal size: single ones in order, larger groups at random.

    Args:
        indices: (k,) positions, at least one.
        size: At least 1.
        seed: Seed of the order.
    """
    if size == 1:
        return [indices[i : i + 1] for i in range(len(indices))]
    shuffled = np.random.default_rng(seed).permutation(indices)
    return [np.sort(group) for group in np.array_split(shuffled, -(-len(indices) // size))]


def mean_gradient(
    model: nn.Module, samples: Samples, indices: np.ndarray, *, batch_size: int = 256, progress: Progress = SILENT
) -> Tensor:
    """The gradient of the mean cross-entropy over some samples: (number of trainable weights,), in at least float32.

    Raises:
        NonFiniteError: if it is NaN or infinite.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    with _as_it_is(model):
        for batch in evaluation_batches(samples, indices, batch_size):
            loss = nn.functional.cross_entropy(model(batch.inputs), batch.labels, reduction="sum")
            for total, grad in zip(sums, torch.autograd.grad(loss, params, allow_unused=True)):
                if grad is not None:
                    total += grad
            progress.advance()
    mean = torch.cat([total.flatten() for total in sums]) / len(indices)
    if not bool(mean.isfinite().all()):
        raise NonFiniteError("the gradient is NaN or infinite; the weights or the inputs are broken")
    return mean


def importances(rows: SampleGradients, *, progress: Progress = SILENT) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher matrix: the mean over the rows of the squared gradient.

    Args:
        rows: Single samples for the diagonal itself; with larger groups it is the square of a mean gradient.
        progress: Told of each part of the rows.

    Returns:
        Per trainable parameter, by name, a tensor of its shape, at least 0.
    """
    total: list[Tensor] | None = None
    for batch in rows.batches():
        squares = [(g * g).sum(0) for g in rows.tensors(batch)]
        total = squares if total is None else [a.add_(b) for a, b in zip(total, squares)]
        progress.advance()
    assert total is not None
    return {name: t / len(rows) for name, t in zip(rows.params, total)}


def inverse_fisher_product(
    rows: SampleGradients, vector: Tensor, damping: float, *, progress: Progress = SILENT
) -> Tensor:
    """(δ·I + (1/m)·Σ gᵢgᵢᵀ)⁻¹ · vector over the m rows gᵢ, exact up to rounding.

    This is where the WoodFisher recursion ends, which takes in one gradient after the other by the formula of Sherman
    and Morrison: H₀ = δ·I, Hᵢ⁻¹v = Hᵢ₋₁⁻¹v − Hᵢ₋₁⁻¹gᵢ·(gᵢᵀHᵢ₋₁⁻¹v)/(m + gᵢᵀHᵢ₋₁⁻¹gᵢ). Woodbury takes in all at
    once, with as much arithmetic, and needs the inner products of the rows alone: with K = G·Gᵀ it is
    (v − Gᵀ·(m·δ·I + K)⁻¹·G·v)/δ. Rows that do not fit in memory together are computed again, block by block.

    Args:
        rows: m gradients.
        vector: (number of trainable weights,).
        damping: δ > 0.
        progress: Told of each block of rows that is computed.

    Returns:
        A tensor like `vector`, in float64.

    Source: Singh & Alistarh, NeurIPS 2020 (WoodFisher, arXiv 2004.14340), for the recursion.
    """
    blocks, m = rows.blocks(), len(rows)
    inner = torch.empty(m, m, dtype=torch.float64, device=vector.device)
    along = torch.empty(m, dtype=torch.float64, device=vector.device)
    kept: Tensor | None = None
    for i, block in enumerate(blocks):
        ours = rows.matrix(block)
        progress.advance()
        here = slice(block.start, block.stop)
        inner[here, here] = _products(ours, ours)
        along[here] = _products(ours, vector[None])[:, 0]
        for other in blocks[i + 1 :]:
            there = slice(other.start, other.stop)
            inner[here, there] = _products(ours, rows.matrix(other))
            inner[there, here] = inner[here, there].T
            progress.advance()
        kept = ours if len(blocks) == 1 else None
        del ours
    inner.diagonal().add_(m * damping)
    factor = torch.linalg.cholesky(inner)
    weights = torch.cholesky_solve(along[:, None], factor)[:, 0]
    taken = torch.zeros_like(vector, dtype=torch.float64)
    for block in blocks:
        matrix = rows.matrix(block) if kept is None else kept
        for span in _spans(len(vector)):
            taken[span] += weights[block.start : block.stop] @ matrix[:, span].double()
        progress.advance()
    return (vector.double() - taken) / damping


def unflattened(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A flat vector cut into tensors of these shapes and dtypes."""
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, like)]


def blocks_to_compute(n_blocks: int) -> int:
    """How many blocks of rows `inverse_fisher_product` computes or uses."""
    return n_blocks * (n_blocks + 1) // 2 + n_blocks


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ in float64, a part of the columns at a time: in float32 it would spoil what the damping keeps apart."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for span in _spans(a.shape[1]):
        total += a[:, span].double() @ b[:, span].double().T
    return total


def _cut(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _spans(n: int) -> Iterator[slice]:
    return (slice(start, min(start + COLUMNS, n)) for start in range(0, n, COLUMNS))


@contextlib.contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on, full precision."""
    device = runtime.device_of(model)
    with evaluating(model), torch.enable_grad(), runtime.full_float32(), torch.autocast(device.type, enabled=False):
        yield
