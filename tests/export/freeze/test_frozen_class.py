"""freeze gives ordinary modules of the original's class, which other tools take as they take the original."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedmef_fx import Config, freeze, masks, transform
from tests.models import ZOO, build

# One convolution with an NSConv kernel or with its BatchNorm folded adds one rounding per weight.
TOLERANCE = 1e-5


class Block(nn.Module):
    """A residual block whose shortcut has no weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Network(nn.Module):
    """What most image models consist of, with a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.blocks = nn.Sequential(Block(8), nn.MaxPool2d(2), Block(8))
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.features(x).mean((2, 3))))


def trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model


def assert_same(plain: nn.Module, sparse: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected, got = copy.deepcopy(sparse).eval()(*inputs), plain(*inputs)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(params=["nsconv", "keep"])
def sparse(request: pytest.FixtureRequest) -> nn.Module:
    return transform(trained(Network()), Config(density=0.5, normalization=request.param))


IMAGES = (3, 3, 8, 8)


def test_layers_are_torchs_with_a_bias_and_norms_do_nothing(sparse: nn.Module) -> None:
    plain = freeze(sparse)

    assert type(plain) is Network
    assert type(plain.blocks[0]) is Block
    kinds = {type(module) for module in plain.modules()}
    assert not [kind for kind in kinds if kind.__module__.startswith("fedmef_fx")]
    assert nn.BatchNorm2d not in kinds
    convolutions = [module for module in plain.modules() if type(module) is nn.Conv2d]
    assert len(convolutions) == 5
    assert all(isinstance(conv.bias, nn.Parameter) for conv in convolutions)
    assert type(plain.blocks[0].bn1) is nn.Identity
    assert plain.stem[0].padding_mode == "reflect"
    assert_same(plain, sparse, torch.randn(IMAGES))
    assert not any(module.training for module in plain.modules())


def test_methods_of_the_class_run_the_folded_layers(sparse: nn.Module) -> None:
    plain, x = freeze(sparse), torch.randn(IMAGES)

    with torch.no_grad():
        torch.testing.assert_close(plain.fc(plain.features(x).mean((2, 3))), plain(x))


def test_zeros_stay_zeros(sparse: nn.Module) -> None:
    parameters = dict(freeze(sparse).named_parameters())

    for name, mask in masks(sparse).items():
        assert torch.equal(parameters[name] != 0, mask), name


def test_the_state_is_that_of_the_architecture_with_folded_norms(sparse: nn.Module) -> None:
    plain, fused = freeze(sparse), Network().eval()
    for path in ("stem", "blocks.0", "blocks.2"):
        owner = fused.get_submodule(path)
        for conv, norm in {"stem": [("0", "1")]}.get(path, [("conv1", "bn1"), ("conv2", "bn2")]):
            setattr(owner, conv, nn.utils.fuse_conv_bn_eval(owner.get_submodule(conv), owner.get_submodule(norm)))
            setattr(owner, norm, nn.Identity())

    fused.load_state_dict(plain.state_dict())

    assert_same(fused, sparse, torch.randn(IMAGES))


def test_norms_that_are_kept_make_the_state_that_of_the_original(sparse: nn.Module) -> None:
    plain, original = freeze(sparse, batch_norms="keep"), Network().eval()

    original.load_state_dict(plain.state_dict())

    assert type(plain) is Network
    assert plain.blocks[0].conv1.bias is None
    assert plain.stem[0].bias is not None  # the original has one
    assert_same(plain, sparse, torch.randn(IMAGES))
    assert_same(original, sparse, torch.randn(IMAGES))


def test_norms_without_scale_and_shift_are_kept_in_their_mean() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    for normalization in ("nsconv", "keep"):
        model = transform(trained(copy.deepcopy(net)), Config(density=0.5, normalization=normalization))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name == "1.bias":
                    parameter.normal_()
        plain = freeze(model, batch_norms="keep")
        net.load_state_dict(plain.state_dict())
        assert_same(net.eval(), model, torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("name", [name for name in ZOO if name != "drop_path"])
def test_every_architecture_keeps_its_class(name: str) -> None:
    original, _ = build(name)
    model = transform(original, Config(density=0.5))

    assert type(freeze(model)) is type(original)
    original.load_state_dict(freeze(model, batch_norms="keep").state_dict())


def test_torchscript_takes_it(sparse: nn.Module) -> None:
    plain, x = freeze(sparse), torch.randn(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch advises against TorchScript
        scripted, traced = torch.jit.script(plain), torch.jit.trace(plain, x)

    with torch.no_grad():
        assert torch.equal(scripted(x), plain(x))
        assert torch.equal(traced(x), plain(x))


def test_a_norm_of_a_subclass_leaves_what_else_it_computes() -> None:
    class NormAndActivation(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return self.act(self.drop(x))

    for normalization in ("nsconv", "keep"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), NormAndActivation(4), nn.Conv2d(4, 2, 1))
        model = transform(trained(net), Config(density=0.5, normalization=normalization))
        plain = freeze(model)
        assert type(plain) is nn.Sequential
        assert not list(plain.buffers())
        assert_same(plain, model, torch.randn(2, 3, 5, 5))
        net.load_state_dict(freeze(model, batch_norms="keep").state_dict())


class Stream(nn.Module):
    """A sum of two layers, and something after it that may or may not commute with a factor."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head, self.activation = nn.Conv2d(4, 2, 1), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.first(x) + self.second(x)))


@pytest.mark.parametrize("activation", [F.relu, F.leaky_relu, F.gelu, F.relu6, torch.sigmoid])
def test_two_layers_take_the_factor_of_their_sum(activation: Callable[[Tensor], Tensor]) -> None:
    model = transform(trained(Stream(activation)), Config(density=0.5))
    assert "mul" in str(model.graph)

    plain = freeze(model)

    assert type(plain) is Stream
    assert_same(plain, model, torch.randn(2, 3, 5, 5))


def test_a_factor_that_no_layer_can_take_over_stays_in_a_graph_of_layers() -> None:
    class OntoInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.sigmoid(x + self.norm(self.conv(x))))

    model = transform(trained(OntoInput()), Config(density=0.5))
    plain = freeze(model)

    assert isinstance(plain, fx.GraphModule)
    assert "mul" in plain.code
    assert type(plain.conv) is nn.Conv2d
    assert sorted(plain.state_dict()) == ["conv.bias", "conv.weight", "head.bias", "head.weight"]
    assert_same(plain, model, torch.randn(2, 3, 5, 5))


def test_a_graph_that_was_edited_is_kept() -> None:
    model = transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), Config(density=0.5))
    (last,) = [node for node in model.graph.nodes if node.op == "output"]
    with model.graph.inserting_before(last):
        last.args = (model.graph.call_function(torch.neg, (last.args[0],)),)
    model.recompile()

    plain = freeze(model)

    assert isinstance(plain, fx.GraphModule)
    assert_same(plain, model, torch.randn(3, 4))


def test_options_that_a_pass_changed_are_kept() -> None:
    model = transform(nn.Sequential(nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 2, 1)), Config(density=0.5))
    (node,) = [node for node in model.graph.nodes if "slope" in node.kwargs]
    node.kwargs = {**node.kwargs, "slope": 0.3}
    model.recompile()

    plain = freeze(model)

    assert isinstance(plain, fx.GraphModule)
    assert_same(plain, model, torch.randn(2, 2, 5, 5))


def test_tied_layers_stay_tied() -> None:
    plain = freeze(transform(build("tied")[0], Config(density=0.4)))

    assert plain.first.weight is plain.second.weight


def test_eager_quantisation_fuses_and_converts_it() -> None:
    from torch.ao import quantization  # noqa: PLC0415 -- slow to import

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
            self.conv, self.norm, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.norm(self.conv(self.quant(x))))
            return self.dequant(self.fc(x.mean((2, 3))))

    model, x = transform(trained(Quantised()), Config(density=0.5)), torch.randn(16, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another package
        for plain, names in (
            (freeze(model), ["conv", "relu"]),
            (freeze(model, batch_norms="keep"), ["conv", "norm", "relu"]),
        ):
            expected = plain(x)
            quantization.fuse_modules(plain, [names], inplace=True)
            plain.qconfig = quantization.default_qconfig
            prepared = quantization.prepare(plain)
            prepared(x)
            converted = quantization.convert(prepared)
            assert "quantized" in type(converted.fc).__module__
            # Eight bits a value: a few hundredths of the largest.
            assert float((converted(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())
