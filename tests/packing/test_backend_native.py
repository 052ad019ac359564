"""The compiled kernels: sizes are checked before a call, threads change no bit, forked processes go on."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.native import call, library
from fedmef_fx.packing import PackedTensor, backend, using_backend
from tests import forked

pytestmark = pytest.mark.usefixtures("native_kernels")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _every_kernel(x: Tensor) -> list[Tensor]:
    kernels = backend("native")
    bitmap, values = kernels.pack(x, 1.0)
    dense, clamped, masked, scaled = (torch.empty_like(x) for _ in range(4))
    kernels.unpack(bitmap, values, out=dense)
    bits = kernels.clamp_bits(x, out=clamped, low=-0.5, high=1.5)
    kernels.mask_by_bits(bits, x, out=masked)
    kernels.mask_by_bits(bits, x, out=scaled, scale_off=0.1)
    return [bitmap, values, dense, kernels.gather(bits, x), clamped, bits, masked, scaled]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_no_bit(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_SMALLEST_PART", 1)
    x = torch.randn(100_003).to(dtype)
    expected = _every_kernel(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert _same(_every_kernel(x), expected)
    for small in (0, 1, 63, 64, 65):  # fewer words than threads
        assert _every_kernel(x[:small])[2].numel() == small


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_numpy(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-7, -1e-7, 65504.0, 1.5, -0.5]
    x = torch.cat([torch.tensor(special), torch.randn(5_000) * torch.logspace(-8, 4, 5_000)]).to(dtype)
    kernels, reference = backend("native"), backend("numpy")
    for threshold in (0.0, 1e-7, 0.3, 1e9):
        assert _same(list(kernels.pack(x, threshold)), list(reference.pack(x, threshold)))
    numbers = x[~x.isnan()]  # the payload of a NaN is nobody's concern
    for low, high in ((0.0, float("inf")), (0.0, 6.0), (-0.5, 1.5), (-float("inf"), 0.1)):
        ours, theirs = torch.empty_like(numbers), torch.empty_like(numbers)
        bits = kernels.clamp_bits(numbers, out=ours, low=low, high=high)
        assert _same([bits], [reference.clamp_bits(numbers, out=theirs, low=low, high=high)])
        assert torch.equal(ours, theirs)  # which zero -0.0 becomes at a bound of 0.0 is nobody's concern either
        for scale in (0.0, 0.01, -3.0):
            kernels.mask_by_bits(bits, numbers, out=ours, scale_off=scale)
            reference.mask_by_bits(bits, numbers, out=theirs, scale_off=scale)
            assert _same([ours], [theirs])


def test_what_does_not_belong_together_is_refused() -> None:
    kernels, x = backend("native"), torch.randn(20)
    bitmap, values = kernels.pack(x, 0.5)
    with pytest.raises(ConfigError, match=r"clamp_bits: got torch.float32\[19\]; expected torch.float32\[20\]"):
        kernels.clamp_bits(x, out=torch.empty(19))
    with pytest.raises(ConfigError, match="clamp_bits"):
        kernels.clamp_bits(x, out=torch.empty(20, dtype=torch.float64))
    with pytest.raises(ConfigError, match="mask_by_bits"):
        kernels.mask_by_bits(bitmap, x, out=torch.empty(21))
    with pytest.raises(ConfigError, match="unpack"):
        kernels.unpack(bitmap, values.double(), out=torch.empty(20))
    with pytest.raises(ValueError, match=r"strides \(2,\).*expected a contiguous tensor on the CPU"):
        kernels.pack(torch.randn(20)[::2], 0.5)
    with pytest.raises(ValueError, match="on meta"):
        call("count", torch.empty(1, dtype=torch.uint8, device="meta"), 8)


def _pack_in_a_child(threads: int, queue: "multiprocessing.Queue[float]") -> None:
    torch.get_num_threads = lambda: threads  # torch's own threads do not survive a fork, so it must not use them
    packed = PackedTensor.pack(torch.arange(300_000.0), threshold=1.0)
    queue.put(packed.unpack().sum(dtype=torch.float64).item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_goes_on(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with using_backend("native"):
        PackedTensor.pack(torch.arange(300_000.0))  # the threads of this process are running now
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_pack_in_a_child, args=(threads, queue))
        child.start()
        assert queue.get(timeout=60) == 299_999 * 300_000 / 2 - 1
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "mmx"])
def test_the_environment_limits_the_instruction_set(isa: str, tmp_path: Path) -> None:
    code = (
        "import torch; from fedmef_fx.native import loaded_isa; from fedmef_fx.packing import backend;"
        "print(loaded_isa(), backend('native').pack(torch.tensor([1.0, -2.0, 0.5]), 0.7)[1].tolist())"
    )
    ran = forked.run(code, folder=tmp_path, environment={library.ISA_VARIABLE: isa})
    if isa == "mmx":
        assert "got 'mmx'; expected 'baseline' | 'avx2' | 'avx512'" in ran.stderr
    else:
        used, _, values = ran.stdout.partition(" ")
        assert used in ("baseline", "avx2", "avx512")[: ("baseline", "avx2", "avx512").index(isa) + 1]
        assert values.strip() == "[1.0, -2.0]"
