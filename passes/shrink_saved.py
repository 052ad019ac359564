"""Shrink what autograd keeps for operations that need no activation in their backward.

Rules
1. ReLU, ReLU6, LeakyReLU -> `sign_relu`: 1 bit per element. It works in place where its input belongs to it alone, and
   so does its backward where a single layer makes its gradient.
2. Max pooling -> `max_pool`: 1 to 4 bits per result for windows of up to 16 elements, a byte for others, instead of
   the input and 8-byte indices. Where it alone reads a ReLU's result it also keeps the mask of that, 1 bit per result
   instead of 1 per element.
3. Average and adaptive average pooling -> `avg_pool`, `adaptive_avg_pool`: shapes only.
4. Dropout -> `bit_dropout`, or a `BitDropout` site where it is a module that follows the mode: 1 bit per element.

Sums, views, concatenations and means keep nothing already; GELU, SiLU and Hardswish keep their input, not their
result, so that the result can be pruned for the layers that read it.

Refused: a ReLU whose result stays dense anyway because something else keeps it (its own copy is then free), an
in-place activation whose input has other users, pooling that returns indices.
"""

import dataclasses
import operator
from functools import partial
from typing import Any, ClassVar

from torch import fx

from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.nodes import is_inplace, is_layer, is_view, layers, operator_at, owns_input, single_user
from fedmef_fx.graph.operations import operation_of
from fedmef_fx.graph.origin import provenance, set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.saves import kept_by, kept_tensors
from fedmef_fx.graph.sites import add_site
from fedmef_fx.ops.dropout import BitDropout
from fedmef_fx.ops.pooling import max_pool
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.records.passes import PassResult, Refusal

__all__ = ["ShrinkSaved", "replacement_of"]


@dataclasses.dataclass(frozen=True)
class ShrinkSaved:
    """The pass of this module; see the module docstring for its rules."""

    name: ClassVar[str] = "shrink-saved"

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph."""
        rewrites: list[str] = []
        refusals: list[Refusal] = []
        for region, _, graph in program.graphs():
            if region.role == "fallback":
                continue
            matches = {node: self._match(region, node) for node in graph.nodes}
            refusals += [match for match in matches.values() if isinstance(match, Refusal)]
            chosen = {node: match for node, match in matches.items() if isinstance(match, partial)}
            kept = kept_tensors(region, graph, rewritten={*chosen, *layers(graph)})
            for node, replacement in chosen.items():
                match = self._match_result(region, node, replacement, kept)
                if isinstance(match, Refusal):
                    refusals.append(match)
                    continue
                rewrites.append(region.full_name(node.name))
                self._rewrite(region, node, match)
            for node in graph.nodes:
                _mask_in_pooling(node)
        return PassResult(self.name, tuple(rewrites), tuple(refusals))

    def _match(self, region: Region, node: fx.Node) -> partial[Any] | Refusal | None:
        """What may take a node's place, why nothing does, or None for a node that keeps nothing, or must."""
        replacement = replacement_of(region, node)
        if replacement is not None and is_inplace(region, node) and not owns_input(region, node):
            return Refusal(region.full_name(node.name), "it works in place on a tensor with other users")
        return replacement

    def _match_result(
        self, region: Region, node: fx.Node, replacement: partial[Any], kept: dict[fx.Node, str]
    ) -> partial[Any] | Refusal:
        """What takes a node's place, now that it is known which tensors stay dense."""
        op, options = replacement.func, dict(replacement.keywords)
        if op is not sign_relu:
            return replacement
        if node in kept:
            return Refusal(region.full_name(node.name), f"its result stays dense: {kept[node]}")
        may_write, is_fresh = _may_write(region, node, kept), _gradient_is_fresh(node)
        options |= {"inplace": True} if may_write else {}
        options |= {"inplace_gradient": True} if is_fresh else {}
        return partial(op, **options)

    def _rewrite(self, region: Region, node: fx.Node, replacement: partial[Any]) -> None:
        op, options = replacement.func, replacement.keywords
        x = node.args[0] if node.args else node.kwargs["input"]
        with node.graph.inserting_before(node):
            if op is BitDropout:
                new = node.graph.call_module(add_site(region, node.name, BitDropout(**options)), (x,))
            else:
                new = node.graph.call_function(op, (x,), options)
        node.replace_all_uses_with(new)
        origin = provenance(node)
        set_provenance(new, by=self.name, origin=str(node.target) if node.op == "call_module" else node.name)
        if origin is not None:
            new.meta["fedmef_fx"]["origin"] = origin[1]
        node.graph.erase_node(node)


def replacement_of(region: Region, node: fx.Node) -> partial[Any] | None:
    """What may take a node's place; None for a node that keeps nothing, or must."""
    operation, module = operation_of(region, node), region.module(node)
    if operation.row is None or operation.row.small is None or (module is not None and has_user_hooks(module)):
        return None
    if any(isinstance(value, fx.Node) for name, value in operation.options.items() if name != "input"):
        return None
    return operation.row.small(operation.options)


def _may_write(region: Region, node: fx.Node, kept: dict[fx.Node, str]) -> bool:
    """Whether a node may write into its input: nothing else reads or keeps it, and its producer does not either."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or len(x.users) != 1 or is_view(region, x) or x in kept or x.op != "call_function":
        return False
    if is_inplace(region, x):  # the sum of `a += b` lies in a, which may have other readers
        return x.target is operator.iadd and _may_write(region, x, kept)
    row = operator_at(region, x)
    return is_layer(x) or (row is not None and row.kind in ("add", "mul") and not kept_by(region, x).output)


def _mask_in_pooling(node: fx.Node) -> None:
    """Let a pooling keep the mask of the ReLU whose result it alone reads."""
    relu = node.args[0] if node.target is max_pool else None
    if isinstance(relu, fx.Node) and relu.target is sign_relu and single_user(relu) is node:
        form = {name: value for name, value in relu.kwargs.items() if name in ("high", "slope")}
        node.kwargs = {**node.kwargs, "masks": True, **form}
        relu.kwargs = {**relu.kwargs, "masked_later": True}


def _gradient_is_fresh(node: fx.Node) -> bool:
    """Whether the gradient of a node's result is a tensor that nobody else holds: a single layer makes it."""
    reader = single_user(node)
    return reader is not None and is_layer(reader) and reader.args[0] is node
