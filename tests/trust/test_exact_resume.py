"""A training that was saved goes on bit for bit, pruned activations included."""

import copy
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config, transform
from fedmef_fx.errors import CheckpointError
from fedmef_fx.sparse_model.thresholds import (
    THRESHOLDS,
    set_thresholds,
    thresholds,
    thresholds_from_json,
    thresholds_to_json,
)

Storage = Literal["dense", "packed"]


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _config(storage: Storage) -> Config:
    return Config(density=0.3, activation_sparsity=0.9, weight_storage=storage)


def _steps(model: nn.Module, count: int, *, shift: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 3, 8, 8, generator=generator) + shift, torch.randint(0, 4, (32,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("way", ["save", "state_dict"])
def test_it_goes_on_bit_for_bit(tmp_path: Path, way: str, storage: Storage) -> None:
    model = transform(_network(), _config(storage))
    _steps(model, 3)
    if way == "save":
        fedmef_fx.save(model, tmp_path / "m.safetensors")
        resumed = fedmef_fx.load(tmp_path / "m.safetensors", _network())
    else:
        resumed = transform(_network(), _config(storage))
        resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(thresholds(resumed), thresholds(model))
    for each in (model, resumed):
        _steps(each, 6, shift=0.3)
    assert all(map(torch.equal, _weights(model), _weights(resumed)))


def _mixer() -> nn.Sequential:
    """Keeps inputs of a norm and of a GELU, and the result of a softmax."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.Flatten(2), nn.LayerNorm(36), nn.Linear(36, 32), nn.GELU(), nn.Linear(32, 16)]
    return nn.Sequential(*layers, nn.Softmax(1), nn.Flatten(), nn.Linear(1024, 4))


def test_what_is_saved_in_few_bits_is_rounded_as_without_the_break(tmp_path: Path) -> None:
    config = Config(density=0.3, activation_sparsity=0.0, saved_precision="int4")
    model = transform(_mixer(), config)
    _steps(model, 2)
    fedmef_fx.save(model, tmp_path / "m.safetensors")
    resumed, other = fedmef_fx.load(tmp_path / "m.safetensors", _mixer()), transform(_mixer(), config)
    other.load_state_dict({**model.state_dict(), THRESHOLDS: thresholds(other)})
    before = torch.random.get_rng_state()
    for each in (model, resumed, other):
        _steps(each, 3, shift=0.3)
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing of the caller's is drawn
    assert all(map(torch.equal, _weights(model), _weights(resumed)))
    assert not all(map(torch.equal, _weights(model), _weights(other)))


class _Block(nn.Module):
    """Layers that are specialised to shapes, so that calls with another size are captured when they first come up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            x = x * 2
        return self.second(self.first(x).relu()).relu()  # type: ignore[no-any-return]


class _Steered(nn.Module):
    """Python control flow, that values decide, around a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = _Block(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x).mean((2, 3))
        return self.head(y * 2 if y.sum() > 0 else y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("way", ["save", "state_dict", "saved twice"])
def test_a_kind_of_call_that_was_captured_late_goes_on(tmp_path: Path, way: str, storage: Storage) -> None:
    generator = torch.Generator().manual_seed(1)
    x, example = torch.randn(8, 3, 9, 9, generator=generator), torch.randn(2, 3, 8, 8)

    def steps(model: nn.Module, shift: float) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(x + shift).square().sum().backward()
            optimizer.step()

    model = transform(_Steered(), _config(storage), example_inputs=(example,))
    steps(model, 0.0)
    resumed = transform(_Steered(), _config(storage), example_inputs=(example,))
    if way == "state_dict":
        resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    else:
        fedmef_fx.save(model, tmp_path / "m.safetensors")
        fedmef_fx.load(tmp_path / "m.safetensors", resumed)
    if way == "saved twice":
        fedmef_fx.save(resumed, tmp_path / "m.safetensors")
        resumed = fedmef_fx.load(tmp_path / "m.safetensors", _Steered(), example_inputs=(example,))
    assert sorted(thresholds(resumed).tolist()) == sorted(thresholds(model).tolist())
    for each in (model, resumed):
        steps(each, 0.3)
    assert sorted(thresholds(resumed).tolist()) == sorted(thresholds(model).tolist())
    assert all(map(torch.equal, _weights(model), _weights(resumed)))


def test_a_dictionary_without_thresholds_loads() -> None:
    model = transform(_network(), _config("dense"))
    _steps(model, 1)
    before = thresholds(model)
    assert before.shape[0] > 0
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("thresholds")}
    model.load_state_dict(state)
    assert torch.equal(thresholds(model), before)
    assert not any("thresholds" in name for name in fedmef_fx.dense_state_dict(model))


def test_a_model_that_packs_other_tensors_takes_nothing() -> None:
    model = transform(_network(), _config("dense"))
    before = thresholds(model)
    set_thresholds(model, torch.ones(1, 4))
    assert torch.equal(thresholds(model), before)


def test_text_gives_the_same_numbers() -> None:
    model = transform(_network(), _config("dense"))
    assert (thresholds_from_json(thresholds_to_json(model)) < 0).any()  # nothing packed yet
    _steps(model, 2)
    assert torch.equal(thresholds_from_json(thresholds_to_json(model)), thresholds(model))


@pytest.mark.parametrize(
    "text", ["{", "3", "[3]", '[["a", 0, 0, 0]]', "[[0, 0, 0]]", "[[-1, 0, 0, 0]]", "[[0, 0, 0, 2]]"]
)
def test_damaged_text(text: str) -> None:
    with pytest.raises(CheckpointError, match="thresholds of activations"):
        thresholds_from_json(text)
