import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx.errors import FedmefError
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.ops.dropout import bit_dropout
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.packing import PackedTensor

GEOMETRIES = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (2, 4, 7, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 7, 8)),
    (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 4)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
]


def geometry(conv):
    options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups", "output_padding")}
    return {**options, "transposed": conv.transposed}


def gradients(output, inputs, direction):
    return torch.autograd.grad((output * direction).sum(), [t for t in inputs if t is not None])


@pytest.mark.parametrize(("conv", "shape"), GEOMETRIES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_convolution_equals_torch(conv, shape, packed, masked):
    conv = copy.deepcopy(conv).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(conv.weight.shape) < 0.5 if masked else None
    weight = conv.weight if mask is None else masked_weight(conv.weight, mask)
    function = getattr(F, f"conv{'_transpose' if conv.transposed else ''}{x.dim() - 2}d")
    options = geometry(conv)
    transposed = options.pop("transposed")
    if not transposed:
        options.pop("output_padding")
    expected = function(x, weight, conv.bias, **options)
    kept = PackedTensor.pack(x.detach()) if packed else None
    got = pruned_convolution(x, kept, conv.weight, conv.bias, None, mask, **geometry(conv))
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-13)
    direction = torch.randn_like(got)
    inputs = (x, conv.weight, conv.bias)
    for want, have in zip(gradients(expected, inputs, direction), gradients(got, inputs, direction), strict=True):
        assert torch.allclose(want, have, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear_equals_torch(shape):
    layer = nn.Linear(5, 4).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    got = pruned_linear(x, PackedTensor.pack(x.detach()), layer.weight, layer.bias)
    expected = layer(x)
    direction = torch.randn_like(got)
    inputs = (x, layer.weight, layer.bias)
    for want, have in zip(gradients(expected, inputs, direction), gradients(got, inputs, direction), strict=True):
        assert torch.allclose(want, have, rtol=1e-12, atol=1e-13)


def test_convolution_without_batch_dimension():
    conv = nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 5, 5)
    got = pruned_convolution(x, PackedTensor.pack(x), conv.weight, conv.bias, **geometry(conv))
    assert torch.allclose(got, conv(x), atol=1e-6)
    got.sum().backward()
    grad, conv.weight.grad = conv.weight.grad, None
    conv(x).sum().backward()
    assert torch.allclose(grad, conv.weight.grad, atol=1e-5)


def test_a_pruned_input_changes_the_weight_gradient_alone():
    layer = nn.Linear(6, 3).double()
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    kept = PackedTensor.pack(x.detach(), threshold=1.0)
    direction = torch.randn(8, 3, dtype=torch.float64)
    pruned = gradients(pruned_linear(x, kept, layer.weight, layer.bias), (x, layer.weight, layer.bias), direction)
    exact = gradients(layer(x), (x, layer.weight, layer.bias), direction)
    assert torch.equal(pruned[0], exact[0])
    assert torch.allclose(pruned[2], exact[2])
    assert torch.allclose(pruned[1], direction.t() @ torch.where(x.abs() > 1, x, 0.0))


def test_masked_gradients_are_zero_even_where_they_overflow():
    weight = nn.Parameter(torch.tensor([[1.0, float("inf")], [2.0, 0.0]]))
    mask = torch.tensor([[True, False], [True, False]])
    out = masked_weight(weight, mask)
    assert torch.equal(out, torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    out.backward(torch.tensor([[1.0, float("nan")], [1.0, float("inf")]]))
    assert torch.equal(weight.grad, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_frozen_weights_keep_no_input():
    layer = nn.Linear(64, 8).requires_grad_(requires_grad=False)
    x = torch.randn(32, 64, requires_grad=True)
    with SavedTensors(layer, x) as saved:
        out = pruned_linear(x, PackedTensor.pack(x.detach()), layer.weight, layer.bias)
    assert saved.nbytes == 0
    out.sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(32, -1), atol=1e-6)


def test_autocast_computes_in_low_precision_and_returns_full_gradients():
    layer = nn.Linear(16, 8)
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pruned_linear(x, PackedTensor.pack(x.detach()), layer.weight, layer.bias)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    assert torch.allclose(layer.weight.grad, x.detach().sum(0).expand(8, -1), atol=0.1)


def test_integer_input_is_named():
    layer = nn.Linear(4, 2)
    with pytest.raises(FedmefError, match=r"input of torch.int64; expected a floating point"):
        pruned_linear(torch.ones(1, 4, dtype=torch.int64), None, layer.weight)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(
    ("options", "reference"),
    [({}, F.relu), ({"high": 6.0}, F.relu6), ({"slope": 0.1}, lambda x: F.leaky_relu(x, 0.1))],
)
def test_sign_relu_is_bit_identical(options, reference, inplace):
    values = torch.cat([torch.randn(1001) * 4, torch.tensor([0.0, -0.0, 6.0])])
    x = values.clone().requires_grad_()
    y = values.clone().requires_grad_()
    direction = torch.randn_like(values)
    out = sign_relu(x * 1.0, inplace=inplace, **options)
    expected = reference(y * 1.0)
    assert torch.equal(out, expected)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_sign_relu_keeps_one_bit_per_element():
    x = torch.randn(4096, requires_grad=True)
    with SavedTensors(x) as saved:
        out = sign_relu(x)
    assert saved.nbytes == 4096 // 8
    out.sum().backward()
    assert saved.nbytes == 0


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 11), {"kernel": (3,), "stride": (2,), "padding": (1,), "dilation": (1,)}),
        ((2, 3, 9, 10), {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
        ((2, 3, 9, 10), {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": True}),
        ((3, 9, 10), {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}),
        ((1, 2, 5, 6, 7), {"kernel": (2, 3, 2), "stride": (1, 2, 2), "padding": (0, 1, 1), "dilation": (2, 1, 1)}),
        ((1, 1, 20, 20), {"kernel": (17, 17), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}),
    ],
)
def test_max_pool_equals_torch(shape, options):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dims = len(options["kernel"])
    names = {"kernel": "kernel_size"}
    reference = getattr(F, f"max_pool{dims}d")(x, **{names.get(k, k): v for k, v in options.items()})
    got = max_pool(x, **options)
    assert torch.equal(got, reference)
    direction = torch.randn_like(got)
    assert torch.equal(*(torch.autograd.grad((o * direction).sum(), x)[0] for o in (got, reference)))


def test_average_pools_equal_torch_and_keep_nothing():
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    options = {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 0)}
    pairs = [
        (
            lambda: avg_pool(x, **options, count_include_pad=False),
            lambda: F.avg_pool2d(x, (3, 2), (2, 2), (1, 0), count_include_pad=False),
        ),
        (lambda: adaptive_avg_pool(x, output_size=(3, 1)), lambda: F.adaptive_avg_pool2d(x, (3, 1))),
    ]
    for ours, theirs in pairs:
        with SavedTensors(x) as saved:
            got = ours()
        assert saved.nbytes == 0
        expected = theirs()
        direction = torch.randn_like(got)
        assert torch.equal(got, expected)
        assert torch.allclose(*(torch.autograd.grad((o * direction).sum(), x)[0] for o in (got, expected)))


def test_dropout_drops_scales_and_keeps_one_bit():
    x = torch.ones(8000, requires_grad=True)
    with SavedTensors(x) as saved:
        out = bit_dropout(x, p=0.25, training=True)
    assert saved.nbytes == 1000
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert bit_dropout(x, p=0.25, training=False) is x
    assert torch.equal(bit_dropout(x, p=1.0, training=True), torch.zeros_like(x))


def test_pooling_in_many_parts_takes_little_at_a_time():
    x = torch.randn(6, 64, 64, 64, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    options = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    with LiveBytes(x) as live:
        out = max_pool(x, **options)
    # Besides the result and its 8-byte indices there are offsets of a few bits and temporaries of one part.
    assert live.peak < x.nbytes + 2 * out.nbytes + out.numel() + 4_000_000
    expected = F.max_pool2d(other, 3, 2, 1)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, other.grad)
