"""The kernels of block codes in C: the bits of torch's operations, for any values, sizes and numbers of threads."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedmef_fx.errors import ConfigError
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.native import library
from fedmef_fx.packing import BlockCode, BlockwiseTensor, native_blocks, registry, using_backend
from fedmef_fx.packing.fused import fused_kernels

pytestmark = pytest.mark.usefixtures("native_kernels")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KEY = 0x89AB_CDEF_1234_5678
CODES = [
    BlockCode(bits=bits, block=block, rounding=rounding)
    for bits in (1, 2, 3, 4, 8)
    for block, rounding in (
        (256, "stochastic"),
        (256, "nearest"),
        (64, "stochastic"),
        (24, "nearest"),
        (8, "stochastic"),
    )
]
CENTROIDS = [
    BlockCode(bits=bits, block=block, rounding=rounding, levels="centroids")
    for bits in (1, 2, 3, 4)
    for block, rounding in ((256, "nearest"), (24, "stochastic"))
]
SOME_CODES = [BlockCode(bits=2, rounding="stochastic"), BlockCode(bits=1, levels="centroids")]


def samples(dtype: torch.dtype) -> list[Tensor]:
    """Tensors of all sizes, of ordinary values and of those at the ends of the format."""
    largest, info = torch.finfo(dtype).max, torch.finfo(dtype)
    sizes = [torch.randn(size) * 3 for size in (0, 1, 7, 8, 63, 64, 65, 255, 256, 257, 1000)]
    offsets = [torch.rand(700) * 1e-3 + offset for offset in (-3.0, 0.3, 1e3)]
    spread = torch.randn(1500) * torch.logspace(-9, 4, 1500)
    equal = torch.cat([torch.zeros(300), -torch.zeros(64), torch.full((300,), -0.3), torch.full((100,), 7.0)])
    zeros = torch.cat([torch.zeros(130), -torch.zeros(130), -torch.rand(40), torch.tensor([-0.0, 0.0])])
    ends = [torch.tensor([largest / 8, -largest / 8, 0.0, largest / 9], dtype=torch.float64)]
    ends += [torch.tensor([info.tiny, -info.tiny, info.tiny / 4, 0.0, info.smallest_normal], dtype=torch.float64)]
    ends += [torch.tensor([1e300, -1e300, 1e-300, 5.0], dtype=torch.float64)] if dtype == torch.float64 else []
    return [x.to(dtype) for x in (*sizes, *offsets, spread, equal, zeros, *ends)]


def bits_of(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def assert_same(x: Tensor, code: BlockCode) -> None:
    """Whatever is stored and decoded is the same, bit for bit."""
    with using_backend("torch"):
        assert fused_kernels(x, code) is None
        reference = BlockwiseTensor.encode(x, code, key=KEY)
        expected = reference.unpack()
    with using_backend("native"):
        assert fused_kernels(x, code) is native_blocks
        kept = BlockwiseTensor.encode(x, code, key=KEY)
        decoded = kept.unpack()
    assert torch.equal(kept.codes, reference.codes)
    assert torch.equal(bits_of(kept.ranges), bits_of(reference.ranges))
    assert (kept.kinds is None) == (reference.kinds is None)
    assert kept.kinds is None or torch.equal(kept.kinds, reference.kinds)
    assert decoded.stride() == expected.stride()
    assert torch.equal(bits_of(decoded), bits_of(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", [*CODES, *CENTROIDS], ids=str)
def test_the_bits_are_those_of_operations(code: BlockCode, dtype: torch.dtype) -> None:
    for x in samples(dtype):
        assert_same(x, code)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_exceptions_are_found_wherever_they_are(bits: int, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for place in (0, 31, 70, 255, 256, 511, 599):
        for value in (math.nan, math.inf, -math.inf, largest, -largest):
            x = torch.randn(600).to(dtype)
            x[place] = value
            assert_same(x, BlockCode(bits=bits, rounding="stochastic"))
            if bits < 3:
                assert_same(x, BlockCode(bits=bits, levels="centroids"))
    assert_same(torch.full((300,), math.nan, dtype=dtype), BlockCode(bits=bits))
    assert_same(torch.tensor([largest, -largest, 0.0], dtype=dtype), BlockCode(bits=bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("code", SOME_CODES, ids=str)
def test_threads_change_no_bit(
    code: BlockCode, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(100_003).to(dtype)
    expected = BlockwiseTensor.encode(x, code, key=KEY)
    monkeypatch.setattr(library, "_SMALLEST_PART", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    kept = BlockwiseTensor.encode(x, code, key=KEY)
    assert torch.equal(kept.codes, expected.codes)
    assert torch.equal(bits_of(kept.ranges), bits_of(expected.ranges))
    assert torch.equal(bits_of(kept.unpack()), bits_of(expected.unpack()))
    x[90_000] = math.nan
    assert BlockwiseTensor.encode(x, code, key=KEY).has_exceptions
    for small in (0, 1, 255, 256, 257):  # fewer blocks than threads
        assert_same(x[:small], code)


@pytest.mark.parametrize("block", [24, 40, 256, 4096, 8192])
def test_tensors_of_several_chunks(block: int) -> None:
    x, code = torch.randn(3, 70_001), BlockCode(bits=3, block=block, rounding="stochastic")
    with using_backend("torch"):
        expected = [BlockwiseTensor.encode(part, code, key=KEY) for part in (x, x[:, :69_999])]
    with using_backend("native"):
        kept = [BlockwiseTensor.encode(part, code, key=KEY) for part in (x, x[:, :69_999])]
        assert (fused_kernels(x, code) is None) == (block > native_blocks.LARGEST_BLOCK)
    for ours, theirs in zip(kept, expected, strict=True):
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.unpack(), theirs.unpack())
    # The blocks of a chunk are whole: the same elements alone have the same codes.
    alone = BlockwiseTensor.encode(x.view(-1)[: 20 * block], code, key=KEY)
    assert torch.equal(kept[0].codes[: alone.codes.numel()], alone.codes)


def test_memory_orders() -> None:
    code = BlockCode(bits=2, rounding="stochastic")
    x = torch.randn(2, 3, 40, 40)
    for view in (x.contiguous(memory_format=torch.channels_last), x.transpose(0, 3), x[:, :, ::2, 1:], x[0, 0, 0, 0]):
        assert_same(view, code)


@pytest.mark.parametrize("code", SOME_CODES, ids=str)
def test_nothing_is_made_besides_the_codes(code: BlockCode) -> None:
    x = torch.randn(2**20)
    with using_backend("native"), LiveBytes(x) as live:
        kept = BlockwiseTensor.encode(x, code, key=KEY)
        assert live.peak - x.nbytes - kept.nbytes < 1000
        live.reset_peak()
        before = live.current
        dense = kept.unpack()
        assert live.peak - before - dense.nbytes < 1000


def test_predictions_know_that() -> None:
    heard: list[int] = []

    class Listener:
        def hear_buffer(self, buffer: Tensor) -> None:
            del buffer

        def hear_temporary(self, nbytes: int) -> None:
            heard.append(nbytes)

    code = BlockCode(bits=2, rounding="stochastic")
    for name, expected in (("native", 0), ("torch", 65_536 * 9)):
        heard.clear()
        with FakeTensorMode(), using_backend(name), registry.listening(Listener()):  # type: ignore[arg-type]
            kept = BlockwiseTensor.encode(torch.empty(2**20), code)
            assert sum(heard) == expected
            assert kept.unpack().shape == (2**20,)
        assert (sum(heard) == 0) == (name == "native")


def test_buffers_that_do_not_belong_together_are_refused() -> None:
    by_centroids, few_bytes = BlockCode(bits=2, levels="centroids"), torch.empty(75, dtype=torch.uint8)
    for shape, dtype in (((2, 4), torch.float32), ((1, 4), torch.bfloat16), ((2, 2), torch.bfloat16)):
        with pytest.raises(ValueError, match=r"expected 75 and torch.bfloat16\[2, 4\] for 300 elements"):
            native_blocks.unpack_blocks(few_bytes, by_centroids, torch.empty(shape, dtype=dtype), torch.empty(300))
    code, x = BlockCode(bits=2), torch.randn(300)
    codes, ranges = torch.empty(75, dtype=torch.uint8), torch.empty(2, 2, dtype=torch.bfloat16)
    assert native_blocks.pack_blocks(x, code, codes, ranges, key=None)
    for few in ((codes[:74], ranges), (codes, ranges[:1]), (codes, ranges.float())):
        with pytest.raises(ValueError, match=r"expected 75 and torch.bfloat16\[2, 2\] for 300 elements"):
            native_blocks.pack_blocks(x, code, *few, key=None)
        with pytest.raises(ValueError, match="native blocks: got"):
            native_blocks.unpack_blocks(few[0], code, few[1], torch.empty(300))
    with pytest.raises(ValueError, match="blocks of at most 4096"):
        native_blocks.pack_blocks(x, BlockCode(bits=2, block=8192), codes, ranges, key=None)
    with pytest.raises(ValueError, match="contiguous"):
        native_blocks.pack_blocks(torch.randn(600)[::2], code, codes, ranges, key=None)
    with pytest.raises(ConfigError, match="int64"):
        BlockwiseTensor.encode(torch.arange(4), code)
