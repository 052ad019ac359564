"""load: whatever is done to a file, damage is found before anything is used."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmef_fx import Config, load, save, transform
from fedmef_fx.errors import CheckpointError
from fedmef_fx.files.checkpoint_file import digest_of
from fedmef_fx.files.container import STORED_DTYPES, read


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def _small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


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
    metadata["digest"] = digest_of(tensors, metadata)
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
        b'{"x":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]},"x":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}}',
        b'{"__metadata__":{"format":1},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
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
    """A file, its content, and the model that it holds."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model = transform(_small(), Config(density=0.5))
    save(model, path)
    return path, path.read_bytes(), model


@pytest.fixture(scope="module")
def other() -> nn.Module:
    """A model that the file fits, with other weights and masks at first."""
    return transform(_small(), Config(density=0.5, seed=3))


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), in_header=st.booleans())
def test_a_flipped_byte_is_found_or_means_nothing(
    checkpoint: tuple[Path, bytes, nn.Module], other: nn.Module, position: float, flip: int, in_header: bool
) -> None:
    path, data, source = checkpoint
    header = 8 + int.from_bytes(data[:8], "little")
    damaged = bytearray(data)
    damaged[int(position * (header if in_header else len(data)))] ^= flip
    path.write_bytes(damaged)
    before = _state(other)

    try:
        load(path, other)
    except CheckpointError:
        _assert_equal(_state(other), before)
    else:
        _assert_equal(_state(other), _state(source))


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


@pytest.mark.parametrize("dtype", STORED_DTYPES.values(), ids=str)
def test_every_stored_dtype_is_read_as_it_was_written(dtype: torch.dtype) -> None:
    source = torch.tensor([[0, 1, 0, 1]], dtype=torch.uint8).repeat(1, 8).view(torch.uint8)
    tensor = source.bool() if dtype == torch.bool else source.view(dtype)
    data = safetensors.torch.save({"x": tensor, "empty": tensor[:, :0]}, {"a": "b"})

    tensors, metadata = read(data)
    assert metadata == {"a": "b"}
    assert tensors["empty"].shape == (1, 0)
    assert (tensors["x"].dtype, tensors["x"].shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(tensors["x"].view(torch.uint8), tensor.view(torch.uint8))
