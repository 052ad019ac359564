"""Hand-made models, each small enough that its graph text is read at a glance."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx

HOSTILE_NAMES = [
    'quote"quote',
    "new\nline",
    "<script>alert(1)</script>",
    "back\\slash",
    "\x1b[31mred",
    "separator\u2028",
    "übergröße-重み",
    "x" * 10_000,
]


def named(*layers: tuple[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def linear() -> nn.Module:
    return named(("fc", nn.Linear(4, 2)), ("relu", nn.ReLU()))


def two_convolutions() -> nn.Module:
    return named(
        ("conv1", nn.Conv2d(1, 8, 3, bias=False)),
        ("bn1", nn.BatchNorm2d(8)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(8, 4, 3)),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


class PerMode(nn.Module):
    """Its train and eval mode run different operations."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), p=0.5, training=self.training)


class Tied(nn.Module):
    """One parameter, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.fc(x)), self.fc.weight)


class Branches(nn.Module):
    """Values that are tuples, slices, and an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 4))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        left, right = (x @ self.weight).chunk(2, dim=-1)
        return left if scale is None else left[:, 1:] * scale + right[..., 1:].to(torch.float32)


def hostile(*names: str) -> nn.Module:
    return named(*((name, nn.Linear(2, 2)) for name in names or HOSTILE_NAMES))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.width // self.heads)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = named(("up", nn.Linear(width, 4 * width)), ("act", nn.GELU()), ("down", nn.Linear(4 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, *, depth: int = 3, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Encoder(nn.Module):
    """A text encoder whose forward decides on values, so that only its parts can be graphs; its pooler is opaque."""

    def __init__(self, *, depth: int = 2, width: int = 16) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width, 2) for _ in range(depth))
        self.pooler = nn.LSTM(width, width, batch_first=True)
        self.classifier = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x)
            if x.abs().max() > 100:  # what torch.fx cannot know while it traces
                x = x / 100
        return self.classifier(self.pooler(x)[0][:, -1])


def forms() -> str:
    """All that an inspection of a transformed model is written as."""
    torch.manual_seed(0)
    inspection = fedmef_fx.inspect(fedmef_fx.transform(two_convolutions()), (torch.ones(2, 1, 8, 8),))
    return f"{inspection} {inspection.to_json()} {inspection.to_dot()}"
