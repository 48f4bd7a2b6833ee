"""What a step under each sharpness rule costs beside a plain one: time and memory, in one run.

    PYTHONPATH=src python benchmarks/rules.py [--arch resnet18] [--width N] [--batch 128] [--steps 20] [--threads N]
                                              [--device NAME] [--rules NAME ...] [--json]

Every step is the engine's own, on random images of 32 x 32 pixels, with the rule's defaults, and the rules take turns
(A B C D A B C D ...), so that whatever else the machine does falls on all of them alike. The ratio is that of the sums
over all rounds, since some rules do more in every so many steps; take a multiple of ten rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from step import Step, TimedLoop, build_loop, options, peak_bytes

from unsharp import runtime
from unsharp.methods.finetune import Finetune
from unsharp.sharpness import RULES


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Per rule: passes as stated, seconds, ratio to rule none, peak memory; from rounds in which they take turns."""
    names = ["none", *(name for name in arguments.rules or RULES if name != "none")]
    loops = {name: build_loop(Finetune(), RULES[name](), arguments, device) for name in names}
    steps = {name: loop.endless() for name, loop in loops.items()}
    seconds = dict.fromkeys(names, 0.0)
    warm_up = 2
    for turn in range(-warm_up, arguments.steps):
        for name, loop in loops.items():
            spent = seconds_of(loop, next(steps[name]))
            seconds[name] += spent if turn >= 0 else 0.0
    weights = sum(p.nbytes for p in loops["none"].model.parameters())
    return {
        "weights_bytes": weights,
        "rules": {
            name: {
                "passes": RULES[name]().passes,
                "seconds": seconds[name] / arguments.steps,
                "ratio": seconds[name] / seconds["none"],
                "peak_copies": peak_bytes(loop, next(steps[name])) / weights,
            }
            for name, loop in loops.items()
        },
    }


def seconds_of(loop: TimedLoop, step: Step) -> float:
    """Seconds of a step, with what the rule does after it late in a run."""

    def take() -> None:
        loop._step(*step)
        for i in step[0]:
            loop.phases[i].rule.after_step(loop._params, loop._memories[i], 1.0)

    return loop._timed(take)


def show(result: Mapping[str, Any]) -> None:
    """The table, as markdown."""
    print(
        f"{result['date']}, {result['device_name']} ({result['device']}), torch {result['torch']}, {result['threads']} "
        f"threads, {result['arch']}, batch {result['batch']}, {result['rounds']} rounds\n"
    )
    print("| rule | passes | step, s | step / plain step | peak, copies of the weights |\n|---|---|---|---|---|")
    for name, row in sorted(result["rules"].items(), key=lambda item: item[1]["ratio"]):
        print(f"| {name} | {row['passes']:g} | {row['seconds']:.4f} | {row['ratio']:.2f} | {row['peak_copies']:.2f} |")


def main() -> int:
    parser = options(__doc__ or "", steps=20)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), help="only these, and none beside them")
    arguments = parser.parse_args()
    runtime.set_threads(arguments.threads)
    device = runtime.pick_device(arguments.device)
    about = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "arch": arguments.arch,
        "batch": arguments.batch,
        "rounds": arguments.steps,
    }
    result = about | runtime.describe(device) | measure(arguments, device)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
