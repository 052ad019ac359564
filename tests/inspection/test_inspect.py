"""`inspect` as users call it: what it shows, what it leaves alone, and what it refuses."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.capture import capture_graphs
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.inspection import NodeRecord, TensorRecord, inspect
from fedmef_fx.inspection.shapes import observe
from fedmef_fx.measure.memory import memory
from fedmef_fx.models import digits_cnn, mobilenet_v2
from fedmef_fx.sparse_model.transformation import Transformation
from tests.inspection.models import (
    HOSTILE_NAMES,
    Branches,
    PerMode,
    Residual,
    Tied,
    forms,
    hostile,
    linear,
    two_convolutions,
)
from tests.models import ZOO
from tests.models import build as build_from_zoo

ROOT = Path(__file__).parents[2]
IMAGE = torch.ones(2, 1, 8, 8)


def _node(model: nn.Module, name: str, *inputs: torch.Tensor) -> NodeRecord:
    inspection = inspect(model, inputs or None)
    return next(node for graph in inspection.graphs for node in graph.nodes if node.name == name)


def test_shapes_of_activations_need_example_inputs() -> None:
    model = two_convolutions()
    assert _node(model, "conv1").tensors == ()
    assert _node(model, "conv1", IMAGE).tensors == (TensorRecord((2, 8, 6, 6), "f32"),)


def test_shapes_of_parameters_need_none() -> None:
    sparse = fedmef_fx.transform(linear(), Config(density=0.5, weight_storage="dense"))
    assert _node(sparse, "fc_weight").tensors == (TensorRecord((2, 4), "f32"),)
    assert _node(sparse, "fc_weight").density == 0.5


def test_a_tuple_shows_all_its_tensors() -> None:
    inspection = inspect(Branches(), (torch.ones(3, 6),))
    assert "%chunk = call_method[chunk](%matmul, 2, dim=-1)  # (f32[3,2], f32[3,2])" in str(inspection)


def test_optional_arguments_may_be_given_by_name() -> None:
    inspection = inspect(Branches(), (torch.ones(3, 6),), example_kwargs={"scale": torch.ones(3, 1)})
    text = str(inspection)
    assert "%getitem_2 = call_function[getitem](%getitem, (:, 1:))  # f32[3,1]" in text
    assert "(..., 1:)" in text
    assert "call_method[to](%getitem_3, f32)" in text


def test_nothing_changes_in_the_model_or_the_random_state() -> None:
    sparse = fedmef_fx.transform(digits_cnn())
    sparse.train()
    before, generator = copy.deepcopy(sparse.state_dict()), torch.get_rng_state()
    inspect(sparse, (IMAGE,)).diff(digits_cnn())
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())
    assert sparse.training
    assert all(parameter.grad is None for parameter in sparse.parameters())
    # Drawn by digits_cnn() itself: only inspect must not draw.
    torch.set_rng_state(generator)
    inspect(sparse, (IMAGE,))
    assert torch.equal(torch.get_rng_state(), generator)


def test_an_inspection_shows_the_model_as_it_was() -> None:
    sparse = fedmef_fx.transform(linear(), Config(density=0.5, weight_storage="dense"))
    inspection = inspect(sparse)
    before = str(inspection)
    fedmef_fx.set_masks(sparse, {"fc.weight": torch.ones(2, 4, dtype=torch.bool)})
    assert str(inspection) == before
    assert inspect(sparse).table().rows[0].active == 8


def test_nodes_know_their_module() -> None:
    assert _node(two_convolutions(), "relu1").module == "relu1"
    sparse = fedmef_fx.transform(two_convolutions())
    assert _node(sparse, "pruned_convolution_1").module == "conv2"
    assert _node(sparse, "sign_relu").module == "relu1"


def test_text_is_the_same_in_every_process() -> None:
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    elsewhere = subprocess.run(  # a fixed command
        [sys.executable, "-c", "from tests.inspection.models import forms; print(forms())"],
        cwd=ROOT,
        env={"PYTHONHASHSEED": seed, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert elsewhere == f"{forms()}\n"


@pytest.mark.parametrize("build", [two_convolutions, Residual, PerMode, Tied, Branches, linear, hostile])
def test_diff_of_a_model_with_itself_is_empty(build: type[nn.Module]) -> None:
    model = build()
    assert inspect(model).diff(model) == ""
    assert inspect(model).diff(inspect(copy.deepcopy(model))) == ""


def test_diff_of_a_transformed_model_with_itself_is_empty() -> None:
    sparse = fedmef_fx.transform(two_convolutions())
    assert inspect(sparse, (IMAGE,)).diff(sparse) == ""


def test_diff_shows_what_a_pass_changed() -> None:
    model = linear()
    sparse = fedmef_fx.transform(
        model, Config(density=0.5, normalization="keep", activation_sparsity=0, weight_storage="dense")
    )
    lines = inspect(sparse, (torch.ones(3, 4),)).diff(model, context=0).splitlines()
    assert lines[:2] == ["--- original", "+++ model"]
    assert [line for line in lines[2:] if line.startswith("-")] == [
        "-%fc = call_module[fc](%input_1)  # f32[3,2]",
        "-%relu = call_module[relu](%fc)  # f32[3,2] saved=24 B dense",
    ]
    assert sum(line.startswith("+%") for line in lines) == 6


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo(name: str) -> None:
    model, inputs = build_from_zoo(name)
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    sparse = fedmef_fx.transform(model, Config(density=0.5, weight_storage="dense"))
    before, after = inspect(model, inputs), inspect(sparse, inputs)
    assert (before.diff(model), after.diff(sparse)) == ("", "")
    assert after.diff(before).startswith("--- original\n+++ model\n@@")
    assert before.table().total.flops_dense == after.table().total.flops_dense == counter.get_total_flops()
    assert after.table().total.density == fedmef_fx.density(sparse)
    assert len(after.to_networkx()) == sum(len(graph.nodes) for graph in after.graphs)
    for network, inspection in ((model, before), (sparse, after)):
        torch.manual_seed(0)
        total = memory(network, inputs).saved_total
        of_nodes = sum(node.saved_bytes or 0 for graph in inspection.graphs for node in graph.nodes)
        assert inspection.table().total.saved == of_nodes
        # `memory` looks at the second step, in which dropout draws anew.
        assert of_nodes == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize("build", [digits_cnn, pytest.param(mobilenet_v2, marks=pytest.mark.slow)])
def test_operations_are_those_that_torch_counts(build: type[nn.Module]) -> None:
    model = build().eval()
    x = torch.ones(2, 1, 8, 8) if build is digits_cnn else torch.ones(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert inspect(model, (x,)).table().total.flops_dense == counter.get_total_flops()
    total = inspect(fedmef_fx.transform(model), (x,)).table().total
    assert total.flops_dense == counter.get_total_flops()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
        (nn.Conv3d(2, 4, 2), (1, 2, 3, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
        (nn.Linear(4, 3), (2, 7, 4)),
    ],
)
@pytest.mark.parametrize("transformed", [False, True])
def test_operations_of_a_layer(layer: nn.Module, shape: tuple[int, ...], transformed: bool) -> None:
    x = torch.ones(shape)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    model = nn.Sequential(layer)
    if transformed:
        model = fedmef_fx.transform(model, Config(density=0.5, weight_storage="dense"))
    (row,) = inspect(model, (x,)).table().rows
    assert row.flops_dense == counter.get_total_flops()
    assert row.flops_sparse == row.flops_dense * row.density


def test_operations_of_a_parameter_that_is_used_twice_or_multiplied_directly() -> None:
    (row,) = inspect(Tied(), (torch.ones(3, 4),)).table().rows
    assert row.flops_dense == 2 * 2 * 3 * 4 * 4
    (row,) = inspect(Branches(), (torch.ones(3, 6),)).table().rows
    assert row.flops_dense == 2 * 3 * 6 * 4


def test_table_rows() -> None:
    sparse = fedmef_fx.transform(two_convolutions(), Config(density=0.5, ignore=("conv1",), weight_storage="dense"))
    table = inspect(sparse).table()
    first, second = table.rows
    assert (first.parameter, first.shape, first.weights, first.active) == ("conv1.weight", (8, 1, 3, 3), 72, 72)
    assert "ignored" in first.reason
    assert (second.parameter, second.active, second.density, second.tier) == ("conv2.weight", 144, 0.5, "graph")
    assert second.flops_dense is None
    assert (table.total.weights, table.total.active) == (360, 216)
    assert table.as_dicts()[1]["density"] == 0.5
    assert table.as_dicts()[1]["shape"] == [4, 8, 3, 3]
    text = str(table)
    assert "FLOPs" not in text, "a column without a single value tells nothing"
    assert text.splitlines()[-1].split()[:2] == ["total", "360"]


def test_regions_are_observed_where_the_model_calls_them() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2), nn.ReLU()), nn.Linear(2, 1))
    inner = model[1]
    program = Program(
        model, [Region("1", inner, capture_graphs(inner))], Transformation(Config(weight_storage="dense"))
    )
    observed = observe(program, (torch.ones(5, 4),), {}).tensors
    assert [str(tensors[0]) for tensors in observed.values()] == ["f32[5,3]", "f32[5,2]", "f32[5,2]", "f32[5,2]"]


def test_networkx_has_the_documented_attributes() -> None:
    sparse = fedmef_fx.transform(
        linear(), Config(density=0.5, normalization="keep", activation_sparsity=0, weight_storage="dense")
    )
    graph = inspect(sparse, (torch.ones(3, 4),)).to_networkx()
    assert graph.nodes["fc_weight"] == {
        "op": "get_attr",
        "target": "fc.weight",
        "module": "fc",
        "text": "%fc_weight = get_attr[fc.weight]  # f32[2,4] density=0.50 [functionalize-weights <- fc]",
        "shape": (2, 4),
        "dtype": "f32",
        "density": 0.5,
        "saved": (),
        "saved_bytes": 0,
        "made_by": "functionalize-weights",
        "origin": "fc",
        "order": 1,
        "region": "",
        "mode": "both",
    }
    assert graph.edges["masked_weight", "linear"] == {"position": 1}
    assert "density" not in graph.nodes["linear"]
    assert graph.nodes["relu"]["saved"] == (("dense", 24),)


def test_networkx_tells_graphs_of_both_modes_apart() -> None:
    graph = inspect(PerMode()).to_networkx()
    assert {"train/dropout", "eval/dropout"} <= set(graph)
    assert graph.nodes["train/dropout"]["mode"] == "train"


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.ones(3, 5),), {}, "node %fc"),
        ((), {"other": torch.ones(3, 4)}, "do not fit"),
        ((torch.ones(3, 4), torch.ones(3, 4)), {}, "do not fit"),
        ((), {}, "no value for 'input'"),
    ],
)
def test_inputs_that_do_not_fit(args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inspect(linear(), args, example_kwargs=kwargs)


def test_arguments_of_a_transformed_model_that_do_not_fit() -> None:
    sparse = fedmef_fx.transform(linear())
    with pytest.raises(ConfigError, match="got 2 positional"):
        inspect(sparse, (torch.ones(3, 4), torch.ones(3, 4)))


def test_what_is_no_model_or_no_tuple() -> None:
    with pytest.raises(ConfigError, match="got str; expected"):
        inspect("resnet18")  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ConfigError, match="expected a tuple"):
        inspect(linear(), torch.ones(3, 4))  # type: ignore[arg-type]  # the mistake under test


def test_hostile_names_stay_in_their_line_of_text() -> None:
    inspection = inspect(hostile(), (torch.ones(1, 2),))
    lines = str(inspection).splitlines()
    assert len(lines) == len(HOSTILE_NAMES) + 2
    assert all(line.isprintable() for line in lines)
    assert len(str(inspection.table()).splitlines()) == len(HOSTILE_NAMES) + 2


def test_saved_bytes_before_and_after_by_layer() -> None:
    model = two_convolutions()
    inspection = inspect(
        fedmef_fx.transform(model, Config(density=0.5, weight_storage="dense")), (torch.randn(2, 1, 8, 8),)
    )
    table = inspection.table(model)
    first, second = table.rows
    # The input of conv2 is 2 x 8 x 6 x 6 floats; packed, a bit for each and the kept tenth.
    assert (first.saved_before, first.saved) == (0, 0), "the model's own input exists anyway"
    assert second.saved_before == 576 * 4
    assert 576 // 8 < second.saved < 576
    # conv1's output and the statistics of 8 channels for the BatchNorm, against one bit per element for the ReLU.
    assert (table.rest_saved_before, table.rest_saved) == (576 * 4 + 2 * 8 * 4, 576 // 8)
    assert table.total.saved_before == inspect(model, (torch.randn(2, 1, 8, 8),)).table().total.saved
    assert "saved before" in str(table)
    assert "saved before" not in str(inspection.table())


def test_a_model_that_cannot_run_in_train_mode_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    inspection = inspect(model, (torch.ones(1, 4),))
    assert inspection.table().total.saved is None
    (notice,) = inspection.notices
    assert "train mode fails" in notice
    assert "saved" not in str(inspection)
    assert json.loads(inspection.to_json())["notices"] == [notice]


class _Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x if float(x.sum()) > 0 else x + 1)


def test_a_model_that_is_traced_in_parts_is_compared_in_parts() -> None:
    model, inputs = _Untraceable(), (torch.ones(3, 4),)
    before, after = (
        inspect(model, inputs),
        inspect(fedmef_fx.transform(model, Config(density=0.5, weight_storage="dense")), inputs),
    )
    assert {graph.region for graph in before.graphs} == {"first", "last"} <= {graph.region for graph in after.graphs}
    assert "-%_1 = call_module[first.1](%_0)" in after.diff(model)
    assert after.table(model).total.saved_before == memory(model, inputs).saved_total
    assert before.passes["capture"].refusals


def test_a_notebook_shows_text_and_table() -> None:
    inspection = inspect(fedmef_fx.transform(two_convolutions()), (IMAGE,))
    page = inspection._repr_html_()
    assert page.count("<tr>") == 2 + 3  # headings, two layers, the rest, the total
    assert "call_function[pruned_convolution]" in page
    page = inspect(hostile())._repr_html_()
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own import
def test_a_compiled_model_shows_what_was_compiled() -> None:
    model = linear()
    for network in (model, fedmef_fx.transform(model)):
        assert str(inspect(torch.compile(network), (torch.ones(3, 4),))) == str(inspect(network, (torch.ones(3, 4),)))
