"""The data of the theory: a signal patch and Gaussian noise, drawn at once for many dimensions and seeds.

Everything a trajectory needs are inner products among the signal direction, the noise vectors and the first weights.
For Gaussian vectors these can be drawn directly, by a triangular matrix, so that no vector of the dimension d is ever
made: the cost does not depend on d (`reference` has the vectors themselves).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unsharp.errors import UserError

NOISE = ("shared", "independent")
OUT_SCALE = ("mean", "sum")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
_DATA, _TEST, _ORDER, _UNLEARN_ORDER = 0, 1, 2, 3  # streams of a seed


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the data and the network are, apart from dimension, signal and seed.

    Args:
        n: Samples n ≥ 1.
        n_forget: Forget samples n_F in [0, n); the first ones, which is a random choice since samples are alike.
        n_filters: Filters m ≥ 1 of each output sign.
        n_patches: Patches P ≥ 2 of a sample; one holds the signal, P − 1 noise.
        sigma_p: Standard deviation σ_p > 0 of each coordinate of the noise.
        sigma_0: Standard deviation σ_0 > 0 of each first weight; None is 1/√(3d), that of torch's convolutions.
        flip: Chance in [0, 1) that a training label is not that of the signal.
        noise: "shared" repeats one noise vector in all P − 1 patches, "independent" draws one for each.
        out_scale: Second layer ±1/m ("mean") or ±1 ("sum").
        n_test: Fresh noises, at least 1, on which the test error is measured, each with both signals.
        precision: "float32" or "float64".
    """

    n: int = 20
    n_forget: int = 0
    n_filters: int = 10
    n_patches: int = 2
    sigma_p: float = 1.0
    sigma_0: float | None = None
    flip: float = 0.0
    noise: Literal["shared", "independent"] = "shared"
    out_scale: Literal["mean", "sum"] = "mean"
    n_test: int = 1000
    precision: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        _at_least("n", self.n, 1)
        _at_least("n_filters", self.n_filters, 1)
        _at_least("n_patches", self.n_patches, 2)
        _at_least("n_test", self.n_test, 1)
        if not 0 <= self.n_forget < self.n:
            raise UserError(f"n_forget must lie in [0, n), got {self.n_forget} of n = {self.n}")
        for name in ("sigma_p", "sigma_0"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be a number above 0, got {value}")
        if not 0 <= self.flip < 1:
            raise UserError(f"flip must lie in [0, 1), got {self.flip}")
        for name, known in (("noise", NOISE), ("out_scale", OUT_SCALE), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")

    @property
    def dtype(self) -> torch.dtype:
        """The type of all tensors."""
        return PRECISIONS[self.precision]

    @property
    def n_retain(self) -> int:
        """Retained samples n_R."""
        return self.n - self.n_forget

    @property
    def n_noises(self) -> int:
        """Different noise vectors of one sample: 1 where the patches share it, else P − 1."""
        return 1 if self.noise == "shared" else self.n_patches - 1

    @property
    def multiplicity(self) -> int:
        """Patches in which each noise vector stands."""
        return (self.n_patches - 1) // self.n_noises

    @property
    def out(self) -> float:
        """Size of the second layer's weights."""
        return 1.0 / self.n_filters if self.out_scale == "mean" else 1.0

    @property
    def span(self) -> int:
        """Dimension K of the span of signal, noise and first weights."""
        return 1 + self.n * self.n_noises + 2 * self.n_filters

    def first_std(self, d: int) -> float:
        """Standard deviation of a first weight in dimension d."""
        return 1.0 / math.sqrt(3.0 * d) if self.sigma_0 is None else self.sigma_0


@dataclass(frozen=True)
class Problem:
    """Problems side by side, one for each dimension and seed, in coordinates of the span.

    B problems, n samples, Q noise vectors of each, N = n·Q, 2m filters (the first m have output sign +1), K the
    dimension of the span. The signal has length 1 here; its strength is set when the problem is run, so that all
    strengths see the same noise.

    Args:
        setup: What data and network are.
        d: Dimension of each problem.
        seed: Seed of each problem.
        clean: Sign ŷ of the signal of each sample, (B, n).
        labels: Label y of each sample, (B, n).
        vectors: Signal direction and noise, (B, 1+N, K).
        weights: First weights, (B, 2m, K).
        test_noise: Fresh noise, (B, K, n_test·Q); the Q vectors of one sample follow each other.
        gram: Inner products of `vectors`, (B, 1+N, 1+N).
        scores: Inner products of `weights` and `vectors`, (B, 2m, 1+N).
    """

    setup: Setup
    d: tuple[int, ...]
    seed: tuple[int, ...]
    clean: Tensor
    labels: Tensor
    vectors: Tensor
    weights: Tensor
    test_noise: Tensor
    gram: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.d)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.gram.device

    @cached_property
    def dimensions(self) -> Tensor:
        """d of each problem as numbers to compute with, (B,)."""
        return self.gram.new_tensor(self.d)

    @property
    def forget(self) -> Tensor:
        """True for forget samples, (n,)."""
        return torch.arange(self.setup.n, device=self.device) < self.setup.n_forget

    @property
    def filter_signs(self) -> Tensor:
        """Output sign j of each filter, (2m,)."""
        ones = torch.ones(self.setup.n_filters, dtype=self.gram.dtype, device=self.device)
        return torch.cat([ones, -ones])

    def with_labels(self, labels: Tensor) -> Problem:
        """The same data with other labels, (B, n) of ±1."""
        return dataclasses.replace(self, labels=labels.to(self.gram))


def make_problem(setup: Setup, d: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu") -> Problem:
    """Problems for every dimension and seed, by the exact law of their inner products.

    The rows of a lower triangular matrix stand for signal direction, noise and first weights in this order: standard
    normal below the diagonal, on it in row k the root of a χ² variable with d − k degrees of freedom (the Bartlett
    decomposition). A fresh noise is a standard normal vector in these coordinates, times σ_p. What a seed draws depends
    on (seed, d, n, m) and on the number of noise vectors, and on nothing else.

    Args:
        setup: What data and network are.
        d: Dimensions, each above `setup.span`.
        seeds: Seeds of at least 0.
        device: Where to put the tensors.

    Returns:
        The problems, dimension by dimension, and in each seed by seed.

    Raises:
        UserError: if a dimension is too small, or a seed is negative.
    """
    check_grid(setup, d, seeds)
    cells = [(dimension, seed) for dimension in d for seed in seeds]
    drawn = [_draw(setup, dimension, seed) for dimension, seed in cells]
    clean, labels, rows, test = (np.stack(parts) for parts in zip(*drawn))
    n_vectors = 1 + setup.n * setup.n_noises
    return assemble(
        setup,
        tuple(c[0] for c in cells),
        tuple(c[1] for c in cells),
        clean=clean,
        labels=labels,
        vectors=rows[:, :n_vectors],
        weights=rows[:, n_vectors:],
        test_noise=test,
        device=device,
    )


def assemble(
    setup: Setup,
    d: tuple[int, ...],
    seed: tuple[int, ...],
    *,
    clean: np.ndarray,
    labels: np.ndarray,
    vectors: np.ndarray,
    weights: np.ndarray,
    test_noise: np.ndarray,
    device: torch.device | str = "cpu",
) -> Problem:
    """A problem of coordinates that are known; inner products are taken in float64 and then rounded.

    Args:
        setup: What data and network are.
        d: Dimension of each of B problems.
        seed: Seed of each.
        clean: Signs ŷ, (B, n).
        labels: Labels y, (B, n).
        vectors: Signal direction of length 1 and noise, (B, 1+N, K).
        weights: First weights, (B, 2m, K).
        test_noise: Fresh noise, (B, K, n_test·Q).
        device: Where to put the tensors.
    """

    def tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values)).to(device=device, dtype=setup.dtype)

    across = np.swapaxes(vectors, -1, -2)
    return Problem(
        setup=setup,
        d=d,
        seed=seed,
        clean=tensor(clean),
        labels=tensor(labels),
        vectors=tensor(vectors),
        weights=tensor(weights),
        test_noise=tensor(test_noise),
        gram=tensor(vectors @ across),
        scores=tensor(weights @ across),
    )


def check_grid(setup: Setup, d: Sequence[int], seeds: Sequence[int]) -> None:
    """Refuse what cannot be drawn. Raises: UserError for an empty grid, too small a dimension, a negative seed."""
    if not d or not seeds:
        raise UserError("d and seeds must name at least one value each")
    small = [x for x in d if x <= setup.span]
    if small:
        raise UserError(
            f"d must exceed the {setup.span} vectors of the problem (1 + n·Q + 2m), got {small[0]}; "
            "take fewer samples or filters, or a larger d"
        )
    if any(s < 0 for s in seeds):
        raise UserError(f"seeds must be at least 0, got {min(seeds)}")


def draw_labels(setup: Setup, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Signs ŷ and labels y, (n,) each; with one seed the flipped of a smaller chance are flipped under a larger."""
    clean = 2.0 * draw.integers(0, 2, setup.n) - 1.0
    return clean, np.where(draw.random(setup.n) < setup.flip, -clean, clean)


def stream(setup: Setup, d: int, seed: int, which: int = _DATA) -> np.random.Generator:
    """The random numbers of a problem; strength of the signal, radius, α and optimiser have no part in them."""
    return np.random.default_rng([which, seed, d, setup.n, setup.n_filters, setup.n_noises])


def _draw(setup: Setup, d: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    draw = stream(setup, d, seed)
    clean, labels = draw_labels(setup, draw)
    k = setup.span
    rows = np.tril(draw.standard_normal((k, k)), -1)
    rows[np.arange(k), np.arange(k)] = np.concatenate([[1.0], np.sqrt(draw.chisquare(d - np.arange(1, k)))])
    n_vectors = 1 + setup.n * setup.n_noises
    rows[1:n_vectors] *= setup.sigma_p
    rows[n_vectors:] *= setup.first_std(d)
    fresh = stream(setup, d, seed, _TEST).standard_normal((k, setup.n_test * setup.n_noises))
    return clean, labels, rows, setup.sigma_p * fresh


def batch_orders(problem: Problem, epochs: int, *, split: bool) -> tuple[Tensor, Tensor]:
    """Random orders of the samples in each epoch, the forget samples apart or among the others.

    Args:
        problem: B problems.
        epochs: How many orders.
        split: Order retained and forget samples apart; else all samples are in the first tensor, none in the second.

    Returns:
        Positions of retained samples, (B, epochs, n_R), and of forget samples, (B, epochs, n_F).
    """
    setup, apart = problem.setup, problem.setup.n_forget if split else 0
    keys = np.stack(
        [
            stream(setup, d, seed, _UNLEARN_ORDER if split else _ORDER).random((epochs, setup.n))
            for d, seed in zip(problem.d, problem.seed)
        ]
    )
    retain, forget = keys[..., apart:].argsort(axis=-1) + apart, keys[..., :apart].argsort(axis=-1)
    return torch.as_tensor(retain, device=problem.device), torch.as_tensor(forget, device=problem.device)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")
