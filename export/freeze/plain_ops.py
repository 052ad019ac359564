"""Runtime ops become the torch functions that they stand for in inference.

Rules
1. An op of this package -> the call that its row names (`graph/operators/runtime.py`): a layer reads `nsconv_weight`,
   `masked_weight` or the parameter itself.
2. Sites and handles, which only serve backward, go.
3. Dropout that drops nothing in eval mode goes, as do identities. One that always drops stays, as F.dropout.
"""

import operator

from torch import fx

from fedmef_fx.graph.nodes import operator_at
from fedmef_fx.graph.operations import operation_of
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.keeping import recomputed, remasked
from fedmef_fx.ops.noise_site import NoiseSite
from fedmef_fx.ops.shared_gradient import shared_gradient, turns
from fedmef_fx.ops.smooth import compressed_result

__all__ = ["restore_plain_ops"]


def restore_plain_ops(region: Region, graph: fx.Graph) -> None:
    """Apply the rules of this module to an eval graph, in place."""
    for node in list(graph.nodes):
        if operation_of(region, node).kind == "identity":
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        else:
            _restore(region, node)
    for node in reversed(list(graph.nodes)):  # the ops that read them are gone
        if _serves_backward(region, node) and not node.users:
            graph.erase_node(node)


def _restore(region: Region, node: fx.Node) -> None:
    """Rule 1; of a result that comes with its handle, the result."""
    row = operator_at(region, node)
    if row is None or row.plain is None:
        return
    with node.graph.inserting_before(node):
        target, args, kwargs = row.plain(node)
        op = "call_module" if isinstance(target, str) else "call_function"
        plain = node.graph.create_node(op, target, args, kwargs)
    has_handle = node.target is compressed_result
    for reader in list(node.users) if has_handle else [node]:
        if reader is node or reader.args[1] == 0:
            reader.replace_all_uses_with(plain)
    if not has_handle:
        node.graph.erase_node(node)


def _serves_backward(region: Region, node: fx.Node) -> bool:
    """Whether a node says how a tensor is kept, or is an op that `_restore` has put aside."""
    pair = node.args[0] if node.target is operator.getitem else None
    if node.target is compressed_result or (isinstance(pair, fx.Node) and pair.target is compressed_result):
        return True
    is_site = isinstance(region.module(node), NoiseSite)
    return is_site or node.target in (recomputed, remasked, shared_gradient, turns)
