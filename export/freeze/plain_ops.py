"""Runtime ops become the torch functions that they stand for in inference.

Rules
1. `pruned_convolution` / `pruned_linear` -> F.conv*d, F.conv_transpose*d, F.linear on `nsconv_weight`, `masked_weight`
   or the parameter itself; `PackActivation` sites, which only serve backward, go.
2. `sign_relu` -> F.relu, F.relu6, F.leaky_relu or torch.clamp; `max_pool`, `avg_pool`, `adaptive_avg_pool` -> F.*.
3. `compressed_*` -> the torch function whose name or module they carry; `KeepActivation` sites and handles go.
4. Dropout that drops nothing in eval mode goes, as do identities. One that always drops stays, as F.dropout.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedmef_fx.export.freeze.plain_compressed import is_compressed, restore_compressed
from fedmef_fx.graph.nodes import bound
from fedmef_fx.graph.operations import DROPOUT_MODULES
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.dropout import BitDropout, bit_dropout
from fedmef_fx.ops.keeping import KeepActivation, recomputed, remasked
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import nsconv_weight
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.ops.smooth import compressed_result

__all__ = ["restore_plain_ops"]

_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_CONVOLUTION: Final = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Final = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL: Final = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: Final = {2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_AVG_POOL: Final = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}

_IDENTITIES_IN_EVAL: Final = (BitDropout, *DROPOUT_MODULES, nn.Identity)
_DROPOUTS: Final = frozenset(
    {bit_dropout, F.alpha_dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout}
)
# What a call that leaves `training` out gets.
_TRAINING_DEFAULT: Final = {F.alpha_dropout: False, F.feature_alpha_dropout: False}


def restore_plain_ops(region: Region, graph: fx.Graph) -> None:
    """Apply the rules of this module to an eval graph, in place."""
    for node in list(graph.nodes):
        if _passes_through(region, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif node.op == "call_function" and node.target in _PLAIN:
            with graph.inserting_before(node):
                function, args, kwargs = _PLAIN[node.target](node)
                plain = graph.call_function(function, args, kwargs)
            node.replace_all_uses_with(plain)
            graph.erase_node(node)
    restore_compressed(graph)
    for node in reversed(list(graph.nodes)):  # the ops that read them are gone
        if _serves_backward(region, node) and not node.users:
            graph.erase_node(node)


def _serves_backward(region: Region, node: fx.Node) -> bool:
    """Whether a node says how a tensor is kept, or is an op that `restore_compressed` has put aside."""
    pair = node.args[0] if node.target is operator.getitem else None
    if isinstance(pair, fx.Node) and pair.target is compressed_result:
        return True
    is_site = isinstance(region.module(node), KeepActivation | PackActivation)
    return is_site or is_compressed(node) or node.target in (recomputed, remasked)


def _passes_through(region: Region, node: fx.Node) -> bool:
    module = region.module(node)
    if module is not None:
        hooked = module._forward_hooks or module._forward_pre_hooks
        return type(module) in _IDENTITIES_IN_EVAL and not hooked
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return False
    return bound(node).get("training", _TRAINING_DEFAULT.get(node.target, True)) is False


def _convolution(node: fx.Node) -> _Call:
    given = bound(node)
    transposed, dims = given.get("transposed", False), len(given["stride"])
    options = {name: given[name] for name in ("stride", "padding", "dilation")} | {"groups": given.get("groups", 1)}
    if transposed:
        padding = given.get("output_padding", (0,))
        options["output_padding"] = padding if len(padding) == dims else padding * dims
    kernel = _kernel(node, groups=options["groups"], transposed=transposed)
    return (_TRANSPOSED if transposed else _CONVOLUTION)[dims], (given["x"], kernel, given.get("bias")), options


def _linear(node: fx.Node) -> _Call:
    given = bound(node)
    return F.linear, (given["x"], _kernel(node, groups=1, transposed=False), given.get("bias")), {}


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


def _activation(node: fx.Node) -> _Call:
    given = bound(node)
    x, high, slope = given["x"], given.get("high", math.inf), given.get("slope", 0.0)
    if slope:
        return F.leaky_relu, (x, slope), {}
    if high == math.inf:
        return F.relu, (x,), {}
    return (F.relu6, (x,), {}) if high == 6.0 else (torch.clamp, (x, 0.0, high), {})


def _dropout(node: fx.Node) -> _Call:
    given = bound(node)
    return F.dropout, (given["x"],), {"p": given["p"], "training": given["training"]}


def _max_pool(node: fx.Node) -> _Call:
    given = bound(node)
    options = {name: given[name] for name in ("stride", "padding", "dilation")}
    options["ceil_mode"] = given.get("ceil_mode", False)
    return _MAX_POOL[len(given["kernel"])], (given["x"], given["kernel"]), options


def _avg_pool(node: fx.Node) -> _Call:
    given = bound(node)
    options = {"stride": given["stride"], "padding": given["padding"], "ceil_mode": given.get("ceil_mode", False)}
    options["count_include_pad"] = given.get("count_include_pad", True)
    options["divisor_override"] = given.get("divisor_override")
    return _AVG_POOL[len(given["kernel"])], (given["x"], given["kernel"]), options


def _adaptive_avg_pool(node: fx.Node) -> _Call:
    given = bound(node)
    return _ADAPTIVE_AVG_POOL[len(given["output_size"])], (given["x"], given["output_size"]), {}


_PLAIN: Final[dict[Any, Callable[[fx.Node], _Call]]] = {
    adaptive_avg_pool: _adaptive_avg_pool,
    avg_pool: _avg_pool,
    bit_dropout: _dropout,
    max_pool: _max_pool,
    pruned_convolution: _convolution,
    pruned_linear: _linear,
    sign_relu: _activation,
}
