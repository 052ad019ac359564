"""Find the layers with a BatchNorm after them that `normalize_kernels` may rewrite, and why others stay.

Refused: a BatchNorm that does not directly follow a convolution or linear layer, or whose input has other users;
a layer or BatchNorm that is called more than once; one that Python code calls; where Python may run, a layer with a
forward of its own, such as a convolution that computes its padding; ignored layers. A pair is found only if it occurs,
once, in every graph that uses one of its parts.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator

from torch import fx, nn

from fedmef_fx.capture import capture_graphs
from fedmef_fx.config import is_ignored
from fedmef_fx.errors import CaptureError
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.nodes import is_layer, layers, operator_at, source_of_weight
from fedmef_fx.graph.operators import Operator, bound, operator_of
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.ops.nsconv import channel_affine
from fedmef_fx.ops.scale_and_shift import ScaleAndShift
from fedmef_fx.records.graphs import GraphMode

__all__ = ["Pair", "affine_graphs", "batch_norms", "find_pairs", "is_plain_batch_norm", "only_affine"]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A layer and the BatchNorm that follows it, in one graph.

    Attributes:
        region: The region of the graph.
        layer: Node of the layer.
        norm: Node of the BatchNorm.
        weight: Target of the layer's weight.
        path: Path of the module that holds the BatchNorm's parameters.
    """

    region: Region
    layer: fx.Node
    norm: fx.Node
    weight: str
    path: str

    @property
    def parts(self) -> tuple[int, int]:
        """What the pair consists of, whichever region names it: identities of the weight and the BatchNorm."""
        return id(self.region.attribute(self.weight)), id(self.region.owner.get_submodule(self.path))

    @property
    def name(self) -> str:
        """Name of the BatchNorm in the model."""
        return self.region.full_name(self.path)


def find_pairs(program: Program, *, ignore: tuple[str | type, ...]) -> tuple[list[Pair], dict[str, str]]:
    """The pairs to rewrite, and per BatchNorm that stays the reason why.

    Args:
        program: The program.
        ignore: Modules that are left alone, as in `Config.ignore`.
    """
    graphs = [(region, graph) for region, _, graph in program.graphs() if region.role != "fallback"]
    pairs: list[Pair] = []
    refused: dict[str, str] = {}
    uses: dict[int, set[fx.Graph]] = {}
    for region, graph in graphs:
        weights = Counter(source_of_weight(region, node.args[1]) for node in layers(graph))
        norms = list(batch_norms(region, graph))
        calls = Counter(path for _, path in norms)
        parts = [id(region.attribute(target)) for target in weights if target is not None]
        for part in (*parts, *(id(region.owner.get_submodule(path)) for path in calls)):
            uses.setdefault(part, set()).add(graph)
        for norm, path in norms:
            reason = _reason(region, norm, path, weights, calls, ignore)
            if reason is not None:
                refused[region.full_name(path)] = reason
                continue
            layer = norm.all_input_nodes[0]
            pairs.append(Pair(region, layer, norm, str(source_of_weight(region, layer.args[1])), path))
    refused |= _in_some_graphs_only(pairs, uses)
    if any(region.may_run_python for region in program.regions):
        refused |= {
            pair.name: "its Python code, which may run for other calls, could not be traced on its own"
            for pair in pairs
            if pair.name not in refused and not _has_plain_form(pair.region.owner.get_submodule(pair.path))
        }
        called = {id(region.owner) for region in program.regions if region.role != "region"}
        refused |= {
            pair.name: "Python code, which may run for other calls, computes the layer before it in a way of its own"
            for pair in pairs
            if pair.name not in refused and id(_holder(pair)) not in called
        }
    found = [pair for pair in pairs if pair.name not in refused]
    return found, refused | _called_by_python(program)


def _reason(
    region: Region,
    norm: fx.Node,
    path: str,
    uses: Counter[str | None],
    calls: Counter[str],
    ignore: tuple[str | type, ...],
) -> str | None:
    before = norm.args[0] if norm.args else norm.kwargs.get("input")
    if not isinstance(before, fx.Node) or not is_layer(before):
        return "no convolution or linear layer stands directly before it"
    weight = source_of_weight(region, before.args[1])
    if weight is None:
        return "the weight of the layer before it is not a parameter of the model"
    if len(before.users) != 1:
        return "its input has other users, which need the values before it"
    if uses[weight] != 1 or calls[path] != 1:
        return "it, or the layer before it, is called more than once"
    for name in (weight.rpartition(".")[0], path):
        if is_ignored(ignore, region.full_name(name), region.owner.get_submodule(name)):
            return "ignored by Config.ignore"
    return None


def batch_norms(region: Region, graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """The BatchNorms of a graph with the path of the module that holds their parameters."""
    for node in graph.nodes:
        module = region.module(node)
        if node.op == "call_function" and node.target is channel_affine:  # of a ScaleAndShift, in a later capture
            yield node, str(node.args[1].target).rpartition(".")[0]
        if not _is_batch_norm(operator_at(region, node)):
            continue
        if module is not None and not has_user_hooks(module):
            yield node, str(node.target)
        if module is None:
            weight = bound(node).get("weight")
            if isinstance(weight, fx.Node) and isinstance(region.tensor(weight), nn.Parameter):
                yield node, str(weight.target).rpartition(".")[0]


def is_plain_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of torch, and no subclass of one."""
    row = operator_of(type(module))
    return row is not None and row.kind == "batch_norm" and type(module) in row.modules


def _is_batch_norm(row: Operator | None) -> bool:
    return row is not None and row.kind == "batch_norm"


def _in_some_graphs_only(pairs: list[Pair], uses: dict[int, set[fx.Graph]]) -> dict[str, str]:
    """Pairs that do not stand in every graph that uses their layer or their BatchNorm.

    All graphs must agree on the form of a kernel, and refusing one pair may break another.
    """
    refused: dict[str, str] = {}
    while True:
        kept = [pair for pair in pairs if pair.name not in refused]
        graphs: dict[tuple[int, int], set[fx.Graph]] = {}
        for pair in kept:
            graphs.setdefault(pair.parts, set()).add(pair.layer.graph)
        mixed = {pair.name for pair in kept if any(uses[part] != graphs[pair.parts] for part in pair.parts)}
        if not mixed:
            return refused
        refused |= dict.fromkeys(mixed, "its layer is used without it in another mode or kind of call")


def _called_by_python(program: Program) -> dict[str, str]:
    """BatchNorms outside of all graphs."""
    inside = {id(m) for region in program.regions if region.role == "region" for m in region.owner.modules()}
    reason = "Python code calls it, so that no graph shows what comes before it"
    outside = [(path, m) for path, m in program.model.named_modules() if id(m) not in inside]
    return {path: reason for path, module in outside if _is_batch_norm(operator_of(type(module)))}


def _holder(pair: Pair) -> nn.Module:
    return pair.region.owner.get_submodule(pair.weight.rpartition(".")[0])


def _has_plain_form(norm: nn.Module) -> bool:
    return is_plain_batch_norm(norm) or isinstance(norm, ScaleAndShift) or affine_graphs(norm) is not None


def affine_graphs(norm: nn.Module) -> dict[GraphMode, fx.Graph] | None:
    """The forward of a BatchNorm with `channel_affine` in place of the normalisation; None if it cannot be traced."""
    try:
        graphs = capture_graphs(norm)
    except CaptureError:
        return None
    for graph in graphs.values():
        for node in list(graph.nodes):
            if node.op != "call_function" or not _is_batch_norm(operator_of(node.target)):
                continue
            only_affine(node)
    return graphs


def only_affine(norm: fx.Node) -> fx.Node:
    """Put `channel_affine` in the place of a `batch_norm`, in place; returns it."""
    given = bound(norm)

    def read(name: str) -> fx.Node:
        value = given.get(name)
        if isinstance(value, fx.Node) and value.op != "get_attr":
            return value  # a masked read
        return norm.graph.get_attr(str(value.target) if isinstance(value, fx.Node) else name)

    with norm.graph.inserting_before(norm):
        weight, bias = read("weight"), read("bias")
        affine = norm.graph.call_function(channel_affine, (given["input"], weight, bias))
    norm.replace_all_uses_with(affine)
    norm.graph.erase_node(norm)
    return affine
