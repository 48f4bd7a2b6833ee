"""Training on forget samples under other labels than their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.data.samples import Batch, Samples
from unsharp.errors import UserError
from unsharp.methods.base import check_fraction
from unsharp.phases import FORGET, RETAIN, Moment, Objective

LabelsAt = Callable[[Moment], Tensor]
"""(n,) int64 on the host: the new label of each sample by its position; what stands at other positions is not read."""


class Relabelled(Objective):
    """α · mean cross-entropy on retain + (1−α) · mean cross-entropy on forget under its new labels.

    Args:
        alpha: α in [0, 1]; a stream of weight 0 is not read.
        labels: The new labels.
    """

    def __init__(self, alpha: float, labels: LabelsAt) -> None:
        self.weights = {RETAIN: alpha, FORGET: 1 - alpha}
        self._labels = labels

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(stream for stream, weight in self.weights.items() if weight != 0)

    def terms(self, model: nn.Module, batches: Mapping[str, Batch], at: Moment) -> Iterator[tuple[str, Tensor]]:
        for stream in self.streams:
            batch = batches[stream]
            labels = batch.labels
            if stream == FORGET:
                labels = self._labels(at)[batch.indices].to(labels.device, non_blocking=True)
            logits = model(batch.inputs)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            yield stream, self.weights[stream] * nn.functional.cross_entropy(logits, labels)


class RandomLabels:
    """New labels that are drawn in each epoch, a function of seed, epoch and the sample's place in the full source.

    Args:
        samples: The samples.
        other_classes: Draw among the classes that are not the sample's own; else among all.

    Raises:
        UserError: if there is no other class.
    """

    def __init__(self, samples: Samples, *, other_classes: bool) -> None:
        check_classes(samples)
        self._samples = samples
        self._other_classes = other_classes
        self._last: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self, at: Moment) -> Tensor:
        """The labels of this epoch."""
        when = (at.seed, at.epoch)
        if self._last is None or self._last[0] != when:
            self._last = when, torch.from_numpy(self._drawn(*when))
        return self._last[1]

    def _drawn(self, seed: int, epoch: int) -> np.ndarray:
        samples, k = self._samples, self._samples.n_classes
        # The tables of the streams have keys of two numbers: the labels share no draw with order and augmentation.
        bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch, 0, 1)))
        uniform = np.random.Generator(bits).random(samples.source_size)[samples.source_positions]
        if not self._other_classes:
            return (uniform * k).astype(np.int64)
        drawn = (uniform * (k - 1)).astype(np.int64)
        return drawn + (drawn >= samples.labels)


def check_classes(samples: Samples) -> None:
    """Raises: UserError if there is one class alone."""
    if samples.n_classes < 2:
        raise UserError(f"a new label needs another class; the data have {samples.n_classes}")


def check_alpha(alpha: float | None) -> None:
    """Raises: UserError if it is given and not in [0, 1]."""
    if alpha is not None:
        check_fraction("alpha", alpha)


def share_of_retained(alpha: float | None, retain: np.ndarray, forget: np.ndarray) -> float:
    """α, or where it is None n_retain / (n_retain + n_forget).

    With that one the expected gradient of a step is the one of training on both sets as one.
    """
    return len(retain) / (len(retain) + len(forget)) if alpha is None else alpha
