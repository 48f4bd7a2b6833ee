"""The recipe that asks whether the evaluation says "no gap" where there is none: its counts against scipy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from unsharp.recipes.suite_calibration import TASKS, Options, holds_zero, is_absolute, page, rates

GAP, ALONE = "forget_accuracy", "divergence.forget_divergence.kl"


def cells(rng: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """Made-up cells: some gaps around 0, some far from it."""
    found = []
    for repeat in range(repeats):
        for _ in range(5):
            never, original, ours, theirs = rng.normal([1.2, 3, 1, 2], 1)
            found.append(
                {
                    "task": "random",
                    "repeat": repeat,
                    "never": {GAP: never, ALONE: theirs},
                    "never_gap": {GAP: never},
                    "original": {GAP: original, ALONE: ours},
                    "original_gap": {GAP: original},
                }
            )
    return found


def leaves_zero_out(values: np.ndarray) -> bool:
    return bool(stats.ttest_1samp(values, 0).pvalue < 0.05)


@pytest.mark.parametrize("seed", range(5))
def test_intervals_are_counted_as_the_t_test_counts_them(seed: int) -> None:
    found = cells(np.random.default_rng(seed), repeats=12)

    def table(of: str, name: str) -> np.ndarray:
        return np.array([f[of][name] for f in found]).reshape(12, 5)

    gap, alone = rates(found)
    assert gap["held"] == sum(not leaves_zero_out(row) for row in table("never_gap", GAP))
    assert gap["told"] == sum(leaves_zero_out(row) for row in table("original_gap", GAP))
    assert 0 < gap["held"] < 12  # there is something to count
    assert "held" not in alone
    apart = table("original", ALONE) - table("never", ALONE)
    assert alone["told"] == sum(leaves_zero_out(row) for row in apart)
    assert alone["gap"] == pytest.approx(apart.mean())
    assert f"{gap['held']} of 12" in page(Options(out="x", tasks=("random",), repeats=12), [gap, alone])


def test_a_missing_gap_is_neither() -> None:
    assert holds_zero([0.1, None, 0.2]) is None
    assert holds_zero([-1.0, 1.0]) is True
    assert holds_zero([5.0, 5.1, 5.2]) is False


def test_figures_with_an_ideal_of_their_own_are_told_from_gaps() -> None:
    assert is_absolute("tow")
    assert is_absolute(ALONE)
    assert not is_absolute(GAP)


def test_the_page_says_the_command_that_made_it() -> None:
    row = {
        "task": "random",
        "name": GAP,
        "repeats": 20,
        "never": 0.0,
        "original": 0.0,
        "gap": 0.0,
        "held": 19,
        "told": 1,
    }
    assert "--out DIR --tasks random`" in page(Options(out="x", tasks=("random",)), [row])
    both = [row, row | {"task": "hardest"}]
    assert "--tasks" not in page(Options(out="x", tasks=TASKS), both)
