"""What moves elements, takes tensors apart and puts them together."""

import operator
from typing import Any, Final

from torch import nn

from fedmef_fx.graph.operators.operator import Operator

__all__ = ["ROWS"]


def _view(name: str, *aliases: str, kind: str = "reshape", **facts: Any) -> Operator:
    return Operator.of_torch(name, *aliases, kind=kind, keeps="nothing", is_view=True, **facts)


def _copy(name: str, *aliases: str, **facts: Any) -> Operator:
    return Operator.of_torch(name, *aliases, keeps="nothing", **facts)


ROWS: Final = (
    _view("contiguous", kind="elementwise"),
    _view("expand", kind="expand", plumbing="part"),
    _view(
        "flatten",
        modules=(nn.Flatten,),
        options=("start_dim", "end_dim"),
        signature=("input", "start_dim", "end_dim"),
    ),
    _view("permute", kind="permute"),
    _view("reshape"),
    _view("squeeze"),
    _view("t", kind="permute"),
    _view("transpose", kind="permute"),
    _view(
        "unflatten", modules=(nn.Unflatten,), options=("dim", "unflattened_size"), signature=("input", "dim", "sizes")
    ),
    _view("unsqueeze"),
    _view("view"),
    Operator(
        name="getitem", functions=(operator.getitem,), kind="getitem", keeps="nothing", is_view=True, plumbing="part"
    ),
    Operator(name="setitem", functions=(operator.setitem,)),
    _copy("cat", "concat", "concatenate", kind="cat", signature=("tensors", "dim")),
    _copy("channel_shuffle", modules=(nn.ChannelShuffle,)),
    _copy("chunk", kind="split", signature=("input", "chunks", "dim")),
    _copy("interpolate", modules=(nn.Upsample,), kind="interpolate"),
    _copy(
        "pad",
        modules=(
            nn.ConstantPad1d,
            nn.ConstantPad2d,
            nn.ConstantPad3d,
            nn.ReflectionPad2d,
            nn.ReplicationPad2d,
            nn.ZeroPad2d,
        ),
        kind="pad",
        signature=("input", "pad", "mode", "value"),
    ),
    _copy("pixel_shuffle", modules=(nn.PixelShuffle,)),
    _copy("pixel_unshuffle", modules=(nn.PixelUnshuffle,)),
    _copy("repeat"),
    _copy("split", kind="split", signature=("input", "split_size", "dim")),
    _copy("stack"),
    _copy("unbind", kind="unbind", signature=("input", "dim")),
)
