"""Networks of a memorization pool per hour, and what a thousand of them would take.

    PYTHONPATH=src python benchmarks/pool.py [--data NAME --data-dir PATH] [--classes N --per-class N] [--arch NAME]
                                             [--width N] [--epochs N] [--batch N] [--lr X] [--precision NAME]
                                             [--models N] [--stack N] [--device NAME] [--store DIR]
                                             [--scores FILE:KEY] [--published FILE:KEY] [--json]

Networks are trained to the end on random subsets and asked about all samples, as `unsharp memorize` has it done, in one
process. The time of those that this call trains, first steps included, gives networks per hour; from at least 50 of
them the time for 1,000 is extrapolated, and called so. The aim, 1,000 networks on full CIFAR-100 within an hour, is
judged on an accelerator alone:

    PYTHONPATH=src python benchmarks/pool.py --data cifar100 --data-dir DIR --arch resnet18 --width 16 --epochs 16 \\
        --batch 500 --lr 0.4 --precision bf16 --models 64

Without options a few small networks are trained on the digits, to see that it works. `--store` keeps the networks'
answers, and a later call adds to them. `--scores` correlates the estimate with C-scores, `--published` with published
memorization scores of some samples (FILE:KEY_index has their positions). The 964 of Feldman & Zhang are no random draw:
they are samples of score 0.25 or more that weigh on a test sample, so all of them are memorized, and a correlation
among them is lower than over all samples.

`--data npz --data-dir FILE` reads arrays train_x, train_y, test_x, test_y; then torch, numpy and safetensors suffice,
unless correlations are asked for. Exit code 1 if the aim was judged and missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from unsharp import data, runtime
from unsharp.data import DataConfig, Samples
from unsharp.difficulty.memorization import memorization, spearman
from unsharp.engine import OptimizerConfig
from unsharp.models import ModelConfig
from unsharp.pool.grow import Work, grow, plan_of, pool_of
from unsharp.pool.plan import Plan, PoolConfig
from unsharp.pool.store import PoolOutputs
from unsharp.progress import LineProgress
from unsharp.stages import origin_of
from unsharp.training import TrainConfig

AIMED, LIMIT_HOURS = 1000, 1.0
ENOUGH = 50
"""Networks from which the time of a thousand is extrapolated."""
FULL = 50_000
"""Training samples of full CIFAR-100."""


def main() -> int:
    arguments = parser().parse_args()
    device = runtime.pick_device(arguments.device)
    config = DataConfig(
        name=arguments.data, dir=arguments.data_dir, classes=arguments.classes, per_class=arguments.per_class
    )
    splits = data.load(config, device)
    how = TrainConfig(
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        precision=arguments.precision,
        optimizer=OptimizerConfig(lr=arguments.lr),
    )
    origin = origin_of(ModelConfig(arch=arguments.arch, width=arguments.width), config, how, splits)
    plan = plan_of(origin, splits.train, PoolConfig(seed=0))
    with tempfile.TemporaryDirectory() as unkept:
        measured, outputs = measure(plan, splits.test, Path(arguments.store or unkept), arguments)
    result = {
        "date": datetime.date.today().isoformat(),
        **{k: v for k, v in vars(arguments).items() if k in ("data", "arch", "width", "epochs", "batch", "precision")},
        **runtime.versions(),
        **runtime.describe(device),
        **measured,
        **compared(outputs, splits.train, arguments),
    }
    whole = arguments.data == "cifar100" and len(splits.train) == FULL
    judged = whole and not runtime.is_host(device) and result["hours_for_1000"] is not None
    result["met"] = result["hours_for_1000"] <= LIMIT_HOURS if judged else None
    print(json.dumps(result, indent=1) if arguments.json else table(result))
    return 1 if result["met"] is False else 0


def measure(
    plan: Plan, test: Samples | None, store: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Any], PoolOutputs]:
    """Train what the pool lacks of the networks, and the time of it."""
    work = Work(stack=arguments.stack, keep_weights=False, device=arguments.device).settled(plan)
    todo = len(pool_of(plan, store).missing(range(arguments.models)))
    started = time.monotonic()
    pool = grow(plan, range(arguments.models), store, work, test=test, progress=LineProgress(_aside))
    seconds = time.monotonic() - started
    outputs = pool.outputs()
    had, right = outputs.inside, outputs.train.correct
    found = {
        "samples": len(plan.samples),
        "subset": plan.subsets.size,
        "stack": work.stack,
        "trained": todo,
        "seconds": seconds,
        "per_hour": 3600 * todo / seconds if todo else None,
        "hours_for_1000": AIMED * seconds / todo / 3600 if todo >= ENOUGH else None,
        "networks": len(outputs),
        "train_accuracy": 100 * float(right[had].mean()),
        "held_out_accuracy": 100 * float(right[~had].mean()),
        "test_accuracy": None if outputs.test is None else 100 * float(outputs.test.correct.mean()),
    }
    return found, outputs


def compared(outputs: PoolOutputs, samples: Samples, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rank correlations of the estimate with what others published, where it was named."""
    theirs: dict[str, np.ndarray] = {}
    if arguments.scores is not None:
        from unsharp.difficulty import load_scores

        theirs["cscore"] = -load_scores(arguments.scores, samples, kind="cscore")
    if arguments.published is not None:
        from unsharp.recipes.memorization_check import published_scores

        theirs["published"] = published_scores(arguments.published, samples)
    mem, found = memorization(outputs.inside, outputs.train.correct).memorization, {}
    for name, values in theirs.items():
        both = np.isfinite(mem) & np.isfinite(values)
        found |= {name: spearman(mem[both], values[both]), f"{name}_samples": int(both.sum())}
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    hours, n = result["hours_for_1000"], result["trained"]
    rows = {
        "networks trained to the end in this call": f"{n}",
        "their time, s": f"{result['seconds']:.0f}",
        "networks per hour": "–" if result["per_hour"] is None else f"{result['per_hour']:.0f}",
        "hours for 1,000": f"not extrapolated from fewer than {ENOUGH}"
        if hours is None
        else f"{hours:.2f}, extrapolated from {n}",
        "accuracy on its own subset, %": f"{result['train_accuracy']:.2f}",
        "accuracy on the samples held out, %": f"{result['held_out_accuracy']:.2f}",
        "accuracy on test samples, %": "–" if result["test_accuracy"] is None else f"{result['test_accuracy']:.2f}",
    }
    for name, title in (("cscore", "C-scores"), ("published", "published memorization, a biased sample")):
        if name in result:
            rows[f"rank correlation with {title}"] = f"{result[name]:.2f} ({result[f'{name}_samples']:,} samples)"
    about = (
        f"{result['date']}, {result['device_name']} ({result['device']}), torch {result['torch']}: {result['data']}, "
        f"{result['subset']:,} of {result['samples']:,} samples each, {result['arch']} of width {result['width']}, "
        f"{result['epochs']} epochs, batch {result['batch']}, {result['precision']}, stacks of {result['stack']}"
    )
    verdict = {True: "met", False: "MISSED", None: "not judged (full CIFAR-100 on an accelerator, 50 networks or more)"}
    lines = [about, "", "| figure | measured |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items()), ""]
    return "\n".join([*lines, f"1,000 networks within {LIMIT_HOURS:g} hour: {verdict[result['met']]}"])


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", default="digits")
    found.add_argument("--data-dir")
    found.add_argument("--classes", type=int)
    found.add_argument("--per-class", type=int)
    found.add_argument("--arch", default="small_cnn")
    found.add_argument("--width", type=int, default=8)
    found.add_argument("--epochs", type=int, default=2)
    found.add_argument("--batch", type=int, default=128)
    found.add_argument("--lr", type=float, default=0.1)
    found.add_argument("--precision", default="float32")
    found.add_argument("--models", type=int, default=8)
    found.add_argument("--stack", type=int)
    found.add_argument("--device")
    found.add_argument("--store")
    found.add_argument("--scores")
    found.add_argument("--published")
    found.add_argument("--json", action="store_true", help="print one JSON object")
    return found


def _aside(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
