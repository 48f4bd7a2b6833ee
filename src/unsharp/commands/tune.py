"""The command that searches settings where nobody retrained a network."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from unsharp.commands.shared import forget_set_of, setting, subject_of
from unsharp.errors import UserError
from unsharp.options import METHOD, Common, Data, Forget, Method, Network, Number, Text, Words, named


@dataclass(kw_only=True)
class Tune(Common, Data, Network, Forget, Method):  # pyright: ignore[reportGeneralTypeIssues]
    """Search settings of a method without a retrained network; what you give is fixed, the rest is searched."""

    model: str
    """Checkpoint: a file, or the directory of a run. It is read only."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    search: Words = None
    """Values to search in place of the declared ones, NAME=VALUE,VALUE,...; several may follow each other."""
    budget: Number = None
    """What all trials may cost, in epochs of training; the first trials and a round around the best, if left out."""
    target: str = "auto"
    """How the forget accuracy to aim at is found: auto, classes, matched or scores."""
    target_accuracy: Number = None
    """The forget accuracy to aim at, 0 to 100, if you know it."""
    train_scores: Text = None
    """Difficulty scores of the training samples, FILE[:KEY]; those by which the forget set was chosen, if left out."""
    unseen_scores: Text = None
    """Difficulty scores of the validation or test samples, FILE[:KEY], of the same kind."""
    retain_floor: Number = None
    """Accuracy on the retained samples that must be kept, 0 to 100; the original's less 5 points, if left out."""
    tolerance: float = 0.0
    """Points by which a distance to the target may exceed the least one and still count as equal."""
    processes: int = 1
    """Trials at a time; above 1 each is a process of its own."""

    def run(self) -> dict[str, Any]:
        from unsharp.tuning import TuneConfig, tune_network
        from unsharp.tuning.search import read_search
        from unsharp.tuning.stage import CHOICE_FILE, shown

        if self.processes < 1:
            raise UserError(f"--processes must be at least 1, got {self.processes}")
        if self.processes > 1 and self.threads is None:
            self.threads = max(1, (os.cpu_count() or 1) // self.processes)
        how = TuneConfig(
            method=self.method or METHOD,
            rule=self.rule,
            settings=self.unlearn_settings(),
            search=read_search(self.search or ()),
            target=self.target,  # pyright: ignore[reportArgumentType]
            target_accuracy=self.target_accuracy,
            train_scores=self.train_scores,
            unseen_scores=self.unseen_scores,
            score_kind=self.score_kind if self.train_scores is not None else None,  # pyright: ignore[reportArgumentType]
            retain_floor=self.retain_floor,
            tolerance=self.tolerance,
            budget=self.budget,
            seed=self.seed or 0,
        )
        how.axes()
        with setting(self) as at:
            subject = subject_of(self, self.model, at)
            forget = forget_set_of(self, subject)
            run = tune_network(subject, forget, how, self.out, at, processes=self.processes, again=named(self))
        choice = run.json(CHOICE_FILE)
        if not self.json:
            point = choice["point"]
            print(
                f"{shown(choice['settings'])}: forget accuracy {point['forget_accuracy']:.1f} % (aimed at "
                f"{choice['target']['accuracy']:.1f} %), retain accuracy {point['retain_accuracy']:.1f} %\n"
                f"next: {choice['command']}"
            )
        said = ("settings", "point", "met_floor", "distance", "target", "budget", "warnings", "command", "unlearn")
        return {"run": str(run.path), "stage": run.stage, "reused": run.reused} | {k: choice[k] for k in said}
