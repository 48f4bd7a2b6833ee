"""Sharpness, curvature, loss surface, ways and distances of several networks on the same samples."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from unsharp.artifacts import Workspace
from unsharp.config import to_dict
from unsharp.errors import UserError, unknown
from unsharp.evaluation.connectivity import Connectivity, Way
from unsharp.evaluation.curvature import Curvature
from unsharp.evaluation.distance import apart, weight_distance
from unsharp.evaluation.features import predict_with_features
from unsharp.evaluation.landscape import Landscape, Normalise, ScaledBy, same_architecture, work_identity
from unsharp.evaluation.mean_loss import Loss, Matrix, MeanLoss, check_whole, cross_entropy, subsample
from unsharp.evaluation.points import BatchNorm, Sets
from unsharp.evaluation.predictions import Predictions, predict
from unsharp.evaluation.sharpness import AverageSharpness, WorstCaseSharpness
from unsharp.progress import SILENT, Progress
from unsharp.surroundings.findings import NETWORKS, ORIGINAL, SETS, UNLEARNED, Findings, gaps, plain
from unsharp.surroundings.keep import Kept

Part = Literal["sharpness", "curvature", "surface", "connectivity", "distance"]
PARTS: tuple[Part, ...] = get_args(Part)
WARM_SECONDS = 1.0
"""A first pass of less than this may be mostly start-up; it is timed again."""


@dataclass(frozen=True)
class Share:
    """What a part will cost.

    Args:
        part: Its name.
        passes: Passes over the samples of all sets, summed over the networks: "values" (forward), "gradients",
            "products"; those of the curvature are the most that it may take.
        seconds: About how long it will take on this device.
    """

    part: str
    passes: dict[str, int]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What is measured around the networks, and how.

    Args:
        parts: What is measured: sharpness, curvature, surface, connectivity, distance; all if left out.
        on: On which samples: retain, forget, test; all if left out.
        n_samples: At most so many samples of each set, drawn by the seed; 0 takes all.
        rho: Radius of the worst case with the geometry of SAM, above 0.
        rho_adaptive: Radius of the worst case with the geometry of ASAM, above 0.
        steps: Ascent steps of each restart, at least 1.
        restarts: Ascents of each worst case, at least 1.
        sigma: Size of the noise of the average case, relative to the root mean square of each tensor, above 0.
        draws: Pairs of noises ±ε of the average case, at least 1.
        matrix: Whose curvature: the Hessian (hessian) or its Gauss–Newton part (ggn).
        largest: How many of the largest eigenvalues, at least 0.
        smallest: How many of the smallest eigenvalues, at least 0.
        most_steps: Lanczos steps at most; as many vectors of the number of weights are in memory.
        trace_draws: Products for the trace, 0 or a multiple of 3 from 6 on.
        density_draws: Random starts of the spectral density, 0 for none.
        density_steps: Lanczos steps of each, at least 2; as many vectors of the number of weights are in memory.
        points: Grid points on each axis of the surface, odd, and places on the ways; at least 3.
        reach: The axes of the surface go from −reach to reach, above 0.
        normalise: How directions of the surface are scaled: filter, tensor or none.
        scaled_by: To whose weights: each network's own, or those of the first network for all.
        batchnorm: BatchNorm's statistics on surfaces and ways: stored, or recomputed at each point over the first set.
        batch_size: Samples that go through together, at least 1.
        seed: Seed of samples, directions, starts and noises.

    Raises:
        UserError: if a value is not as above.
    """

    parts: tuple[Part, ...] | None = None
    on: tuple[Literal["retain", "forget", "test"], ...] | None = None
    n_samples: int = 1000
    rho: float = 0.1
    rho_adaptive: float = 1.0
    steps: int = 10
    restarts: int = 2
    sigma: float = 0.01
    draws: int = 10
    matrix: Matrix = "hessian"
    largest: int = 3
    smallest: int = 1
    most_steps: int = 40
    trace_draws: int = 30
    density_draws: int = 2
    density_steps: int = 30
    points: int = 25
    reach: float = 1.0
    normalise: Normalise = "filter"
    scaled_by: ScaledBy = "own"
    batchnorm: BatchNorm = "stored"
    batch_size: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("parts", PARTS), ("on", SETS)):
            given = getattr(self, name)
            if given is not None and not given:
                raise UserError(f"{name} is empty; name at least one of {', '.join(known)}, or leave it out for all")
            for value in given or ():
                if value not in known:
                    raise unknown(name, value, known)
        check_whole("n_samples", self.n_samples, 0)
        # each refuses what it cannot take
        _ = self.worst("sam"), self.worst("asam"), self.average, self.curvature, self.surface, self.way

    @property
    def wanted(self) -> tuple[Part, ...]:
        """The parts that are measured, in their order."""
        return PARTS if self.parts is None else tuple(part for part in PARTS if part in self.parts)

    def worst(self, geometry: Literal["sam", "asam"]) -> WorstCaseSharpness:
        """The worst case with a geometry."""
        return WorstCaseSharpness(
            rho=self.rho if geometry == "sam" else self.rho_adaptive,
            geometry=geometry,
            **self._of("steps", "restarts", "batch_size", "seed"),
        )

    @property
    def average(self) -> AverageSharpness:
        """The average case."""
        return AverageSharpness(**self._of("sigma", "draws", "batch_size", "seed"))

    @property
    def curvature(self) -> Curvature:
        """The curvature."""
        names = [f.name for f in dataclasses.fields(Curvature) if f.name not in ("tolerance", "estimator")]
        return Curvature(**self._of(*names))

    @property
    def surface(self) -> Landscape:
        """The loss surfaces."""
        names = ("points", "reach", "normalise", "scaled_by", "batchnorm", "batch_size", "seed")
        return Landscape(n_samples=self.n_samples or None, **self._of(*names))

    @property
    def way(self) -> Connectivity:
        """The ways from the original."""
        return Connectivity(n_samples=self.n_samples or None, **self._of("points", "batchnorm", "batch_size", "seed"))

    def _of(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    # --- cost ---------------------------------------------------------------------------------------------------------

    def estimate(self, models: Mapping[str, nn.Module], sets: Sets, *, loss: Loss = cross_entropy) -> list[Share]:
        """What each part will cost, from a few passes of the first network.

        Args and errors are those of `measure`.
        """
        sets = self._checked(models, sets)
        first = next(iter(models.values()))
        taken = sum(len(part) for part in self._drawn(sets).values())
        one = self._seconds_per_sample(first, sets, loss)
        passes = {
            "sharpness": self._passes_of_sharpness(),
            "curvature": {"gradients": 1, "products": self._most_products()},
            "distance": {"values": 1},
        }
        shares = []
        each: float | None = None  # seconds of a point, where they are known
        for part in self.wanted:
            if part in passes:
                times = {kind: n * len(models) for kind, n in passes[part].items()}
                seconds = sum(n * one[kind] * taken for kind, n in times.items())
            elif part == "surface":
                cost = self.surface.estimate(models, sets, loss=loss)
                each, times, seconds = cost.seconds_per_point, {"values": cost.points}, cost.seconds
            else:
                pairs = from_original(models)
                if not pairs:
                    continue
                if each is None:
                    each = self.way.estimate(*next(iter(pairs.values())), sets, loss=loss).seconds_per_point
                times = {"values": self.points * len(pairs)}
                seconds = each * times["values"]
            shares.append(Share(part, times, seconds))
        return shares

    def _passes_of_sharpness(self) -> dict[str, int]:
        counts = {"values": 0, "gradients": 0}
        for how in (self.worst("sam"), self.worst("asam"), self.average):
            for kind, n in how.passes_needed.items():
                counts[kind] += n
        return counts

    def _most_products(self) -> int:
        ends = self.largest + self.smallest
        lanczos = max(self.most_steps, ends) + ends if ends else 0
        return lanczos + self.trace_draws + self.density_draws * self.density_steps

    def _seconds_per_sample(self, model: nn.Module, sets: Sets, loss: Loss) -> dict[str, float]:
        """Seconds of a forward pass, a gradient and a product for a sample, from a batch of the first set."""
        samples, indices = next(iter(sets.values()))
        around = MeanLoss(model, samples, indices[: self.batch_size], loss=loss, batch_size=self.batch_size)
        vector = [torch.ones_like(p) for p in around.params]
        passes: dict[str, Callable[[], Any]] = {
            "values": lambda: float(around.value()),
            "gradients": lambda: float(around.gradient()[0]),
            "products": lambda: float(around.products([vector], self.matrix)[0][0].sum()),
        }
        if "curvature" not in self.wanted:
            del passes["products"]
        found = {}
        for name, run in passes.items():
            taken = _timed(run)
            found[name] = (taken if taken > WARM_SECONDS else _timed(run)) / around.n
        return found

    # --- work ---------------------------------------------------------------------------------------------------------

    def measure(
        self,
        models: Mapping[str, nn.Module],
        sets: Sets,
        *,
        loss: Loss = cross_entropy,
        workspace: Workspace | None = None,
        save_seconds: float = 60.0,
        progress: Progress = SILENT,
    ) -> Findings:
        """Measure all that is wanted; the networks are left as they were, to the bit.

        Args:
            models: Networks of one architecture: "unlearned" and, where there are any, "original" and "retrained".
                Ways and distances are those from the original, and from the retrained network.
            sets: By name ("retain", "forget", "test") samples and positions, as `task_sets` gives them.
            loss: From logits and labels to a loss for each sample.
            workspace: Where what is finished is kept, from which a killed run goes on; None keeps none.
            save_seconds: Seconds between two savings of the surfaces and of the ways.
            progress: Told of all work.

        Returns:
            The figures, surfaces and ways. A figure whose loss was not finite is None, and `values["reasons"]` says so.

        Raises:
            UserError: if there is no network, or of other architectures or names, or a set is missing.
        """
        sets = self._checked(models, sets)
        started = time.monotonic()
        kept = Kept(workspace, work_identity("surroundings", self, models, sets))
        values: dict[str, Any] = {
            "networks": list(models),
            "sets": {name: {"n": len(part), "whole": len(sets[name][1])} for name, part in self._drawn(sets).items()},
            "settings": to_dict(self),
        }
        values |= self._local(models, sets, loss, kept, progress)
        surfaces, ways = None, {}
        how: dict[str, Any] = {"loss": loss, "save_seconds": save_seconds, "progress": progress}
        if "surface" in self.wanted:
            surfaces = self.surface.measure(models, sets, workspace=kept.room("surface"), **how)
            values["surface"] = plain(surfaces.summary())
            values["surface_about"] = plain({k: v for k, v in surfaces.about.items() if k != "settings"})
        if "connectivity" in self.wanted:
            for name, (first, second) in from_original(models).items():
                room = kept.room(name.replace(" ", "-"))
                ways[name] = self.way.measure(first, second, sets, workspace=room, **how)
            values["connectivity"] = {name: _of_way(way) for name, way in ways.items()}
            if not ways:
                kept.reasons["connectivity"] = "the original network is not there, or there is no other"
        if "distance" in self.wanted:
            values["distance"] = self._distances(models, sets, kept)
        values["gap"] = gaps(Findings(values))
        values["reasons"] = kept.reasons
        values["seconds"] = time.monotonic() - started
        return Findings(values, surfaces, ways)

    def _local(
        self, models: Mapping[str, nn.Module], sets: Sets, loss: Loss, kept: Kept, progress: Progress
    ) -> dict[str, Any]:
        """Sharpness and curvature of each network on each set."""
        measures: dict[str, dict[str, Any]] = {
            "sharpness": {"sam": self.worst("sam"), "asam": self.worst("asam"), "average": self.average},
            "curvature": {"": self.curvature},
        }
        wanted = [part for part in measures if part in self.wanted]
        found: dict[str, Any] = {part: {} for part in wanted}
        total = len(models) * len(sets) * sum(len(measures[part]) for part in wanted)
        if total:
            progress.start(" and ".join(wanted), total)
        for part in wanted:
            for network, model in models.items():
                of = found[part][network] = {}
                for on, indices in self._drawn(sets).items():
                    rows = {}
                    for kind, measure in measures[part].items():
                        name = ".".join(filter(None, (part, network, on, kind)))
                        rows[kind] = kept.get(
                            name,
                            lambda m=measure, net=model, s=sets[on][0], i=indices: m.measure(net, s, i, loss=loss),
                        )
                        progress.advance(note=name)
                    of[on] = rows.get("", rows)
        if total:
            progress.finish()
        return found

    def _distances(self, models: Mapping[str, nn.Module], sets: Sets, kept: Kept) -> dict[str, Any]:
        """How far each pair of networks is apart, in the weights and on each set."""
        said = {
            network: {on: self._said(model, sets[on][0], part, kept) for on, part in self._drawn(sets).items()}
            for network, model in models.items()
        }
        found = {}
        names = list(models)
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                rows: dict[str, Any] = {"weights": plain(weight_distance(models[one], models[other]))}
                for on in sets:
                    first, second = said[one][on], said[other][on]
                    rows[on] = None if first is None or second is None else plain(apart(first, second))
                found[f"{one} to {other}"] = rows
        return found

    def _said(self, model: nn.Module, samples: Any, indices: np.ndarray, kept: Kept) -> Predictions | None:
        """What the network says, with features where they can be found; None where it is not finite."""
        try:
            return predict_with_features(model, samples, indices, self.batch_size)
        except UserError as error:
            kept.reasons["distance.features"] = str(error)
        try:
            return predict(model, samples, indices, self.batch_size)
        except UserError as error:
            kept.reasons["distance"] = str(error)
            return None

    # --- input --------------------------------------------------------------------------------------------------------

    def _checked(self, models: Mapping[str, nn.Module], sets: Sets) -> Sets:
        """The sets that are wanted, after a look at all input."""
        if odd := [name for name in models if name not in NETWORKS]:
            raise unknown("network", odd[0], NETWORKS)
        if UNLEARNED not in models:
            raise UserError("models lacks 'unlearned', the network that is judged")
        same_architecture(models)
        weights = sum(p.numel() for p in models[UNLEARNED].parameters() if p.requires_grad)
        if "curvature" in self.wanted and self.largest + self.smallest > weights:
            raise UserError(f"largest and smallest together must be at most {weights}, the number of weights")
        if missing := [name for name in self.on or () if name not in sets]:
            raise UserError(f"on names {missing[0]!r}, and there are no such samples; there are {', '.join(sets)}")
        chosen = {name: sets[name] for name in sets if self.on is None or name in self.on}
        if not chosen:
            raise UserError("sets is empty; give at least one set of samples, as {'forget': (samples, indices)}")
        if empty := [name for name, (_, indices) in chosen.items() if not len(indices)]:
            raise UserError(f"the {empty[0]} set is empty; name others with on")
        return chosen

    def _drawn(self, sets: Sets) -> dict[str, np.ndarray]:
        """The positions that are taken of each set, the same as those of surfaces and ways."""
        return {name: subsample(indices, self.n_samples or None, self.seed) for name, (_, indices) in sets.items()}


def from_original(models: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The pairs whose first is the original, by name ("original to unlearned"); none where it is missing."""
    if ORIGINAL not in models:
        return {}
    return {f"{ORIGINAL} to {name}": (models[ORIGINAL], m) for name, m in models.items() if name != ORIGINAL}


def _of_way(way: Way) -> dict[str, Any]:
    rows: dict[str, Any] = {"places": way.places, "about": {k: way.about[k] for k in ("form", "reason")}}
    for i, on in enumerate(way.sets):
        rows[on] = {
            "loss_barrier": way.loss_barrier(on),
            "accuracy_barrier": way.accuracy_barrier(on),
            "loss": way.loss[i],
            "accuracy": way.accuracy[i],
            "standard_error": way.standard_error[i],
        }
    return plain(rows)


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()  # it reads a number, and so waits for the device
    return time.perf_counter() - started
