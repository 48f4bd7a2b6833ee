"""What the families of networks share: the registry, the configuration, the stem and the check of the input's size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from unsharp.errors import UserError
from unsharp.registry import Registry

Stem = Literal["auto", "small", "large"]
Option = bool | int | float | str
MODELS: Registry[Callable[..., nn.Module]] = Registry("model", "unsharp.models")
"""Every registered model, by name."""

SMALL_IMAGE = 64
SAFE_CHANNELS = 8


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network to build.

    Args:
        arch: A registered name, `timm:NAME`, `hf:NAME` (a local directory, a config.json or a hub name) or
            `package.module:function`.
        width: Output channels of the network's first convolution; every other layer scales with it. None takes the
            published width (`resnet18`, `resnet50`, `vgg16_bn` 64, `wide_resnet` 16, `vit_small` 384, `small_cnn` 32).
        stem: "small" keeps the resolution of small images, "large" is ImageNet's; "auto" takes "small" where neither
            side is above 64 pixels.
        options: Further keyword arguments of the architecture (`wide_resnet`: depth, widen; `vit_small`: patch, ...).
    """

    arch: str = "small_cnn"
    width: int | None = None
    stem: Stem = "auto"
    options: dict[str, Option] = field(default_factory=dict)


def is_small(stem: Stem, input_shape: tuple[int, ...]) -> bool:
    """True where the network takes the stem for small images."""
    return stem == "small" or (stem == "auto" and max(input_shape[1:]) <= SMALL_IMAGE)


def check_image(arch: str, input_shape: tuple[int, ...], least: int, way_out: str = "") -> None:
    """Refuse an input that is not an image (C, H, W) of at least `least` pixels on each side.

    Raises:
        UserError: naming the architecture, the least size it takes and `way_out`, another thing to do.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise UserError(f"input_shape: {arch} takes images (channels, height, width), got {tuple(input_shape)}")
    if min(input_shape[1:]) < least:
        size = "x".join(str(side) for side in input_shape[1:])
        raise UserError(
            f"input_shape: {arch} needs images of at least {least}x{least} pixels, got {size}; "
            f"take {way_out}larger images or another model (small_cnn takes 8x8)"
        )


def check_stem(arch: str, stem: Stem, input_shape: tuple[int, ...]) -> bool:
    """`is_small`, after a refusal of images that the stem would shrink to nothing.

    Raises:
        UserError: for less than 8 pixels with the small stem or 32 with the large one.
    """
    check_image(arch, input_shape, 8)
    small = is_small(stem, input_shape)
    if not small:
        check_image(f"{arch} with the large stem", input_shape, 32, "stem='small', ")
    return small


def stem_layers(in_channels: int, width: int, small: bool) -> tuple[nn.Conv2d, nn.Module]:
    """The first convolution and the pooling after it: 3x3 and none, or ImageNet's 7x7 stride 2 and 3x3 stride 2."""
    if small:
        return nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.Identity()
    return nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)


def skipped(n_in: int, stride: int) -> int:
    """The stride that is taken by leaving pixels out before a 1 × 1 convolution, in place of the convolution's own.

    Both give the same. On a processor torch's own step backward of a strided 1 × 1 convolution of 2 to 7 channels
    writes past its memory in the channels-last format (seen with torch 2.13), so below 8 channels pixels are left out.
    """
    return stride if n_in < SAFE_CHANNELS else 1


def every(x: Tensor, skip: int) -> Tensor:
    """Every so-manieth pixel of (..., H, W) in both directions."""
    return x if skip == 1 else x[..., ::skip, ::skip]


def kaiming_(model: nn.Module) -> None:
    """Initialise every convolution with He's normal rule for its fan-out (arXiv 1502.01852), biases with zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
