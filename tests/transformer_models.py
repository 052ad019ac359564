"""Transformer blocks and gated networks as users write them: explicit attention, Conv1D, LayerScale, drop-path, SE."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, as a product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.05)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.outputs)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class GPTBlock(nn.Module):
    """GPT-2's block: Conv1D, masked softmax attention with dropout, the tanh GELU written out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = Conv1D(dim, 3 * dim), Conv1D(dim, dim)
        self.fc1, self.fc2 = Conv1D(dim, 4 * dim), Conv1D(4 * dim, dim)
        self.attention_drop, self.drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.register_buffer("causal", torch.ones(64, 64, dtype=torch.bool).tril(), persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.heads, self.dim // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).split(self.dim, dim=2))
        scores = torch.matmul(q, k.transpose(-1, -2)) / (self.dim // self.heads) ** 0.5
        scores = scores.masked_fill(~self.causal[: x.size(1), : x.size(1)], float("-inf"))
        weights = self.attention_drop(F.softmax(scores, dim=-1).type(v.dtype))
        out = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return self.drop(self.proj(out.view(*out.shape[:-2], self.dim)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        hidden = self.fc1(self.norm2(x))
        hidden = (
            0.5 * hidden * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * torch.pow(hidden, 3.0))))
        )
        return x + self.drop(self.fc2(hidden))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, 64), nn.Embedding(64, 64)
        self.blocks = nn.ModuleList(GPTBlock(64, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 256, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(-1)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.8)
        keep.div_(0.8)
        return x * keep


class ViTBlock(nn.Module):
    """timm's block: fused or explicit attention, LayerNorm on queries, LayerScale, drop-path, GELU."""

    def __init__(self, dim: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1, self.norm2, self.query_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim // heads)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.drop_path = nn.Dropout(0.0), DropPath()
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * dim, dim))
        self.scale1, self.scale2 = nn.Parameter(torch.full((dim,), 0.1)), nn.Parameter(torch.full((dim,), 0.1))

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.query_norm(q)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self.attn_drop((q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)) * self.scale1)
        return x + self.drop_path(self.mlp(self.norm2(x)) * self.scale2)


class ViT(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 48, 4, 4)
        self.blocks = nn.Sequential(*(ViTBlock(48, 3, fused=fused) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x).flatten(2).transpose(1, 2))).mean(1))


class Gated(nn.Module):
    """A SwiGLU block with a hand-written RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, 64), nn.Linear(64, 8)
        self.scale = nn.Parameter(torch.ones(64))
        self.gate, self.up, self.down = nn.Linear(64, 160), nn.Linear(64, 160), nn.Linear(160, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        normed = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return self.head(x + self.down(F.silu(self.gate(normed)) * self.up(normed)))


class SqueezeExcite(nn.Module):
    """An EfficientNet-like block: BatchNorm that is kept, in-place SiLU and Hardswish, a sigmoid gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.act, self.act2 = nn.SiLU(inplace=True), nn.Hardswish(inplace=True)
        self.reduce, self.expand = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.point, self.norm2 = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(self.act2(self.norm2(self.point(x))).mean((2, 3)))


def _image() -> tuple[Tensor, ...]:
    return (torch.randn(6, 3, 32, 32),)


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "gpt": (GPT, lambda: (torch.randint(256, (4, 48)),)),
    "vit": (lambda: ViT(fused=False), _image),
    "fused vit": (lambda: ViT(fused=True), _image),
    "gated": (Gated, lambda: (torch.randn(8, 32, 16),)),
    "squeeze-excite": (SqueezeExcite, _image),
}
