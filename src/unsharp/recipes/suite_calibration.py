"""Does the evaluation say "no gap" where there is none, and see an untouched network? Repeats with known answers.

    python -m unsharp.recipes.suite_calibration --out DIR

Digits, the network of the quickstart, two forget sets: the 72 hardest samples, and 72 drawn at random, anew in each
repeat. A repeat takes five seeds and gives, for each figure of the suite, a 95 % t interval of the mean gap over them:

- of a network that never saw the forget set: another seed's retrained network. The interval should hold 0 in 95 of 100
  repeats.
- of the original, as if it had been unlearned. The interval should leave 0 out, where the figure looks at the forget
  set.

Figures without a gap (ToW, divergences from the retrained network) compare the original with the network that never saw
the forget set instead. Fixed before the runs: 20 repeats, five seeds each, no seed in two repeats. Since a repeat's
interval has only five values, a figure with few distinct values misses 0 more often than a normal one would; the page
shows each. A killed run goes on where it was. About 50 minutes on one core.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from torch import nn

from unsharp import artifacts, config, data, models, runtime, stats
from unsharp.difficulty import ForgetConfig, choose
from unsharp.errors import unknown
from unsharp.evaluation import METRICS, Judged, gap, judge, outputs
from unsharp.evaluation.suite import COST
from unsharp.progress import BarProgress
from unsharp.recipes import quickstart
from unsharp.recipes.comparison import Comparison, Task
from unsharp.reference import Recipe, retrain
from unsharp.sweep import Cell, SweepError, report, run_cells
from unsharp.training import initial_model, train

HERE = "unsharp.recipes.suite_calibration"
TASKS = ("hardest", "random")
YARDSTICKS = ("half_width", "if_alike")
"""Endings of figures that help to read another."""
OTHER_SEED = 1_000_000
"""Added to a seed to give that of the network that never saw the forget set."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the recipe."""

    out: str
    """Directory of all cells and of the page."""
    repeats: int = 20
    """Repeats."""
    seeds: int = 5
    """Seeds of each repeat."""
    tasks: tuple[str, ...] = TASKS
    """Forget sets: hardest, random."""
    epochs: int = 25
    """Epochs of each network."""
    workers: int | None = None
    """Processes at a time, of one thread each."""


def main(options: Options) -> None:
    """Run all cells, and write `rows.json` and `page.md`."""
    for task in options.tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    what = quickstart.comparison(out, epochs=options.epochs)
    places = [
        (t, r, r * options.seeds + i)
        for t in options.tasks
        for r in range(options.repeats)
        for i in range(options.seeds)
    ]
    cells = [Cell(f"{HERE}:one", {"what": config.to_dict(asked(what, t, r)), "seed": s}) for t, r, s in places]
    with BarProgress() as bar:
        results = run_cells(cells, out / "cells", workers=options.workers, progress=bar)
    if failures := report(results):
        raise SweepError(failures)
    found = [{"task": t, "repeat": r} | dict(result.value) for (t, r, _), result in zip(places, results)]
    rows = [row for task in options.tasks for row in rates([f for f in found if f["task"] == task])]
    artifacts.write_json(out / "rows.json", rows)
    artifacts.write_text(out / "page.md", page(options, rows))
    print(f"wrote {out / 'page.md'}")


def asked(what: Comparison, task: str, repeat: int) -> Comparison:
    """The comparison of one repeat: the forget set that is drawn at random is another in each."""
    drawn = Task(name="random", forget=ForgetConfig(random=quickstart.FORGET, seed=repeat))
    return dataclasses.replace(what, variants=(), tasks=what.tasks if task == "hardest" else (drawn,))


def one(what: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    """Cell: the original, its retrained reference, and another seed's retrained network, judged."""
    plan = config.from_dict(Comparison, what)
    splits, device = data.load(plan.data), runtime.pick_device("cpu")
    samples = splits.train
    forget = choose(plan.tasks[0].forget, samples)
    make = partial(models.build, plan.model, n_classes=samples.n_classes, input_shape=samples.input_shape)

    def judged(network: nn.Module) -> Judged:
        return Judged(outputs(network.eval(), samples, splits.test, forget, features=True))

    def retrained(seed: int) -> Judged:
        recipe = Recipe(make, dataclasses.replace(plan.train, seed=seed))
        return judged(retrain(recipe, samples, forget, device=device).model)

    original = initial_model(make, seed, device)
    train(original, samples, np.arange(len(samples)), dataclasses.replace(plan.train, seed=seed))
    values = judge(
        retrained(seed + OTHER_SEED), reference=retrained(seed), original=judged(original), attacks=None, seed=seed
    )
    return {
        "never": dict(flat(values)),
        "never_gap": dict(flat(values["gap"])),
        "original": dict(flat(values["original"])),
        "original_gap": dict(flat(gap(values["original"], values["reference"]) or {})),
    }


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """The figures of an evaluation by dotted names, without costs and what only helps to read another."""
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in ("gap", "reference", "original", "reasons", "n"):
            yield from flat(value, f"{before}{key}.")
        elif isinstance(value, (int, float)) and key not in (*COST, "seed") and not key.endswith(YARDSTICKS):
            yield before + key, float(value)


def rates(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each figure, in how many repeats its interval held 0 for the network that never saw the forget set, and in
    how many it left 0 out for the original.

    Args:
        found: The cells of one task, each with its "repeat".
    """
    repeats = [[f for f in found if f["repeat"] == r] for r in sorted({f["repeat"] for f in found})]
    rows = []
    for name in found[0]["never"]:
        absolute = is_absolute(name)
        row = {"task": found[0]["task"], "name": name, "absolute": absolute, "repeats": len(repeats)}
        for who in ("never", "original"):
            row[who] = _mean([f[who].get(name) for f in found])
        row["gap"] = _mean([_apart(f, name, absolute) for f in found])
        if not absolute:
            row["held"] = sum(holds_zero([f["never_gap"].get(name) for f in seeds]) is True for seeds in repeats)
        row["told"] = sum(holds_zero([_apart(f, name, absolute) for f in seeds]) is False for seeds in repeats)
        rows.append(row)
    return rows


def is_absolute(name: str) -> bool:
    """Whether a figure compares with the retrained network by itself, so that its ideal is no gap of 0."""
    parts = name.split(".")
    return any(METRICS[part].direction != "to_reference" for part in parts if part in METRICS)


def holds_zero(gaps: Sequence[float | None]) -> bool | None:
    """Whether the 95 % t interval of the mean gap holds 0; None where a gap is missing."""
    known = [g for g in gaps if g is not None]
    if len(known) < len(gaps):
        return None
    interval = stats.mean_interval(known)
    return interval.low is not None and interval.high is not None and interval.low <= 0 <= interval.high


def _apart(found: Mapping[str, Any], name: str, absolute: bool) -> float | None:
    if not absolute:
        return found["original_gap"].get(name)
    ours, theirs = found["original"].get(name), found["never"].get(name)
    return None if ours is None or theirs is None else ours - theirs


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def page(options: Options, rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables in Markdown."""
    versions = runtime.versions()
    asked = "" if options.tasks == TASKS else f" --tasks {' '.join(options.tasks)}"
    lines = [
        f"`python -m unsharp.recipes.suite_calibration --out DIR{asked}`: {options.repeats} repeats of "
        f"{options.seeds} seeds, {options.epochs} epochs, torch {versions['torch']}, on a processor, one thread a run; "
        f"{datetime.date.today().isoformat()}.",
    ]
    for task in options.tasks:
        mine = [row for row in rows if row["task"] == task]
        held = [row["held"] for row in mine if "held" in row]
        share = 100 * sum(held) / (len(held) * options.repeats)
        lines += [
            f"### {task.capitalize()}",
            f"No gap: in {share:.1f} % of the intervals of {len(held)} figures; the least is "
            f"{min(held)} of {options.repeats}.",
            _table(mine),
        ]
    return "\n\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "figure",
        "never saw the set",
        "original",
        "original less retrained",
        "no gap where none is",
        "original told apart",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        held = f"{row['held']} of {row['repeats']}" if "held" in row else "–"
        figures = [_short(row[key]) for key in ("never", "original", "gap")]
        lines.append(f"| `{row['name']}` | {' | '.join(figures)} | {held} | {row['told']} of {row['repeats']} |")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}"


if __name__ == "__main__":
    from unsharp.recipes import suite_calibration

    suite_calibration.main(tyro.cli(suite_calibration.Options, description=__doc__))
