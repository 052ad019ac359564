"""What every pass owes: idempotent, truthful, and the refusals that its docstring promises."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx import Config, coverage, masks, report, transform
from fedmef_fx.capture import capture_graphs
from fedmef_fx.graph.pipeline import Pipeline
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.verify import Verifier
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.ops.nsconv import nsconv_weight
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import Transformation
from fedmef_fx.transformation.recipe import passes_of
from tests.models import ZOO, PreActivation, Residual, Shared, build

CONFIG = Config(density=0.3, weight_storage="dense")


@pytest.mark.parametrize("step", range(len(passes_of(CONFIG))), ids=[p.name for p in passes_of(CONFIG)])
@pytest.mark.parametrize("name", ZOO)
def test_passes_are_idempotent(name, step):
    model, _ = build(name)
    program = Program(model, [Region("", model, capture_graphs(model))], Transformation(CONFIG))
    steps = passes_of(CONFIG)
    Pipeline(steps[: step + 1], after_pass=Verifier.of(program)).run(program)
    before = [str(graph) for _, _, graph in program.graphs()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    again = steps[step].run(program)
    assert not again.modified
    assert [str(graph) for _, _, graph in program.graphs()] == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def targets(model, function):
    return [node for node in model.graph.nodes if node.target is function]


def test_nsconv_takes_the_gain_of_what_follows():
    nodes = targets(transform(Residual(), CONFIG.replace(activation_sparsity=0)), nsconv_weight)
    assert sorted(node.kwargs["g"] for node in nodes) == pytest.approx([1.0, 1.0, 1.7128586, 1.7128586])


def test_stored_kernels_are_centred_so_that_weights_near_zero_can_go():
    model, _ = build("residual")
    sparse = transform(model, Config(density=0.5, activation_sparsity=0.0, weight_storage="dense")).eval()
    for name in ("stem", "conv1", "conv2", "shortcut.0"):
        rows = sparse.get_parameter(f"{name}.weight").detach().flatten(1)
        assert torch.allclose(rows.sum(1), torch.zeros(len(rows)), atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_the_mean_of_a_kernel_has_no_effect(name):
    model, inputs = build(name)
    sparse = transform(model, Config(density=0.5, activation_sparsity=0.0, weight_storage="dense")).eval()
    before = sparse(*inputs)
    grouped = getattr(getattr(sparse, "grouped", None), "weight", None)  # has no BatchNorm
    with torch.no_grad():
        for parameter, mask in masked_parameters(sparse).values():
            several = mask.flatten(1).sum(1) > 1  # a single weight per channel is not centred
            if parameter.dim() > 2 and parameter is not grouped:
                parameter.add_(0.3 * mask * several.view(-1, *[1] * (parameter.dim() - 1)))
        moved = sparse(*inputs)
    assert torch.allclose(before, moved, atol=1e-4)


def test_nsconv_refusals():
    refusals = {r.where: r.reason for r in report(transform(PreActivation(), CONFIG))["normalize-kernels"].refusals}
    assert refusals == {"norm": "no convolution or linear layer stands directly before it"}
    refusals = {r.where: r.reason for r in report(transform(Shared(), CONFIG))["normalize-kernels"].refusals}
    assert refusals == {"norm": "it, or the layer before it, is called more than once"}


def test_a_batchnorm_whose_input_is_read_elsewhere_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x

    result = report(transform(Twice(), CONFIG))["normalize-kernels"]
    assert [str(r) for r in result.refusals] == ["norm: its input has other users, which need the values before it"]


def test_a_pair_that_one_mode_uses_differently_stays_in_both():
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) if self.training else self.norm(x) + x

    model = Modes()
    sparse = transform(model, Config(density=1.0, activation_sparsity=0, weight_storage="dense"))
    assert not report(sparse)["normalize-kernels"].modified
    x = torch.randn(2, 3, 4, 4)
    for training in (True, False):
        assert torch.equal(model.train(training)(x), sparse.train(training)(x))


def test_batchnorm_is_kept_on_request():
    model, inputs = build("residual")
    sparse = transform(model, Config(density=1.0, normalization="keep", weight_storage="dense")).eval()
    assert torch.allclose(sparse(*inputs), model.eval()(*inputs), atol=1e-5)


def test_opaque_modules_are_reported_and_masked_by_hooks():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    sparse = transform(Recurrent(), CONFIG)
    assert [r.where for r in report(sparse)["functionalize-weights"].refusals] == ["rnn"]
    assert coverage(sparse).rows[0].tier == "hook"
    assert not sparse.rnn.weight_ih_l0[~masks(sparse)["rnn.weight_ih_l0"]].any()


def test_an_activation_that_something_else_keeps_stays_dense_with_its_reason():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.b(x) * x

    sparse = transform(Gated(), CONFIG)
    assert not targets(sparse, sign_relu)
    reasons = {r.where: r.reason for r in report(sparse)["prune-activations"].refusals}
    assert "mul keeps its input" in reasons["relu"]
    x = torch.randn(16, 64)
    with SavedTensors(sparse, x) as saved:
        out = sparse(x)
    # relu's result once for relu, b and mul; b's result once for mul.
    assert saved.by_kind() == {"dense": 2 * x.nbytes, "packed values": 0, "bitmap": 0, "8-bit": 0}
    out.sum().backward()
    assert saved.nbytes == 0


def test_an_inplace_relu_with_other_users_is_left_alone():
    class Inplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.a(x)
            y = F.relu(x, inplace=True)
            return self.b(y) + x

    model = Inplace()
    sparse = transform(model, Config(density=1.0, weight_storage="dense"))
    x = torch.randn(3, 8)
    assert torch.equal(sparse(x), model(x))
    assert "in place" in report(sparse)["shrink-saved"].refusals[0].reason


def test_one_packed_copy_serves_all_readers():
    sparse = transform(Residual(), CONFIG)
    sites = [node for node in sparse.graph.nodes if "fedmef_sites" in str(node.target)]
    readers = [len(node.users) for node in sites]
    assert max(readers) == 2  # the first convolution of the block and its shortcut


def test_copies_do_not_share_packing_sites():
    sparse = transform(Residual(), CONFIG)
    counterpart = copy.deepcopy(sparse)
    sparse(torch.randn(2, 3, 8, 8))
    assert all(site.noise.draws == 0 for site in counterpart.fedmef_sites.children())
    assert all(site.noise.draws == 1 for site in sparse.fedmef_sites.children())


@pytest.mark.parametrize(("name", "share"), [("residual", 0.2), ("depthwise", 0.45)])
def test_training_keeps_a_fraction_of_the_bytes(name, share):
    model, _ = build(name)
    x = torch.randn(16, 3, 32, 32)
    kept = {}
    for config in (CONFIG, CONFIG.replace(normalization="keep", activation_sparsity=0.0)):
        sparse = transform(model, config)
        with SavedTensors(sparse, x) as saved:
            out = sparse(x)
        kept[config.normalization] = saved.nbytes
        del out
    assert kept["nsconv"] < share * kept["keep"]
