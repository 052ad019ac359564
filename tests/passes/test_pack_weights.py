"""What is packed, how the graph shows it, and what stays dense with its reason."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, coverage, density, inspect, masks, report, transform
from fedmef_fx.capture import capture_graphs
from fedmef_fx.errors import ConfigError, VerificationError
from fedmef_fx.graph.emit import program_of
from fedmef_fx.graph.pipeline import Pipeline
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.ops.layers import pruned_convolution
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.pack_weights import PackWeights, unpack_weights
from fedmef_fx.records.passes import PassResult
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import Transformation, transformation_of
from fedmef_fx.transformation.transform import pack_weights
from tests.models import ZOO, build

CONFIG = Config(density=0.3, weight_storage="packed")


def reasons(model: nn.Module) -> dict[str, str]:
    return {refusal.where: refusal.reason for refusal in report(model)["pack-weights"].refusals}


def test_the_graph_reads_bitmaps() -> None:
    model = transform(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), CONFIG)
    (layer,) = [node for node in model.graph.nodes if node.target is pruned_convolution]
    names = [str(argument) for argument in layer.args]
    assert names == ["input_1", "None", "_0_weight", "_0_bias", "None", "_0_weight_bitmap"]
    assert layer.kwargs["packed_shape"] == (4, 2, 3, 3)
    assert not any("mask" in node.name for node in model.graph.nodes)


@pytest.mark.parametrize("gamma", [0.0, 0.6])
@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_computes_the_same(name: str, normalization: str, gamma: float) -> None:
    model, inputs = build(name)
    config = CONFIG.replace(normalization=normalization, activation_sparsity=gamma)
    dense, packed = transform(model, config.replace(weight_storage="dense")), transform(model, config)
    for training in (True, False):
        outputs = []
        for sparse in (dense, packed):
            torch.manual_seed(3)
            outputs.append(torch.utils._pytree.tree_leaves(sparse.train(training)(*inputs)))
        for left, right in zip(*outputs, strict=True):
            assert torch.allclose(left, right, rtol=1e-4, atol=1e-5)  # rows are summed in another order
    assert density(packed) == density(dense)
    assert [row.numel for row in coverage(packed).rows] == [row.numel for row in coverage(dense).rows]


def test_a_second_run_changes_nothing() -> None:
    model, _ = build("residual")
    packed = transform(model, CONFIG)
    before = str(packed.graph)
    assert not PackWeights().run(program_of(packed)).modified
    assert str(packed.graph) == before


def test_unpacking_is_the_inverse() -> None:
    model, inputs = build("shared")
    packed = transform(model, CONFIG)
    dense = copy.deepcopy(packed)
    unpack_weights(program_of(dense))
    dense.recompile()
    assert [parameter.is_packed for parameter in masked_parameters(dense).values()] == [False, False]
    for name, parameter in masked_parameters(dense).items():
        assert torch.equal(parameter.parameter, masked_parameters(packed)[name].dense())
    assert torch.allclose(dense.eval()(*inputs), packed.eval()(*inputs), atol=1e-6)


def test_a_finished_model_can_be_packed() -> None:
    model, inputs = build("residual")
    sparse = transform(model, CONFIG.replace(weight_storage="dense", activation_sparsity=0.0)).eval()
    expected = sparse(*inputs)
    result = pack_weights(sparse)
    assert len(result.rewrites) == 5
    assert report(sparse)["pack-weights"] is result
    assert transformation_of(sparse).config.weight_storage == "packed"
    assert torch.allclose(sparse(*inputs), expected, atol=1e-6)
    assert pack_weights(sparse).rewrites == ()
    with pytest.raises(ConfigError, match="not a transformed model"):
        pack_weights(model)


def test_models_with_a_graph_per_mode_are_packed() -> None:
    model, inputs = build("mode_dependent")
    packed = transform(model, CONFIG)
    assert reasons(packed) == {}
    loss = sum(out.square().sum() for out in packed.train()(*inputs))
    loss.backward()
    hooks = len(packed.body.weight._backward_hooks or {})
    packed(*inputs)
    assert len(packed.body.weight._backward_hooks or {}) == hooks == 0


class _ReadByHand(nn.Module):
    """Python runs it, calls one layer and reads the weight of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = x * 2
        return F.linear(self.called(x), self.read.weight.t())


class _Around(nn.Module):
    """A graph, one per mode as it makes a constant, around a module that Python runs."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.last = inside, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inside(x, x, x)[0] if isinstance(self.inside, nn.MultiheadAttention) else self.inside(x)
        out: Tensor = self.last(hidden) + torch.zeros(4)
        return out


@pytest.mark.parametrize("inside", [lambda: nn.MultiheadAttention(8, 2, batch_first=True), _ReadByHand])
def test_what_opaque_modules_may_read_stays_dense(inside: Callable[[], nn.Module]) -> None:
    model = transform(_Around(inside()), CONFIG)
    for mode in (True, False):
        model.train(mode)(torch.randn(2, 3, 8)).sum().backward()
    assert all(p.dim() > 1 for name, p in model.named_parameters() if "inside" in name and name.endswith("weight"))


def test_opaque_modules_keep_dense_weights() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    packed = transform(Recurrent(), CONFIG)
    assert set(reasons(packed).values()) == {"it is used inside an opaque module"}
    assert {name: parameter.is_packed for name, parameter in masked_parameters(packed).items()}["head.weight"]
    packed(torch.randn(3, 2, 4)).sum().backward()
    assert packed.rnn.weight_ih_l0.grad[~masks(packed)["rnn.weight_ih_l0"]].abs().max() == 0


def test_what_python_may_read_stays_dense() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    packed = transform(Branches(), CONFIG)
    assert set(reasons(packed)) == {"a.weight", "b.weight"}
    assert "Python code" in reasons(packed)["a.weight"]
    assert packed(torch.ones(2, 4)).shape == (2, 4)

    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.shape[0] > 1 else self.a(x) * 2

    packed = transform(Shapes(), CONFIG, example_inputs=(torch.ones(2, 4),))
    assert reasons(packed) == {"a.weight": "Python code runs, and may read it, in calls that differ from the example"}
    for rows in (2, 1, 5):
        packed(torch.ones(rows, 4)).sum().backward()


def test_weights_that_other_operations_read_stay_dense() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.a(x), self.a.weight.t()) @ self.w

    packed = transform(ByHand(), CONFIG)
    assert set(reasons(packed)) == {"a.weight", "w"}
    assert all("no convolution or linear layer" in reason for reason in reasons(packed).values())
    packed(torch.randn(2, 4)).sum().backward()


def test_geometry_at_run_time_stays_dense() -> None:
    class Runtime(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.conv.weight, None, stride=x.shape[-1] // 4)

    packed = transform(Runtime(), CONFIG.replace(activation_sparsity=0.0))
    assert reasons(packed) == {"conv.weight": "its geometry is computed at run time"}


def test_a_damaged_bitmap_is_found_by_the_verifier() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    program = Program(model, [Region("", model, capture_graphs(model))], Transformation(CONFIG))

    class Damage:
        name = "damage"

        def run(self, program: Program) -> PassResult:
            program.model.get_buffer("0.weight_bitmap").zero_()
            return PassResult("damage")

    steps = [FunctionalizeWeights(), InsertMasks(0.5), PackWeights(), Damage()]
    with pytest.raises(VerificationError, match=r"pass damage: masks match: the mask of 0\.weight"):
        Pipeline(steps, after_pass=Verifier.of(program)).run(program)


def test_inspection_counts_what_is_active() -> None:
    model, inputs = build("residual")
    dense, packed = transform(model, CONFIG.replace(weight_storage="dense")), transform(model, CONFIG)
    tables = [inspect(sparse, example_inputs=inputs).table().as_dicts() for sparse in (dense, packed)]
    assert tables[0] == tables[1]
    assert "density=" in str(inspect(packed))


def test_copies_and_pickles_stay_packed() -> None:
    model, inputs = build("mode_dependent")
    packed = transform(model, CONFIG).eval()
    counterpart = pickle.loads(pickle.dumps(packed))  # noqa: S301 -- our own bytes
    assert all(parameter.is_packed for parameter in masked_parameters(counterpart).values())
    assert torch.equal(counterpart(*inputs), packed(*inputs))
