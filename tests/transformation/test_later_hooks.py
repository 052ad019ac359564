"""Hooks that are registered on submodules after `transform` fire with the right tensors, and can be taken off."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fedmef_fx import Config, transform
from fedmef_fx.graph.watch import Watch
from fedmef_fx.models import resnet18
from tests.later_models import CONFIGS, Net, X

Register = Callable[[nn.Module, list[Any]], Any]
HOOKS: dict[str, Register] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda _, __, out: seen.append(out)),
    "always": lambda m, seen: m.register_forward_hook(lambda _, __, out: seen.append(out), always_call=True),
    "keywords": lambda m, seen: m.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True
    ),
}


PLACES = ["stem", "norm", "blocks", "blocks.1", "blocks.0.conv", "head"]
EVERY_PAIR = [
    (where, [*HOOKS][(row + column) % len(HOOKS)], config)
    for row, where in enumerate(PLACES)
    for column, config in enumerate(CONFIGS)
]


@pytest.mark.parametrize(("where", "kind", "config"), EVERY_PAIR)
def test_a_hook_fires_once_per_call_and_changes_nothing(where: str, kind: str, config: str) -> None:
    sparse = transform(Net(), CONFIGS[config]).eval()
    expected, seen, called = sparse(X), [], [node.target for node in sparse.graph.find_nodes(op="call_module")]

    handle = HOOKS[kind](sparse.get_submodule(where), seen)
    torch.testing.assert_close(sparse(X), expected)
    sparse(X)
    assert len(seen) == 2
    assert len(copy.deepcopy(sparse)(X)) == len(X)
    handle.remove()
    torch.testing.assert_close(sparse(X), expected)
    assert len(seen) == 3  # the copy has the hook, too
    assert [node.target for node in sparse.graph.find_nodes(op="call_module")] == called


def test_the_tensors_are_those_of_the_layer() -> None:
    sparse = transform(Net(), CONFIGS["keep"]).eval()
    seen: list[Tensor] = []
    sparse.blocks.register_forward_hook(lambda _, __, out: seen.append(out))
    sparse.blocks[0].conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    output = sparse(X)

    stem = sparse.norm(sparse.stem(X)).relu()
    torch.testing.assert_close(seen[0], stem)
    torch.testing.assert_close(sparse.head(seen[1].mean((2, 3))), output)


@pytest.mark.parametrize("config", ["dense", "keep"])
def test_gradients_of_a_layer(config: str) -> None:
    sparse = transform(Net(), CONFIGS[config])
    values: list[Tensor] = []
    gradients: list[Tensor] = []
    sparse.blocks[1].register_forward_hook(lambda _, __, out: values.append(out))
    sparse.blocks[1].register_full_backward_hook(lambda _, __, out: gradients.append(out[0]))

    sparse(X)[:, 0].sum().backward()

    assert len(values) == len(gradients) == 1
    expected = sparse.head.weight[0].detach().view(1, -1, 1, 1).expand_as(values[0]) / values[0][0, 0].numel()
    torch.testing.assert_close(gradients[0], expected)


def test_hooks_elsewhere_cost_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = transform(Net(), CONFIGS["dense"])
    sparse(X)
    nn.Linear(1, 1).register_forward_hook(lambda *_: None)
    sparse.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(Watch, "of", lambda *_: pytest.fail("captured again"))

    sparse(X)


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_a_hook_on_a_residual_block_leaves_the_factor_of_its_sum(storage: Literal["dense", "packed"]) -> None:
    torch.manual_seed(0)
    sparse = transform(resnet18(), Config(density=0.3, weight_storage=storage)).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = sparse(x)
    seen: list[Tensor] = []
    sparse.get_submodule("layer1.0").register_forward_hook(lambda module, inputs, result: seen.append(result))
    torch.testing.assert_close(sparse(x), expected)
    assert len(seen) == 1
