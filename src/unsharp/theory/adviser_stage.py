"""The α adviser as a stage: the target is settled, probes are taken, and the advice is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unsharp import config
from unsharp.artifacts import Run, Workspace
from unsharp.difficulty import ForgetSet
from unsharp.evaluation import Outputs, predict
from unsharp.evaluation.accuracy import correctness
from unsharp.stages import SPLIT_FILE, Setting
from unsharp.subject import Subject, check_trained, pick
from unsharp.theory import adviser
from unsharp.tuning.plan import Plan, TuneConfig
from unsharp.tuning.target import Target
from unsharp.unlearning import configure

STAGE = "suggest-alpha"
ALPHA_FILE, CONFIG_FILE = "alpha.json", "unlearn.json"


def suggest_alpha(
    subject: Subject,
    forget: ForgetSet,
    how: TuneConfig,
    out: str | Path | None,
    at: Setting,
    *,
    tolerance: float = adviser.TOLERANCE,
    loss_tolerance: float | None = None,
) -> Run:
    """Suggest α for a run, and write the advice, the configuration of that run, and the forget set.

    Args:
        subject: The trained network.
        forget: What it is to forget.
        how: Method, rule, settings and target, as for a search; what a search alone needs is not read.
        out: Where to write.
        at: Device and the like.
        tolerance: Points of accuracy that may be lost.
        loss_tolerance: Nats by which the losses may rise; None sets no bound on them.

    Raises:
        UserError: for bad input or a missing target, before any work.
    """
    run = configure(how.method, rule=how.rule, seed=how.seed, **how.settings)
    adviser.check(run, tolerance, loss_tolerance)
    plan = Plan(subject, forget, how)
    settings = {
        "checkpoint": subject.digest,
        "origin": subject.origin,
        "forget": forget.hash,
        "unlearn": run,
        "target": {"kind": how.target, "accuracy": how.target_accuracy, "scores": plan.scores_digest},
        "tolerance": {"accuracy": tolerance, "loss": loss_tolerance},
    }

    def work(workspace: Workspace) -> None:
        advice = adviser.advise(
            subject.model,
            subject.splits.train,
            forget,
            run,
            target_of(plan, at),
            unseen=plan.bench.unseen,
            tolerance=tolerance,
            loss_tolerance=loss_tolerance,
            progress=at.progress,
        )
        found = adviser.plain(advice)
        found["unseen"] = None if plan.bench.unseen is None else plan.unseen_name
        workspace.write_json(ALPHA_FILE, found)
        workspace.write_json(SPLIT_FILE, forget.to_dict())
        chosen: dict[str, Any] = config.to_dict(run)
        chosen["method"] = chosen["method"] | {"alpha": advice.alpha}
        workspace.write_json(CONFIG_FILE, chosen)

    return at.perform(out, STAGE, settings, work)


def target_of(plan: Plan, at: Setting) -> Target:
    """The forget accuracy to aim at, from the network's answers on unseen samples, or as it was given."""
    unseen, subject = plan.bench.unseen, plan.subject
    asked = None if unseen is None else predict(subject.model, unseen, np.arange(len(unseen)))
    retained = predict(subject.model, subject.splits.train, pick(plan.bench.retained, adviser.MOST))
    for warning in check_trained(
        Outputs(retained, predict(subject.model, subject.splits.train, plan.forget.indices), asked)
    ):
        at.say(f"warning: {warning}")
    if plan.target is None or asked is None:
        assert plan.how.target_accuracy is not None  # or the plan would have been refused
        return Target(accuracy=plan.how.target_accuracy, kind="given")
    found = plan.target.target(correctness(asked.logits, asked.labels))
    for note in found.notes:
        at.say(f"target: {note}")
    return found
