"""Shrink what autograd keeps for operations that need no activation in their backward.

Rules
1. ReLU, ReLU6, LeakyReLU -> `sign_relu`: 1 bit per element. It works in place where its input belongs to it alone, and
   so does its backward where a single layer makes its gradient.
2. Max pooling -> `max_pool`: one byte per result instead of the input and 8-byte indices.
3. Average and adaptive average pooling -> `avg_pool`, `adaptive_avg_pool`: shapes only.
4. Dropout -> `bit_dropout`, or a `BitDropout` site where it is a module that follows the mode: 1 bit per element.

Sums, views, concatenations and means keep nothing already; GELU, SiLU and Hardswish keep their input, not their
result, so that the result can be pruned for the layers that read it.

Refused: a ReLU whose result stays dense anyway because something else keeps it (its own copy is then free), an
in-place activation whose input has other users, pooling that returns indices.
"""

import dataclasses
import math
import operator
from functools import partial
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedmef_fx.graph.nodes import ADDITIONS, bound, is_inplace, is_layer, is_view, layers, owns_input, single_user
from fedmef_fx.graph.origin import provenance, set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.saves import kept_by, kept_tensors
from fedmef_fx.graph.sites import add_site
from fedmef_fx.ops.dropout import BitDropout, bit_dropout
from fedmef_fx.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.records.passes import PassResult, Refusal

__all__ = ["ShrinkSaved", "replacement_of"]

_MAX_POOLS: Final[dict[Any, int]] = {F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3}
_AVG_POOLS: Final[dict[Any, int]] = {F.avg_pool2d: 2, F.avg_pool3d: 3}
_ADAPTIVE_POOLS: Final[dict[Any, int]] = {F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}
_RELUS: Final = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


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
    module = region.module(node)
    if module is not None:
        return _match_module(module)
    if node.op not in ("call_function", "call_method"):
        return None
    return _match_function(node)


def _match_module(module: nn.Module) -> partial[Any] | None:
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if kind is nn.Dropout:
        return partial(BitDropout, p=module.p)  # type: ignore[arg-type]  # a float, as torch declares nowhere
    if kind in (nn.ReLU, nn.ReLU6):
        return partial(sign_relu, high=6.0 if kind is nn.ReLU6 else math.inf)
    if isinstance(module, nn.LeakyReLU) and module.negative_slope > 0:
        return partial(sign_relu, slope=module.negative_slope)
    if kind in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d):
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        return _max_pool(int(kind.__name__[-2]), **{name: vars(module)[name] for name in names})
    if kind in (nn.AvgPool2d, nn.AvgPool3d):
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        return _avg_pool(int(kind.__name__[-2]), **{name: vars(module)[name] for name in names})
    if kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d):
        return _adaptive_pool(int(kind.__name__[-2]), module.output_size)
    return None


def _match_function(node: fx.Node) -> partial[Any] | None:
    target = node.target
    if target in _RELUS:
        return partial(sign_relu, high=math.inf)
    if target is F.relu6:
        return partial(sign_relu, high=6.0)
    if target is F.leaky_relu:
        slope = bound(node).get("negative_slope", 0.01)
        return partial(sign_relu, slope=slope) if isinstance(slope, float) and slope > 0 else None
    if target is F.dropout:
        arguments = bound(node)
        p, training = arguments.get("p", 0.5), arguments.get("training", True)
        static = isinstance(p, float | int) and isinstance(training, bool) and not arguments.get("inplace", False)
        return partial(bit_dropout, p=p, training=training) if static else None
    if target not in _MAX_POOLS and target not in _AVG_POOLS and target not in _ADAPTIVE_POOLS:
        return None
    options: dict[str, Any] = {key: value for key, value in _pool_arguments(node).items() if key != "input"}
    if any(isinstance(value, fx.Node) for value in options.values()):
        return None
    if target in _MAX_POOLS:
        return _max_pool(_MAX_POOLS[target], **{"stride": None, **options})
    if target in _AVG_POOLS:
        return _avg_pool(_AVG_POOLS[target], **{"stride": None, **options})
    return _adaptive_pool(_ADAPTIVE_POOLS[target], **options)


def _pool_arguments(node: fx.Node) -> dict[str, Any]:
    names = {
        **dict.fromkeys(
            _MAX_POOLS, ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        ),
        **dict.fromkeys(
            _AVG_POOLS,
            ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        ),
        **dict.fromkeys(_ADAPTIVE_POOLS, ("input", "output_size")),
    }[node.target]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _per_dimension(value: Any, dims: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def _max_pool(
    dims: int,
    kernel_size: Any,
    stride: Any,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> partial[Any] | None:
    if return_indices:
        return None
    kernel = _per_dimension(kernel_size, dims)
    return partial(
        max_pool,
        kernel=kernel,
        stride=_per_dimension(stride, dims) if stride not in (None, ()) else kernel,
        padding=_per_dimension(padding, dims),
        dilation=_per_dimension(dilation, dims),
        ceil_mode=ceil_mode,
    )


def _avg_pool(
    dims: int,
    kernel_size: Any,
    stride: Any,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> partial[Any]:
    kernel = _per_dimension(kernel_size, dims)
    return partial(
        avg_pool,
        kernel=kernel,
        stride=_per_dimension(stride, dims) if stride not in (None, ()) else kernel,
        padding=_per_dimension(padding, dims),
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )


def _adaptive_pool(dims: int, output_size: Any) -> partial[Any]:
    return partial(adaptive_avg_pool, output_size=_per_dimension(output_size, dims))


def _may_write(region: Region, node: fx.Node, kept: dict[fx.Node, str]) -> bool:
    """Whether a node may write into its input: nothing else reads or keeps it, and its producer does not either."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or len(x.users) != 1 or is_view(region, x) or x in kept or x.op != "call_function":
        return False
    if is_inplace(region, x):  # the sum of `a += b` lies in a, which may have other readers
        return x.target is operator.iadd and _may_write(region, x, kept)
    makes_new = x in set(layers(x.graph)) or x.target in ADDITIONS
    return makes_new or (not kept_by(region, x).output and x.target in (operator.mul, torch.mul))


def _gradient_is_fresh(node: fx.Node) -> bool:
    """Whether the gradient of a node's result is a tensor that nobody else holds: a single layer makes it."""
    reader = single_user(node)
    return reader is not None and is_layer(reader) and reader.args[0] is node
