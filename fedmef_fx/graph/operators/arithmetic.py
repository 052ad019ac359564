"""Arithmetic: functions of single elements, of one tensor or of several."""

import operator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx.graph.operators.operator import Operator

__all__ = ["ROWS"]

_SPACES = (operator, torch, Tensor)


def _binary(name: str, *aliases: str, kind: str | None = None, **facts: Any) -> Operator:
    return Operator.of_torch(name, *aliases, spaces=_SPACES, kind=kind or name, signature=("input", "other"), **facts)


def _unary(name: str, *aliases: str, **facts: Any) -> Operator:
    return Operator.of_torch(name, *aliases, spaces=(operator, F, torch, Tensor), kind="elementwise", **facts)


def _copy(name: str, *, kind: str = "elementwise", **facts: Any) -> Operator:
    return Operator.of_torch(name, kind=kind, keeps="nothing", **facts)


ROWS: Final = (
    _binary("add", keeps="nothing"),
    _binary("div", "truediv", "divide", "true_divide"),
    _binary("maximum", kind="join"),
    _binary("minimum", kind="join"),
    _binary("mul", "multiply", keeps="inputs", in_8_bits="product"),
    _binary("sub", "subtract", keeps="nothing"),
    _unary("abs", "absolute", keeps="inputs"),
    _unary("clamp", "clip", keeps="inputs"),
    _unary("clamp_max", keeps="inputs"),
    _unary("clamp_min", keeps="inputs"),
    _unary("cos", keeps="inputs"),
    _unary("erf", keeps="inputs"),
    _unary("exp", keeps="output"),
    _unary("expm1", keeps="output"),
    _unary("hardshrink", modules=(nn.Hardshrink,), keeps="inputs"),
    Operator.of_torch("log", keeps="inputs"),
    _unary("log1p", keeps="inputs"),
    _unary("logsigmoid", modules=(nn.LogSigmoid,)),
    _unary("neg", "negative", keeps="nothing"),
    _unary(
        "pow",
        functions=(torch.pow,),
        signature=("input", "exponent"),
        keeps="inputs",
        in_8_bits="input",
        derivative=lambda grad, x, exponent: grad * (exponent * x.pow(exponent - 1)),
    ),
    _unary("rsqrt", keeps="output"),
    _unary("sin", keeps="inputs"),
    _unary("softshrink", modules=(nn.Softshrink,), keeps="inputs"),
    _unary("softsign", modules=(nn.Softsign,)),
    _unary("sqrt", keeps="output"),
    _unary("square", keeps="inputs", in_8_bits="input", derivative=lambda grad, x: grad * (2 * x)),
    _unary("tanhshrink", modules=(nn.Tanhshrink,)),
    _unary("threshold", modules=(nn.Threshold,), keeps="inputs"),
    _copy("bfloat16"),
    _copy("clone"),
    _copy("detach", carries_gradient=False),
    _copy("double"),
    _copy("float"),
    _copy("half"),
    _copy("to"),
    _copy("type", kind="unknown"),
    _copy("type_as", kind="unknown"),
    Operator(name="identity", modules=(nn.Identity,), kind="identity", keeps="nothing", is_view=True),
    # They keep their masks, which are no activations.
    Operator.of_torch("where", kind="where", keeps="nothing"),
    Operator.of_torch("masked_fill", kind="masked_fill", keeps="nothing"),
)
