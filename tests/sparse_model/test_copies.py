"""Copies that are averaged by hand: told about masks that the model has changed, silent in every other case."""

import copy
import warnings
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config, transform

Storage = Literal["dense", "packed"]
STORAGES = pytest.mark.parametrize("storage", ["dense", "packed"])


def _model(storage: Storage) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    return transform(network, Config(density=0.5, weight_storage=storage))


def _average(copied: nn.Module, model: nn.Module) -> None:
    for own, other in zip(copied.parameters(), model.parameters(), strict=True):
        own.data.mul_(0.9).add_(other.data, alpha=0.1)  # no version counter sees this


def _lerp(copied: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(copied.parameters()), list(model.parameters()), 0.1)


def _train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(3, 6)).square().sum().backward()
    optimizer.step()


def _other_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: mask.flip(0) for name, mask in fedmef_fx.masks(model).items()}


@STORAGES
@pytest.mark.parametrize("average", [_average, _lerp])
@pytest.mark.parametrize("read", [lambda m: m(torch.ones(1, 6)), fedmef_fx.density, lambda m: m.state_dict()])
def test_an_average_under_former_masks_is_told(storage, average, read):
    model = _model(storage)
    teacher = copy.deepcopy(model)
    _train(model)
    average(teacher, model)
    teacher(torch.ones(1, 6))  # same masks: right
    fedmef_fx.set_masks(model, _other_masks(model))
    _train(model)
    average(teacher, model)
    with pytest.warns(UserWarning, match=r"other masks by now.*fedmef_fx\.averaged\(model\)"):
        read(teacher)
    read(teacher)  # once


@STORAGES
def test_the_remedy_is_silent(storage):
    model = _model(storage)
    teacher = copy.deepcopy(model)
    fedmef_fx.set_masks(model, _other_masks(model))
    fedmef_fx.set_masks(teacher, fedmef_fx.masks(model))
    _train(model)
    _average(teacher, model)
    teacher(torch.ones(1, 6))
    average = fedmef_fx.averaged(model, 0.9)
    average.update_parameters(model)
    fedmef_fx.set_masks(model, _other_masks(model))
    average(torch.ones(1, 6))


@STORAGES
def test_other_copies_are_silent(storage):
    model = _model(storage)
    snapshot, trained, loaded = (copy.deepcopy(model) for _ in range(3))
    _train(model)
    _train(trained)
    loaded.load_state_dict(copy.deepcopy(model.state_dict()))
    fedmef_fx.set_masks(model, _other_masks(model))
    for copied in (snapshot, trained, loaded):
        copied(torch.ones(1, 6))
        fedmef_fx.density(copied)


def test_a_copy_outlives_its_model():
    model = _model("dense")
    copied = copy.deepcopy(model)
    _average(copied, model)
    del model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied(torch.ones(1, 6))


def test_a_copy_of_a_copy_is_told_too():
    model = copy.deepcopy(_model("dense"))
    _train(model)
    teacher = copy.deepcopy(model)
    fedmef_fx.set_masks(model, _other_masks(model))
    _average(teacher, model)
    with pytest.warns(UserWarning, match="other masks"):
        teacher(torch.ones(1, 6))
