"""Depthwise convolutions with packed weights give what torch gives, forward and backward."""

import pytest
import torch

from fedmef_fx.ops.depthwise import PackedDepthwise, depthwise_plan
from fedmef_fx.ops.sparse_convolution import Geometry
from fedmef_fx.ops.sparse_ways import depthwise_way
from fedmef_fx.packing.bitmap import pack_bits

pytestmark = pytest.mark.usefixtures("native_kernels")

# Batch, channels, height, width, kernel, stride, padding, dilation.
SHAPES = [
    (8, 20, 32, 32, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 5, 4, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 5, 7, 9, (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 5, 9, 11, (5, 5), (1, 1), (2, 2), (1, 1)),
    (3, 5, 9, 14, (3, 3), (3, 3), (2, 2), (2, 2)),
    (2, 4, 5, 6, (2, 2), (1, 1), (0, 0), (1, 1)),
    (1, 3, 8, 8, (7, 7), (2, 2), (3, 3), (1, 1)),
    (2, 3, 6, 10, (1, 3), (1, 2), (0, 1), (1, 1)),
    (2, 3, 3, 3, (3, 3), (1, 1), (0, 0), (1, 1)),
]


def layer_of(channels, kernel, dtype, *, geometry):
    weight = torch.randn(channels, 1, *kernel, dtype=dtype)
    mask = torch.rand(weight.shape) < 0.8
    return weight * mask, mask, PackedDepthwise(weight[mask], pack_bits(mask), weight.shape, geometry)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_convolution_and_its_gradients(shape, dtype):
    samples, channels, height, width, kernel, stride, padding, dilation = shape
    weight, mask, layer = layer_of(channels, kernel, dtype, geometry=Geometry(stride, padding, dilation))
    x, bias = torch.randn(samples, channels, height, width, dtype=dtype), torch.randn(channels, dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    expected = torch.conv2d(*inputs, stride=stride, padding=padding, dilation=dilation, groups=channels)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    # Sums of other orders, of up to 8,192 products of numbers around 1 for the weight.
    rounding = 2e-3 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(layer.forward(x, bias), expected, atol=rounding, rtol=0, check_device=False)
    torch.testing.assert_close(layer.input_gradient(grad, x.shape), x.grad, atol=rounding, rtol=0)
    torch.testing.assert_close(layer.weight_gradient(grad, x), weight.grad[mask], atol=rounding, rtol=0)


def test_it_writes_over_what_it_may():
    _, _, layer = layer_of(6, (3, 3), torch.float32, geometry=Geometry((1, 1), (1, 1), (1, 1)))
    x = torch.randn(4, 6, 9, 9)
    result, back = layer.forward(x, None), layer.input_gradient(x, x.shape)
    grad = x.clone()
    assert layer.forward(x, None, inplace=True) is x
    assert torch.equal(x, result)
    assert torch.equal(layer.input_gradient(grad, x.shape, inplace=True), back)
    assert torch.equal(grad, back)


def test_threads_change_no_bit():
    _, _, layer = layer_of(64, (3, 3), torch.float32, geometry=Geometry((2, 2), (1, 1), (1, 1)))
    x, grad = torch.randn(16, 64, 32, 32), torch.randn(16, 64, 16, 16)

    def results():
        return layer.forward(x, None), layer.input_gradient(grad, x.shape), layer.weight_gradient(grad, x)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(3)
        assert all(map(torch.equal, results(), alone))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("size", "kernel", "padding"),
    [((8, 8), (3, 3), (3, 3)), ((8, 8), (12, 12), (0, 0)), ((2, 2), (3, 3), (0, 0))],
    ids=["more zeros than the kernel reaches", "too many taps", "no result"],
)
def test_what_it_does_not_compute_is_left_to_torch(size, kernel, padding):
    geometry, shape = Geometry((1, 1), padding, (1, 1)), torch.Size((4, 1, *kernel))
    assert depthwise_plan(shape, size, geometry) is None
    assert depthwise_way(torch.randn(2, 4, *size), shape, geometry) is None


def test_what_does_not_fit_is_refused():
    _, _, layer = layer_of(4, (3, 3), torch.float32, geometry=Geometry((1, 1), (1, 1), (1, 1)))
    x = torch.randn(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"got an input \[2, 5, 8, 8\] for a weight \[4, 1, 3, 3\]"):
        layer.forward(torch.randn(2, 5, 8, 8), None)
    with pytest.raises(ValueError, match=r"got a bias \[3\]; expected \[4\]"):
        layer.forward(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"got torch.float64\[2, 4, 8, 8\]; expected torch.float32\[2, 4, 8, 8\]"):
        layer.input_gradient(x.double(), x.shape)
    with pytest.raises(ValueError, match=r"got torch.float32\[2, 4, 8, 7\]; expected torch.float32\[2, 4, 8, 8\]"):
        layer.weight_gradient(x[..., :7], x)
