"""Two networks of one architecture: the loss on the straight way between their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.artifacts import Workspace
from unsharp.config import to_dict
from unsharp.errors import unknown
from unsharp.evaluation.distance import Distance, weight_distance
from unsharp.evaluation.landscape import Keeper, same_architecture, work_identity
from unsharp.evaluation.mean_loss import Loss, check_whole, cross_entropy
from unsharp.evaluation.points import (
    SUMS,
    BatchNorm,
    Cost,
    Fill,
    Kind,
    Points,
    Sets,
    chosen,
    cost_of,
    figures,
)
from unsharp.pool.grouped import tensors_of
from unsharp.progress import SILENT, Progress


@dataclass(frozen=True)
class Barrier:
    """How far a curve rises above the straight line between its ends.

    Args:
        height: Largest difference to the line, at least 0; for an accuracy the largest fall below it, in points.
        at: Where on the way that is, in [0, 1].
        above_ends: Largest value on the way minus the mean of both ends (Frankle et al.); for an accuracy the mean of
            both ends minus the smallest value.
    """

    height: float
    at: float
    above_ends: float


@dataclass(frozen=True, eq=False)
class Way:
    """What lies on the straight way between two networks.

    Args:
        sets: Names of the sets.
        places: (T,) from 0, the first network, to 1, the second.
        loss: (sets, T) float64 mean losses.
        accuracy: (sets, T) float64, 0–100.
        standard_error: (sets, T) float64, of the losses as estimates for the whole sets.
        n: Samples that were taken of each set.
        distance: What `weight_distance` says of the two.
        about: Settings and the form of evaluation.
    """

    sets: tuple[str, ...]
    places: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    standard_error: np.ndarray
    n: dict[str, int]
    distance: Distance
    about: dict[str, Any]

    def loss_barrier(self, on: str) -> Barrier:
        """The barrier in the loss on a set."""
        return barrier(self.places, self.loss[self._place(on)])

    def accuracy_barrier(self, on: str) -> Barrier:
        """The barrier in the accuracy on a set, in points."""
        return barrier(self.places, -self.accuracy[self._place(on)])

    def _place(self, on: str) -> int:
        if on not in self.sets:
            raise unknown("set", on, self.sets)
        return self.sets.index(on)


def barrier(places: np.ndarray, values: np.ndarray) -> Barrier:
    """The barrier of a curve, given at places from 0 to 1; not finite where a value is not."""
    places, values = np.asarray(places, float), np.asarray(values, float)
    excess = values - ((1 - places) * values[0] + places * values[-1])
    top = int(np.argmax(excess))
    return Barrier(float(excess[top]), float(places[top]), float(values.max() - (values[0] + values[-1]) / 2))


@dataclass(frozen=True, kw_only=True)
class Connectivity:
    """Linear mode connectivity: loss and accuracy at (1 − t)·w₀ + t·w₁ for t from 0 to 1.

    Args:
        points: Places on the way, both ends among them, at least 3.
        batchnorm: "stored" goes straight from the one network's BatchNorm statistics to the other's, "recomputed"
            averages them anew at each place, the ends among them, over the first of the sets.
        n_samples: At most so many samples of each set, drawn at random; None takes all.
        form: "auto", or how places are evaluated: "single", "grouped", "vmap".
        batch_size: Samples that go through together, at least 1.
        seed: Seed of the samples.

    Raises:
        UserError: if a value is not as above.

    Source: Frankle et al., ICML 2020 (arXiv 1912.05671); BatchNorm's statistics anew: Jordan et al., ICLR 2023 (arXiv
    2211.08403).
    """

    points: int = 25
    batchnorm: BatchNorm = "stored"
    n_samples: int | None = 2000
    form: Kind = "auto"
    batch_size: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("points", self.points, 3)
        check_whole("batch_size", self.batch_size)
        check_whole("seed", self.seed, 0)
        if self.n_samples is not None:
            check_whole("n_samples", self.n_samples)
        for name, known in (("batchnorm", BatchNorm), ("form", Kind)):
            if getattr(self, name) not in get_args(known):
                raise unknown(name, getattr(self, name), get_args(known))

    def estimate(self, first: nn.Module, second: nn.Module, sets: Sets, *, loss: Loss = cross_entropy) -> Cost:
        """What it will cost, from a few places. Args and errors are those of `measure`."""
        same_architecture({"first": first, "second": second})
        measured = chosen(sets, self.n_samples, self.batch_size, self.seed, next(first.parameters()).dtype)
        points = Points(first, measured, loss=loss, form=self.form, batchnorm=self.batchnorm)
        return cost_of(points, self._fill(first, second), self.points)

    def measure(
        self,
        first: nn.Module,
        second: nn.Module,
        sets: Sets,
        *,
        loss: Loss = cross_entropy,
        workspace: Workspace | None = None,
        save_seconds: float = 60.0,
        progress: Progress = SILENT,
    ) -> Way:
        """Go from the one network to the other; both are left as they were, to the bit.

        Args:
            first: The network at 0.
            second: The network at 1, of the same architecture.
            sets: By name (samples, positions), as `task_sets` gives them.
            loss: From logits and labels to a loss for each sample.
            workspace: Where the places so far are kept, from which a killed run goes on; None keeps none.
            save_seconds: Seconds between two savings.
            progress: Told of each place.

        Raises:
            UserError: if the architectures differ, or there is no set, or the workspace holds other work.
        """
        models = {"first": first, "second": second}
        same_architecture(models)
        measured = chosen(sets, self.n_samples, self.batch_size, self.seed, next(first.parameters()).dtype)
        points = Points(first, measured, loss=loss, form=self.form, batchnorm=self.batchnorm)
        sums = torch.zeros(self.points, len(measured), SUMS, dtype=torch.float64)
        keeper = Keeper(workspace, work_identity("connectivity", self, models, sets), save_seconds, sums)
        progress.start("connectivity", self.points, done=keeper.done)
        keeper.through(points, self._fill(first, second), 0, self.points, sums, progress)
        progress.finish()
        found = figures(sums.numpy(), measured)
        return Way(
            sets=tuple(m.name for m in measured),
            places=self.places,
            loss=found.loss.T.copy(),
            accuracy=found.accuracy.T.copy(),
            standard_error=found.standard_error.T.copy(),
            n={m.name: m.batches.n for m in measured},
            distance=weight_distance(first, second),
            about={"settings": to_dict(self), "form": points.form, "reason": points.reason},
        )

    @property
    def places(self) -> np.ndarray:
        """(points,) from 0 to 1."""
        return np.linspace(0.0, 1.0, self.points)

    def _fill(self, first: nn.Module, second: nn.Module) -> Fill:
        theirs = dict(tensors_of(second))
        ends = {
            name: (t.detach().clone(), theirs[name].detach().to(t.device))
            for name, t in tensors_of(first)
            if t.is_floating_point()
        }
        names, places = list(ends), self.places.tolist()
        start, end = ([pair[i] for pair in ends.values()] for i in (0, 1))

        def fill(point: int, targets: Mapping[str, Tensor]) -> None:
            t = places[point]
            there = [targets[name] for name in names]
            # the ends are to be the networks themselves, to the bit
            torch._foreach_copy_(there, end if t == 1.0 else start)
            if 0.0 < t < 1.0:
                torch._foreach_lerp_(there, end, t)

        return fill
