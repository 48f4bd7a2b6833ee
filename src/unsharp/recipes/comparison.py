"""Methods side by side: the same networks, forget sets and seeds for each, tuned alike, beside retraining.

For each seed one network is trained, and for each forget set one is retrained; every variant starts from the same
original. A variant's settings are chosen from its grid by ToW on seeds of their own, so that no figure of the result
took part in the choice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unsharp import config, runtime, stats
from unsharp.data import DataConfig
from unsharp.difficulty import ForgetConfig, ForgetSet, choose
from unsharp.errors import UserError
from unsharp.models import ModelConfig
from unsharp.progress import SILENT, Progress
from unsharp.stages import METRICS_FILE, Setting, find_reference, train_network, unlearn_and_judge
from unsharp.subject import Subject, load_subject
from unsharp.sweep import Cell, SweepError, report, run_cells
from unsharp.training import TrainConfig
from unsharp.unlearning import UnlearnConfig, configure

HERE = "unsharp.recipes.comparison"
QUICK_ATTACKS = ("svc_confidence",)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method under a rule, with the grid from which its settings are chosen.

    Args:
        method: Name of the method.
        rule: Name of the rule; None takes the method's default.
        settings: Fixed settings.
        grid: Settings to choose from, a list of values for each; every combination is tried.
        name: What the pages call it; None leaves it to the settings.
    """

    method: str
    rule: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    name: str | None = None

    def points(self) -> list[dict[str, Any]]:
        """The combinations of the grid, each with the fixed settings."""
        return [self.settings | dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())]

    def unlearn_config(self, point: Mapping[str, Any], seed: int) -> UnlearnConfig:
        """The configuration of one point for one seed."""
        return configure(self.method, rule=self.rule, **point, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A forget set by name."""

    name: str
    forget: ForgetConfig


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Args:
        data: The data.
        model: The network.
        train: How it is trained; the seed is put in.
        tasks: The forget sets.
        variants: The methods.
        attacks: Membership attacks of the result; None for all.
        judged_on: What stands for unseen samples: the test set, or the validation set where settings are chosen.
    """

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    tasks: tuple[Task, ...]
    variants: tuple[Variant, ...]
    attacks: tuple[str, ...] | None = None
    judged_on: Literal["test", "validation"] = "test"

    def task(self, name: str) -> Task:
        """The task of that name. Raises: UserError if there is none."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise UserError(f"there is no task {name!r}; there are {', '.join(t.name for t in self.tasks)}")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A settled or tried setting of a variant."""

    variant: Variant
    settings: dict[str, Any]


def compare(
    what: Comparison,
    root: str | Path,
    *,
    seeds: Sequence[int],
    points: Sequence[Point],
    workers: int | None = None,
    threads: int = 1,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Run every point on every task and seed; called again after a kill, it goes on.

    Args:
        what: Data, network, tasks.
        root: Directory of all runs.
        seeds: Seeds; each has an original and retrained networks of its own.
        points: Variants with their settings.
        workers: Processes at a time.
        threads: Torch threads of each.
        progress: Told of each finished cell.

    Returns:
        The facts and metrics of each run, as a report takes them, with the task's name under "task".

    Raises:
        SweepError: if a cell failed; what was finished is kept.
    """
    root = Path(root).absolute()
    shared = {"what": config.to_dict(what), "root": str(root)}
    pool = {"store": root / "cells", "workers": workers, "threads": threads, "progress": progress}
    tasks = [t.name for t in what.tasks]
    _done(run_cells([Cell(f"{HERE}:train_one", shared | {"seed": s}) for s in seeds], **pool))
    pairs = [shared | {"seed": s, "task": t} for s in seeds for t in tasks]
    _done(run_cells([Cell(f"{HERE}:retrain_one", pair) for pair in pairs], **pool))
    each = [pair | {"point": config.to_dict(point)} for point in points for pair in pairs]
    return _done(run_cells([Cell(f"{HERE}:unlearn_one", arguments) for arguments in each], **pool))


def tune(
    what: Comparison, root: str | Path, *, seeds: Sequence[int], tasks: Sequence[str] | None = None, **pool: Any
) -> tuple[list[Point], list[dict[str, Any]]]:
    """Choose each variant's settings: the point of its grid with the highest mean ToW over these seeds and tasks.

    Where the data hold samples out for validation, ToW is taken with these in place of the test set.

    Args:
        what: What is compared.
        root: Directory of all runs.
        seeds: Seeds of the choice alone.
        tasks: Names of the tasks on which to choose; all by default.
        **pool: As for `compare`.

    Returns:
        A point per variant, and a row per point tried: method, rule, settings, mean ToW.
    """
    chosen_tasks = what.tasks if tasks is None else tuple(what.task(name) for name in tasks)
    unseen = "test" if what.data.validation is None else "validation"
    quick = dataclasses.replace(what, tasks=chosen_tasks, attacks=QUICK_ATTACKS, judged_on=unseen)
    tried = [Point(variant=v, settings=p) for v in what.variants for p in v.points()]
    runs = compare(quick, root, seeds=seeds, points=tried, **pool)
    per_point = len(seeds) * len(chosen_tasks)
    scores = [
        stats.mean_interval([r["metrics"]["tow"] for r in runs[i * per_point : (i + 1) * per_point]]).mean
        for i in range(len(tried))
    ]
    best = [
        max((i for i, point in enumerate(tried) if point.variant == v), key=lambda i: scores[i]) for v in what.variants
    ]
    rows = [
        {
            "name": point.variant.name,
            "method": point.variant.method,
            "rule": point.variant.rule,
            "settings": point.settings,
            "tow": scores[i],
            "chosen": i in best,
        }
        for i, point in enumerate(tried)
    ]
    return [tried[i] for i in best], rows


def train_one(what: dict[str, Any], root: str, seed: int) -> dict[str, Any]:
    """Cell: the original network of a seed."""
    plan = config.from_dict(Comparison, what)
    how = dataclasses.replace(plan.train, seed=seed)
    run = train_network(plan.model, plan.data, how, _original(plan, root, seed), _setting(root))
    return run.json(METRICS_FILE)


def retrain_one(what: dict[str, Any], root: str, seed: int, task: str) -> None:
    """Cell: the network of a seed retrained without a task's forget set."""
    subject, forget = _problem(config.from_dict(Comparison, what), root, seed, task)
    find_reference(subject, forget, _setting(root))


def unlearn_one(what: dict[str, Any], root: str, seed: int, task: str, point: dict[str, Any]) -> dict[str, Any]:
    """Cell: one point on one task and seed, evaluated."""
    plan = config.from_dict(Comparison, what)
    subject, forget = _problem(plan, root, seed, task)
    settled = config.from_dict(Point, point)
    how = settled.variant.unlearn_config(settled.settings, seed)
    at = _setting(root)
    place = unlearned_at(root, subject, forget, how)
    _, facts = unlearn_and_judge(subject, forget, how, place, at, attacks=plan.attacks)
    facts.pop("ids")
    return facts | {"task": task, "variant": settled.variant.name, "training_seed": seed}


def unlearned_at(root: str | Path, subject: Subject, forget: ForgetSet, how: UnlearnConfig) -> Path:
    """Where the network stands that forgot so."""
    return Path(root) / "unlearned" / config.digest(config.to_dict(how), subject.digest, forget.hash)[:16]


def _problem(plan: Comparison, root: str, seed: int, task: str) -> tuple[Subject, ForgetSet]:
    subject = load_subject(_original(plan, root, seed), _setting(root).device, data_config=plan.data)
    if plan.judged_on == "validation":
        subject = dataclasses.replace(subject, splits=subject.splits._replace(test=subject.splits.validation))
    return subject, choose(plan.task(task).forget, subject.splits.train)


def _original(plan: Comparison, root: str, seed: int) -> Path:
    made = config.digest(plan.data, plan.model, plan.train)[:12]
    return Path(root) / "originals" / f"{made}-seed{seed}"


def _setting(root: str) -> Setting:
    return Setting(device=runtime.pick_device(None), store=Path(root) / "references")


def _done(results: Sequence[Any]) -> list[Any]:
    failures = report(results)
    if failures:
        raise SweepError(failures)
    return [result.value for result in results]
