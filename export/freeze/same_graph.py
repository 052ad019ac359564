"""Whether two eval graphs over the same modules do the same, node by node.

Nodes are the same if they call the same module, or the same operator - be it as a function, a method or a module -
with the same options on the same tensors. What does nothing in eval mode is looked through. What is not known to be
the same counts as different.
"""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx, nn

from fedmef_fx.graph.nodes import operator_at
from fedmef_fx.graph.operations import operation_of
from fedmef_fx.graph.operators import Norm, Operator, arguments
from fedmef_fx.graph.program import Region

__all__ = ["is_same_graph"]

_NO_OPTION: Final = frozenset(("inplace", "self", "device", "dtype"))


class _Step(NamedTuple):
    """A node in the form in which it is compared: an operator, the nodes that it reads, its options."""

    operator: Operator
    options: dict[str, Any]


def is_same_graph(region: Region, one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs over a region's owner do the same; see the module docstring."""
    same: dict[fx.Node, object] = {}
    left, right = list(_steps(region, one, same)), list(_steps(region, other, same))
    if len(left) != len(right):
        return False
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        if not _is_same_node(region, a, b, same):
            return False
        same[a] = same[b] = number
    return True


def _steps(region: Region, graph: fx.Graph, same: dict[fx.Node, object]) -> Iterator[fx.Node]:
    """The nodes that do something; others stand for what they read."""
    for node in graph.nodes:
        if node.op == "get_attr":
            same[node] = _Read(region.attribute(str(node.target)), str(node.target))
        elif operation_of(region, node).kind == "identity":
            same[node] = node.all_input_nodes[0]
        else:
            yield node


@dataclasses.dataclass(frozen=True, eq=False)
class _Read:
    """What a `get_attr` node reads; constants that a trace has found are the same if they are equal."""

    value: Any
    target: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Read):
            return False
        if self.value is other.value:
            return True
        tensors = isinstance(self.value, Tensor) and isinstance(other.value, Tensor)
        is_constant = not isinstance(self.value, nn.Parameter) and "constant_" in self.target
        return tensors and is_constant and _is_equal(self.value, other.value)

    def __hash__(self) -> int:
        return 0  # compared only


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _resolved(value: object, same: dict[fx.Node, object]) -> Any:
    """An argument with the places of nodes instead of the nodes; tuples and lists are alike."""
    if isinstance(value, fx.Node):
        return _resolved(same[value], same) if isinstance(same[value], fx.Node) else (_NODE, same[value])
    if isinstance(value, tuple | list):
        return tuple(_resolved(part, same) for part in value)
    if isinstance(value, dict):
        return {key: _resolved(part, same) for key, part in value.items()}
    if isinstance(value, slice):
        return (slice, *(_resolved(part, same) for part in (value.start, value.stop, value.step)))
    return value


_NODE: Final = object()


def _is_same_node(region: Region, one: fx.Node, other: fx.Node, same: dict[fx.Node, object]) -> bool:
    arguments_of = [_resolved((node.args, node.kwargs), same) for node in (one, other)]
    if one.op == other.op and (one.op == "output" or one.target == other.target) and _is_alike(*arguments_of):
        return True
    left, right = _step(region, one, same), _step(region, other, same)
    if left is None or right is None or left.operator is not right.operator:
        return False
    defaults = _defaults(left.operator)
    for name in left.options.keys() | right.options.keys():
        values = [step.options.get(name, defaults.get(name)) for step in (left, right)]
        if name == "stride":  # poolings: none is the size of the window
            sizes = [step.options.get("kernel_size") for step in (left, right)]
            values = [s if _says_nothing(v) else v for s, v in zip(sizes, values, strict=True)]
        if not _is_alike(*values):
            return False
    return True


def _is_alike(one: Any, other: Any) -> bool:
    """Whether two options say the same; a number stands for one in each dimension."""
    if isinstance(one, tuple) != isinstance(other, tuple):
        many, single = (one, other) if isinstance(one, tuple) else (other, one)
        return bool(many) and isinstance(single, int) and all(part == single for part in many)
    return bool(one == other) or (_says_nothing(one) and _says_nothing(other))


def _says_nothing(option: Any) -> bool:
    """Whether an option is what operators do anyway: `is_causal=False`, `dropout_p=0.0`, `approximate="none"`."""
    return option is None or option is False or option in ("none", ()) or (isinstance(option, float) and option == 0.0)


def _step(region: Region, node: fx.Node, same: dict[fx.Node, object]) -> _Step | None:
    """A node in the form in which it is compared; None for what cannot be compared with another one."""
    row, module = operator_at(region, node), region.module(node)
    if row is None or isinstance(row, Norm):
        return None
    if module is None:
        given = arguments(node)
        names = len(given) >= len(node.args) + len(node.kwargs)
        options = _resolved(given, same) if names else None
    elif _settings(type(module)) <= {*row.options, *_NO_OPTION} and len(node.args) == 1 and not node.kwargs:
        options = {name: _resolved(getattr(module, name), same) for name in row.options}
        options["input"] = _resolved(node.args[0], same)
    else:
        options = None
    if options is None:
        return None
    x = next((options.pop(name) for name in ("input", "x", "self", "tensors") if name in options), None)
    return _Step(row, {"input": x} | {key: v for key, v in options.items() if key not in _NO_OPTION})


def _settings(cls: type[nn.Module]) -> set[str]:
    """What the modules of a class are made with."""
    return set(inspect.signature(cls.__init__).parameters)


def _defaults(row: Operator) -> dict[str, Any]:
    """What a module of an operator is made with where nothing is said."""
    parameters = [parameter for cls in row.modules[:1] for parameter in inspect.signature(cls).parameters.values()]
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
