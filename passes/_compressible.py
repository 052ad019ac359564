"""Which nodes `compress-saved` rewrites, into what, and which of their tensors backward needs.

Decides only; `passes/compress_saved.py` rewrites.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple

from torch import fx, nn

from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.nodes import is_inplace, operator_at, owns_input
from fedmef_fx.graph.operations import options_of
from fedmef_fx.graph.operators import Norm, Operator, bound
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.norms import compressed_batch_norm, compressed_batch_norm_module, compressed_norm
from fedmef_fx.ops.products import compressed_attention, compressed_matmul, compressed_mul
from fedmef_fx.ops.smooth import compressed_activation, compressed_result

__all__ = ["Compression", "compression_of"]

Handles = tuple[fx.Node | None, ...]


@dataclasses.dataclass(frozen=True)
class Compression:
    """What takes a node's place.

    Attributes:
        op: The runtime op.
        operands: The activations that its backward needs; the op takes a handle for each.
        call: From the handles of the operands to the op's arguments.
        options: Its keyword arguments.
        keeps_result: Whether backward needs the result instead, so that the op returns it with its handle.
        module: Target of a module that the op takes, by `get_attr`, after its handles; None for none.
        parameters: Targets of the module's tensors that it takes by `get_attr`; None stands for an absent one.
    """

    op: Callable[..., Any]
    operands: tuple[Any, ...]
    call: Callable[[Handles], tuple[Any, ...]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    keeps_result: bool = False
    module: str | None = None
    parameters: tuple[str | None, ...] = ()


def compression_of(region: Region, node: fx.Node, carriers: Collection[fx.Node]) -> Compression | str | None:
    """What takes a node's place; why nothing does, where something could; None for any other node.

    Args:
        region: The region of the graph.
        node: The node.
        carriers: The nodes of the graph whose values carry gradients.
    """
    row, module = operator_at(region, node), region.module(node)
    if row is None or not row.in_8_bits or not node.all_input_nodes:
        return None
    if module is not None and len(node.all_input_nodes) != 1:
        return None
    found = _RULES[row.in_8_bits](_Call(region, node, row, carriers))
    if not isinstance(found, Compression):
        return found
    if module is not None and (has_user_hooks(module) or nn.utils.parametrize.is_parametrized(module)):
        return "it has hooks or parametrizations, which need the module call"
    if is_inplace(region, node) and not owns_input(region, node):
        return "it works in place on a tensor with other users"
    return found


class _Call(NamedTuple):
    """A node with what is known of it."""

    region: Region
    node: fx.Node
    row: Operator
    carriers: Collection[fx.Node]

    @property
    def x(self) -> fx.Node:
        """Its first argument."""
        return self.node.all_input_nodes[0]

    @property
    def module(self) -> nn.Module | None:
        """The module that it calls."""
        return self.region.module(self.node)

    @property
    def options(self) -> dict[str, Any]:
        """What it depends on, by name."""
        return options_of(self.region, self.node, self.row)

    @property
    def given(self) -> dict[str, Any]:
        """The options of its function, besides tensors and how it works: those that a call gives."""
        given = self.options if self.module is not None else bound(self.node)
        return {name: value for name, value in given.items() if name not in ("input", "inplace", "_stacklevel")}


def _is_static(options: dict[str, Any]) -> bool:
    return not any(isinstance(value, fx.Node) for value in options.values())


def _input(call: _Call) -> Compression | str | None:
    x, function, options = call.x, call.row.name, call.given
    if not _is_static(options):
        return "its options are computed at run time"
    if function == "pow" and options.get("exponent") not in (2, 3):
        return None  # roots and poles, near which 8 bits are not enough
    return Compression(compressed_activation, (x,), lambda kept: (x, kept[0]), {"function": function, **options})


def _result(call: _Call) -> Compression | str | None:
    x, function = call.x, call.row.name
    options = {name: value for name, value in call.given.items() if value is not None}
    if "dim" in call.row.options and not isinstance(options.get("dim"), int):
        return "its dimension is not given"
    if not _is_static(options):
        return "its options are computed at run time"
    return Compression(compressed_result, (), lambda _: (x,), {"function": function, **options}, keeps_result=True)


def _norm(call: _Call) -> Compression | str | None:
    row, options, x = call.row, call.options, call.x
    if not isinstance(row, Norm):
        return None
    if options.get("running_mean") is not None:
        return "it tracks statistics of the batch"
    size = {row.size_in_op: options[row.size]} if row.size else {}
    kept_options = {"function": row.name, **size, "eps": options["eps"]}
    if not _is_static(kept_options):
        return "its options are computed at run time"
    tensors: tuple[Any, ...] = ()
    parameters: tuple[str | None, ...] = ()
    if call.module is None:
        tensors = (options.get("weight"), options.get("bias"))
    else:
        held = (name if getattr(call.module, name, None) is not None else None for name in ("weight", "bias"))
        parameters = tuple(None if name is None else f"{call.node.target}.{name}" for name in held)
    return Compression(compressed_norm, (x,), lambda kept: (x, kept[0], *tensors), kept_options, parameters=parameters)


def _batch_norm(call: _Call) -> Compression | str:
    x = call.x
    if call.module is not None:
        return Compression(compressed_batch_norm_module, (x,), lambda kept: (x, kept[0]), module=str(call.node.target))
    given = call.options
    options = {name: given[name] for name in ("training", "eps", "momentum")}
    if not _is_static(options) or options["momentum"] is None:
        return "its options are computed at run time"
    statistics = tuple(given.get(name) for name in ("running_mean", "running_var", "weight", "bias"))
    return Compression(compressed_batch_norm, (x,), lambda kept: (x, kept[0], *statistics), options)


def _product(call: _Call) -> Compression | None:
    node, carriers = call.node, call.carriers
    names = call.row.signature
    bias, operands = node.args[: len(names) - 2], node.args[len(names) - 2 :]
    if len(operands) != 2 or node.kwargs or not all(isinstance(o, fx.Node) for o in operands):
        return None
    if is_inplace(call.region, node):
        return None
    a, b = operands
    # Operands without a gradient (masks, sizes) are kept as they are: they are small, or no floats.
    wanted = tuple(x if x in carriers and other in carriers else None for x, other in ((a, b), (b, a)))
    op = compressed_mul if call.row.kind == "mul" else compressed_matmul
    return Compression(op, wanted, lambda kept: (a, kept[0], b, kept[1], *bias)) if any(wanted) else None


def _attention(call: _Call) -> Compression | str:
    given = bound(call.node)
    q, k, v = (given.pop(name) for name in ("query", "key", "value"))
    mask = given.pop("attn_mask", None)
    if not _is_static(given):
        return "its options are computed at run time"
    if not any(x in call.carriers for x in (q, k, v)):
        return "no gradient passes through it"
    return Compression(compressed_attention, (q, k, v), lambda kept: (q, kept[0], k, kept[1], v, kept[2], mask), given)


_RULES: Final[dict[str, Callable[[_Call], Compression | str | None]]] = {
    "attention": _attention,
    "batch_norm": _batch_norm,
    "input": _input,
    "norm": _norm,
    "product": _product,
    "result": _result,
}
