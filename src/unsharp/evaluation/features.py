"""The penultimate features of a set of samples: means and traces in one pass, and the rows that a metric asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.data.samples import Samples
from unsharp.data.streams import evaluation_batches
from unsharp.errors import UserError, listed
from unsharp.evaluation.predictions import OnHost, Outputs, Predictions
from unsharp.models.penultimate import Features

if TYPE_CHECKING:
    from unsharp.difficulty import ForgetSet

BLOCK = 4096
"""Rows of an array that are brought to float64 at a time."""
NOT_FINITE = "features are NaN or infinite: the weights or the inputs are broken, or the precision is too low"


class Spread(NamedTuple):
    """How features lie about their mean.

    Args:
        n: Number of samples, ≥ 1.
        mean: (D,) float64.
        scatter: Σ ‖x − mean‖², the trace of n·Σ.
    """

    n: int
    mean: np.ndarray
    scatter: float

    @property
    def variance(self) -> float:
        """The trace of the covariance, with n in the denominator."""
        return self.scatter / self.n


class Moments:
    """Count, mean and scatter of features, class by class, from batches that are seen once.

    A batch is joined to what is known by the pairwise update of Chan, Golub & LeVeque (1983), which subtracts means
    before it squares: sums of squares would lose every digit of a variance that is small beside the mean.

    Args:
        n_classes: Labels lie in [0, n_classes).
        dim: D ≥ 1, the length of a feature vector.
    """

    def __init__(self, n_classes: int, dim: int) -> None:
        self.n = np.zeros(n_classes, dtype=np.int64)
        self.mean = np.zeros((n_classes, dim))
        self.scatter = np.zeros(n_classes)

    def add(self, features: np.ndarray, labels: np.ndarray) -> None:
        """Join a batch: features (B, D), labels (B,) int64."""
        order = np.argsort(labels, kind="stable")
        present, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        x = np.asarray(features, dtype=np.float64)[order]
        means = np.add.reduceat(x, starts, axis=0) / counts[:, None]
        x = x - np.repeat(means, counts, axis=0)
        within = np.add.reduceat(np.einsum("ij,ij->i", x, x), starts)
        before, whole = self.n[present], self.n[present] + counts
        step = means - self.mean[present]
        self.mean[present] += step * (counts / whole)[:, None]
        self.scatter[present] += within + np.einsum("ij,ij->i", step, step) * before * counts / whole
        self.n[present] = whole

    @property
    def classes(self) -> np.ndarray:
        """The classes of which there is a sample, ascending."""
        return np.flatnonzero(self.n)

    def of_class(self, label: int) -> Spread:
        """The spread of one class, which must have a sample."""
        return Spread(int(self.n[label]), self.mean[label], float(self.scatter[label]))

    def total(self) -> Spread:
        """The spread of all classes together."""
        there = self.classes
        n, means = self.n[there], self.mean[there]
        mean = n @ means / n.sum()
        apart = ((means - mean) ** 2).sum(axis=1)
        return Spread(int(n.sum()), mean, float(self.scatter[there].sum() + n @ apart))


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features of one network on one set of samples, as far as they are kept.

    Args:
        labels: (n,) int64, the class of every sample.
        moments: Of all n samples, normalised if `normalise`.
        rows: (k,) int64, ascending: the samples whose features are kept.
        kept: (k, D): their features as the network gave them.
        normalise: Whether a feature vector counts by its direction only: it is divided by its Euclidean norm; a vector
            of zeros stays as it is.
    """

    labels: np.ndarray
    moments: Moments
    rows: np.ndarray
    kept: np.ndarray
    normalise: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, features: np.ndarray, labels: np.ndarray, *, normalise: bool = True) -> FeatureSet:
        """The set whose features are all in memory.

        Args:
            features: (n, D) finite numbers, n ≥ 1, D ≥ 1.
            labels: (n,) integers ≥ 0.
            normalise: As in the class.

        Raises:
            UserError: if the arrays are not as above.
        """
        features, labels = np.asarray(features), np.asarray(labels, dtype=np.int64)
        if features.ndim != 2 or not features.size or labels.shape != features.shape[:1]:
            raise UserError(
                f"features must be (n ≥ 1, D ≥ 1) with a label for each row, got {features.shape} and {labels.shape}"
            )
        if labels.min() < 0:
            raise UserError(f"labels must be at least 0, got {labels.min()}")
        if not np.isfinite(features).all():
            raise UserError(NOT_FINITE)
        moments = Moments(int(labels.max()) + 1, features.shape[1])
        for first in range(0, len(labels), BLOCK):
            block = slice(first, first + BLOCK)
            moments.add(prepared(features[block], normalise), labels[block])
        return cls(labels, moments, np.arange(len(labels)), features, normalise)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The features (m, D) float64 of the samples at `rows` (m,), normalised if `normalise`.

        Raises:
            UserError: if one of them was not kept.
        """
        place = np.searchsorted(self.rows, rows)
        found = place < len(self.rows)
        found[found] = self.rows[place[found]] == rows[found]
        if not found.all():
            lost = listed([int(r) for r in np.asarray(rows)[~found]])
            raise UserError(f"the features of rows {lost} were not kept; keep them with `needed_rows`, or keep all")
        return prepared(self.kept[place], self.normalise)

    def positions(self, label: int) -> np.ndarray:
        """The rows of one class, ascending."""
        return np.flatnonzero(self.labels == label)


def prepared(features: np.ndarray, normalise: bool) -> np.ndarray:
    """Features (m, D) in float64, each row divided by its Euclidean norm if `normalise`; a row of zeros stays."""
    x = np.asarray(features, dtype=np.float64)
    if not normalise:
        return x
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1.0)


def streamed(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], n_classes: int, *, keep: np.ndarray | None, normalise: bool = True
) -> FeatureSet:
    """A feature set from batches that are seen once; only the rows in `keep` stay in memory.

    Args:
        batches: Pairs of features (B, D) and labels (B,) in [0, n_classes), in the order of the samples.
        n_classes: Number of classes.
        keep: Rows, counted over all batches, whose features are kept; None keeps all, an empty array none.
        normalise: Whether a vector counts by its direction only.

    Raises:
        UserError: if there is no sample, a feature is not finite, or `keep` names a row that never came.
    """
    wanted = None if keep is None else np.unique(np.asarray(keep, dtype=np.int64))
    moments: Moments | None = None
    labels: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    first = 0
    for features, y in batches:
        if not np.isfinite(features).all():
            raise UserError(NOT_FINITE)
        moments = moments or Moments(n_classes, features.shape[1])
        moments.add(prepared(features, normalise), y)
        here = np.arange(first, first + len(y))
        mine = np.ones(len(y), dtype=bool) if wanted is None else np.isin(here, wanted, assume_unique=True)
        labels.append(np.array(y, dtype=np.int64))
        rows.append(here[mine])
        kept.append(np.array(features[mine], dtype=np.float32))
        first += len(y)
    if moments is None:
        raise UserError("there are no features: at least one sample is needed")
    if wanted is not None and len(wanted) and not 0 <= wanted[0] <= wanted[-1] < first:
        raise UserError(f"keep must hold rows in [0, {first}), got {wanted[0]} to {wanted[-1]}")
    return FeatureSet(np.concatenate(labels), moments, np.concatenate(rows), np.concatenate(kept), normalise)


# --- from networks ----------------------------------------------------------------------------------------------------


def read_features(
    model: nn.Module,
    samples: Samples,
    indices: np.ndarray,
    *,
    keep: np.ndarray | None = None,
    normalise: bool = True,
    batch_size: int = 1000,
    precision: str = "float32",
) -> FeatureSet:
    """The penultimate features of samples in one streamed pass, for sets whose features do not fit in memory.

    Args:
        model: Any classifier whose features `unsharp.models.penultimate.Features` finds.
        samples: Where the inputs come from; they are not augmented.
        indices: (n,) int64 positions in `samples`, n ≥ 1.
        keep: Rows of `indices` (positions in it) whose features are kept; None keeps all.
        normalise: Whether a vector counts by its direction only.
        batch_size: Samples per forward pass, ≥ 1.
        precision: "float32", "bf16" or "fp16" (autocast).

    Raises:
        UserError: if there is nothing to read, or the features cannot be found or are not finite.
    """
    passes = _passes(Features(model), samples, indices, batch_size, precision)
    batches = ((features.cpu().numpy(), labels.cpu().numpy()) for _, features, labels in passes)
    return streamed(batches, samples.n_classes, keep=keep, normalise=normalise)


def predict_with_features(
    model: nn.Module | Features,
    samples: Samples,
    indices: np.ndarray,
    batch_size: int = 1000,
    precision: str = "float32",
) -> Predictions:
    """What `predict` gives, with the penultimate features of every sample, from the same forward passes.

    Args:
        model: A classifier, or a `Features` of it, which finds the layer once for several calls.
        samples: As for `predict`.
        indices: As for `predict`.
        batch_size: As for `predict`.
        precision: As for `predict`; logits and features are float32 in any case.

    Raises:
        UserError: as `predict`, or if the features cannot be found.
    """
    found = model if isinstance(model, Features) else Features(model)
    logits, features, labels = gathered = [OnHost(len(indices)) for _ in range(3)]
    for parts in _passes(found, samples, indices, batch_size, precision):
        for rows, part in zip(gathered, parts):
            rows.add(part)
    return Predictions(logits.array(), labels.array(), features.array())


def outputs_with_features(
    model: nn.Module, train_set: Samples, test_set: Samples | None, forget: ForgetSet, batch_size: int = 1000
) -> Outputs:
    """What the network says about retain, forget and test, with features; each sample passes through it once.

    Args:
        model: A classifier.
        train_set: The training samples.
        test_set: The test samples, or None.
        forget: The forget set among the training samples.
        batch_size: Samples per forward pass, ≥ 1.

    Raises:
        UserError: as `predict_with_features`.
    """
    found = Features(model)
    retain = predict_with_features(found, train_set, forget.retain_indices(len(train_set)), batch_size)
    forgotten = predict_with_features(found, train_set, forget.indices, batch_size)
    test = None if test_set is None else predict_with_features(found, test_set, np.arange(len(test_set)), batch_size)
    return Outputs(retain, forgotten, test)


def _passes(
    model: Features, samples: Samples, indices: np.ndarray, batch_size: int, precision: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits, features (both float32) and labels of each batch, on the device."""
    if len(indices) == 0:
        raise UserError("indices is empty; there is nothing to predict")
    for batch in evaluation_batches(samples, indices, batch_size):
        # A context that outlived a `yield` would hold for the caller too.
        with torch.no_grad(), runtime.autocast(runtime.device_of(model.model), precision):
            logits, features = model(batch.inputs)
        yield logits.float(), features.float(), batch.labels
