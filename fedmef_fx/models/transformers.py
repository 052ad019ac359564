"""Two small transformers, for demos, tests and benchmarks: a vision transformer and a byte-level language model.

Both normalise before each block. Initial weights follow the papers: a truncated normal of deviation 0.02 (ViT), a
normal of 0.02 whose last projection of each residual branch is divided by sqrt(2 * depth) (GPT-2).
"""

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx.errors import ConfigError

__all__ = ["ByteTransformer", "VisionTransformer", "gpt2_bytes", "vit_tiny"]

_DEVIATION: Final = 0.02
_BYTES: Final = 256


class _Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int, *, is_causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(-2))
        return projected


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), the hidden layer four times as wide."""

    def __init__(self, dim: int, heads: int, *, is_causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _Attention(dim, heads, is_causal=is_causal)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU(approximate="tanh" if is_causal else "none")
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """A vision transformer with a class token; `vit_tiny` builds it.

    Args:
        image_size: Height and width of the images.
        patch_size: Height and width of a patch.
        in_channels: Channels of the images.
        num_classes: Number of logits.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.patch_embed = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads, is_causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=_DEVIATION)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_DEVIATION)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, channels, height, width]` to logits `[batch, num_classes]`."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def vit_tiny(
    num_classes: int = 10,
    *,
    image_size: int = 32,
    patch_size: int = 4,
    in_channels: int = 3,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
) -> VisionTransformer:
    """ViT-Ti for small images: width 192, 12 blocks, 3 heads, patches of 4x4.

    Input `[batch, 3, 32, 32]`, 5,362,762 parameters with 10 classes. Dosovitskiy et al., An Image is Worth 16x16
    Words, ICLR 2021; the size is that of Touvron et al., DeiT, ICML 2021.

    Args:
        num_classes: Number of logits.
        image_size: Height and width of the images.
        patch_size: Height and width of a patch; divides the image's.
        in_channels: Channels of the images.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads; divide the width.

    Returns:
        A model from `[batch, in_channels, image_size, image_size]` to `[batch, num_classes]`.

    Raises:
        ConfigError: A size below 1, or one that does not divide another as it must.

    Example:
        >>> digits = vit_tiny(image_size=8, patch_size=2, in_channels=1, dim=48, depth=2)
        >>> digits(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    sizes = {
        "image_size": image_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "dim": dim,
        "depth": depth,
        "heads": heads,
    }
    _check_positive("vit_tiny", num_classes=num_classes, **sizes)
    _check_divides("vit_tiny", patch_size=patch_size, image_size=image_size)
    _check_divides("vit_tiny", heads=heads, dim=dim)
    return VisionTransformer(num_classes=num_classes, **sizes)


class ByteTransformer(nn.Module):
    """A GPT-2 over bytes, with one weight for embedding and head; `gpt2_bytes` builds it.

    Args:
        context: Most bytes it sees.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads.
    """

    def __init__(self, *, context: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(_BYTES, dim)
        self.pos_embed = nn.Parameter(torch.empty(context, dim).normal_(std=_DEVIATION))
        self.blocks = nn.Sequential(*(_Block(dim, heads, is_causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, _BYTES, bias=False)
        self.head.weight = self.token_embed.weight
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_last = name.endswith((".proj", ".fc2"))
                nn.init.normal_(module.weight, std=_DEVIATION / math.sqrt(2 * depth) if is_last else _DEVIATION)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map bytes, int64 `[batch, length]`, to the logits of each next one, `[batch, length, 256]`."""
        x = self.token_embed(tokens) + self.pos_embed[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def gpt2_bytes(*, context: int = 128, dim: int = 256, depth: int = 6, heads: int = 8) -> ByteTransformer:
    """A small GPT-2 that reads and writes bytes.

    Input int64 `[batch, length]` with values below 256 and at most 128 bytes, 4,837,376 parameters. Radford et al.,
    Language Models are Unsupervised Multitask Learners, 2019.

    Args:
        context: Most bytes it sees.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads; divide the width.

    Returns:
        A model from `[batch, length]` to `[batch, length, 256]`.

    Raises:
        ConfigError: A size below 1, or heads that do not divide the width.

    Example:
        >>> gpt2_bytes(dim=32, depth=1, heads=2)(torch.tensor([[72, 105]])).shape
        torch.Size([1, 2, 256])
    """
    _check_positive("gpt2_bytes", context=context, dim=dim, depth=depth, heads=heads)
    _check_divides("gpt2_bytes", heads=heads, dim=dim)
    return ByteTransformer(context=context, dim=dim, depth=depth, heads=heads)


def _check_positive(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{where}: got {name}={size!r}; expected an integer >= 1")


def _check_divides(where: str, **sizes: int) -> None:
    (divisor, small), (name, large) = sizes.items()
    if large % small:
        raise ConfigError(f"{where}: got {name}={large} and {divisor}={small}; expected one that {divisor} divides")
