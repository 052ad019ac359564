"""Functional layers become calls of their modules again: nn.Conv2d, nn.Linear and the like, with the bias they read.

Rules
1. A layer that reads the weight of a module of its kind, with the options of that module -> `call_module`, and the
   module holds the weight and the bias that the layer reads. A padding mode other than zeros returns to the module.
2. A normalisation that reads the tensors of a module of its kind, with its options -> `call_module`.

Layers whose weight belongs to no such module (`F.linear(x, self.weight)`), or which share a module and differ, stay.
"""

from collections import defaultdict
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fedmef_fx.export.freeze.weights import erase_unread
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.nodes import layer_row, operator_at, operator_of_module
from fedmef_fx.graph.operators import Layer, Norm, Operator, bound
from fedmef_fx.graph.program import Region

__all__ = ["call_layers"]


class _Call(NamedTuple):
    """How a functional node is written as a call of a module, which may pad its input itself."""

    path: str
    pads: bool
    bias: Tensor | None


def call_layers(region: Region, graph: fx.Graph) -> None:
    """Apply the rules of this module to a folded eval graph and the modules of its owner, in place."""
    calls: dict[str, list[tuple[fx.Node, _Call]]] = defaultdict(list)
    for node in graph.nodes:
        call = _match(region, node)
        if call is not None:
            calls[call.path].append((node, call))
    for path, matches in calls.items():
        module = region.owner.get_submodule(path)
        biases = {id(call.bias) for _, call in matches}
        called = any(str(node.target) == path for node in graph.find_nodes(op="call_module"))
        if len(biases) > 1 or (called and matches[0][1].bias is not module.bias):
            continue
        if isinstance(operator_of_module(module), Layer):
            module.register_parameter("bias", _parameter(matches[0][1].bias))
        for node, call in matches:
            _rewrite(node, call)
    erase_unread(graph)


def _parameter(bias: Tensor | None) -> nn.Parameter | None:
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)


def _match(region: Region, node: fx.Node) -> _Call | None:
    layer = layer_row(node)
    if layer is not None:
        return _layer(region, node, layer)
    row = operator_at(region, node) if node.op == "call_function" else None
    return _norm(region, node, row) if isinstance(row, Norm) else None


def _module_of(region: Region, read: object, row: Operator, leaf: str = "weight") -> tuple[str, Any] | None:
    """The module of an operator whose weight a node reads, with its path."""
    tensor = region.tensor(read)
    path, _, name = str(read.target).rpartition(".") if isinstance(read, fx.Node) else ("", "", "")
    if tensor is None or name != leaf or not path:
        return None
    module = region.owner.get_submodule(path)
    is_plain = operator_of_module(module) is row and not has_user_hooks(module)
    return (path, module) if is_plain and getattr(module, leaf, None) is tensor else None


def _layer(region: Region, node: fx.Node, row: Layer) -> _Call | None:
    given = bound(node)
    found, bias = _module_of(region, given["weight"], row), region.tensor(given.get("bias"))
    if found is None or (given.get("bias") is not None and bias is None):
        return None
    path, module = found
    options = {name: getattr(module, name) for name in row.options}
    if row.spatial and isinstance(module.padding, str) and not isinstance(given.get("padding"), str):
        options["padding"] = _in_numbers(module)
    x = given["input"]
    if row.spatial and getattr(module, "padding_mode", "zeros") != "zeros":
        padded = _unpadded(x, module)
        if padded is None:
            return None
        x, options["padding"] = padded, (0,) * row.spatial
    if options.get("padding") == given.get("padding"):  # in words
        options.pop("padding", None)
    for name, option in options.items():
        if _spread(given.get(name, 0 if "padding" in name else 1), row.spatial) != _spread(option, row.spatial):
            return None
    return _Call(path, x is not given["input"], bias)


def _in_numbers(module: Any) -> tuple[int, ...] | None:
    """Padding that a convolution states in words; None where it is not the same on both sides."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    both = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)


def _spread(value: Any, dims: int) -> Any:
    """An option for every dimension; `groups` is spread as well, which changes no comparison."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * (dims if len(value) == 1 else 1) if isinstance(value, tuple | list) else value


def _unpadded(x: object, module: Any) -> fx.Node | None:
    """What is padded in a module's mode before a layer; None for anything else."""
    row = None if not isinstance(x, fx.Node) else x.target
    if not isinstance(x, fx.Node) or getattr(row, "__name__", "") != "pad" or len(x.args) < 2:
        return None
    pad = tuple(vars(module)["_reversed_padding_repeated_twice"])
    is_same = tuple(x.args[1]) == pad and x.kwargs.get("mode") == module.padding_mode  # type: ignore[arg-type]  # sizes
    source = x.args[0]
    return source if is_same and isinstance(source, fx.Node) else None


def _norm(region: Region, node: fx.Node, row: Norm) -> _Call | None:
    given = bound(node)
    found = _module_of(region, given.get("weight"), row)
    if found is None or not isinstance(given.get("input"), fx.Node):
        return None
    path, module = found
    for name in (*row.options, "bias", "running_mean", "running_var"):
        value, own = given.get(name), getattr(module, name, None)
        if name == "eps" and name not in given and row.has_shift:
            value = 1e-5  # torch's default; RMSNorm's is None
        value = region.tensor(value) if isinstance(value, fx.Node) else value
        is_same = value is own if isinstance(own, Tensor) else _plain(value) == _plain(own)
        if not is_same:
            return None
    if given.get("training") or getattr(module, "training", False):
        return None
    return _Call(path, False, getattr(module, "bias", None))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, tuple | list) else value


def _rewrite(node: fx.Node, call: _Call) -> None:
    graph = node.graph
    padded = x = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(padded, fx.Node)  # noqa: S101 -- _match has seen it
    if call.pads:
        x = padded.args[0]
    with graph.inserting_before(node):
        node.replace_all_uses_with(graph.call_module(call.path, (x,)))
    graph.erase_node(node)
    if padded is not x and not padded.users:
        graph.erase_node(padded)
