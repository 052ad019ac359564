"""Activations: elementwise functions of one tensor, whose gain scales the kernel before them."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from fedmef_fx.graph.operators.operator import Keeps, Operator
from fedmef_fx.ops.relu import sign_relu

__all__ = ["ROWS", "Activation"]

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activation(Operator):
    """The row of an activation: a name, its function and its module are enough for a new one."""

    kind: str = "elementwise"
    keeps: Keeps = "inputs"
    is_nonlinearity: bool = True


def _leaky(options: Mapping[str, Any]) -> partial[Any] | None:
    slope = options.get("negative_slope", 0.01)
    return partial(sign_relu, slope=slope) if isinstance(slope, float) and slope > 0 else None


_row = Activation.of_torch

ROWS: Final = (
    _row("celu", modules=(nn.CELU,), keeps="both"),
    _row("elu", modules=(nn.ELU,), keeps="both"),
    _row(
        "gelu",
        modules=(nn.GELU,),
        options=("approximate",),
        signature=("input", "approximate"),
        in_8_bits="input",
        derivative=lambda grad, x, approximate="none": _aten.gelu_backward(grad, x, approximate=approximate),
    ),
    _row("hardsigmoid", modules=(nn.Hardsigmoid,), in_8_bits="input", derivative=_aten.hardsigmoid_backward),
    _row("hardswish", modules=(nn.Hardswish,), in_8_bits="input", derivative=_aten.hardswish_backward),
    _row("hardtanh", modules=(nn.Hardtanh,)),
    _row("leaky_relu", modules=(nn.LeakyReLU,), options=("negative_slope",), small=_leaky, is_homogeneous=True),
    _row("mish", modules=(nn.Mish,), in_8_bits="input", derivative=_aten.mish_backward),
    Operator.of_torch(
        "prelu",
        modules=(nn.PReLU,),
        options=("weight",),
        signature=("input", "weight"),
        kind="prelu",
        has_other_parameters=True,
        sizes=(("num_parameters", "weight", 0),),
    ),
    _row(
        "relu",
        modules=(nn.ReLU,),
        keeps="output",
        is_homogeneous=True,
        small=lambda _: partial(sign_relu, high=math.inf),
    ),
    _row("relu6", modules=(nn.ReLU6,), small=lambda _: partial(sign_relu, high=6.0)),
    _row("selu", modules=(nn.SELU,), keeps="both"),
    _row(
        "sigmoid",
        functions=(torch.sigmoid,),
        modules=(nn.Sigmoid,),
        keeps="output",
        in_8_bits="result",
        derivative=_aten.sigmoid_backward,
    ),
    _row("silu", modules=(nn.SiLU,), in_8_bits="input", derivative=_aten.silu_backward),
    _row(
        "softplus",
        modules=(nn.Softplus,),
        options=("beta", "threshold"),
        signature=("input", "beta", "threshold"),
        in_8_bits="input",
        derivative=lambda grad, x, beta=1.0, threshold=20.0: _aten.softplus_backward(grad, x, beta, threshold),
    ),
    _row(
        "tanh",
        functions=(torch.tanh,),
        modules=(nn.Tanh,),
        keeps="output",
        in_8_bits="result",
        derivative=_aten.tanh_backward,
    ),
)
