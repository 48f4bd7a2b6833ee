"""From a source's name to samples: order of the classes, slice, decoding, device."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unsharp.data.augment import AUGMENTATIONS, Augmentation, reference, resized_crop, to_size
from unsharp.data.config import DataConfig
from unsharp.data.corruption import Corruption
from unsharp.data.samples import (
    ImageSamples,
    Samples,
    Splits,
    StreamedSamples,
    checked_ids,
    checked_labels,
    per_channel,
)
from unsharp.data.source import SOURCES, Encoded, Source, Split
from unsharp.errors import UserError, listed

RESIDENT_BYTES = 4 * 2**30
"""Sets whose images need no more than this as uint8 lie on the device; larger ones are read as they are needed."""
CHUNK = 512
THREADED_PIXELS = 128 * 128


def load(config: DataConfig, device: torch.device | str = "cpu") -> Splits:
    """The samples that `config` describes.

    Args:
        config: Name of the source and how the network receives its images.
        device: Where the batches appear.

    Returns:
        Samples to train on, with the augmentation of `config`, samples to test on (None if there are none), and those
        held out for validation (None if none are).

    Raises:
        UserError: if the source is unknown, cannot be found or has another layout, or a label, id or image is wrong.
    """
    if config.name not in SOURCES and Path(config.name).exists():
        kind = "folder" if Path(config.name).is_dir() else "npz"
        raise UserError(f"data {config.name!r} is a path; give --data {kind} --data-dir {config.name}")
    source = SOURCES[config.name](config)
    if config.class_order is not None:
        source = in_class_order(source, read_class_order(config.class_order))
    if config.classes is not None and config.classes > len(source.class_names):
        raise UserError(f"classes must be at most {len(source.class_names)} for {config.name!r}, got {config.classes}")
    augment = source.augment if config.augment == "auto" else config.augment
    train = _samples(source, source.train, config, AUGMENTATIONS[augment], config.per_class, device, config.corrupt)
    test = None
    if source.test is not None:
        test = _samples(source, source.test, config, AUGMENTATIONS["none"], None, device)
    if config.validation is None:
        return Splits(train, test)
    held = held_out(train.labels, config.validation)
    return Splits(train.subset(np.setdiff1d(np.arange(len(train)), held)), test, train.subset(held))


def read_class_order(path: str) -> tuple[str, ...]:
    """The class names in a text file, one per line, each once."""
    try:
        names = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"class_order {path!r} cannot be read ({error}); give a text file, one class per line"
        ) from None
    if len(set(names)) < len(names):
        raise UserError(f"class_order {path!r} names a class twice; list each class once")
    return names


def in_class_order(source: Source, names: tuple[str, ...]) -> Source:
    """The source with its labels counted in the order of `names`."""
    missing = [name for name in source.class_names if name not in names]
    if missing:
        raise UserError(f"class_order lacks {listed(missing)}; it must name every class of the data")
    place = np.array([names.index(name) for name in source.class_names])

    def moved(split: Split) -> Split:
        return replace(split, labels=place[checked_labels(split.labels, len(place))])

    test = None if source.test is None else moved(source.test)
    return replace(source, class_names=names, train=moved(source.train), test=test)


def kept_rows(labels: np.ndarray, classes: int | None, per_class: int | None) -> np.ndarray:
    """Rows of the first `classes` classes, of each the first `per_class`, in the order of the source."""
    rows = np.arange(len(labels)) if classes is None else np.flatnonzero(labels < classes)
    if per_class is None:
        return rows
    return np.sort(np.concatenate([rows[labels[rows] == c][:per_class] for c in np.unique(labels[rows])]))


def held_out(labels: np.ndarray, amount: int | float) -> np.ndarray:
    """Positions of the last so many samples of each class (1 or more), or such a share of each (below 1), sorted.

    Raises:
        UserError: if a class would have no sample left to train on.
    """
    parts = []
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        n = round(amount * len(rows)) if amount < 1 else int(amount)
        if n >= len(rows):
            raise UserError(f"validation={amount} leaves class {c} nothing to train on: it has {len(rows)} samples")
        parts.append(rows[len(rows) - n :])
    return np.sort(np.concatenate(parts))


def _samples(
    source: Source,
    split: Split,
    config: DataConfig,
    augmentation: Augmentation,
    per_class: int | None,
    device: torch.device | str,
    corrupt: str | None = None,
) -> Samples:
    labels = checked_labels(split.labels, len(source.class_names))
    ids = None if split.ids is None else checked_ids(split.ids, len(labels))
    rows = kept_rows(labels, config.classes, per_class)
    if len(rows) == 0:
        raise UserError(f"classes={config.classes} leaves no sample in a split of {config.name!r}; keep more classes")
    about: dict[str, Any] = {
        "labels": labels[rows],
        "class_names": source.class_names[: config.classes],
        "ids": None if ids is None else ids[rows],
        "source_positions": rows,
        "source_size": len(labels),
        "device": device,
    }
    look = {"mean": config.mean or source.mean, "std": config.std or source.std, "augmentation": augmentation}
    size = config.size or source.size
    if not callable(split.images):
        images = split.images[rows] if size is None else _resized(split.images[rows], size)
        return ImageSamples(_corrupted(images, rows, corrupt, device), **about, **look)
    decoder = Decoder(_channels(source, split.images, rows), size, source.resize_ratio)
    height, width, channels = decoder.array(split.images(rows[:1])[0]).shape
    # Parts at random scales are cut from the image in its own size, so they cannot come from one stored size.
    if len(rows) * height * width * channels <= RESIDENT_BYTES and not augmentation.rescale:
        images = _corrupted(decode(split.images, rows, decoder), rows, corrupt, device)
        return ImageSamples(images, **about, **look)
    if corrupt is not None:
        raise UserError(
            "corrupt is for sets that lie in memory, and these images are decoded as they are read; keep "
            "fewer (per_class, size), and take another augment than resized_crop_flip"
        )
    if size is None:
        raise UserError(f"{len(rows)} images of {width}×{height} have to be read as they are needed; give size")
    read = ReadImage(
        split.images,
        rows,
        decoder,
        augmentation,
        per_channel("mean", look["mean"], channels),
        per_channel("std", look["std"], channels),
    )
    treatment = {"mean": list(look["mean"]), "std": list(look["std"]), "augmentation": asdict(augmentation)}
    return StreamedSamples(
        read,
        input_shape=(channels, size, size),
        content=read.content,
        treatment=treatment,
        workers=config.workers,
        **about,
    )


@dataclass(frozen=True)
class Decoder:
    """Image file to pixels.

    Args:
        channels: 1 or 3.
        size: Side in pixels; None keeps the image's own.
        resize_ratio: Shorter side before the centre crop, relative to `size`.
    """

    channels: int
    size: int | None
    resize_ratio: float = 1.0

    def image(self, file: bytes | Path) -> Any:
        """The PIL image, in its own size. Raises: UserError if it cannot be decoded."""
        return opened(file).convert("L" if self.channels == 1 else "RGB")

    def array(self, file: bytes | Path) -> np.ndarray:
        """(H, W, C) uint8 in the size that an evaluation sees."""
        return self.sized(self.image(file))

    def sized(self, image: Any) -> np.ndarray:
        """(H, W, C) uint8 of a PIL image."""
        if self.size is not None:
            image = to_size(image, self.size, round(self.size * self.resize_ratio))
        return np.array(image).reshape(image.height, image.width, self.channels)


@dataclass(frozen=True, eq=False)
class ReadImage:
    """Reads one image of a set that does not lie in memory, augmented by its row of the epoch's table."""

    files: Encoded
    rows: np.ndarray
    decoder: Decoder
    augmentation: Augmentation
    mean: Tensor
    std: Tensor

    def __call__(self, position: int, row: np.ndarray | None) -> Tensor:
        image = self.decoder.image(self.files(self.rows[[position]])[0])
        if row is not None and self.augmentation.rescale and self.decoder.size is not None:
            image, row = resized_crop(image, row, self.decoder.size), None
            pixels = np.array(image).reshape(image.height, image.width, self.decoder.channels)
        else:
            pixels = self.decoder.sized(image)
        return reference(pixels, row, augmentation=self.augmentation, mean=self.mean, std=self.std)

    def content(self) -> str:
        """Sha256 over the image files and how they are decoded."""
        digest = hashlib.sha256(json.dumps([self.decoder.channels, self.decoder.size]).encode())
        for chunk in chunks(self.rows):
            for file in self.files(chunk):
                data = file if isinstance(file, bytes) else file.read_bytes()
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def opened(file: bytes | Path) -> Any:
    """A PIL image, decoded. Raises: UserError if the file is no image."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        where = f"image {str(file)!r}" if isinstance(file, Path) else "an image of the set"
        raise UserError(f"{where} cannot be decoded ({str(error)[:120]}); repair or remove it") from None
    return image


def decode(files: Encoded, rows: np.ndarray, decoder: Decoder) -> np.ndarray:
    """(len(rows), H, W, C) uint8 of the images at `rows`; large ones are decoded by several threads.

    Raises:
        UserError: if images differ in size.
    """
    first = decoder.array(files(rows[:1])[0])
    images = np.empty((len(rows), *first.shape), np.uint8)
    done = 0
    with ThreadPoolExecutor() as pool:
        # Threads quarrel over the interpreter for longer than a small image takes.
        each = pool.map if first.shape[0] * first.shape[1] >= THREADED_PIXELS else map
        for chunk in chunks(rows):
            for image in each(decoder.array, files(chunk)):
                if image.shape != first.shape:
                    (h, w, _), (h2, w2, _) = first.shape, image.shape
                    raise UserError(f"images differ in size ({w}×{h} and {w2}×{h2}); give size to bring them to one")
                images[done] = image
                done += 1
    return images


def chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows in parts, so that a part's files and not all of them are in memory."""
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))


def _channels(source: Source, files: Encoded, rows: np.ndarray) -> int:
    """1 where every image is grey, else 3; only headers are read."""
    if source.channels is not None:
        return source.channels
    from PIL import Image

    def grey(file: bytes | Path) -> bool:
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return image.mode in ("1", "L", "LA")
        except (OSError, SyntaxError, ValueError):
            opened(file)
            raise

    return 1 if all(grey(file) for chunk in chunks(rows) for file in files(chunk)) else 3


def _corrupted(
    images: np.ndarray, rows: np.ndarray, how: str | None, device: torch.device | str
) -> np.ndarray | Tensor:
    """(n, H, W, C) uint8 images, corrupted where that is asked for; `rows` (n,) number them in their source."""
    if how is None:
        return images
    corruption = Corruption.read(how)
    parts = range(0, len(rows), CHUNK)
    return torch.cat(
        [
            corruption(
                torch.from_numpy(images[i : i + CHUNK]).to(device), torch.from_numpy(rows[i : i + CHUNK]).to(device)
            )
            for i in parts
        ]
    )


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    """(n, H, W, C) uint8 arrays brought to size × size."""
    from PIL import Image

    if images.shape[1:3] == (size, size):
        return images
    channels = images.shape[3]
    pictures = (Image.fromarray(image[..., 0] if channels == 1 else image) for image in images)
    return np.stack([np.array(to_size(p, size)).reshape(size, size, channels) for p in pictures])
