"""Packed tensors and memory meters: what training keeps between forward and backward, small, and measured.

Pure tensor code: it knows no graphs. Importing it imports neither numba nor a backend; see
`fedmef_fx.memory.backends`.
"""

from fedmef_fx.memory.backends import Backend, available_backends, backend, backend_for, set_backend, using_backend
from fedmef_fx.memory.bitmap import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.memory.gradient_bits import GradientBits, clamp, clamp_and_pack
from fedmef_fx.memory.layout import Layout
from fedmef_fx.memory.live import LiveBytes
from fedmef_fx.memory.meter import SavedTensors
from fedmef_fx.memory.packed import PackedTensor
from fedmef_fx.memory.threshold import ThresholdEstimator

__all__ = [
    "Backend",
    "GradientBits",
    "Layout",
    "LiveBytes",
    "PackedTensor",
    "SavedTensors",
    "ThresholdEstimator",
    "available_backends",
    "backend",
    "backend_for",
    "bitmap_nbytes",
    "clamp",
    "clamp_and_pack",
    "pack_bits",
    "set_backend",
    "unpack_bits",
    "using_backend",
]
