"""A random share of some samples, of each class alike."""

from __future__ import annotations

import numpy as np

from unsharp.data.samples import Samples


def share_of(samples: Samples, indices: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A share of the samples at `indices`: of each class alike, so that a small share still knows every class.

    Of n samples of a class round(fraction · n) are taken, at least one. Whether a sample is among them is decided by a
    uniform number that depends on the seed and on its place in the full source alone: with one seed, a smaller share
    lies within a larger one.

    Args:
        samples: The samples.
        indices: (k,) int64 sorted positions, each once.
        fraction: In (0, 1]; 1 takes all.
        seed: Seed of the draw, at least 0.

    Returns:
        int64 sorted positions, a part of `indices`.
    """
    if fraction == 1:
        return indices
    # The key has three numbers, those of the tables for the streams have two: they have no draw in common.
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(0, 0, 0)))
    uniform = np.random.Generator(bits).random(samples.source_size)[samples.source_positions[indices]]
    labels = samples.labels[indices]
    counts = np.bincount(labels)
    order = np.lexsort((uniform, labels))
    place = np.arange(len(order)) - (np.cumsum(counts) - counts)[labels[order]]
    wanted = np.maximum(np.rint(fraction * counts).astype(np.int64), 1)
    return np.sort(indices[order[place < wanted[labels[order]]]])
