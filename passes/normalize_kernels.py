"""BatchNorm becomes NSConv: a layer and the BatchNorm after it turn into one layer with a normalised sparse kernel.

The kernel's equation and guards stand in `ops/nsconv.py`. It needs no batch statistics, so training works with any
batch size.

Rules
1. `bn(layer(x, weight, bias))` -> `layer(x, nsconv_weight(weight, gain, mask), shift)`, where gain and shift are the
   BatchNorm's weight and bias under their old names. A bias of the layer had no effect before the BatchNorm and is no
   longer read. A BatchNorm without affine parameters gets them (1 and 0).
2. g is the gain of the nonlinearity that follows (views in between are looked through), 1 where none does.

The BatchNorm's modules and running statistics stay in the model, so that dictionaries of the original load; they are
no longer read. A pair is rewritten only if it occurs, once, in every graph that uses one of its parts.

Refused: a BatchNorm that does not directly follow a convolution or linear layer, or whose input has other users;
a layer or BatchNorm that is called more than once; ignored layers.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedmef_fx.model import is_ignored, mask_name
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import Statistics, nsconv_weight
from fedmef_fx.passes._activations import activation_gain, nonlinearity
from fedmef_fx.passes._nodes import CONVOLUTIONS, TRANSPOSED, bound, is_view, layers, single_user, source_of_weight
from fedmef_fx.pipeline import PassResult, Refusal
from fedmef_fx.program import Program, Region, set_provenance

__all__ = ["NormalizeKernels"]

_BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclasses.dataclass(frozen=True, slots=True)
class _Pair:
    """A layer and the BatchNorm that follows it, in one graph."""

    layer: fx.Node
    norm: fx.Node
    weight: str
    path: str


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
        rewrites: list[str] = []
        refusals: list[Refusal] = []
        for region in program.regions:
            pairs, refused = self._match(region)
            refusals += [Refusal(region.full_name(path), reason) for path, reason in refused.items()]
            gains: dict[str, float] = {}
            for pair in pairs:
                self._rewrite(region, pair, gains)
            rewrites += dict.fromkeys(region.full_name(pair.path) for pair in pairs)
        return PassResult(self.name, tuple(rewrites), tuple(refusals))

    def _match(self, region: Region) -> tuple[list[_Pair], dict[str, str]]:
        """The pairs to rewrite, and per BatchNorm that stays the reason why."""
        pairs: list[_Pair] = []
        refused: dict[str, str] = {}
        for graph in region.graphs.values():
            uses = Counter(source_of_weight(region, node.args[1]) for node in layers(graph))
            norms = list(_batch_norms(region, graph))
            calls = Counter(path for _, path in norms)
            for norm, path in norms:
                reason = self._reason(region, norm, path, uses, calls)
                if reason is not None:
                    refused[path] = reason
                    continue
                layer = norm.all_input_nodes[0]
                weight = source_of_weight(region, layer.args[1])
                pairs.append(_Pair(layer, norm, str(weight), path))
        # Both graphs must agree on the form of a kernel: one that stays in one of them stays in the other.
        while True:
            weights = {pair.weight for pair in pairs if pair.path in refused}
            mixed = {
                pair.path
                for pair in pairs
                if pair.path not in refused and (pair.weight in weights or _used_otherwise(region, pair, pairs))
            }
            if not mixed:
                return [pair for pair in pairs if pair.path not in refused], refused
            refused |= dict.fromkeys(mixed, "its layer is used without it in the other mode")

    def _reason(
        self, region: Region, norm: fx.Node, path: str, uses: Counter[str | None], calls: Counter[str]
    ) -> str | None:
        before = norm.args[0] if norm.args else norm.kwargs.get("input")
        if not isinstance(before, fx.Node) or not _is_layer(before):
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
        for new in filter(None, (weight, mask, gain, shift, kernel)):
            set_provenance(new, by=self.name, origin=region.full_name(pair.path))


def _is_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and (node.target in CONVOLUTIONS or node.target is F.linear)


def _batch_norms(region: Region, graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """The BatchNorms of a graph with the path of the module that holds their parameters."""
    for node in graph.nodes:
        module = region.module(node)
        if (
            isinstance(module, _BATCH_NORMS)
            and type(module) in _BATCH_NORMS
            and not (module._forward_hooks or module._forward_pre_hooks)
        ):
            yield node, str(node.target)
        if node.op == "call_function" and node.target is F.batch_norm:
            weight = bound(node).get("weight")
            if isinstance(weight, fx.Node) and isinstance(region.tensor(weight), nn.Parameter):
                yield node, str(weight.target).rpartition(".")[0]


def _used_otherwise(region: Region, pair: _Pair, pairs: list[_Pair]) -> bool:
    """Whether some graph uses the pair's layer or BatchNorm and has no such pair."""
    for graph in region.graphs.values():
        has_layer = any(source_of_weight(region, node.args[1]) == pair.weight for node in layers(graph))
        has_norm = any(path == pair.path for _, path in _batch_norms(region, graph))
        has_pair = any(
            other.layer.graph is graph and (other.weight, other.path) == (pair.weight, pair.path) for other in pairs
        )
        if (has_layer or has_norm) and not has_pair:
            return True
    return False


def _ensure_affine(region: Region, pair: _Pair) -> None:
    norm = region.owner.get_submodule(pair.path)
    weight = region.owner.get_parameter(pair.weight)
    groups = bound(pair.layer).get("groups", 1) if pair.layer.target in TRANSPOSED else 1
    channels = weight.shape[1] * groups if pair.layer.target in TRANSPOSED else weight.shape[0]
    for name, fill in (("weight", 1.0), ("bias", 0.0)):
        if getattr(norm, name, None) is None:
            value = torch.full((channels,), fill, dtype=weight.dtype, device=weight.device)
            norm.register_parameter(name, nn.Parameter(value))


def _following_gain(region: Region, norm: fx.Node, known: dict[str, float]) -> float:
    """g of the nonlinearity that reads a node's result, 1 if there is none or not exactly one user.

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
