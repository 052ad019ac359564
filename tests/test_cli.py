"""The command line: exit codes, JSON for machines, and silence of everything else on stdout."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fedmef_fx.cli import app

COMMANDS = ["demo", "train", "export", "verify", "inspect", "compare", "memory", "bench", "doctor"]
PROGRAM = [sys.executable, "-c", "from fedmef_fx.cli import main; main()"]

MODELS = """
import os, signal
from collections import OrderedDict
import torch
from torch import nn

print("printed while importing")

def build():
    print("printed while building")
    return nn.Sequential(OrderedDict([("first", nn.Linear(8, 6)), ("relu", nn.ReLU()), ("last", nn.Linear(6, 2))]))

def hostile():
    return nn.Sequential(OrderedDict([("\\x1b[31m[bold]", nn.Linear(8, 2)), ("<script>", nn.ReLU())]))

def needs_more(width):
    return nn.Linear(width, 2)

def no_model():
    return "a model"

def interrupted():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()

instance = nn.Linear(2, 2)

class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x
"""


@pytest.fixture(autouse=True)
def _in_a_directory_with_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_of_tests.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "zoo_of_tests", raising=False)


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def _data(*arguments: str) -> Any:
    result = _invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def _run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """The program as a shell starts it, with pipes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(  # noqa: S603  # a fixed program
        [*PROGRAM, *arguments], env={**kept, **environment}, capture_output=True, check=False
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str) -> None:
    result = _invoke(name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "Usage:" in result.stdout


def test_version() -> None:
    assert _invoke("--version").stdout.count(".") == 2


@pytest.mark.parametrize("arguments", [["nonsense"], ["inspect"], ["inspect", "digits_cnn", "--view", "x-ray"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = _invoke(*arguments)
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
        (["train", "--device", "abacus"], "--device: got 'abacus'"),
        (["train", "--data", "cifar10", "--data-dir", "absent"], "absent"),
        (["export", "digits_cnn", "absent/model.onnx"], "absent"),
        (["inspect", "absent.onnx"], "absent.onnx: cannot be read"),
        (["compare", "absent.safetensors", "absent.safetensors"], "absent.safetensors: cannot be read"),
        (["compare", "zoo_of_tests.py", "zoo_of_tests.py"], "zoo_of_tests.py"),
    ],
)
def test_what_fails_says_why_in_one_line_and_is_exit_code_1(arguments: list[str], message: str) -> None:
    result = _invoke(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("printed while"))
    assert line.startswith("error: ")
    assert message in line


def test_a_config_file_with_an_unknown_field(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"densty": 0.5}', encoding="utf-8")
    result = _invoke("inspect", "digits_cnn", "--config", "config.json")
    assert result.exit_code == 1
    assert "--config config.json" in result.stderr
    assert "'densty'" in result.stderr


def test_options_win_over_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"density": 0.5, "normalization": "keep"}', encoding="utf-8")
    document = _data("inspect", "digits_cnn", "--config", "config.json", "--density", "0.25")
    names = [entry["name"].partition("{")[0] for entry in document["passes"]]
    assert "normalize-kernels" not in names
    parameters = document["parameters"]
    active, total = (sum(row[key] for row in parameters) for key in ("active", "weights"))
    assert active == round(0.25 * total)


def test_ignore_and_gamma_reach_the_configuration() -> None:
    document = _data("inspect", "digits_cnn", "--ignore", "conv1", "--ignore", "fc", "--gamma", "0.5")
    reasons = {row["parameter"]: row["reason"] for row in document["parameters"]}
    assert {name for name, reason in reasons.items() if "ignored" in reason} == {"conv1.weight", "fc.weight"}
    assert any("activation_sparsity=0.5" in entry["name"] for entry in document["passes"])


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("text", "%pruned_convolution = call_function[pruned_convolution](%input_1, None,"),
        ("table", "conv4.weight"),
        ("table", "saved before"),
        ("diff", "-%conv1 = call_module[conv1](%input_1)"),
        ("passes", "stays dense: an input of the model"),
        ("coverage", "graph fraction 1.000"),
        ("dot", "digraph model {"),
    ],
)
def test_views_of_inspect(view: str, expected: str) -> None:
    result = _invoke("inspect", "digits_cnn", "--view", view)
    assert result.exit_code == 0, result.stderr
    assert expected in result.stdout


def test_inspect_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "model.html"
    data = _data("inspect", "digits_cnn", "--html", str(page))
    assert data == {"html": str(page), "bytes": page.stat().st_size}
    assert "<!doctype html>" in page.read_text(encoding="utf-8")[:20]
    with_memory = _data("inspect", "digits_cnn", "--html", str(page), "--memory")
    assert with_memory["bytes"] > data["bytes"]
    result = _invoke("inspect", "digits_cnn", "--html", str(tmp_path / "absent" / "model.html"))
    assert result.exit_code == 1
    assert "there is no directory" in result.stderr


def test_compare_writes_a_page(tmp_path: Path) -> None:
    import fedmef_fx  # noqa: PLC0415
    from fedmef_fx.models import digits_cnn  # noqa: PLC0415

    fedmef_fx.save(fedmef_fx.transform(digits_cnn()), tmp_path / "a.safetensors")
    state = str(tmp_path / "a.safetensors")
    data = _data("compare", state, state, "--html", "rounds.html")
    assert data["bytes"] == Path("rounds.html").stat().st_size


def test_onnx_files_have_no_page() -> None:
    result = _invoke("inspect", "model.onnx", "--html", "page.html")
    assert result.exit_code == 2
    assert "there is no page for an ONNX file" in result.stderr.replace("\n", " ")


def test_open_needs_a_page() -> None:
    result = _invoke("inspect", "digits_cnn", "--open")
    assert result.exit_code == 1
    assert "--html page.html --open" in result.stderr


def test_inspect_prints_between_the_passes_on_stderr() -> None:
    arguments = ["inspect", "zoo_of_tests:build", "--print-after", "insert-masks", "--print-after", "capture"]
    result = _invoke(*arguments, "--stop-after", "insert-masks", "--json")
    assert result.exit_code == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("# after")] == [
        "# after capture",
        "# after insert-masks",
    ]
    passes = json.loads(result.stdout)["passes"]
    assert [entry["name"].partition("{")[0] for entry in passes][-1] == "insert-masks"
    everything = _invoke("inspect", "zoo_of_tests:build", "--print-after-all").stderr
    assert everything.count("# after ") > 4
    wrong = _invoke("inspect", "zoo_of_tests:build", "--print-after", "x-ray")
    assert wrong.exit_code == 1
    assert "expected a pass of this configuration: capture, functionalize-weights" in wrong.stderr


def test_inspect_the_original() -> None:
    result = _invoke("inspect", "digits_cnn", "--original", "--input", "4x1x8x8")
    assert "%conv1 = call_module[conv1](%input_1)  # f32[4,32,8,8]" in result.stdout


def test_models_of_ones_own_come_from_the_current_directory() -> None:
    result = _invoke("inspect", "zoo_of_tests:build", "--view", "table")
    assert result.exit_code == 0
    assert "first.weight" in result.stdout
    assert "FLOPs" not in result.stdout, "no example input, no operations"
    assert "FLOPs" in _invoke("inspect", "zoo_of_tests:build", "--view", "table", "--input", "1x8").stdout


def test_what_libraries_print_is_not_in_the_json() -> None:
    result = _invoke("inspect", "zoo_of_tests:build", "--json")
    assert json.loads(result.stdout)["schema"] == "fedmef-fx/inspection"
    assert "printed while building" in result.stderr


@pytest.mark.parametrize("view", ["text", "table", "passes", "coverage", "dot", "diff"])
def test_hostile_names_reach_no_terminal(view: str) -> None:
    result = _invoke("inspect", "zoo_of_tests:hostile", "--view", view)
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert view in ("passes", "dot") or "[31m[bold]" in result.stdout, "square brackets are no markup"


@pytest.mark.parametrize("command", ["memory", "export"])
def test_a_model_of_ones_own_needs_an_input_shape(command: str) -> None:
    result = _invoke(command, "zoo_of_tests:build", *(["x.onnx"] if command == "export" else []))
    assert result.exit_code == 2
    assert "--input" in result.stderr


def test_an_input_shape_that_is_none() -> None:
    result = _invoke("inspect", "digits_cnn", "--input", "1,1,8,8")
    assert result.exit_code == 2
    assert "1x3x32x32" in result.stderr


def test_memory() -> None:
    data = _data("memory", "digits_cnn", "--batch", "16")
    assert data["input"] == [16, 1, 8, 8]
    assert data["saved_ratio"] < 0.2
    assert data["saved_ratio"] == data["transformed"]["saved_total"] / data["masked_dense"]["saved_total"]
    assert "saved for backward" in _invoke("memory", "zoo_of_tests:build", "--input", "3x8").stdout


def test_memory_of_a_whole_step_predicted_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "step.svg"
    options = ("--batch", "4", "--optimizer", "adam", "--predict", "--no-compare", "--plot", str(picture))
    data = _data("memory", "digits_cnn", *options)
    assert "masked_dense" not in data
    assert data["transformed"]["is_predicted"]
    assert data["transformed"]["optimizer"] > 2 * data["transformed"]["weights"]
    assert "<svg" in picture.read_text(encoding="utf-8")
    shown = _invoke("memory", "digits_cnn", "--batch", "4", "--no-compare", "--layers", "3", "--allocator").stdout
    assert "allocator peak" in shown
    assert "conv2" in shown
    assert _invoke("memory", "digits_cnn", "--optimizer", "lion").exit_code == 2


def test_memory_within_a_budget() -> None:
    options = ("memory", "digits_cnn", "--batch", "16", "--no-compare", "--predict", "--budget")
    data = _data(*options, "900kB")
    assert data["plan"]["budget"] == 900_000
    assert data["plan"]["predicted_peak"] <= 900_000
    # Before its first step a model is predicted with target shares, not with those that planning measured.
    assert data["transformed"]["peak"] <= 990_000
    result = _invoke(*options, "5kB")
    assert result.exit_code == 1
    assert "the floor is" in result.stderr


def test_bench() -> None:
    data = _data("bench", "all", "zoo_of_tests:build", "--input", "4x8", "--repeats", "2")
    assert data["step_ratio"] > 0
    for name in ("transform", "step", "step_masked_dense"):
        assert 0 < data[name]["min"] <= data[name]["median"] <= data[name]["max"]


def test_bench_of_the_transformation_needs_no_input() -> None:
    result = _invoke("bench", "transform", "zoo_of_tests:build", "--repeats", "1")
    assert result.exit_code == 0
    assert "transform" in result.stdout
    assert "step" not in result.stdout


def test_doctor() -> None:
    data = _data("doctor")
    states = {check["what"]: check["state"] for check in data["checks"]}
    assert states["torch"] == states["onnxruntime"] == "ok"


def test_doctor_tells_a_directory_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMEF_FX_DATA", str(tmp_path))
    result = _invoke("doctor")
    assert result.exit_code == 1
    assert "test_batch.bin" in result.stdout


def test_doctor_looks_at_a_model() -> None:
    data = _data("doctor", "digits_cnn")
    assert data["coverage"]["graph_fraction"] == 1
    assert {row["tier"] for row in data["coverage"]["parameters"]} == {"graph"}
    assert any(entry["refusals"] for entry in data["passes"])
    assert "graph fraction" in _invoke("doctor", "digits_cnn").stdout


@pytest.mark.slow
def test_train_then_go_on_and_inspect_what_it_wrote(tmp_path: Path) -> None:
    arguments = ["train", "--clients", "3", "--clients-per-round", "1", "--density", "0.3", "--output", "run"]
    data = _data(*arguments, "--rounds", "2")
    assert data["rounds"] == 2
    assert 0 < data["test_accuracy"] <= 1
    history = json.loads((tmp_path / "run" / "history.json").read_text(encoding="utf-8"))
    assert len(history["rounds"]) == 2
    again = _data(*arguments, "--rounds", "2")
    assert again == data, "a finished run is not run again"

    comparison = _data("compare", "run", "run/model.safetensors")
    assert comparison["total"]["overlap"] == 1
    assert "conv1.weight" in _invoke("compare", "run", "run/model.safetensors").stdout

    other = _invoke(*arguments, "--rounds", "3")
    assert other.exit_code == 1
    assert "--restart" in other.stderr

    table = _data("inspect", "digits_cnn", "--checkpoint", "run/model.safetensors")["parameters"]
    active, total = (sum(row[key] for row in table) for key in ("active", "weights"))
    assert active == round(0.3 * total)


@pytest.mark.slow
def test_export(tmp_path: Path) -> None:
    report = _data("export", "digits_cnn", "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size == report["bytes"]
    assert report["parity"]["max_abs"] < 1e-4
    document = _data("inspect", "model.onnx")
    assert document["nbytes"] == report["bytes"]
    assert "conv4.weight" in _invoke("inspect", "model.onnx", "--view", "table").stdout
    assert "= Conv(input, conv1.weight)" in _invoke("inspect", "model.onnx").stdout
    assert _invoke("inspect", "model.onnx", "--view", "diff").exit_code == 2


def test_export_of_a_compacted_model() -> None:
    options = ("--granularity", "channel", "--density", "0.5", "--allocation", "uniform")
    full = _data("export", "digits_cnn", "full.onnx", *options)
    small = _data("export", "digits_cnn", "small.onnx", "--compact", *options)
    assert small["bytes"] < 0.4 * full["bytes"]
    assert small["parity"]["max_abs"] < 1e-4


@pytest.mark.slow
def test_export_verify_and_bench_of_a_packed_file(tmp_path: Path) -> None:
    np.save("samples.npy", np.random.default_rng(0).standard_normal((20, 1, 8, 8)))
    options = ["--weights", "packed", "--quantize", "int8", "--calibration", "samples.npy"]
    report = _data("export", "digits_cnn", "model.onnx", *options)
    assert (report["weights"], report["quantize"]) == ("packed", "int8")
    assert report["bytes"] * 10 < report["plain_bytes"]

    intact = _data("verify", "model.onnx")
    assert intact["is_intact"]
    assert [t["codec"].split("/")[1] for t in intact["tensors"]] == ["int8"] * len(intact["tensors"])

    data = _data("bench", "onnx", "model.onnx", "--against", "model.onnx", "--repeats", "3", "--batch", "2")
    assert data["inputs"] == {"input": [2, 1, 8, 8]}
    first, second = data["files"]
    assert first["bytes"] == second["bytes"] == report["bytes"]
    assert 0 < first["milliseconds"]["min"] <= first["milliseconds"]["p50"] <= first["milliseconds"]["p99"]
    assert "min" in _invoke("bench", "onnx", "model.onnx", "--repeats", "1").stdout

    (tmp_path / "model.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:-9])
    damaged = _invoke("verify", "model.onnx")
    assert damaged.exit_code == 1
    assert "it is truncated" in damaged.stderr
    damaged = _invoke("bench", "onnx", "model.onnx")
    assert damaged.exit_code == 1
    assert "onnxruntime cannot load it" in damaged.stderr


def test_sizes_are_a_dimension_and_a_name() -> None:
    failed = _invoke("export", "digits_cnn", "m.onnx", "--dynamic-size", "length")
    assert failed.exit_code == 2
    assert "expected a dimension and a name" in failed.stderr
    failed = _invoke("export", "digits_cnn", "m.onnx", "--dynamic-size", "7=length")
    assert failed.exit_code == 1
    assert "holds 7: 'length'; expected a dimension in [1, 2, 3]" in failed.stderr
    failed = _invoke("bench", "onnx", "m.onnx", "--size", "length")
    assert failed.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no array", "cannot be read"), (b"", "cannot be read"), (None, "cannot be read")],
)
def test_bad_calibration_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "samples.npy").write_bytes(content)
    failed = _invoke("export", "digits_cnn", "m.onnx", "--quantize", "int8", "--calibration", "samples.npy")
    assert failed.exit_code == 1
    assert message in failed.stderr


def test_calibration_samples_of_a_wrong_shape() -> None:
    np.save("samples.npy", np.zeros(7, np.float32))
    failed = _invoke("export", "digits_cnn", "m.onnx", "--quantize", "int8", "--calibration", "samples.npy")
    assert failed.exit_code == 1
    assert "holds 1 arrays ([7]); expected one, [samples, ...]" in failed.stderr


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    data = _data("demo", "--output", "out")
    assert data["test_accuracy"] >= 0.93
    assert data["onnx_accuracy"] == pytest.approx(data["test_accuracy"], abs=0.003)
    assert data["parity"] < 1e-4
    assert data["bytes_up"] < data["bytes_up_dense"]
    assert data["saved_bytes"] < data["saved_bytes_dense"]
    assert (tmp_path / "out" / "model.onnx").stat().st_size == data["file_bytes"]


def test_the_program_in_a_pipe_writes_no_escape_codes() -> None:
    done = _run("bench", "transform", "digits_cnn", "--repeats", "1", TERM="xterm-256color")
    assert done.returncode == 0, done.stderr
    assert b"transform" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"timing" not in done.stderr, "no progress bar either"


def test_the_program_on_a_terminal_shows_progress_on_stderr_only() -> None:
    ours, theirs = pty.openpty()
    program = subprocess.Popen(  # noqa: S603  # a fixed program
        [*PROGRAM, "bench", "transform", "digits_cnn", "--repeats", "1", "--json"],
        env={**os.environ, "TERM": "xterm-256color"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # how Linux tells that the other side is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    stdout, _ = program.communicate()
    assert program.returncode == 0
    assert json.loads(stdout)["model"] == "digits_cnn"
    assert b"timing" in shown


def test_the_program_fails_with_its_exit_codes() -> None:
    failed = _run("inspect", "zoo_of_tests:no_model", "--json")
    assert (failed.returncode, failed.stdout) == (1, b"")
    assert b"Traceback" not in failed.stderr
    interrupted = _run("inspect", "zoo_of_tests:interrupted", "--json")
    assert (interrupted.returncode, interrupted.stdout) == (130, b"")
    assert interrupted.stderr.endswith(b"interrupted\n")
    assert b"Traceback" not in interrupted.stderr
