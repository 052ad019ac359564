"""save and load: exact round trips, small files, and models that a checkpoint does not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fedmef_fx import Config, load, masks, save, set_masks, transform
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.models import digits_cnn
from fedmef_fx.sparse_model.transformation import is_transformed, transformation_of
from tests.models import ZOO, build


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def _small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("name", ZOO)
def test_round_trip_into_an_original_and_a_transformed_model(tmp_path: Path, name: str) -> None:
    original, _ = build(name, seed=1)
    model = transform(original, Config(density=0.3, seed=1, weight_storage="dense"))
    save(model, tmp_path / "model.safetensors")
    fresh, _ = build(name, seed=2)
    before = _state(fresh)
    transformed = transform(fresh, Config(density=0.3, seed=2, weight_storage="dense"))

    restored = load(tmp_path / "model.safetensors", fresh)
    same = load(tmp_path / "model.safetensors", transformed)

    assert same is transformed
    assert not is_transformed(fresh)
    assert transformation_of(restored).config == Config(density=0.3, seed=1, weight_storage="dense")
    _assert_equal(_state(fresh), before)
    _assert_equal(_state(restored), _state(model))
    _assert_equal(_state(same), _state(model))


def test_a_sparse_checkpoint_is_eight_times_smaller(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    save(transform(net, Config(density=0.1, weight_storage="dense")), tmp_path / "sparse")
    safetensors.torch.save_file(net.state_dict(), tmp_path / "dense")

    # 32 bits against 0.1 * 32 and the entropy of the mask, 0.47.
    assert 8.0 < (tmp_path / "dense").stat().st_size / (tmp_path / "sparse").stat().st_size < 9.0


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = transform(build("tied")[0], Config(density=0.5, weight_storage="dense"))
    save(model, tmp_path / "model")

    names = safetensors.torch.load_file(tmp_path / "model")
    assert sorted(names) == [
        "active/by_hand",
        "active/first.weight",
        "mask/by_hand",
        "mask/first.weight",
        "state/first.bias",
        "state/second.bias",
    ]


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(tmp_path: Path, dtype: torch.dtype, density: float) -> None:
    model = transform(_small().to(dtype), Config(density=density, weight_storage="dense"))
    save(model, tmp_path / "model")

    _assert_equal(_state(load(tmp_path / "model", _small().to(dtype))), _state(model))


def test_parameters_that_share_one_buffer(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    flat = torch.randn(2, 4, 4)
    for layer, part in zip(net, flat, strict=True):
        layer.weight = nn.Parameter(part)
    model = transform(net, Config(density=1.0, weight_storage="dense"))
    save(model, tmp_path / "model")

    _assert_equal(_state(load(tmp_path / "model", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))), _state(model))


def test_optimizers_stay_valid(tmp_path: Path) -> None:
    save(transform(_small(), Config(density=0.3, seed=1, weight_storage="dense")), tmp_path / "model")
    model = transform(_small(), Config(density=0.3, seed=2, weight_storage="dense"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for reload in (False, True):
        if reload:
            load(tmp_path / "model", model)
        optimizer.zero_grad()
        model(torch.randn(2, 1, 4, 4)).square().sum().backward()
        optimizer.step()

    for name, mask in masks(model).items():
        assert not model.get_parameter(name)[~mask].any()


def test_the_masks_are_those_of_the_moment_of_saving(tmp_path: Path) -> None:
    model = transform(_small(), Config(density=0.5, weight_storage="dense"))
    changed = {name: ~mask for name, mask in masks(model).items()}
    set_masks(model, changed)
    save(model, tmp_path / "model")

    _assert_equal(masks(load(tmp_path / "model", _small())), changed)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match=r"save: .*No space left on device"):
        save(transform(_small()), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_save_names_its_problems(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    with pytest.raises(ConfigError, match="Linear is not a transformed model"):
        save(nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"save: .*there is no directory"):
        save(transform(_small()), tmp_path / "missing" / "model")
    with pytest.raises(CheckpointError, match=r"save: 0\._extra_state is a dict; expected tensors only"):
        save(transform(nn.Sequential(Stateful(4, 4))), tmp_path / "model")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Linear(2, 2), r"the checkpoint has no weight, which the model has"),
        (digits_cnn, r"the checkpoint has no conv1\.weight, which the model has"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 5, 3), *_small()[1:]),
            r"0\.weight is float32\[4, 1, 3, 3\] in the checkpoint, float32\[5, 1, 3, 3\] in the model",
        ),
        (lambda: _small()[:4], r"the checkpoint has 4\.weight, which the model has not"),
        (
            lambda: _small().double(),
            r"0\.weight is float32\[4, 1, 3, 3\] in the checkpoint, float64\[4, 1, 3, 3\] in the model",
        ),
    ],
)
@pytest.mark.parametrize("is_original", [True, False])
def test_another_architecture(tmp_path: Path, other: Callable[[], nn.Module], message: str, is_original: bool) -> None:
    save(transform(_small(), Config(density=0.5, weight_storage="dense")), tmp_path / "model")
    model = other() if is_original else transform(other(), Config(density=0.5, weight_storage="dense"))
    before = _state(model)

    with pytest.raises(CheckpointError, match=f"load: another architecture: {message}"):
        load(tmp_path / "model", model)
    _assert_equal(_state(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Config(density=0.5, normalization="keep", weight_storage="dense"),
            r"trained with normalization='nsconv', .* transformed with 'keep'",
        ),
        (
            Config(density=0.5, nsconv_statistics="all", weight_storage="dense"),
            r"nsconv_statistics='active', .* transformed with 'all'",
        ),
        (Config(density=1.0, weight_storage="dense"), r"0\.weight has a mask in the checkpoint only"),
        (Config(density=0.5, ignore=("4",), weight_storage="dense"), r"4\.weight has a mask in the checkpoint only"),
    ],
)
def test_another_configuration(tmp_path: Path, config: Config, message: str) -> None:
    save(transform(_small(), Config(density=0.5, weight_storage="dense")), tmp_path / "model")
    model = transform(_small(), config)
    before = _state(model)

    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model", model)
    _assert_equal(_state(model), before)


def test_other_ties(tmp_path: Path) -> None:
    tied, _ = build("tied")
    save(transform(tied, Config(density=1.0, weight_storage="dense")), tmp_path / "model")
    untied, _ = build("tied")
    untied.second.weight = nn.Parameter(torch.randn(6, 6))

    with pytest.raises(CheckpointError, match=r"has no second\.weight|tied parameters are"):
        load(tmp_path / "model", untied)
