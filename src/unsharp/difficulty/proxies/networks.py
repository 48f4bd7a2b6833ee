"""Networks that are trained to be watched: what becomes of each sample while one learns, whatever interrupts it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.artifacts import Workspace, atomic
from unsharp.data.streams import evaluation_batches
from unsharp.difficulty.proxies.base import FORWARD, Cost, Measured, Proxy, Task, check_count, mean_and_error
from unsharp.errors import NonFiniteError, UserError
from unsharp.models.modes import evaluating
from unsharp.training import TrainConfig, initial_model, train

Arrays = dict[str, np.ndarray]
PASSES = "passes"


class Watch(ABC):
    """Looks at a network after each epoch of its training, and adds up what it sees.

    What it has added up lies in `sums`, which is saved with the state of the training, in one file, so that both always
    stand at the same step.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self.task, self.model = task, model
        self.epoch = 0
        """Epochs that were seen."""
        self.passes = 0.0
        """Passes over batches that looking took."""
        self.sums: dict[str, Tensor] = {}
        """(n,) tensors on the host."""

    def after_epoch(self) -> Mapping[str, float]:
        """Look at the network; nothing joins the history."""
        self.epoch += 1
        self.look()
        return {}

    @abstractmethod
    def look(self) -> None:
        """Add to the sums what the network says after epoch `self.epoch`, counted from 1."""

    @abstractmethod
    def result(self) -> Arrays:
        """What came of it: (n,) float64 scores by kind."""

    def state(self) -> dict[str, Any]:
        """All that later looks depend on."""
        return {"epoch": self.epoch, "passes": self.passes, "sums": self.sums}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state` was taken."""
        self.epoch, self.passes = state["epoch"], state["passes"]
        self.sums = {name: t.cpu() for name, t in state["sums"].items()}


class _WatchedPlace(Workspace):
    """A workspace in which the state of a watch stands beside that of the training, in one file."""

    def __init__(self, place: Workspace, watch: Watch) -> None:
        super().__init__(place.path)
        self._watch = watch

    def save_state(self, state: Mapping[str, Any]) -> None:
        super().save_state({**state, "watch": self._watch.state()})

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        state = super().load_state(device)
        if state is not None:
            self._watch.load(state.pop("watch"))
        return state


def seed_of(task: Task, number: int) -> int:
    """Seed of a network: that of the recipe for the first, others that no neighbouring seed has for the rest."""
    if number == 0:
        return task.seed
    return int(np.random.SeedSequence(task.seed, spawn_key=(number,)).generate_state(1, np.uint32)[0] >> 1)


def kept(task: Task, name: str, make: Callable[[Workspace | None], Arrays]) -> Arrays:
    """What `make` gives, made once for the estimate and found again after a kill.

    Args:
        task: The task, whose workspace keeps it in a hidden file.
        name: Name of this part of the work.
        make: Does the work, in a place of its own.
    """
    if task.workspace is None:
        return make(None)
    path, place = task.workspace.file(f".{name}.npz"), task.workspace.file(f".{name}")
    if path.exists():
        with np.load(path) as arrays:
            return dict(arrays)
    place.mkdir(parents=True, exist_ok=True)
    found = make(Workspace(place))
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **found)  # pyright: ignore[reportArgumentType]
    shutil.rmtree(place)
    return found


def train_one(
    task: Task,
    number: int,
    label: str,
    place: Workspace | None,
    *,
    indices: np.ndarray | None = None,
    watch: Callable[[nn.Module], Watch] | None = None,
    until: int | None = None,
) -> tuple[nn.Module, Watch | None, int]:
    """Train one network by the recipe.

    Args:
        task: What is scored.
        number: Which network it is; gives the seed.
        label: Shown with the progress.
        place: Where its state is kept.
        indices: (k,) int64 positions that it is trained on; None for all.
        watch: Makes what looks at it after each epoch.
        until: Epoch after which training ends, on the schedule of all epochs; None for the last.

    Returns:
        The network in evaluation mode, the watch, and the passes over batches that it took.
    """
    assert task.recipe is not None
    config = dataclasses.replace(task.recipe.train, seed=seed_of(task, number))
    model = initial_model(task.recipe.make_model, config.seed, task.device)
    watching = None if watch is None else watch(model)
    record = train(
        model,
        task.samples,
        task.indices if indices is None else indices,
        config,
        make_optimizer=task.recipe.make_optimizer,
        workspace=place if place is None or watching is None else _WatchedPlace(place, watching),
        save_seconds=task.save_seconds,
        on_epoch=None if watching is None else watching.after_epoch,
        stop=None if until is None else lambda row: row["epoch"] >= until,
        progress=task.progress,
        label=label,
    )
    return model.eval(), watching, record.passes


@dataclass(frozen=True, kw_only=True)
class WatchedProxy(Proxy):
    """A proxy that is the mean over networks of what is seen while one is trained.

    Args:
        networks: Networks that are trained, each from other weights and in another order, at least 1; their scores are
            averaged.
    """

    networks: int = 1

    def __post_init__(self) -> None:
        check_count("networks", self.networks)

    @abstractmethod
    def watch(self, task: Task, model: nn.Module) -> Watch:
        """What looks at a network; its result has a score called like this proxy."""

    def until(self, epochs: int) -> int:
        """Epoch after which a network need not be trained further, of so many that the recipe has."""
        return epochs

    def looking(self, epochs: int) -> float:
        """Passes over all samples that looking at one network takes."""
        return FORWARD * epochs

    def cost(self, train: TrainConfig | None) -> Cost:
        if train is None:
            return Cost(0, self.looking(1))
        each = self.until(train.epochs) * train.rule.passes + self.looking(train.epochs)
        return Cost(self.networks, self.networks * each)

    def measure(self, task: Task) -> Measured:
        kind = self.registry.name_of(type(self))
        found = [
            kept(task, f"network-{k}", lambda place, k=k: self._of_one(task, k, place)) for k in range(self.networks)
        ]
        passes = sum(int(arrays.pop(PASSES)) for arrays in found)
        raw, error = mean_and_error(np.stack([arrays[kind] for arrays in found]))
        extras = {name: np.mean([arrays[name] for arrays in found], axis=0) for name in found[0] if name != kind}
        return Measured(raw=raw, standard_error=error, extras=extras, networks=self.networks, passes=passes)

    def _of_one(self, task: Task, number: int, place: Workspace | None) -> Arrays:
        label = f"network {number + 1} of {self.networks}"
        until = self.until(task.train.epochs)
        until = None if until >= task.train.epochs else until
        _, watch, passes = train_one(
            task, number, label, place, watch=lambda model: self.watch(task, model), until=until
        )
        assert watch is not None
        return watch.result() | {PASSES: np.array(passes + round(watch.passes))}


@dataclass(frozen=True, kw_only=True)
class PointProxy(WatchedProxy):
    """A proxy that scores samples by one network as it stands, at certain epochs of its training or given as it is."""

    needs = "either"

    @abstractmethod
    def moments(self, epochs: int) -> Collection[int]:
        """The epochs, counted from 1, after which samples are scored; their scores are averaged."""

    @abstractmethod
    def score(self, model: nn.Module, task: Task, epoch: int) -> Tensor:
        """Score all samples by a network: (n,) float64 tensor on the device. `epoch` is 0 for a given network."""

    @abstractmethod
    def passes_each(self) -> float:
        """Passes over all samples that one scoring takes."""

    def until(self, epochs: int) -> int:
        return max(self.moments(epochs))

    def looking(self, epochs: int) -> float:
        return self.passes_each() * len(self.moments(epochs))

    def watch(self, task: Task, model: nn.Module) -> Watch:
        return _Points(task, model, self)

    def measure(self, task: Task) -> Measured:
        if task.model is None:
            return super().measure(task)
        raw = self.score(task.model, task, 0).cpu().numpy()
        return Measured(raw=raw, passes=round(self.passes_each() * n_batches(task)))


class _Points(Watch):
    """The mean over some epochs of a proxy's scores."""

    def __init__(self, task: Task, model: nn.Module, proxy: PointProxy) -> None:
        super().__init__(task, model)
        self._proxy, self._moments = proxy, set(proxy.moments(task.train.epochs))
        self.sums = {"score": torch.zeros(len(task.samples), dtype=torch.float64)}

    def look(self) -> None:
        if self.epoch in self._moments:
            self.sums["score"] += self._proxy.score(self.model, self.task, self.epoch).cpu()
            self.passes += self._proxy.passes_each() * n_batches(self.task)

    def result(self) -> Arrays:
        kind = self._proxy.registry.name_of(type(self._proxy))
        return {kind: self.sums["score"].numpy() / len(self._moments)}


def early_epoch(early: float, epochs: int) -> int:
    """The epoch, counted from 1, at which a fraction of the epochs is over; at least the first."""
    return max(1, min(epochs, round(early * epochs)))


def check_early(early: float) -> None:
    """Raises: UserError unless `early` is a fraction in (0, 1]."""
    if not (math.isfinite(early) and 0 < early <= 1):
        raise UserError(f"early must be a fraction of the epochs in (0, 1], got {early}")


def n_batches(task: Task) -> int:
    """Batches of training in which each sample comes once, or of evaluation where nothing is trained."""
    size = task.batch_size if task.recipe is None else task.recipe.train.batch_size
    return -(-len(task.samples) // size)


def logits_of(model: nn.Module, task: Task, indices: np.ndarray | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, K) in float64 and labels (B,) of samples, batch by batch, in order, in evaluation mode.

    Nothing is copied to the host.
    """
    with evaluating(model), torch.no_grad(), _full_precision(task):
        for batch in evaluation_batches(task.samples, task.indices if indices is None else indices, task.batch_size):
            logits = model(batch.inputs)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise UserError("the model must return logits of shape (batch, classes)")
            yield logits.double(), batch.labels


def true_class(model: nn.Module, task: Task, indices: np.ndarray | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample, on the device: (n,) bool whether the network is right, and (n,) float64 p and 1 − p of its class.

    Both p and 1 − p come from their logarithms, so that neither is lost where the other is nearly 1.

    Raises:
        NonFiniteError: if a logit is NaN or infinite.
    """
    right, p, rest, finite = [], [], [], []
    for logits, labels in logits_of(model, task, indices):
        log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        right.append(logits.argmax(1) == labels)
        p.append(log_p.exp())
        rest.append(-torch.expm1(log_p))
        finite.append(logits.isfinite().all())
    if not bool(torch.stack(finite).all()):
        raise NonFiniteError("the network's logits are NaN or infinite; its weights or the inputs are broken")
    return torch.cat(right), torch.cat(p), torch.cat(rest)


def _full_precision(task: Task) -> contextlib.AbstractContextManager[Any]:
    stack = contextlib.ExitStack()
    stack.enter_context(runtime.full_float32())
    stack.enter_context(torch.autocast(task.device.type, enabled=False))
    return stack
