"""Averages over training that obey masks: by `averaged`, and by the classes of torch and of others."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

import fedmef_fx
from fedmef_fx import Config, averaged, masks, set_masks, transform
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.sparse_model.parameters import masked_parameters
from tests.packed_models import build

STORAGES = ("dense", "packed")
WAYS = {
    "averaged": lambda model: averaged(model, 0.75),
    "averaged, buffers": lambda model: averaged(model, 0.75, use_buffers=True),
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75)),
    "ema, buffers": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True),
    "ema one by one, buffers": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.75), use_buffers=True),
}


def make(storage: str, *, name: str = "conv") -> nn.Module:
    model, _, _ = build(name)
    return transform(model, Config(density=0.4, normalization="keep", activation_sparsity=0.0, weight_storage=storage))


def dense(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.dense() for name, parameter in masked_parameters(model).items()}


def move(model: nn.Module, seed: int) -> None:
    """What a step of an optimizer does to the active weights and to biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in masked_parameters(model).values():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.write(values[parameter.mask])


def rotate(model: nn.Module) -> None:
    """As many active weights as before, at other coordinates."""
    set_masks(model, {name: mask.roll(1) for name, mask in masks(model).items()})


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-12, atol=1e-12)  # one operation in double precision


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("way", WAYS)
def test_values_are_averaged_by_coordinate_and_masks_are_the_newest(way: str, storage: str, resized: bool) -> None:
    model = make(storage)
    average = WAYS[way](model)
    average.update_parameters(model)
    before, old = dense(model), masks(model)
    rotate(model)
    if resized:
        set_masks(model, {name: torch.rand(mask.shape) < 0.5 for name, mask in masks(model).items()})
    move(model, 1)
    average.update_parameters(model)
    now, new = dense(model), masks(model)
    assert all(torch.equal(mask, new[name]) for name, mask in masks(average.module).items())
    expected = {
        name: torch.where(new[name] & old[name], 0.75 * before[name] + 0.25 * now[name], now[name]) for name in now
    }
    assert_same(dense(average.module), expected)
    assert fedmef_fx.density(average.module) == fedmef_fx.density(model)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("how", ["averaged", "torch", "torch, one by one, buffers"])
def test_equal_weights(how: str, storage: str) -> None:
    model = make(storage)
    average = {
        "averaged": lambda: averaged(model, None),
        "torch": lambda: AveragedModel(model),
        "torch, one by one, buffers": lambda: AveragedModel(model, avg_fn=get_swa_avg_fn(), use_buffers=True),
    }[how]()
    seen = []
    rotate(model)
    for seed in range(3):
        move(model, seed)
        average.update_parameters(model)
        seen.append(dense(model))
    assert_same(dense(average.module), {name: sum(step[name] for step in seen) / 3 for name in seen[0]})


@pytest.mark.parametrize("use_buffers", [False, True])
def test_buffers_are_copied_or_averaged_and_counters_copied(use_buffers: bool) -> None:
    model, (_, x, _) = make("packed"), build("conv")
    average = averaged(model, 0.5, use_buffers=use_buffers)
    model(x)
    average.update_parameters(model)
    first = model.norm1.running_mean.clone()
    model(x + 1)
    average.update_parameters(model)
    now = model.norm1.running_mean
    expected = (first + now) / 2 if use_buffers else now
    torch.testing.assert_close(average.module.norm1.running_mean, expected, rtol=1e-12, atol=1e-12)
    assert int(average.module.norm1.num_batches_tracked) == 2


@pytest.mark.parametrize("storage", STORAGES)
def test_the_state_goes_into_another_average_and_through_pickle_and_copies(storage: str) -> None:
    model = make(storage)
    average = averaged(model, 0.75)
    average.update_parameters(model)
    set_masks(model, {name: torch.rand(mask.shape) < 0.5 for name, mask in masks(model).items()})
    move(model, 2)
    average.update_parameters(model)
    other = averaged(make(storage), 0.75)
    other.load_state_dict(average.state_dict())
    dense_and_packed = [other, copy.deepcopy(average), pickle.loads(pickle.dumps(average))]  # noqa: S301 -- made here
    rotate(model)
    for counterpart in (average, *dense_and_packed):
        assert isinstance(counterpart, AveragedModel)
        counterpart.update_parameters(model)
        assert int(counterpart.n_averaged) == 3
        assert_same(dense(counterpart.module), dense(average.module))


class Lightning(nn.Module):
    """A module that holds a transformed model, as a LightningModule does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.head, self.net = nn.Linear(2, 2), net


class Mine(AveragedModel):
    """An average of somebody's own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


class ModelEmaV2(nn.Module):
    """How timm's class of that name averages: everything in the dictionary, masks included."""

    __module__ = "timm.utils.model_ema"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)

    def _update(self, model: nn.Module, decay: float) -> None:
        with torch.no_grad():
            pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
            for average, value in pairs:
                average.copy_(decay * average + (1.0 - decay) * value)

    def update(self, model: nn.Module) -> None:
        self._update(model, 0.75)

    def set(self, model: nn.Module) -> None:
        self._update(model, 0.0)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_class_that_averages_whole_dictionaries(storage: str) -> None:
    model = make(storage)
    average = ModelEmaV2(model)
    before, old = dense(model), masks(model)
    set_masks(model, {name: torch.rand(mask.shape) < 0.5 for name, mask in masks(model).items()})
    move(model, 1)
    average.update(model)
    now, new = dense(model), masks(model)
    both = {name: new[name] & old[name] for name in new}
    expected = {name: torch.where(both[name], 0.75 * before[name] + 0.25 * now[name], now[name]) for name in now}
    assert_same(dense(average.module), expected)
    rotate(model)
    average.set(model)
    assert_same(dense(average.module), dense(model))


@pytest.mark.parametrize("storage", STORAGES)
def test_models_inside_of_others_and_classes_of_others(storage: str) -> None:
    whole = Lightning(make(storage))
    average = Mine(whole, 0.5)
    assert isinstance(average, Mine)
    average.update_parameters(whole)
    rotate(whole.net)
    average.update_parameters(nn.ModuleDict({"wrapped": whole}))
    assert_same(dense(average.module.net), dense(whole.net))


class Recurrent(nn.Module):
    """A weight of the hook tier and one of the module tier."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.lstm(x)[0][:, -1]
        return self.head(out) if float(out.detach().mean()) > -9 else out


def test_weights_of_all_tiers() -> None:
    model = transform(Recurrent(), Config(density=0.5), example_inputs=(torch.randn(2, 3, 4),))
    average = averaged(model, 0.5)
    average.update_parameters(model)
    rotate(model)
    average.update_parameters(model)
    for name, mask in masks(model).items():
        assert not average.module.get_parameter(name)[~mask].any()
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(average.module).items())
    average.module(torch.randn(2, 3, 4))


def test_channels_that_come_back_have_the_models_biases() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    model = transform(net, Config(density=0.5, granularity="channel"))
    average = averaged(model, 0.5)
    average.update_parameters(model)
    rows = {name: mask.roll(int(mask.shape[0]) // 2, 0) for name, mask in masks(model).items() if name != "4.weight"}
    set_masks(
        model, {name: torch.zeros_like(mask).index_fill_(0, torch.arange(8), True) for name, mask in rows.items()}
    )
    set_masks(model, {name: torch.ones_like(mask) for name, mask in rows.items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update_parameters(model)
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(average.module).items())
    x = torch.randn(3, 6)
    assert average.module(x).isfinite().all()


def test_others_are_told() -> None:
    with pytest.raises(ConfigError, match="not a transformed model"):
        averaged(nn.Linear(2, 2))
    model = make("dense")
    with pytest.raises(ConfigError, match="got decay=2"):
        averaged(model, 2)
    average = averaged(model)
    with pytest.raises(ConfigError, match=r"fedmef_fx\.averaged\(model\)"):
        average.update_parameters(make("packed"))
    assert type(AveragedModel(nn.Linear(2, 2))) is AveragedModel


def averaged_by_hand(left: dict[str, Tensor], right: dict[str, Tensor], *, how: str) -> dict[str, Tensor]:
    found = {}
    for name, value in left.items():
        if value.is_floating_point() and value.shape == right[name].shape:
            found[name] = (value + right[name]) / 2
        elif how == "union":
            found[name] = value | right[name] if not value.is_floating_point() else value
        elif how == "numbers":
            found[name] = (value.double() + right[name].double()) / 2
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("how", ["union", "numbers", "of one"])
@pytest.mark.parametrize("storage", STORAGES)
def test_averages_of_dictionaries_with_different_masks_are_refused(storage: str, how: str) -> None:
    model, other = make(storage), make(storage)
    rotate(other)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = averaged_by_hand(model.state_dict(), other.state_dict(), how=how)
    with pytest.raises(CheckpointError, match="load_state_dict: "):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_moving_average_of_dictionaries_is_refused_with_the_remedy() -> None:
    model, other = make("packed"), make("packed")
    rotate(other)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in other.state_dict().items():
        if value.is_floating_point():
            state[name].lerp_(value, 0.001)
    with pytest.raises(CheckpointError, match=r"fedmef_fx\.averaged\(model\)"):
        model.load_state_dict(state)


@pytest.mark.parametrize("parts", [2, 3, 10])
def test_averages_of_dictionaries_with_the_same_masks_load(parts: int) -> None:
    model = make("dense")
    states = []
    for seed in range(parts):
        move(model, seed)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    mean = {name: sum(state[name] / parts for state in states) for name in states[0]}
    before = masks(model)
    model.load_state_dict(mean)
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    expected = sum(state["conv2.weight"] for state in states) / parts
    torch.testing.assert_close(model.get_parameter("conv2.weight").detach(), expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_remedy_for_several_models_works(storage: str) -> None:
    model, other = make(storage), make(storage)
    rotate(other)
    left, right = fedmef_fx.dense_state_dict(model), fedmef_fx.dense_state_dict(other)
    before = masks(model)
    model.load_state_dict({name: (value + right[name]) / 2 for name, value in left.items()})
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
