"""Pack weights: of a masked weight only the active values live, as a parameter `[active]` with a bitmap next to it.

Rules
1. A convolution or linear layer on a masked or normalised weight that is not a pruned layer yet, because no activation
   is pruned, becomes `pruned_convolution` / `pruned_linear` without a packed input. It computes the same.
2. `pruned_*(x, packed, weight, bias, gain, weight_mask)` -> `pruned_*(x, packed, weight, bias, gain, weight_bitmap,
   packed_shape=...)`.
3. The parameter `weight`, under all of its names, becomes one of the active values in row-major order; the buffer
   `weight_mask` becomes `weight_bitmap`.

A weight is packed only if all that can ever read it takes the packed form. Refused, and stored dense: a weight that
Python code may read, because no graph serves all calls of the model; one that an opaque module holds (nn.LSTM); one
that something else than a convolution or linear layer reads; a layer whose geometry is not static; weights that are
not floating point numbers of 16, 32 or 64 bits.

`unpack_weights` undoes rules 2 and 3.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn

from fedmef_fx.graph.nodes import is_layer
from fedmef_fx.graph.origin import provenance, set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import nsconv_weight
from fedmef_fx.packing.bitmap import pack_bits
from fedmef_fx.packing.words import SUPPORTED_DTYPES
from fedmef_fx.passes._pruned_layers import geometry_of, prune_layer
from fedmef_fx.records.passes import PassResult, Refusal
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter, bitmap_name, mask_name
from fedmef_fx.sparse_model.parameters import masked_parameters

__all__ = ["PackWeights", "pack_again", "unpack_weights"]

_PRUNED = (pruned_convolution, pruned_linear)
_WEIGHT, _MASK = 2, 5
"""Where a pruned layer takes its weight and its mask."""


class _Use(NamedTuple):
    """A layer that reads a weight.

    Attributes:
        region: The region of its graph.
        node: The layer.
        geometry: What makes a pruned layer of it; None if it is one.
    """

    region: Region
    node: fx.Node
    geometry: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class PackWeights:
    """The pass of this module; see the module docstring for its rules."""

    name: ClassVar[str] = "pack-weights"

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every masked weight that is stored dense."""
        why_python = _why_python_may_read(program)
        rewrites, refusals = [], []
        for name, entry in masked_parameters_of(program).items():
            if entry.is_packed:
                continue
            uses = self._match(program, name, entry, why_python)
            if isinstance(uses, Refusal):
                refusals.append(uses)
                continue
            self._rewrite(program, name, entry, uses)
            rewrites.append(name)
        program.transformation.guarded = tuple(name for name in program.transformation.guarded if name not in rewrites)
        return PassResult(self.name, tuple(rewrites), tuple(refusals))

    def _match(self, program: Program, name: str, parameter: MaskedParameter, why_python: str) -> list[_Use] | Refusal:
        """Everything that reads a weight, or why it stays dense."""
        if program.transformation.prunable[name].tier == "hook":
            return Refusal(name, "it is used inside an opaque module")
        if why_python:
            return Refusal(name, why_python)
        if parameter.parameter.dtype not in SUPPORTED_DTYPES:
            return Refusal(name, f"it is of {parameter.parameter.dtype}")
        uses: list[_Use] = []
        with_graphs = {id(region.owner) for region in program.regions if region.role != "region"}
        for region, _, graph in program.graphs():
            for node in graph.nodes:
                module = region.module(node)
                # Python code of a module without a graph may read what is inside of it, where layers have graphs, too.
                inside = () if module is None or id(module) in with_graphs else module.parameters()
                if any(p is parameter.parameter for p in inside):
                    return Refusal(name, f"{type(module).__name__} reads it where no graph shows how")
            for use in _uses(region, graph, parameter):
                if isinstance(use, str):
                    return Refusal(name, use)
                uses.append(use)
        return uses or Refusal(name, "no layer of a graph reads it")

    def _rewrite(self, program: Program, name: str, parameter: MaskedParameter, uses: list[_Use]) -> None:
        owner, _, leaf = name.rpartition(".")
        program.model.get_submodule(owner).register_buffer(bitmap_name(leaf), pack_bits(parameter.buffer))
        for region, node, geometry in uses:
            layer = node if geometry is None else prune_layer(node, None, geometry, by=self.name)
            mask = layer.args[_MASK]
            assert isinstance(mask, fx.Node)  # noqa: S101 -- _uses has seen it
            target = str(mask.target).removesuffix(mask_name("")) + bitmap_name("")
            _read_instead(layer, target, by=self.name, origin=region.full_name(str(mask.target)))
            layer.kwargs = {**layer.kwargs, "packed_shape": tuple(parameter.shape)}
        _replace(program.model, parameter.parameter, parameter.values())
        delattr(program.model.get_submodule(owner), mask_name(leaf))
        _note(program, name, tuple(parameter.shape))


def pack_again(program: Program) -> str:
    """Undo `unpack_weights` where more graphs were captured since; Python calls layers that have graphs of their own.

    Returns:
        Why a weight cannot be packed; nothing has changed then. Empty otherwise.
    """
    step = PackWeights()
    found = []
    for name, entry in masked_parameters_of(program).items():
        uses = step._match(program, name, entry, "")
        if isinstance(uses, Refusal):
            return f"{uses.where}: {uses.reason}"
        found.append((name, entry, uses))
    for name, entry, uses in found:
        step._rewrite(program, name, entry, uses)
    return ""


def masked_parameters_of(program: Program) -> dict[str, MaskedParameter]:
    """`masked_parameters` of a program, whose model need not have its transformation yet."""
    return masked_parameters(program.model, transformation=program.transformation)


def _why_python_may_read(program: Program) -> str:
    """Why Python code may run instead of a graph; empty if it never does."""
    whole = [region for region in program.regions if region.role == "region" and not region.path]
    modes = {mode for region in whole if region.signature is None for mode in region.graphs}
    if "both" in modes or modes == {"train", "eval"}:
        return ""
    if whole:
        return "Python code runs, and may read it, in calls that differ from the example"
    return "Python code calls the layers, and may read it: no graph covers the whole model"


def _uses(region: Region, graph: fx.Graph, parameter: MaskedParameter) -> Iterator[_Use | str]:
    """The layers of a graph that read a weight, and a reason for each reader that is none."""
    for node in graph.find_nodes(op="get_attr"):
        if region.tensor(node) is not parameter.parameter:
            continue
        for user in node.users:
            if user.target in _PRUNED and _is_masked(region, user.args[_WEIGHT : _MASK + 1 : 3], node, parameter):
                yield _Use(region, user, None)
            elif user.target is masked_weight or user.target is nsconv_weight:
                mask = user.args[1] if user.target is masked_weight else user.args[2]
                if not _is_masked(region, (user.args[0], mask), node, parameter):
                    yield f"{user.name} reads it without its mask"
                yield from _layers_on(region, user, parameter)
            elif user.target != "new_ones":  # asks for its type only
                yield f"{user.name} reads it, which is no convolution or linear layer"


def _is_masked(region: Region, given: tuple[Any, ...], weight: fx.Node, parameter: MaskedParameter) -> bool:
    return given[0] is weight and region.tensor(given[1]) is parameter.buffer


def _layers_on(region: Region, weight: fx.Node, parameter: MaskedParameter) -> Iterator[_Use | str]:
    """The layers that read a masked or normalised weight."""
    for user in weight.users:
        if not is_layer(user) or user.args[1] is not weight or user.args[0] is weight:
            yield f"{user.name} reads it, which is no convolution or linear layer"
            continue
        geometry = geometry_of(user, parameter.parameter)
        yield geometry if isinstance(geometry, str) else _Use(region, user, geometry)


def _read_instead(layer: fx.Node, target: str, *, by: str, origin: str) -> None:
    """Let a pruned layer read another mask or bitmap."""
    old = layer.args[_MASK]
    with layer.graph.inserting_before(layer):
        new = layer.graph.get_attr(target)
    set_provenance(new, by=by, origin=origin)
    layer.update_arg(_MASK, new)
    if isinstance(old, fx.Node) and not old.users:
        layer.graph.erase_node(old)


def _replace(model: nn.Module, parameter: nn.Parameter, value: Tensor) -> None:
    """Put a new parameter in the place of another, under all of its names."""
    new = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for leaf, held in module._parameters.items():
            if held is parameter:
                module._parameters[leaf] = new


def _note(program: Program, name: str, packed_shape: tuple[int, ...] | None) -> None:
    prunable = program.transformation.prunable[name]
    program.transformation.prunable[name] = dataclasses.replace(prunable, packed_shape=packed_shape)


@torch.no_grad()
def unpack_weights(program: Program) -> None:
    """Store every packed weight of a program dense again, in place; the caller compiles the graphs again."""
    for name, entry in masked_parameters_of(program).items():
        if not entry.is_packed:
            continue
        path, _, leaf = name.rpartition(".")
        owner = program.model.get_submodule(path)
        owner.register_buffer(mask_name(leaf), entry.mask)
        for region, _, graph in program.graphs():
            for node in graph.find_nodes(op="get_attr"):
                if region.tensor(node) is not entry.buffer:
                    continue
                target = str(node.target).removesuffix(bitmap_name("")) + mask_name("")
                by, origin = provenance(node) or (PackWeights.name, name)
                for layer in list(node.users):
                    _read_instead(layer, target, by=by, origin=origin)
                    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "packed_shape"}
        _replace(program.model, entry.parameter, entry.dense())
        delattr(owner, bitmap_name(leaf))
        _note(program, name, None)
