"""The command line looks at models: views, pages, comparisons, and bytes of a step."""

import json
from pathlib import Path

import pytest

from tests.cli.program import invoke, json_of


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
    result = invoke("inspect", "digits_cnn", "--view", view)
    assert result.exit_code == 0, result.stderr
    assert expected in result.stdout


def test_inspect_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "model.html"
    data = json_of("inspect", "digits_cnn", "--html", str(page))
    assert data == {"path": str(page), "bytes": page.stat().st_size}
    assert "<!doctype html>" in page.read_text(encoding="utf-8")[:20]
    with_memory = json_of("inspect", "digits_cnn", "--html", str(page), "--memory")
    assert with_memory["bytes"] > data["bytes"]
    result = invoke("inspect", "digits_cnn", "--html", str(tmp_path / "absent" / "model.html"))
    assert result.exit_code == 1
    assert "there is no directory" in result.stderr


def test_compare_writes_a_page(tmp_path: Path) -> None:
    import fedmef_fx  # noqa: PLC0415
    from fedmef_fx.models import digits_cnn  # noqa: PLC0415

    fedmef_fx.save(fedmef_fx.transform(digits_cnn()), tmp_path / "a.safetensors")
    state = str(tmp_path / "a.safetensors")
    data = json_of("compare", state, state, "--html", "rounds.html")
    assert data["bytes"] == Path("rounds.html").stat().st_size


def test_open_needs_a_page() -> None:
    result = invoke("inspect", "digits_cnn", "--open")
    assert result.exit_code == 1
    assert "--html page.html --open" in result.stderr


def test_inspect_prints_between_the_passes_on_stderr() -> None:
    arguments = ["inspect", "zoo_of_tests:build", "--print-after", "insert-masks", "--print-after", "capture"]
    result = invoke(*arguments, "--stop-after", "insert-masks", "--json")
    assert result.exit_code == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("# after")] == [
        "# after capture",
        "# after insert-masks",
    ]
    passes = json.loads(result.stdout)["passes"]
    assert [entry["name"].partition("{")[0] for entry in passes][-1] == "insert-masks"
    everything = invoke("inspect", "zoo_of_tests:build", "--print-after-all").stderr
    assert everything.count("# after ") > 4
    wrong = invoke("inspect", "zoo_of_tests:build", "--print-after", "x-ray")
    assert wrong.exit_code == 1
    assert "expected a pass of this configuration: capture, functionalize-weights" in wrong.stderr


def test_inspect_the_original() -> None:
    result = invoke("inspect", "digits_cnn", "--original", "--input", "4x1x8x8")
    assert "%conv1 = call_module[conv1](%input_1)  # f32[4,32,8,8]" in result.stdout


def test_what_libraries_print_is_not_in_the_json() -> None:
    result = invoke("inspect", "zoo_of_tests:build", "--json")
    assert json.loads(result.stdout)["schema"] == "fedmef-fx/inspection"
    assert "printed while building" in result.stderr


@pytest.mark.parametrize("view", ["text", "table", "passes", "coverage", "dot", "diff"])
def test_hostile_names_reach_no_terminal(view: str) -> None:
    result = invoke("inspect", "zoo_of_tests:hostile", "--view", view)
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert view in ("passes", "dot") or "[31m[bold]" in result.stdout, "square brackets are no markup"


@pytest.mark.parametrize("command", ["memory", "export"])
def test_a_model_of_ones_own_needs_an_input_shape(command: str) -> None:
    result = invoke(command, "zoo_of_tests:build", *(["x.onnx"] if command == "export" else []))
    assert result.exit_code == 2
    assert "--input" in result.stderr


def test_an_input_shape_that_is_none() -> None:
    result = invoke("inspect", "digits_cnn", "--input", "1,1,8,8")
    assert result.exit_code == 2
    assert "1x3x32x32" in result.stderr


def test_memory() -> None:
    data = json_of("memory", "digits_cnn", "--batch", "16")
    assert data["input"] == [16, 1, 8, 8]
    assert data["saved_ratio"] < 0.2
    assert data["saved_ratio"] == data["transformed"]["saved_total"] / data["masked_dense"]["saved_total"]
    assert "saved for backward" in invoke("memory", "zoo_of_tests:build", "--input", "3x8").stdout


def test_memory_of_a_whole_step_predicted_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "step.svg"
    options = ("--batch", "4", "--optimizer", "adam", "--predict", "--no-compare", "--plot", str(picture))
    data = json_of("memory", "digits_cnn", *options)
    assert "masked_dense" not in data
    assert data["transformed"]["is_predicted"]
    assert data["transformed"]["optimizer"] > 2 * data["transformed"]["weights"]
    assert "<svg" in picture.read_text(encoding="utf-8")
    shown = invoke("memory", "digits_cnn", "--batch", "4", "--no-compare", "--layers", "3", "--allocator").stdout
    assert "allocator peak" in shown
    assert "conv2" in shown
    assert invoke("memory", "digits_cnn", "--optimizer", "lion").exit_code == 2


def test_memory_within_a_budget() -> None:
    options = ("memory", "digits_cnn", "--batch", "16", "--no-compare", "--predict", "--budget")
    data = json_of(*options, "900kB")
    assert data["plan"]["budget"] == 900_000
    assert data["plan"]["predicted_peak"] <= 900_000
    # Before its first step a model is predicted with target shares, not with those that planning measured.
    assert data["transformed"]["peak"] <= 990_000
    result = invoke(*options, "5kB")
    assert result.exit_code == 1
    assert "the floor is" in result.stderr
    assert len(result.stderr.splitlines()) == 1
