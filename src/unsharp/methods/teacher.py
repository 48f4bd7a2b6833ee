"""Learning from what fixed networks say: the original, or one that knows nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.data.samples import Batch, Samples, TensorSamples
from unsharp.data.streams import evaluation_batches
from unsharp.errors import NonFiniteError, UserError
from unsharp.models.modes import evaluating
from unsharp.phases import Moment, Objective

TABLE_BYTES = 2**28
"""Answers to all samples that need no more than this are computed once, where a sample always looks the same."""
BATCH = 256


def looks_the_same(samples: Samples) -> bool:
    """Whether a training batch shows each sample as an evaluation does, in every epoch."""
    if isinstance(samples, TensorSamples):
        return True
    augmentation = samples.treatment.get("augmentation")
    return augmentation is not None and not any(augmentation.values())


def is_tabulated(samples: Samples, n: int) -> bool:
    """Whether a teacher of n of the samples answers once for the whole run."""
    return looks_the_same(samples) and 4 * n * samples.n_classes <= TABLE_BYTES


def table_passes(samples: Samples, n: int, batch_size: int) -> int:
    """What the answers to n samples cost before the first step, in passes: a third of one for each batch."""
    return math.ceil(math.ceil(n / batch_size) / 3) if is_tabulated(samples, n) else 0


class Teacher:
    """What a fixed network says about some samples, in evaluation mode.

    Where a training batch shows each sample as it is, without augmentation, and the answers fit, they are computed
    once, in float32 and in the order of the positions. Otherwise the network runs on each batch, once however often a
    rule evaluates the loss on it, in the precision of the run.

    Args:
        network: Gives (B, K) logits. It is copied where it is needed later, so it may be trained meanwhile.
        samples: Where the batches come from.
        positions: (k,) int64 positions in the samples that will be asked for.

    Raises:
        NonFiniteError: if an answer that is computed at once is NaN or infinite.
    """

    def __init__(self, network: nn.Module, samples: Samples, positions: np.ndarray) -> None:
        self._network: nn.Module | None = None
        self._said: WeakKeyDictionary[Batch, Tensor] = WeakKeyDictionary()
        if is_tabulated(samples, len(positions)):
            self._table = answers(network, samples, positions)
            self._row = torch.full((len(samples),), -1)
            self._row[torch.from_numpy(positions)] = torch.arange(len(positions))
        else:
            self._network = copy.deepcopy(network).eval().requires_grad_(False)
            self._network.zero_grad(set_to_none=True)

    @property
    def forwards(self) -> int:
        """Batches that the network sends forward in a step."""
        return 0 if self._network is None else 1

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """(B, K) logits on the batch's device."""
        if self._network is None:
            return self._table[self._row[batch.indices].to(self._table.device, non_blocking=True)]
        if batch not in self._said:
            self._said[batch] = self._network(batch.inputs)
        return self._said[batch]


@torch.no_grad()
def answers(network: nn.Module, samples: Samples, positions: np.ndarray) -> Tensor:
    """(k, K) logits of the samples at these positions in evaluation mode, at least float32, without augmentation.

    Raises:
        NonFiniteError: if one is NaN or infinite.
    """
    device = runtime.device_of(network)
    with evaluating(network), runtime.full_float32(), torch.autocast(device.type, enabled=False):
        found = torch.cat([network(batch.inputs) for batch in evaluation_batches(samples, positions, BATCH)])
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError("the original network gives logits that are NaN or infinite; its weights are broken")
    return found.to(torch.promote_types(found.dtype, torch.float32))


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · mean over the batch of KL(softmax(teacher/T) ‖ softmax(student/T)), in nats, 0-d.

    The factor keeps the size of the gradient, T·(p_student − p_teacher) by the logits, comparable over temperatures.

    Args:
        student: (B, K) logits.
        teacher: (B, K) logits, which get no gradient.
        temperature: T > 0.

    Source: Hinton et al. 2015 (arXiv 1503.02531).
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_p = nn.functional.log_softmax(student.to(dtype) / temperature, dim=1)
    log_t = nn.functional.log_softmax(teacher.to(dtype) / temperature, dim=1)
    return temperature**2 * nn.functional.kl_div(log_p, log_t, reduction="batchmean", log_target=True)


class Distillation(Objective):
    """Σ over streams of: weight · divergence from a teacher + weight · mean cross-entropy.

    A stream of which both weights are 0 is not read, and a teacher of weight 0 is not asked.

    Args:
        teachers: Signed weight of the divergence, and the teacher, by stream; the order is that of the forward passes.
        cross_entropy: Weight of the cross-entropy by stream, 0 where there is none.
        temperature: T > 0 of the divergence.
    """

    def __init__(
        self,
        teachers: Mapping[str, tuple[float, Teacher | None]],
        *,
        temperature: float,
        cross_entropy: Mapping[str, float] | None = None,
    ) -> None:
        self._teachers = dict(teachers)
        self._cross_entropy = dict(cross_entropy or {})
        self._temperature = temperature

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(
            s for s, (weight, _) in self._teachers.items() if weight != 0 or self._cross_entropy.get(s, 0) != 0
        )

    @property
    def other_forwards(self) -> int:
        return sum(t.forwards for weight, t in self._teachers.values() if weight != 0 and t is not None)

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        for stream in self.streams:
            batch = batches[stream]
            logits = model(batch.inputs)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            weight, teacher = self._teachers[stream]
            parts: list[Tensor] = []
            if weight != 0 and teacher is not None:
                parts.append(weight * divergence(logits, teacher.logits(batch), self._temperature))
            if (gamma := self._cross_entropy.get(stream, 0.0)) != 0:
                parts.append(gamma * nn.functional.cross_entropy(logits, batch.labels))
            yield stream, torch.stack(parts).sum()


def untrained(network: nn.Module, seed: int) -> nn.Module:
    """A copy of the network whose modules drew their weights anew, from a seed, on the host.

    Every module that has `reset_parameters` is asked to draw; a parameter of a module without it stays as it is.

    Raises:
        UserError: if no module has it.
    """
    device = runtime.device_of(network)
    fresh = copy.deepcopy(network).to("cpu")
    drawn: list[Any] = [
        reset
        for module in fresh.modules()
        if callable(reset := getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None)))
    ]
    if not drawn:
        raise UserError(
            f"no module of {type(network).__name__} has reset_parameters, so no untrained network can be made from it; "
            "give its modules that method, or choose another method than bad_teacher"
        )
    # The key has a last number of its own, so that the draw is not the one from which the original started.
    start = np.random.SeedSequence(seed, spawn_key=(0, 0, 2)).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(start))
        for reset in drawn:
            reset()
    return fresh.to(device)
