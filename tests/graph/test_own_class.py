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


class _Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
def test_methods_have_masks_and_normalised_kernels(storage, normalization) -> None:  # type: ignore[no-untyped-def]
    config = Config(density=0.5, weight_storage=storage, normalization=normalization, activation_sparsity=0)
    sparse = transform(_Normalized(), config)
    by_method = copy.deepcopy(sparse)
    x = torch.randn(4, 3, 6, 6)

    outputs = sparse(x), by_method.head(by_method.forward_features(x))
    for output in outputs:
        output.square().sum().backward()

    torch.testing.assert_close(*outputs)
    for left, right in zip(sparse.parameters(), by_method.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)  # sums in another order


class _List(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class _Dict(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for name in self:
            x = self[name](x)
        return x


def test_containers_show_their_own_layers() -> None:
    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)
    for model in (_List(layers), _Dict(dict(zip("abc", layers, strict=True)))):
        sparse = transform(model, Config(density=0.5))

        assert len(sparse) == len(list(sparse)) == 3
        assert not any(name.startswith("fedmef") for name in sparse if isinstance(name, str))
        torch.testing.assert_close(fx.symbolic_trace(sparse)(torch.ones(2, 8)), sparse(torch.ones(2, 8)))


def test_a_trace_sees_the_layers() -> None:
    sparse = transform(_sequential(), Config(density=0.5))

    assert [node.op for node in fx.symbolic_trace(sparse).graph.nodes] == [
        "placeholder",
        *["call_module"] * 3,
        "output",
    ]
