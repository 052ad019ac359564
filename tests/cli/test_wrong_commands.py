"""What a user can get wrong ends with one line that says so, never with a traceback."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.program import invoke

TRAIN = "train --rounds 1 --clients 2"
WRONG = [
    f"{TRAIN} gpt2_bytes",
    f"{TRAIN} vit_tiny",
    f"{TRAIN} resnet50",
    f"{TRAIN} zoo_of_tests:build",
    f"{TRAIN} zoo_of_tests:no_model",
    f"{TRAIN} zoo_of_tests:needs_more",
    f"{TRAIN} zoo_of_tests:instance",
    f"{TRAIN} zoo_of_tests:missing",
    f"{TRAIN} no_such_module:build",
    f"{TRAIN} :",
    f"{TRAIN} a:b:c",
    f"{TRAIN} --device nonsense",
    f"{TRAIN} --rounds 0",
    f"{TRAIN} --clients 0",
    f"{TRAIN} --clients 5000",
    f"{TRAIN} --clients-per-round 20",
    f"{TRAIN} --alpha -1",
    f"{TRAIN} --epochs 0",
    f"{TRAIN} --batch-size 0",
    f"{TRAIN} --lr nan",
    f"{TRAIN} --optimizer lion",
    f"{TRAIN} --schedule step",
    f"{TRAIN} --method fedfoo",
    f"{TRAIN} --density 2",
    f"{TRAIN} --data cifar10 --data-dir nowhere",
    f"{TRAIN} --data cifar10 --data-dir adir",
    f"{TRAIN} --output bad.json",
    f"{TRAIN} --config bad.json",
    f"{TRAIN} --config list.json",
    f"{TRAIN} --config unknown.json",
    f"{TRAIN} --config adir",
    "export digits_cnn",
    "export digits_cnn nowhere/x.onnx",
    "export digits_cnn adir",
    "export digits_cnn x.onnx --input 1x3x32x32",
    "export digits_cnn x.onnx --input 0",
    "export digits_cnn x.onnx --input -1x8x8",
    "export digits_cnn x.onnx --input axb",
    "export digits_cnn x.onnx --input 99999999x99999x99999",
    "export digits_cnn x.onnx --quantize int8",
    "export digits_cnn x.onnx --quantize int4",
    "export digits_cnn x.onnx --quantize int8 --calibration nowhere.npy",
    "export digits_cnn x.onnx --quantize int8 --calibration scalar.npy",
    "export digits_cnn x.onnx --quantize int8 --calibration strings.npy",
    "export digits_cnn x.onnx --quantize int8 --calibration objects.npy",
    "export digits_cnn x.onnx --quantize int8 --calibration wrong.npy",
    "export digits_cnn x.onnx --quantize int8 --calibration nan.npy",
    "export digits_cnn x.onnx --checkpoint garbage.safetensors",
    "export digits_cnn x.onnx --checkpoint nowhere",
    "export digits_cnn x.onnx --dynamic-size 9=y",
    "export digits_cnn x.onnx --passes nonsense",
    "export digits_cnn x.onnx --passes insert-masks{",
    "export digits_cnn x.onnx --target nonsense",
    "export digits_cnn x.onnx --granularity 9:4",
    "export digits_cnn x.onnx --ignore nothing",
    "export zoo_of_tests:Untraceable x.onnx --input 1x8",
    "export zoo_of_tests:hostile x.onnx --input 1x7",
    "export zoo_of_tests:build x.onnx",
    "verify nowhere.onnx",
    "verify garbage.onnx",
    "verify adir",
    "unpack garbage.onnx -o y.onnx",
    "unpack nowhere.onnx -o y.onnx",
    "unpack garbage.onnx",
    "inspect nothing",
    "inspect digits_cnn --input 1x5",
    "inspect digits_cnn --html nowhere/x.html",
    "inspect garbage.onnx",
    "inspect gpt2_bytes --input 1x3x32x32",
    "memory digits_cnn --input 1x9",
    "memory digits_cnn --batch 0",
    "memory digits_cnn --budget many",
    "memory digits_cnn --optimizer foo",
    "memory nothing",
    "memory digits_cnn --plot nowhere/x.png",
    "compare",
    "compare nowhere nowhere2",
    "compare garbage.safetensors garbage.safetensors",
    "compare adir adir",
    "bench nothing",
    "bench onnx nowhere.onnx",
    "bench onnx garbage.onnx",
    "demo --output bad.json",
    "demo --output bad.json/results",
    "compare-methods --output bad.json",
    "flower new bad.json",
    "flower new bad.json/app",
    "frobnicate",
    "--nothing",
]


@pytest.fixture(autouse=True)
def _wrong_files(_in_a_directory_with_models: None) -> None:
    Path("bad.json").write_text("{not json")
    Path("list.json").write_text("[1]")
    Path("unknown.json").write_text('{"densty": 1}')
    Path("garbage.onnx").write_bytes(b"\x00garbage")
    Path("garbage.safetensors").write_bytes(b"garbage" * 10)
    Path("adir").mkdir()
    np.save("scalar.npy", np.zeros(()))
    np.save("strings.npy", np.array(["a"]))
    np.save("objects.npy", np.array([{}], dtype=object))
    np.save("wrong.npy", np.zeros((4, 3, 5, 5), np.float32))
    np.save("nan.npy", np.full((4, 1, 8, 8), np.nan, np.float32))


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_ends_with_a_line_that_says_so(line: str) -> None:
    _is_refused(line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has such a device")
def test_a_device_that_is_not_there_is_named() -> None:
    assert "device: got 'cuda', which cannot be used here" in _is_refused(f"{TRAIN} --device cuda")


def _is_refused(line: str) -> str:
    result = invoke(*line.split())
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    assert result.stderr.strip()
    assert "Traceback" not in result.stderr
    assert "error: [Errno" not in result.stderr  # what Python says of a file, without what it was for
    return result.stderr
