"""The command line trains, exports, and measures what it exported."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from fedmef_fx.federated.demo import demo_settings
from tests.cli.program import invoke, json_of


@pytest.mark.slow
def test_train_then_go_on_and_inspect_what_it_wrote(tmp_path: Path) -> None:
    arguments = ["train", "--clients", "3", "--clients-per-round", "1", "--density", "0.3", "--output", "run"]
    data = json_of(*arguments, "--rounds", "2")
    assert data["rounds"] == 2
    assert 0 < data["test_accuracy"] <= 1
    history = json.loads((tmp_path / "run" / "history.json").read_text(encoding="utf-8"))
    assert len(history["rounds"]) == 2
    again = json_of(*arguments, "--rounds", "2")
    assert again == data, "a finished run is not run again"
    assert invoke(*arguments, "--rounds", "2").stdout.startswith("resumed: 2 of 2 rounds were done before")

    comparison = json_of("compare", "run", "run/model.safetensors")
    assert comparison["total"]["overlap"] == 1
    assert "conv1.weight" in invoke("compare", "run", "run/model.safetensors").stdout

    assert json_of(*arguments, "--rounds", "3")["rounds"] == 3
    other = invoke(*arguments, "--rounds", "3", "--clients-per-round", "2", "--seed", "5")
    assert other.exit_code == 1
    assert "--restart" in other.stderr

    table = json_of("inspect", "digits_cnn", "--checkpoint", "run/model.safetensors")["parameters"]
    active, total = (sum(row[key] for row in table) for key in ("active", "weights"))
    assert active == round(0.3 * total)


@pytest.mark.slow
def test_export(tmp_path: Path) -> None:
    assert json_of("export", "digits_cnn", "packed.onnx")["weights"] == "packed"
    report = json_of("export", "digits_cnn", "model.onnx", "--weights", "dense")
    assert (tmp_path / "model.onnx").stat().st_size == report["bytes"]
    assert report["parity"]["max_abs"] < 1e-4
    document = json_of("inspect", "model.onnx")
    assert document["nbytes"] == report["bytes"]
    assert "conv4.weight" in invoke("inspect", "model.onnx", "--view", "table").stdout
    assert "= Conv(input, conv1.weight)" in invoke("inspect", "model.onnx").stdout
    assert invoke("inspect", "model.onnx", "--view", "diff").exit_code == 2


def test_export_of_a_compacted_model() -> None:
    options = ("--granularity", "channel", "--density", "0.5", "--allocation", "uniform", "--weights", "dense")
    full = json_of("export", "digits_cnn", "full.onnx", *options)
    small = json_of("export", "digits_cnn", "small.onnx", "--compact", *options)
    assert small["bytes"] < 0.4 * full["bytes"]
    assert small["parity"]["max_abs"] < 1e-4


@pytest.mark.slow
def test_export_verify_and_bench_of_a_packed_file(tmp_path: Path) -> None:
    np.save("samples.npy", np.random.default_rng(0).standard_normal((20, 1, 8, 8)))
    options = ["--weights", "packed", "--quantize", "int8", "--calibration", "samples.npy"]
    report = json_of("export", "digits_cnn", "model.onnx", *options)
    assert (report["weights"], report["quantize"]) == ("packed", "int8")
    assert report["bytes"] * 10 < report["plain_bytes"]

    intact = json_of("verify", "model.onnx")
    assert intact["is_intact"]
    assert [t["codec"].split("/")[1] for t in intact["tensors"]] == ["int8"] * len(intact["tensors"])

    data = json_of("bench", "onnx", "model.onnx", "--against", "model.onnx", "--repeats", "3", "--batch", "2")
    assert data["inputs"] == {"input": [2, 1, 8, 8]}
    first, second = data["files"]
    assert first["bytes"] == second["bytes"] == report["bytes"]
    assert 0 < first["milliseconds"]["min"] <= first["milliseconds"]["p50"] <= first["milliseconds"]["p99"]
    assert "min" in invoke("bench", "onnx", "model.onnx", "--repeats", "1").stdout

    (tmp_path / "model.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:-9])
    damaged = invoke("verify", "model.onnx")
    assert damaged.exit_code == 1
    assert "it is truncated" in damaged.stderr
    damaged = invoke("bench", "onnx", "model.onnx")
    assert damaged.exit_code == 1
    assert "onnxruntime cannot load it" in damaged.stderr


def test_sizes_are_a_dimension_and_a_name() -> None:
    failed = invoke("export", "digits_cnn", "m.onnx", "--dynamic-size", "length")
    assert failed.exit_code == 2
    assert "expected a dimension and a name" in failed.stderr
    failed = invoke("export", "digits_cnn", "m.onnx", "--dynamic-size", "7=length")
    assert failed.exit_code == 1
    assert "holds 7: 'length'; expected a dimension in [1, 2, 3]" in failed.stderr
    failed = invoke("bench", "onnx", "m.onnx", "--size", "length")
    assert failed.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no array", "cannot be read"), (b"", "cannot be read"), (None, "cannot be read")],
)
def test_bad_calibration_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "samples.npy").write_bytes(content)
    failed = invoke("export", "digits_cnn", "m.onnx", "--quantize", "int8", "--calibration", "samples.npy")
    assert failed.exit_code == 1
    assert message in failed.stderr


def test_calibration_samples_of_a_wrong_shape() -> None:
    np.save("samples.npy", np.zeros(7, np.float32))
    failed = invoke("export", "digits_cnn", "m.onnx", "--quantize", "int8", "--calibration", "samples.npy")
    assert failed.exit_code == 1
    assert "holds 1 arrays ([7]); expected one, [samples, ...]" in failed.stderr


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it in a fifth of its rounds, with fewer and larger clients."""
    settings = demo_settings(seed=0)
    training = dataclasses.replace(settings.training, batch_size=64)
    short = dataclasses.replace(settings, rounds=2, clients=3, training=training)
    for module in ("fedmef_fx.federated.demo", "fedmef_fx.commands.demo"):
        monkeypatch.setattr(importlib.import_module(module), "demo_settings", lambda *, seed: short)
    data = json_of("demo", "--output", "out")
    assert data["rounds"] == 2
    assert data["test_accuracy"] >= 0.75
    assert data["test_accuracy_dense"] >= 0.75
    assert data["onnx_accuracy"] == pytest.approx(data["test_accuracy"], abs=0.003)
    assert data["parity"] < 1e-4
    assert data["bytes_up"] < data["bytes_up_dense"]
    assert data["saved_bytes"] < data["saved_bytes_dense"]
    assert (tmp_path / "out" / "model.onnx").stat().st_size == data["file_bytes"]
    assert data["file_bytes"] < 0.5 * data["file_bytes_dense"]
