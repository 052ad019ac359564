"""Small models that are hard to trace, each with inputs; what makes it hard stands in its docstring."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class TiedEmbedding(nn.Module):
    """The output layer shares its weight with the embedding, which stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


class Shared(nn.Module):
    """One module under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            x = x[:100]
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class Functional(nn.Module):
    """Weights used by hand, in a ParameterList, under control flow on a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6) * 0.4) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        for index, weight in enumerate(self.weights):
            x = F.linear(x, weight) if x.size(-1) == 6 and index else x @ weight
        return x * self.scale


class DataDependent(nn.Module):
    """Control flow on values: only the children can be graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.by_hand = nn.Parameter(torch.randn(6, 6) * 0.3)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) if x.sum() > 0 else self.other(x)
        while x.abs().max() > 1:
            x = x * 0.5
        return self.head(x @ self.by_hand)


class Recurrent(nn.Module):
    """A cell in a Python loop over time, and an opaque LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 6)
        states = []
        for step in range(x.size(1)):
            state = self.cell(x[:, step], state)
            states.append(state)
        return self.head(self.lstm(torch.stack(states, 1))[0][:, -1])


class Attention(nn.Module):
    """nn.MultiheadAttention inside nn.TransformerEncoderLayer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


@dataclasses.dataclass
class Output:
    """What Rich returns."""

    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


class Rich(nn.Module):
    """Dictionary inputs, optional keyword arguments, and a dataclass as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, batch: dict[str, Tensor], *, mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        hidden = self.a(batch["a"])
        if "b" in batch:
            hidden = hidden + self.b(batch["b"])
        if mask is not None:
            hidden = hidden * mask
        logits = self.head(torch.relu(hidden))
        return Output(logits, (hidden,), None if labels is None else F.cross_entropy(logits, labels))


class Ordered(collections.OrderedDict[str, Tensor]):
    """A mapping of its own class, made in forward."""


class InPlace(nn.Module):
    """Writes into its tensors, reads its own mode and its buffers, draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls.add_(1)
        y = self.conv(x)
        y[:, 0] = 0
        if self.training:
            y += 0.1 * torch.randn_like(y)
        if y.shape[1] != 4:
            raise ValueError(y.shape)
        return {"out": self.head(y.mean(-1)), "features": y}


class Checkpointed(nn.Module):
    """Activation checkpointing of a block while training."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) if self.training else self.block(x)
        return self.head(x)


class Parametrized(nn.Module):
    """Weight norm, which keeps zeros, and an orthogonal weight, which does not."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        self.turned = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.turned(torch.relu(self.normed(x)))))


class Frozen(nn.Module):
    """A part that runs without gradients, which torch.fx forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.relu(self.backbone(x))
        return self.head(x)


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x > 0) * 0.5  # not the gradient of clamp: a trace into forward would show


class CustomGradient(nn.Module):
    """An autograd function with a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Clamp.apply(self.body(x)))


def _x(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(*shape),), {})


def _rich() -> Inputs:
    batch = {"a": torch.randn(3, 4), "b": torch.randn(3, 5)}
    return (batch,), {"mask": torch.rand(3, 6), "labels": torch.tensor([0, 2, 1])}


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "tied": (TiedEmbedding, lambda: ((torch.randint(20, (2, 5)),), {})),
    "shared": (Shared, _x(4, 6)),
    "functional": (Functional, _x(4, 6)),
    "data-dependent": (DataDependent, _x(4, 6)),
    "recurrent": (Recurrent, _x(2, 5, 4)),
    "attention": (Attention, _x(2, 5, 8)),
    "rich": (Rich, _rich),
    "in-place": (InPlace, _x(2, 3, 8)),
    "checkpointed": (Checkpointed, _x(3, 6)),
    "parametrized": (Parametrized, _x(4, 6)),
    "frozen": (Frozen, _x(4, 6)),
    "custom-gradient": (CustomGradient, _x(4, 6)),
}


def build(name: str) -> tuple[nn.Module, Callable[[], Inputs]]:
    """A fresh model and a function that makes inputs for it."""
    torch.manual_seed(0)
    make, inputs = ZOO[name]
    return make(), inputs
