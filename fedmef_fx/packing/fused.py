"""Whether one fused kernel codes a tensor: in C on the CPU, where that is the backend; in Triton on CUDA devices."""

from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.packing import native_blocks
from fedmef_fx.packing.backends import backend
from fedmef_fx.packing.block_code import BlockCode
from fedmef_fx.packing.tracers import is_traced
from fedmef_fx.packing.triton_choice import triton_module

__all__ = ["fused_kernels"]

_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)


def fused_kernels(x: Tensor, code: BlockCode) -> ModuleType | None:
    """The kernels that code a tensor, or decode into it, whole: None where operations of torch do.

    Of a fake tensor: those of the one that it stands for.

    Returns:
        `fedmef_fx.packing.native_blocks` for one on the CPU, `fedmef_fx.packing.triton_kernels` for one on a GPU.

    Raises:
        ConfigError: Another value in the environment than 0 and 1.
    """
    if is_traced():
        return None
    if x.device.type == "cpu":
        is_served = code.block <= native_blocks.LARGEST_BLOCK and backend().name == "native"
        return native_blocks if is_served else None
    if x.device.type != "cuda" or x.dtype not in _DTYPES or code.levels != "range":
        return None
    return triton_module("fedmef_fx.packing.triton_kernels")
