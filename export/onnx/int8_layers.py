"""Layers of a quantized graph that stay float32: what int8 costs each of them, and which are worth it.

The error of a layer is that of the model's outputs on calibration data with this layer alone in int8. Where all of them
together cost too much, the costliest stay float32, as few as bring the outputs near enough. What is too much stands in
`int8_costs.py`.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from onnx import ModelProto, NodeProto, TensorProto

from fedmef_fx.errors import ConfigError
from fedmef_fx.export.examples import ExampleCall
from fedmef_fx.export.onnx.int8_costs import Cost, Costs
from fedmef_fx.export.onnx.int8_records import LayerPrecision

__all__ = ["choose_layers", "int8_nodes", "with_float_nodes"]

_LARGEST_SHARE: Final = 0.3
_RANKED_ROWS: Final = 64  # are enough to tell which layer costs more
_JUDGED_ROWS: Final = 512  # of which 2 % are counted
_QUANTIZERS: Final = ("QuantizeLinear", "DequantizeLinear")


def int8_nodes(quantized: ModelProto) -> list[NodeProto]:
    """The operators that read dequantized values."""
    dequantized = {node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    others = [node for node in quantized.graph.node if node.op_type not in _QUANTIZERS]
    return [node for node in others if dequantized.intersection(node.input)]


def choose_layers(
    plain: ModelProto, quantized: ModelProto, calls: Sequence[ExampleCall], wanted: Sequence[str] | None
) -> tuple[ModelProto, list[LayerPrecision], list[str]]:
    """Keep layers in float32.

    Args:
        plain: The float32 graph.
        quantized: The same graph with all its operators in int8.
        calls: Calibration data.
        wanted: Names of layers that stay float32; None for those that int8 costs most, where it costs too much.

    Returns:
        The graph, its layers, and notices.

    Raises:
        ConfigError: A name that no layer has.
    """
    nodes = {node.name: node for node in int8_nodes(quantized)}
    labels = {name: _label(node, plain) for name, node in nodes.items()}
    if wanted is not None:
        unknown = sorted(set(wanted) - set(labels.values()))
        if unknown:
            raise ConfigError(
                f"export_onnx: float32_layers names {unknown}; expected some of {sorted(set(labels.values()))}"
            )
        kept = {name for name, label in labels.items() if label in wanted}
        graph = with_float_nodes(plain, quantized, kept) if kept else quantized
        return graph, _layers(nodes, labels, {}, kept), []
    judged = Costs(plain, calls, rows=_JUDGED_ROWS)
    whole = judged.of(quantized)
    if whole.is_allowed:
        return quantized, _layers(nodes, labels, {}, set()), []
    ranked = Costs(plain, calls, rows=_RANKED_ROWS)
    errors = {name: ranked.of(with_float_nodes(plain, quantized, nodes.keys() - {name})).error for name in nodes}
    order = sorted(errors, key=lambda name: errors[name], reverse=True)
    kept, graph, left = _fewest(judged, plain, quantized, order)
    names = ", ".join(f"{labels[name]} ({errors[name]:.1%})" for name in order if name in kept)
    notice = f"int8 changes {whole}: float32 stays in {names}, which leaves {left}"
    return graph, _layers(nodes, labels, errors, kept), [notice]


def _fewest(
    judged: Costs, plain: ModelProto, quantized: ModelProto, order: Sequence[str]
) -> tuple[set[str], ModelProto, Cost]:
    """The fewest of the costliest layers whose absence from int8 is enough; all that may be left if that is not."""
    low, high = 1, max(1, round(_LARGEST_SHARE * len(order)))
    kept = set(order[:high])
    graph = with_float_nodes(plain, quantized, kept)
    best = kept, graph, judged.of(graph)
    if not best[2].is_allowed:
        return best
    while low < high:
        middle = (low + high) // 2
        kept = set(order[:middle])
        graph = with_float_nodes(plain, quantized, kept)
        cost = judged.of(graph)
        if cost.is_allowed:
            high, best = middle, (kept, graph, cost)
        else:
            low = middle + 1
    return best


def _layers(
    nodes: Mapping[str, NodeProto], labels: Mapping[str, str], errors: Mapping[str, float], kept: Collection[str]
) -> list[LayerPrecision]:
    return [
        LayerPrecision(labels[name], node.op_type, errors.get(name), "float32" if name in kept else "int8")
        for name, node in nodes.items()
    ]


def _label(node: NodeProto, plain: ModelProto) -> str:
    weights = {tensor.name for tensor in plain.graph.initializer}
    before = next((one for one in plain.graph.node if one.name == node.name), node)
    names = [name for name in before.input if name in weights and "." in name]
    return str(names[0].rpartition(".")[0] if names else before.output[0])


def with_float_nodes(plain: ModelProto, quantized: ModelProto, names: Collection[str]) -> ModelProto:
    """A quantized graph in which some operators read float32 values, as they do in the plain graph.

    Args:
        plain: The float32 graph.
        quantized: What was made of it; it stays as it is.
        names: Of the operators.
    """
    result = copy.deepcopy(quantized)
    plain_nodes = {node.name: node for node in plain.graph.node}
    values = _FloatValues(plain, result)
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        if node.name in names and node.op_type not in _QUANTIZERS and node.name in plain_nodes:
            inputs = [values.named(name) if name else "" for name in plain_nodes[node.name].input]
            nodes += values.take_nodes()
            node.input[:] = inputs
        nodes.append(node)
    _replace_nodes(result, nodes)
    return result


class _FloatValues:
    """Names of float32 values in a quantized graph, which are added where it has none."""

    def __init__(self, plain: ModelProto, result: ModelProto) -> None:
        self._weights = {tensor.name: tensor for tensor in plain.graph.initializer}
        self._makers = {name: node for node in plain.graph.node for name in node.output}
        self._result = result
        self._made = {name: node for node in result.graph.node for name in node.output}
        self._stored = {tensor.name for tensor in result.graph.initializer}
        self._added: dict[str, str] = {}
        self._nodes: list[NodeProto] = []

    def named(self, name: str) -> str:
        """The name that a value of the plain graph has in the quantized one."""
        if name not in self._added:
            self._added[name] = self._find(name)
        return self._added[name]

    def take_nodes(self) -> list[NodeProto]:
        """Nodes that names need and that were not taken yet."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def _find(self, name: str) -> str:
        if name in self._weights:
            return self._weight(name)
        before = f"{name}_QuantizeLinear_Input"  # of an output of the model
        name_now = before if before in self._made else name
        maker, made = self._makers.get(name), self._made.get(name_now)
        if maker is None or made is None or made.op_type == maker.op_type:
            return name_now
        # The range of the quantized value cuts off what a Relu or Clip would, so it was left out.
        added = copy.deepcopy(maker)
        added.input[:] = [name_now, *(self.named(one) if one else "" for one in maker.input[1:])]
        added.output[0] = f"{name}_float32"
        added.name = f"{maker.name}_float32"
        self._nodes.append(added)
        return str(added.output[0])

    def _weight(self, name: str) -> str:
        if name in self._stored:
            return name
        tensor = TensorProto()
        tensor.CopyFrom(self._weights[name])
        if name in self._made:  # a bias has its name after it was dequantized
            tensor.name = f"{name}_float32"
        self._result.graph.initializer.append(tensor)
        return str(tensor.name)


def _replace_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    """Give a graph its nodes, without those that nothing reads, and without weights that nothing reads."""
    needed = {value.name for value in model.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_reads(node))
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    copied_nodes, copied_weights = copy.deepcopy(kept[::-1]), copy.deepcopy(weights)
    del model.graph.node[:]
    del model.graph.initializer[:]
    model.graph.node.extend(copied_nodes)
    model.graph.initializer.extend(copied_weights)


def _reads(node: NodeProto) -> Iterator[str]:
    """The values that a node reads, also inside its bodies."""
    yield from node.input
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)
