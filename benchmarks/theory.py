"""The reduced model of the theory: three maps, its cost in d, and the same runs one by one and with vectors.

    PYTHONPATH=src python benchmarks/theory.py [--rounds 3] [--threads 2] [--steps 200] [--json]

Maps: 7 dimensions x 11 strengths x 5 seeds, under gradient descent and under SAM with two radii. The other figures are
ratios within a round, whose variants take turns; of them the median counts. Exit code 1 if a figure misses its limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from unsharp import runtime
from unsharp.theory import reference
from unsharp.theory.bench import MAP_PHI, Bench
from unsharp.theory.data import Setup, make_problem
from unsharp.theory.model import error_on_test, start
from unsharp.theory.unlearn import Plan, run

LIMITS = {
    "three maps of 77 cells and 5 seeds, 200 steps, seconds": (30.0, "at most"),
    "d = 100,000 over d = 1,000": (1.5, "at most"),
    "one by one over batched, 11 strengths x 5 seeds": (2.0, "at least"),
    "vectors over reduced, one cell at d = 16,000": (5.0, "at least"),
}


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def reduced(d: Sequence[int], phi: Sequence[float], seeds: Sequence[int], steps: int) -> None:
    """SAM in pretraining, from the drawing of the data to the test error."""
    state = start(make_problem(Setup(), d, seeds), phi)
    run(state, Plan(perturb="joint", steps=steps))
    error_on_test(state)


def with_vectors(d: int, phi: float, steps: int) -> None:
    """The same with vectors in R^d."""
    full = reference.make_full_problem(Setup(), d, phi, 0)
    weights = reference.train(full, tau=0.1, eta=0.1, steps=steps)
    reference.error_on_test(full, weights)


def one_by_one(d: int, phi: Sequence[float], seeds: Sequence[int], steps: int) -> None:
    """The reduced model for one cell and seed after the other."""
    for strength in phi:
        for seed in seeds:
            reduced([d], [strength], [seed], steps)


def measure(rounds: int, steps: int) -> dict[str, float]:
    """All figures."""
    reduced([1000], MAP_PHI, range(5), 2)  # the first call of each operation counts for none
    maps = min(timed(Bench().maps) for _ in range(rounds))
    wide, alone, vectors = [], [], []
    for _ in range(rounds):
        batched = timed(lambda: reduced([1000], MAP_PHI, range(5), steps))
        wide.append(timed(lambda: reduced([100_000], MAP_PHI, range(5), steps)) / batched)
        alone.append(timed(lambda: one_by_one(1000, MAP_PHI, range(5), steps)) / batched)
        single = timed(lambda: reduced([16_000], [4.0], [0], steps))
        vectors.append(timed(lambda: with_vectors(16_000, 4.0, steps)) / single)
    return dict(zip(LIMITS, (maps, *map(statistics.median, (wide, alone, vectors)))))


def met(name: str, value: float) -> bool:
    """Whether a figure keeps its limit."""
    limit, way = LIMITS[name]
    return value <= limit if way == "at most" else value >= limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    runtime.set_threads(arguments.threads)
    figures = measure(arguments.rounds, arguments.steps)
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "rounds": arguments.rounds}
    result: dict[str, Any] = about | runtime.describe(torch.device("cpu")) | {"figures": figures}
    result["met"] = all(met(name, value) for name, value in figures.items())
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print(
            f"{result['date']}, {result['device_name']} (cpu), torch {result['torch']}, {result['threads']} threads\n"
        )
        print("| figure | measured | limit |\n|---|---|---|")
        for name, value in figures.items():
            limit, way = LIMITS[name]
            print(f"| {name} | {value:.2f} | {'≤' if way == 'at most' else '≥'} {limit:g} |")
        print(f"\nlimits: {'met' if result['met'] else 'MISSED'}")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
