"""Fixed, ordered collections of labelled samples: resident on the device, or read as they are needed."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unsharp.data.augment import NO_AUGMENTATION, Augmentation, crop_flip, normalise, place
from unsharp.errors import UserError, listed
from unsharp.runtime import is_host


@dataclass(frozen=True, eq=False)
class Batch:
    """What every stream yields.

    Args:
        inputs: (B, C, H, W) float32 on the device, normalised and, in training, augmented, channels-last in memory;
            or whatever a user's Dataset gives.
        labels: (B,) int64 on the device.
        indices: (B,) int64 on the host, positions in the samples.
    """

    inputs: Tensor
    labels: Tensor
    indices: Tensor

    def split(self, n: int) -> list[Batch]:
        """The batch in n nearly equal parts, every field cut alike."""
        columns = [torch.tensor_split(getattr(self, f.name), n) for f in fields(self)]
        return [type(self)(*parts) for parts in zip(*columns)]


class Samples(ABC):
    """A fixed, ordered collection of labelled samples.

    Args:
        labels: (n,) integers in 0 .. number of classes - 1.
        class_names: One name per class, in the order of the network's outputs.
        ids: (n,) int64 or str, each once; None takes the positions in the full source.
        source_positions: (n,) int64, position of each sample in the full source; None for 0 .. n - 1.
        source_size: Number of samples of the full source; None where this is all of it.

    Raises:
        UserError: if there is no sample, a label is out of range, or an id repeats.
    """

    input_shape: tuple[int, ...]
    fingerprint: str | None
    treatment: Mapping[str, Any] = {}
    """What training depends on and the fingerprint leaves out, as plain values: normalisation and augmentation."""

    def __init__(
        self,
        labels: Any,
        class_names: Sequence[str],
        ids: Any = None,
        source_positions: np.ndarray | None = None,
        source_size: int | None = None,
    ) -> None:
        self.class_names = tuple(class_names)
        self.labels = checked_labels(labels, self.n_classes)
        n = len(self.labels)
        self.source_size = n if source_size is None else source_size
        self.source_positions = np.arange(n) if source_positions is None else np.asarray(source_positions, np.int64)
        self.ids = self.source_positions if ids is None else checked_ids(ids, n)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        """Number of classes that the network distinguishes; some may have no sample here."""
        return len(self.class_names)

    @abstractmethod
    def batches(self, order: np.ndarray, sizes: Sequence[int], *, draws: np.ndarray | None) -> Iterator[Batch]:
        """Read the samples at `order` in successive batches.

        Args:
            order: Positions (int64) in the order in which they are wanted.
            sizes: Size of each batch; their sum is len(order).
            draws: (n, COLUMNS) table of the epoch, a row per sample; None reads without augmentation.

        Returns:
            An iterator over the batches.
        """

    @abstractmethod
    def subset(self, indices: Any) -> Samples:
        """The samples at these positions, as a collection of their own that keeps ids and source positions."""

    def _part(self, indices: np.ndarray) -> dict[str, Any]:
        return {
            "labels": self.labels[indices],
            "class_names": self.class_names,
            "ids": self.ids[indices],
            "source_positions": self.source_positions[indices],
            "source_size": self.source_size,
        }

    def _digest(self, kind: str, shape: Sequence[int], content: Iterable[Any]) -> str:
        """Sha256 over everything that makes these samples what they are; `content` is the inputs' bytes in parts."""
        ids = self.ids.tolist()
        head = [kind, list(shape), self.class_names, self.labels.tolist(), ids, self.source_size]
        digest = hashlib.sha256(json.dumps(head).encode())
        for part in content:
            digest.update(part)
        return digest.hexdigest()


class ImageSamples(Samples):
    """Images that lie on the device as uint8 and are cropped, flipped and normalised there, a batch at a time.

    Args:
        images: (n, H, W, C) uint8 array or tensor.
        labels: As for `Samples`.
        class_names: As for `Samples`; None names the classes "0", "1", ... up to the largest label.
        mean: Per channel on the scale [0, 1], one value or C of them.
        std: Per channel on the scale [0, 1], one value or C of them, above 0.
        augmentation: What a training batch goes through.
        device: Where the images lie and the batches appear.
        **source: ids, source_positions, source_size of `Samples`.

    Raises:
        UserError: if the images have other dimensions or another dtype.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        class_names: Sequence[str] | None = None,
        *,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        augmentation: Augmentation = NO_AUGMENTATION,
        device: torch.device | str = "cpu",
        **source: Any,
    ) -> None:
        super().__init__(labels, numbered(labels) if class_names is None else class_names, **source)
        images = torch.as_tensor(images)
        if images.ndim != 4 or images.dtype != torch.uint8 or len(images) != len(self):
            raise UserError(
                f"images must be uint8 of shape ({len(self)}, height, width, channels) to go with the labels, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        _, height, width, channels = images.shape
        self.device = torch.device(device)
        self.input_shape = (channels, height, width)
        self.mean, self.std = tuple(mean), tuple(std)
        self._mean = per_channel("mean", mean, channels).to(self.device)
        self._std = per_channel("std", std, channels).to(self.device)
        if not all(value > 0 for value in self.std):
            raise UserError(f"std must be above 0 in every channel, got {self.std}")
        self.augmentation = augmentation
        self.treatment = {"mean": list(self.mean), "std": list(self.std), "augmentation": asdict(augmentation)}
        if augmentation.rescale:
            raise UserError(
                "augment 'resized_crop_flip' is for sets that are decoded as they are read; use 'crop_flip'"
            )
        self._border = augmentation.border(min(height, width))
        # The border is stored: a crop is then one gather, and a byte of memory costs less than a pass per batch.
        around = (0, 0, self._border, self._border, self._border, self._border)
        self._padded = torch.nn.functional.pad(images.to(self.device), around).contiguous()
        self._labels = torch.from_numpy(self.labels).to(self.device)

    @property
    def images(self) -> Tensor:
        """(n, H, W, C) uint8 on the device, a view."""
        height, width = self.input_shape[1:]
        return self._padded[:, self._border : self._border + height, self._border : self._border + width]

    @cached_property
    def fingerprint(self) -> str | None:  # type: ignore[override]
        """Sha256 over images, labels, ids and class names; not over device, normalisation or augmentation."""
        chunks = (chunk.contiguous().cpu().numpy() for chunk in self.images.split(4096))
        return self._digest("images", self.images.shape, chunks)

    def batches(self, order: np.ndarray, sizes: Sequence[int], *, draws: np.ndarray | None) -> Iterator[Batch]:
        return self.batches_by_row(order, sizes, None if draws is None else draws[order])

    def batches_by_row(self, order: np.ndarray, sizes: Sequence[int], rows: np.ndarray | None) -> Iterator[Batch]:
        """`batches` with a row (k, COLUMNS) for each entry of `order`, so that a sample may come twice in two ways."""
        indices = torch.from_numpy(np.ascontiguousarray(order, np.int64))
        at = indices.to(self.device, non_blocking=True)
        crops = place(
            rows,
            order,
            sizes,
            padded=self._padded.shape,
            augmentation=self.augmentation,
            border=self._border,
            device=self.device,
        )
        for span, mirrored in zip(spans(sizes), crops.mirrored):
            pixels = crop_flip(self._padded, crops.start[span], mirrored, self._border)
            inputs = normalise(pixels, self._mean, self._std).permute(0, 3, 1, 2)
            yield Batch(inputs, self._labels[at[span]], indices[span])

    def subset(self, indices: Any) -> ImageSamples:
        chosen = checked_indices(indices, len(self))
        return ImageSamples(
            self.images[torch.from_numpy(chosen).to(self.device)],
            mean=self.mean,
            std=self.std,
            augmentation=self.augmentation,
            device=self.device,
            **self._part(chosen),
        )


class TensorSamples(Samples):
    """Inputs of one shape that lie on the device as they are: no augmentation, no normalisation.

    Args:
        inputs: (n, ...) tensor.
        labels: As for `Samples`.
        class_names: As for `Samples`; None names the classes "0", "1", ... up to the largest label.
        device: Where the inputs lie and the batches appear.
        fingerprint: A name for the content; None computes the sha256.
        **source: ids, source_positions, source_size of `Samples`.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Any,
        class_names: Sequence[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        fingerprint: str | None = None,
        **source: Any,
    ) -> None:
        super().__init__(labels, numbered(labels) if class_names is None else class_names, **source)
        if len(inputs) != len(self):
            raise UserError(f"there are {len(inputs)} inputs and {len(self)} labels; give one label per input")
        self.device = torch.device(device)
        self.inputs = inputs.to(self.device)
        self.input_shape = tuple(inputs.shape[1:])
        self._labels = torch.from_numpy(self.labels).to(self.device)
        self._name = fingerprint

    @cached_property
    def fingerprint(self) -> str | None:  # type: ignore[override]
        """The name that was given, else the sha256 over inputs, labels, ids and class names."""
        if self._name is not None:
            return self._name
        chunks = (content_of(chunk) for chunk in self.inputs.split(4096))
        return self._digest(f"tensors {self.inputs.dtype}", self.inputs.shape, chunks)

    def batches(self, order: np.ndarray, sizes: Sequence[int], *, draws: np.ndarray | None) -> Iterator[Batch]:
        return self.batches_by_row(order, sizes, None)

    def batches_by_row(self, order: np.ndarray, sizes: Sequence[int], rows: np.ndarray | None) -> Iterator[Batch]:
        """`batches`; these samples have no use for the rows."""
        indices = torch.from_numpy(np.ascontiguousarray(order, np.int64))
        at = indices.to(self.device, non_blocking=True)
        for span in spans(sizes):
            yield Batch(channels_last(self.inputs[at[span]]), self._labels[at[span]], indices[span])

    def subset(self, indices: Any) -> TensorSamples:
        chosen = checked_indices(indices, len(self))
        inputs = self.inputs[torch.from_numpy(chosen).to(self.device)]
        return TensorSamples(
            inputs, device=self.device, fingerprint=part_name(self._name, chosen, len(self)), **self._part(chosen)
        )


Reader = Callable[[int, "np.ndarray | None"], Tensor]


class StreamedSamples(Samples):
    """Samples that are read one by one, in this process or in workers, as they are needed.

    Args:
        read: (position, row) -> input; row is the (COLUMNS,) row of the epoch's table or None for an evaluation. The
            input must depend on nothing else.
        labels: As for `Samples`.
        class_names: As for `Samples`.
        input_shape: Shape of one input.
        content: Sha256 over the inputs, or a function that computes it when it is first wanted; None where inputs
            differ between two reads.
        fingerprint: A name for the whole; None computes one from `content`, labels, ids and class names.
        treatment: As for `Samples`, where it is known.
        device: Where the batches appear.
        workers: Number of processes that read; 0 reads in this one.
        **source: ids, source_positions, source_size of `Samples`.
    """

    def __init__(
        self,
        read: Reader,
        labels: Any,
        class_names: Sequence[str],
        *,
        input_shape: Sequence[int],
        content: str | Callable[[], str] | None = None,
        fingerprint: str | None = None,
        treatment: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
        **source: Any,
    ) -> None:
        super().__init__(labels, class_names, **source)
        self.input_shape = tuple(input_shape)
        self.treatment = dict(treatment or {})
        self.device = torch.device(device)
        self._content = content
        self._name = fingerprint
        self._read = read
        self._workers = workers
        self._idle: list[DataLoader[Tensor]] = []

    @cached_property
    def fingerprint(self) -> str | None:  # type: ignore[override]
        """The name that was given, else a sha256; None where inputs differ between two reads."""
        if self._name is not None or self._content is None:
            return self._name
        content = self._content() if callable(self._content) else self._content
        return self._digest("streamed", self.input_shape, [content.encode()])

    def batches(self, order: np.ndarray, sizes: Sequence[int], *, draws: np.ndarray | None) -> Iterator[Batch]:
        return self.batches_by_row(order, sizes, None if draws is None else draws[order])

    def batches_by_row(self, order: np.ndarray, sizes: Sequence[int], rows: np.ndarray | None) -> Iterator[Batch]:
        """`batches` with a row (k, COLUMNS) for each entry of `order`, so that a sample may come twice in two ways."""
        # Workers are kept between epochs. Two streams may run at a time, so each takes a loader for itself.
        loader = self._idle.pop() if self._idle else self._loader()
        batches = [order[span] for span in spans(sizes)]
        drawn = [None] * len(order) if rows is None else rows
        loader.batch_sampler.requests = [  # type: ignore[union-attr]
            [(int(i), row) for i, row in zip(order[span], drawn[span])] for span in spans(sizes)
        ]
        try:
            for batch, inputs in zip(batches, loader, strict=True):
                indices = torch.from_numpy(np.ascontiguousarray(batch, np.int64))
                labels = torch.from_numpy(self.labels[batch])
                moved = channels_last(inputs.to(self.device, non_blocking=True))
                yield Batch(moved, labels.to(self.device, non_blocking=True), indices)
        finally:  # a reader takes as many batches as it needs, so the last one may never be gone beyond
            self._idle.append(loader)

    def _loader(self) -> DataLoader[Tensor]:
        return DataLoader(
            _Items(self._read),
            batch_sampler=_Requests(),
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=not is_host(self.device),
            collate_fn=torch.stack,
            # Without a generator of its own the loader would draw its seed from the training's.
            generator=torch.Generator(),
        )

    def subset(self, indices: Any) -> StreamedSamples:
        chosen = checked_indices(indices, len(self))
        return StreamedSamples(
            _Chosen(self._read, chosen),
            input_shape=self.input_shape,
            fingerprint=part_name(self.fingerprint, chosen, len(self)),
            treatment=self.treatment,
            device=self.device,
            workers=self._workers,
            **self._part(chosen),
        )


class _Requests:
    """The batch sampler of a loader that outlives an epoch: lists of (position, row)."""

    requests: list[list[tuple[int, np.ndarray | None]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, np.ndarray | None]]]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


@dataclass(frozen=True, eq=False)
class _Items(Dataset[Tensor]):
    read: Reader

    def __getitem__(self, request: Any) -> Tensor:
        return self.read(*request)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Reads position i of a part as position chosen[i] of the whole."""

    read: Reader
    chosen: np.ndarray

    def __call__(self, position: int, row: np.ndarray | None) -> Tensor:
        return self.read(int(self.chosen[position]), row)


class Splits(NamedTuple):
    """The samples to train on and, where there are any, those to test on and those held out to choose settings on."""

    train: Samples
    test: Samples | None
    validation: Samples | None = None


def spans(sizes: Sequence[int]) -> Iterator[slice]:
    """Slices of these lengths, one after the other."""
    ends = list(accumulate(sizes))
    return (slice(end - size, end) for end, size in zip(ends, sizes))


def channels_last(inputs: Tensor) -> Tensor:
    """4-D inputs in the memory order in which convolutions are quick; others as they are."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def numbered(labels: Any) -> tuple[str, ...]:
    """Names "0", "1", ... for classes without names, up to the largest label."""
    labels = np.asarray(labels)
    top = int(labels.max()) if labels.size and np.issubdtype(labels.dtype, np.integer) else 0
    return tuple(str(i) for i in range(top + 1))


def per_channel(name: str, values: Sequence[float], channels: int) -> Tensor:
    """(channels,) float32 on the scale 0..255 from values on the scale [0, 1], one or one per channel."""
    if len(values) not in (1, channels):
        raise UserError(f"{name} needs 1 value or one per channel ({channels}), got {len(values)}")
    return torch.tensor([float(v) * 255 for v in values], dtype=torch.float64).float().expand(channels).clone()


def checked_labels(labels: Any, n_classes: int) -> np.ndarray:
    """`labels` as (n,) int64 in 0 .. n_classes - 1. Raises: UserError otherwise."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise UserError(f"labels must be one integer per sample and at least one, got shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels must be integers, got {labels.dtype}; convert them to class indices")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        bad, where = (low, labels.argmin()) if low < 0 else (high, labels.argmax())
        raise UserError(f"label {bad} of sample {where} is out of range: there are {n_classes} classes, counted from 0")
    return labels.astype(np.int64)


def checked_ids(ids: Any, n: int) -> np.ndarray:
    """`ids` as (n,) int64 or str without repetition. Raises: UserError otherwise."""
    ids = np.asarray(ids)
    if ids.shape != (n,):
        raise UserError(f"ids must be one per sample ({n}), got shape {ids.shape}")
    if ids.dtype.kind not in "iuUOT":
        raise UserError(f"ids must be integers or text, got {ids.dtype}")
    ids = ids.astype(np.int64) if ids.dtype.kind in "iu" else ids.astype(str)
    found, counts = np.unique(ids, return_counts=True)
    if len(found) < n:
        repeated = found[counts > 1]
        raise UserError(f"ids must be unique, but {len(repeated)} of them repeat: {listed(repeated.tolist(), 4)}")
    return ids


def checked_indices(indices: Any, n: int) -> np.ndarray:
    """`indices` as 1-D int64 positions in 0 .. n - 1. Raises: UserError otherwise."""
    indices = np.asarray(indices)
    if indices.size == 0:
        return np.zeros(0, np.int64)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise UserError(f"indices must be a 1-D array of integers, got {indices.dtype} of shape {indices.shape}")
    if indices.min() < 0 or indices.max() >= n:
        raise UserError(f"indices must be in 0..{n - 1}, got {indices.min()}..{indices.max()}")
    return indices.astype(np.int64)


def content_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements in order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def part_name(name: str | None, chosen: np.ndarray, n: int) -> str | None:
    """The fingerprint of a part of content that is known by name only."""
    if name is None or np.array_equal(chosen, np.arange(n)):
        return name
    return hashlib.sha256(name.encode() + chosen.tobytes()).hexdigest()
