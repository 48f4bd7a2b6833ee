"""Accuracy on corrupted inputs as a run: `robustness.json` and a figure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from unsharp import artifacts
from unsharp.artifacts import Run, Workspace
from unsharp.data import DataConfig
from unsharp.evaluation.points import Sets, task_sets
from unsharp.evaluation.robustness import Corrupted, Robustness, correct
from unsharp.progress import duration
from unsharp.surroundings.findings import ORIGINAL, RETRAINED, UNLEARNED
from unsharp.training import TrainConfig

if TYPE_CHECKING:
    from unsharp.stages import Setting

STAGE = "robustness"
VALUES_FILE, FIGURE_FILE = "robustness.json", "robustness.svg"


def robustness_run(
    run: str | Path,
    how: Robustness,
    out: str | Path | None,
    at: Setting,
    *,
    original: str | Path | None = None,
    data_config: DataConfig | None = None,
    train_config: TrainConfig | None = None,
) -> Run:
    """Look at the network of an `unlearn` run, the retrained one and the original on corrupted inputs.

    Args:
        run: The run directory.
        how: Which corruptions, and on which samples.
        out: Where to write.
        at: Device and the like.
        original: The checkpoint before unlearning; None leaves it out.
        data_config: Where the data are, if not where they were.
        train_config: How the original was trained, where its checkpoint does not know; without either there is no
            retrained network.

    Raises:
        UserError: for bad input, before any work.
    """
    from unsharp import stages
    from unsharp.report.robustness import curves

    unlearned = stages.open_unlearned(run, at, original=original, data_config=data_config, train_config=train_config)
    subject, forget, before = unlearned.subject, unlearned.forget, unlearned.before
    sets = task_sets(subject.splits.train, subject.splits.test, forget)
    how.taken(sets)
    settings = unlearned.identity | {"robustness": how}

    def work(workspace: Workspace) -> None:
        models: dict[str, nn.Module] = {} if before is None else {ORIGINAL: before.model}
        models[UNLEARNED] = subject.model
        reference, why_not = stages.find_reference(subject, forget, at)
        if reference is None:
            at.say(f"warning: {why_not}")
        else:
            models[RETRAINED] = reference.model
        at.say(f"{how.images(sets):,} images for {len(models)} networks: about {duration(_seconds(models, sets, how))}")
        found = how.measure(models, sets, workspace=workspace, progress=at.progress)
        found["reasons"] = {} if why_not is None else {"gap": why_not}
        workspace.write_json(VALUES_FILE, found)
        artifacts.write_text(workspace.file(FIGURE_FILE), curves(found))

    return at.perform(out, STAGE, settings, work)


def _seconds(models: Mapping[str, nn.Module], sets: Sets, how: Robustness) -> float:
    """About how long it will take, from a batch of the first set under each corruption."""
    samples, indices = next(iter(how.taken(sets).values()))
    some = indices[np.linspace(0, len(indices) - 1, min(len(indices), 32)).astype(int)]
    correct(models, samples, some)
    started = time.perf_counter()
    for corruption in how.wanted:
        correct(models, Corrupted(samples, corruption), some)
    return (time.perf_counter() - started) / (len(some) * len(how.wanted)) * how.images(sets)


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What `robustness.json` says, for a person: a line for each set and network, and one for the difference."""
    lines = []
    for on, one in found["sets"].items():
        for network in found["networks"]:
            lines.append(
                f"{on:<7} {network:<10} clean {one['clean'][network]:5.1f} %, corrupted {one['mean'][network]:5.1f} %: "
                f"{one['drop'][network]:+5.1f} points lost"
            )
        if (gap := one["drop_gap"]) is not None:
            half = "" if gap["half_width"] is None else f" ± {gap['half_width']:.1f}"
            more = f"{abs(gap['mean']):.1f}{half} points {'more' if gap['mean'] >= 0 else 'less'}"
            lines.append(f"{on:<7} the unlearned network loses {more} than the retrained one")
    return lines
