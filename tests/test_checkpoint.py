"""save and load: exact round trips, small files, and damage that is always found before anything is used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmef_fx import Config, load, masks, save, set_masks, transform
from fedmef_fx.checkpoint import _digest
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.model import is_transformed, transformation_of
from fedmef_fx.models import digits_cnn
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
    model = transform(original, Config(density=0.3, seed=1))
    save(model, tmp_path / "model.safetensors")
    fresh, _ = build(name, seed=2)
    before = _state(fresh)
    transformed = transform(fresh, Config(density=0.3, seed=2))

    restored = load(tmp_path / "model.safetensors", fresh)
    same = load(tmp_path / "model.safetensors", transformed)

    assert same is transformed
    assert not is_transformed(fresh)
    assert transformation_of(restored).config == Config(density=0.3, seed=1)
    _assert_equal(_state(fresh), before)
    _assert_equal(_state(restored), _state(model))
    _assert_equal(_state(same), _state(model))


def test_a_sparse_checkpoint_is_eight_times_smaller(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    save(transform(net, Config(density=0.1)), tmp_path / "sparse")
    safetensors.torch.save_file(net.state_dict(), tmp_path / "dense")

    # 32 bits against 0.1 * 32 and the entropy of the mask, 0.47.
    assert 8.0 < (tmp_path / "dense").stat().st_size / (tmp_path / "sparse").stat().st_size < 9.0


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = transform(build("tied")[0], Config(density=0.5))
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
    model = transform(_small().to(dtype), Config(density=density))
    save(model, tmp_path / "model")

    _assert_equal(_state(load(tmp_path / "model", _small().to(dtype))), _state(model))


def test_parameters_that_share_one_buffer(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    flat = torch.randn(2, 4, 4)
    for layer, part in zip(net, flat, strict=True):
        layer.weight = nn.Parameter(part)
    model = transform(net, Config(density=1.0))
    save(model, tmp_path / "model")

    _assert_equal(_state(load(tmp_path / "model", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))), _state(model))


def test_optimizers_stay_valid(tmp_path: Path) -> None:
    save(transform(_small(), Config(density=0.3, seed=1)), tmp_path / "model")
    model = transform(_small(), Config(density=0.3, seed=2))
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
    model = transform(_small(), Config(density=0.5))
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
    save(transform(_small(), Config(density=0.5)), tmp_path / "model")
    model = other() if is_original else transform(other(), Config(density=0.5))
    before = _state(model)

    with pytest.raises(CheckpointError, match=f"load: another architecture: {message}"):
        load(tmp_path / "model", model)
    _assert_equal(_state(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(density=0.5, normalization="keep"), r"trained with normalization='nsconv', .* transformed with 'keep'"),
        (Config(density=0.5, nsconv_statistics="all"), r"nsconv_statistics='active', .* transformed with 'all'"),
        (Config(density=1.0), r"0\.weight has a mask in the checkpoint only"),
        (Config(density=0.5, ignore=("4",)), r"4\.weight has a mask in the checkpoint only"),
    ],
)
def test_another_configuration(tmp_path: Path, config: Config, message: str) -> None:
    save(transform(_small(), Config(density=0.5)), tmp_path / "model")
    model = transform(_small(), config)
    before = _state(model)

    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model", model)
    _assert_equal(_state(model), before)


def test_other_ties(tmp_path: Path) -> None:
    tied, _ = build("tied")
    save(transform(tied, Config(density=1.0)), tmp_path / "model")
    untied, _ = build("tied")
    untied.second.weight = nn.Parameter(torch.randn(6, 6))

    with pytest.raises(CheckpointError, match=r"has no second\.weight|tied parameters are"):
        load(tmp_path / "model", untied)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    model = transform(_small())
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("this is not a checkpoint")
    torch.save(model.state_dict(), tmp_path / "pickle")
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "foreign")

    for name, message in [
        ("missing", "cannot be read"),
        (".", "cannot be read"),
        ("zero\0byte", "cannot be read"),
        ("empty", r"\(0 bytes\) is not a checkpoint"),
        ("text", "is not a checkpoint"),
        ("pickle", "is not a checkpoint"),
        ("foreign", "is not a checkpoint of fedmef_fx"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name, model)


def _rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Change a checkpoint and give it the digest that belongs to the change, as an attacker would."""
    data = path.read_bytes()
    metadata: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = safetensors.torch.load(data)
    change(tensors, metadata)
    metadata["digest"] = _digest(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def _set(key: str, value: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda _, metadata: metadata.update({key: value})


def _put(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, _: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("version", "2"), r"has format version 2; .* reads up to 1: upgrade it"),
        (_set("version", "9" * 5000), r"has format version 9+; "),
        (_set("config", "{}}"), r"configuration cannot be used: Config\.from_json: not JSON"),
        (_set("config", '{"warp": 9}'), r"configuration cannot be used: .*unknown field 'warp'"),
        (_set("architecture", "3"), r"architecture is a int; expected an object"),
        (_set("architecture", "{"), r"architecture cannot be read"),
        (_set("tied", '{"4.weight": "0.weight"}'), r"tied parameters are \{'4\.weight': '0\.weight'\}"),
        (lambda tensors, _: tensors.pop("state/0.bias"), r"0\.bias holds nothing"),
        (lambda tensors, _: tensors.pop("mask/4.weight"), r"4\.weight has a mask in the model only"),
        (_put("active/4.weight", lambda t: t[:-1]), r"4\.weight holds torch\.float32\[\d+\]"),
        (_put("active/4.weight", lambda t: t.double()), r"4\.weight holds torch\.float64\[\d+\]"),
        (_put("mask/4.weight", lambda t: t[:-6]), r"the mask of 4\.weight does not have the 6 bytes of 48 weights"),
        (_put("mask/4.weight", torch.zeros_like), r"the mask of 4\.weight is damaged"),
        (_put("mask/4.weight", lambda t: t.float()), r"the mask of 4\.weight "),
    ],
)
def test_a_well_formed_lie_is_found(tmp_path: Path, change: Callable[..., None], message: str) -> None:
    save(transform(_small(), Config(density=0.5)), tmp_path / "model")
    _rewrite(tmp_path / "model", change)
    model = transform(_small(), Config(density=0.5, seed=3))
    before = _state(model)

    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model", model)
    _assert_equal(_state(model), before)


def test_a_mask_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    import zlib  # noqa: PLC0415  # for this one attack

    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(10**7))), dtype=torch.uint8)
    save(transform(_small(), Config(density=0.5)), tmp_path / "model")
    _rewrite(tmp_path / "model", _put("mask/4.weight", lambda _: bomb))

    with pytest.raises(CheckpointError, match="does not have the 6 bytes"):
        load(tmp_path / "model", _small())


@pytest.mark.parametrize(
    "header",
    [
        b'{"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":"F32","shape":[18446744073709551615,18446744073709551615],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":"Q99","shape":[1],"data_offsets":[0,4]}}',
        b"[" * 5000,
    ],
)
def test_impossible_sizes(tmp_path: Path, header: bytes) -> None:
    for length in (len(header), 2**64 - 1):
        (tmp_path / "model").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(CheckpointError, match="is not a checkpoint, or a truncated or damaged one"):
            load(tmp_path / "model", _small())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model = transform(_small(), Config(density=0.5))
    save(model, path)
    return path, path.read_bytes(), model


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), in_header=st.booleans())
def test_a_flipped_byte_is_found_or_means_nothing(
    checkpoint: tuple[Path, bytes, nn.Module], position: float, flip: int, in_header: bool
) -> None:
    path, data, source = checkpoint
    header = 8 + int.from_bytes(data[:8], "little")
    damaged = bytearray(data)
    damaged[int(position * (header if in_header else len(data)))] ^= flip
    path.write_bytes(damaged)
    model = transform(_small(), Config(density=0.5, seed=3))
    before = _state(model)

    try:
        load(path, model)
    except CheckpointError:
        _assert_equal(_state(model), before)
    else:
        _assert_equal(_state(model), _state(source))


@settings(max_examples=30)
@given(share=st.floats(0, 1, exclude_max=True), padding=st.binary(max_size=20))
def test_a_file_cut_short_or_replaced_at_its_end_is_found(
    checkpoint: tuple[Path, bytes, nn.Module], share: float, padding: bytes
) -> None:
    path, data, source = checkpoint
    cut = data[: int(share * len(data))] + padding
    if cut == data:
        return
    path.write_bytes(cut)

    with pytest.raises(CheckpointError):
        load(path, source)


@settings(max_examples=50)
@given(data=st.binary(max_size=300))
def test_noise_is_no_checkpoint(checkpoint: tuple[Path, bytes, nn.Module], data: bytes) -> None:
    path, _, source = checkpoint
    path.write_bytes(data)

    with pytest.raises(CheckpointError):
        load(path, source)
