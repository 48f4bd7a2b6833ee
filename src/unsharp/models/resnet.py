"""Residual networks (He et al. 2015, arXiv 1512.03385), with torchvision's parameter names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from unsharp.models.base import MODELS, Stem, check_stem, every, kaiming_, skipped, stem_layers


class _Shortcut(nn.Sequential):
    """1x1 with the stride, and BatchNorm."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        self.skip = skipped(n_in, stride)
        conv = nn.Conv2d(n_in, n_out, 1, stride=stride // self.skip, bias=False)
        super().__init__(conv, nn.BatchNorm2d(n_out))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(every(input, self.skip))


def _shortcut(n_in: int, n_out: int, stride: int) -> nn.Module | None:
    if stride == 1 and n_in == n_out:
        return None
    return _Shortcut(n_in, n_out, stride)


class _Basic(nn.Module):
    """Two 3x3 convolutions, the first with the stride."""

    expansion = 1

    def __init__(self, n_in: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(n_in, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class _Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, and 1x1 to four times the planes."""

    expansion = 4

    def __init__(self, n_in: int, planes: int, stride: int) -> None:
        super().__init__()
        n_out = planes * self.expansion
        self.conv1 = nn.Conv2d(n_in, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, n_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.downsample = _shortcut(n_in, n_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """A residual network of four stages.

    Args:
        block: The kind of block.
        depths: Blocks of each stage.
        n_classes: Number of logits.
        in_channels: Channels of the images.
        width: Planes of the first stage; each later stage has twice as many.
        small: Whether the stem keeps the resolution (3x3, no pooling).
    """

    def __init__(
        self,
        block: type[_Basic] | type[_Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        n_classes: int,
        in_channels: int,
        width: int,
        small: bool,
    ) -> None:
        super().__init__()
        self.conv1, self.maxpool = stem_layers(in_channels, width, small)
        self.bn1 = nn.BatchNorm2d(width)
        n_outs = [width, *(width * 2**stage * block.expansion for stage in range(4))]

        def layer(stage: int) -> nn.Module:
            planes, n_out = width * 2**stage, n_outs[stage + 1]
            first = block(n_outs[stage], planes, 1 if stage == 0 else 2)
            return nn.Sequential(first, *(block(n_out, planes, 1) for _ in range(depths[stage] - 1)))

        self.layer1, self.layer2, self.layer3, self.layer4 = (layer(stage) for stage in range(4))
        self.fc = nn.Linear(n_outs[-1], n_classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


@MODELS.register("resnet18")
def resnet18(n_classes: int, input_shape: tuple[int, ...], *, width: int = 64, stem: Stem = "auto") -> nn.Module:
    """ResNet-18: basic blocks, 2-2-2-2; 11.7 M parameters for ImageNet, 11.2 M for CIFAR.

    Args:
        n_classes: Number of logits.
        input_shape: (C, H, W), at least 8 pixels with the small stem, 32 with the large one.
        width: Planes of the first convolution and stage; 64 is the published network, 8 a network of 0.18 M.
        stem: "small" (3x3, no pooling), "large" (7x7 stride 2, pooling) or "auto".
    """
    small = check_stem("resnet18", stem, input_shape)
    return ResNet(_Basic, (2, 2, 2, 2), n_classes=n_classes, in_channels=input_shape[0], width=width, small=small)


@MODELS.register("resnet50")
def resnet50(n_classes: int, input_shape: tuple[int, ...], *, width: int = 64, stem: Stem = "auto") -> nn.Module:
    """ResNet-50: bottleneck blocks with the stride in the 3x3 convolution, 3-4-6-3; 25.6 M parameters for ImageNet.

    Args: as `resnet18`; `width` is the planes before the fourfold expansion.
    """
    small = check_stem("resnet50", stem, input_shape)
    return ResNet(_Bottleneck, (3, 4, 6, 3), n_classes=n_classes, in_channels=input_shape[0], width=width, small=small)
