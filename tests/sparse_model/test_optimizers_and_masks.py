"""Optimizers stay valid when the masks of a model change: all that hold a parameter, and those that are resumed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from fedmef_fx import Config, load, save, set_masks, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter
from fedmef_fx.sparse_model.parameters import masked_parameters
from tests.packed_models import build

STORAGES = ("dense", "packed")
MOMENTA = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}


def sparse_model(storage: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model, x, y = build("conv")
    config = Config(density=0.3, activation_sparsity=0.0, weight_storage=storage, seed=seed)
    return transform(model, config), x, y


def optimizer_of(name: str, model: nn.Module) -> Optimizer:
    if name == "adam":
        return Adam(model.parameters(), lr=0.0)
    return SGD(model.parameters(), lr=0.0, momentum=0.9)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *optimizers: Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def step_without_gradients(optimizer: Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()


def random_mask(parameter: MaskedParameter, seed: int) -> torch.Tensor:
    return torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed)) < 0.2 + 0.1 * seed


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("names", [("sgd", "adam"), ("adam", "sgd")], ids=" first, ".join)
def test_every_optimizer_carries_its_state_over(storage: str, names: tuple[str, str]) -> None:
    model, x, y = sparse_model(storage)
    optimizers = {name: optimizer_of(name, model) for name in names}
    train(model, x, y, *optimizers.values())
    parameter = masked_parameters(model)["conv2.weight"]
    before = {key: parameter.expand(optimizers[n].state[parameter.parameter][key]) for n in names for key in MOMENTA[n]}
    kept = parameter.mask.clone()

    for seed in (1, 2, 3):  # several changes in a row, between which the second optimizer never steps
        new = random_mask(parameter, seed)
        kept &= new
        set_masks(model, {"conv2.weight": new})
        step_without_gradients(optimizers[names[0]])
    for name in names:
        step_without_gradients(optimizers[name])
        for key in MOMENTA[name]:
            state = optimizers[name].state[parameter.parameter][key]
            assert state.shape == parameter.parameter.shape
            assert torch.equal(parameter.expand(state), torch.where(kept, before[key], 0.0)), (name, key)
    train(model, x, y, *optimizers.values())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("way", ["load", "load_state_dict"])
def test_a_resumed_optimizer_goes_on_where_it_was(storage, way, tmp_path) -> None:
    model, x, y = sparse_model(storage)
    optimizer = optimizer_of("sgd", model)
    train(model, x, y, optimizer)
    set_masks(model, {name: random_mask(parameter, 1) for name, parameter in masked_parameters(model).items()})
    train(model, x, y, optimizer)

    if way == "load":
        save(model, tmp_path / "m.safetensors")
        resumed = load(tmp_path / "m.safetensors", build("conv")[0])
    else:
        resumed, _, _ = sparse_model(storage, seed=5)  # its first masks are others
        resumed.load_state_dict(model.state_dict())
    other = optimizer_of("sgd", resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_without_gradients(other)

    for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(optimizer.state[left]["momentum_buffer"], other.state[right]["momentum_buffer"])


@pytest.mark.parametrize("storage", STORAGES)
def test_state_of_unknown_masks_is_an_error(storage: str) -> None:
    model, x, y = sparse_model(storage)
    optimizer = optimizer_of("sgd", model)
    train(model, x, y, optimizer)
    resumed = optimizer_of("sgd", model)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    parameter = masked_parameters(model)["conv2.weight"]
    set_masks(model, {"conv2.weight": parameter.mask.flip(0)})  # as many as before
    with pytest.raises(ConfigError, match=r"SGD\.step: .*loaded.*before or after.*load the model's state first"):
        step_without_gradients(resumed)
    step_without_gradients(optimizer)  # this one is known
    model.load_state_dict(model.state_dict())
    step_without_gradients(resumed)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_new_optimizer_needs_nothing(storage: str) -> None:
    model, x, y = sparse_model(storage)
    train(model, x, y, optimizer_of("sgd", model))
    parameter = masked_parameters(model)["conv2.weight"]
    early = optimizer_of("adam", model)
    set_masks(model, {"conv2.weight": random_mask(parameter, 2)})
    train(model, x, y, early, optimizer_of("sgd", model))
    assert early.state[parameter.parameter]["exp_avg"].shape == parameter.parameter.shape
