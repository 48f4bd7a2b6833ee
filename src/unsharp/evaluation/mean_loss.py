"""The mean loss of a network over fixed samples as a function of its weights: value, gradient, curvature products.

Evaluation mode (BatchNorm with its stored statistics, no dropout), no augmentation, no autocast, full float32; the
samples go through in batches, and the network is left as it was, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unsharp import runtime
from unsharp.data.samples import Samples, checked_indices
from unsharp.errors import NonFiniteError, UserError
from unsharp.models.modes import evaluating

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (B, K) and labels (B,) to a loss for each sample, (B,)."""
Weights = list[Tensor]
Matrix = Literal["hessian", "ggn"]
MATRICES: tuple[Matrix, ...] = ("hessian", "ggn")
RESIDENT_BYTES = 2**29
"""Inputs up to this many bytes are prepared once and stay on the device; more are read anew in each pass."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits) of the true class for each sample, (B,)."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def subsample(indices: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """At most n of the positions, drawn without replacement, sorted; all of them, as they are, where n is None."""
    if n is None or n >= len(indices):
        return np.asarray(indices)
    return np.sort(np.random.default_rng(seed).choice(indices, n, replace=False))


def generator(*words: int) -> torch.Generator:
    """A generator on the host whose numbers depend on these words alone, whatever the device of the network."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


class Batches:
    """The inputs and labels at some positions, in batches of nearly equal size, on the device.

    Args:
        samples: Where the inputs come from.
        indices: Positions in `samples`, at least one.
        batch_size: Most samples in a batch, at least 1.
        dtype: Inputs that are real numbers come in this one.
    """

    def __init__(self, samples: Samples, indices: np.ndarray, batch_size: int, dtype: torch.dtype) -> None:
        self._order = checked_indices(indices, len(samples))
        if len(self._order) == 0:
            raise UserError("indices is empty; give at least one sample")
        check_whole("batch_size", batch_size)
        n_batches = -(-len(self._order) // batch_size)
        self._sizes = [len(part) for part in np.array_split(self._order, n_batches)]
        self._samples, self._dtype = samples, dtype
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self._order)

    @property
    def largest(self) -> int:
        """Samples in the largest batch."""
        return max(self._sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Tensor, Tensor]] | None = []
        for batch in self._samples.batches(self._order, self._sizes, draws=None):
            inputs = batch.inputs.to(self._dtype) if batch.inputs.is_floating_point() else batch.inputs
            if kept is not None and inputs.nbytes * len(self) <= RESIDENT_BYTES:
                kept.append((inputs, batch.labels))
            else:
                kept = None
            yield inputs, batch.labels
        self._kept = kept


class MeanLoss:
    """L(w), the mean over fixed samples of the loss of a network with the trainable weights w.

    Args:
        model: Maps (B, ...) inputs to (B, K) logits; on the samples' device.
        samples: Where the inputs come from.
        indices: Positions in `samples`, at least one.
        loss: From logits and labels to a loss for each sample.
        batch_size: Samples that go through together, at least 1.

    Attributes:
        names: Names of the trainable parameters.
        params: The parameters themselves, in the same order.
        length: Number of weights.
        passes: Passes over all samples so far: "values", "gradients" and "products" (one for each vector).

    Raises:
        UserError: if there is no trainable parameter or no sample.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        indices: np.ndarray,
        *,
        loss: Loss = cross_entropy,
        batch_size: int = 256,
    ) -> None:
        self.model, self.loss = model, loss
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise UserError("the model has no trainable parameter; set requires_grad on those that are to be moved")
        self.names, self.params = list(named), list(named.values())
        self.length = sum(p.numel() for p in self.params)
        self.device = self.params[0].device
        self.batches = Batches(samples, indices, batch_size, self.params[0].dtype)
        self.passes = {"values": 0, "gradients": 0, "products": 0}

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.batches.n

    @torch.no_grad()
    def value(self) -> Tensor:
        """L(w), 0-d float64 on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._as_it_is():
            for inputs, labels in self.batches:
                total += self._losses(inputs, labels).sum(dtype=torch.float64)
        self.passes["values"] += 1
        return total / self.n

    def gradient(self) -> tuple[Tensor, Weights]:
        """L(w), 0-d float64, and ∇L(w): a tensor for each parameter, 0 where L does not depend on it."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = [torch.zeros_like(p) for p in self.params]
        with self._as_it_is(), torch.enable_grad():
            for inputs, labels in self.batches:
                losses = self._losses(inputs, labels)
                total += losses.detach().sum(dtype=torch.float64)
                _add(sums, torch.autograd.grad(losses.sum() / self.n, self.params, allow_unused=True))
        self.passes["gradients"] += 1
        return total / self.n, sums

    def products(self, vectors: Sequence[Weights], matrix: Matrix = "hessian") -> list[Weights]:
        """H·v for each vector v, H being the Hessian of L at w or its generalised Gauss–Newton part.

        The Gauss–Newton matrix is the mean of Jᵀ·∇²ℓ·J, J being the derivative of the logits by the weights and ∇²ℓ the
        Hessian of the loss by the logits: it is positive semi-definite where the loss is convex in the logits, and
        leaves out how the logits curve.

        Args:
            vectors: Vectors, each a tensor for each parameter. The graph of a batch is made once for all of them.
            matrix: "hessian" or "ggn".
        """
        one = self._hessian_products if matrix == "hessian" else self._ggn_products
        sums = [[torch.zeros_like(p) for p in self.params] for _ in vectors]
        # fused attention has no second derivative
        with self._as_it_is(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for inputs, labels in self.batches:
                for total, found in zip(sums, one(inputs, labels, vectors)):
                    _add(total, found)
        self.passes["products"] += len(vectors)
        return sums

    @contextlib.contextmanager
    def moved(self, offset: Sequence[Tensor]) -> Iterator[None]:
        """The weights at w + offset meanwhile; they come back from a copy, to the bit."""
        weights = [p.data for p in self.params]
        kept = [w.clone() for w in weights]
        try:
            torch._foreach_add_(weights, list(offset))
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def noise(self, *words: int) -> Weights:
        """Independent standard normal numbers for each weight; a function of the words alone."""
        draw = generator(*words)
        return [torch.randn(p.shape, generator=draw).to(p) for p in self.params]

    def signs(self, *words: int) -> Weights:
        """−1 or 1 for each weight, independent and equally likely; a function of the words alone."""
        draw = generator(*words)
        return [torch.randint(0, 2, p.shape, generator=draw).mul_(2).sub_(1).to(p) for p in self.params]

    def split(self, vector: Tensor) -> Weights:
        """A flat vector as a tensor for each parameter."""
        parts = vector.split([p.numel() for p in self.params])
        return [part.view(p.shape).to(p) for part, p in zip(parts, self.params)]

    def _logits(self, inputs: Any) -> Tensor:
        return self.model(inputs)

    def _losses(self, inputs: Any, labels: Tensor) -> Tensor:
        losses = self.loss(self._logits(inputs), labels)
        if losses.shape != labels.shape[:1]:
            raise UserError(f"loss must give a number for each of {len(labels)} samples, got {tuple(losses.shape)}")
        return losses

    def _hessian_products(self, inputs: Any, labels: Tensor, vectors: Sequence[Weights]) -> Iterator[_Found]:
        loss = self._losses(inputs, labels).sum() / self.n
        grads = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
        reached = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        for vector in vectors if reached else ():
            yield torch.autograd.grad(
                [grads[i] for i in reached],
                self.params,
                [vector[i] for i in reached],
                retain_graph=True,
                allow_unused=True,
            )

    def _ggn_products(self, inputs: Any, labels: Tensor, vectors: Sequence[Weights]) -> Iterator[_Found]:
        logits = self._logits(inputs)
        # J·v is the derivative of u ↦ Jᵀ·u, which is linear in u, along v: two backward passes and no forward mode
        u = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, self.params, u, create_graph=True, allow_unused=True)
        reached = [i for i, g in enumerate(pulled) if g is not None]
        outputs = logits.detach().requires_grad_(True)
        loss = self.loss(outputs, labels).sum() / self.n
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
        for vector in vectors:
            (along,) = torch.autograd.grad(
                [pulled[i] for i in reached], u, [vector[i] for i in reached], retain_graph=True
            )
            (curved,) = torch.autograd.grad(slope, outputs, along, retain_graph=True)
            yield torch.autograd.grad(logits, self.params, curved, retain_graph=True, allow_unused=True)

    @contextlib.contextmanager
    def _as_it_is(self) -> Iterator[None]:
        with (
            evaluating(self.model),
            runtime.full_float32(),
            torch.autocast(self.device.type, enabled=False),
        ):
            yield


_Found = Sequence["Tensor | None"]


@torch.no_grad()
def _add(sums: Weights, found: _Found) -> None:
    pairs = [(total, g) for total, g in zip(sums, found) if g is not None]
    if pairs:
        torch._foreach_add_([total for total, _ in pairs], [g for _, g in pairs])


def check_whole(name: str, value: int, least: int = 1) -> None:
    """Raises: UserError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raises: UserError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value) or value <= 0:
        raise UserError(f"{name} must be a finite number above 0, got {value!r}")


def check_finite(values: Tensor, what: str) -> None:
    """Raises: NonFiniteError unless all values are finite."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"{what} is NaN or infinite; the weights or the inputs are broken")
