"""VGG with BatchNorm (Simonyan & Zisserman 2014, arXiv 1409.1556), with torchvision's parameter names."""

from __future__ import annotations

from torch import Tensor, nn

from unsharp.models.base import MODELS, Stem, check_image, is_small, kaiming_

# Multiples of `width`; each stage ends in a 2x2 max pooling.
_STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))


class VGG(nn.Module):
    """Thirteen 3x3 convolutions, then one linear layer (`small`) or ImageNet's three with dropout 0.5."""

    def __init__(self, n_classes: int, in_channels: int, width: int, small: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_in = in_channels
        for stage in _STAGES:
            for n_out in (width * multiple for multiple in stage):
                layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
                n_in = n_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1 if small else 7)
        self.classifier = nn.Linear(n_in, n_classes) if small else _imagenet_head(n_in, 64 * width, n_classes)
        kaiming_(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _imagenet_head(n_in: int, hidden: int, n_classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for n_inputs in (n_in * 7 * 7, hidden):
        layers += [nn.Linear(n_inputs, hidden), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(hidden, n_classes))


@MODELS.register("vgg16_bn")
def vgg16_bn(n_classes: int, input_shape: tuple[int, ...], *, width: int = 64, stem: Stem = "auto") -> nn.Module:
    """VGG-16 with BatchNorm: 138 M parameters for ImageNet, 14.7 M for CIFAR.

    Args:
        n_classes: Number of logits.
        input_shape: (C, H, W), at least 32 pixels.
        width: Channels of the first convolution; hidden layers of the ImageNet classifier have 64·width.
        stem: VGG has one stem; "small" closes with a mean over positions and one linear layer, "large" with ImageNet's
            classifier of three; "auto" decides by the input.
    """
    check_image("vgg16_bn", input_shape, 32)
    return VGG(n_classes, input_shape[0], width, is_small(stem, input_shape))
