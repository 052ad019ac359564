"""Codes of 1 to 4 bits: their layout, what they cost, and how far off they are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing import BlockCode, BlockwiseTensor, GradientBits, PackedTensor, RectifiedTensor, clamp
from fedmef_fx.packing.bit_planes import pack_planes, planes_nbytes, unpack_planes
from fedmef_fx.packing.noise import noise_at, noise_key

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FEW = [1, 2, 3, 4]
# A bfloat16 has 8 bits: an offset may lie 2^-7 of its magnitude too low, and a scale 2^-7 too high.
EPS = 2.0**-7


def blocks(flat, block):
    """Block by block, the last one padded with its own last element."""
    rest = -flat.numel() % block
    return torch.cat([flat, flat[-1:].expand(rest)]).view(-1, block)


def assert_within(decoded, x, code):
    """The bound of `block_code`: scale / 2, scale for stochastic rounding, of a range that is widened a little."""
    x, decoded = blocks(x.double().flatten(), code.block), blocks(decoded.double().flatten(), code.block)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = (high - low + EPS * low.abs()) * (1 + EPS) / (2**code.bits - 1)
    factor = 0.5 if code.rounding == "nearest" else 1.0
    tiny = 15 * 1.2e-38  # a scale below the smallest normal number is none
    # float32 arithmetic, and the rounding of 16-bit results
    slack = EPS * EPS * torch.maximum(low.abs(), high.abs()) + tiny
    assert bool(((decoded - x).abs() <= factor * scale * (1 + 1e-5) + slack).all())


@pytest.mark.parametrize("bits", [*FEW, 8])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 63, 64, 200, 256])
def test_planes_give_codes_back(bits, size):
    codes = torch.randint(0, 2**bits, (3, size), dtype=torch.uint8)
    packed = torch.empty(3, planes_nbytes(size, bits), dtype=torch.uint8)
    pack_planes(codes, bits, packed)
    assert torch.equal(unpack_planes(packed, size, bits), codes)
    if size % 8 == 0:
        assert packed.shape[1] == size * bits // 8


def test_the_bits_lie_where_the_layout_says():
    codes = torch.tensor([[1, 2, 3, 0, 1, 2, 3, 1]], dtype=torch.uint8)
    packed = torch.empty(1, 2, dtype=torch.uint8)
    pack_planes(codes, 2, packed)  # byte i % 2, bit 2 * (i // 2)
    assert packed.tolist() == [[1 | 3 << 2 | 1 << 4 | 3 << 6, 2 | 0 << 2 | 2 << 4 | 1 << 6]]
    packed = torch.empty(1, 3, dtype=torch.uint8)
    pack_planes(torch.tensor([[4, 2, 3, 0, 1, 2, 7, 1]], dtype=torch.uint8), 3, packed)
    assert packed.tolist() == [[0 | 3 << 2 | 1 << 4 | 3 << 6, 2 | 0 << 2 | 2 << 4 | 1 << 6, 1 | 1 << 6]]


def test_noise_is_a_function_of_key_and_position():
    key = noise_key(7, 1)
    options = {"dtype": torch.float64, "device": torch.device("cpu")}
    whole = noise_at(key, 0, 4000, **options)
    assert torch.equal(noise_at(key, 1000, 3000, **options), whole[1000:])
    # As in the docstring, in Python's integers.
    word = 500 ^ (key & 0xFFFFFFFF)
    word = (word ^ word >> 16) * 0x7FEB352D % 2**32 ^ key >> 32
    word = (word ^ word >> 15) * 0x846CA68B % 2**32
    word ^= word >> 16
    assert whole[1000:1002].tolist() == [((word & 0xFFFF) + 0.5) / 65536, ((word >> 16) + 0.5) / 65536]
    assert float(whole.min()) > 0
    assert float(whole.max()) < 1
    # Means of 4000: five sigma of 1 / sqrt(12 * 4000).
    for other in (whole, noise_at(noise_key(7, 2), 0, 4000, **options)):
        assert abs(float(other.mean()) - 0.5) < 5 / math.sqrt(12 * 4000)
    assert len({noise_key(a, b) for a in range(30) for b in range(30)}) == 900


magnitudes = st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0, 1e4, 1e30])


@settings(max_examples=80)
@given(
    numel=st.integers(1, 700),
    scale=st.lists(magnitudes, min_size=12, max_size=12),
    offset=st.lists(st.sampled_from([0.0, -3.0, 1e3, 1e30]), min_size=12, max_size=12),
    bits=st.sampled_from([1, 2, 3, 4]),
    block=st.sampled_from([64, 256]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_errors_are_bounded(numel, scale, offset, bits, block, rounding, seed):
    generator = torch.Generator().manual_seed(seed)
    part = torch.arange(numel) // 64
    x = torch.randn(numel, generator=generator) * torch.tensor(scale)[part] + torch.tensor(offset)[part]
    code = BlockCode(bits=bits, block=block, rounding=rounding)
    kept = BlockwiseTensor.encode(x, code, key=seed)
    assert_within(kept.unpack(), x, code)
    whole, rest = divmod(numel, block)
    in_planes = -(-rest * bits // 8) if bits != 3 else -(-rest // 4) + -(-rest // 8)
    assert kept.nbytes == code.nbytes(numel, x.dtype) == whole * block * bits // 8 + in_planes + 4 * -(-numel // block)


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_is_unbiased(bits, dtype):
    x = torch.cat([torch.randn(300), torch.rand(100) * 100, torch.full((20,), 0.3)]).to(dtype)
    code = BlockCode(bits=bits, block=64, rounding="stochastic")
    draws = torch.stack([BlockwiseTensor.encode(x, code, key=noise_key(bits, i)).unpack() for i in range(600)]).double()
    # One draw is off by at most scale; the mean of 600 by scale / 2 / sqrt(600) for one sigma, six of them.
    low, high = blocks(x.double(), 64).aminmax(dim=1)
    scale = ((high - low + EPS * low.abs()) * (1 + EPS) / (2**bits - 1)).repeat_interleave(64)[: x.numel()]
    rounding = torch.finfo(dtype).eps * x.double().abs() if dtype.itemsize == 2 else 0.0
    bound = 6 * scale / 2 / math.sqrt(600) + rounding + 1e-6
    assert bool(((draws.mean(0) - x.double()).abs() <= bound).all())


@pytest.mark.parametrize("levels", ["range", "centroids"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_of_every_format(levels, rounding, bits, dtype):
    code = BlockCode(bits=bits, block=64, levels=levels, rounding=rounding)
    x = torch.randn(200).to(dtype)
    x[3], x[70], x[71] = math.nan, math.inf, -math.inf
    x[128:192] = math.nan
    before = x.clone()
    decoded = BlockwiseTensor.encode(x, code, key=5).unpack()
    assert torch.equal(x.nan_to_num(1.0, 2.0, 3.0), before.nan_to_num(1.0, 2.0, 3.0))
    assert (decoded.dtype, decoded.shape) == (x.dtype, x.shape)
    finite = x.isfinite()
    assert torch.equal(decoded.isnan(), x.isnan())
    assert torch.equal(decoded[~finite & ~x.isnan()], x[~finite & ~x.isnan()])
    assert bool((decoded[finite].abs() <= x[finite].abs().max() * (1 + 2 * EPS)).all())
    largest = torch.finfo(dtype).max
    for values in ([largest, -largest, 0.0], [largest, 0.0], [-largest] * 3):
        x = torch.tensor(values, dtype=dtype)
        assert bool(BlockwiseTensor.encode(x, code, key=5).unpack().isfinite().all())
    for x in (torch.zeros(100, dtype=dtype), -torch.zeros(65, dtype=dtype), torch.full((70,), -1.5, dtype=dtype)):
        assert torch.equal(BlockwiseTensor.encode(x, code, key=5).unpack(), x)  # numbers that 16 bits hold
    x = torch.full((70,), 0.3, dtype=dtype)
    assert (BlockwiseTensor.encode(x, code, key=5).unpack() - 0.3).abs().max() <= 0.3 * EPS
    assert BlockwiseTensor.encode(x[:0], code, key=5).unpack().shape == (0,)


@pytest.mark.parametrize("bits", FEW)
def test_centroids_are_nearer_than_an_even_range(bits):
    x = torch.randn(64 * 256).relu()
    x = x[x > 0]
    errors = {}
    for levels in ("range", "centroids"):
        decoded = BlockwiseTensor.encode(x, BlockCode(bits=bits, levels=levels)).unpack()
        errors[levels] = float((decoded - x).square().mean())
    assert errors["centroids"] < 0.9 * errors["range"]
    # Max (1960): the least that any levels reach for half of a normal distribution lies near 4^-bits.
    assert errors["centroids"] < 1.1 * float(x.var()) * 4.0 ** (0.5 - bits)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", FEW)
def test_centroids_of_any_magnitude(bits, rounding):
    code = BlockCode(bits=bits, block=64, levels="centroids", rounding=rounding)
    x = torch.cat([torch.randn(640), torch.randn(100) + 7, torch.rand(90).square()])
    decoded = BlockwiseTensor.encode(x, code, key=3).unpack()
    for exponent in (-60, 60, 122):  # exact in floating point: nothing in between may overflow or vanish
        scaled = BlockwiseTensor.encode(x * 2.0**exponent, code, key=3).unpack()
        assert torch.equal(scaled, decoded * 2.0**exponent)
    largest = torch.finfo(torch.float32).max
    x = torch.full((100,), largest / 4)
    x[:50] = largest / 8
    assert (BlockwiseTensor.encode(x, code, key=3).unpack() - x).abs().max() <= EPS * largest / 4


@pytest.mark.parametrize("bits", FEW)
def test_centroids_are_means_of_what_is_nearest(bits):
    x = torch.randn(256).relu() + 0.5
    kept = BlockwiseTensor.encode(x, BlockCode(bits=bits, levels="centroids"))
    levels = kept.ranges[0].float()
    assert bool((levels.diff() >= 0).all())
    assert bool(((levels >= x.min() * (1 - EPS)) & (levels <= x.max() * (1 + EPS))).all())
    nearest = (x[:, None] - levels).abs().min(1)
    assert torch.equal((kept.unpack() - x).abs(), nearest.values)
    if bits == 1:  # there Lloyd's steps have almost ended
        means = torch.stack([x[nearest.indices == level].mean() for level in range(2)])
        assert (levels - means).abs().max() < 0.1 * x.std()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 40, 40).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(50, 60).t(),
        lambda: torch.randn(300, 700)[:, 5:690],
        lambda: torch.randn(()),
        lambda: torch.empty(0, 4),
    ],
)
def test_any_strides(make):
    x, code = make(), BlockCode(bits=2)
    kept = BlockwiseTensor.encode(x, code)
    decoded = kept.unpack()
    assert decoded.shape == x.shape
    assert kept.nbytes == code.nbytes(x.numel(), x.dtype)
    if x.numel():
        assert (decoded - x).abs().max() <= (x.max() - x.min()) / 6 * (1 + 4 * EPS) + EPS


def test_the_chunks_of_a_large_tensor_join():
    code = BlockCode(bits=2, rounding="stochastic")
    x = torch.randn(150_001)
    whole = BlockwiseTensor.encode(x, code, key=9).unpack()
    assert_within(whole, x, code)
    # The same elements in another chunk get the same noise, as their number is the same.
    again = BlockwiseTensor.encode(x[: 65_536 - 256], code, key=9).unpack()
    assert torch.equal(again, whole[: 65_536 - 256])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_above_a_threshold_in_a_code(bits, dtype):
    x = torch.randn(10, 100, dtype=dtype)
    code = BlockCode(bits=bits)
    packed = PackedTensor.pack(x, threshold=1.0)
    coded = packed.coded(code)
    assert coded.count == packed.count == int((x.abs() > 1.0).sum())
    assert coded.nbytes == 125 + code.nbytes(coded.count, dtype)
    decoded = coded.unpack()
    assert torch.equal(decoded != 0, x.abs() > 1.0) or bits < 4
    assert bool((decoded[x.abs() <= 1.0] == 0).all())
    assert_within(decoded[x.abs() > 1.0], x[x.abs() > 1.0], code)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("high", [math.inf, 6.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_a_clamp_only_what_lies_between_is_coded(layout, high, dtype):
    x = (torch.randn(4, 8, 9, 9) * 2).to(dtype).contiguous(memory_format=layout)
    x[0, 0, 0, 0] = math.nan
    out, bits = clamp(x, high=high)
    code = BlockCode(bits=4)
    kept = RectifiedTensor.encode(out, bits, code, high=high)
    between = ~((x <= 0) | (x >= high))
    bound = int((x >= high).sum())
    at_bound = min(4 * bound, -(-x.numel() // 8)) if bound else 0
    extra = kept.values.kinds.nbytes  # for the NaN
    assert kept.nbytes == code.nbytes(int(between.sum()), dtype) + at_bound + extra
    decoded = kept.unpack()
    assert decoded.stride() == out.stride()
    assert torch.equal(decoded[~between], out[~between])  # exactly 0, or at the bound
    assert torch.equal(decoded.isnan(), out.isnan())
    span = 15.0 if high == math.inf else high
    assert (decoded - out).nan_to_num().abs().max() <= span / 30 * (1 + 4 * EPS) + span * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [0.01, 0.3])
def test_both_sides_of_a_leaky_relu_are_coded(slope, dtype):
    x = torch.randn(5, 200, dtype=dtype)
    out = torch.nn.functional.leaky_relu(x, slope)
    code = BlockCode(bits=3, rounding="stochastic")
    draws = torch.stack(
        [RectifiedTensor.encode(out, GradientBits.of(x > 0), code, slope=slope, key=i).unpack() for i in range(400)]
    ).double()
    assert bool((draws[:, x > 0] >= 0).all())
    assert bool((draws[:, x < 0] <= 0).all())
    # Six sigma of a mean of 400 draws; a scale is at most 4.5 / 7, and smaller by the slope below 0.
    sigma = torch.where(x > 0, 1.0, slope).double() * 4.5 / 7 / 2 / 20
    rounding = 2 * torch.finfo(dtype).eps * 4.5 if dtype.itemsize == 2 else 1e-6
    assert bool(((draws.mean(0) - out.double()).abs() <= 6 * sigma + rounding).all())


@pytest.mark.parametrize(
    ("options", "text"),
    [({"bits": 5}, "bits"), ({"bits": 0}, "bits"), ({"block": 12}, "block"), ({"block": 0}, "block"),
     ({"levels": "even"}, "levels"), ({"rounding": "up"}, "rounding"), ({"bits": 8, "levels": "centroids"}, "levels")],
)  # fmt: skip
def test_codes_that_do_not_exist_are_refused(options, text):
    with pytest.raises(ConfigError, match=f"BlockCode.{text}: got"):
        BlockCode(**options)
