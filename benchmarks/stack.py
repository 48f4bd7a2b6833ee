"""Networks that are trained together against the same networks one by one: time, per member and step.

    PYTHONPATH=src python benchmarks/stack.py [--networks small_cnn:8:8,resnet18:4:32] [--members 1,4,16,64]
                                              [--batch 128] [--steps 2] [--rounds 3] [--threads N] [--device NAME]
                                              [--json]

A network is ARCH:WIDTH:SIDE, the side that of its square images. Every step is the library's own, with the reading of
the images. The forms take turns within a round, and a ratio is the median over the rounds of (seconds of a stack)
/ (members · seconds of one network alone) within a round, so that whatever else the machine does falls on both; under
1 the stack is quicker. Exit code 1 if the form that "auto" takes is more than a tenth slower than one by one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from unsharp import models, runtime
from unsharp.data.augment import AUGMENTATIONS
from unsharp.data.samples import ImageSamples
from unsharp.engine import OptimizerConfig
from unsharp.pool.stack import Kind, Member, Stack
from unsharp.training import TrainConfig

NETWORKS = "small_cnn:8:8,small_cnn:32:8,small_cnn:8:16,resnet18:4:16,resnet18:8:16,resnet18:4:32"
FORMS: tuple[Kind, ...] = ("grouped", "vmap")
LIMIT = 1.1


def network(arch: str, width: int, side: int) -> Callable[[], nn.Module]:
    """Makes the network for ten classes."""
    config = models.ModelConfig(arch=arch, width=width)
    return lambda: models.build(config, n_classes=10, input_shape=(3, side, side))


def images(side: int, n: int, device: torch.device) -> ImageSamples:
    """Random colour images; speed does not depend on what they show."""
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (n, side, side, 3), dtype=np.uint8), draw.integers(0, 10, n)
    names = [str(c) for c in range(10)]
    return ImageSamples(pixels, labels, names, augmentation=AUGMENTATIONS["crop_flip"], device=device)


def make_stack(
    make_model: Callable[[], nn.Module], samples: ImageSamples, n: int, kind: Kind, arguments: argparse.Namespace
) -> Stack:
    """A stack of n members that all see all samples."""
    config = TrainConfig(epochs=2, batch_size=arguments.batch, optimizer=OptimizerConfig(lr=0.01))
    members = [Member(np.arange(len(samples)), seed) for seed in range(n)]
    return Stack(make_model, samples, members, config, samples.device, kind=kind)


def seconds(stack: Stack) -> float:
    """Seconds of the second epoch; the first one makes the optimiser's state and the memory warm."""
    first, second = (row["seconds"] for row in stack.train().history)
    return second - first


def measure(spec: str, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each number of members."""
    arch, width, side = spec.split(":")
    make_model, samples = (
        network(arch, int(width), int(side)),
        images(int(side), arguments.batch * arguments.steps, device),
    )
    counts = [int(m) for m in arguments.members.split(",")]
    ratios: dict[tuple[int, str], list[float]] = {}
    alone: list[float] = []
    for _ in range(arguments.rounds):
        alone.append(seconds(make_stack(make_model, samples, 1, "single", arguments)))
        for n in counts:
            for form in FORMS:
                stack = make_stack(make_model, samples, n, form, arguments)
                taken = seconds(stack) / (n * alone[-1]) if stack.kind == form else float("nan")
                ratios.setdefault((n, form), []).append(taken)
    return [
        {
            "network": spec,
            "members": n,
            "alone_seconds": statistics.median(alone) / arguments.steps,
            **{form: statistics.median(ratios[n, form]) for form in FORMS},
            "auto": make_stack(make_model, samples, n, "auto", arguments).kind,
        }
        for n in counts
    ]


def show(result: dict[str, Any]) -> None:
    """The table, as markdown."""
    print(
        f"{result['date']}, {result['device_name']} ({result['device']}), torch {result['torch']}, {result['threads']} "
        f"threads, batch {result['batch']}, {result['rounds']} rounds of {result['steps']} steps\n"
    )
    print("| network | step alone, s | members | grouped | vmap | auto takes |\n|---|---|---|---|---|---|")
    for row in result["rows"]:
        print(
            f"| {row['network']} | {row['alone_seconds']:.4f} | {row['members']} | {row['grouped']:.2f} | "
            f"{row['vmap']:.2f} | {row['auto']} |"
        )
    print(f"\nauto within {LIMIT:g} of one by one: {'met' if result['met'] else 'MISSED'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--members", default="1,4,16,64")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2, help="steps of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    runtime.set_threads(arguments.threads)
    device = runtime.pick_device(arguments.device)
    rows = [row for spec in arguments.networks.split(",") for row in measure(spec, arguments, device)]
    result = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        **runtime.describe(device),
        "rows": rows,
        "met": all(row.get(row["auto"], 1.0) <= LIMIT for row in rows),
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
