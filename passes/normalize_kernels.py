"""BatchNorm becomes NSConv: a layer and the BatchNorm after it turn into one layer with a normalised sparse kernel.

The kernel's equation and guards stand in `ops/nsconv.py`. It needs no batch statistics, so training works with any
batch size.

Rules
1. `bn(layer(x, weight, bias))` -> `layer(x, nsconv_weight(weight, gain, mask), shift)`, where gain and shift are the
   BatchNorm's weight and bias under their old names. A bias of the layer had no effect before the BatchNorm and is no
   longer read. A BatchNorm without affine parameters gets them (1 and 0).
2. g is the gain of the nonlinearity that follows (views in between are looked through), 1 where none does.
3. Where Python code may run instead of the graph, the two modules compute the same when called one after the other:
   `layer(x)` -> `layer(x, nsconv_weight(weight, 1, mask))` and `bn(x)` -> `channel_affine(x, gain, shift)`.
4. The stored weights of each output channel are centred over its active ones, which the kernel does anyway, so that a
   weight of 0 is one that contributes nothing: pruning small weights and growing zeros then change little. Gradient
   steps keep the sum of a channel, because the gradient of a centred kernel sums to 0.

The BatchNorm's modules and running statistics stay in the model, so that dictionaries of the original load; they are
no longer read. A pair is rewritten only if it occurs, once, in every graph that uses one of its parts.

Refused: a BatchNorm that does not directly follow a convolution or linear layer, or whose input has other users;
a layer or BatchNorm that is called more than once; one that Python code calls; ignored layers.
"""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedmef_fx.capture import capture_graphs
from fedmef_fx.capture.tracer import has_user_hooks
from fedmef_fx.compiled import original_class
from fedmef_fx.errors import CaptureError
from fedmef_fx.model import is_ignored, mask_name
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import DEGENERATE, KernelForm, Statistics, channel_affine, nsconv_weight
from fedmef_fx.passes._activations import activation_gain, nonlinearity
from fedmef_fx.passes._nodes import (
    CONVOLUTIONS,
    TRANSPOSED,
    bound,
    is_layer,
    is_view,
    layers,
    single_user,
    source_of_weight,
)
from fedmef_fx.pipeline import PassResult, Refusal
from fedmef_fx.program import GraphMode, Program, Region, set_provenance
from fedmef_fx.signature import AnyTensors

__all__ = ["NormalizeKernels"]

_BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclasses.dataclass(frozen=True, slots=True)
class _Pair:
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


@dataclasses.dataclass(frozen=True)
class NormalizeKernels:
    """The pass of this module; see the module docstring for its rules.

    Attributes:
        statistics: Mean and deviation over "active" weights or over "all".
        ignore: Modules that are left alone, as in `Config.ignore`.
    """

    name: ClassVar[str] = "normalize-kernels"
    statistics: Statistics = "active"
    ignore: tuple[str | type, ...] = ()

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph."""
        pairs, refused = self._match(program)
        refused |= _called_by_python(program)
        gains: dict[str, float] = {}
        for pair in pairs:
            self._rewrite(pair.region, pair, gains)
        if any(region.may_run_python for region in program.regions):
            self._rewrite_fallbacks(program, pairs)
        rewrites = dict.fromkeys(pair.name for pair in pairs)
        return PassResult(self.name, tuple(rewrites), tuple(Refusal(*entry) for entry in refused.items()))

    def _match(self, program: Program) -> tuple[list[_Pair], dict[str, str]]:
        """The pairs to rewrite, and per BatchNorm that stays the reason why."""
        graphs = [(region, graph) for region, _, graph in program.graphs() if region.role != "fallback"]
        pairs: list[_Pair] = []
        refused: dict[str, str] = {}
        uses: dict[int, set[fx.Graph]] = {}
        for region, graph in graphs:
            weights = Counter(source_of_weight(region, node.args[1]) for node in layers(graph))
            norms = list(_batch_norms(region, graph))
            calls = Counter(path for _, path in norms)
            parts = [id(region.attribute(target)) for target in weights if target is not None]
            for part in (*parts, *(id(region.owner.get_submodule(path)) for path in calls)):
                uses.setdefault(part, set()).add(graph)
            for norm, path in norms:
                reason = self._reason(region, norm, path, weights, calls)
                if reason is not None:
                    refused[region.full_name(path)] = reason
                    continue
                layer = norm.all_input_nodes[0]
                pairs.append(_Pair(region, layer, norm, str(source_of_weight(region, layer.args[1])), path))
        refused |= _in_some_graphs_only(pairs, uses)
        if any(region.may_run_python for region in program.regions):
            refused |= {
                pair.name: "its Python code, which may run for other calls, could not be traced on its own"
                for pair in pairs
                if pair.name not in refused and _affine_graphs(pair.region.owner.get_submodule(pair.path)) is None
            }
        return [pair for pair in pairs if pair.name not in refused], refused

    def _reason(
        self, region: Region, norm: fx.Node, path: str, uses: Counter[str | None], calls: Counter[str]
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
            if is_ignored(self.ignore, region.full_name(name), region.owner.get_submodule(name)):
                return "ignored by Config.ignore"
        return None

    def _rewrite(self, region: Region, pair: _Pair, gains: dict[str, float]) -> None:
        layer, graph = pair.layer, pair.layer.graph
        _ensure_affine(region, pair)
        masked = layer.args[1]
        is_masked = isinstance(masked, fx.Node) and masked.target is masked_weight
        with graph.inserting_before(layer):
            weight = graph.get_attr(pair.weight)
            mask = graph.get_attr(mask_name(pair.weight)) if is_masked else None
            gain, shift = graph.get_attr(f"{pair.path}.weight"), graph.get_attr(f"{pair.path}.bias")
            options = {
                "g": _following_gain(region, pair.norm, gains),
                "groups": bound(layer).get("groups", 1) if layer.target in CONVOLUTIONS else 1,
                "transposed": layer.target in TRANSPOSED,
                "statistics": self.statistics,
            }
            kernel = graph.call_function(nsconv_weight, (weight, gain, mask), options)
        orphans = [*layer.all_input_nodes[1:], *pair.norm.all_input_nodes[1:]]
        layer.args = (layer.args[0], kernel, shift)
        layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}
        pair.norm.replace_all_uses_with(layer)
        graph.erase_node(pair.norm)
        _erase_unused(orphans)
        if self.statistics == "active":
            _centre(region, pair.weight, is_masked=is_masked, options=options)
        for new in filter(None, (weight, mask, gain, shift, kernel)):
            set_provenance(new, by=self.name, origin=region.full_name(pair.path))

    def _rewrite_fallbacks(self, program: Program, pairs: list[_Pair]) -> None:
        """Rule 3, for the layers and BatchNorms of all pairs."""
        kernels = {pair.parts[0]: pair.layer.args[1] for pair in pairs}
        for region in program.regions:
            for graph in region.graphs.values() if region.role == "fallback" else ():
                for layer in layers(graph):
                    target = source_of_weight(region, layer.args[1])
                    kernel = None if target is None else kernels.get(id(region.attribute(target)))
                    if isinstance(kernel, fx.Node):
                        self._rewrite_layer(region, layer, str(target), dict(kernel.kwargs))
        norms = {pair.parts[1]: pair for pair in pairs}
        for pair in norms.values():
            norm = pair.region.owner.get_submodule(pair.path)
            graphs = _affine_graphs(norm)
            assert graphs is not None  # noqa: S101 -- _match has tried it
            program.regions.append(Region(pair.name, norm, graphs, _required(norm), role="fallback"))
            for graph in graphs.values():
                for node in graph.nodes:
                    set_provenance(node, by=self.name, origin=pair.name)

    def _rewrite_layer(self, region: Region, layer: fx.Node, target: str, options: dict[str, Any]) -> None:
        graph, masked = layer.graph, layer.args[1]
        is_masked = isinstance(masked, fx.Node) and masked.target is masked_weight
        channels = _channels(layer, region.owner.get_parameter(target))
        orphans = layer.all_input_nodes[1:]
        with graph.inserting_before(layer):
            weight = graph.get_attr(target)
            mask = graph.get_attr(mask_name(target)) if is_masked else None
            gain = graph.call_method("new_ones", (weight, (channels,)))
            kernel = graph.call_function(nsconv_weight, (weight, gain, mask), options)
        layer.args = (layer.args[0], kernel, None)
        _erase_unused(orphans)
        for new in filter(None, (weight, mask, gain, kernel)):
            set_provenance(new, by=self.name, origin=region.full_name(target))


def _batch_norms(region: Region, graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """The BatchNorms of a graph with the path of the module that holds their parameters."""
    for node in graph.nodes:
        module = region.module(node)
        if module is not None and original_class(module) in _BATCH_NORMS and not has_user_hooks(module):
            yield node, str(node.target)
        if node.op == "call_function" and node.target is F.batch_norm:
            weight = bound(node).get("weight")
            if isinstance(weight, fx.Node) and isinstance(region.tensor(weight), nn.Parameter):
                yield node, str(weight.target).rpartition(".")[0]


def _in_some_graphs_only(pairs: list[_Pair], uses: dict[int, set[fx.Graph]]) -> dict[str, str]:
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
    return {path: reason for path, module in outside if isinstance(module, _BATCH_NORMS)}


def _affine_graphs(norm: nn.Module) -> dict[GraphMode, fx.Graph] | None:
    """The forward of a BatchNorm with `channel_affine` in place of the normalisation; None if it cannot be traced."""
    if original_class(norm) in _BATCH_NORMS:
        graph = fx.Graph()
        x = graph.placeholder("input")
        graph.output(graph.call_function(channel_affine, (x, graph.get_attr("weight"), graph.get_attr("bias"))))
        return {"both": graph}
    try:
        graphs = capture_graphs(norm)
    except CaptureError:
        return None
    for graph in graphs.values():
        for node in graph.find_nodes(op="call_function", target=F.batch_norm):
            with graph.inserting_before(node):
                weight, bias = graph.get_attr("weight"), graph.get_attr("bias")
                affine = graph.call_function(channel_affine, (bound(node)["input"], weight, bias))
            node.replace_all_uses_with(affine)
            graph.erase_node(node)
    return graphs


def _required(module: nn.Module) -> AnyTensors:
    parameters = inspect.signature(module.forward).parameters.values()
    return AnyTensors(frozenset(p.name for p in parameters if p.default is inspect.Parameter.empty))


def _ensure_affine(region: Region, pair: _Pair) -> None:
    norm = region.owner.get_submodule(pair.path)
    weight = region.owner.get_parameter(pair.weight)
    channels = _channels(pair.layer, weight)
    for name, fill in (("weight", 1.0), ("bias", 0.0)):
        if getattr(norm, name, None) is None:
            value = torch.full((channels,), fill, dtype=weight.dtype, device=weight.device)
            norm.register_parameter(name, nn.Parameter(value))


def _channels(layer: fx.Node, weight: nn.Parameter) -> int:
    """Number of output channels of a layer."""
    if layer.target not in TRANSPOSED:
        return weight.shape[0]
    return int(weight.shape[1] * bound(layer).get("groups", 1))


@torch.no_grad()
def _centre(region: Region, target: str, *, is_masked: bool, options: dict[str, Any]) -> None:
    """Subtract from each row of a kernel the mean that its NSConv subtracts anyway (rule 4)."""
    weight = region.owner.get_parameter(target)
    form = KernelForm(**options)
    rows = form.rows(weight)
    mask = form.rows(region.owner.get_buffer(mask_name(target))) if is_masked else torch.ones_like(rows).bool()
    number = mask.sum(1, keepdim=True)
    mean = rows.sum(1, keepdim=True) / number.clamp_min(1)
    # Where nothing but the mean is left, NSConv does not subtract it either.
    spread = torch.where(mask, rows - mean, 0.0).norm(dim=1, keepdim=True)
    centred = (number > 1) & (spread > DEGENERATE * rows.norm(dim=1, keepdim=True))
    weight.copy_(form.kernel(torch.where(mask & centred, rows - mean, rows), weight.shape))


def _following_gain(region: Region, norm: fx.Node, known: dict[str, float]) -> float:
    """Gain of the nonlinearity that reads a node's result, 1 if there is none or not exactly one user.

    Args:
        region: The region of the node.
        norm: The node.
        known: Gains by nonlinearity, which this adds to: a model has few kinds and many of each.
    """
    node = single_user(norm)
    while node is not None and is_view(region, node):
        node = single_user(node)
    function = None if node is None else nonlinearity(region, node)
    if node is None or function is None:
        return 1.0
    kind = f"{region.module(node) or node.target} {node.args[1:]} {node.kwargs}"
    return known[kind] if kind in known else known.setdefault(kind, activation_gain(function))


def _erase_unused(nodes: list[fx.Node]) -> None:
    """Erase nodes that nothing reads any more, and then their inputs: reads of attributes and masked weights only."""
    for node in nodes:
        if not node.users and not node._erased and (node.op == "get_attr" or node.target is masked_weight):
            inputs = list(node.all_input_nodes)
            node.graph.erase_node(node)
            _erase_unused(inputs)
