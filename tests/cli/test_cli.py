"""The command line: exit codes, JSON for machines, and silence of everything else on stdout."""

import importlib
import json
from pathlib import Path

import pytest

from tests.cli.program import invoke, json_of, on_terminal, run

COMMANDS = [
    "demo",
    "train",
    "compare-methods",
    "export",
    "verify",
    "inspect",
    "compare",
    "memory",
    "bench",
    "flower",
    "doctor",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "Usage:" in result.stdout


def test_version() -> None:
    assert invoke("--version").stdout.count(".") == 2


@pytest.mark.parametrize("arguments", [["nonsense"], ["inspect"], ["inspect", "digits_cnn", "--view", "x-ray"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "resnet19"], "expected digits_cnn | resnet18"),
        (["inspect", "no_such_module:build"], "importing 'no_such_module' failed: ModuleNotFoundError"),
        (["inspect", "zoo_of_tests:nothing"], "has no 'nothing'"),
        (["inspect", "zoo_of_tests:needs_more"], "calling it without arguments failed: TypeError"),
        (["inspect", "zoo_of_tests:no_model"], "returned str; expected a torch.nn.Module"),
        (["inspect", "zoo_of_tests:instance"], "expected a function or class"),
        (["inspect", "digits_cnn", "--density", "1.5"], "Config.density: got 1.5"),
        (["inspect", "digits_cnn", "--input", "1x3x8x8"], "fails on the example inputs"),
        (["inspect", "digits_cnn", "--config", "absent.json"], "--config absent.json: cannot be read"),
        (["inspect", "digits_cnn", "--checkpoint", "absent.safetensors"], "absent.safetensors"),
        (["train", "--method", "fedsomething"], "fedsomething"),
        (["train", "--clients", "0"], "clients: got 0"),
        (["compare-methods", "--method", "fedsomething"], "fedsomething"),
        (["compare-methods", "--method", "fedavg", "--method", "fedavg"], "labels that differ"),
        (["compare-methods", "--clients", "0"], "clients: got 0"),
        (["compare-methods", "zoo_of_tests:build"], "does not fit --data digits"),
        (["train", "--device", "abacus"], "--device: got 'abacus'"),
        (["train", "--data", "cifar10", "--data-dir", "absent"], "absent"),
        (["export", "digits_cnn", "absent/model.onnx"], "absent"),
        (["inspect", "absent.onnx"], "absent.onnx: cannot be read"),
        (["compare", "absent.safetensors", "absent.safetensors"], "absent.safetensors: cannot be read"),
        (["compare", "zoo_of_tests.py", "zoo_of_tests.py"], "zoo_of_tests.py"),
    ],
)
def test_what_fails_says_why_in_one_line_and_is_exit_code_1(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("printed while"))
    assert line.startswith("error: ")
    assert message in line


def test_a_config_file_with_an_unknown_field(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"densty": 0.5}', encoding="utf-8")
    result = invoke("inspect", "digits_cnn", "--config", "config.json")
    assert result.exit_code == 1
    assert "--config config.json" in result.stderr
    assert "'densty'" in result.stderr


def test_options_win_over_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"density": 0.5, "normalization": "keep"}', encoding="utf-8")
    document = json_of("inspect", "digits_cnn", "--config", "config.json", "--density", "0.25")
    names = [entry["name"].partition("{")[0] for entry in document["passes"]]
    assert "normalize-kernels" not in names
    parameters = document["parameters"]
    active, total = (sum(row[key] for row in parameters) for key in ("active", "weights"))
    assert active == round(0.25 * total)


def test_ignore_and_gamma_reach_the_configuration() -> None:
    document = json_of("inspect", "digits_cnn", "--ignore", "conv1", "--ignore", "fc", "--gamma", "0.5")
    reasons = {row["parameter"]: row["reason"] for row in document["parameters"]}
    assert {name for name, reason in reasons.items() if "ignored" in reason} == {"conv1.weight", "fc.weight"}
    assert any("activation_sparsity=0.5" in entry["name"] for entry in document["passes"])


def test_models_of_ones_own_come_from_the_current_directory() -> None:
    result = invoke("inspect", "zoo_of_tests:build", "--view", "table")
    assert result.exit_code == 0
    assert "first.weight" in result.stdout
    assert "FLOPs" not in result.stdout, "no example input, no operations"
    assert "FLOPs" in invoke("inspect", "zoo_of_tests:build", "--view", "table", "--input", "1x8").stdout


def test_bench() -> None:
    data = json_of("bench", "all", "zoo_of_tests:build", "--input", "4x8", "--repeats", "2")
    assert data["step_ratio"] > 0
    for name in ("transform", "step", "step_masked_dense"):
        assert 0 < data[name]["min"] <= data[name]["median"] <= data[name]["max"]


def test_bench_of_the_transformation_needs_no_input() -> None:
    result = invoke("bench", "transform", "zoo_of_tests:build", "--repeats", "1")
    assert result.exit_code == 0
    assert "transform" in result.stdout
    assert "step" not in result.stdout


def test_doctor() -> None:
    data = json_of("doctor")
    states = {check["what"]: check["state"] for check in data["checks"]}
    assert states["torch"] == states["onnxruntime"] == "ok"


def test_doctor_says_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmef_fx.commands.doctor.why_missing", lambda: "no C compiler")
    states = {check["what"]: (check["state"], check["found"]) for check in json_of("doctor")["checks"]}
    assert states["native kernels"] == ("absent", "NumPy takes their place, several times as slow: no C compiler")


def test_doctor_tells_a_directory_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMEF_FX_DATA", str(tmp_path))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "test_batch.bin" in result.stdout


def test_doctor_looks_at_a_model() -> None:
    data = json_of("doctor", "digits_cnn")
    assert data["coverage"]["graph_fraction"] == 1
    assert {row["tier"] for row in data["coverage"]["parameters"]} == {"graph"}
    assert any(entry["refusals"] for entry in data["passes"])
    assert "graph fraction" in invoke("doctor", "digits_cnn").stdout


def test_the_program_in_a_pipe_writes_no_escape_codes() -> None:
    done = run("bench", "transform", "digits_cnn", "--repeats", "1", TERM="xterm-256color")
    assert done.returncode == 0, done.stderr
    assert b"transform" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"timing" not in done.stderr, "no progress bar either"


def test_the_program_on_a_terminal_shows_progress_on_stderr_only() -> None:
    stdout, shown, code = on_terminal("bench", "transform", "digits_cnn", "--repeats", "1", "--json")
    assert code == 0
    assert json.loads(stdout)["model"] == "digits_cnn"
    assert b"timing" in shown


def test_transform_and_export_show_their_stages_on_a_terminal(tmp_path: Path) -> None:
    stdout, shown, code = on_terminal("export", "digits_cnn", str(tmp_path / "net.onnx"), "--json")
    assert code == 0
    assert json.loads(stdout)["path"] == str(tmp_path / "net.onnx")
    assert b"transform: capture" in shown
    assert b"export: convert" in shown


def test_the_program_fails_with_its_exit_codes() -> None:
    failed = run("inspect", "zoo_of_tests:no_model", "--json")
    assert (failed.returncode, failed.stdout) == (1, b"")
    assert b"Traceback" not in failed.stderr
    interrupted = run("inspect", "zoo_of_tests:interrupted", "--json")
    assert (interrupted.returncode, interrupted.stdout) == (130, b"")
    assert interrupted.stderr.endswith(b"interrupted\n")
    assert b"Traceback" not in interrupted.stderr


TINY = [
    "compare-methods",
    "zoo_of_tests:tiny",
    "--method",
    "fedavg",
    "--method",
    "snip",
    "--rounds",
    "1",
    "--clients",
    "2",
]


def test_methods_are_compared_and_a_comparison_goes_on(tmp_path: Path) -> None:
    with (tmp_path / "zoo_of_tests.py").open("a", encoding="utf-8") as models:
        models.write("\ndef tiny():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    found = json_of(*TINY, "--seeds", "2")
    assert {label: sorted(seeds) for label, seeds in found["runs"].items()} == {
        "fedavg": ["0", "1"],
        "snip": ["0", "1"],
    }
    output = tmp_path / "fedmef-comparison"
    names = {path.name for path in output.iterdir()}
    assert names >= {"table.md", "rounds.csv", "runs.json", "cells"}
    assert len((output / "rounds.csv").read_text(encoding="utf-8").splitlines()) == 1 + 4
    again = json_of(*TINY, "--seeds", "2")
    assert again["runs"]["snip"]["1"] == found["runs"]["snip"]["1"]  # the time included: nothing ran again
    result = invoke(*TINY, "--lr", "0.1")
    assert result.exit_code == 1
    assert "belongs to another run" in result.stderr
    assert "--restart, or another --output" in result.stderr
    result = invoke(*TINY, "--lr", "0.1", "--restart")
    assert result.exit_code == 0
    assert "fedavg" in result.stdout


@pytest.mark.parametrize("name", ["train", "compare-methods"])
def test_an_interrupted_run_says_how_to_go_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"fedmef_fx.commands.{name.replace('-', '_')}")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run" if name == "train" else "run_comparison", interrupted)
    result = invoke(name, "--output", str(tmp_path / "run"))
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted: before the first round was finished: nothing was saved"
