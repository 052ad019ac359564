"""Pointwise convolutions by their active weights alone, against the dense product."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.native import library
from fedmef_fx.ops import pointwise, sparse_ways
from fedmef_fx.ops.gradient_collector import Request, collecting
from fedmef_fx.ops.layers import pruned_convolution
from fedmef_fx.packing import PackedTensor, using_backend
from fedmef_fx.packing.bitmap import pack_bits


@pytest.fixture(autouse=True)
def _on_native_kernels(native_kernels):
    with using_backend("native"):
        yield


def packed(out: int, inputs: int, density: float, *, dims: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A dense weight with zeros, its active values and its bitmap; the second row is empty."""
    mask = torch.zeros(out, inputs, dtype=torch.bool)
    others = torch.arange(out * inputs).view(out, inputs)[torch.arange(out) != 1].flatten()
    mask.view(-1)[others[torch.randperm(others.numel())[: round(density * out * inputs)]]] = True
    mask = mask.view(out, inputs, *(1,) * dims)
    weight = torch.randn(mask.shape, dtype=torch.float64) * mask
    return weight, weight[mask].clone().requires_grad_(), pack_bits(mask)


def convolve(x, kept, values, bitmap, shape, **options):
    dims = len(shape) - 2
    plain = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims, "packed_shape": tuple(shape)}
    bias, gain = options.pop("bias", None), options.pop("gain", None)
    return pruned_convolution(x, kept, values, bias, gain, bitmap, **{**plain, **options})


def count_sparse(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the inputs that take the sparse way from now on."""
    seen = []
    forward = pointwise.PackedMatrix.forward

    def counted(self, x, bias):
        seen.append(x.shape)
        return forward(self, x, bias)

    monkeypatch.setattr(pointwise.PackedMatrix, "forward", counted)
    return seen


@pytest.mark.parametrize("size", [(4, 4), (9, 8), (70, 19)])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_and_gradients_equal_the_dense_product(size, batch, has_bias, threads, monkeypatch):
    sparse = count_sparse(monkeypatch)
    monkeypatch.setattr(library, "_SMALLEST_PART", 1)
    monkeypatch.setattr(sparse_ways, "_is_faster", lambda *_, **__: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    dense, values, bitmap = packed(13, 21, 0.25)
    x = torch.randn(batch, 21, *size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True) if has_bias else None
    out = convolve(x, PackedTensor.pack(x), values, bitmap, dense.shape, bias=bias)
    assert sparse == [x.shape]
    weight = dense.clone().requires_grad_()
    expected = F.conv2d(x, weight, bias)
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
    assert out.is_contiguous()
    direction = torch.randn_like(out)
    inputs = [x, *([bias] if has_bias else [])]
    got = torch.autograd.grad((out * direction).sum(), [values, *inputs])
    want = torch.autograd.grad((expected * direction).sum(), [weight, *inputs])
    assert torch.allclose(got[0], want[0][dense != 0], rtol=1e-12, atol=1e-10)
    for have, wanted in zip(got[1:], want[1:], strict=True):
        assert torch.allclose(have, wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dims", [1, 3])
def test_standardised_weights_train_as_on_numpy(dims):
    dense, values, bitmap = packed(8, 12, 0.25, dims=dims)
    x = torch.randn(4, 12, *(16,) * dims, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(8, dtype=torch.float64).requires_grad_()
    results = []
    for name in ("native", "numpy"):
        with using_backend(name):
            out = convolve(x, None, values, bitmap, dense.shape, gain=gain, g=1.7)
            results.append((out, *torch.autograd.grad(out.square().sum(), (values, gain, x))))
    for have, want in zip(*results, strict=True):
        # Up to 16,384 products of about 10 are summed in another order, and cancel in rows of few weights.
        assert torch.allclose(have, want, rtol=1e-11, atol=1e-10)


def test_everything_masked_gives_the_bias():
    shape = torch.Size((3, 5, 1, 1))
    bitmap, values = pack_bits(torch.zeros(shape, dtype=torch.bool)), torch.zeros(0, requires_grad=True)
    x, bias = torch.randn(2, 5, 9, 9, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
    out = convolve(x, None, values, bitmap, shape, bias=bias)
    assert torch.equal(out, bias.view(1, 3, 1, 1).expand(2, 3, 9, 9))
    grad_x, grad_values = torch.autograd.grad(out.sum(), (x, values))
    assert not grad_x.any()
    assert grad_values.shape == (0,)


@pytest.mark.parametrize(
    ("options", "channels_last", "density", "dtype"),
    [
        ({"stride": (2, 2)}, False, 0.25, torch.float64),
        ({"padding": (1, 1)}, False, 0.25, torch.float64),
        ({}, True, 0.25, torch.float64),
        ({}, False, 0.9, torch.float64),
        ({}, False, 0.25, torch.bfloat16),
    ],
)
def test_what_is_not_faster_takes_the_dense_way(options, channels_last, density, dtype, monkeypatch):
    sparse = count_sparse(monkeypatch)
    dense, values, bitmap = packed(6, 6, density)
    x = torch.randn(2, 6, 10, 10, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    out = convolve(x, None, values.detach().to(dtype), bitmap, dense.shape, **options)
    expected = F.conv2d(x, dense.to(dtype), None, **options)
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
    assert out.stride() == expected.stride()
    assert sparse == []


def test_no_dense_weight_is_made():
    dense, values, bitmap = packed(1024, 1024, 0.05)
    x = torch.randn(1, 1024, 8, 8, dtype=torch.float64, requires_grad=True)
    with LiveBytes() as live:
        convolve(x, None, values, bitmap, dense.shape).sum().backward()
    assert live.peak < dense.nbytes / 2


def test_growth_candidates_come_from_dense_gradients():
    dense, values, bitmap = packed(6, 9, 0.25)
    x = torch.randn(3, 9, 8, 8, dtype=torch.float64)
    direction = torch.randn(3, 6, 8, 8, dtype=torch.float64)
    shapes = {"w": dense.shape}
    with collecting({"w": Request(bitmap, k=4)}, packed_shapes=shapes) as collector, collector.batch(1.0):
        out = convolve(x, None, values, bitmap, dense.shape)
        (out * direction).sum().backward()
        collector.complete("w")
    weight = dense.clone().requires_grad_()
    (F.conv2d(x, weight) * direction).sum().backward()
    found = collector.candidates()["w"]
    inactive = torch.where(dense == 0, weight.grad, 0.0).flatten()
    assert set(found.positions.tolist()) == set(inactive.abs().topk(4).indices.tolist())
    assert torch.allclose(values.grad, weight.grad[dense != 0], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 8, 10, 10), (2, 10, 10, 10), (9, 10, 10, 3, 2)])
def test_inputs_that_do_not_fit_are_errors(shape):
    dense, values, bitmap = packed(6, 9, 0.25)
    with pytest.raises(RuntimeError, match=r"weight of size \[6, 9, 1, 1\]|Expected"):
        convolve(torch.randn(shape, dtype=torch.float64), None, values, bitmap, dense.shape)


@pytest.mark.parametrize("has_gain", [True, False])
def test_values_that_do_not_fit_their_bitmap_are_errors(has_gain):
    dense, values, bitmap = packed(6, 9, 0.25)
    x = torch.randn(2, 9, 10, 10, dtype=torch.float64)
    gain = torch.ones(6, dtype=torch.float64) if has_gain else None
    with pytest.raises(ValueError, match=f"got {values.numel() - 1} values; expected one per"):
        convolve(x, None, values[1:], bitmap, dense.shape, gain=gain)


def test_padding_bits_of_a_bitmap_are_not_weights():
    dense, values, bitmap = packed(5, 9, 0.25)  # 45 bits, padded to 48
    bitmap[-1] |= 0b1100_0000
    x = torch.randn(2, 9, 10, 10, dtype=torch.float64)
    more = torch.cat([values.detach(), values.new_tensor([1.0, 2.0])])
    out = convolve(x, None, more, bitmap, dense.shape)
    assert torch.allclose(out, F.conv2d(x, dense), rtol=1e-12, atol=1e-12)
