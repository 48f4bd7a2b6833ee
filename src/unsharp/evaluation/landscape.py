"""The loss around a network's weights on a plane of two random directions, and figures of how flat it is."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import artifacts
from unsharp.artifacts import Workspace
from unsharp.config import digest, to_dict
from unsharp.data.samples import content_of
from unsharp.errors import UserError, unknown
from unsharp.evaluation.mean_loss import Loss, check_positive, check_whole, cross_entropy, generator
from unsharp.evaluation.points import (
    SUMS,
    BatchNorm,
    Cost,
    Fill,
    Kind,
    Measured,
    Points,
    Sets,
    chosen,
    cost_of,
    figures,
)
from unsharp.pool.grouped import tensors_of
from unsharp.progress import SILENT, Progress

Normalise = Literal["filter", "tensor", "none"]
Include = Literal["weights", "all"]
ScaledBy = Literal["own", "first"]
DIRECTION = 21
STABILITY = (10, 25, 50, 75)
"""Percentages of the loss at the centre at which the stability profile is taken."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Two directions in the space of weights.

    Args:
        first: By name of the parameter, a tensor of its shape.
        second: Likewise.
    """

    first: dict[str, Tensor]
    second: dict[str, Tensor]

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two over all weights; 0 where they are orthogonal."""
        inner, squares = 0.0, [0.0, 0.0]
        for a, b in zip(self.first.values(), self.second.values()):
            inner += float((a.double() * b.double()).sum())
            squares = [s + float(t.double().square().sum()) for s, t in zip(squares, (a, b))]
        return inner / math.sqrt(squares[0] * squares[1]) if all(squares) else 0.0


def directions(
    model: nn.Module, normalise: Normalise = "filter", include: Include = "weights", seed: int = 0
) -> Directions:
    """Two orthogonal Gaussian directions, scaled to the weights of the network.

    The numbers are drawn by the seed alone, one after the other through the parameters, so that networks of one
    architecture get the same. The second is made orthogonal to the first within each part that is scaled by itself, so
    that it stays so after scaling; a part of a single weight is left out of this.

    Args:
        model: The network; parameters that do not require gradients are left out.
        normalise: "filter" scales each filter of a direction (each row of a linear layer) to the norm of the network's
            filter, "tensor" each tensor to the norm of the tensor, "none" nothing.
        include: "weights" leaves out biases and the parameters of normalisation layers (all tensors of one dimension),
            "all" takes them in; each is then scaled as a whole.
        seed: At least 0.

    Source: Li et al., NeurIPS 2018 (arXiv 1712.09913), there without orthogonalisation.
    """
    for name, value, known in (("normalise", normalise, Normalise), ("include", include, Include)):
        if value not in get_args(known):
            raise unknown(name, value, get_args(known))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    draws = generator(seed, DIRECTION, 0), generator(seed, DIRECTION, 1)
    for name, p in model.named_parameters():
        if p.requires_grad:
            raw = [torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.device) for draw in draws]
            if include == "all" or p.ndim > 1:
                found[name] = _scaled(raw[0], raw[1], p.detach(), normalise)
    if not found:
        raise UserError("the model has no trainable weight of two dimensions or more; take include='all'")
    return Directions({name: a for name, (a, _) in found.items()}, {name: b for name, (_, b) in found.items()})


@dataclass(frozen=True)
class Flatness:
    """How flat a surface is, each figure from its losses alone.

    Args:
        centre: The loss in the middle, that of the network itself.
        standard_deviation: Of the losses over the grid.
        mean_gradient: Mean length of the gradient of the surface over the grid, by central differences (one-sided at
            the border), per unit of the axes.
        basin_ratio: Share of grid points whose loss is within half a standard deviation of the centre's.
        stability: For 10, 25, 50, 75 the share of grid points whose loss differs from the centre's by at most so many
            percent of it; each None where the centre's loss is 0.
        not_finite: Number of grid points whose loss is not finite; where there are any, the other figures are None.
    """

    centre: float | None
    standard_deviation: float | None
    mean_gradient: float | None
    basin_ratio: float | None
    stability: dict[int, float | None]
    not_finite: int


def flatness(loss: np.ndarray, axis: np.ndarray) -> Flatness:
    """The flatness figures of a surface.

    Args:
        loss: (A, A) losses, A odd and at least 3.
        axis: (A,) the places of the grid on both axes, increasing.
    """
    loss, axis = np.asarray(loss, float), np.asarray(axis, float)
    if loss.shape != (len(axis), len(axis)) or len(axis) < 3 or len(axis) % 2 == 0:
        raise UserError(
            f"loss must be (A, A) with an odd A of at least 3 and axis (A,), got {loss.shape}, {axis.shape}"
        )
    broken = int((~np.isfinite(loss)).sum())
    middle = len(axis) // 2
    centre = float(loss[middle, middle])
    if broken:
        nothing: dict[int, float | None] = dict.fromkeys(STABILITY)
        return Flatness(centre if math.isfinite(centre) else None, None, None, None, nothing, broken)
    slopes = np.gradient(loss, axis, axis)
    distance, deviation = np.abs(loss - centre), float(loss.std())
    return Flatness(
        centre=centre,
        standard_deviation=deviation,
        mean_gradient=float(np.hypot(slopes[0], slopes[1]).mean()),
        basin_ratio=float((distance <= deviation / 2).mean()),
        stability={
            percent: float((distance <= abs(centre) * percent / 100).mean()) if centre else None
            for percent in STABILITY
        },
        not_finite=0,
    )


@dataclass(frozen=True, eq=False)
class Surfaces:
    """Surfaces of some networks on some sets of samples, over one grid and the same directions.

    Args:
        networks: Names of the networks.
        sets: Names of the sets.
        axis: (A,) the places of the grid on both axes.
        loss: (networks, sets, A, A) float64 mean losses; [..., i, j] is at axis[i] along the first direction and at
            axis[j] along the second.
        accuracy: (networks, sets, A, A) float64, 0–100.
        standard_error: (networks, sets, A, A) float64, of the losses as estimates for the whole sets; 0 where all
            samples were taken.
        n: Samples that were taken of each set.
        about: Settings, the form of evaluation, seconds, and the cosine between the directions for each network.
    """

    networks: tuple[str, ...]
    sets: tuple[str, ...]
    axis: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    standard_error: np.ndarray
    n: dict[str, int]
    about: dict[str, Any]

    def surface(self, network: str, on: str) -> np.ndarray:
        """(A, A) losses of a network on a set."""
        return self.loss[_place("network", network, self.networks), _place("set", on, self.sets)]

    def flatness(self, network: str, on: str) -> Flatness:
        """The flatness figures of a network on a set."""
        return flatness(self.surface(network, on), self.axis)

    def summary(self) -> dict[str, dict[str, Any]]:
        """By network and set: the flatness figures, and the standard error of the centre's loss; plain values."""
        middle = len(self.axis) // 2
        found: dict[str, dict[str, Any]] = {}
        for i, network in enumerate(self.networks):
            found[network] = {}
            for j, name in enumerate(self.sets):
                error = float(self.standard_error[i, j, middle, middle])
                found[network][name] = to_dict(self.flatness(network, name)) | {
                    "centre_standard_error": error if math.isfinite(error) else None
                }
        return found

    def save(self, path: str | Path) -> None:
        """Write all of it to a safetensors file at `path`, whole or not at all."""
        from safetensors.numpy import save_file

        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        about = {name: getattr(self, name) for name in ("networks", "sets", "n", "about")}
        with artifacts.writing(path), artifacts.atomic(path) as temporary:
            save_file(arrays, temporary, metadata={"surfaces": json.dumps(to_dict(about))})

    @classmethod
    def load(cls, path: str | Path) -> Surfaces:
        """Read what `save` wrote. Raises: UserError if the file is missing, broken or of another kind."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise UserError(f"surfaces file {str(path)!r} does not exist")
        try:
            with safe_open(path, "numpy") as file:
                about = json.loads((file.metadata() or {})["surfaces"])
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{str(path)!r} is no whole file of surfaces ({error})") from None
        return cls(networks=tuple(about.pop("networks")), sets=tuple(about.pop("sets")), **about, **arrays)


_ARRAYS = ("axis", "loss", "accuracy", "standard_error")


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Loss surfaces: L(w + a·d₁ + b·d₂) over a square grid of a and b.

    Args:
        points: Grid points on each axis, odd, at least 3.
        reach: The axes go from −reach to reach > 0; at 1 a direction is as long as the weights that it moves.
        normalise: "filter" (Li et al.) scales each filter of a direction to the norm of the network's, "tensor" (Tang &
            Khanna) each tensor, "none" nothing.
        include: "weights" leaves biases and the parameters of normalisation layers where they are, "all" moves them.
        scaled_by: "own" scales the directions to each network's own weights, "first" to those of the first one, so that
            all are moved by the very same vectors.
        batchnorm: "stored" keeps BatchNorm's running statistics, "recomputed" averages them anew at each point over the
            first of the sets.
        n_samples: At most so many samples of each set, drawn at random; None takes all.
        form: "auto", or how points are evaluated: "single", "grouped", "vmap".
        batch_size: Samples that go through together, at least 1.
        seed: Seed of the directions and of the samples.

    Raises:
        UserError: if a value is not as above.

    Source: Li et al., NeurIPS 2018 (arXiv 1712.09913); settings and figures of Tang & Khanna 2026 (arXiv 2506.13715),
    from notes on the published code.
    """

    points: int = 25
    reach: float = 1.0
    normalise: Normalise = "filter"
    include: Include = "weights"
    scaled_by: ScaledBy = "own"
    batchnorm: BatchNorm = "stored"
    n_samples: int | None = 2000
    form: Kind = "auto"
    batch_size: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("points", self.points, 3)
        if self.points % 2 == 0:
            raise UserError(f"points must be odd, so that the network itself is on the grid; got {self.points}")
        check_positive("reach", self.reach)
        check_whole("batch_size", self.batch_size)
        check_whole("seed", self.seed, 0)
        if self.n_samples is not None:
            check_whole("n_samples", self.n_samples)
        known = {
            "normalise": Normalise,
            "include": Include,
            "scaled_by": ScaledBy,
            "batchnorm": BatchNorm,
            "form": Kind,
        }
        for name, values in known.items():
            if getattr(self, name) not in get_args(values):
                raise unknown(name, getattr(self, name), get_args(values))

    @property
    def axis(self) -> np.ndarray:
        """(points,) places of the grid; the middle one is 0."""
        half = np.arange(1, self.points // 2 + 1) * (self.reach / (self.points // 2))
        return np.concatenate([-half[::-1], [0.0], half])

    def estimate(self, models: Mapping[str, nn.Module], sets: Sets, *, loss: Loss = cross_entropy) -> Cost:
        """What it will cost for all networks, from a few points of the first one.

        Args and errors are those of `measure`.
        """
        same_architecture(models)
        model = next(iter(models.values()))
        points = self._points(model, self._chosen(model, sets), loss)
        fill = self._fill(model, directions(model, self.normalise, self.include, self.seed))
        return cost_of(points, fill, self.points**2, len(models))

    def measure(
        self,
        models: Mapping[str, nn.Module],
        sets: Sets,
        *,
        loss: Loss = cross_entropy,
        workspace: Workspace | None = None,
        save_seconds: float = 60.0,
        progress: Progress = SILENT,
    ) -> Surfaces:
        """Evaluate all points; the networks are left as they were, to the bit.

        Args:
            models: Networks of one architecture by name, as {"original": ..., "unlearned": ..., "retrained": ...}.
            sets: By name (samples, positions), as `task_sets` gives them.
            loss: From logits and labels to a loss for each sample.
            workspace: Where the points so far are kept, from which a killed run goes on; None keeps none.
            save_seconds: Seconds between two savings.
            progress: Told of each point.

        Raises:
            UserError: if there is no network or set, or architectures differ, or the workspace holds other work.
        """
        same_architecture(models)
        first = next(iter(models.values()))
        chosen_sets = self._chosen(first, sets)
        n = self.points**2
        sums = torch.zeros(len(models), n, len(chosen_sets), SUMS, dtype=torch.float64)
        keeper = Keeper(workspace, self._identity(models, sets), save_seconds, sums)
        about: dict[str, Any] = {"settings": to_dict(self), "form": {}, "cosine": {}, "moved_weights": None}
        borrowed = directions(first, self.normalise, self.include, self.seed) if self.scaled_by == "first" else None
        progress.start("landscape", len(models) * n, done=keeper.done)
        started = time.monotonic()
        for k, (name, model) in enumerate(models.items()):
            both = borrowed or directions(model, self.normalise, self.include, self.seed)
            about["cosine"][name] = both.cosine
            about["moved_weights"] = sum(t.numel() for t in both.first.values())
            points = self._points(model, chosen_sets, loss)
            about["form"][name] = {"form": points.form, "together": points.together, "reason": points.reason}
            keeper.through(points, self._fill(model, both), k * n, n, sums[k], progress)
        progress.finish()
        about["seconds"] = time.monotonic() - started + keeper.seconds_before
        found = figures(sums.numpy(), chosen_sets)
        shape = (len(models), self.points, self.points, len(chosen_sets))
        grids = [np.moveaxis(f.reshape(shape), 3, 1).copy() for f in (found.loss, found.accuracy, found.standard_error)]
        counts = {measured.name: measured.batches.n for measured in chosen_sets}
        return Surfaces(tuple(models), tuple(counts), self.axis, *grids, n=counts, about=about)

    def _chosen(self, model: nn.Module, sets: Sets) -> list[Measured]:
        dtype = next(model.parameters()).dtype
        return chosen(sets, self.n_samples, self.batch_size, self.seed, dtype)

    def _points(self, model: nn.Module, sets: Sequence[Measured], loss: Loss) -> Points:
        return Points(model, sets, loss=loss, form=self.form, batchnorm=self.batchnorm)

    def _fill(self, model: nn.Module, both: Directions) -> Fill:
        own, axis, size = dict(model.named_parameters()), self.axis.tolist(), self.points
        names = list(both.first)
        start = [own[name].detach().clone() for name in names]
        first, second = list(both.first.values()), list(both.second.values())

        def fill(point: int, targets: Mapping[str, Tensor]) -> None:
            i, j = divmod(point, size)
            there = [targets[name] for name in names]
            torch._foreach_copy_(there, start)
            torch._foreach_add_(there, first, alpha=axis[i])
            torch._foreach_add_(there, second, alpha=axis[j])

        return fill

    def _identity(self, models: Mapping[str, nn.Module], sets: Sets) -> str:
        return work_identity("landscape", self, models, sets)


class Keeper:
    """Takes points one part after the other, and keeps what is done so that a killed run goes on.

    Args:
        workspace: Where it is kept; None keeps nothing.
        identity: What the work is, from which no other goes on.
        save_seconds: Seconds between two savings.
        sums: (..., sets, 3) float64 on the host, filled meanwhile.

    Attributes:
        done: Points done so far.
        seconds_before: Seconds that went into them in earlier runs.

    Raises:
        UserError: if the workspace holds other work.
    """

    def __init__(self, workspace: Workspace | None, identity: str, save_seconds: float, sums: Tensor) -> None:
        self._workspace, self._identity, self._save_seconds = workspace, identity, save_seconds
        self._sums, self.done, self.seconds_before = sums, 0, 0.0
        state = None if workspace is None else workspace.load_state(torch.device("cpu"))
        if state is not None and workspace is not None:
            if state.get("points") != identity:
                raise UserError(f"{workspace.path} holds unfinished work of another kind; take another place")
            sums.copy_(state["sums"])
            self.done, self.seconds_before = state["done"], state["seconds"]
        self._started = self._saved = time.monotonic()

    def through(self, points: Points, fill: Fill, start: int, n: int, into: Tensor, progress: Progress) -> None:
        """Evaluate `n` points, of which those up to `done − start` are known; results go to `into`, (n, sets, 3)."""
        first = min(max(self.done - start, 0), n)
        if first == n:
            return
        found: list[Tensor] = []
        with points.open():
            for at in range(first, n, points.together):
                part = range(at, min(at + points.together, n))
                found.append(points.evaluate(fill, part))
                progress.advance(len(part))
                if time.monotonic() - self._saved >= self._save_seconds:
                    self._take(found, into, start)
                    self._save()
            self._take(found, into, start)
        self._save()

    def _take(self, found: list[Tensor], into: Tensor, start: int) -> None:
        """Bring results to the host, all in one copy."""
        if found:
            new = torch.cat(found).cpu()
            at = max(self.done - start, 0)
            into[at : at + len(new)] = new
            self.done = start + at + len(new)
            found.clear()

    def _save(self) -> None:
        if self._workspace is not None:
            seconds = self.seconds_before + time.monotonic() - self._started
            self._workspace.save_state(
                {"points": self._identity, "sums": self._sums, "done": self.done, "seconds": seconds}
            )
        self._saved = time.monotonic()


def work_identity(kind: str, settings: Any, models: Mapping[str, nn.Module], sets: Sets) -> str:
    """A hash of the settings, the networks' weights and the sets' positions."""
    weights = {}
    for name, model in models.items():
        sha = hashlib.sha256()
        for _, tensor in tensors_of(model):
            sha.update(content_of(tensor))
        weights[name] = sha.hexdigest()
    places = {
        name: [samples.fingerprint, hashlib.sha256(np.asarray(indices, np.int64).tobytes()).hexdigest()]
        for name, (samples, indices) in sets.items()
    }
    return digest(kind, settings, list(weights.items()), list(places.items()))


def same_architecture(models: Mapping[str, nn.Module]) -> None:
    """Raises: UserError if there is no network, or their parameters or buffers differ in name or shape."""
    if not models:
        raise UserError("models is empty; give at least one network, as {'unlearned': model}")
    shapes = {name: {key: tuple(t.shape) for key, t in tensors_of(model)} for name, model in models.items()}
    (first, expected), *others = shapes.items()
    for name, found in others:
        odd = [k for k in {**expected, **found} if expected.get(k) != found.get(k)]
        if odd:
            raise UserError(
                f"models must be of one architecture: {odd[0]} is {expected.get(odd[0], 'missing')} in {first!r} and "
                f"{found.get(odd[0], 'missing')} in {name!r}"
            )


def _scaled(first: Tensor, second: Tensor, weight: Tensor, normalise: Normalise) -> tuple[Tensor, Tensor]:
    """The two raw directions (float64) for a tensor, orthogonal part by part, each part as long as the weight's."""
    rows = len(weight) if normalise == "filter" and weight.ndim > 1 else 1
    a, b, w = (t.reshape(rows, -1) for t in (first, second, weight.double()))
    if a.shape[1] > 1:
        b = b - a * ((a * b).sum(1, keepdim=True) / a.square().sum(1, keepdim=True))
    if normalise != "none":
        length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        a, b = (t * (length / torch.linalg.vector_norm(t, dim=1, keepdim=True)) for t in (a, b))
    return a.reshape(weight.shape).to(weight), b.reshape(weight.shape).to(weight)


def _place(kind: str, name: str, known: Sequence[str]) -> int:
    if name not in known:
        raise unknown(kind, name, known)
    return list(known).index(name)
