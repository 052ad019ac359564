"""Digest and manifest: damage is found out before a file gives wrong numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmef_fx import Config, export_onnx, transform, verify_onnx
from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx.digest import check_digest, seal
from fedmef_fx.export.onnx.manifest import MANIFEST_KEY, Manifest, ManifestTensor, read_manifest, write_manifest


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a file with encoded weights."""
    torch.manual_seed(0)
    model = transform(nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 5)), Config(density=0.1))
    path = tmp_path_factory.mktemp("sealed") / "m.onnx"
    export_onnx(model, path, example_inputs=(torch.randn(2, 60),), weights="packed")
    return path.read_bytes()


def test_verify_says_what_a_file_stores(sealed: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(sealed)

    manifest = verify_onnx(tmp_path / "m.onnx")

    assert (manifest.weights, manifest.quantize) == ("packed", None)
    (first, *_) = manifest.tensors
    assert (first.name, first.shape, first.codec.partition("/")[2]) == ("0.weight", (60, 60), "float32")
    assert first.active == round(first.density * 3600)
    assert first.node == "linear"


def test_a_sealed_file_loads_and_survives_a_copy(sealed: bytes, tmp_path: Path) -> None:
    (tmp_path / "copy.onnx").write_bytes(sealed)

    session = onnxruntime.InferenceSession(tmp_path / "copy.onnx", providers=["CPUExecutionProvider"])

    assert set(session.get_modelmeta().custom_metadata_map) == {"fedmef_fx.tensors", "fedmef_fx.sha256"}
    onnx.checker.check_model(tmp_path / "copy.onnx", full_check=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"got no digest at the end of the file \([\d,]+ bytes\); it is truncated"),
        (lambda data: data[: len(data) // 2], "got no digest"),
        (lambda data: b"", "got no digest"),
        (lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:], r"was\s+damaged or changed since"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"was\s+damaged or changed since"),
        (lambda data: b"x" + data, r"was\s+damaged or changed since"),
        (lambda data: data + b"\0", "got no digest"),
    ],
)
def test_damage_is_an_error(sealed: bytes, tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    (tmp_path / "m.onnx").write_bytes(damage(sealed))

    with pytest.raises(ExportError, match=rf"verify_onnx: .*m\.onnx: .*{message}"):
        verify_onnx(tmp_path / "m.onnx")


@given(st.data())
def test_every_flipped_bit_and_every_cut_is_found(sealed: bytes, data: st.DataObject) -> None:
    at, bit = data.draw(st.integers(0, len(sealed) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(sealed)
    flipped[at] ^= 1 << bit
    for damaged in (bytes(flipped), sealed[:at]):
        with pytest.raises(ExportError):
            check_digest(damaged, where="test")


def test_a_file_that_a_tool_changed_is_another_file(sealed: bytes, tmp_path: Path) -> None:
    changed = onnx.load_from_string(sealed)
    changed.producer_name = "tool"
    onnx.save(changed, tmp_path / "m.onnx")

    with pytest.raises(ExportError, match="damaged or changed since it was exported"):
        verify_onnx(tmp_path / "m.onnx")


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"absent\.onnx: cannot be read: .*expected a file that export_onnx wrote"):
        verify_onnx(tmp_path / "absent.onnx")
    (tmp_path / "m.onnx").write_bytes(seal(b"\xff\xff"))
    with pytest.raises(ExportError, match="is no ONNX model"):
        verify_onnx(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(seal(onnx.ModelProto(ir_version=8).SerializeToString()))
    with pytest.raises(ExportError, match="has no manifest"):
        verify_onnx(tmp_path / "m.onnx")


MANIFEST = Manifest("packed", "int8", (ManifestTensor("a.weight", "b", (4, 3), "gap4/int8", 5, 9, "conv2d"),))


def test_a_manifest_comes_back() -> None:
    proto = onnx.ModelProto()
    proto.metadata_props.add(key="other", value="stays")
    write_manifest(proto, Manifest("dense", None, ()))

    write_manifest(proto, MANIFEST)

    assert read_manifest(proto) == MANIFEST
    assert [entry.key for entry in proto.metadata_props] == ["other", MANIFEST_KEY]
    assert MANIFEST.tensors[0].density == 5 / 12
    assert read_manifest(onnx.ModelProto()) is None


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({"version": 2}),
        json.dumps({"version": 1, "columns": ["name"], "rows": [["x"]], "weights": "packed", "quantize": None}),
        json.dumps({"version": 1, "columns": [], "rows": [], "weights": 3, "quantize": None}),
    ],
)
def test_a_damaged_manifest_is_an_error(text: str) -> None:
    proto = onnx.ModelProto()
    proto.metadata_props.add(key=MANIFEST_KEY, value=text)

    with pytest.raises(ExportError, match=r"metadata 'fedmef_fx\.tensors' is no manifest of version 1"):
        read_manifest(proto)


def test_a_manifest_with_impossible_values_is_an_error() -> None:
    proto = onnx.ModelProto()
    write_manifest(proto, MANIFEST)
    text = proto.metadata_props[0].value
    for old, new in (("[4,3]", "[4,-3]"), ("[4,3]", '["a"]'), (",5,9,", ",5.5,9,"), ('"b"', "7"), ("[4,3]", "7")):
        proto.metadata_props[0].value = text.replace(old, new)
        with pytest.raises(ExportError, match="is no manifest"):
            read_manifest(proto)
