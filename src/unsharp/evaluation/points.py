"""Losses and accuracies of one architecture at many settings of its weights, one by one or many at a time."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unsharp import runtime
from unsharp.data.samples import Samples
from unsharp.difficulty import ForgetSet
from unsharp.errors import UserError, unknown
from unsharp.evaluation.mean_loss import Batches, Loss, cross_entropy, subsample
from unsharp.models.modes import evaluating
from unsharp.pool.grouped import CannotStack, Form, Grouped, Mapped, tensors_of

Kind = Literal["auto", "single", "grouped", "vmap"]
BatchNorm = Literal["stored", "recomputed"]
Fill = Callable[[int, Mapping[str, Tensor]], None]
"""Writes the weights and buffers of a point, given by its number, into tensors named as the network's."""
Sets = Mapping[str, "tuple[Samples, np.ndarray]"]
"""Samples by the name of the set, each with the positions that are meant."""

SUMS = 3
"""Sum of the losses, sum of their squares, number of right answers."""
TOGETHER_BYTES = {True: 4 * 2**20, False: 2**30}
"""The outputs of the largest layer take at most so much for all points that go together: on a host, elsewhere."""
FORMS = {True: ("grouped",), False: ("grouped", "vmap")}
"""What "auto" tries, in this order: on a host, elsewhere."""
MOST = 64
TOLERANCE = 1e-3
"""Largest difference of logits between a form and the network itself, relative to the largest logit."""


def task_sets(train_set: Samples, test_set: Samples | None, forget: ForgetSet) -> dict[str, tuple[Samples, np.ndarray]]:
    """The sets of an unlearning task: "retain", "forget" and, where there is one, "test"."""
    sets = {
        "retain": (train_set, forget.retain_indices(len(train_set))),
        "forget": (train_set, forget.indices),
    }
    return sets if test_set is None else sets | {"test": (test_set, np.arange(len(test_set)))}


@dataclass(frozen=True, eq=False)
class Measured:
    """The samples on which points are evaluated.

    Args:
        name: Name of the set.
        batches: The samples, or a random part of them.
        whole: Number of samples of the whole set.
    """

    name: str
    batches: Batches
    whole: int


def chosen(sets: Sets, n_samples: int | None, batch_size: int, seed: int, dtype: torch.dtype) -> list[Measured]:
    """At most `n_samples` of each set, drawn at random by the seed; all where it is None."""
    if not sets:
        raise UserError("sets is empty; give at least one set of samples, as {'forget': (samples, indices)}")
    found = []
    for name, (samples, indices) in sets.items():
        part = subsample(np.asarray(indices), n_samples, seed)
        found.append(Measured(name, Batches(samples, part, batch_size, dtype), len(indices)))
    return found


class Points:
    """Evaluates points, in evaluation mode, in full float32; nothing is copied to the host until it is asked for.

    Args:
        model: The network; it is written to meanwhile, and is as it was after `close`, to the bit.
        sets: The samples.
        loss: From logits and labels to a loss for each sample.
        form: "single" evaluates one point after the other; "grouped" makes one network with the channels of many
            points, "vmap" maps one over stacked weights; "auto" takes what was measured to be quickest on this kind of
            device. What does not fit the network falls back to "single", and `reason` says why.
        batchnorm: "stored" takes the statistics that come with a point, "recomputed" averages them anew at each point
            over the first of the sets; then points go one by one.

    Attributes:
        form: The form that was chosen.
        together: How many points go together.
        reason: Why the form is not the one that was asked for; "" where it is.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: Sequence[Measured],
        *,
        loss: Loss = cross_entropy,
        form: Kind = "auto",
        batchnorm: BatchNorm = "stored",
    ) -> None:
        for name, value, known in (("form", form, get_args(Kind)), ("batchnorm", batchnorm, get_args(BatchNorm))):
            if value not in known:
                raise unknown(name, value, known)
        self._model, self._sets, self._loss = model, list(sets), loss
        self._batchnorm = batchnorm
        self.device = runtime.device_of(model)
        self._own = dict(tensors_of(model))
        self._kept: dict[str, Tensor] | None = None
        self._stack: Form | None = None
        self.form, self.together, self.reason = "single", 1, ""
        self._choose(form)

    @property
    def n_samples(self) -> int:
        """Samples that go forward for one point."""
        extra = self._sets[0].batches.n if self._batchnorm == "recomputed" else 0
        return sum(measured.batches.n for measured in self._sets) + extra

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Within it points can be evaluated; afterwards the network is as it was, to the bit."""
        kept = {name: tensor.detach().clone() for name, tensor in self._own.items()}
        try:
            with (
                torch.no_grad(),
                evaluating(self._model),
                runtime.full_float32(),
                torch.autocast(self.device.type, enabled=False),
            ):
                if self._stack is not None:
                    for j in range(self.together):
                        self._stack.put(j, self._model)
                    self._stack.train(False)
                yield
        finally:
            with torch.no_grad():
                for name, tensor in self._own.items():
                    tensor.copy_(kept[name])

    def evaluate(self, fill: Fill, points: Sequence[int]) -> Tensor:
        """The sums of losses, squared losses and right answers: (len(points), sets, 3) float64, on the device."""
        parts = [points[i : i + self.together] for i in range(0, len(points), self.together)]
        return torch.cat([self._evaluated(fill, part) for part in parts])

    def _evaluated(self, fill: Fill, points: Sequence[int]) -> Tensor:
        if self._stack is None:
            fill(points[0], self._own)
            if self._batchnorm == "recomputed":
                recompute_batchnorm(self._model, self._sets[0].batches)
            forward = self._alone
        else:
            for j, point in enumerate(points):
                fill(point, {name: view[j] for name, view in self._stack.views.items()})
            forward = self._stack.shared_logits
        found = torch.zeros(len(points), len(self._sets), SUMS, dtype=torch.float64, device=self.device)
        for i, measured in enumerate(self._sets):
            for inputs, labels in measured.batches:
                # the last part may be smaller than the stack
                found[:, i] += _sums(forward(inputs)[: len(points)], labels, self._loss)
        return found

    def _alone(self, inputs: Tensor) -> Tensor:
        logits = self._model(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"the model must return logits of shape ({len(inputs)}, classes), got {came}")
        return logits[None]

    # --- the choice of a form ----------------------------------------------------------------------------------------

    def _choose(self, form: Kind) -> None:
        if form == "single":
            return
        if self._batchnorm == "recomputed":
            self.reason = "batchnorm='recomputed' runs each point for itself"
            return
        inputs = next(iter(self._sets[0].batches))[0]
        together = self._fitting(inputs)
        if form == "auto":
            forms = FORMS[runtime.is_host(self.device)] if together > 1 else ()
        else:
            forms, together = (form,), max(2, together)
        reasons = []
        for name in forms:
            try:
                self._stack = self._tried(name, together, inputs)
                self.form, self.together = name, together
                break
            except CannotStack as error:
                reasons.append(f"{name} does not fit this network: {error}")
        self.reason = "; ".join(reasons)

    def _fitting(self, inputs: Tensor) -> int:
        """How many points go together: as many as the outputs of the largest layer leave room for."""
        largest = [inputs.nbytes // len(inputs)]

        def note(module: nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, Tensor):
                largest.append(output.nbytes)

        handles = [module.register_forward_hook(note) for module in self._model.modules()]
        try:
            with torch.no_grad(), evaluating(self._model):
                self._model(inputs[:1])
        finally:
            for handle in handles:
                handle.remove()
        size = max(measured.batches.largest for measured in self._sets)
        return int(np.clip(TOGETHER_BYTES[runtime.is_host(self.device)] // (max(largest) * size), 1, MOST))

    def _tried(self, name: str, n: int, inputs: Tensor) -> Form:
        """The form, after a comparison with the network itself at two settings. Raises: CannotStack."""
        few = inputs[:4]
        try:
            with torch.no_grad(), runtime.full_float32():
                stack = Mapped(self._model, n) if name == "vmap" else Grouped(self._model, n)
                stack.train(False)
                models = [copy.deepcopy(self._model).eval() for _ in range(2)]
                for tensor in models[1].parameters():
                    tensor.mul_(1.25)
                for j, model in enumerate(models):
                    stack.put(j, model)
                found = stack.shared_logits(few)[:2]
                expected = torch.stack([model(few) for model in models])
        except CannotStack:
            raise
        except Exception as error:  # whatever a network does in a form that it was not written for
            raise CannotStack((str(error).strip() or type(error).__name__).splitlines()[0]) from None
        allowed = TOLERANCE * expected.abs().max()
        if found.shape != expected.shape or not bool(((found - expected).abs() <= allowed).all()):
            raise CannotStack("its logits are not those of the network")
        return stack


def _sums(logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """(points, 3) float64 from logits (points, B, K)."""
    n, size, _ = logits.shape
    losses = loss(logits.flatten(0, 1), labels.repeat(n)).view(n, size).double()
    right = (logits.argmax(-1) == labels).sum(1, dtype=torch.float64)
    return torch.stack([losses.sum(1), losses.square().sum(1), right], dim=1)


@torch.no_grad()
def recompute_batchnorm(model: nn.Module, batches: Batches) -> None:
    """Set BatchNorm's running statistics to the mean of those of the batches, with the weights as they are now.

    Everything else stays in evaluation mode (no dropout); other buffers and all modes are as before afterwards.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    with evaluating(model):
        before = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over the batches
            layer.training = True
        try:
            for inputs, _ in batches if layers else ():
                model(inputs)
        finally:
            for layer, momentum in zip(layers, before):
                layer.momentum = momentum


@dataclass(frozen=True)
class Figures:
    """Mean loss, its standard error and accuracy, each (points, sets) float64.

    Args:
        loss: Mean loss.
        standard_error: Of the mean loss, as an estimate for the whole set from the part that was drawn; 0 where the
            part is the whole.
        accuracy: 0–100.
    """

    loss: np.ndarray
    standard_error: np.ndarray
    accuracy: np.ndarray


def figures(sums: np.ndarray, sets: Sequence[Measured]) -> Figures:
    """From sums (points, sets, 3) to the figures."""
    n = np.array([measured.batches.n for measured in sets], float)
    whole = np.array([measured.whole for measured in sets], float)
    mean = sums[..., 0] / n
    with np.errstate(invalid="ignore"):
        variance = np.maximum(sums[..., 1] / n - mean**2, 0.0) * n / np.maximum(n - 1, 1)
    error = np.sqrt(variance / n * (1 - n / whole))
    return Figures(mean, error, 100 * sums[..., 2] / n)


@dataclass(frozen=True)
class Cost:
    """What evaluating points will cost.

    Args:
        points: Number of points.
        samples_per_point: Samples that go forward for one point.
        seconds_per_point: As measured on a few points, on this device.
        seconds: For all points.
        form: How points are evaluated.
        together: How many points go together.
    """

    points: int
    samples_per_point: int
    seconds_per_point: float
    seconds: float
    form: str
    together: int


def cost_of(points: Points, fill: Fill, n: int, networks: int = 1) -> Cost:
    """Measure the cost of a point: the second of two evaluations of as many points as go together.

    Args:
        points: Evaluates them.
        fill: Knows points 0 to n - 1.
        n: Points of a network.
        networks: So many have as many points each.
    """
    some = [j % n for j in range(points.together)]
    whole = n * networks
    taken: list[float] = []
    with points.open():
        for _ in range(2):
            started = time.perf_counter()
            float(points.evaluate(fill, some).sum())  # waits for the device
            taken.append(time.perf_counter() - started)
    each = taken[-1] / len(some)
    return Cost(whole, points.n_samples, each, each * whole, points.form, points.together)
