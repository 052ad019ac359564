"""Codes for tensors: what training keeps between forward and backward, small.

Pure tensor code: it knows no graphs. What computes it is chosen in `fedmef_fx.packing.backends`.
"""

from fedmef_fx.packing.backends import Backend, available_backends, backend, backend_for, set_backend, using_backend
from fedmef_fx.packing.bitmap import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.packing.block_code import BlockCode
from fedmef_fx.packing.blockwise import BlockwiseTensor
from fedmef_fx.packing.codecs import Codec, KeptTensor, codec_nbytes, why_dense
from fedmef_fx.packing.gradient_bits import GradientBits, clamp
from fedmef_fx.packing.layout import MemoryLayout
from fedmef_fx.packing.noise import NoiseStream
from fedmef_fx.packing.packed import PackedTensor
from fedmef_fx.packing.rectified import RectifiedTensor
from fedmef_fx.packing.threshold import ThresholdEstimator

__all__ = [
    "Backend",
    "BlockCode",
    "BlockwiseTensor",
    "Codec",
    "GradientBits",
    "KeptTensor",
    "MemoryLayout",
    "NoiseStream",
    "PackedTensor",
    "RectifiedTensor",
    "ThresholdEstimator",
    "available_backends",
    "backend",
    "backend_for",
    "bitmap_nbytes",
    "clamp",
    "codec_nbytes",
    "pack_bits",
    "set_backend",
    "unpack_bits",
    "using_backend",
    "why_dense",
]
