"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from unsharp.errors import UserError
from unsharp.models.base import MODELS, Stem, check_stem, every, kaiming_, skipped, stem_layers


class _Block(nn.Module):
    """Pre-activation block: BatchNorm, ReLU and 3x3 convolution twice, dropout between the two."""

    def __init__(self, n_in: int, n_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.shortcut, self.skip = None, skipped(n_in, stride)
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Conv2d(n_in, n_out, 1, stride=stride // self.skip, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        # A projected shortcut starts from the activated input, an identity from the raw one.
        kept = x if self.shortcut is None else self.shortcut(every(out, self.skip))
        out = self.dropout(F.relu(self.bn2(self.conv1(out)), inplace=True))
        return kept + self.conv2(out)


class WideResNet(nn.Module):
    """Three stages of `n_blocks` pre-activation blocks after a convolution of `width` channels."""

    def __init__(
        self, n_blocks: int, widen: int, n_classes: int, in_channels: int, width: int, small: bool, dropout: float
    ) -> None:
        super().__init__()
        self.conv1, self.pool = stem_layers(in_channels, width, small)
        blocks, n_in = [], width
        for stage in range(3):
            n_out = width * widen * 2**stage
            for i in range(n_blocks):
                blocks.append(_Block(n_in, n_out, 2 if stage > 0 and i == 0 else 1, dropout))
                n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(n_in)
        self.fc = nn.Linear(n_in, n_classes)
        kaiming_(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.conv1(x)))
        return self.fc(F.relu(self.bn(x), inplace=True).mean((2, 3)))


@MODELS.register("wide_resnet")
def wide_resnet(
    n_classes: int,
    input_shape: tuple[int, ...],
    *,
    depth: int = 28,
    widen: int = 10,
    width: int = 16,
    stem: Stem = "auto",
    dropout: float = 0.0,
) -> nn.Module:
    """Wide ResNet, WRN-28-10 by default: 36.5 M parameters for CIFAR.

    Args:
        n_classes: Number of logits.
        input_shape: (C, H, W), at least 8 pixels with the small stem, 32 with the large one.
        depth: 6·k + 4 for k blocks in each of the three stages.
        widen: Widening factor: the stages have widen·width·(1, 2, 4) channels.
        width: Channels of the first convolution.
        stem: "small" (3x3, no pooling), "large" (7x7 stride 2, pooling) or "auto".
        dropout: Probability of dropout within a block, in [0, 1).
    """
    small = check_stem("wide_resnet", stem, input_shape)
    if depth < 10 or depth % 6 != 4:
        raise UserError(f"depth: wide_resnet takes 10, 16, 22, 28, ... (6·k + 4), got {depth}")
    return WideResNet((depth - 4) // 6, widen, n_classes, input_shape[0], width, small, dropout)
