"""The threshold attack against the SVC attack on 10,000 + 10,000 scores: time and attack accuracy.

    PYTHONPATH=src python benchmarks/attacks.py [--n 10000] [--classes 100] [--seed 0]

Each attack is fitted to members and non-members, scores itself on them, and judges 3,000 forget samples. The logits
are drawn: members lie far on the right side, non-members nearer, a quarter of them on the wrong side, as in a network
that fits its training set and reaches three quarters on the test set. Exit code 1 if a figure misses its limit: at
least 100 times faster, attack accuracy at most 0.5 points lower.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import sklearn
import torch

from unsharp.evaluation.membership import FEATURES, Verdict, svc_attack, threshold_attack

FASTER, LOWER = 100.0, 0.5
ONE_DIMENSIONAL = [name for name in FEATURES if name != "probability"]


def logits_of(n: int, n_classes: int, member: bool, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, K) of members or non-members, with labels (n,)."""
    labels = draw.integers(0, n_classes, n)
    margin = draw.normal(14, 3, n) if member else np.where(draw.random(n) < 0.75, draw.normal(11, 4, n), 2)
    logits = draw.normal(0, 2, (n, n_classes))
    logits[np.arange(n), labels] += margin
    return logits.astype(np.float32), labels


def timed(attack: Callable[..., Verdict], sets: list[np.ndarray], repeats: int) -> tuple[float, Verdict]:
    """Median seconds of `repeats` runs, and what the attack says."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        verdict = attack(*sets)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="members, and as many non-members")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    draw = np.random.default_rng(args.seed)
    shapes = [(args.n, True), (args.n, False), (3000, False)]
    drawn = [logits_of(n, args.classes, member, draw) for n, member in shapes]
    svc_attack(*(np.linspace(0, 1, 9) for _ in range(3)))  # imports count for neither

    print(f"{args.n:,} + {args.n:,} scores, 3,000 forget samples, {args.classes} classes, seed {args.seed}; ", end="")
    print(f"{datetime.date.today()}, Python {sys.version.split()[0]}, torch {torch.__version__}, ", end="")
    print(f"scikit-learn {sklearn.__version__}, numpy {np.__version__}, {torch.get_num_threads()} threads\n")
    print(
        "| score | SVC, s | threshold, s | times faster | SVC accuracy | threshold accuracy | SVC mia | threshold mia |"
    )
    print("|---|---|---|---|---|---|---|---|")
    met = True
    for name in ONE_DIMENSIONAL:
        sets = [FEATURES[name][0](*pair) for pair in drawn]
        svc_seconds, svc = timed(svc_attack, sets, 1)
        seconds, cut = timed(threshold_attack, sets, 21)
        met &= svc_seconds / seconds >= FASTER and svc.attack_accuracy - cut.attack_accuracy <= LOWER
        print(
            f"| {name} | {svc_seconds:.2f} | {seconds:.5f} | {svc_seconds / seconds:,.0f} "
            f"| {svc.attack_accuracy:.2f} | {cut.attack_accuracy:.2f} | {svc.mia:.2f} | {cut.mia:.2f} |",
            flush=True,
        )
    print(f"\nlimits (≥ {FASTER:g} times faster, accuracy ≤ {LOWER:g} points lower): {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
