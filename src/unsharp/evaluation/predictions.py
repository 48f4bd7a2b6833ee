"""What a network says about samples, as arrays: the only thing the metrics on outputs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from unsharp import artifacts, runtime
from unsharp.data.samples import Samples
from unsharp.data.streams import evaluation_batches
from unsharp.errors import UserError, listed
from unsharp.models.modes import evaluating

NAMES = ("logits", "labels")
OPTIONAL = ("features",)
SETS = ("retain", "forget", "test")
HELD_BYTES = 64 * 2**20
"""What networks say waits on the device up to about this size."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The logits of one network on one set of samples, with the true labels and, where they are wanted, the features.

    Args:
        logits: (n, K) float32, finite, n ≥ 1, K ≥ 2.
        labels: (n,) int64 in [0, K).
        features: (n, D) float32, finite, D ≥ 1: what the last linear layer received; None where nobody collected them.

    Raises:
        UserError: if a shape, a label, a logit or a feature is not as above.
    """

    logits: np.ndarray
    labels: np.ndarray
    features: np.ndarray | None = None

    def __post_init__(self) -> None:
        logits = np.ascontiguousarray(self.logits, dtype=np.float32)
        labels = np.ascontiguousarray(self.labels, dtype=np.int64)
        if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
            raise UserError(f"logits must be (n ≥ 1 samples, K ≥ 2 classes), got shape {logits.shape}")
        if labels.shape != logits.shape[:1]:
            raise UserError(f"labels must be one per row of logits ({len(logits)}), got shape {labels.shape}")
        outside = np.flatnonzero((labels < 0) | (labels >= logits.shape[1]))
        if len(outside):
            wrong = listed([int(v) for v in np.unique(labels[outside])])
            raise UserError(f"labels must lie in [0, {logits.shape[1]}), the classes of the network; got {wrong}")
        broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(broken):
            raise UserError(
                f"logits of {len(broken)} of {len(logits)} samples are NaN or infinite (first at row {broken[0]}): "
                "the weights or the inputs are broken, or the precision is too low; try precision='float32'"
            )
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "labels", labels)
        if self.features is not None:
            object.__setattr__(self, "features", _checked_features(self.features, len(labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: str | Path) -> None:
        """Write logits, labels and, if there are any, features to a safetensors file, whole or not at all."""
        arrays = {name: getattr(self, name) for name in NAMES + OPTIONAL}
        with artifacts.writing(path), artifacts.atomic(path) as temporary:
            save_file({name: array for name, array in arrays.items() if array is not None}, temporary)

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read what `save` wrote. Raises: UserError if the file is missing, broken or of another kind."""
        if not Path(path).is_file():
            raise UserError(f"predictions file {str(path)!r} does not exist")
        try:
            arrays = load_file(path)
        except SafetensorError as error:
            raise UserError(f"predictions file {str(path)!r} is not a whole safetensors file ({error})") from None
        if set(arrays) - set(OPTIONAL) != set(NAMES):
            found = ", ".join(sorted(arrays)) or "nothing"
            raise UserError(
                f"predictions file {str(path)!r} must hold logits and labels, and may hold features; it holds {found}"
            )
        return cls(**arrays)


def _checked_features(features: np.ndarray, n: int) -> np.ndarray:
    """The features as a contiguous float32 array. Raises: UserError if they are not finite (n, D) numbers."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    if features.ndim != 2 or len(features) != n or features.shape[1] < 1:
        raise UserError(f"features must be (n = {n} samples, D ≥ 1), a row for each label, got shape {features.shape}")
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(broken):
        raise UserError(
            f"features of {len(broken)} of {n} samples are NaN or infinite (first at row {broken[0]}): the weights or "
            "the inputs are broken, or the precision is too low; try precision='float32'"
        )
    return features


@dataclass(frozen=True)
class Outputs:
    """The predictions of one network on the three sets of an unlearning task; `test` is None where there is none."""

    retain: Predictions
    forget: Predictions
    test: Predictions | None = None

    def __post_init__(self) -> None:
        n_classes = {p.logits.shape[1] for p in (self.retain, self.forget, self.test) if p is not None}
        if len(n_classes) > 1:
            raise UserError(f"retain, forget and test must have equally many classes, got {sorted(n_classes)}")

    def save(self, directory: str | Path) -> None:
        """Write each set's predictions into a directory, made if it is missing: NAME.safetensors for each name."""
        for name in SETS:
            found = getattr(self, name)
            if found is not None:
                Path(directory).mkdir(parents=True, exist_ok=True)
                found.save(Path(directory) / f"{name}.safetensors")

    @classmethod
    def load(cls, directory: str | Path) -> Outputs:
        """Read what `save` wrote. Raises: UserError if a file other than the test set's is missing, or one broken."""
        paths = {name: Path(directory) / f"{name}.safetensors" for name in SETS}
        test = Predictions.load(paths["test"]) if paths["test"].is_file() else None
        return cls(Predictions.load(paths["retain"]), Predictions.load(paths["forget"]), test)


@dataclass(frozen=True)
class Evidence:
    """All that a metric may look at.

    Args:
        model: Outputs of the network that is judged.
        reference: Outputs, on the same samples, of the network retrained without the forget set; None where there is
            no such network.
        seed: Seeds what a metric draws (the subsample of the SVC attack), an integer ≥ 0.

    Raises:
        UserError: if the reference saw other samples than the model, or the seed is negative.
    """

    model: Outputs
    reference: Outputs | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.reference is None:
            return
        for split in SETS:
            ours, theirs = getattr(self.model, split), getattr(self.reference, split)
            if (ours is None) != (theirs is None) or (ours and not np.array_equal(ours.labels, theirs.labels)):
                raise UserError(
                    f"the retrained reference must be evaluated on the same {split} samples, in the same order, as the "
                    "model; their labels differ"
                )

    def of_reference(self) -> Evidence | None:
        """The evidence in which the reference takes the model's place, so that its metrics can be computed alike."""
        return None if self.reference is None else Evidence(self.reference, self.reference, self.seed)


class OnHost:
    """Rows that a device gives batch by batch, as one array on the host.

    They wait on the device until they are worth a copy, since each copy waits for the device; and no longer, so that
    what networks say of large sets does not have to fit there.

    Args:
        n: Number of rows that will come.
    """

    def __init__(self, n: int) -> None:
        self._n, self._done, self._bytes = n, 0, 0
        self._held: list[Tensor] = []
        self._rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take the next rows (B, ...), of one shape and dtype in all calls."""
        self._held.append(rows)
        self._bytes += rows.nbytes
        if self._bytes >= HELD_BYTES:
            self._bring()

    def array(self) -> np.ndarray:
        """(n, ...) all rows; call it once all have come."""
        self._bring()
        assert self._rows is not None
        assert self._done == self._n
        return self._rows.numpy()

    def _bring(self) -> None:
        if not self._held:
            return
        part = torch.cat(self._held)
        if self._rows is None:
            self._rows = torch.empty((self._n, *part.shape[1:]), dtype=part.dtype)
        self._rows[self._done : self._done + len(part)] = part
        self._done += len(part)
        self._held, self._bytes = [], 0


def check_seed(seed: int) -> None:
    """Raise UserError unless `seed` can seed what a metric draws."""
    if seed < 0:
        raise UserError(f"seed must be an integer of at least 0, got {seed}")


def predict(
    model: nn.Module, samples: Samples, indices: np.ndarray, batch_size: int = 1000, precision: str = "float32"
) -> Predictions:
    """Run the network over the samples in evaluation mode, in order, without augmentation.

    Args:
        model: Maps (B, ...) inputs to (B, K) logits; its modes are as before afterwards.
        samples: Where the inputs come from.
        indices: (n,) int64 positions in `samples`, n ≥ 1.
        batch_size: Samples per forward pass, ≥ 1.
        precision: "float32", "bf16" or "fp16" (autocast); the logits are float32 in any case.

    Raises:
        UserError: if there is nothing to predict, or the network does not return finite (B, K) logits.
    """
    if len(indices) == 0:
        raise UserError("indices is empty; there is nothing to predict")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    logits, labels = OnHost(len(indices)), OnHost(len(indices))
    with evaluating(model), torch.no_grad(), runtime.autocast(runtime.device_of(model), precision):
        for batch in evaluation_batches(samples, indices, batch_size):
            logits.add(_checked(model(batch.inputs), len(batch.labels)).float())
            labels.add(batch.labels)
    return Predictions(logits.array(), labels.array())


def _checked(output: Any, n_rows: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != n_rows:
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"the model must return logits of shape ({n_rows}, classes), got {came}")
    return output
