"""Crop, flip and normalise: in batches on the device, and the plain per-sample reference that gives the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unsharp.data.draws import AREA, ASPECT, FLIP, LEFT, TOP


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image.

    Args:
        crop: Shift it within a border of zeros that is an eighth of its side wide.
        flip: Mirror it left to right in half of the draws.
        rescale: Cut out 8 to 100 % of its area at an aspect ratio of 3/4 to 4/3 and resize that (streamed sets only).
    """

    crop: bool = False
    flip: bool = False
    rescale: bool = False

    def border(self, side: int) -> int:
        """Width in pixels of the zeros around an image whose shorter side is `side`."""
        return max(1, side // 8) if self.crop else 0


NO_AUGMENTATION = Augmentation()
AUGMENTATIONS = {
    "none": NO_AUGMENTATION,
    "crop": Augmentation(crop=True),
    "flip": Augmentation(flip=True),
    "crop_flip": Augmentation(crop=True, flip=True),
    "resized_crop_flip": Augmentation(flip=True, rescale=True),
}


class Crops(NamedTuple):
    """The crops of an epoch, on the device.

    Args:
        start: (k,) int64, first pixel of each crop, counted through all pixels of all padded images.
        mirrored: For each batch the positions (int64) within it that are mirrored.
    """

    start: Tensor
    mirrored: Sequence[Tensor]


def place(
    rows: np.ndarray | None,
    order: np.ndarray,
    sizes: Sequence[int],
    *,
    padded: torch.Size,
    augmentation: Augmentation,
    border: int,
    device: torch.device,
) -> Crops:
    """The crops that rows (k, COLUMNS) of the epoch's table stand for; without rows, every image as it is."""
    _, height, width, _ = padded
    top = left = np.full(len(order), border)
    flip = np.zeros(len(order), dtype=bool)
    if rows is not None:
        top, left = ((rows[:, column] * (2 * border + 1)).astype(np.int64) for column in (TOP, LEFT))
        flip = flip if not augmentation.flip else rows[:, FLIP] < 0.5
    start = torch.from_numpy((order * height + top) * width + left).to(device, non_blocking=True)
    # Which are mirrored is found on the host: a mask on the device would have to tell the host its count.
    mirrored = [np.flatnonzero(part) for part in np.split(flip, np.cumsum(sizes)[:-1])]
    counts = [len(part) for part in mirrored]
    positions = torch.from_numpy(np.concatenate(mirrored)).to(device, non_blocking=True)
    return Crops(start, positions.split(counts))


def crop_flip(padded: Tensor, start: Tensor, mirrored: Tensor, border: int) -> Tensor:
    """One batch of crops.

    Args:
        padded: (n, H + 2·border, W + 2·border, C) uint8, contiguous.
        start: (B,) int64 as in `Crops`.
        mirrored: (m,) int64 positions within the batch.
        border: Width of the zeros in pixels.

    Returns:
        (B, H, W, C) uint8.
    """
    n, rows, columns, channels = padded.shape
    height, width = rows - 2 * border, columns - 2 * border
    # A row of a crop is a run of W·C bytes. Overlapping runs, one from each pixel on, make the crop one copy of runs.
    runs = padded.as_strided((n * rows * columns - width + 1, width * channels), (channels, 1))
    first = start[:, None] + torch.arange(0, height * columns, columns, device=start.device)
    crops = runs.index_select(0, first.flatten()).view(-1, height, width, channels)
    if len(mirrored) == 0:
        return crops
    # The mirrored ones are put behind the others and then chosen by number, so that whole images are copied.
    numbers = torch.arange(len(start) + len(mirrored), device=start.device)
    choice = numbers[: len(start)].clone().index_copy_(0, mirrored, numbers[len(start) :])
    return torch.cat([crops, crops.index_select(0, mirrored).flip(2)]).index_select(0, choice)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, H, W, C) uint8 to float32: subtract `mean`, divide by `std`, both (C,) float32 on the scale 0..255."""
    # Whole rows at a time: an inner loop over three channels is several times slower.
    rows = images.flatten(-2).to(torch.float32)
    width = images.shape[-2]
    return rows.sub_(mean.repeat(width)).div_(std.repeat(width)).view(images.shape)


def reference(
    image: np.ndarray,
    row: np.ndarray | None,
    *,
    augmentation: Augmentation,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """One sample by the plain path, from the same row of the epoch's table as the batched path.

    Args:
        image: (H, W, C) uint8.
        row: (COLUMNS,) float64; None leaves the image as it is (evaluation).
        augmentation: What happens to the image.
        mean: (C,) float32 on the scale 0..255.
        std: (C,) float32 on the scale 0..255.

    Returns:
        (C, H, W) float32.
    """
    if row is not None:
        height, width, _ = image.shape
        border = augmentation.border(min(height, width))
        padded = np.pad(image, ((border, border), (border, border), (0, 0)))
        top, left = int(row[TOP] * (2 * border + 1)), int(row[LEFT] * (2 * border + 1))
        image = padded[top : top + height, left : left + width]
        if augmentation.flip and row[FLIP] < 0.5:
            image = image[:, ::-1]
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(torch.float32)
    return ((pixels - mean) / std).permute(2, 0, 1).contiguous()


def to_size(image: Any, size: int, resize: int | None = None) -> Any:
    """A PIL image with its shorter side resized to `resize` (default `size`) and its centre size × size cut out."""
    from PIL import Image

    width, height = image.size
    if (width, height) == (size, size) and resize in (None, size):
        return image
    scale = (resize or size) / min(width, height)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    image = image.resize(shape, Image.Resampling.BILINEAR)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return image.crop((left, top, left + size, top + size))


def resized_crop(image: Any, row: np.ndarray, size: int) -> Any:
    """A random part of a PIL image, resized to size × size (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    The part has 8 to 100 % of the area and an aspect ratio that is uniform on a log scale in [3/4, 4/3]. A side that
    does not fit is cut to the image's, which needs one draw where others try again.
    """
    from PIL import Image

    width, height = image.size
    area = width * height * (0.08 + 0.92 * row[AREA])
    aspect = np.exp((2 * row[ASPECT] - 1) * np.log(4 / 3))
    w = min(width, max(1, round(float(np.sqrt(area * aspect)))))
    h = min(height, max(1, round(float(np.sqrt(area / aspect)))))
    left, top = int(row[LEFT] * (width - w + 1)), int(row[TOP] * (height - h + 1))
    part = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row[FLIP] < 0.5 else part
