import math
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fedmef_fx.errors import ConfigError
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.packing import BlockCode, BlockwiseTensor, codec_nbytes, why_dense
from fedmef_fx.packing.registry import held_buffers

BLOCK = 256
STOCHASTIC = BlockCode(rounding="stochastic")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def blocks(flat):
    """A flat tensor block by block, the last one padded with its own last element."""
    rest = -flat.numel() % BLOCK
    return torch.cat([flat, flat[-1:].expand(rest)]).view(-1, BLOCK)


def assert_within(decoded, x, *, levels=255, factor=0.5):
    """|x - decoded| <= factor * scale, per block of memory order, in the arithmetic of the codec."""
    x, decoded = blocks(x.double().flatten()), blocks(decoded.double().flatten())
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = (high - low) / levels
    # The codec computes in float32: a few roundings of the largest magnitude; and 16-bit results round once more.
    slack = 4 * torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs()) + 255 * 1.2e-38
    assert bool(((decoded - x).abs() <= factor * scale * (1 + 1e-6) + slack).all())


# Blocks of different magnitudes and offsets, constant ones and tiny ones among them.
magnitudes = st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0, 1e4, 1e30])


@settings(max_examples=60)
@given(
    numel=st.integers(1, 1100),
    scale=st.lists(magnitudes, min_size=5, max_size=5),
    offset=st.lists(st.sampled_from([0.0, -3.0, 1e3, 1e30]), min_size=5, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_element_is_off_by_more_than_half_a_scale(numel, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    per_element = torch.arange(numel) // BLOCK
    x = torch.randn(numel, generator=generator) * torch.tensor(scale)[per_element] + torch.tensor(offset)[per_element]
    kept = BlockwiseTensor.encode(x)
    assert_within(kept.unpack(), x)
    assert kept.nbytes == BlockCode().nbytes(numel, x.dtype) == numel + 8 * -(-numel // BLOCK)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_format_comes_back_as_itself(dtype):
    x = torch.randn(3, 700).to(dtype)
    kept = BlockwiseTensor.encode(x)
    decoded = kept.unpack()
    assert (decoded.dtype, decoded.shape, kept.dtype) == (dtype, x.shape, dtype)
    # What rounding to the format itself adds: half a unit in the last place of values up to 5.
    rounding = 5 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    widest = blocks(x.double().flatten()).aminmax(dim=1)
    assert (decoded.double() - x.double()).abs().max() <= (widest.max - widest.min).max() / 510 + rounding + 1e-6


def test_constant_blocks_and_the_ends_of_the_range_are_exact():
    x = torch.cat([torch.full((BLOCK,), 0.1), torch.full((BLOCK,), -7.3), torch.tensor([2.5])])
    assert torch.equal(BlockwiseTensor.encode(x).unpack(), x)
    steps = torch.arange(256.0) * 0.25 - 8  # 256 values that the codes can tell apart
    assert torch.equal(BlockwiseTensor.encode(steps).unpack(), steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_survive_and_their_neighbours_stay_close(dtype):
    x = torch.randn(4 * BLOCK).to(dtype)
    x[3], x[4], x[300] = math.nan, math.inf, -math.inf
    x[2 * BLOCK : 3 * BLOCK] = math.nan
    kept = BlockwiseTensor.encode(x)
    decoded = kept.unpack()
    assert kept.has_exceptions
    assert torch.equal(decoded.isnan(), x.isnan())
    assert torch.equal(decoded[~x.isfinite() & ~x.isnan()], x[~x.isfinite() & ~x.isnan()])
    finite = x.isfinite()
    # Spread of at most 10 over 252 steps; 16-bit formats round the result to an ulp of values up to 5.
    assert (decoded[finite] - x[finite]).abs().max().item() <= 10 / 252 / 2 + 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_range_that_overflows_its_format_stays_finite(dtype):
    largest = torch.finfo(dtype).max
    for values in ([largest, -largest, 0.0], [largest, 0.0], [largest] * 3):
        x = torch.tensor(values, dtype=dtype)
        decoded = BlockwiseTensor.encode(x).unpack()
        assert bool(decoded.isfinite().all())
        # Half of a step of 2 * largest / 252, and the rounding of float16 and bfloat16 results.
        assert (decoded.double() - x.double()).abs().max() <= largest * (1 / 252 + torch.finfo(dtype).eps)


def test_stochastic_rounding_is_unbiased_and_repeatable():
    x = torch.linspace(-1, 1, 200)
    generator = torch.Generator().manual_seed(3)
    first = BlockwiseTensor.encode(x, STOCHASTIC, generator=generator).unpack()
    again = BlockwiseTensor.encode(x, STOCHASTIC, generator=generator.manual_seed(3)).unpack()
    assert torch.equal(first, again)
    assert_within(first, x, factor=1.0)
    total = sum(BlockwiseTensor.encode(x, STOCHASTIC).unpack() for _ in range(400))
    # The mean of 400 draws deviates by scale / 2 / 20 (one sigma at most); five of them, of 200 elements.
    assert (total / 400 - x).abs().max() < 5 * (2 / 255) / 40


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 40, 40).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(50, 60).t(),
        lambda: torch.randn(4, 65, 3, 2, 16).permute(2, 0, 3, 1, 4)[1],  # the keys of an attention
        lambda: torch.randn(300, 700)[:, 5:690],
        lambda: torch.randn(3, 1, 200_000)[:, :, ::2].expand(3, 2, 100_000),
        lambda: torch.randn(()),
        lambda: torch.empty(0, 4),
    ],
)
def test_any_strides(make):
    x = make()
    kept = BlockwiseTensor.encode(x)
    decoded = kept.unpack()
    assert decoded.shape == x.shape
    assert kept.nbytes == BlockCode().nbytes(x.numel(), x.dtype)
    if x.numel():
        assert (decoded - x).abs().max() <= (x.max() - x.min()) / 510 + 1e-6
    contiguous = BlockwiseTensor.encode(x.contiguous()).unpack()
    if not x.is_contiguous() and decoded.is_contiguous():  # gathered in logical order
        assert torch.equal(decoded, contiguous)


@pytest.mark.parametrize("strided", [False, True])
def test_transients_stay_small(strided):
    x = torch.randn(3, 2**21)[:, : 2**21 - 1] if strided else torch.randn(2**22)
    with LiveBytes(x) as live:
        kept = BlockwiseTensor.encode(x)
        assert live.peak - x.untyped_storage().nbytes() - kept.nbytes < 1 << 20
        live.reset_peak()
        before = live.current
        dense = kept.unpack()
        assert live.peak - before - dense.nbytes < 1 << 20


def test_python_keeps_nothing_beside_the_buffers():
    x = torch.randn(2**20)
    tracemalloc.start()
    kept = BlockwiseTensor.encode(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert kept.codes.untyped_storage().nbytes() + kept.ranges.untyped_storage().nbytes() == kept.nbytes


def test_the_meter_sees_the_buffers_until_they_go():
    before = len(held_buffers())
    with SavedTensors() as saved:
        kept = BlockwiseTensor.encode(torch.randn(1000))
    assert saved.by_kind() == {"dense": 0, "packed values": 0, "bitmap": 0, "8-bit": 1032}
    del kept
    assert saved.nbytes == 0
    assert len(held_buffers()) == before


def test_fake_and_meta_tensors_have_buffers_of_the_right_sizes():
    for shape, dtype in (((10, 300), torch.float32), ((7,), torch.float64)):
        meta = BlockwiseTensor.encode(torch.empty(shape, dtype=dtype, device="meta"))
        mode = FakeTensorMode()
        with mode:
            fake = BlockwiseTensor.encode(torch.empty(shape, dtype=dtype))
        outside = BlockwiseTensor.encode(mode.from_tensor(torch.empty(shape, dtype=dtype)))
        for kept in (meta, fake, outside):
            assert kept.nbytes == BlockCode().nbytes(math.prod(shape), dtype)
            assert kept.unpack().shape == shape
            assert type(kept.codes) is type(kept.unpack())


def test_what_codecs_cost():
    assert codec_nbytes("exact", 100, torch.float16) == 200
    assert codec_nbytes("packed", 800, torch.float32, kept=0.1) == 100 + 320
    assert codec_nbytes("packed", 800, torch.float32, kept=0.1, value_dtype=torch.bfloat16) == 100 + 160
    assert codec_nbytes("bits", 9, torch.float32) == 2
    assert codec_nbytes("blockwise", 512, torch.float64) == 512 + 32
    # A codec loses on a handful of elements, and a bitmap where nearly everything is kept.
    assert why_dense(codec_nbytes("blockwise", 2, torch.float32), 2, torch.float32) == "keeps dense: 10 bytes against 8"
    assert why_dense(codec_nbytes("blockwise", 3, torch.float32), 3, torch.float32) == ""
    assert why_dense(codec_nbytes("packed", 800, torch.float32, kept=0.97), 800, torch.float32)
    assert not why_dense(codec_nbytes("packed", 800, torch.float32, kept=0.96), 800, torch.float32)


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match="int64"):
        BlockwiseTensor.encode(torch.arange(4))


def test_text():
    assert repr(BlockwiseTensor.encode(torch.zeros(2, 300))) == "BlockwiseTensor(float32[2, 300], 8 bits, 624 bytes)"
