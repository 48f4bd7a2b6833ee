"""What a sharpness-aware step costs beside a plain one: time, overhead of its own, memory.

    PYTHONPATH=src python benchmarks/step.py [--arch resnet18] [--width N] [--batch 128] [--steps 15] [--threads N]
                                             [--device NAME] [--json]

Every step is the engine's own, on random images of 32 x 32 pixels, and the variants take turns (A B C D A B C D ...),
so that whatever else the machine does falls on all of them alike. A ratio is the median over the rounds of the
ratio within a round. Exit code 1 if a figure misses its limit.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unsharp import models, runtime
from unsharp.data.samples import Batch, ImageSamples
from unsharp.data.streams import Stream
from unsharp.engine import Loop, LoopConfig
from unsharp.methods import METHODS
from unsharp.methods.base import PhasedMethod, Problem
from unsharp.phases import FORGET, RETAIN
from unsharp.sharpness import NO_RULE, Rule, Sharpness

Step = tuple[list[int], int, dict[str, Batch]]
VARIANTS = {
    "plain": ("finetune", NO_RULE),
    "sam": ("finetune", Sharpness()),
    "neggrad_sam": ("neggrad", Sharpness()),
    "sharp_minmax": ("sharp_minmax", Sharpness()),
}
LIMITS = {
    "SAM step / plain step": 2.05,
    "Sharp MinMax step / NegGrad step under SAM": 1.05,
    "share of a SAM step outside forward and backward, %": 3.0,
    "peak memory of a SAM step over a plain one, copies of the weights": 2.0,
}


class TimedLoop(Loop):
    """A loop that takes single steps and knows how long they were, in all and within forward and backward."""

    seconds_inside = 0.0

    def take_step(self, step: Step) -> tuple[float, float]:
        """Seconds of one step, and of its forward and backward passes."""
        self.seconds_inside = 0.0
        return self._timed(lambda: self._step(*step)), self.seconds_inside

    def endless(self) -> Iterator[Step]:
        """Steps without end, counted on."""
        for taken in itertools.count():
            turn, _, batches = next(self._batches())
            yield turn, taken, batches

    def _evaluation(self, *args: Any) -> Callable[[], Tensor]:
        evaluate = super()._evaluation(*args)

        def timed() -> Tensor:
            loss: list[Tensor] = []
            self.seconds_inside += self._timed(lambda: loss.append(evaluate()))
            return loss[0]

        return timed

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if not runtime.is_host(self.device):
            torch.accelerator.synchronize()


def build_loop(method: PhasedMethod, rule: Rule, arguments: argparse.Namespace, device: torch.device) -> TimedLoop:
    """The method under the rule on a fresh network, the same one for all."""
    runtime.seed_all(0)
    config = models.ModelConfig(arch=arguments.arch, width=arguments.width)
    model = models.build(config, n_classes=100, input_shape=(3, 32, 32)).to(device)
    draw = np.random.default_rng(0)
    n = 4 * arguments.batch
    samples = ImageSamples(
        draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        draw.integers(0, 100, n),
        [str(c) for c in range(100)],
        device=device,
    )
    forget, retain = np.split(np.arange(n), [2 * arguments.batch])
    problem = Problem(model=model, samples=samples, forget=forget, retain=retain, rule=rule)
    streams = {
        name: Stream(samples, positions, arguments.batch, seed=0)
        for name, positions in ((RETAIN, retain), (FORGET, forget))
    }
    phases = method.phases(problem)
    return TimedLoop(model.train(), phases, streams, LoopConfig(batch_size=arguments.batch, check_every=1))


def peak_bytes(loop: TimedLoop, step: Step) -> int:
    """Peak of what the step holds beyond what was there before it, as the allocator saw it."""
    if not runtime.is_host(loop.device):
        before = torch.get_device_module(loop.device).memory_allocated(loop.device)
        with runtime.PeakMemory(loop.device) as memory:
            loop.take_step(step)
        return int(memory.bytes or 0) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loop.take_step(step)
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in changes))


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All figures, from rounds in which the variants take turns."""
    loops = {variant: build_loop(METHODS[m](), rule, arguments, device) for variant, (m, rule) in VARIANTS.items()}  # type: ignore[arg-type]
    steps = {variant: loop.endless() for variant, loop in loops.items()}
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for turn in range(-2, arguments.steps):
        for variant, loop in loops.items():
            spent = loop.take_step(next(steps[variant]))
            if turn >= 0:
                times[variant].append(spent)
    peaks = {variant: peak_bytes(loop, next(steps[variant])) for variant, loop in loops.items()}
    weights = sum(p.nbytes for p in loops["plain"].model.parameters())

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for (x, _), (y, _) in zip(times[a], times[b]))

    outside = {v: 100 * statistics.median(1 - inside / step for step, inside in t) for v, t in times.items()}
    values = (
        ratio("sam", "plain"),
        ratio("sharp_minmax", "neggrad_sam"),
        outside["sam"],
        (peaks["sam"] - peaks["plain"]) / weights,
    )
    return {
        "figures": dict(zip(LIMITS, values)),
        "steps": {
            variant: {
                "seconds": statistics.median(step for step, _ in t),
                "outside_percent": outside[variant],
                "peak_copies": peaks[variant] / weights,
            }
            for variant, t in times.items()
        },
        "weights_bytes": weights,
    }


def show(result: Mapping[str, Any]) -> None:
    """The tables, as markdown."""
    print(
        f"{result['date']}, {result['device_name']} ({result['device']}), torch {result['torch']}, {result['threads']} "
        f"threads, {result['arch']}, batch {result['batch']}, {result['rounds']} rounds\n"
    )
    print("| figure | measured | limit |\n|---|---|---|")
    for name, value in result["figures"].items():
        print(f"| {name} | {value:.3f} | ≤ {LIMITS[name]:g} |")
    print("\n| step | median, s | outside forward and backward, % | peak, copies of the weights |\n|---|---|---|---|")
    for name, row in result["steps"].items():
        print(f"| {name} | {row['seconds']:.4f} | {row['outside_percent']:.2f} | {row['peak_copies']:.2f} |")
    print(f"\nlimits: {'met' if result['met'] else 'MISSED'}")


def options(description: str, *, steps: int) -> argparse.ArgumentParser:
    """What the benchmarks of steps can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=int, help="channels of the first stage; left out, the architecture's own")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=steps, help="rounds that count; two more go before them")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> int:
    arguments = options(__doc__ or "", steps=15).parse_args()
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
    result["met"] = all(result["figures"][name] <= limit for name, limit in LIMITS.items())
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
