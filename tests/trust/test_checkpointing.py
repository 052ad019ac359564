"""Activation checkpointing, before and after the transformation: what runs under it is masked, and runs again."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fedmef_fx import Config, coverage, freeze, transform
from fedmef_fx.errors import ConfigError

EXACT = Config(density=0.3, activation_sparsity=0.0)


class OwnCheckpoint(Function):
    """Checkpointing as libraries of their own write it."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), grad)
        return None, x.grad


WAYS = {
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "a function": lambda block, x: checkpoint(lambda z, factor: block(z) * factor, x, 2.0, use_reentrant=True),
    "sequential": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=True),
    "own": OwnCheckpoint.apply,
    "own, of a method": lambda block, x: OwnCheckpoint.apply(block.forward, x),
}


class Checkpointed(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.block = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.head(WAYS[self.way](self.block, self.first(x).relu()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("has_example", [False, True])
@pytest.mark.parametrize("activation_sparsity", [0.0, 0.5])
def test_what_runs_under_checkpointing_is_masked(way: str, has_example: bool, activation_sparsity: float) -> None:
    x = torch.randn(4, 8)
    model = transform(
        Checkpointed(way),
        Config(density=0.3, activation_sparsity=activation_sparsity),
        example_inputs=(x,) if has_example else None,
    )
    names = [row.name for row in coverage(model).rows if row.masked]
    assert sorted(names) == ["block.0.weight", "block.2.weight", "first.weight", "head.weight"]
    output = model(x)
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(freeze(model)(x), output, rtol=0, atol=1e-6)  # another order of sums


class Block(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        Block.calls += 1
        return x + self.down(self.up(x).relu())


class CallsItself(Block):
    """Looks at its switch before its forward, as the layers of transformers do."""

    gradient_checkpointing = False

    def __call__(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(super().__call__, x, use_reentrant=False)
        return super().__call__(x)


class Switchable(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, *, is_reentrant: bool = False, branches: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.grad_checkpointing = False
        self.is_reentrant, self.branches = is_reentrant, branches

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        for block in self.blocks:
            block.gradient_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() > 1e9:
            return x
        for block in self.blocks:
            if self.grad_checkpointing and not isinstance(block, CallsItself):
                x = checkpoint(block, x, use_reentrant=self.is_reentrant)
            else:
                x = block(x)
        return x.flatten(1).sum(1)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("has_example", [False, True])
@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("block", [Block, CallsItself])
def test_it_can_be_switched_on_afterwards(
    storage: str, has_example: bool, is_reentrant: bool, branches: bool, block: type[nn.Module]
) -> None:
    x = torch.randn(4, 8)
    original = Switchable(block, is_reentrant=is_reentrant, branches=branches)
    model = transform(original, EXACT.replace(weight_storage=storage), example_inputs=(x,) if has_example else None)
    expected = step(copy.deepcopy(model), x)
    model.set_grad_checkpointing()
    for _ in range(2):
        Block.calls = 0
        gradients = step(model, x)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert torch.equal(gradient, wanted)
    model.set_grad_checkpointing(False)
    assert all(torch.equal(a, b) for a, b in zip(step(model, x), expected, strict=True))


def test_it_really_recomputes() -> None:
    model = transform(Switchable(), EXACT)
    model.set_grad_checkpointing()
    Block.calls = 0
    step(model, torch.randn(4, 8))
    assert Block.calls == 4
    model.eval()
    model(torch.randn(4, 8))
    assert Block.calls == 4  # the graph serves again


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


def test_what_only_the_graph_computes_is_refused_with_the_remedy() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = transform(Switchable(Convolutional), EXACT)
    model.set_grad_checkpointing()
    with pytest.raises(ConfigError, match=r"grad_checkpointing was turned on after transform.*residual=\"none\""):
        model(x)
    model.eval()(x)

    plain = transform(Switchable(Convolutional), EXACT.replace(residual="none"))
    expected = step(copy.deepcopy(plain), x)
    plain.set_grad_checkpointing()
    for gradient, wanted in zip(step(plain, x), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))

    before = Switchable(Convolutional)
    before.set_grad_checkpointing()
    step(transform(before, EXACT), x)
