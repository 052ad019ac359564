"""Ops that keep copies in few bits for backward become the torch functions and modules that they stand for.

1. `compressed_activation`, `compressed_result`, `compressed_norm` -> the torch function that they name.
2. `compressed_batch_norm` -> F.batch_norm, `compressed_batch_norm_module` -> the call of the module.
3. `compressed_mul`, `compressed_matmul`, `compressed_attention` -> torch.mul, torch.matmul or torch.addmm, and
   F.scaled_dot_product_attention.
"""

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx
from torch.nn import functional as F

from fedmef_fx.graph.activations import rows
from fedmef_fx.graph.nodes import bound
from fedmef_fx.ops.norms import compressed_batch_norm, compressed_batch_norm_module, compressed_norm
from fedmef_fx.ops.products import compressed_attention, compressed_matmul, compressed_mul
from fedmef_fx.ops.smooth import compressed_activation, compressed_result

__all__ = ["is_compressed", "restore_compressed"]

_NAMED: Final[dict[str, Callable[..., Any]]] = {
    "log_softmax": F.log_softmax,
    "pow": torch.pow,
    "softmax": F.softmax,
    "square": torch.square,
}
_SIZES: Final = {"group_norm": "groups", "layer_norm": "shape", "rms_norm": "shape"}


def restore_compressed(graph: fx.Graph) -> None:
    """Apply the rules of this module to a graph, in place; handles that nothing reads any more stay."""
    for node in list(graph.nodes):
        restore = _RESTORE.get(node.target) if node.op == "call_function" else None
        if restore is None:
            continue
        with graph.inserting_before(node):
            plain = restore(node)
        readers = list(node.users) if node.target is compressed_result else [node]
        for reader in readers:
            if reader is node or reader.args[1] == 0:
                reader.replace_all_uses_with(plain)


def _named(node: fx.Node) -> fx.Node:
    plain = {**_NAMED, **{row.name: row.function for row in rows()}}
    options = {name: value for name, value in node.kwargs.items() if name not in ("function", "bits")}
    return node.graph.call_function(plain[str(node.kwargs["function"])], (node.args[0],), options)


def _norm(node: fx.Node) -> fx.Node:
    function, eps = str(node.kwargs["function"]), node.kwargs["eps"]
    x, weight, bias = node.args[0], *(*node.args[2:], None, None)[:2]
    if function == "instance_norm":
        return node.graph.call_function(F.instance_norm, (x, None, None, weight, bias), {"eps": eps})
    size = node.kwargs[_SIZES[function]]
    if function == "rms_norm":
        return node.graph.call_function(F.rms_norm, (x, size, weight, eps))
    return node.graph.call_function(
        F.layer_norm if function == "layer_norm" else F.group_norm, (x, size, weight, bias, eps)
    )


def _batch_norm(node: fx.Node) -> fx.Node:
    return node.graph.call_function(F.batch_norm, (node.args[0], *node.args[2:]), dict(node.kwargs))


def _batch_norm_module(node: fx.Node) -> fx.Node:
    module = node.args[2]
    assert isinstance(module, fx.Node)  # noqa: S101 -- the pass puts a get_attr there
    return node.graph.call_module(str(module.target), (node.args[0],))


def _mul(node: fx.Node) -> fx.Node:
    return node.graph.call_function(operator.mul, (node.args[0], node.args[2]))


def _matmul(node: fx.Node) -> fx.Node:
    a, b, bias = node.args[0], node.args[2], bound(node).get("bias")
    if bias is None:
        return node.graph.call_function(torch.matmul, (a, b))
    return node.graph.call_function(torch.addmm, (bias, a, b))


def _attention(node: fx.Node) -> fx.Node:
    arguments = (*node.args[0:5:2], bound(node).get("attn_mask"))
    return node.graph.call_function(F.scaled_dot_product_attention, arguments, dict(node.kwargs))


_RESTORE: Final[dict[Any, Callable[[fx.Node], fx.Node]]] = {
    compressed_activation: _named,
    compressed_attention: _attention,
    compressed_batch_norm: _batch_norm,
    compressed_batch_norm_module: _batch_norm_module,
    compressed_matmul: _matmul,
    compressed_mul: _mul,
    compressed_norm: _norm,
    compressed_result: _named,
}


def is_compressed(node: fx.Node) -> bool:
    """Whether a node is one of the ops of this module."""
    return node.op == "call_function" and node.target in _RESTORE
