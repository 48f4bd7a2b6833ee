"""The randomness of data: one table of uniform numbers per epoch, read alike by the batched path and the reference."""

from __future__ import annotations

import numpy as np

from unsharp.errors import UserError

ORDER, TOP, LEFT, FLIP, AREA, ASPECT = range(6)
COLUMNS = 6
# A foreign Dataset crops nothing here, so its items take their seed from a column that would place a crop.
ITEM_SEED = TOP


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
    if min(seed, epoch, cycle) < 0:
        raise UserError(f"seed, epoch and cycle must be at least 0, got {seed}, {epoch}, {cycle}")
    # A spawn key stands apart from the seed's own words, so that no large seed can run into another epoch.
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch, cycle))
    return np.random.Generator(np.random.Philox(sequence)).random((n, COLUMNS))
