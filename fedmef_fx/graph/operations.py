"""What a graph node does to channels, whether it is a function, a method or a module: one `Operation` per node.

Kinds that keep a tensor's shape are named by what they do to a constant: an "elementwise" operation can be evaluated on
it. What has no row is "unknown": nothing is assumed about it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, fx

from fedmef_fx.graph.nodes import operator_at
from fedmef_fx.graph.operators import Layer, Operator, arguments
from fedmef_fx.graph.program import Region

__all__ = ["Operation", "nonlinearity", "operation_of", "options_of"]

_ARITHMETIC: Final = ("add", "sub", "mul", "div", "join")


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """A node, understood.

    Attributes:
        kind: What it does to channels; "unknown" where that is not known.
        x: Its first argument.
        options: What else it depends on, by name.
        row: What is known of its operator.
    """

    kind: str
    x: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    row: Operator | None = None

    @property
    def is_transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return isinstance(self.row, Layer) and self.row.transposed


def operation_of(region: Region, node: fx.Node) -> Operation:
    """What a node does; see the module docstring."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return Operation(node.op)
    row, module = operator_at(region, node), region.module(node)
    if row is None or (module is not None and (_has_hooks(module) or len(node.args) != 1 or isinstance(row, Layer))):
        return Operation("unknown")
    x = node.args[0] if node.args else node.kwargs.get("input")
    if row.kind in _ARITHMETIC:
        # Further arguments are a factor, or how to round.
        is_plain = not node.kwargs and len(node.args) == 2
        operands = node.args if is_plain else tuple(node.all_input_nodes)
        return Operation(row.kind if is_plain else "join", options={"operands": operands}, row=row)
    options = options_of(region, node, row)
    return Operation(_kind(row, node, x, options), x, options, row)


def _has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _kind(row: Operator, node: fx.Node, x: Any, options: dict[str, Any]) -> str:
    if node.target is getattr:
        return "size" if node.args[1] == "shape" else "metadata"
    if row.kind == "elementwise" and any(argument is not x for argument in node.all_input_nodes):
        return "unknown"
    if row.kind == "dropout":  # modules follow the mode, and graphs are those of the eval mode
        return "identity" if options.get("training", False) is False else "unknown"
    return row.kind


def options_of(region: Region, node: fx.Node, row: Operator) -> dict[str, Any]:
    """What an operation depends on by name: arguments of a call, attributes of a module."""
    module = region.module(node)
    if module is not None:
        return {name: getattr(module, name, None) for name in row.options}
    options = arguments(node)
    return options | {"dim": options["axis"]} if "axis" in options else options


def nonlinearity(region: Region, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """The elementwise function a node applies to its first argument, None if it is none that is known.

    The result never works in place, whatever the node does.
    """
    row, module = operator_at(region, node), region.module(node)
    if row is None or not row.is_nonlinearity:
        return None
    if module is not None:
        return lambda z: module(z.clone())
    kwargs = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "input")}
    return lambda z: row.function(z.clone(), *node.args[1:], **kwargs)
