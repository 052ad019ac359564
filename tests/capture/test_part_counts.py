"""Traced with an example, a model that counts the parts of a tensor serves other shapes, too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.graph.emit import program_of

EXACT = Config(density=1.0, normalization="keep", activation_bits=None, activation_sparsity=0.0)
COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "unbind": lambda y: torch.stack([row * 2 for row in y.unbind(0)]),
    "split": lambda y: torch.stack([part * 2 for part in y.split(1)]),
    "length of a split": lambda y: y[: len(torch.split(y, 1, dim=0))],
    "chunk": lambda y: torch.cat([part * 2 for part in y.chunk(8)]),
    "unsafe split": lambda y: torch.cat([part * 2 for part in y.unsafe_split(1)]),
    "tensor split": lambda y: torch.cat([part * 2 for part in y.tensor_split(y.shape[0])]),
    "rows": lambda y: torch.cat([part * 2 for part in y.vsplit(y.shape[0])]),
    "list": lambda y: y[: len([None] * y.shape[0])],
    "tuple": lambda y: torch.stack([y[i] for i, _ in enumerate((0,) * y.shape[0])]),
    "text": lambda y: y[: len("a" * y.shape[0])],
    "iteration": lambda y: torch.stack([row * 2 for row in y]),
}
FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda y: torch.cat(y.chunk(2, -1)),
    "split": lambda y: torch.cat(y.split(2, dim=-1)),
    "sizes": lambda y: torch.cat(torch.split(y, [1, 3], 1), 1),
    "unbind": lambda y: torch.cat(y.reshape(y.shape[0], 2, 2).unbind(1)),
    "list": lambda y: torch.cat([y] * y.dim()),
}


class _After(nn.Module):
    """A layer, and something that is done to its result."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def _serving_all_batches(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A model traced with an example, which computes what the original does for other batches, too."""
    network = _After(function)
    model = fedmef_fx.transform(network, EXACT, example_inputs=(torch.randn(2, 3),))
    for batch in (2, 3, 1, 5):
        x = torch.randn(batch, 3)
        torch.testing.assert_close(model(x), network(x))
    return model


@pytest.mark.parametrize("name", COUNTS)
def test_other_shapes_fall_into_other_numbers_of_parts(name: str) -> None:
    _serving_all_batches(COUNTS[name])


@pytest.mark.parametrize("name", FIXED)
def test_one_graph_serves_all_shapes_where_layers_make_the_parts(name: str) -> None:
    model = _serving_all_batches(FIXED[name])
    assert [len(region.graphs) for region in program_of(model).regions if region.role == "region"] == [1]
