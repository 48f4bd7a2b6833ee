"""One trial: a run of unlearning that is looked at after each epoch, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unsharp import config, runtime, unlearning
from unsharp.artifacts import Workspace
from unsharp.data import DataConfig, Samples
from unsharp.difficulty import ForgetSet
from unsharp.errors import NonFiniteError, UserError
from unsharp.evaluation import predict
from unsharp.evaluation.accuracy import accuracy
from unsharp.methods.base import PhasedMethod
from unsharp.models import ModelConfig
from unsharp.progress import SILENT, Progress
from unsharp.sharpness.base import Rule
from unsharp.subject import Subject, load_subject, pick
from unsharp.sweep import Cell, Result, run_cell
from unsharp.unlearning import UnlearnConfig

MOST = 5000
"""So many retained, and so many unseen samples are looked at, evenly spread, where there are more."""
CELL = "unsharp.tuning.trials:trial"


def nested(how: UnlearnConfig) -> bool:
    """Whether a run of these settings passes through the networks with which shorter runs of them end.

    The learning rate must not depend on the length of the run, nor may the method or the rule.
    """
    constant = how.schedule == "constant" and all(s == "constant" for s in how.phase_schedule.values())
    rule = type(how.rule)
    bound = rule.after_step is not Rule.after_step or rule.final_weights is not Rule.final_weights
    method = isinstance(how.method, PhasedMethod) and how.method.nested_epochs
    return method and constant and how.warmup == 0 and not bound


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What every trial of a search has in common.

    Args:
        subject: The original network with its data.
        forget: The forget set.
        unseen: Unseen samples to look at; None where there are none.
        save_seconds: Seconds between two savings of a run's state.
        progress: Told of each batch.
    """

    subject: Subject
    forget: ForgetSet
    unseen: Samples | None
    save_seconds: float = 60.0
    progress: Progress = SILENT

    @property
    def retained(self) -> np.ndarray:
        """All retained positions."""
        return self.forget.retain_indices(len(self.subject.splits.train))

    def look(self, model: nn.Module) -> dict[str, float]:
        """Accuracies (0–100) of a network. Raises: NonFiniteError if it gives no finite answer."""
        train = self.subject.splits.train
        try:
            seen = {
                "retain_accuracy": accuracy(predict(model, train, pick(self.retained, MOST))),
                "forget_accuracy": accuracy(predict(model, train, self.forget.indices)),
            }
            if self.unseen is None:
                return seen
            some = pick(np.arange(len(self.unseen)), MOST)
            return seen | {"unseen_accuracy": accuracy(predict(model, self.unseen, some))}
        except UserError as error:
            raise NonFiniteError(str(error)) from None

    def run(self, how: UnlearnConfig, workspace: Workspace) -> dict[str, Any]:
        """Run a trial, from where a killed one stood.

        Returns:
            "points": for each epoch (the last alone where shorter runs end elsewhere) epochs, accuracies, passes and
            seconds; "passes" of the whole; "failed": why it broke off, or None.
        """
        each = nested(how)
        try:
            network, record = unlearning.run(
                self.subject.model,
                self.subject.splits.train,
                self.forget.indices,
                self.retained,
                how,
                workspace=workspace,
                save_seconds=self.save_seconds,
                on_epoch=self.look if each else None,
                progress=self.progress,
                validation=self.subject.splits.validation,
            )
            if not each:
                last = {"epochs": how.epochs, "passes": record.passes, "seconds": record.seconds}
                return {"points": [last | self.look(network)], "passes": record.passes, "failed": None}
        except NonFiniteError as error:
            state = workspace.load_state(runtime.device_of(self.subject.model))
            if state is None:
                return {"points": [], "passes": 0, "failed": str(error)}
            passes = round(state["at"]["passes"] + state["at"]["other_forwards"] / 3)
            points = [_point(row, {}) for row in state["history"]] if each else []
            return {"points": points, "passes": passes, "failed": str(error)}
        end = record.history[-1]
        before = {name: getattr(record, name) - end[name] for name in ("passes", "seconds")}
        return {"points": [_point(row, before) for row in record.history], "passes": record.passes, "failed": None}


def _point(row: Mapping[str, float], before: Mapping[str, float]) -> dict[str, Any]:
    """What a row of a run's history says; `before` is what was spent before its first step."""
    cost = {name: row[name] + before.get(name, 0) for name in ("passes", "seconds")}
    looked = {name: row[name] for name in ("retain_accuracy", "forget_accuracy", "unseen_accuracy") if name in row}
    return {"epochs": int(row["epoch"]), **looked, **cost}


# --- trials as cells --------------------------------------------------------------------------------------------------

_at_hand: dict[str, Bench] = {}
"""The benches of this process, by the file that describes them."""


@contextlib.contextmanager
def at_hand(file: Path, bench: Bench) -> Iterator[None]:
    """Describe a bench in a file, for other processes, and let trials of this process find it without reading."""
    subject = bench.subject
    description = {
        "checkpoint": str(subject.path.absolute()),
        "device": str(runtime.device_of(subject.model)),
        "model": config.to_dict(subject.origin.model),
        "data": config.to_dict(subject.origin.data),
        "forget": bench.forget.to_dict(),
        "unseen": bench.unseen is not None,
        "save_seconds": bench.save_seconds,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(description))
    _at_hand[str(file)] = bench
    try:
        yield
    finally:
        _at_hand.pop(str(file), None)


def cell(file: Path, how: UnlearnConfig) -> Cell:
    """The trial of these settings at the bench that `file` describes."""
    return Cell(CELL, {"bench": str(file), "how": config.to_dict(how)})


def trial(bench: str, how: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    """Cell: one trial."""
    if bench not in _at_hand:
        _at_hand[bench] = _read(bench)
    return _at_hand[bench].run(config.from_dict(UnlearnConfig, how), workspace)


def _read(file: str) -> Bench:
    about = config.read_json(file)
    subject = load_subject(
        about["checkpoint"],
        torch.device(about["device"]),
        model=config.from_dict(ModelConfig, about["model"]),
        data_config=config.from_dict(DataConfig, about["data"]),
    )
    forget = ForgetSet.from_dict(about["forget"], subject.splits.train)
    unseen = unseen_of(subject) if about["unseen"] else None
    return Bench(subject=subject, forget=forget, unseen=unseen, save_seconds=about["save_seconds"])


def unseen_of(subject: Subject) -> Samples | None:
    """Samples that the network was not trained on: those held out for validation, else the test set."""
    return subject.splits.validation if subject.splits.validation is not None else subject.splits.test


def here(
    cells: Sequence[Cell], store: Path, workers: int | None = None, threads: int = 1
) -> Generator[Result, None, None]:
    """Run cells one after the other in this process; a backend of `run_cells`."""
    for one in cells:
        yield run_cell(one, store)
