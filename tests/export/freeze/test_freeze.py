"""freeze: plain modules that compute what the transformed model computes, without anything of fedmef_fx."""

import copy
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fedmef_fx import Config, freeze, masks, transform
from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.export.freeze import frozen_graph
from fedmef_fx.graph.emit import program_of
from fedmef_fx.ops.relu import sign_relu
from tests import forked
from tests.models import ZOO, build

CONFIGS = {
    "fedmef": Config(density=0.4),
    "all_statistics": Config(density=0.4, nsconv_statistics="all"),
    "keep": Config(density=0.4, normalization="keep"),
    "keep_dense_activations": Config(density=0.4, normalization="keep", activation_sparsity=0.0),
    "dense": Config(density=1.0),
    "ignored": Config(density=0.4, normalization="keep", ignore=(nn.Conv2d,)),
}


def _randomize(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def _assert_same(plain: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    """Equal up to the one rounding per weight that folding a BatchNorm adds."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected, got = (pytree.tree_flatten(m(*(x.clone() for x in inputs))) for m in (model, plain))
    assert expected[1] == got[1]
    for left, right in zip(expected[0], got[0], strict=True):
        scale = max(1.0, float(left.abs().max()))
        torch.testing.assert_close(right, left, rtol=0.0, atol=1e-5 * scale)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ZOO)
def test_computes_the_same(name: str, config: str) -> None:
    original, inputs = build(name)
    if config == "ignored" and not any(type(m) is nn.Conv2d for m in original.modules()):
        pytest.skip("nothing to ignore in this model")
    try:
        model = transform(original, CONFIGS[config])
    except ConfigError:
        pytest.skip("every prunable weight of this model is ignored")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    texts = [str(graph) for _, _, graph in program_of(model).graphs()]

    plain = freeze(model)

    _assert_same(plain, model, *inputs)
    assert type(plain) is type(original) or isinstance(plain, fx.GraphModule)
    assert not any(module.training for module in plain.modules())
    assert model.training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert texts == [str(graph) for _, _, graph in program_of(model).graphs()]


@pytest.mark.parametrize("name", ZOO)
def test_refers_to_torch_only(name: str) -> None:
    model, inputs = build(name)
    plain = freeze(transform(model, Config(density=0.4)))

    data = pickle.dumps(plain)

    assert "fedmef" not in str(plain) + str(list(plain.state_dict()))
    strings = [str(argument) for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    assert not [text for text in strings if "fedmef" in text]
    for again in (pickle.loads(data), copy.deepcopy(plain)):  # noqa: S301  # made in this test
        _assert_same(again, plain, *inputs)


def test_a_pickle_is_read_without_fedmef_fx(tmp_path: Path) -> None:
    model, inputs = build("conv3d")  # of classes of torch's alone
    plain = freeze(transform(model, Config(density=0.4)))
    torch.save((plain, inputs, plain(*inputs)), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['fedmef_fx'] = None\n"
        f"model, inputs, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model(*inputs), expected)"
    )
    result = forked.run(code, folder=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("config", ["fedmef", "keep"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "tied", "conv1d", "conv3d"])
def test_zeros_are_where_the_masks_are(name: str, config: str) -> None:
    model = transform(build(name)[0], CONFIGS[config])

    parameters = dict(freeze(model).named_parameters())

    for parameter, mask in masks(model).items():
        assert torch.equal(parameters[parameter] != 0, mask), parameter


def test_leaves_masks_gains_and_statistics_behind() -> None:
    model = build("residual")[0]

    for normalization in ("nsconv", "keep"):
        plain = freeze(transform(model, Config(density=0.4, normalization=normalization)))
        original = sum(parameter.numel() for parameter in model.parameters())

        assert not list(plain.buffers())
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in plain.modules())
        assert sum(parameter.numel() for parameter in plain.parameters()) < original
        assert all(name.rpartition(".")[2] in ("weight", "bias") for name, _ in plain.named_parameters())


def test_tied_weights_stay_tied() -> None:
    plain = freeze(transform(build("tied")[0], Config(density=0.4)))

    assert plain.get_parameter("first.weight") is plain.get_parameter("second.weight")
    assert len(list(plain.parameters())) == 4  # with two biases and the weight used by hand


def test_a_batch_norm_behind_a_tied_weight_is_kept() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm1, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm2(self.conv(F.relu(self.norm1(self.conv(x)))))

    model = transform(_randomize(Twice()), Config(density=0.5))
    plain = freeze(model)

    _assert_same(plain, model, torch.randn(2, 3, 4, 4))
    assert isinstance(plain.get_submodule("norm1"), nn.BatchNorm2d)
    assert sum(p.dim() == 4 for p in plain.parameters()) == 1


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_folds_into_transposed_convolutions(dims: int, groups: int, bias: bool) -> None:
    conv = getattr(nn, f"ConvTranspose{dims}d")(4, 6, 3, stride=2, output_padding=1, groups=groups, bias=bias)
    norm = getattr(nn, f"BatchNorm{dims}d")(6)
    model = transform(_randomize(nn.Sequential(conv, norm)), Config(density=0.5, normalization="keep"))

    plain = freeze(model)

    _assert_same(plain, model, torch.randn(2, 4, *[5] * dims))
    assert not list(plain.buffers())


def test_linear_before_batch_norm_is_folded_for_matrices_only() -> None:
    # With as many rows as features BatchNorm1d would take the other dimension for channels.
    sequence = transform(_randomize(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))), CONFIGS["keep"])
    matrix = transform(_randomize(nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6))), CONFIGS["keep"])
    x = torch.randn(3, 6, 6)

    _assert_same(freeze(sequence), sequence, x)
    _assert_same(freeze(matrix), matrix, x)
    assert list(freeze(sequence).buffers())
    assert not list(freeze(matrix).buffers())


def test_statistics_of_the_batch_are_not_folded() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    model = transform(net, CONFIGS["keep"])

    _assert_same(freeze(model), model, torch.randn(4, 3, 5, 5))


class _Activations(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.activation = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.LeakyReLU(0.2), "leaky_relu"),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), "max_pool2d"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "avg_pool2d"),
        (nn.AdaptiveAvgPool2d((3, None)), "adaptive_avg_pool2d"),
    ],
)
def test_runtime_ops_become_torch_functions(activation: nn.Module, function: str) -> None:
    model = transform(_Activations(activation), Config(density=0.5))

    graph = frozen_graph(model)

    _assert_same(graph, model, torch.randn(2, 3, 9, 9))
    assert f"{function}(" in graph.code
    assert type(freeze(model).activation) is type(activation)


def test_an_unusual_bound_becomes_a_clamp() -> None:
    # No pass makes this one today; the op allows it.
    model = transform(_Activations(nn.ReLU6()), Config(density=0.5))
    (node,) = model.graph.find_nodes(op="call_function", target=sign_relu)
    node.kwargs = {**node.kwargs, "high": 0.5}
    model.recompile()

    plain = freeze(model)

    assert "clamp" in plain.code
    _assert_same(plain, model, torch.randn(2, 3, 9, 9))


def test_dropout_goes_unless_it_always_drops() -> None:
    class Always(nn.Module):
        def __init__(self, training: bool) -> None:
            super().__init__()
            self.layer, self.drop, self.always = nn.Linear(6, 400), nn.Dropout(0.5), training

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.drop(self.layer(x)), 0.25, training=self.always)

    for gamma in (0.0, 0.9):
        config = Config(density=0.5, activation_sparsity=gamma)
        assert "drop" not in frozen_graph(transform(Always(training=False), config)).code
        kept = freeze(transform(Always(training=True), config))
        assert math.isclose((kept(torch.randn(9, 6)) == 0).float().mean(), 0.25, abs_tol=0.05)


def test_constants_of_the_capture_lose_their_prefix() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.tensor([1.0, 2.0, 3.0])

    model = transform(Constant(), Config(density=0.5))
    plain = freeze(model)

    _assert_same(plain, model, torch.randn(2, 3))
    assert "constant" not in " ".join((*plain.state_dict(), *dict(plain.named_buffers())))
    graph = frozen_graph(model)
    assert "fedmef" not in graph.code + " ".join(graph.state_dict())


def test_optional_arguments_stay() -> None:
    original, (x,) = build("optional")
    model = transform(original, Config(density=0.5), example_inputs=(x, x))

    _assert_same(freeze(model), model, x, torch.randn_like(x))
    assert set(freeze(model)(x, x)) == {"out", "norm"}


def test_an_untransformed_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear is not a transformed model; expected .*transform\(model\)"):
        freeze(nn.Linear(2, 2))


def test_an_op_without_a_plain_form_is_named() -> None:
    from fedmef_fx.packing import clamp  # noqa: PLC0415  # any function of the package that is no op

    model = transform(_Activations(nn.ReLU()), Config(density=0.5, activation_sparsity=0.0))
    (node,) = [n for n in model.graph.nodes if n.name == "activation"]
    with model.graph.inserting_after(node):
        model.graph.call_function(clamp, (node,), name="strange")

    with pytest.raises(ExportError, match=r"node 'strange' calls clamp, which has no plain form"):
        freeze(model)


class _Branching(nn.Module):
    """Python control flow on values around layers that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
        )
        self.rnn = nn.GRU(8, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x if x.sum() > 0 else -x)
        return self.head(self.rnn(x.mean(2).transpose(1, 2))[0][:, -1])


@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
@pytest.mark.parametrize("examples", [True, False])
def test_a_model_that_keeps_its_python_becomes_plain_again(normalization: str, examples: bool) -> None:
    model, x = _Branching(), torch.randn(4, 3, 8, 8)
    sparse = transform(
        model, CONFIGS["keep" if normalization == "keep" else "fedmef"], example_inputs=(x,) if examples else None
    )
    sparse(x).sum().backward()
    sparse.eval()
    plain = freeze(sparse)
    assert type(plain) is _Branching
    for module in plain.modules():
        assert not type(module).__module__.startswith("fedmef_fx")
    assert set(plain.state_dict()) <= set(model.state_dict())
    other = torch.randn(3, 3, 8, 8)  # a batch size that no graph has seen
    assert torch.allclose(plain(other), sparse(other), atol=1e-5)
    assert torch.allclose(plain(-x), sparse(-x), atol=1e-5)
    rest = masks(sparse)
    assert bool((plain.rnn.weight_ih_l0[~rest["rnn.weight_ih_l0"]] == 0).all())
    plain.load_state_dict(plain.state_dict())
