"""Points of a loss surface one by one against many at a time: seconds and passes per point, in one run.

    PYTHONPATH=src python benchmarks/landscape.py [--networks small_cnn:8:8,resnet18:4:32] [--together 1,4,16,64]
                                                  [--samples 1000] [--batch 500] [--rounds 3] [--threads N]
                                                  [--device NAME] [--clock wall|processor] [--json]

A network is ARCH:WIDTH:SIDE, the side that of its square images. A point is one pass of all samples in evaluation mode.
The forms take turns within a round, and a ratio is the median over the rounds of (seconds per point in that form) /
(seconds per point one by one) within a round, so that whatever else the machine does falls on both; under 1 many at a
time is quicker. `--clock processor` counts the processor's seconds, for a machine that has other work; it says nothing
of an accelerator. "auto" is how many points of which form `Landscape` would take. Exit code 1 if that is more than a
tenth slower than one by one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from unsharp import models, runtime
from unsharp.data.samples import ImageSamples
from unsharp.evaluation.landscape import Landscape, directions
from unsharp.evaluation.points import Measured, Points, chosen

NETWORKS = "small_cnn:4:8,small_cnn:8:8,small_cnn:32:8,resnet18:4:16,resnet18:4:32,resnet18:16:32"
FORMS = ("grouped", "vmap")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
LIMIT = 1.1


def network(spec: str) -> tuple[nn.Module, int]:
    """A network with ten classes, and the side of its images."""
    arch, width, side = spec.split(":")
    config = models.ModelConfig(arch=arch, width=int(width))
    return models.build(config, n_classes=10, input_shape=(3, int(side), int(side))), int(side)


def samples_of(side: int, n: int, batch: int, device: torch.device) -> list[Measured]:
    """Random colour images; speed does not depend on what they show."""
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (n, side, side, 3), dtype=np.uint8), draw.integers(0, 10, n)
    samples = ImageSamples(pixels, labels, [str(c) for c in range(10)], device=device)
    return chosen({"all": (samples, np.arange(n))}, None, batch, 0, torch.float32)


def points_of(model: nn.Module, sets: list[Measured], form: str, together: int) -> Points | None:
    """So many points at a time in one form; None where the form does not fit."""
    points = Points(model, sets, form="single")
    if form != "single":
        inputs = next(iter(sets[0].batches))[0]
        try:
            points._stack, points.together, points.form = points._tried(form, together, inputs), together, form
        except RuntimeError:
            return None
        except Exception as error:
            print(f"{form}: {error}", file=sys.stderr)
            return None
    return points


def seconds_per_point(points: Points, model: nn.Module, clock: Callable[[], float]) -> float:
    """Seconds of a point, of as many as go together; the first time makes memory warm."""
    config = Landscape()
    fill, some = config._fill(model, directions(model)), range(points.together)
    with points.open():
        points.evaluate(fill, some)
        started = clock()
        float(points.evaluate(fill, some).sum())
        return (clock() - started) / len(some)


def measure(spec: str, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each number of points that go together."""
    torch.manual_seed(0)
    model, side = network(spec)
    model.to(device)
    sets = samples_of(side, arguments.samples, arguments.batch, device)
    auto = Points(model, sets)
    counts = sorted({int(m) for m in arguments.together.split(",")} | {auto.together} - {1})
    made = {(form, n): points_of(model, sets, form, n) for n in counts for form in FORMS}
    alone: list[float] = []
    clock = CLOCKS[arguments.clock]
    ratios: dict[tuple[str, int], list[float]] = {key: [] for key in made}
    for _ in range(arguments.rounds):
        single = points_of(model, sets, "single", 1)
        assert single is not None
        alone.append(seconds_per_point(single, model, clock))
        for key, points in made.items():
            if points is not None:
                ratios[key].append(seconds_per_point(points, model, clock) / alone[-1])
    return [
        {
            "network": spec,
            "together": n,
            "alone_seconds": statistics.median(alone),
            "samples_per_point": auto.n_samples,
            **{form: statistics.median(ratios[form, n]) if ratios[form, n] else None for form in FORMS},
            "auto": f"{auto.form}, {auto.together}",
            "auto_ratio": statistics.median(ratios[auto.form, auto.together]) if auto.together > 1 else 1.0,
        }
        for n in counts
    ]


def show(result: dict[str, Any]) -> None:
    """The table, as markdown."""
    print(
        f"{result['date']}, {result['device_name']} ({result['device']}), torch {result['torch']}, {result['threads']} "
        f"threads, {result['samples']} samples in batches of {result['batch']}, {result['rounds']} rounds, "
        f"{result['clock']} seconds\n"
    )
    print("| network | a point alone, s | together | grouped | vmap | auto takes |\n|---|---|---|---|---|---|")
    for row in result["rows"]:
        ratios = " | ".join("—" if row[form] is None else f"{row[form]:.2f}" for form in FORMS)
        print(f"| {row['network']} | {row['alone_seconds']:.4f} | {row['together']} | {ratios} | {row['auto']} |")
    print(f"\nauto within {LIMIT:g} of one by one: {'met' if result['met'] else 'MISSED'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--together", default="4,16,64")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    runtime.set_threads(arguments.threads)
    device = runtime.pick_device(arguments.device)
    rows = [row for spec in arguments.networks.split(",") for row in measure(spec, arguments, device)]
    result = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "samples": arguments.samples,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "clock": arguments.clock,
        **runtime.describe(device),
        "rows": rows,
        "met": all(row["auto_ratio"] <= LIMIT for row in rows),
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
