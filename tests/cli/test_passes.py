"""`--passes`: passes as text on the command line."""

import json

import pytest
from typer.testing import CliRunner

import fedmef_fx
from fedmef_fx.cli import app
from fedmef_fx.models import digits_cnn

RUNNER = CliRunner()


def call(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def test_they_run_after_those_of_the_configuration():
    result = call("inspect", "digits_cnn", "--passes", "pack-weights; shrink-saved", "--view", "passes")
    assert result.exit_code == 0, result.output
    assert result.stdout.index("prune-activations") < result.stdout.index("pack-weights")


def test_an_exported_model_has_them(tmp_path):
    pytest.importorskip("onnx")
    result = call("export", "digits_cnn", tmp_path / "model.onnx", "--passes", "pack-weights", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)


@pytest.mark.parametrize("command", [("inspect", "digits_cnn"), ("memory", "digits_cnn", "--predict")])
def test_a_mistake_is_told_in_one_line(command):
    result = call(*command, "--passes", "insert-masks{densty=0.1}")
    assert result.exit_code == 1
    assert "did you mean density?" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--original",), "before all passes"), (("--checkpoint", "model.safetensors"), "leave out --passes")],
)
def test_where_no_pass_runs_the_option_is_refused(options, message):
    result = call("inspect", "digits_cnn", "--passes", "pack-weights", *options)
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())


def test_a_trained_model_has_them(tmp_path):
    result = call("train", "--rounds", 1, "--clients", 2, "--output", tmp_path, "--passes", "compress-saved", "--json")
    assert result.exit_code == 0, result.output
    model = fedmef_fx.load(tmp_path / "model.safetensors", digits_cnn())
    assert "compress-saved" in [entry.name.partition("{")[0] for entry in fedmef_fx.report(model)]
    wrong = call("train", "--rounds", 1, "--clients", 2, "--output", tmp_path / "b", "--passes", "compress")
    assert wrong.exit_code == 1
    assert "did you mean compress-saved" in wrong.stderr
