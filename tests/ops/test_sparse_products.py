"""Convolutions and linear layers by their active weights alone, against the dense product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.native import library
from fedmef_fx.ops import sparse_convolution, sparse_ways
from fedmef_fx.ops.layer_product import DenseProduct
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.sparse_convolution import Geometry, PackedConvolution
from fedmef_fx.ops.sparse_linear import PackedLinear
from fedmef_fx.ops.sparse_matrix import Rows, SparseMatrix
from fedmef_fx.packing import using_backend
from fedmef_fx.packing.bitmap import pack_bits

pytestmark = pytest.mark.usefixtures("native_kernels")


def _weight(*shape: int, density: float = 0.3) -> tuple[Tensor, Tensor]:
    """A dense weight with zeros, and where it has none; the second row is empty."""
    mask = torch.rand(shape) < density
    mask[1:2] = False
    return torch.randn(shape, dtype=torch.float64) * mask, mask


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-12, atol=1e-11)


@settings(max_examples=150)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    channels=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    images=st.integers(1, 5),
    buffer=st.sampled_from([1, 2_000, 1 << 18]),
)
def test_any_convolution_equals_the_dense_one(
    kernel, stride, padding, dilation, size, channels, images, buffer
) -> None:
    if any(n + 2 * p <= d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
        return
    weight, mask = _weight(*channels, *kernel)
    weight.requires_grad_()
    x = torch.randn(images, channels[1], *size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels[0], dtype=torch.float64)
    expected = F.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation)
    grad = torch.randn_like(expected)
    grad_x, grad_weight = torch.autograd.grad(expected, (x, weight), grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_convolution, "_BUFFER", buffer)  # images are taken one by one, or together
        geometry = Geometry(stride, padding, dilation)
        product = PackedConvolution(weight.detach()[mask], pack_bits(mask), weight.shape, geometry)
        assert _agree(product.forward(x.detach(), bias), expected)
        assert _agree(product.input_gradient(grad, x.shape), grad_x)
        assert _agree(product.weight_gradient(grad, x), grad_weight[mask])


@pytest.fixture
def _always_sparse(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sparse_ways, "_is_faster", lambda *_, **__: True)
    monkeypatch.setattr(sparse_ways, "room_for_copies", lambda *_: 1 << 40)
    monkeypatch.delattr(DenseProduct, "forward")
    with using_backend("native"):
        yield


def _convolve(x, values, bitmap, shape, **options):
    plain = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "packed_shape": tuple(shape)}
    return pruned_convolution(x, None, values, None, None, bitmap, **{**plain, **options})


@pytest.mark.usefixtures("_always_sparse")
@pytest.mark.parametrize("options", [{}, {"stride": (2, 2)}, {"padding": (0, 2), "dilation": (2, 1)}], ids=str)
def test_layers_train_by_their_active_weights_alone(options) -> None:
    weight, mask = _weight(80, 60, 3, 3)
    values, weight = weight[mask].clone().requires_grad_(), weight.requires_grad_()
    x = torch.randn(4, 60, 9, 9, dtype=torch.float64, requires_grad=True)
    out = _convolve(x, values, pack_bits(mask), mask.shape, **options)
    expected = F.conv2d(x, weight, **{"padding": (1, 1), **options})
    grad = torch.randn_like(out)
    got, want = torch.autograd.grad(out, (values, x), grad), torch.autograd.grad(expected, (weight, x), grad)
    assert _agree(out, expected)
    assert _agree(got[0], want[0][mask])
    assert _agree(got[1], want[1])


@pytest.mark.usefixtures("_always_sparse")
@pytest.mark.parametrize("shape", [(40, 7), (3, 11, 7), (7,), (1, 7), (2, 2, 8, 7)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_layers_equal_dense_ones(shape, has_bias) -> None:
    weight, mask = _weight(5, 7)
    values, weight = weight[mask].clone().requires_grad_(), weight.requires_grad_()
    bias = torch.randn(5, dtype=torch.float64) if has_bias else None
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = pruned_linear(x, None, values, bias, None, pack_bits(mask), packed_shape=(5, 7))
    expected = F.linear(x, weight, bias)
    grad = torch.randn_like(out)
    got, want = torch.autograd.grad(out, (values, x), grad), torch.autograd.grad(expected, (weight, x), grad)
    assert _agree(out, expected)
    assert out.shape == expected.shape
    assert _agree(got[0], want[0][mask])
    assert _agree(got[1], want[1])


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_change_no_bit(threads, dtype, monkeypatch) -> None:
    weight, mask = _weight(9, 5, 3, 3)
    values, x = weight[mask].to(dtype), torch.randn(7, 5, 12, 12).to(dtype)
    grad = torch.randn(7, 9, 6, 6).to(dtype)

    def results() -> list[Tensor]:
        geometry = Geometry((2, 2), (1, 1), (1, 1))
        product = PackedConvolution(values, pack_bits(mask), mask.shape, geometry)
        return [product.forward(x, None), product.input_gradient(grad, x.shape), product.weight_gradient(grad, x)]

    alone = results()
    monkeypatch.setattr(library, "_SMALLEST_PART", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))


@pytest.mark.usefixtures("_always_sparse")
def test_neither_a_dense_weight_nor_its_gradient_is_made() -> None:
    weight, mask = _weight(256, 256, 3, 3, density=0.02)
    values = weight[mask].clone().requires_grad_()
    x = torch.randn(2, 256, 4, 4, dtype=torch.float64, requires_grad=True)
    with LiveBytes() as live:
        _convolve(x, values, pack_bits(mask), mask.shape).sum().backward()
    assert live.peak < weight.nbytes / 2


@pytest.mark.parametrize(
    ("density", "options", "channels_last", "is_sparse"),
    [
        (0.05, {}, False, True),
        (0.05, {"stride": (2, 2)}, False, True),
        (0.9, {}, False, False),  # above the crossing
        (0.05, {}, True, False),  # torch's memory format has to be kept
        (0.05, {"groups": 2}, False, False),
        (0.05, {"transposed": True}, False, False),
    ],
    ids=str,
)
def test_each_layer_takes_the_faster_way(density, options, channels_last, is_sparse, monkeypatch) -> None:
    taken = []
    forward = PackedConvolution.forward
    monkeypatch.setattr(
        PackedConvolution, "forward", lambda self, x, bias: (taken.append(1), forward(self, x, bias))[1]
    )
    groups = options.get("groups", 1)
    weight, mask = _weight(128, 128 // groups, 3, 3, density=density)
    x = torch.randn(4, 128, 16, 16, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    with using_backend("native"):
        out = _convolve(x, weight[mask], pack_bits(mask), mask.shape, **options)
    assert bool(taken) == is_sparse
    plain = {name: value for name, value in options.items() if name != "transposed"}
    reference = F.conv_transpose2d if options.get("transposed") else F.conv2d
    assert torch.allclose(out, reference(x, weight, padding=1, **plain), rtol=1e-11, atol=1e-11)


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    weight, mask = _weight(4, 6)
    bitmap = pack_bits(mask)
    with pytest.raises(ValueError, match="values; expected one per"):
        SparseMatrix.of(weight[mask][1:], bitmap, rows=4, width=6)
    rows = SparseMatrix.of(weight[mask], bitmap, rows=4, width=6).by_rows(16)
    x, out = torch.randn(1, 6, 16, dtype=torch.float64), torch.empty(1, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="got 3 dense rows; expected 4"):
        rows.multiply(Rows.of(x), Rows.of(out[:, :3]))
    with pytest.raises(ValueError, match=r"got rows \(1, 8\); expected \(1, 16\)"):
        rows.multiply(Rows.of(x[..., :8]), Rows.of(out))
    with pytest.raises(ValueError, match=r"got torch.float32; expected torch\.float64"):
        rows.multiply(Rows.of(x.float()), Rows.of(out))
    with pytest.raises(ValueError, match=r"got a bias \[3\]; expected \[4\]"):
        rows.multiply(Rows.of(x), Rows.of(out), torch.ones(3))
    with pytest.raises(ValueError, match="rows: got 96 elements; expected 97"):
        Rows(x.view(-1), 6, 16, 16, reach=(0, 1))
    with pytest.raises(ValueError, match="got 24 inputs; expected 6"):
        PackedLinear(weight[mask], bitmap, torch.Size((4, 6))).forward(torch.randn(3, 24, dtype=torch.float64), None)
