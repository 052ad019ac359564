"""The result of `transform` is an instance of the model's own class, where one graph serves, too."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

from fedmef_fx import Config, transform


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    @property
    def width(self) -> int:
        return self.body.out_features

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def _sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("make", [_Net, _sequential])
@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_class_graph_and_code_survive(make, duplicate) -> None:  # type: ignore[no-untyped-def]
    model = make()
    sparse = transform(model, Config(density=0.5))
    again = duplicate(sparse)
    x = torch.randn(3, 8)

    assert isinstance(again, type(model))
    assert isinstance(again.graph, fx.Graph)
    assert "def forward" in again.code
    assert torch.equal(again(x), sparse(x))


def test_methods_and_properties_work() -> None:
    sparse = transform(_Net(), Config(density=0.5))
    x = torch.randn(3, 8)

    assert sparse.width == 16
    torch.testing.assert_close(sparse.head(sparse.forward_features(x)), sparse(x))


def test_a_sequential_shows_its_own_layers() -> None:
    sparse = transform(_sequential(), Config(density=0.5))

    assert len(sparse) == len(list(sparse)) == 3
    assert isinstance(sparse[-1], nn.Linear)
    assert type(sparse[:2]) is nn.Sequential
    assert sparse[:2](torch.randn(3, 8)).shape == (3, 16)
