"""A small convolutional network for small grey or colour images, such as the 8x8 digits."""

from __future__ import annotations

from torch import nn

from unsharp.models.base import MODELS, check_image, kaiming_


def _conv(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]


@MODELS.register("small_cnn")
def small_cnn(n_classes: int, input_shape: tuple[int, ...], *, width: int = 32) -> nn.Module:
    """Three 3x3 convolutions with BatchNorm and a linear classifier, for images from 8x8 pixels.

    Args:
        n_classes: Number of logits.
        input_shape: (C, H, W), H and W at least 8.
        width: Channels of the first convolution; the two others have twice as many.
    """
    check_image("small_cnn", input_shape, 8)
    model = nn.Sequential(
        *_conv(input_shape[0], width),
        *_conv(width, 2 * width),
        nn.MaxPool2d(2),
        *_conv(2 * width, 2 * width),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, n_classes),
    )
    kaiming_(model)
    return model
