"""Packed tensors and memory meters: what training keeps between forward and backward, small, and measured.

Pure tensor code: it knows no graphs. Importing it imports neither numba nor a backend; see
`fedmef_fx.memory.backends`.

The module can be called: `fedmef_fx.memory(model, example_inputs)` is `fedmef_fx.memory_report.memory`, the measurement
of one training step. The public API gives that function the name of this package.
"""

import sys
import types
from typing import Any

from fedmef_fx.memory.backends import Backend, available_backends, backend, backend_for, set_backend, using_backend
from fedmef_fx.memory.bitmap import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.memory.blockwise import BlockwiseTensor, blockwise_nbytes
from fedmef_fx.memory.codecs import Codec, KeptTensor, codec_nbytes, why_dense
from fedmef_fx.memory.gradient_bits import GradientBits, clamp, clamp_and_pack
from fedmef_fx.memory.layout import Layout
from fedmef_fx.memory.live import LiveBytes
from fedmef_fx.memory.meter import SavedTensors
from fedmef_fx.memory.packed import PackedTensor
from fedmef_fx.memory.threshold import ThresholdEstimator

__all__ = [
    "Backend",
    "BlockwiseTensor",
    "Codec",
    "GradientBits",
    "KeptTensor",
    "Layout",
    "LiveBytes",
    "PackedTensor",
    "SavedTensors",
    "ThresholdEstimator",
    "available_backends",
    "backend",
    "backend_for",
    "bitmap_nbytes",
    "blockwise_nbytes",
    "clamp",
    "clamp_and_pack",
    "codec_nbytes",
    "pack_bits",
    "set_backend",
    "unpack_bits",
    "using_backend",
    "why_dense",
]


class _CallableModule(types.ModuleType):
    """This package, called as a function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Measure one training step; see `fedmef_fx.memory_report.memory`."""
        # At call time: the report is built on this package.
        from fedmef_fx.memory_report import memory  # noqa: PLC0415

        return memory(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
