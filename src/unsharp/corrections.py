"""What samples should have been: other labels, other inputs, or both."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unsharp.data.samples import Batch, ImageSamples, Samples, TensorSamples, checked_labels
from unsharp.difficulty.files import as_ids, find, refuse_repeated
from unsharp.errors import UserError, listed

ARRAYS = ("ids", "labels", "inputs")


@dataclass(frozen=True, eq=False)
class Corrections:
    """Labels or inputs that training samples should have had, for `first_order` and `second_order`.

    Args:
        ids: (k,) ids of the samples, each once: those that are to be forgotten as they were.
        labels: (k,) integers, the right class of each; None keeps the labels.
        inputs: (k, ...), the right input of each; None keeps the inputs. For images uint8 (k, height, width, channels),
            or what a `.npz` data set may hold; else numbers of the shape that the samples have, as the network takes
            them.

    Raises:
        UserError: if neither labels nor inputs are given, ids have not one dimension, or their numbers differ.
    """

    ids: Any
    labels: Any = None
    inputs: Any = None

    def __post_init__(self) -> None:
        if self.labels is None and self.inputs is None:
            raise UserError("corrections need labels or inputs, or both")
        object.__setattr__(self, "ids", np.asarray(self.ids))
        if self.ids.ndim != 1:
            raise UserError(f"corrections need ids of one dimension, got the shape {self.ids.shape}; give a list")
        for name in ("labels", "inputs"):
            value = getattr(self, name)
            if value is None:
                continue
            object.__setattr__(self, name, np.asarray(value))
            if len(np.shape(value)) == 0 or len(value) != len(self.ids):
                raise UserError(f"corrections have {len(self.ids)} ids and {np.shape(value)} {name}; give one per id")

    @property
    def digest(self) -> str:
        """Sha256 over ids, labels and inputs."""
        digest = hashlib.sha256()
        for name in ARRAYS:
            value = getattr(self, name)
            if value is not None:
                digest.update(f"{name} {value.dtype} {value.shape}".encode())
                content = np.ascontiguousarray(value)
                digest.update(repr(content.tolist()).encode() if content.dtype.hasobject else content.tobytes())
        return digest.hexdigest()

    def applied(self, samples: Samples, forget: np.ndarray) -> Samples:
        """The samples at `forget`, in this order, as they should have been.

        Raises:
            UserError: if the ids are not those of the forget set, or labels or inputs do not fit the samples.
        """
        order = self._order(samples, forget)
        right = samples.subset(forget)
        if self.inputs is not None:
            right = _with_inputs(right, self.inputs[order])
        if self.labels is None:
            return right
        try:
            return _Relabelled(right, checked_labels(self.labels, samples.n_classes)[order])
        except UserError as error:
            raise UserError(f"corrected labels: {error}") from None

    def _order(self, samples: Samples, forget: np.ndarray) -> np.ndarray:
        """Which row is that of each sample to be forgotten."""
        ids = as_ids(self.ids.tolist(), samples.ids, "corrections")
        refuse_repeated(ids, "corrections")
        wanted = samples.ids[forget]
        rows, found = find(wanted, ids)
        beside = np.setdiff1d(ids, wanted)
        if not found.all() or len(beside):
            parts = [
                f"{what} {listed(some.tolist(), 4)}"
                for what, some in (("lack", wanted[~found]), ("also name", beside))
                if len(some)
            ]
            raise UserError(f"corrections must be of the samples that are to be forgotten, but {' and '.join(parts)}")
        return rows


def read_corrections(path: str | Path) -> Corrections:
    """Corrections from a .npz file with the arrays `ids`, and `labels` or `inputs` or both.

    Raises:
        UserError: if the file is missing or broken, or holds other arrays.
    """
    from unsharp.data.sources.npz import read_arrays

    arrays = read_arrays("corrected", str(path))
    other = [name for name in arrays if name not in ARRAYS]
    if other or "ids" not in arrays:
        raise UserError(
            f"corrected {str(path)!r} must hold the arrays ids and labels or inputs, found {listed(sorted(arrays))}"
        )
    return Corrections(**arrays)


def _with_inputs(samples: Samples, inputs: np.ndarray) -> Samples:
    """The samples with other inputs."""
    source = {"ids": samples.ids, "source_positions": samples.source_positions, "source_size": samples.source_size}
    if isinstance(samples, ImageSamples):
        from unsharp.data.sources.npz import as_images

        images = as_images("corrected inputs", inputs)
        _check_shape(images.shape[1:], tuple(samples.images.shape[1:]))
        look = {"mean": samples.mean, "std": samples.std, "device": samples.device}
        return ImageSamples(images, samples.labels, samples.class_names, **look, **source)
    (batch,) = samples.batches(np.zeros(1, np.int64), [1], draws=None)
    _check_shape(inputs.shape[1:], tuple(batch.inputs.shape[1:]))
    if inputs.dtype.kind not in "iuf" or not np.isfinite(inputs).all():
        raise UserError(f"corrected inputs must be finite numbers, got {inputs.dtype}; repair those that are not")
    tensor = torch.from_numpy(np.ascontiguousarray(inputs)).to(batch.inputs)
    return TensorSamples(tensor, samples.labels, samples.class_names, device=tensor.device, **source)


def _check_shape(given: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(given) != tuple(expected):
        raise UserError(f"corrected inputs must have the shape {tuple(expected)} of the samples, got {tuple(given)}")


class _Relabelled(Samples):
    """Samples under other labels."""

    def __init__(self, samples: Samples, labels: np.ndarray) -> None:
        super().__init__(labels, samples.class_names, samples.ids, samples.source_positions, samples.source_size)
        self._samples = samples
        self.input_shape, self.fingerprint, self.treatment = samples.input_shape, None, samples.treatment

    def batches(self, order: np.ndarray, sizes: Sequence[int], *, draws: np.ndarray | None) -> Iterator[Batch]:
        for batch in self._samples.batches(order, sizes, draws=draws):
            yield dataclasses.replace(batch, labels=self._at(batch.indices, batch.labels))

    def subset(self, indices: Any) -> Samples:
        return _Relabelled(self._samples.subset(indices), self.labels[np.asarray(indices)])

    def _at(self, indices: Tensor, like: Tensor) -> Tensor:
        return torch.from_numpy(self.labels)[indices].to(like.device)
