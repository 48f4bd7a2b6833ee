"""Which samples each network of a pool is trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unsharp.errors import UserError

SUBSET, TRAINING = range(2)


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """Random subsets of one fixed size, each drawn without regard to the others.

    The subset of member j, and the seed of its training, are functions of (seed, j) alone: a pool can grow at any time,
    anywhere, in any order.

    Args:
        n: Number of samples to draw from.
        fraction: Share of them in each subset, in (0, 1]; the size is rounded to the nearest whole number.
        seed: Seed of the pool, at least 0.

    Raises:
        UserError: if fraction or seed is out of range, or a subset would be empty.
    """

    n: int
    fraction: float
    seed: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fraction) and 0 < self.fraction <= 1):
            raise UserError(f"fraction must lie in (0, 1], got {self.fraction}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")
        if self.size < 1:
            raise UserError(f"fraction {self.fraction} of {self.n} samples is none; raise it")

    @property
    def size(self) -> int:
        """Samples in each subset."""
        return round(self.fraction * self.n)

    def indices(self, member: int) -> np.ndarray:
        """(size,) int64, ascending: what a member is trained on."""
        rng = np.random.Generator(np.random.Philox(self._sequence(member, SUBSET)))
        return np.sort(rng.choice(self.n, self.size, replace=False, shuffle=False).astype(np.int64))

    def training_seed(self, member: int) -> int:
        """Seed of a member's weights, order and augmentation, in [0, 2³²)."""
        return int(self._sequence(member, TRAINING).generate_state(1, np.uint32)[0])

    def inside(self, members: Sequence[int]) -> np.ndarray:
        """(m, n) bool: whether sample i is in the subset of a member."""
        found = np.zeros((len(members), self.n), bool)
        for row, member in zip(found, members):
            row[self.indices(member)] = True
        return found

    def _sequence(self, member: int, purpose: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed, spawn_key=(member, purpose))
