"""Endless, repeatable batches of a part of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from unsharp.data.draws import COLUMNS, ORDER, draws_at
from unsharp.data.samples import Batch, Samples, checked_indices
from unsharp.errors import UserError


@dataclass(frozen=True, eq=False)
class Stream:
    """Shuffled, augmented batches of some samples, the same for the same seed and epoch.

    Args:
        samples: Where the batches come from.
        indices: (k,) int64 positions in `samples`, each once; kept sorted.
        batch_size: Largest number of samples in a batch, over all ranks.
        seed: Seed of order and augmentation.
        rank: Which process this is; it takes every `world`-th sample of each batch.
        world: Number of processes.
        last_batch: "balanced" batches differ by at most one sample; "short" ones are full but for the last, which may
            break BatchNorm where it is of one sample.
        cycle: Where more batches are asked of an epoch than there are: "anew" draws order and augmentation again,
            "repeat" gives the same batches again.

    Raises:
        UserError: if indices are empty, repeated or out of range, or a batch would not fill all processes.
    """

    samples: Samples
    indices: np.ndarray
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    last_batch: Literal["balanced", "short"] = "balanced"
    cycle: Literal["anew", "repeat"] = "anew"

    def __post_init__(self) -> None:
        indices = np.sort(checked_indices(self.indices, len(self.samples)))
        object.__setattr__(self, "indices", indices)
        if len(indices) == 0:
            raise UserError("indices are empty: a stream needs at least one sample")
        repeated = indices[1:][indices[1:] == indices[:-1]]
        if len(repeated):
            raise UserError(f"indices must hold each sample once, but {repeated[0]} repeats")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.rank < self.world:
            raise UserError(f"rank must be in 0..{self.world - 1}, got {self.rank}")
        if int(self.sizes.min()) < self.world:
            raise UserError(f"a batch of {self.sizes.min()} does not fill {self.world} processes; raise batch_size")

    @property
    def n_batches(self) -> int:
        """Batches in which each sample comes once."""
        return -(-len(self.indices) // self.batch_size)

    @property
    def smallest_batch(self) -> int:
        """Samples in the smallest batch that any of the processes gets."""
        return int(self.sizes.min()) // self.world

    @cached_property
    def sizes(self) -> np.ndarray:
        """Sizes of the batches over all ranks."""
        if self.last_batch == "short":
            return np.diff(np.append(np.arange(0, len(self.indices), self.batch_size), len(self.indices)))
        whole, rest = divmod(len(self.indices), self.n_batches)
        return np.full(self.n_batches, whole) + (np.arange(self.n_batches) < rest)

    def epoch(self, epoch: int, start: int = 0, n_batches: int | None = None) -> Iterator[Batch]:
        """Batches `start` to `n_batches` of an epoch; a start leaves out batches and changes none.

        Args:
            epoch: Number of the epoch, at least 0.
            start: First batch, at least 0.
            n_batches: Where to end (default: `self.n_batches`); beyond one run the stream cycles, and each cycle has
                an order and an augmentation of its own.

        Returns:
            An iterator over the batches, this rank's share of each.
        """
        end = self.n_batches if n_batches is None else n_batches
        while start < end:
            cycle, first = divmod(start, self.n_batches)
            last = min(self.n_batches, end - cycle * self.n_batches)
            yield from self._cycle(epoch, cycle if self.cycle == "anew" else 0, first, last)
            start = cycle * self.n_batches + last

    def drawn(self, epoch: int, cycle: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """One run through the samples: their positions (k,) in its order, and the row (k, COLUMNS) that each draws."""
        rows = self.samples.source_positions[self.indices]
        table = draws_at(rows, self.seed, epoch, self.samples.source_size, cycle)
        place = np.argsort(table[:, ORDER], kind="stable")
        return self.indices[place], table[place]

    def _cycle(self, epoch: int, cycle: int, first: int, last: int) -> Iterator[Batch]:
        order, rows = self.drawn(epoch, cycle)
        table = np.zeros((len(self.samples), COLUMNS))  # rows of other samples are not read
        table[order] = rows
        batches = np.split(order, np.cumsum(self.sizes)[:-1])[first:last]
        mine = [batch[self.rank :: self.world] for batch in batches]
        yield from self.samples.batches(np.concatenate(mine), [len(batch) for batch in mine], draws=table)


def evaluation_batches(samples: Samples, indices: np.ndarray, batch_size: int = 1000) -> Iterator[Batch]:
    """Batches of `samples` at `indices`, in this order, not augmented."""
    order = checked_indices(indices, len(samples))
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    sizes = [min(batch_size, len(order) - first) for first in range(0, len(order), batch_size)]
    yield from samples.batches(order, sizes, draws=None)
