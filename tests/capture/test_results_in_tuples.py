"""Modules of torch that return tuples are known to, without example inputs: `isinstance` and unpacking see them."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.graph.emit import program_of

DENSE = Config(density=1.0, normalization="keep", activation_bits=None, activation_sparsity=0.0)
MODULES: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNN(8, 8),
    "lstm": lambda: nn.LSTM(8, 8),
    "gru": lambda: nn.GRU(8, 8),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "max pool": lambda: nn.MaxPool1d(1, return_indices=True),
    "linear": lambda: nn.Linear(8, 8),
}


class _First(nn.Module):
    """What a module returns, or the first of what it returns."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.last = inside, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x, x, x) if isinstance(self.inside, nn.MultiheadAttention) else (x,)
        found = self.inside(*arguments)
        if isinstance(found, (tuple, list)):
            found = found[0]
        out: Tensor = self.last(found)
        return out


class _State(nn.Module):
    """Everything that a recurrent module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside = nn.Linear(8, 8), nn.LSTM(8, 8)

    def forward(self, x: Tensor) -> Any:
        out, state = self.inside(self.first(x))
        assert isinstance(state, tuple)
        return out, state


@pytest.mark.parametrize("name", MODULES)
def test_the_first_of_a_tuple(name: str) -> None:
    torch.manual_seed(0)
    network = _First(MODULES[name]())
    x = torch.randn(5, 3, 8)
    model = fedmef_fx.transform(network, DENSE)
    torch.testing.assert_close(model(x), network(x))
    assert "capture: 1 rewritten, 0 refused" in str(fedmef_fx.report(model))


def test_a_tuple_that_is_returned() -> None:
    network, x = _State(), torch.randn(5, 3, 8)
    out, (hidden, cell) = fedmef_fx.transform(network, DENSE)(x)
    expected, (expected_hidden, expected_cell) = network(x)
    torch.testing.assert_close((out, hidden, cell), (expected, expected_hidden, expected_cell))


def test_nothing_is_left_of_what_nobody_reads() -> None:
    model = fedmef_fx.transform(_First(nn.LSTM(8, 8)), Config(density=0.5))
    (graph,) = program_of(model).regions[0].graphs.values()
    assert sum(node.target is operator.getitem for node in graph.nodes) == 1
