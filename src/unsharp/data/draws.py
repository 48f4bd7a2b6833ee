"""The randomness of data: one table of uniform numbers per epoch, read alike by the batched path and the reference."""

from __future__ import annotations

import numpy as np

from unsharp.errors import UserError

ORDER, TOP, LEFT, FLIP, AREA, ASPECT = range(6)
COLUMNS = 6
# A foreign Dataset crops nothing here, so its items take their seed from a column that would place a crop.
ITEM_SEED = TOP
# The generator counts in blocks of four numbers: two rows of six are three of them.
PAIR_BLOCKS = 2 * COLUMNS // 4
# One row alone costs about as much as so many in a table.
SPARSE = 64


def draws(seed: int, epoch: int, n: int, cycle: int = 0) -> np.ndarray:
    """The table of an epoch: row i belongs to sample i of the full source and does not depend on how many follow it.

    Args:
        seed: Seed of the data, at least 0.
        epoch: Number of the epoch, at least 0.
        n: Number of rows.
        cycle: How often a stream that repeats within the epoch has run through already.

    Returns:
        (n, COLUMNS) float64 in [0, 1), a pure function of (seed, epoch, cycle, row).

    Raises:
        UserError: if seed, epoch or cycle is negative.
    """
    return np.random.Generator(_bits(seed, epoch, cycle)).random((n, COLUMNS))


def draws_at(rows: np.ndarray, seed: int, epoch: int, n: int, cycle: int = 0) -> np.ndarray:
    """`draws(seed, epoch, n, cycle)[rows]`, in a time that grows with the rows where they are few.

    A small forget set runs through its cycle every few steps, and must not wait for the whole source each time.

    Args:
        rows: (k,) int64 in [0, n).
        seed: As for `draws`.
        epoch: As for `draws`.
        n: As for `draws`.
        cycle: As for `draws`.
    """
    if SPARSE * len(rows) > n:
        return draws(seed, epoch, n, cycle)[rows]
    bits = _bits(seed, epoch, cycle)
    uniform = np.random.Generator(bits).random
    pairs, place = np.unique(rows // 2, return_inverse=True)
    found, at = np.empty((len(pairs), 2, COLUMNS)), 0
    for i, pair in enumerate(pairs.tolist()):
        bits.advance((pair - at) * PAIR_BLOCKS)
        uniform(out=found[i])
        at = pair + 1
    return found[place, rows % 2]


def _bits(seed: int, epoch: int, cycle: int) -> np.random.Philox:
    if min(seed, epoch, cycle) < 0:
        raise UserError(f"seed, epoch and cycle must be at least 0, got {seed}, {epoch}, {cycle}")
    # A spawn key stands apart from the seed's own words, so that no large seed can run into another epoch.
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch, cycle)))
