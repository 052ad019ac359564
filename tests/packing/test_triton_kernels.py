"""The fused kernels, on a GPU or in Triton's interpreter: the bits of torch's operations."""

import math
import os
import subprocess
import sys

import pytest
import torch

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing import BlockCode, BlockwiseTensor, blockwise, fused, triton_choice, using_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = 0x89AB_CDEF_1234_5678
# Sizes: one element, a part of a block, whole blocks with and without a rest.
CODES = [
    BlockCode(bits=bits, block=block, rounding=rounding)
    for bits in (1, 2, 3, 4, 8)
    for block, rounding in ((64, "stochastic"), (256, "nearest"), (24, "stochastic"))
]


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton")
    from fedmef_fx.packing import triton_kernels  # noqa: PLC0415  # imports Triton

    monkeypatch.setattr(blockwise, "marks_exceptions", lambda x: True)
    return triton_kernels


def samples(dtype):
    exceptional = torch.randn(200)
    exceptional[3], exceptional[70], exceptional[71], exceptional[199] = math.nan, math.inf, -math.inf, math.nan
    largest = torch.finfo(dtype).max
    yield from (torch.tensor([0.3]), torch.randn(37), torch.randn(512) * 1e-3, exceptional)
    yield torch.cat([torch.full((100,), -0.7), torch.zeros(160), torch.rand(40) * 1e4 - 3])
    yield torch.tensor([largest, -largest, 0.0], dtype=torch.float64)
    yield torch.tensor([1e-45, -1e-45, 1e-39, -1.5e-40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_kernels_give_the_bits_of_operations(kernels, code, dtype):
    key = None if code.rounding == "nearest" else KEY
    for x in samples(dtype):
        x = x.to(dtype)  # noqa: PLW2901
        reference = BlockwiseTensor.encode(x, code, key=KEY)
        codes, parameters = (torch.zeros_like(part, device=DEVICE) for part in (reference.codes, reference.ranges))
        kernels.pack_blocks(x.to(DEVICE), code, codes, parameters, key=key)
        assert torch.equal(codes.cpu(), reference.codes)
        torch.testing.assert_close(parameters.cpu(), reference.ranges, rtol=0, atol=0, equal_nan=True)
        out = torch.empty_like(x, device=DEVICE)
        kernels.unpack_blocks(codes, code, parameters, out)
        torch.testing.assert_close(out.cpu(), reference.unpack(), rtol=0, atol=0, equal_nan=True)


def test_kernels_take_nothing(kernels):
    code, empty = BlockCode(bits=2), torch.empty(0, device=DEVICE)
    codes, parameters = torch.empty(0, dtype=torch.uint8, device=DEVICE), torch.empty(0, 2, device=DEVICE)
    kernels.pack_blocks(empty, code, codes, parameters, key=None)
    kernels.unpack_blocks(codes, code, parameters, empty)


def test_the_kernels_serve_tensors(kernels, monkeypatch):
    code, x = BlockCode(bits=2, rounding="stochastic"), torch.randn(3, 5, 7, 9, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    reference = BlockwiseTensor.encode(x, code, key=KEY)
    expected = reference.unpack()
    calls = []

    def counted(x, code):
        calls.append(code)
        return kernels

    monkeypatch.setattr(blockwise, "fused_kernels", counted)
    kept = BlockwiseTensor.encode(x, code, key=KEY)
    assert torch.equal(kept.codes, reference.codes)
    decoded = kept.unpack()
    assert torch.equal(decoded, expected)
    assert decoded.stride() == x.stride()
    assert calls == [code, code]


def test_operations_take_what_kernels_do_not(monkeypatch):
    code = BlockCode(bits=2)
    with using_backend("numpy"):
        assert fused.fused_kernels(torch.randn(3), code) is None
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float32})()
    monkeypatch.setenv(triton_choice.TRITON_VARIABLE, "0")
    assert fused.fused_kernels(on_gpu, code) is None
    monkeypatch.setenv(triton_choice.TRITON_VARIABLE, "no")
    with pytest.raises(ConfigError, match="got 'no'"):
        fused.fused_kernels(on_gpu, code)
    assert fused.fused_kernels(on_gpu, BlockCode(bits=2, levels="centroids")) is None


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fedmef_fx.ops import triton_rows
from fedmef_fx.packing import triton_bits, triton_kernels

def compiled(kernel, constants, **types):
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    return compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1, "enable_fp_fusion": False})

for bits, is_bfloat16 in ((2, False), (3, True), (8, False)):
    x, parameters = "*i16" if is_bfloat16 else "*fp32", "*fp32" if bits == 8 else "*i16"
    constants = {"BITS": bits, "BLOCK": 256, "WIDTH": 256, "LIMIT": 1e30, "IS_BFLOAT16": is_bfloat16}
    numbers = {"numel": "i32", "first": "i64", "key_low": "i32", "key_high": "i32"}
    types = {"x": x, "codes": "*u8", "parameters": parameters} | numbers
    pack = compiled(triton_kernels._pack, constants | {"IS_NEAREST": is_bfloat16}, **types)
    unpack = compiled(triton_kernels._unpack, constants, codes="*u8", parameters=parameters, out=x, numel="i64")
    for text in (pack.asm["ptx"], unpack.asm["ptx"]):
        assert "fma" not in text and "div.full" not in text, (bits, text)

for is_bfloat16 in (False, True):
    x = "*i16" if is_bfloat16 else "*fp32"
    constants = {"IS_BFLOAT16": is_bfloat16, "BYTES": 128}
    bounds = constants | {"HAS_LOW": True, "HAS_HIGH": is_bfloat16}
    compiled(triton_bits._clamp_bits, bounds, x=x, out=x, bitmap="*u8", numel="i64", low="fp32", high="fp32")
    mask = constants | {"HAS_SCALE": is_bfloat16}
    compiled(triton_bits._mask_by_bits, mask, bitmap="*u8", grad=x, out=x, numel="i64", scale="fp32")

for has_mask in (False, True):
    constants = {"HAS_MASK": has_mask, "PART": 64}
    rows = {"values": "*fp32", "mask": "*u8" if has_mask else "*fp32", "rows": "i32", "fan_in": "i32"}
    rows["columns"] = "*fp32"
    limits = {"gain": "*fp32", "g": "fp32", "eps": "fp32", "degenerate": "fp32"}
    compiled(triton_rows._statistics, constants | {"IS_OVER_ALL": has_mask}, **rows | limits)
    compiled(triton_rows._scale, constants, **rows, out="*fp32")
    compiled(triton_rows._gradients, constants, **rows, grad="*fp32", out="*fp32", out_gain="*fp32", g="fp32")
"""


@pytest.mark.slow
def test_kernels_compile_where_there_is_no_gpu_and_round_as_torch_does():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
