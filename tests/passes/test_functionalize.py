"""Layers become functional calls that compute the same on the same parameters."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fedmef_fx import Config
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.sparse_model.transformation import Transformation
from tests.passes.programs import program_for, refusals_of, run, text_of

LAYERS = {
    "linear": (nn.Linear(4, 3), (2, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False), (2, 3, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 5)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 7)),
    "circular": (nn.Conv1d(3, 4, 5, padding=2, padding_mode="circular"), (2, 3, 9)),
}


def computed(program, *inputs):
    ((region, _, graph),) = program.graphs()
    return fx.GraphModule(region.owner, graph)(*inputs)


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_a_layer_computes_the_same_bits_on_its_own_parameters(layer, shape):
    model, x = nn.Sequential(layer), torch.randn(shape)
    expected, names = model(x), [name for name, _ in model.named_parameters()]
    program = program_for(model)
    result = run(program, FunctionalizeWeights())
    assert (result.rewrites, result.refusals) == (("0",), ())
    assert not any(node.op == "call_module" for _, _, graph in program.graphs() for node in graph.nodes)
    assert torch.equal(computed(program, x), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert model[0] is layer


def test_the_form_of_a_padded_convolution():
    program = program_for(nn.Sequential(nn.Conv2d(4, 2, 1, padding=1, padding_mode="reflect"), nn.ReLU()))
    run(program, FunctionalizeWeights())
    assert text_of(program).splitlines() == [
        "_0_weight = 0.weight",
        "_0_bias = 0.bias",
        "pad = pad(input_1)",
        "conv2d = conv2d(pad, _0_weight, _0_bias)",
        "_1 = 1(conv2d)",
        "return _1",
    ]


def test_arguments_by_name_come_in_their_places():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(stride=2, weight=self.weight, input=x)

    model, x = ByName(), torch.randn(2, 3, 7, 7)
    program = program_for(model)
    result = run(program, FunctionalizeWeights())
    assert result.rewrites == ("conv2d",)
    ((_, _, graph),) = program.graphs()
    (call,) = (node for node in graph.nodes if node.target is F.conv2d)
    assert [getattr(argument, "name", argument) for argument in call.args] == ["x", "weight", None]
    assert call.kwargs == {"stride": 2}
    assert torch.equal(computed(program, x), model(x))


class Doubled(nn.Linear):
    """Computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class One(nn.Module):
    """A single layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Leaves(fx.Tracer):
    """Traces no further than the model's children, whatever they are."""

    def is_leaf_module(self, m, module_qualified_name):
        return True


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Doubled(4, 4), "Doubled overrides the computation of Linear"),
        (hooked(), "it has hooks of the user, which need the module call"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear has parametrizations"),
        (nn.GRU(4, 4), "GRU is opaque to the graph: its weights are used inside it"),
        (nn.Linear(4, 4), "ignored by Config.ignore"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_refused_stays_a_call_of_the_module(layer, reason):
    model = One(layer)
    graphs = {"both": Leaves().trace(model)}
    program = Program(model, [Region("", model, graphs)], Transformation(Config()))
    before = text_of(program)
    result = run(program, FunctionalizeWeights(ignore=("layer",) if "ignored" in reason else ()))
    assert refusals_of(result) == {"layer": reason}
    assert not result.modified
    assert text_of(program) == before


def test_a_call_with_an_output_size_is_refused():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 3, stride=2)

        def forward(self, x):
            return self.up(x, output_size=(12, 12))

    result = run(program_for(Sized()), FunctionalizeWeights())
    assert refusals_of(result) == {"up": "it is called with more than its input"}


def test_a_shared_layer_is_rewritten_at_each_call_and_named_once():
    layer = nn.Linear(4, 4)
    program = program_for(nn.Sequential(layer, nn.ReLU(), layer))
    result = run(program, FunctionalizeWeights())
    assert result.rewrites == ("0",)
    assert text_of(program).count("linear(") == 2
    assert not run(program, FunctionalizeWeights()).modified
