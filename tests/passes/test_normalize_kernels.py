"""A layer and its BatchNorm become one layer with an NSConv kernel, and nothing else does."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx import Config, freeze, report, transform
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from tests.passes.programs import program_for, refusals_of, run, text_of

FIRST = (FunctionalizeWeights(), InsertMasks(0.5))


def kernel_of(program):
    ((_, _, graph),) = program.graphs()
    (kernel,) = (node for node in graph.nodes if getattr(node.target, "__name__", "") == "nsconv_weight")
    return kernel


def test_the_form_of_a_pair():
    program = program_for(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    result = run(program, *FIRST, NormalizeKernels())
    assert (result.rewrites, result.refusals) == (("1",), ())
    assert text_of(program).splitlines() == [
        "_0_weight_1 = 0.weight",
        "_0_weight_mask_1 = 0.weight_mask",
        "_1_weight = 1.weight",
        "_1_bias = 1.bias",
        "nsconv_weight = nsconv_weight(_0_weight_1, _1_weight, _0_weight_mask_1)",
        "conv2d = conv2d(input_1, nsconv_weight, _1_bias)",
        "_2 = 2(conv2d)",
        "return _2",
    ]


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (nn.Linear(6, 4), nn.BatchNorm1d(4)),
        (nn.Conv1d(6, 4, 3, groups=2), nn.BatchNorm1d(4)),
        (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    ],
    ids=["linear", "grouped", "3d", "transposed"],
)
@pytest.mark.parametrize("statistics", ["active", "all"])
def test_every_kind_of_layer_with_its_options(layer, norm, statistics):
    program = program_for(nn.Sequential(layer, norm))
    assert run(program, *FIRST, NormalizeKernels(statistics)).rewrites == ("1",)
    options = kernel_of(program).kwargs
    assert options["groups"] == getattr(layer, "groups", 1)
    assert options["transposed"] is isinstance(layer, nn.ConvTranspose2d)
    assert options["statistics"] == statistics


def test_a_batchnorm_without_affine_parameters_gets_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    run(program_for(model), *FIRST, NormalizeKernels())
    assert torch.equal(model[1].weight, torch.ones(4))
    assert torch.equal(model[1].bias, torch.zeros(4))


@pytest.mark.parametrize("statistics", ["active", "all"])
def test_stored_weights_are_centred_where_the_kernel_does_it_over_active_ones(statistics):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program = program_for(model)
    run(program, *FIRST)
    before = model[0].weight.detach().clone()
    run(program, NormalizeKernels(statistics))
    sums = model[0].weight.detach().flatten(1).sum(1)
    if statistics == "active":
        assert torch.allclose(sums, torch.zeros(4), atol=1e-5)  # 14 terms of at most 0.4 in float32
        assert not model[0].weight[~model[0].weight_mask].any()
    else:
        assert torch.equal(model[0].weight, before)


class Apart(nn.Module):
    """A nonlinearity between the layer and the BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x).relu())


class ReadTwice(Apart):
    """The BatchNorm's input has another reader."""

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class CalledTwice(Apart):
    """One layer and one BatchNorm for two inputs."""

    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


@pytest.mark.parametrize(
    ("model", "ignore", "reason"),
    [
        (Apart(), (), "no convolution or linear layer stands directly before it"),
        (ReadTwice(), (), "its input has other users, which need the values before it"),
        (CalledTwice(), (), "it, or the layer before it, is called more than once"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), ("1",), "ignored by Config.ignore"),
    ],
    ids=["apart", "read twice", "called twice", "ignored"],
)
def test_refusals_change_nothing(model, ignore, reason):
    program = program_for(model)
    run(program, *FIRST)
    before, weights = text_of(program), {name: value.clone() for name, value in model.state_dict().items()}
    result = run(program, NormalizeKernels(ignore=ignore))
    assert set(refusals_of(result).values()) == {reason}
    assert not result.modified
    assert text_of(program) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class SamePadding(nn.Conv2d):
    """Computes its padding from the size of the image, as models that came from TensorFlow do."""

    def forward(self, x):
        height, width = (max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:])
        padded = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(padded, self.weight, self.bias, stride=2)


def test_a_layer_whose_python_computes_the_padding_keeps_its_batch_norm():
    net = nn.Sequential(
        SamePadding(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
    )
    model = transform(net, Config(density=0.5), example_inputs=(torch.randn(2, 3, 16, 16),)).eval()
    refusals = {refusal.where: refusal.reason for result in report(model) for refusal in result.refusals}
    assert refusals["1"].endswith("computes the layer before it in a way of its own")
    assert "4" not in refusals
    frozen = freeze(model)
    for size in (16, 17, 24):  # one that the graph serves, and two for which Python runs
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-6)
