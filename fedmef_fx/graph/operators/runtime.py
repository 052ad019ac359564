"""The ops of this package that graphs call after the passes, and the torch functions that they stand for.

None of them keeps its activations dense: what they keep instead is small, or belongs to the model.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx
from torch.nn import functional as F

from fedmef_fx.graph.operators.calls import bound
from fedmef_fx.graph.operators.norms import Norm
from fedmef_fx.graph.operators.operator import Operator, PlainCall, named
from fedmef_fx.graph.operators.products import Layer
from fedmef_fx.ops.dropout import BitDropout, bit_dropout
from fedmef_fx.ops.in_place import add_over, mul_over
from fedmef_fx.ops.keeping import KeepActivation, recomputed, remasked
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.noise_site import NoiseSite
from fedmef_fx.ops.norms import compressed_batch_norm, compressed_batch_norm_module, compressed_norm
from fedmef_fx.ops.nsconv import channel_affine, nsconv_weight
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from fedmef_fx.ops.products import compressed_attention, compressed_matmul, compressed_mul
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.ops.shared_gradient import shared_gradient, turns
from fedmef_fx.ops.smooth import compressed_activation, compressed_result

__all__ = ["ROWS"]


def _of_dims(name: str, dims: int) -> Callable[..., Any]:
    return named(f"{name}{dims}d").function


def _convolution(node: fx.Node) -> PlainCall:
    arguments = bound(node)
    transposed, dims = arguments.get("transposed", False), len(arguments["stride"])
    options = {name: arguments[name] for name in ("stride", "padding", "dilation")} | {
        "groups": arguments.get("groups", 1)
    }
    if transposed:
        padding = arguments.get("output_padding", (0,))
        options["output_padding"] = padding if len(padding) == dims else padding * dims
    kernel = _kernel(node, groups=options["groups"], transposed=transposed)
    return (
        _of_dims("conv_transpose" if transposed else "conv", dims),
        (arguments["x"], kernel, arguments.get("bias")),
        options,
    )


def _linear(node: fx.Node) -> PlainCall:
    arguments = bound(node)
    return F.linear, (arguments["x"], _kernel(node, groups=1, transposed=False), arguments.get("bias")), {}


def _kernel(node: fx.Node, *, groups: int, transposed: bool) -> fx.Node:
    """The weight of a pruned layer as a node of its own."""
    given, graph = bound(node), node.graph
    weight, gain, mask = given["weight"], given.get("gain"), given.get("mask")
    if gain is not None:
        form = {"g": given.get("g", 1.0), "statistics": given.get("statistics", "active")}
        form |= {"groups": groups, "transposed": transposed}
        return graph.call_function(nsconv_weight, (weight, gain, mask), form)
    if mask is not None:
        return graph.call_function(masked_weight, (weight, mask))
    return weight  # type: ignore[no-any-return]  # weights of layers are nodes


def _relu(node: fx.Node) -> PlainCall:
    arguments = bound(node)
    x, high, slope = arguments["x"], arguments.get("high", math.inf), arguments.get("slope", 0.0)
    if slope:
        return F.leaky_relu, (x, slope), {}
    if high == math.inf:
        return F.relu, (x,), {}
    return (F.relu6, (x,), {}) if high == 6.0 else (torch.clamp, (x, 0.0, high), {})


def _dropout(node: fx.Node) -> PlainCall:
    arguments = bound(node)
    return F.dropout, (arguments["x"],), {"p": arguments["p"], "training": arguments["training"]}


def _max_pool(node: fx.Node) -> PlainCall:
    arguments = bound(node)
    options = {name: arguments[name] for name in ("stride", "padding", "dilation")}
    options["ceil_mode"] = arguments.get("ceil_mode", False)
    return _of_dims("max_pool", len(arguments["kernel"])), (arguments["x"], arguments["kernel"]), options


def _avg_pool(node: fx.Node) -> PlainCall:
    arguments = bound(node)
    options = {
        "stride": arguments["stride"],
        "padding": arguments["padding"],
        "ceil_mode": arguments.get("ceil_mode", False),
    }
    options["count_include_pad"] = arguments.get("count_include_pad", True)
    options["divisor_override"] = arguments.get("divisor_override")
    return _of_dims("avg_pool", len(arguments["kernel"])), (arguments["x"], arguments["kernel"]), options


def _adaptive_avg_pool(node: fx.Node) -> PlainCall:
    arguments = bound(node)
    return _of_dims("adaptive_avg_pool", len(arguments["output_size"])), (arguments["x"], arguments["output_size"]), {}


def _named(node: fx.Node) -> PlainCall:
    options = {name: value for name, value in node.kwargs.items() if name not in ("function", "bits", "key")}
    return named(str(node.kwargs["function"])).function, (node.args[0],), options


def _norm(node: fx.Node) -> PlainCall:
    row, eps = named(str(node.kwargs["function"])), node.kwargs["eps"]
    assert isinstance(row, Norm)  # noqa: S101 -- for the type checker
    x, weight, bias = node.args[0], *(*node.args[2:], None, None)[:2]
    if not row.size:
        return row.function, (x, None, None, weight, bias), {"eps": eps}
    shift = (bias,) if row.has_shift else ()
    return row.function, (x, node.kwargs[row.size_in_op], weight, *shift, eps), {}


def _batch_norm(node: fx.Node) -> PlainCall:
    return F.batch_norm, (node.args[0], *node.args[2:]), dict(node.kwargs)


def _batch_norm_module(node: fx.Node) -> PlainCall:
    module = node.args[2]
    assert isinstance(module, fx.Node)  # noqa: S101 -- the pass puts a get_attr there
    return str(module.target), (node.args[0],), {}


def _affine(node: fx.Node) -> PlainCall:
    """Channels last for a moment, which serves any number of dimensions."""
    x, gain, shift = node.args
    last = node.graph.call_method("transpose", (x, 1, -1))
    mul_over = node.graph.call_function(operator.mul, (last, gain))
    return torch.transpose, (node.graph.call_function(operator.add, (mul_over, shift)), 1, -1), {}


def _mul(node: fx.Node) -> PlainCall:
    return operator.mul, (node.args[0], node.args[2]), {}


def _matmul(node: fx.Node) -> PlainCall:
    a, b, bias = node.args[0], node.args[2], bound(node).get("bias")
    return (torch.matmul, (a, b), {}) if bias is None else (torch.addmm, (bias, a, b), {})


def _attention(node: fx.Node) -> PlainCall:
    arguments = (*node.args[0:5:2], bound(node).get("attn_mask"))
    return F.scaled_dot_product_attention, arguments, dict(node.kwargs)


def _op(op: Callable[..., Any], plain: Callable[[fx.Node], PlainCall] | None = None, **facts: Any) -> Operator:
    return Operator(name=f"fedmef_fx.{op.__name__}", functions=(op,), keeps="nothing", plain=plain, **facts)


def _layer(op: Callable[..., Any], plain: Callable[[fx.Node], PlainCall]) -> Layer:
    return Layer(name=f"fedmef_fx.{op.__name__}", functions=(op,), keeps="nothing", plain=plain)


ROWS: Final = (
    _layer(pruned_convolution, _convolution),
    _layer(pruned_linear, _linear),
    _op(add_over, lambda node: (operator.add, node.args, {}), kind="add"),
    _op(mul_over, lambda node: (operator.mul, node.args, {}), kind="mul"),
    _op(adaptive_avg_pool, _adaptive_avg_pool),
    _op(avg_pool, _avg_pool),
    _op(bit_dropout, _dropout, kind="dropout"),
    Operator(name="fedmef_fx.channel_affine", functions=(channel_affine,), plain=_affine),  # keeps its input
    _op(compressed_activation, _named),
    _op(compressed_attention, _attention),
    _op(compressed_batch_norm, _batch_norm),
    _op(compressed_batch_norm_module, _batch_norm_module),
    _op(compressed_matmul, _matmul),
    _op(compressed_mul, _mul),
    _op(compressed_norm, _norm),
    _op(compressed_result, _named),
    _op(masked_weight),  # a parameter and a mask, which exist anyway
    _op(max_pool, _max_pool),
    Operator(name="fedmef_fx.nsconv_weight", functions=(nsconv_weight,)),
    _op(recomputed),
    _op(remasked),
    _op(shared_gradient, plumbing="fact"),
    _op(sign_relu, _relu),
    _op(turns, plumbing="fact"),
    Operator(name="fedmef_fx.BitDropout", modules=(BitDropout,), kind="dropout", keeps="nothing"),
    Operator(name="fedmef_fx.KeepActivation", modules=(KeepActivation,), keeps="nothing"),
    Operator(name="fedmef_fx.NoiseSite", modules=(NoiseSite,), keeps="nothing"),
    Operator(name="fedmef_fx.PackActivation", modules=(PackActivation,), keeps="nothing"),
)
