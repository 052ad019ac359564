"""Whether one fused kernel codes a tensor: in C on the CPU, where that is the backend; in Triton on CUDA devices.

`FEDMEF_FX_TRITON=0` in the environment leaves it to operations of torch on GPUs, such as where there is no C compiler,
which Triton needs. All give the same bits. Triton comes with torch's builds for CUDA.
"""

import functools
import importlib.util
import os
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing import native_blocks
from fedmef_fx.packing.backends import backend
from fedmef_fx.packing.block_code import BlockCode
from fedmef_fx.packing.tracers import is_traced

__all__ = ["TRITON_VARIABLE", "fused_kernels"]

TRITON_VARIABLE: Final = "FEDMEF_FX_TRITON"
"""Environment variable: `"0"` for operations of torch on GPUs, `"1"` (the default) for Triton where it is there."""

_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)


def fused_kernels(x: Tensor, code: BlockCode) -> ModuleType | None:
    """The kernels that code a tensor, or decode into it, whole: None where operations of torch do.

    Of a fake tensor: those of the one that it stands for.

    Returns:
        `fedmef_fx.packing.native_blocks` for one on the CPU, `fedmef_fx.packing.triton_kernels` for one on a GPU.

    Raises:
        ConfigError: Another value in the environment than 0 and 1.
    """
    if code.levels != "range" or is_traced():
        return None
    if x.device.type == "cpu":
        is_served = code.block <= native_blocks.LARGEST_BLOCK and backend().name == "native"
        return native_blocks if is_served else None
    if x.device.type != "cuda" or x.dtype not in _DTYPES:
        return None
    return _triton() if _is_wanted(os.environ.get(TRITON_VARIABLE, "1")) else None


def _is_wanted(value: str) -> bool:
    if value not in ("0", "1"):
        raise ConfigError(f'{TRITON_VARIABLE}: got {value!r}; expected "0" or "1"')
    return value == "1"


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("fedmef_fx.packing.triton_kernels")
