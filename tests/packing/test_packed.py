import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing import GradientBits, MemoryLayout, PackedTensor, clamp


def views() -> dict[str, Tensor]:
    x = torch.randn(3, 5, 4, 6)
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(7, 9).t(),
        "permuted": x.permute(2, 0, 3, 1),
        "slice with gaps": x[:, 1:4, ::2],
        "dense slice with an offset": x[1:],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "axes of size one": torch.randn(1, 6, 1, 4).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(-2.0),
        "empty": torch.empty(2, 0, 3),
    }


@pytest.mark.parametrize("name", list(views()))
def test_every_memory_order_comes_back(name: str) -> None:
    x = views()[name]
    packed = PackedTensor.pack(x, threshold=0.5)
    dense = packed.unpack()
    assert torch.equal(dense, torch.where(x.abs() > 0.5, x, 0))
    assert (packed.shape, packed.dtype, packed.device) == (x.shape, x.dtype, x.device)
    if name not in ("slice with gaps", "expanded"):
        assert dense.stride() == x.stride()
    out, bits = clamp(x)
    packed = PackedTensor.pack(out, threshold=0.5)
    assert torch.equal(out, x.relu())
    assert torch.equal(packed.unpack(), torch.where(x > 0.5, x, 0))
    assert torch.equal(bits.apply(torch.ones(x.shape)), (x > 0).float())
    assert torch.equal(clamp(x, low=-1, high=1)[0], x.clamp(-1, 1))


@pytest.mark.parametrize(
    "name", ["contiguous", "channels last", "transposed", "permuted", "dense slice with an offset"]
)
def test_dense_tensors_are_not_copied(name: str) -> None:
    x = views()[name]
    assert MemoryLayout.of(x).flatten(x).data_ptr() == x.data_ptr()


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 4), max_size=4).flatmap(
        lambda shape: st.tuples(st.just(shape), st.permutations(range(len(shape))))
    )
)
def test_any_permutation_of_any_shape_round_trips(case: tuple[list[int], list[int]]) -> None:
    shape, order = case
    x = torch.randn(shape).permute(order)
    packed = PackedTensor.pack(x)
    assert torch.equal(packed.unpack(), x)
    assert packed.nbytes == -(-x.numel() // 8) + 4 * x.numel()


def test_bytes_and_share() -> None:
    x = torch.zeros(800)
    x[:80] = 1.5
    packed = PackedTensor.pack(x)
    assert packed.kept == 0.1
    assert packed.nbytes == 100 + 320
    assert repr(packed) == "PackedTensor(float32[800], kept=0.100, 420 bytes)"
    assert PackedTensor.pack(torch.empty(0)).kept == 0.0


def test_nan_and_infinity_survive() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert PackedTensor.pack(x, threshold=2.0).unpack().tolist()[1:] == [math.inf, -math.inf, 0.0]
    assert PackedTensor.pack(x, threshold=2.0).unpack()[0].isnan()


def test_only_the_packed_buffers_stay() -> None:
    x = torch.randn(100, requires_grad=True)
    packed = PackedTensor.pack(x * 2, threshold=1.0)
    assert not packed.values.requires_grad
    assert packed.values.untyped_storage().nbytes() == packed.values.nbytes
    gone = weakref.ref(packed)
    del packed
    gc.collect()
    assert gone() is None


def test_the_input_is_written_only_on_request() -> None:
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    clamp(x)
    assert torch.equal(x, before)
    out, bits = clamp(x, inplace=True)
    assert out.data_ptr() == x.data_ptr()
    assert torch.equal(x, before.relu())
    grad = torch.randn(x.shape)  # another memory order than that of the input
    kept = grad.clone()
    assert torch.equal(bits.apply(grad, inplace=True), torch.where(before > 0, kept, 0))
    assert torch.equal(grad, kept)
    same_order = kept.contiguous(memory_format=torch.channels_last)
    assert bits.apply(same_order).data_ptr() != same_order.data_ptr()
    assert bits.apply(same_order, inplace=True).data_ptr() == same_order.data_ptr()


def test_gradient_bits_serve_a_leaky_relu() -> None:
    x = torch.randn(6, 7, requires_grad=True)
    torch.nn.functional.leaky_relu(x, 0.2).sum().backward()
    bits = GradientBits.of(x > 0)
    assert bits.nbytes == 6
    assert torch.equal(bits.apply(torch.ones(6, 7), scale_off=0.2), x.grad)


def test_mistakes_are_reported() -> None:
    with pytest.raises(ConfigError, match="threshold"):
        PackedTensor.pack(torch.ones(2), threshold=-1.0)
    with pytest.raises(ConfigError, match="int64"):
        PackedTensor.pack(torch.arange(3))
    with pytest.raises(ValueError, match=r"got a tensor \[2\]; expected \[3\]"):
        GradientBits.of(torch.ones(3) > 0).apply(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_16_bits_restore_the_dense_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(40, 50)
    packed = PackedTensor.pack(x, threshold=1.0)
    narrow = packed.narrowed(dtype)
    assert narrow.nbytes == packed.bitmap.nbytes + packed.values.nbytes // 2
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow.unpack(), packed.unpack().to(dtype).float())
    assert narrow.narrowed(dtype) is narrow


def test_values_beyond_a_format_become_its_largest() -> None:
    x = torch.tensor([1e6, -1e6, math.inf, -math.inf, math.nan, 3.0, 65519.0])
    values = PackedTensor.pack(x).narrowed(torch.float16).unpack()
    assert values[:4].tolist() == [65504.0, -65504.0, math.inf, -math.inf]
    assert values[4].isnan()
    assert values[5:].tolist() == [3.0, 65504.0]
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert PackedTensor.pack(largest).narrowed(torch.bfloat16).unpack().isfinite().all()
