"""What the page of the parts concludes from figures, against the same conclusions drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from unsharp.recipes.sharp_minmax_parts import FULL, LEVELS, PLAIN, _networks, verdict, worth


def fact(variant: str, seed: int, task: str, tow: float, passes: int) -> dict[str, object]:
    return {"variant": variant, "training_seed": seed, "task": task, "metrics": {"tow": tow, "passes": passes}}


@pytest.mark.parametrize(("shift", "expected"), [(0.0, "holds"), (-1.0, "undecided"), (-3.0, "fails")])
def test_the_verdict_is_that_of_the_paired_interval(shift: float, expected: str) -> None:
    differences = np.array([-0.3, 0.2, 0.1, -0.1, 0.05]) + shift
    low, high = scipy_stats.t.interval(0.95, 4, differences.mean(), scipy_stats.sem(differences))
    by_hand = "holds" if low > -1 else "fails" if high < -1 else "undecided"
    assert by_hand == expected
    assert verdict(differences.tolist()) == expected


def test_one_seed_decides_nothing() -> None:
    assert verdict([5.0]) == "undecided"


def test_differences_are_paired_by_seed_and_only_of_seeds_that_have_all_sets() -> None:
    rng = np.random.default_rng(0)
    tow = {(v, s, t): float(rng.random()) for v in (PLAIN, FULL, "x") for s in range(3) for t in LEVELS}
    facts = [fact(*key, value, 380 if key[0] == PLAIN else 570) for key, value in tow.items()]
    facts = [f for f in facts if (f["variant"], f["training_seed"], f["task"]) != ("x", 2, LEVELS[0])]
    name, cost, own, paired = next(row for row in worth(facts) if row[0] == "x")
    assert (name, cost) == ("x", 1.5)
    means = {(v, s): np.mean([tow[v, s, t] for t in LEVELS]) for v in (FULL, "x") for s in (0, 1)}
    assert own == pytest.approx([means["x", 0], means["x", 1]])
    assert paired == pytest.approx([means["x", s] - means[FULL, s] for s in (0, 1)])


def test_the_networks_beside_which_variants_are_measured_count_once_for_each_seed() -> None:
    facts = []
    for seed, (before, after) in enumerate([(99.0, 7.0), (98.0, 11.0)]):
        for variant in (PLAIN, FULL):
            one = fact(variant, seed, "high", 0.0, 1)
            beside = {
                "original": {"retain_accuracy": 100.0, "forget_accuracy": before, "test_accuracy": 50.0},
                "reference": {"retain_accuracy": 99.0, "forget_accuracy": after, "test_accuracy": 49.0 + seed},
            }
            facts.append(one | {"metrics": beside})
    lines = _networks(facts).splitlines()
    half = scipy_stats.t.ppf(0.975, 1) / np.sqrt(2)  # of two values: t · |a − b| / 2
    assert f"| before | high | 2 | 100.0 ± 0.0 | 98.5 ± {half * np.sqrt(0.5):.1f} | 50.0 ± 0.0 |" in lines
    assert any(line.startswith("| retrained | high | 2 | 99.0 ± 0.0 | 9.0 ±") for line in lines)
    assert "| retrained | low | 0 | — | — | — |" in lines
