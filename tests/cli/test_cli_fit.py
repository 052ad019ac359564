"""`fedmef-fx fit`: state dicts, factories with arguments, data from files, limits that are missed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fedmef_fx.cli import app
from fedmef_fx.commands.arguments import build_model
from fedmef_fx.commands.weights import load_weights
from fedmef_fx.errors import ConfigError, DataError

MODEL = "torch.nn:Linear"
OPTIONS = ["--model-option", "in_features=8", "--model-option", "out_features=3"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).normal(size=(60, 8))
    np.savez(tmp_path / "data.npz", x=x, y=x[:, :3].argmax(1))
    return tmp_path / "data.npz"


def _fit(data: Path, *arguments: str) -> object:
    command = ["fit", MODEL, *OPTIONS, "--data", str(data), "-o", str(data.parent / "out.onnx"), "--form", "int8"]
    return CliRunner().invoke(app, [*command, "--json", *arguments])


def test_a_file_is_written_and_reported(data: Path) -> None:
    torch.save({"state_dict": torch.nn.Linear(8, 3).state_dict()}, data.parent / "weights.pt")

    result = _fit(data, "--max-bytes", "100kB", "--weights", str(data.parent / "weights.pt"))

    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["fits"]
    assert report["candidates"][report["chosen"]]["bytes"] == (data.parent / "out.onnx").stat().st_size


def test_limits_that_are_missed_are_an_exit_code(data: Path) -> None:
    result = _fit(data, "--max-bytes", "10B")

    assert result.exit_code == 1
    assert "max_bytes by" in result.stdout


def test_weights_are_read_from_both_formats(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        load_weights(other, tmp_path / name)
        assert torch.equal(other.weight, model.weight)
        torch.nn.init.zeros_(other.weight)


def test_weights_that_run_code_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(8, 3), tmp_path / "module.pt")
    torch.save({"weight": torch.zeros(3, 4), "scale": torch.ones(1)}, tmp_path / "other.pt")

    with pytest.raises(DataError, match=r"cannot be read.*expected a state dict"):
        load_weights(torch.nn.Linear(8, 3), tmp_path / "module.pt")
    with pytest.raises(
        DataError, match=r"1 are missing, e.g. 'bias'; 1 belong to another model, e.g. 'scale'; 'weight' is"
    ):
        load_weights(torch.nn.Linear(8, 3), tmp_path / "other.pt")
    with pytest.raises(DataError, match="no such file"):
        load_weights(torch.nn.Linear(8, 3), tmp_path / "none.pt")


def test_factories_that_fail_name_their_arguments() -> None:
    assert build_model(MODEL, options={"in_features": 2, "out_features": 1}).in_features == 2
    with pytest.raises(ConfigError, match="calling it with wide failed"):
        build_model(MODEL, options={"wide": 2})
