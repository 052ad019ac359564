"""Which layers have the same channels, so that a channel can leave all of them: groups for channel masks.

1. A layer makes new channels. What works on single channels passes them on: activations, norms, pooling, dropout.
2. A sum or product of two tensors ties their channels, one to one. A depthwise convolution has the channels of its
   input and takes no mask of its own.
3. Anything else (concatenation, reshapes, attention) makes channels that are tied to nobody's. Layers behind different
   unknown operations are not coupled; `compact` then removes what it can prove.
4. The bias of a layer, and the shift and running mean of a BatchNorm on its channels, are dependent channels: entries
   of switched-off channels are 0, so that a channel without weights is exactly 0.
5. A layer whose channels a LayerNorm or GroupNorm takes statistics of stays dense, with all that are tied to it: such
   channels can never leave, whatever is zero, so that masks on them would cost accuracy and save nothing. So does one
   whose channels an unknown operator reads.
6. A layer whose channels reach the model's output before another layer mixes them stays dense: its channels are classes
   or features that somebody reads.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import fx, nn

from fedmef_fx.graph.nodes import is_layer, is_transposed, layer_row, operator_at, source_of_weight
from fedmef_fx.graph.operations import operation_of
from fedmef_fx.graph.operators import Layer, bound, operator_of
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.passes._channel_flows import ChannelFlow, LayerCall
from fedmef_fx.passes._weights import reaches_output
from fedmef_fx.sparse_model.transformation import WeightChannels
from fedmef_fx.sparsity.granularity import Layout

__all__ = ["ChannelGroups", "find_channel_groups", "layout_of", "sizes_after_compact"]

# Kinds of operators.
_JOINS: Final = ("add", "sub", "mul")
_SIZES: Final = ("size", "metadata", "output")
_PER_CHANNEL: Final = (
    "batch_norm",
    "dropout",
    "elementwise",
    "group_norm",
    "identity",
    "interpolate",
    "layer_norm",
    "pool",
    "prelu",
)


@dataclasses.dataclass
class ChannelGroups:
    """What was found.

    Attributes:
        channels: Parameter name -> its layout, the first member of its group, and the group's dependent channels.
        dense: Parameter name -> why it takes no mask.
    """

    channels: dict[str, WeightChannels] = dataclasses.field(default_factory=dict)
    dense: dict[str, str] = dataclasses.field(default_factory=dict)


class _Search:
    """One walk over all graphs of a program."""

    def __init__(self, program: Program, names: Iterable[str]) -> None:
        self.program = program
        self.names = {id(program.model.get_parameter(name)): name for name in names}
        self.parents: list[int] = []
        self.group_of: dict[int, int] = {}  # identity of a weight -> its group
        self.layouts: dict[str, Layout] = {}
        self.dependents: dict[int, list[str]] = {}
        self.depthwise: dict[int, int] = {}
        self.outputs: set[int] = set()
        self.bound: dict[int, str] = {}  # group -> why its channels can never leave
        self.lost: set[int] = set()  # groups whose channels go somewhere that is not followed here
        self.calls: dict[int, LayerCall] = {}  # identity of a weight -> how it is called

    def root(self, group: int) -> int:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def union(self, left: int, right: int) -> None:
        self.parents[self.root(right)] = self.root(left)

    def fresh(self) -> int:
        self.parents.append(len(self.parents))
        return self.parents[-1]

    def walk(self, region: Region, graph: fx.Graph) -> None:
        flows: dict[fx.Node, ChannelFlow] = {}
        for node in graph.nodes:
            flow = self.layer(region, node, flows) if is_layer(node) else self.other(region, node, flows)
            if flow is not None:
                flows[node] = flow
            elif not is_layer(node) and operation_of(region, node).kind not in _SIZES:
                self.lost |= {flows[source].group for source in node.all_input_nodes if source in flows}
        for node in graph.nodes:
            if is_layer(node) and reaches_output(node):
                weight = self.weight(region, node)
                if weight is not None:
                    self.outputs.add(id(weight))

    def weight(self, region: Region, node: fx.Node) -> nn.Parameter | None:
        target = source_of_weight(region, node.args[1])
        return None if target is None else region.owner.get_parameter(target)

    def layer(self, region: Region, node: fx.Node, flows: dict[fx.Node, ChannelFlow]) -> ChannelFlow | None:
        weight = self.weight(region, node)
        if weight is None or weight.dim() < 2:
            return None
        layout = layout_of(node)
        channels, key = layout.channels(weight.shape), id(weight)
        source = flows.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        groups = int(bound(node).get("groups", 1))
        self.calls.setdefault(key, LayerCall(weight, layout, source, groups))
        inputs = weight.shape[0] if is_transposed(node) else weight.shape[1] * groups
        if groups > 1 and groups == inputs == channels and source is not None and key not in self.group_of:
            self.depthwise[key] = source.group
            self.accompany(region, node.args[2] if len(node.args) > 2 else None, source)
            return source
        if key not in self.group_of:
            self.group_of[key] = self.fresh()
        if key in self.names:
            self.layouts[self.names[key]] = layout
        row = layer_row(node)
        spatial = 0 if row is None else row.spatial
        flow = ChannelFlow(self.group_of[key], channels, row is not None and not spatial, spatial + 2 if spatial else 0)
        self.accompany(region, node.args[2] if len(node.args) > 2 else None, flow)
        return flow

    def other(self, region: Region, node: fx.Node, flows: dict[fx.Node, ChannelFlow]) -> ChannelFlow | None:
        sources = [flows[x] for x in node.all_input_nodes if x in flows]
        if not sources:
            return None
        row, module = operator_at(region, node), region.module(node)
        kind = "unknown" if row is None else row.kind
        if module is not None and kind == "batch_norm":
            self.add_dependents(region.full_name(str(node.target)), module, sources[0])
        options = operation_of(region, node).options
        if kind == "mean":
            return sources[0].averaged(options)
        if row is not None and row.name == "flatten":
            return sources[0].flattened(options)
        if row is not None and row.name == "permute":
            return sources[0].permuted(node)
        reason = self.why_bound(region, node, kind, sources[0])
        for source in sources if reason else ():
            self.bound.setdefault(source.group, reason)
        if kind in _JOINS:
            first = sources[0]
            for other in sources[1:]:
                if (other.channels, other.is_last, other.is_flat) == (first.channels, first.is_last, first.is_flat):
                    self.union(first.group, other.group)
            return first
        return sources[0] if kind in _PER_CHANNEL else None

    def why_bound(self, region: Region, node: fx.Node, kind: str, flow: ChannelFlow) -> str:
        """Why channels that a node reads can never leave; empty where they may."""
        row = operator_at(region, node)
        name = getattr(node.target, "__name__", node.target) if row is None else row.name
        if operation_of(region, node).kind == "unknown" and node.op != "output":
            return f"{name} reads all of its channels, which compact cannot take apart"
        shape = operation_of(region, node).options.get("normalized_shape") or ()
        covers = flow.is_last or not flow.rank or len(tuple(shape)) >= flow.rank - 1
        if kind == "group_norm" or (kind == "layer_norm" and covers):
            return f"{name} takes statistics over all of its channels, so that none of them can leave"
        return ""

    def accompany(self, region: Region, bias: object, flow: ChannelFlow) -> None:
        if isinstance(region.tensor(bias), nn.Parameter):
            self.dependents.setdefault(flow.group, []).append(region.full_name(str(bias.target)))  # type: ignore[attr-defined]

    def add_dependents(self, path: str, norm: nn.Module, flow: ChannelFlow) -> None:
        for leaf in ("bias", "running_mean"):
            tensor = getattr(norm, leaf, None)
            if isinstance(tensor, torch.Tensor) and len(tensor) == flow.channels:
                self.dependents.setdefault(flow.group, []).append(f"{path}.{leaf}" if path else leaf)


def find_channel_groups(program: Program, names: Iterable[str]) -> ChannelGroups:
    """Group the layers of a program; see the module docstring.

    Args:
        program: The program, before layers and norms are fused.
        names: The parameters that could take a mask.
    """
    names = list(names)
    search = _searched(program, names)
    found = ChannelGroups()
    members: dict[int, list[str]] = {}
    for name in names:
        key = id(program.model.get_parameter(name))
        if key in search.depthwise:
            found.dense[name] = "a depthwise convolution has the channels of its input, which are masked there"
        elif key in search.outputs:
            found.dense[name] = "its channels are outputs of the model"
        elif key in search.group_of:
            members.setdefault(search.root(search.group_of[key]), []).append(name)
        else:
            members[-1 - len(members)] = [name]
    bound_groups = {search.root(group): reason for group, reason in search.bound.items()}
    for group, together in members.items():
        if group in bound_groups:
            found.dense |= dict.fromkeys(together, bound_groups[group])
            continue
        dependents = _existing(
            program.model, (n for g, ns in search.dependents.items() if search.root(g) == group for n in ns)
        )
        for name in together:
            layout = search.layouts.get(name) or _layout_of_module(program.model, name)
            found.channels[name] = WeightChannels(layout, together[0], dependents if name == together[0] else ())
    _guess_classifier(found, search, names)
    return found


def _searched(program: Program, names: Iterable[str]) -> _Search:
    search = _Search(program, names)
    for region, _, graph in program.graphs():
        if region.role == "region":
            search.walk(region, graph)
    return search


def sizes_after_compact(program: Program, kept: Mapping[str, int]) -> tuple[int, int]:
    """How many weights the layers of a program have, and at most how many are left when masked channels have left.

    Args:
        program: The program, before layers and norms are fused.
        kept: Parameter name -> how many channels its mask keeps.
    """
    search = _searched(program, kept)
    lost, left = {search.root(group) for group in search.lost}, dict[int, int]()
    for name, count in kept.items():
        group = search.group_of.get(id(program.model.get_parameter(name)))
        if group is not None and search.root(group) not in lost:
            left[search.root(group)] = count
    before = after = 0
    for key, call in search.calls.items():
        size = call.weight.numel()
        share = 1.0
        if key in search.group_of:
            channels = call.layout.channels(call.weight.shape)
            share = left.get(search.root(search.group_of[key]), channels) / channels
        source = call.source
        if source is not None and (call.groups == 1 or key in search.depthwise):
            share *= left.get(search.root(source.group), source.channels) / source.channels
        before, after = before + size, after + round(size * share)
    return before, after


def _guess_classifier(found: ChannelGroups, search: _Search, names: list[str]) -> None:
    """Where no graph shows the model's output, the last weight may make it: a class must not be dropped."""
    known = any(search.outputs)
    last = names[-1] if names else None
    if not known and last is not None and last in found.channels:
        channels = found.channels[last]
        together = [name for name, other in found.channels.items() if other.leader == channels.leader]
        for name in together:
            del found.channels[name]
            found.dense[name] = "its channels may be outputs of the model: no graph shows where they go"


def _existing(model: nn.Module, names: Iterator[str]) -> tuple[str, ...]:
    """Names that the model has, each tensor once."""
    first: dict[int, str] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        first.setdefault(id(getattr(model.get_submodule(path), leaf)), name)
    return tuple(first.values())


def layout_of(node: fx.Node) -> Layout:
    """The layout of the weight that a layer node reads."""
    transposed = is_transposed(node)
    return Layout(int(bound(node).get("groups", 1)) if transposed else 1, transposed)


def _layout_of_module(model: nn.Module, name: str) -> Layout:
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    row = operator_of(type(owner))
    return Layout(owner.groups, True) if isinstance(row, Layer) and row.transposed else Layout()
