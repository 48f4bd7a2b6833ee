"""Vision transformers (Dosovitskiy et al. 2020, arXiv 2010.11929), with timm's parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unsharp.errors import UserError
from unsharp.models.base import MODELS, Stem, check_image, is_small


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, dim)
        return self.proj_drop(self.proj(mixed))


class _MLP(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class _Block(nn.Module):
    """Pre-norm attention and MLP, each around a shortcut."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _MLP(dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """A transformer over square patches, classified by the class token.

    Args:
        n_classes: Number of logits.
        input_shape: (C, H, W), H and W multiples of `patch`.
        patch: Side of a patch in pixels.
        dim: Size of a token.
        depth: Number of blocks.
        heads: Number of attention heads; divides `dim`.
        dropout: Probability of dropout after the embedding, the attention and in the MLP.
    """

    def __init__(
        self, n_classes: int, input_shape: tuple[int, ...], patch: int, dim: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.patch_embed = _PatchEmbed(channels, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (height // patch) * (width // patch), dim))
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(dim, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, n_classes)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)
        tokens = self.blocks(self.pos_drop(tokens + self.pos_embed))
        return self.head(self.norm(tokens[:, 0]))


@MODELS.register("vit_small")
def vit_small(
    n_classes: int,
    input_shape: tuple[int, ...],
    *,
    width: int = 384,
    stem: Stem = "auto",
    patch: int | None = None,
    depth: int = 12,
    heads: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """ViT-S: 12 blocks of width 384 with 6 heads; 22.05 M parameters for ImageNet with patches of 16.

    Args:
        n_classes: Number of logits.
        input_shape: (C, H, W); the network takes this size only.
        width: Channels of the patch convolution, which is the size of a token.
        stem: "small" takes patches of 4 pixels, "large" of 16; "auto" decides by the input.
        patch: Side of a patch in pixels, instead of the stem's; divides H and W.
        depth: Number of blocks.
        heads: Number of attention heads, a divisor of `width`; one for each 64 channels by default.
        dropout: Probability of dropout, in [0, 1).
    """
    check_image("vit_small", input_shape, 1)
    patch = patch or (4 if is_small(stem, input_shape) else 16)
    if any(side % patch for side in input_shape[1:]):
        size = "x".join(str(side) for side in input_shape[1:])
        raise UserError(f"patch: {patch} pixels do not divide images of {size}; give vit_small a patch that does")
    heads = heads or max(1, width // 64)
    if width % heads:
        raise UserError(f"width: vit_small shares {width} channels among {heads} heads; give heads that divide width")
    return ViT(n_classes, input_shape, patch, width, depth, heads, dropout)
