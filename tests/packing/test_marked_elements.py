"""Codes of marked elements: the kernels in C give the bits of gathering them first, and make nothing besides."""

import math

import pytest
import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.native import library
from fedmef_fx.packing import (
    BlockCode,
    GradientBits,
    PackedTensor,
    RectifiedTensor,
    clamp,
    native_blocks,
    using_backend,
)
from fedmef_fx.packing.bitmap import pack_bits

pytestmark = pytest.mark.usefixtures("native_kernels")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KEY = 77
CODES = [
    BlockCode(bits=2, rounding="stochastic"),
    BlockCode(bits=3, block=24),
    BlockCode(bits=8, block=64),
    BlockCode(bits=1, levels="centroids"),
    BlockCode(bits=4, block=24, levels="centroids", rounding="stochastic"),
]


def bits_of(x: Tensor | None) -> Tensor:
    return torch.empty(0) if x is None else x.reshape(-1).view(torch.uint8)


def both(x: Tensor, code: BlockCode, high: float = math.inf, slope: float = 0.0) -> list[list[Tensor]]:
    """What both ways keep of a clamped tensor, and decode."""
    results = []
    for name in ("numpy", "native"):
        with using_backend(name):  # type: ignore[arg-type]
            if slope:
                out, bits = torch.nn.functional.leaky_relu(x, slope), GradientBits.of(x > 0)
            else:
                out, bits = clamp(x, high=high)
            kept = RectifiedTensor.encode(out, bits, code, high=high, slope=slope, key=KEY)
            tensors = (kept.values.codes, kept.values.ranges, kept.values.kinds, kept.at_bound, kept.unpack())
            results.append([bits_of(tensor) for tensor in tensors])
            assert kept.unpack().stride() == out.stride()
    return results


def assert_same(x: Tensor, code: BlockCode, **options: float) -> None:
    reference, ours = both(x, code, **options)
    assert all(torch.equal(a, b) for a, b in zip(reference, ours, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", CODES, ids=str)
def test_the_bits_are_those_of_gathering(code: BlockCode, dtype: torch.dtype) -> None:
    for size in (0, 1, 7, 63, 64, 65, 200, 511, 512, 513, 3000):
        assert_same(torch.randn(size).to(dtype), code)
        assert_same((torch.randn(size) * 4).to(dtype), code, high=6.0)
    # Nothing is positive, everything is, hardly anything is; mostly at the bound.
    sparse = torch.where(torch.rand(5000) < 0.01, torch.rand(5000), -1.0)
    for x in (-torch.ones(300), torch.rand(700) + 0.1, sparse, torch.full((300,), 9.0), torch.randn(900) * 90):
        assert_same(x.to(dtype), code, high=6.0)
    assert_same((torch.randn(4, 3, 9, 9) * 4).to(dtype).contiguous(memory_format=torch.channels_last), code, high=6.0)
    assert_same(torch.randn(1000).to(dtype), code, slope=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_exceptions_among_the_marked(value: float) -> None:
    for place in (0, 300, 999):
        x = torch.randn(1000)
        x[place] = value
        assert_same(x, CODES[0])


def test_a_bound_of_zero() -> None:
    assert_same(torch.tensor([1.0, -1.0, 0.0, -0.0] * 10), CODES[0], high=0.0)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([torch.randn(30_000), -torch.rand(3000), torch.rand(3000), torch.randn(5003)]).to(dtype)
    expected = [both(x, code, high=1.5)[0] for code in CODES]
    monkeypatch.setattr(library, "_SMALLEST_PART", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for code, bits in zip(CODES, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(both(x, code, high=1.5)[1], bits, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_above_a_threshold(dtype: torch.dtype) -> None:
    x, decoded = torch.randn(5, 999).to(dtype), []
    for name in ("numpy", "native"):
        with using_backend(name):  # type: ignore[arg-type]
            decoded.append(PackedTensor.pack(x, threshold=0.7).coded(CODES[0], key=KEY).unpack())
    assert torch.equal(bits_of(decoded[0]), bits_of(decoded[1]))


def test_nothing_is_made_besides_the_codes() -> None:
    out, bits = clamp(torch.randn(2**20) * 4, high=6.0)
    with using_backend("native"), LiveBytes(out, bits.bitmap) as live:
        before = live.current
        kept = RectifiedTensor.encode(out, bits, CODES[0], high=6.0, key=KEY)
        assert live.peak - before - kept.nbytes <= bits.nbytes  # where it is at the bound, before that is positions
        live.reset_peak()
        before = live.current
        dense = kept.unpack()
        assert live.peak - before - dense.nbytes < 1000


def test_buffers_that_do_not_belong_together_are_refused() -> None:
    code, x = BlockCode(bits=2), torch.randn(300)
    bitmap = pack_bits(x > 0)
    count = native_blocks.count_marked(bitmap, 300)
    codes, ranges = torch.empty(75, dtype=torch.uint8), torch.empty(2, 2, dtype=torch.bfloat16)
    assert native_blocks.pack_marked(x, bitmap, count, code, codes, ranges, key=None)
    with pytest.raises(ValueError, match=f"got codes of {count - 1} elements; expected .*, that is {count}"):
        native_blocks.pack_marked(x, bitmap, count - 1, code, codes, ranges, key=None)
    with pytest.raises(ValueError, match="expected one per set bit"):
        native_blocks.unpack_marked(codes, code, ranges, count + 1, bitmap, torch.empty(300))
    with pytest.raises(ConfigError, match="bitmap"):
        native_blocks.pack_marked(x, bitmap[:-1], count, code, codes, ranges, key=None)
    with pytest.raises(ValueError, match="native blocks: got"):
        native_blocks.unpack_marked(codes[:3], code, ranges, count, bitmap, torch.empty(300))
