"""Which Sharp MinMax costs about as much as plain NegGrad: wall time of ten steps, relative to NegGrad's.

    PYTHONPATH=src python benchmarks/cheap.py [--arch resnet18] [--width N] [--batch 128] [--steps 9] [--threads N]
                                              [--device NAME] [--json]

A round is ten steps of each variant in turn, so that a rule that corrects every tenth step does so once in each. A
ratio is the median over the rounds of the ratio within a round. Exit code 1 if a rule that is meant to be cheap is not.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
import sys

import torch
from step import build_loop, options

from unsharp import runtime
from unsharp.methods.base import PhasedMethod
from unsharp.methods.neggrad import NegGrad
from unsharp.methods.sharp_minmax import SharpMinMax
from unsharp.sharpness import NO_RULE, AdaptiveSharpness, Rule
from unsharp.sharpness.looksam import LookSharpness
from unsharp.sharpness.single_step import SingleStepSharpness

BLOCK = 10
PLAIN = "NegGrad"
VARIANTS: dict[str, tuple[PhasedMethod, Rule]] = {
    PLAIN: (NegGrad(), NO_RULE),
    "Sharp MinMax, mask alone": (SharpMinMax(), NO_RULE),
    "Sharp MinMax, single-step ASAM": (SharpMinMax(), SingleStepSharpness(rho=1.0, adaptive=True)),
    "Sharp MinMax, ASAM every 10th step": (SharpMinMax(), AdaptiveSharpness(every=BLOCK)),
    "Sharp MinMax, adaptive LookSAM every 10th step": (
        SharpMinMax(),
        LookSharpness(rho=1.0, adaptive=True, every=BLOCK),
    ),
    "Sharp MinMax, no mask, single-step ASAM": (
        SharpMinMax(select="all"),
        SingleStepSharpness(rho=1.0, adaptive=True),
    ),
    "Sharp MinMax, ASAM": (SharpMinMax(), AdaptiveSharpness()),
}
CHEAP = ("single-step", "every 10th")
LIMIT = 1.2


def main() -> int:
    arguments = options(__doc__ or "", steps=9).parse_args()
    runtime.set_threads(arguments.threads)
    device = runtime.pick_device(arguments.device)
    loops = {name: build_loop(method, rule, arguments, device) for name, (method, rule) in VARIANTS.items()}
    steps = {name: loop.endless() for name, loop in loops.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(-1, arguments.steps):
        for name, loop in loops.items():
            spent = sum(loop.take_step(step)[0] for step in itertools.islice(steps[name], BLOCK))
            if turn >= 0:
                times[name].append(spent / BLOCK)
    ratios = {name: statistics.median(x / y for x, y in zip(times[name], times[PLAIN])) for name in VARIANTS}
    seconds = {name: statistics.median(times[name]) for name in VARIANTS}
    met = all(ratios[name] <= LIMIT for name in VARIANTS if any(word in name for word in CHEAP))
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__} | runtime.describe(device)
    if arguments.json:
        print(json.dumps(about | {"ratios": ratios, "seconds": seconds, "met": met}, indent=1))
        return 0 if met else 1
    print(
        f"{about['date']}, {about['device_name']} ({about['device']}), torch {about['torch']}, {about['threads']} "
        f"threads, {arguments.arch}, batch {arguments.batch}, {arguments.steps} rounds of {BLOCK} steps\n"
    )
    print("| variant | a step, s | relative to NegGrad |\n|---|---:|---:|")
    for name in VARIANTS:
        print(f"| {name} | {seconds[name]:.4f} | {ratios[name]:.2f} |")
    print(f"\ncheap ones at most {LIMIT:g}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
