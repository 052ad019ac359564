"""Dictionaries of either storage, and of the original model, in and out; and those that must not get in."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedmef_fx import Config, dense_state_dict, load, masks, save, set_masks, transform
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.packing import unpack_bits
from fedmef_fx.sparse_model.parameters import masked_parameters
from tests.models import Tied
from tests.packed_models import MODELS, build

CONFIG = Config(density=0.3, activation_sparsity=0.0)
STORAGES = ("dense", "packed")


def make(name: str, storage: str, *, seed: int = 0) -> nn.Module:
    """A sparse model with weights and masks of its own."""
    model, _, _ = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return transform(model, CONFIG.replace(weight_storage=storage, seed=seed))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_what_a_packed_dictionary_looks_like() -> None:
    state = make("conv", "packed").state_dict()
    bits = unpack_bits(state["conv2.weight_bitmap"], 8 * 8 * 9)
    assert state["conv2.weight"].shape == (int(bits.sum()),)
    assert "conv2.weight_mask" not in state


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_a_dense_dictionary_loads_into_the_original(name: str, storage: str) -> None:
    sparse = make(name, storage)
    original, _, _ = build(name)
    original.load_state_dict(dense_state_dict(sparse), strict=True)
    for key, parameter in masked_parameters(sparse).items():
        assert torch.equal(original.get_parameter(key), parameter.dense())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("given", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_both_storages_load_both_forms_with_another_topology(name: str, given: str, storage: str) -> None:
    source, target = make(name, given, seed=1), make(name, storage, seed=2)
    set_masks(source, {key: torch.rand(mask.shape) < 0.6 for key, mask in masks(source).items()})
    parameters = [id(parameter) for parameter in target.parameters()]
    result = target.load_state_dict(source.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert [id(parameter) for parameter in target.parameters()] == parameters
    assert_same(masks(target), masks(source))
    assert_same(dense_state_dict(target), dense_state_dict(source))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_dictionary_of_the_original_keeps_the_masks(storage: str) -> None:
    target, (original, _, _) = make("grouped", storage), build("grouped")
    before = masks(target)
    target.load_state_dict(original.state_dict(), strict=True)
    assert_same(masks(target), before)
    for key, parameter in masked_parameters(target).items():
        assert torch.equal(parameter.dense(), torch.where(before[key], original.get_parameter(key), 0.0))


def test_tied_weights_are_packed_once_and_load_under_both_names() -> None:
    config = CONFIG.replace(weight_storage="packed")
    source, target = transform(Tied(), config), transform(Tied(), config.replace(seed=3))
    assert source.first.weight is source.second.weight
    assert source.first.weight.dim() == 1
    target.load_state_dict(source.state_dict())
    assert target.first.weight is target.second.weight
    x = torch.randn(2, 6)
    assert torch.equal(target(x), source(x))
    target.load_state_dict(Tied().state_dict())
    plain = Tied()
    plain.load_state_dict(dense_state_dict(source))
    assert torch.allclose(plain(x), source(x), atol=1e-6)


def test_assign_and_wrapped_models() -> None:
    source, target = make("conv", "packed", seed=1), make("conv", "packed", seed=2)
    wrapper = nn.Sequential(target)  # what DistributedDataParallel does to names
    wrapper.load_state_dict({f"0.{name}": value for name, value in source.state_dict().items()})
    assert_same(dense_state_dict(target), dense_state_dict(source))
    other = make("conv", "packed", seed=3)
    other.load_state_dict(snapshot(source), assign=True)
    assert_same(dense_state_dict(other), dense_state_dict(source))


def test_loading_moves_optimizer_state_to_the_new_places() -> None:
    target, source = make("conv", "packed"), make("conv", "packed", seed=4)
    set_masks(source, {name: mask | (torch.rand(mask.shape) < 0.2) for name, mask in masks(source).items()})
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        target(x).sum().backward()
        optimizer.step()
        target.load_state_dict(source.state_dict())
    optimizer.zero_grad()
    target(x).sum().backward()
    optimizer.step()
    for parameter in masked_parameters(target).values():
        assert optimizer.state[parameter.parameter]["momentum_buffer"].shape == parameter.parameter.shape


def _bad(state: dict[str, Tensor], kind: str) -> None:
    bitmap = "conv2.weight_bitmap"
    if kind == "short values":
        state["conv2.weight"] = state["conv2.weight"][:-1]
    elif kind == "short bitmap":
        state[bitmap] = state[bitmap][:-1]
    elif kind == "bitmap of another type":
        state[bitmap] = state[bitmap].int()
    elif kind == "flipped bit":
        state[bitmap] = state[bitmap].clone()
        state[bitmap][3] ^= 1
    elif kind == "values alone":
        del state[bitmap]
    elif kind == "bitmap alone":
        del state["conv2.weight"]
    elif kind == "dense of another shape":
        state["conv2.weight"] = torch.zeros(8, 8, 2, 2)
    elif kind == "no tensor":
        state[bitmap] = "bits"


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "kind",
    [
        "short values",
        "short bitmap",
        "bitmap of another type",
        "flipped bit",
        "bitmap alone",
        "dense of another shape",
        "no tensor",
    ],
)
def test_damaged_dictionaries_change_nothing(kind: str, storage: str) -> None:
    target, source = make("conv", storage), make("conv", "packed", seed=1)
    state, before = dict(source.state_dict()), snapshot(target)
    _bad(state, kind)
    with pytest.raises(CheckpointError, match=r"load_state_dict: .*conv2\.weight"):
        target.load_state_dict(state)
    assert_same(snapshot(target), before)


def test_values_without_a_bitmap_are_refused() -> None:
    target, source = make("conv", "packed"), make("conv", "packed", seed=1)
    state, before = dict(source.state_dict()), snapshot(target)
    _bad(state, "values alone")
    with pytest.raises(CheckpointError, match=r"conv2\.weight is .*; expected shape \[8, 8, 3, 3\]"):
        target.load_state_dict(state)
    assert_same(snapshot(target), before)


def test_bits_behind_the_last_weight_are_refused() -> None:
    target = make("transposed", "packed")
    state = snapshot(target)
    state["up3.weight_bitmap"][-1] |= 0x80  # 36 weights in 5 bytes
    with pytest.raises(CheckpointError, match="bits behind the last of 36 weights"):
        target.load_state_dict(state)


def test_a_model_that_is_not_transformed_has_no_dense_form() -> None:
    with pytest.raises(ConfigError, match="not a transformed model"):
        dense_state_dict(nn.Linear(2, 2))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("given", STORAGES)
def test_checkpoints_go_from_either_storage_to_either(tmp_path: Path, given: str, storage: str) -> None:
    source, target = make("conv", given, seed=1), make("conv", storage, seed=2)
    set_masks(source, {key: torch.rand(mask.shape) < 0.6 for key, mask in masks(source).items()})
    save(source, tmp_path / "model")
    load(tmp_path / "model", target)
    assert_same(masks(target), masks(source))
    assert_same(dense_state_dict(target), dense_state_dict(source))
    original, _, _ = build("conv")
    restored = load(tmp_path / "model", original)
    assert_same(snapshot(restored), snapshot(source))


def test_checkpoints_do_not_depend_on_the_storage(tmp_path: Path) -> None:
    for storage in STORAGES:
        save(make("grouped", storage, seed=1), tmp_path / storage)
    assert (tmp_path / "dense").stat().st_size == pytest.approx((tmp_path / "packed").stat().st_size, abs=16)
