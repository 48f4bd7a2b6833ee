"""Corrupted images: noise, blur, weather and light at five severities, batched, after Hendrycks & Dietterich.

A corruption is a function of (seed, sample, severity) alone: the same image comes out whatever the batch and the order,
so that all networks see the same, and on every device. Strengths are those of CIFAR-C for images up to 64 pixels and
those of ImageNet-C above; results are rounded to eight bits, as stored images are.

Source: Hendrycks & Dietterich, ICLR 2019 (arXiv 1903.12261), and the published code; Tang & Khanna 2026 (arXiv
2506.13715) train on Gaussian noise, glass blur and snow at severity 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unsharp.errors import UserError, unknown

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64
"""Images whose longer side has at most so many pixels take the strengths of CIFAR-C."""
TRUNCATE = 4.0
"""A Gaussian kernel ends at so many deviations."""
GREY = (0.299, 0.587, 0.114)
GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of SplitMix64, as signed numbers."""


@dataclass(frozen=True)
class Corruption:
    """What is done to images.

    Args:
        name: Of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Seed of noise, at least 0.

    Raises:
        UserError: if a value is not as above.
    """

    name: str
    severity: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise unknown("corruption", self.name, CORRUPTIONS)
        if self.severity not in SEVERITIES:
            raise UserError(f"severity must be one of 1 to 5, got {self.severity}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")

    @classmethod
    def read(cls, text: str) -> Corruption:
        """The corruption that NAME or NAME:SEVERITY names; 3 where there is no severity."""
        name, colon, severity = text.partition(":")
        if colon and not severity.isdigit():
            raise UserError(f"corruption must be NAME or NAME:SEVERITY, such as gaussian_noise:3; got {text!r}")
        return cls(name, int(severity) if colon else 3)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """The corrupted images.

        Args:
            images: (B, H, W, C) uint8, C 1 or 3.
            numbers: (B,) int64 on the same device, a number for each sample, on which its noise depends.

        Returns:
            (B, H, W, C) uint8 on the same device.
        """
        small = max(images.shape[1:3]) <= SMALL_SIDE
        apply, strengths = CORRUPTIONS[self.name]
        strength = strengths[0 if small else 1][self.severity - 1]
        x = images.permute(0, 3, 1, 2).to(torch.float32) / 255
        found = apply(x, strength, Noise(self.seed, numbers))
        return (found.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


# --- random numbers ---------------------------------------------------------------------------------------------------


class Noise:
    """Random numbers for each sample of a batch, which depend on the seed and the sample's number alone.

    Args:
        seed: At least 0.
        numbers: (B,) int64, the number of each sample.
    """

    def __init__(self, seed: int, numbers: Tensor) -> None:
        self._keys = mixed(mixed(numbers + 1) + seed * 2 + 1)
        self._taken = 0

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1), new ones in each call."""
        n = math.prod(shape)
        places = torch.arange(self._taken + 1, self._taken + n + 1, device=self._keys.device)
        self._taken += n
        bits = mixed(self._keys[:, None] + places * GOLDEN)
        return (_shifted(bits, 40).to(torch.float32) * 2.0**-24).reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32 standard normal numbers (Box & Muller 1958)."""
        first, second = self.uniform(*shape), self.uniform(*shape)
        return (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64 in low, ..., high − 1."""
        return low + (self.uniform(*shape) * (high - low)).to(torch.int64)


def mixed(z: Tensor) -> Tensor:
    """SplitMix64's output of a state, element by element; int64, read as 64 bits (Steele, Lea & Flood 2014)."""
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """The bits moved to the right, with zeros from the left."""
    return (z >> by) & ((1 << (64 - by)) - 1)


# --- corruptions: (B, C, H, W) float32 in [0, 1], a strength, and noise -----------------------------------------------


def gaussian_noise(x: Tensor, deviation: float, noise: Noise) -> Tensor:
    """x + deviation · normal noise, of each pixel and channel."""
    return x + deviation * noise.normal(*x.shape[1:])


def impulse_noise(x: Tensor, share: float, noise: Noise) -> Tensor:
    """A share of the values, each channel by itself, becomes 0 or 1, as likely the one as the other."""
    hit, white = noise.uniform(*x.shape[1:]) < share, noise.uniform(*x.shape[1:]) < 0.5
    return torch.where(hit, white.to(x), x)


def gaussian_blur(x: Tensor, deviation: float, noise: Noise | None = None) -> Tensor:
    """A Gaussian blur, the border repeated outwards; `deviation` in pixels."""
    radius = int(TRUNCATE * deviation + 0.5)
    if radius == 0:
        return x
    places = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (places / deviation) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype)
    channels = x.shape[1]
    for shape, pad in (((1, 1, -1, 1), (0, 0, radius, radius)), ((1, 1, 1, -1), (radius, radius, 0, 0))):
        weight = kernel.reshape(shape).expand(channels, -1, -1, -1)
        x = functional.conv2d(functional.pad(x, pad, mode="replicate"), weight, groups=channels)
    return x


def glass_blur(x: Tensor, strength: tuple[float, int, int], noise: Noise) -> Tensor:
    """Blurred, pixels exchanged with near ones, and blurred again; `strength` is (deviation, reach, rounds).

    Pixels are taken from the lower right to the upper left, each exchanged with one up to `reach` before it and
    reach − 1 after it on both axes. (In the published code both pixels get the colour of the one, as two views of an
    array are assigned crosswise.)
    """
    deviation, reach, rounds = strength
    _, channels, height, width = x.shape
    pixels = torch.floor(gaussian_blur(x, deviation) * 255).permute(0, 2, 3, 1).reshape(len(x), -1, channels)
    rows = torch.arange(len(x), device=x.device)
    for _ in range(rounds):
        steps = noise.whole(-reach, reach, 2, height, width)
        others = steps[:, 1] * width + steps[:, 0]
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                here = h * width + w
                there = here + others[:, h, w]
                kept = pixels[:, here].clone()
                pixels[:, here] = pixels[rows, there]
                pixels[rows, there] = kept
    shuffled = pixels.reshape(-1, height, width, channels).permute(0, 3, 1, 2) / 255
    return gaussian_blur(shuffled, deviation)


def snow(x: Tensor, strength: tuple[float, float, float, float, int, int, float], noise: Noise) -> Tensor:
    """Whitened, with streaks of snow in one direction for each image.

    `strength` is (mean and deviation of the flakes' noise, zoom, threshold, length and deviation of the streaks, share
    of the image that is kept).
    """
    mean, deviation, zoom, threshold, length, spread, kept = strength
    flakes = zoomed(mean + deviation * noise.normal(1, *x.shape[2:]), zoom)
    flakes = torch.where(flakes < threshold, torch.zeros_like(flakes), flakes)
    flakes = torch.floor(flakes.clamp(0, 1) * 255)
    flakes = motion_blur(flakes, length, spread, -135 + 90 * noise.uniform()).round() / 255
    if x.shape[1] == 3:
        grey = (x * x.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
    else:
        grey = x
    whitened = kept * x + (1 - kept) * torch.maximum(x, grey * 1.5 + 0.5)
    return whitened + flakes + flakes.flip(2, 3)


def brightness(x: Tensor, more: float, noise: Noise) -> Tensor:
    """The value V of (H, S, V) raised by `more`, at most to 1.

    With hue and saturation held, all channels are proportional to V.
    """
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, x * (raised / value.clamp(min=1e-6)), raised)


def contrast(x: Tensor, share: float, noise: Noise) -> Tensor:
    """Distances from the mean of each channel shrunk to a share."""
    means = x.mean(dim=(2, 3), keepdim=True)
    return (x - means) * share + means


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle of (B, C, H, W), enlarged linearly by `factor` ≥ 1 to the same size."""
    height, width = x.shape[2:]
    parts = [math.ceil(side / factor) for side in (height, width)]
    top, left = (height - parts[0]) // 2, (width - parts[1]) // 2
    middle = x[:, :, top : top + parts[0], left : left + parts[1]]
    size = [round(part * factor) for part in parts]
    large = functional.interpolate(middle, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, :, top : top + height, left : left + width]


def motion_blur(x: Tensor, length: int, deviation: float, degrees: Tensor) -> Tensor:
    """Each image blurred along a direction of its own, as ImageMagick does: half a Gaussian, the border repeated.

    Args:
        x: (B, C, H, W).
        length: Radius; the kernel has 2 · length + 1 places.
        deviation: Of the Gaussian, in pixels.
        degrees: (B,) the directions.
    """
    n = 2 * length + 1
    places = torch.arange(n, device=x.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (places / deviation) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype)
    angle = torch.deg2rad(degrees.to(torch.float64))
    right = torch.ceil(places * torch.cos(angle)[:, None] - 0.5).to(torch.int64)
    down = torch.ceil(places * torch.sin(angle)[:, None] - 0.5).to(torch.int64)
    height, width = x.shape[2:]
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    each = torch.arange(len(x), device=x.device)[:, None, None]
    found = torch.zeros_like(x)
    for k in range(n):
        row = (rows + down[:, k, None]).clamp(0, height - 1)[:, :, None]
        column = (columns + right[:, k, None]).clamp(0, width - 1)[:, None, :]
        found += kernel[k] * x.permute(0, 2, 3, 1)[each, row, column].permute(0, 3, 1, 2)
    return found


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, Any, Noise], Tensor], tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "gaussian_noise": (gaussian_noise, ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))),
    "impulse_noise": (impulse_noise, ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))),
    "gaussian_blur": (gaussian_blur, ((0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0))),
    "glass_blur": (
        glass_blur,
        (
            ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
            ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ),
    ),
    "snow": (
        snow,
        (
            (
                (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ),
            (
                (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ),
        ),
    ),
    "brightness": (brightness, ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))),
    "contrast": (contrast, ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))),
}
"""By name what is done, and its strengths by severity: for small images (CIFAR-C), and for large ones (ImageNet-C)."""
