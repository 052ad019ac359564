"""Functionalize weights: layers that call a module become functional calls on `get_attr` weights.

Rules
1. `call_module` of nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d -> `get_attr` weight and bias, then
   F.linear / F.conv*d / F.conv_transpose*d. Parameters keep their names, identity and bits.
2. Functional calls of these functions take input, weight and bias by position, in this order.
3. A padding mode other than zeros -> F.pad with that mode, then the convolution without padding.

Refused: subclasses that compute something else, modules with user hooks or parametrizations, and a transposed
convolution called with `output_size`. Opaque modules with weights of their own (nn.LSTM, ...) are reported too.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from torch import fx, nn

from fedmef_fx.config import is_ignored
from fedmef_fx.graph.compiled import original_class
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.nodes import is_layer, layers
from fedmef_fx.graph.operators import Layer, bound, named, operator_of, overrides
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.records.passes import PassResult, Refusal

__all__ = ["FunctionalizeWeights"]


@dataclasses.dataclass(frozen=True)
class FunctionalizeWeights:
    """The pass of this module; see the module docstring for its rules.

    Attributes:
        ignore: Modules that are left alone, as in `Config.ignore`.
    """

    name: ClassVar[str] = "functionalize-weights"
    ignore: tuple[str | type, ...] = ()

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph."""
        rewrites: dict[str, None] = {}
        refusals: dict[str, Refusal] = {}
        for region, _, graph in program.graphs():
            for node in (*layers(graph), *graph.find_nodes(op="call_module")):
                match = self._match(region, node)
                if isinstance(match, Refusal):
                    refusals[match.where] = match
                elif match is not None:
                    self._rewrite(region, node, match)
                    name = node.name if is_layer(node) else str(node.target)
                    rewrites[region.path if region.role == "fallback" else region.full_name(name)] = None
        return PassResult(self.name, tuple(rewrites), tuple(refusals.values()))

    def _match(self, region: Region, node: fx.Node) -> "nn.Module | _Arguments | Refusal | None":
        """The module whose call becomes functional, or the order of a function's arguments; None where all is well."""
        if is_layer(node):
            arguments = _by_position(node)
            return None if arguments == (node.args, node.kwargs) else arguments
        module = region.module(node)
        if module is None or not _has_weights(module):
            return None
        name = region.full_name(str(node.target))
        reason = "ignored by Config.ignore" if is_ignored(self.ignore, name, module) else _refusal(node, module)
        return module if reason is None else Refusal(name, reason)

    def _rewrite(self, region: Region, node: fx.Node, match: "nn.Module | _Arguments") -> None:
        if isinstance(match, _Arguments):
            node.args, node.kwargs = match
            return
        graph, path, module = node.graph, str(node.target), match
        row = _layer(module)
        assert row is not None  # noqa: S101 -- _match has seen it
        with graph.inserting_before(node):
            made = [graph.get_attr(f"{path}.weight")]
            bias = None
            if getattr(module, "bias", None) is not None:
                bias = graph.get_attr(f"{path}.bias")
                made.append(bias)
            x = node.args[0] if node.args else node.kwargs["input"]
            kwargs = {name: getattr(module, name) for name in row.options}
            if getattr(module, "padding_mode", "zeros") != "zeros":
                pad = tuple(vars(module)["_reversed_padding_repeated_twice"])
                x = graph.call_function(named("pad").function, (x, pad), {"mode": vars(module)["padding_mode"]})
                kwargs["padding"] = (0,) * len(kwargs["stride"])
                made.append(x)
            call = graph.call_function(row.function, (x, made[0], bias), kwargs)
        for new in (*made, call):
            set_provenance(new, by=self.name, origin=region.full_name(path))
        node.replace_all_uses_with(call)
        graph.erase_node(node)


class _Arguments(NamedTuple):
    """The arguments of a layer in the form of rule 2."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _by_position(node: fx.Node) -> _Arguments:
    given = bound(node)
    others = {key: value for key, value in given.items() if key not in ("input", "weight", "bias")}
    return _Arguments((given["input"], given["weight"], given.get("bias")), others)


def _has_weights(module: nn.Module) -> bool:
    row = operator_of(type(module))
    if row is not None and row.has_other_parameters:
        return False
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _refusal(node: fx.Node, module: nn.Module) -> str | None:
    row = _layer(module)
    if row is None:
        return f"{type(module).__name__} is opaque to the graph: its weights are used inside it"
    if nn.utils.parametrize.is_parametrized(module):
        return f"{type(module).__name__} has parametrizations"
    if has_user_hooks(module):
        return "it has hooks of the user, which need the module call"
    if not isinstance(dict(module.named_parameters(recurse=False)).get("weight"), nn.Parameter):
        return "its weight is not a parameter (weight_norm, prune, ...)"
    if overrides(original_class(module)):
        return f"{type(module).__qualname__} overrides the computation of {row.modules[0].__name__}"
    if len(node.args) > 1 or set(node.kwargs) - {"input"}:
        return "it is called with more than its input"
    return None


def _layer(module: nn.Module) -> Layer | None:
    row = operator_of(original_class(module))
    return row if isinstance(row, Layer) and row.functions else None
