"""The search as a stage: trials within a budget, the choice, and the files that tell of them."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unsharp import config, runtime
from unsharp.artifacts import Run, Workspace, atomic, writing
from unsharp.difficulty import ForgetSet
from unsharp.errors import UserError
from unsharp.evaluation import Outputs, predict
from unsharp.evaluation.accuracy import accuracy, correctness
from unsharp.progress import SILENT
from unsharp.stages import REPORT_FILE, SPLIT_FILE, Setting
from unsharp.subject import Subject, check_trained, pick
from unsharp.sweep import run_cells, run_local
from unsharp.tuning import search as lattice
from unsharp.tuning.plan import Plan, TuneConfig
from unsharp.tuning.search import Goal, Place, Point, Trial
from unsharp.tuning.target import Target
from unsharp.tuning.trials import MOST, at_hand, cell, here

CHOICE_FILE, CONFIG_FILE = "choice.json", "unlearn.json"
TRIALS_FILE, TABLE_FILE = "trials.json", "trials.parquet"
RETAIN_LOSS = 5.0
"""Points of retain accuracy that may be lost where the user names no floor."""
FAR = 2.0
"""A distance to the target of more than so many standard errors is no chance."""


def tune_network(
    subject: Subject,
    forget: ForgetSet,
    how: TuneConfig,
    out: str | Path | None,
    at: Setting,
    *,
    processes: int = 1,
    again: Sequence[str] = (),
) -> Run:
    """Search settings, and write the choice, every trial, and a report.

    Args:
        subject: The network before.
        forget: What it is to forget.
        how: What is searched.
        out: Where to write.
        at: Device and the like.
        processes: Trials at a time; above 1 each is a process of its own.
        again: The options that name model and data, for the command that is to follow.

    Raises:
        UserError: for bad input, a missing target, or a budget that pays for no trial, before any work.
    """
    if processes < 1:
        raise UserError(f"processes must be at least 1, got {processes}")
    plan = Plan(subject, forget, how)
    settings = {
        "checkpoint": subject.digest,
        "origin": subject.origin,
        "forget": forget.hash,
        "tune": how,
        "axes": plan.all_axes,
        "scores": plan.scores_digest,
    }

    def work(workspace: Workspace) -> None:
        for line in plan.estimate():
            at.say(line)
        _Work(plan, at, workspace, processes).do(again)

    return at.perform(out, "tune", settings, work)


class _Work:
    """The search itself."""

    def __init__(self, plan: Plan, at: Setting, workspace: Workspace, processes: int) -> None:
        self.plan, self.at, self.workspace, self.processes = plan, at, workspace, processes
        # A hidden directory goes with the end of the run; what is worth keeping of the trials stands in their table.
        self.store = workspace.file(".trials").absolute()
        progress = at.progress if processes == 1 else SILENT
        self.bench = dataclasses.replace(plan.bench, save_seconds=at.save_seconds, progress=progress)
        self.spent, self.seconds, self.fresh = 0, 0.0, 0
        """Passes so far; wall time of the trials that were not found done, and their passes."""

    def do(self, again: Sequence[str]) -> None:
        """Search, choose, write."""
        original = self._original()
        target = self._target(original)
        floor = self.plan.how.retain_floor
        kept = original["retain_accuracy"] - RETAIN_LOSS if floor is None else floor
        self.goal = Goal(target=target.accuracy, floor=max(kept, 0.0), tolerance=self.plan.how.tolerance)
        self.at.say(
            f"aiming at {target.accuracy:.1f} % on the forget set ({target.kind}; the original has "
            f"{original['forget_accuracy']:.1f} %), with at least {self.goal.floor:.1f} % on the retained samples"
        )
        with at_hand(self.store / "bench.json", self.bench):
            self.trials = lattice.explore(
                self.plan.axes,
                self.goal,
                seed=self.plan.how.seed,
                budget=self.plan.budget,
                cost=self.plan.cost,
                run=self._run,
            )
        points = [p for t in self.trials for p in t.points]
        if not points and self.trials:
            raise UserError(
                f"no trial reached the end of an epoch ({self.trials[0].failed}); search lower learning rates, such as "
                "--search lr=0.0001,0.0003,0.001"
            )
        if not points:
            raise UserError("the budget paid for no trial; raise --budget")
        best = lattice.choose(points, self.goal)
        self._write(original, target, best, again)

    # --- what is aimed at ---

    def _original(self) -> dict[str, float]:
        bench, subject = self.bench, self.plan.subject
        retained = predict(subject.model, subject.splits.train, pick(bench.retained, MOST))
        forgotten = predict(subject.model, subject.splits.train, bench.forget.indices)
        self.unseen = (
            None if bench.unseen is None else predict(subject.model, bench.unseen, np.arange(len(bench.unseen)))
        )
        for warning in check_trained(Outputs(retained, forgotten, self.unseen)):
            if self.unseen is not None:
                self.at.say(f"warning: {warning}")
        found = {"retain_accuracy": accuracy(retained), "forget_accuracy": accuracy(forgotten)}
        return found if self.unseen is None else found | {"unseen_accuracy": accuracy(self.unseen)}

    def _target(self, original: Mapping[str, float]) -> Target:
        given = self.plan.how.target_accuracy
        if self.plan.target is None or self.unseen is None:
            assert given is not None  # or the plan would have been refused
            return Target(accuracy=given, kind="given")
        return self.plan.target.target(correctness(self.unseen.logits, self.unseen.labels))

    # --- trials ---

    def _run(self, places: Sequence[Place], first: int) -> list[Trial]:
        """Run trials, or find them done: several at a time, or one after the other, each told of when it ends."""
        file, trials = self.store / "bench.json", []
        for some in [places] if self.processes > 1 else [[place] for place in places]:
            started = time.monotonic()
            results = run_cells(
                [cell(file, self.plan.config_at(place)) for place in some],
                self.store,
                workers=self.processes,
                threads=torch.get_num_threads(),
                progress=self.at.progress if self.processes > 1 else SILENT,
                keep_going=False,
                backend=run_local if self.processes > 1 else here,
            )
            self.seconds += time.monotonic() - started
            self.fresh += sum(r.value["passes"] for r in results if not r.reused)
            for place, result in zip(some, results):
                trials.append(self.plan.trial(first + len(trials), place, result.value))
                self.spent += trials[-1].passes
                self.at.say(self._line(trials[-1]))
        return trials

    def _line(self, trial: Trial) -> str:
        head = f"trial {trial.number + 1} ({shown(lattice.settings_at(self.plan.axes, trial.place)) or 'the only one'})"
        if not trial.points:
            return f"{head}: broke off: {trial.failed}"
        best = lattice.choose(trial.points, self.goal)
        epochs = best.settings.get("epochs")
        after = "" if epochs is None else f" after {epochs} epoch{'s' if epochs > 1 else ''}"
        text = f"{head}: retain {best.retain_accuracy:.1f} %, forget {best.forget_accuracy:.1f} %{after}"
        text += "" if self.goal.met_by(best) else ", below the floor"
        text += f"; {self.spent / self.plan.unit:.4g} epochs of training spent"
        if self.plan.budget is None:
            return text
        minutes = self.seconds / max(self.fresh, 1) * (self.plan.budget - self.spent) / 60
        return text + (f", at most {minutes:.0f} more minutes" if minutes >= 1 else "")

    # --- what is written ---

    def _write(self, original: Mapping[str, float], target: Target, best: Point, again: Sequence[str]) -> None:
        plan, how = self.plan, self.plan.how.at(best.settings)
        rows = [self._row(point, best) for trial in self.trials for point in trial.points]
        warnings = self._warnings(original, target, best)
        for warning in warnings:
            self.at.say(f"warning: {warning}")
        run = str(final_path(self.workspace))
        command = ["unsharp", "forget", *again, "--split", run, "--config", f"{run}/{CONFIG_FILE}"]
        command += ["--out", f"{run}-forgotten"]
        choice = {
            "settings": best.settings,
            "point": {k: v for k, v in dataclasses.asdict(best).items() if k not in ("settings", "trial")},
            "trial": best.trial,
            "met_floor": self.goal.met_by(best),
            "distance": self.goal.distance(best),
            "target": target,
            "goal": self.goal,
            "original": dict(original),
            "searched": plan.all_axes,
            "n_trials": len(self.trials),
            "failed": [{"trial": t.number, "why": t.failed} for t in self.trials if t.failed is not None],
            "budget": {
                "passes": plan.budget,
                "spent_passes": self.spent,
                "passes_per_training_epoch": plan.unit,
                "spent_training_epochs": self.spent / plan.unit,
            },
            "warnings": warnings,
            "command": shlex.join(command),
            "unlearn": how,
            "forget": {"rule": plan.forget.rule, "n": len(plan.forget), "hash": plan.forget.hash},
            "origin": plan.subject.origin,
            "versions": runtime.versions(),
        }
        self.workspace.write_json(CONFIG_FILE, how)
        self.workspace.write_json(CHOICE_FILE, choice)
        self.workspace.write_json(TRIALS_FILE, rows)
        self.workspace.write_json(SPLIT_FILE, plan.forget.to_dict())
        write_table(self.workspace.file(TABLE_FILE), rows)
        from unsharp.report.tuning import write_tuning

        write_tuning(self.workspace.file(REPORT_FILE), config.to_dict(choice), rows)

    def _row(self, point: Point, best: Point) -> dict[str, Any]:
        values = dataclasses.asdict(point)
        return values | {
            "distance": self.goal.distance(point),
            "met_floor": self.goal.met_by(point),
            "chosen": point is best,
        }

    def _warnings(self, original: Mapping[str, float], target: Target, best: Point) -> list[str]:
        found = []
        if not self.goal.met_by(best):
            found.append(
                f"no trial kept {self.goal.floor:.1f} % on the retained samples; the choice is the one that loses "
                f"least ({best.retain_accuracy:.1f} %). Search lower learning rates or a higher alpha, or lower "
                "--retain-floor"
            )
        share, n = self.goal.target / 100, len(self.plan.forget)
        noise = math.hypot(target.error or 0.0, 100 * math.sqrt(max(share * (1 - share), 0.0) / n), 100 / n)
        if abs(original["forget_accuracy"] - self.goal.target) <= noise:
            found.append(
                f"the original's forget accuracy, {original['forget_accuracy']:.1f} %, is at the target already, as "
                "far as chance lets anyone tell: by accuracy there is nothing to forget"
            )
        if self.goal.met_by(best) and self.goal.distance(best) > FAR * noise:
            found.append(
                f"the forget accuracy of the choice, {best.forget_accuracy:.1f} %, is {self.goal.distance(best):.1f} "
                f"points from the target; chance explains about {noise:.1f}. Raise --budget, widen --search, or lower "
                "--retain-floor"
            )
        place = self.trials[best.trial].place
        edges = [n for (n, v), i in zip(self.plan.axes.items(), place) if len(v) > 1 and i in (0, len(v) - 1)]
        if edges:
            found.append(f"the choice is at the edge of what was searched of {', '.join(edges)}; better may lie beyond")
        return found


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the points as parquet, a column for each searched setting."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = [
        {k: v for k, v in row.items() if k != "settings"} | {f"setting.{k}": v for k, v in row["settings"].items()}
        for row in rows
    ]
    with writing(path), atomic(path) as temporary:
        pq.write_table(pa.Table.from_pylist(flat), temporary)


def shown(settings: Mapping[str, Any]) -> str:
    """Settings in a line."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def final_path(workspace: Workspace) -> Path:
    """Where the run of a workspace will stand."""
    return workspace.path.parent / workspace.path.name.removeprefix(".").removesuffix(".partial")
