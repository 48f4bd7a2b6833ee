"""A grid settled: data looked at, forget sets chosen, every cell named, and what all of it will cost."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from unsharp import config, runtime
from unsharp.data import Splits, load
from unsharp.data.streams import Stream
from unsharp.difficulty import ForgetSet, choose
from unsharp.errors import UserError
from unsharp.stages import origin_of
from unsharp.sweep import Cell
from unsharp.sweep.grid.cells import HERE
from unsharp.sweep.grid.config import Grid
from unsharp.sweep.grid.variants import Variant, naming
from unsharp.training import TrainConfig
from unsharp.tuning.plan import passes_of
from unsharp.unlearning import UnlearnConfig

TRAIN, RETRAIN, UNLEARN = "train", "retrain", "unlearn"
KINDS = (TRAIN, RETRAIN, UNLEARN)
TIMED_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A place of the grid.

    Args:
        variant: Label of what is compared there.
        forget: Name of the forget set.
        pretraining: Name of the pretraining.
        seed: The seed.
        cell: The cell that does it.
        needs: The cells that train and retrain the networks that it starts from and is put beside.
    """

    variant: str
    forget: str
    pretraining: str
    seed: int
    cell: Cell
    needs: tuple[Cell, Cell]

    def __str__(self) -> str:
        return f"{self.variant}, forget {self.forget}, pretraining {self.pretraining}, seed {self.seed}"


class Plan:
    """Everything that can be settled, and refused, before any cell runs.

    Args:
        grid: What is asked for.

    Raises:
        UserError: if the data, a forget set or the network cannot be had.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        if grid.device is not None:
            runtime.pick_device(grid.device)
        self.variants: dict[str, Variant] = grid.variants()
        self.pretrainings: dict[str, TrainConfig] = grid.pretrainings()
        self.splits: Splits = load(grid.data)
        self.forget: dict[str, ForgetSet] = {}
        for name, chosen in grid.forget_sets().items():
            with naming(f"forget set {name!r}"):
                self.forget[name] = choose(chosen, self.splits.train, id_column=grid.data.id_column)
        self._check_distinct()
        self.model: nn.Module = origin_of(grid.model, grid.data, None, self.splits).build()
        self.jobs: tuple[Job, ...] = tuple(self._jobs())
        needed = {cell.key: cell for job in self.jobs for cell in job.needs}
        self.shared: tuple[Cell, ...] = tuple(needed.values())
        self.whose: dict[str, Job] = {job.cell.key: job for job in self.jobs}

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in the order in which they are done."""
        return (*self.shared, *(job.cell for job in self.jobs))

    def identity(self) -> dict[str, Any]:
        """What the results are named by, beside the grid: data and forget sets, without any id."""
        forget = {n: {"n": len(f), "hash": f.hash, "rule": f.rule} for n, f in self.forget.items()}
        return {"data": {"fingerprint": self.splits.train.fingerprint, "n": len(self.splits.train)}, "forget": forget}

    def title(self, cell: Cell) -> str:
        """What a cell is, in a few words."""
        if cell.key in self.whose:
            return str(self.whose[cell.key])
        job = next(job for job in self.jobs if cell.key in {need.key for need in job.needs})
        without = f" without {job.forget}" if kind_of(cell) == RETRAIN else ""
        return f"training{without}, pretraining {job.pretraining}, seed {job.seed}"

    def _check_distinct(self) -> None:
        """Raises: UserError where two names mean the same: their figures would count twice."""
        for what, named in (
            ("forget sets", {name: chosen.hash for name, chosen in self.forget.items()}),
            ("pretrainings", {name: config.digest(how) for name, how in self.pretrainings.items()}),
            ("variants", {label: config.digest(v.how) for label, v in self.variants.items()}),
        ):
            first: dict[str, str] = {}
            for name, content in named.items():
                if content in first:
                    raise UserError(f"the {what} {first[content]!r} and {name!r} are the same; leave one out")
                first[content] = name

    def _jobs(self) -> list[Job]:
        grid, found = self.grid, []
        base = {"data": grid.data, "model": grid.model, "fingerprint": self.splits.train.fingerprint}
        base["device"] = grid.device
        configs = grid.forget_sets()
        for pretraining, training in self.pretrainings.items():
            for seed in grid.seeds:
                made = base | {"train": dataclasses.replace(training, seed=seed)}
                trained = Cell(f"{HERE}:{TRAIN}", made)
                for forget, chosen in self.forget.items():
                    problem = made | {"forget": configs[forget], "forget_hash": chosen.hash}
                    retrained = Cell(f"{HERE}:{RETRAIN}", problem)
                    for label, variant in self.variants.items():
                        asked = {
                            "unlearn": dataclasses.replace(variant.how, seed=seed),
                            "attacks": None if grid.attacks is None else sorted(grid.attacks),
                            "features": grid.features,
                            "keep_networks": grid.keep_networks,
                        }
                        if grid.judged_on != "test":  # cells made before there was a choice are found again
                            asked["judged_on"] = grid.judged_on
                        found.append(
                            Job(
                                variant=label,
                                forget=forget,
                                pretraining=pretraining,
                                seed=seed,
                                cell=Cell(f"{HERE}:{UNLEARN}", problem | asked),
                                needs=(trained, retrained),
                            )
                        )
        return found

    # --- what it costs ---

    @functools.cached_property
    def passes(self) -> dict[str, float | None]:
        """The forward–backward passes of each cell, by key; None where only a run can tell."""
        n, found = len(self.splits.train), {}
        known: dict[str, float | None] = {}
        for job in self.jobs:
            trained, retrained = job.needs
            training, forget = self.pretrainings[job.pretraining], self.forget[job.forget]
            found[trained.key] = _training_passes(training, n)
            found[retrained.key] = _training_passes(training, n - len(forget))
            label = f"{job.variant}\n{job.forget}"
            if label not in known:
                known[label] = self._unlearning_passes(self.variants[job.variant].how, forget)
            found[job.cell.key] = known[label]
        return found

    def _unlearning_passes(self, how: UnlearnConfig, forget: ForgetSet) -> float | None:
        retained = forget.retain_indices(len(self.splits.train))
        return passes_of(how, self.model, self.splits, forget.indices, retained)

    def weight(self, cell: Cell) -> float:
        """The passes of a cell; of one of which nothing is known, those of the mean one of its kind, or 1."""
        own = self.passes[cell.key]
        if own is not None:
            return max(own, 1.0)
        alike = [p for key, p in self.passes.items() if p is not None and key in self.whose]
        return max(1.0, float(np.mean(alike))) if alike else 1.0

    def estimate(self, done: Collection[str]) -> list[str]:
        """What is to be done, in lines for the user. Args: done: Keys of the cells that are found done."""
        axes = {
            "variants": self.variants,
            "forget sets": self.forget,
            "pretrainings": self.pretrainings,
            "seeds": self.grid.seeds,
        }
        counts = " × ".join(counted(len(of), what) for what, of in axes.items())
        lines = [f"{counted(len(self.jobs), 'cells')}: {counts}"]
        left = [cell for cell in self.cells if cell.key not in done]
        by_kind = {kind: sum(kind_of(c) == kind for c in left) for kind in KINDS}
        names = {TRAIN: "trainings", RETRAIN: "retrainings", UNLEARN: "cells"}
        todo = "to do: " + ", ".join(counted(by_kind[kind], name) for kind, name in names.items())
        if len(left) < len(self.cells):
            todo += f" ({len(self.cells) - len(left)} found done)"
        if left:
            todo += f"; {sum(map(self.weight, left)):,.0f} passes"
            todo += "" if all(self.passes[c.key] is not None for c in left) else " or so, for some methods do not tell"
        return [*lines, todo]

    def table(self) -> list[dict[str, Any]]:
        """Each variant with what a cell of it takes: its passes on each forget set, None where only a run can tell."""
        first = {(job.variant, job.forget): job.cell.key for job in reversed(self.jobs)}
        return [
            {"variant": label, "method": variant.method, "rule": variant.rule, "settings": variant.settings}
            | {"passes": {forget: self.passes[first[label, forget]] for forget in self.forget}}
            for label, variant in self.variants.items()
        ]

    def seconds_per_pass(self) -> float:
        """A forward–backward pass over a batch of the training, timed here in this moment."""
        how = next(iter(self.pretrainings.values()))
        device = runtime.pick_device(self.grid.device)
        samples = load(self.grid.data, device).train if not runtime.is_host(device) else self.splits.train
        model = self.model.to(device).train()
        stream = Stream(samples, np.arange(len(samples)), how.batch_size, 0)
        batch = next(iter(stream.epoch(0, 0, 1)))
        taken: list[float] = []
        end = time.perf_counter() + TIMED_SECONDS
        while len(taken) < 2 or (time.perf_counter() < end and len(taken) < 20):  # the first one warms up
            start = time.perf_counter()
            nn.functional.cross_entropy(model(batch.inputs), batch.labels).backward()
            next(model.parameters()).flatten()[0].item()  # wait until the device has done it
            taken.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
        return min(taken[1:])


def counted(n: int, what: str) -> str:
    """A number of things; `what` is the plural."""
    return f"{n:,} {what if n != 1 else what[:-1]}"


def kind_of(cell: Cell) -> str:
    """What a cell does: train, retrain or unlearn."""
    return cell.function.partition(":")[2]


def _training_passes(how: TrainConfig, n: int) -> float:
    return how.epochs * math.ceil(n / how.batch_size) * float(how.rule.passes)
