"""Masked parameters of transformed models as adjustments look at them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, transform
from fedmef_fx.sparse_model.effective import effective_parameters
from fedmef_fx.sparse_model.transformation import transformation_of

CONFIG = Config(adjustment_space="effective", density=0.5, activation_sparsity=0.0, weight_storage="dense")


class Net(nn.Module):
    """A convolution, a transposed one and a depthwise one with BatchNorm, a convolution and a linear layer without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.ConvTranspose2d(8, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.c, self.norm_c = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6, affine=False)
        self.d = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_a(self.a(x)))
        x = F.relu(self.norm_b(self.b(x)))
        x = self.norm_c(self.c(x))
        return self.head(self.d(x).mean((2, 3)))


def kernels_in_use(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The kernels that the convolutions of a model really compute with, in order."""
    seen: list[Tensor] = []
    original = torch.convolution

    def convolution(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        seen.append(weight.detach().clone())
        return original(x, weight, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "convolution", convolution)
        model(x)
    return seen


@pytest.mark.parametrize("statistics", ["active", "all"])
@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_they_are_what_layers_compute_with(monkeypatch: pytest.MonkeyPatch, storage: str, statistics: str) -> None:
    config = CONFIG.replace(weight_storage=storage, nsconv_statistics=statistics, activation_sparsity=0.5)
    model = transform(Net(), config)
    with torch.no_grad():
        for norm in (model.norm_a, model.norm_b):
            norm.weight.uniform_(0.5, 2)
    used = kernels_in_use(model, torch.randn(2, 2, 6, 6), monkeypatch)
    parameters = effective_parameters(model)
    names = ["a.weight", "b.weight", "c.weight", "d.weight"]
    assert [parameters[name].gain is not None for name in (*names, "head.weight")] == [True, True, True, False, False]
    assert len(used) == len(names)
    for name, kernel in zip(names, used, strict=True):
        parameter = parameters[name]
        assert torch.equal(parameter.dense(), kernel)
        assert torch.equal(parameter.values(), kernel[parameter.mask])
        places = torch.arange(0, parameter.masked.active, 2)
        positions = parameter.masked.positions()[places]
        stored = parameter.masked.places(positions)
        assert torch.equal(parameter.at(stored), kernel[parameter.mask][places])


def test_in_the_space_of_parameters_they_are_the_parameters() -> None:
    model = transform(Net(), CONFIG.replace(adjustment_space="parameter"))
    for name, parameter in effective_parameters(model).items():
        assert parameter.gain is None
        assert torch.equal(parameter.dense(), model.get_parameter(name).detach())


def test_without_nsconv_they_are_the_parameters() -> None:
    model = transform(Net(), CONFIG.replace(normalization="keep"))
    assert all(parameter.gain is None for parameter in effective_parameters(model).values())


def test_a_weight_that_two_kernels_share_in_different_ways_is_looked_at_as_it_is_stored() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.b.weight = self.a.weight
            self.norm_a, self.norm_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm_b(self.b(self.norm_a(self.a(x)).relu()))

    model = transform(Tied(), CONFIG)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert not model.a.weight.grad[~model.a.weight_mask].any()
    assert effective_parameters(model)["a.weight"].gain is None


def test_copies_and_models_of_earlier_versions_have_their_own_kernels() -> None:
    model = transform(Net(), CONFIG)
    twin = copy.deepcopy(model)
    assert effective_parameters(twin)["a.weight"].gain is twin.norm_a.weight
    state = dict(transformation_of(model).__dict__)
    del state["kernels"]
    earlier = transformation_of(twin)
    earlier.__setstate__(state)
    assert effective_parameters(twin)["a.weight"].gain is None


def test_a_kernel_that_python_code_may_call_has_its_gain_in_it() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if x.sum() > 0 else self.body(x) + 1

    model = transform(Branching(), CONFIG)
    assert effective_parameters(model)["body.0.weight"].gain is model.body[1].weight
