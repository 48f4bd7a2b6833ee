"""The command that suggests α for NegGrad and Sharp MinMax."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from unsharp.commands.shared import forget_set_of, setting, subject_of
from unsharp.errors import UserError
from unsharp.options import Common, Data, Forget, Method, Network, Number, Text, named


@dataclass(kw_only=True)
class SuggestAlpha(Common, Data, Network, Forget, Method):  # pyright: ignore[reportGeneralTypeIssues]
    """Suggest alpha of NegGrad or Sharp MinMax for a network and a forget set, from two short probes."""

    model: str
    """Checkpoint: a file, or the directory of a run. It is read only."""
    out: Text = None
    """Run directory; named by content under runs/ if left out."""
    tolerance: float = 5.0
    """Points of accuracy on retained and on unseen samples that may be lost."""
    loss_tolerance: Number = None
    """Nats by which the mean loss on retained and on unseen samples may rise; not bounded, if left out."""
    target: str = "auto"
    """How the forget accuracy to aim at is found: auto, classes, matched or scores."""
    target_accuracy: Number = None
    """The forget accuracy to aim at, 0 to 100, if you know it."""
    train_scores: Text = None
    """Difficulty scores of the training samples, FILE[:KEY]; those by which the forget set was chosen, if left out."""
    unseen_scores: Text = None
    """Difficulty scores of the validation or test samples, FILE[:KEY], of the same kind."""

    def run(self) -> dict[str, Any]:
        from unsharp.theory import adviser_stage
        from unsharp.tuning import TuneConfig

        settings = self.unlearn_settings()
        if "alpha" in settings:
            raise UserError("--alpha is what is to be suggested; leave it out")
        how = TuneConfig(
            method=self.method or "neggrad",
            rule=self.rule,
            settings=settings,
            target=self.target,  # pyright: ignore[reportArgumentType]
            target_accuracy=self.target_accuracy,
            train_scores=self.train_scores,
            unseen_scores=self.unseen_scores,
            score_kind=self.score_kind if self.train_scores is not None else None,  # pyright: ignore[reportArgumentType]
            seed=self.seed or 0,
        )
        with setting(self) as at:
            subject = subject_of(self, self.model, at)
            forget = forget_set_of(self, subject)
            run = adviser_stage.suggest_alpha(
                subject, forget, how, self.out, at, tolerance=self.tolerance, loss_tolerance=self.loss_tolerance
            )
        found = run.json(adviser_stage.ALPHA_FILE)
        words = ["unsharp", "unlearn", *named(self), "--split", str(run.path)]
        command = shlex.join([*words, "--config", str(run.path / adviser_stage.CONFIG_FILE)])
        if not self.json:
            print("\n".join([*found["reasons"], f"next: {command}"]))
        return {"run": str(run.path), "stage": run.stage, "reused": run.reused} | found | {"command": command}
