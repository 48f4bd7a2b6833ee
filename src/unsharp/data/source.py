"""What a data source hands over: labels at once, images only for the rows that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsharp.data.config import DataConfig
from unsharp.errors import UserError
from unsharp.registry import Registry

Encoded = Callable[[np.ndarray], "Sequence[bytes | Path]"]
"""Rows -> the image files of these rows, as bytes or as paths."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One split of a source, before a slice is taken.

    Args:
        images: (n, H, W, C) uint8, or a function from rows to encoded images.
        labels: (n,) integers.
        ids: (n,) int64 or str; None counts.
    """

    images: np.ndarray | Encoded
    labels: np.ndarray
    ids: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set as it stands in the world.

    Args:
        train: The samples to train on.
        test: The samples to test on, or None.
        class_names: One per class, in the order of the labels.
        mean: Per channel on the scale [0, 1].
        std: Per channel on the scale [0, 1].
        augment: What "auto" means here.
        channels: 1 or 3; None where the images themselves say it.
        resize_ratio: Shorter side before the centre crop, relative to `size` (256/224 for ImageNet).
        size: Side in pixels that the source needs where the user names none.
    """

    train: Split
    test: Split | None
    class_names: tuple[str, ...]
    # Statistics of the samples themselves would carry the forget set into the retrained reference.
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    augment: str = "crop_flip"
    channels: int | None = None
    resize_ratio: float = 1.0
    size: int | None = None


SOURCES: Registry[Callable[[DataConfig], Source]] = Registry("data set", "unsharp.data.sources")


def refuse(config: DataConfig, *names: str) -> None:
    """Raise UserError for a setting that this source would ignore."""
    for name in names:
        if getattr(config, name) is not None:
            raise UserError(
                f"{name} does not apply to data {config.name!r}, got {getattr(config, name)!r}; leave it out"
            )
