"""Codes for devices that nobody waits for: the bits of the CPU's, and what becomes of NaN and infinities."""

import contextlib
import math
import warnings

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedmef_fx import Config, transform
from fedmef_fx.packing import BlockCode, BlockwiseTensor, GradientBits, blockwise, using_backend
from fedmef_fx.packing.bit_planes import pack_planes, planes_nbytes, unpack_planes
from fedmef_fx.packing.bitmap import _pack_on_device, _unpack_on_device
from fedmef_fx.packing.marked_blocks import decode_marked, encode_marked, largest_coded
from fedmef_fx.packing.noise import noise_at

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CODES = [
    BlockCode(bits=bits, block=block, levels=levels, rounding=rounding)
    for bits in (1, 2, 3, 4, 8)
    for block in (64, 256)
    for levels in ("range", "centroids")
    for rounding in ("nearest", "stochastic")
    if bits < 8 or levels == "range"
]


@pytest.fixture
def as_on_a_device(monkeypatch):
    monkeypatch.setattr(blockwise, "marks_exceptions", lambda x: True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES, ids=str)
def test_finite_blocks_have_the_bits_of_the_cpu(code, dtype, monkeypatch):
    x = torch.cat([torch.randn(500), torch.zeros(300), torch.full((70,), -0.3), torch.rand(131) * 1e4]).to(dtype)
    reference = BlockwiseTensor.encode(x, code, key=11)
    monkeypatch.setattr(blockwise, "marks_exceptions", lambda x: True)
    kept = BlockwiseTensor.encode(x, code, key=11)
    assert torch.equal(kept.codes, reference.codes)
    assert torch.equal(kept.ranges, reference.ranges)
    decoded = kept.unpack()
    monkeypatch.undo()
    assert torch.equal(decoded, reference.unpack())


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES, ids=str)
def test_exceptions_survive_and_cost_their_block_alone(code, dtype):
    x = (torch.rand(4 * code.block + 40) + 1).to(dtype)
    x[3], x[5], x[code.block], x[-1] = math.nan, math.inf, -math.inf, math.nan
    x[2 * code.block : 3 * code.block] = math.inf
    kept = BlockwiseTensor.encode(x, code, key=5)
    assert kept.nbytes == code.nbytes(x.numel(), dtype)
    decoded = kept.unpack()
    finite = x.isfinite()
    if code.bits == 1:
        assert torch.equal(decoded.isnan(), ~finite)
    else:
        assert torch.equal(decoded[~finite].nan_to_num(1.0, 2.0, 3.0), x[~finite].nan_to_num(1.0, 2.0, 3.0))
    # The middle of [1, 2] is within half of it, what 16 bits round it to within 2^-7 more.
    assert bool(decoded[finite].isfinite().all())
    assert float((decoded[finite] - x[finite]).abs().max()) <= (0.5 if code.bits > 1 else 1.0) + 2.0**-6
    whole = slice(3 * code.block, 4 * code.block)
    alone = BlockwiseTensor.encode(x[whole], BlockCode(bits=code.bits, block=code.block, levels=code.levels))
    if code.rounding == "nearest":
        assert torch.equal(decoded[whole], alone.unpack())


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_no_range_overflows(bits, dtype):
    largest = torch.finfo(dtype).max
    for values in ([largest, -largest, 0.0], [largest, 0.0], [-largest] * 3, [largest, math.nan, largest]):
        x = torch.tensor(values, dtype=dtype)
        decoded = BlockwiseTensor.encode(x, BlockCode(bits=bits)).unpack()
        assert torch.equal(decoded.isnan(), x.isnan())
        assert bool(decoded[~x.isnan()].isfinite().all())
        limit = largest_coded(dtype)
        # Half a step between levels, of a range that 16 bits widen by 2^-7.
        bound = 2 * limit * (0.5 / (2**bits - 1) + 2.0**-6)
        if not x.isnan().any() and (bits == 8 or dtype != torch.float64):  # which 16 bits cannot hold
            assert bool(((decoded.double() - x.double().clamp(-limit, limit)).abs() <= bound).all())


@pytest.mark.usefixtures("as_on_a_device")
def test_empty_and_scalar_tensors():
    assert BlockwiseTensor.encode(torch.empty(0, 3)).unpack().shape == (0, 3)
    assert BlockwiseTensor.encode(torch.tensor(0.5), BlockCode(bits=2)).unpack().item() == 0.5


class Waiting(TorchDispatchMode):
    """Collects what makes the host wait for a device because something depends on its values."""

    def __init__(self):
        super().__init__()
        self.calls = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"):
            self.calls.add(name)
        return func(*args, **kwargs or {})


class WaitingForCopies(TorchFunctionMode):
    """Collects copies from the CPU that make it wait."""

    def __init__(self):
        super().__init__()
        self.calls = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        sources = [x.device for x in args if isinstance(x, torch.Tensor)] or [torch.device("cpu")]
        is_copy = func is torch.tensor or getattr(func, "__name__", "") in ("to", "copy_")
        if is_copy and result.device not in sources and not (kwargs or {}).get("non_blocking"):
            self.calls.add(func.__name__)
        return result


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("code", CODES, ids=str)
def test_nothing_depends_on_values(code):
    x = torch.randn(3000)
    with Waiting() as waiting:
        BlockwiseTensor.encode(x, code, key=1).unpack()
    assert waiting.calls == set()


def test_what_waits_is_noticed():
    with Waiting() as waiting, using_backend("torch"):
        BlockwiseTensor.encode(torch.randn(300)).unpack()
    assert waiting.calls == {"_local_scalar_dense"}
    with WaitingForCopies() as waiting:
        torch.tensor([1, 2], device="meta")
        torch.tensor([1, 2]).to("meta")
    assert waiting.calls == {"tensor", "to"}


@pytest.mark.parametrize("code", [code for code in CODES if code.block == 64], ids=str)
def test_no_constant_is_waited_for_on_its_way_to_the_device(code):
    with WaitingForCopies() as waiting:
        x = torch.empty(5, 64, device="meta")
        noise = noise_at(3, 0, 320, dtype=torch.float32, device=x.device).view_as(x)
        parameters = torch.empty(5, code.parameters, device="meta", dtype=code.parameter_dtype(x.dtype))
        packed = torch.empty(5, planes_nbytes(64, code.bits), dtype=torch.uint8, device="meta")
        pack_planes(encode_marked(x, code, parameters, noise), code.bits, packed)
        decode_marked(unpack_planes(packed, 64, code.bits), code, parameters.float(), torch.empty_like(x))
        bits = _pack_on_device((x > 0).flatten())
        assert _unpack_on_device(bits, 320).device.type == "meta"
    assert waiting.calls == set()


def test_a_trace_records_codes():
    code = BlockCode(bits=2, rounding="stochastic")

    def there_and_back(x):
        return BlockwiseTensor.encode(x, code, key=7).unpack()

    x = torch.randn(3, 200)
    traced = make_fx(there_and_back)(torch.zeros_like(x))
    assert torch.equal(traced(x), there_and_back(x))
    x[1, 1] = math.inf
    assert traced(x)[1, 1] == math.inf


def test_the_compiler_takes_codes_whole():
    code = BlockCode(bits=4)

    def there_and_back(x):
        return BlockwiseTensor.encode(x, code).unpack() * 2

    x = torch.randn(3, 200)
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), there_and_back(x))


@contextlib.contextmanager
def not_waiting():
    """Where the host must not wait for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits():
    config = Config(density=0.5, weight_storage="dense")
    layers = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 8, 3), nn.ReLU()
    model = transform(nn.Sequential(*layers), config).cuda().train()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    model(x).sum().backward()  # the first step compiles
    with not_waiting():
        model(x).sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("code", CODES, ids=str)
def test_a_gpu_gives_the_bits_of_the_cpu_and_is_not_waited_for(code):
    x = torch.randn(70_000)
    reference = BlockwiseTensor.encode(x, code, key=3)
    on_gpu = x.cuda()
    with not_waiting():
        kept = BlockwiseTensor.encode(on_gpu, code, key=3)
        decoded = kept.unpack()
        GradientBits.of(on_gpu > 0).apply(on_gpu)
    if code.levels == "range":  # means are added up in another order there
        assert torch.equal(kept.codes.cpu(), reference.codes)
        assert torch.equal(decoded.cpu(), reference.unpack())
    else:
        assert torch.allclose(decoded.cpu().mean(), x.mean(), atol=0.01)
