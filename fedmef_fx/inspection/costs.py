"""What layers compute: floating point operations of convolutions, linear layers and products with weights.

A weight is used once per result position, so a layer with n weights does n * positions multiply-adds, and with a mask
active * positions. One multiply-add is two operations, as in `torch.utils.flop_counter`; biases, normalisation and
elementwise operations are left out, as there.

positions = results / out_features for linear layers and convolutions (padding counts as computed), and
inputs / in_channels for transposed convolutions.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import fx, nn

from fedmef_fx.graph.nodes import operator_at
from fedmef_fx.graph.operators import Layer, bound
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import nsconv_weight
from fedmef_fx.records.graphs import TensorRecord

__all__ = ["parameter_behind", "positions_by_parameter", "weights_of"]

Tensors = Mapping[fx.Node, tuple[TensorRecord, ...]]


class _Use(NamedTuple):
    """One use of a weight.

    Attributes:
        weight: The parameter.
        positions: How often each of its elements is multiplied.
    """

    weight: nn.Parameter
    positions: float


def positions_by_parameter(program: Program, tensors: Tensors) -> dict[int, float]:
    """How often each element of a weight is used in one call of the model in eval mode.

    Args:
        program: The program.
        tensors: What example inputs showed, see `shapes.observe_tensors`.

    Returns:
        Positions by identity of the parameter, summed over its uses; weights that no known operation uses are left out.
    """
    total: dict[int, float] = defaultdict(float)
    for region in program.regions:
        if region.role == "fallback" or not region.has_mode(training=False):
            continue
        for node in region.graph_for(training=False).nodes:
            for use in _uses(region, node, tensors):
                total[id(use.weight)] += use.positions
    return dict(total)


def weights_of(region: Region, node: fx.Node, tensors: Tensors) -> list[nn.Parameter]:
    """The weights that a node multiplies with, as far as its operation is known."""
    return [use.weight for use in _uses(region, node, tensors)]


def _uses(region: Region, node: fx.Node, tensors: Tensors) -> Iterator[_Use]:
    out = tensors.get(node, ())
    if len(out) != 1:
        return
    row, module = operator_at(region, node), region.module(node)
    if row is None:
        return
    if isinstance(row, Layer):
        arguments = {} if module is not None else bound(node)
        weight = (
            parameter_behind(region, arguments.get("weight")) if module is None else module._parameters.get("weight")
        )
        x = _tensor(node.args[0] if node.args else arguments.get("input"), tensors)
        transposed = row.transposed or bool(arguments.get("transposed"))
        yield from _layer(weight, arguments.get("packed_shape"), x, out[0], transposed=transposed)
    elif row.kind == "matmul" and len(node.args) == 2:
        yield from _product(region, node, tensors, out[0])


def _layer(
    weight: nn.Parameter | None, packed_shape: Any, x: TensorRecord | None, out: TensorRecord, *, transposed: bool
) -> Iterator[_Use]:
    if weight is None or x is None:
        return
    shape = tuple(weight.shape) if packed_shape is None else tuple(packed_shape)
    if not math.prod(shape):
        return
    if transposed:
        yield _Use(weight, x.numel / shape[0])
    elif len(shape) == 2:
        yield _Use(weight, out.numel / shape[0])
    else:
        # The channel axis may be cut into groups: each result takes part in prod(shape[1:]) products.
        yield _Use(weight, out.numel * math.prod(shape[1:]) / math.prod(shape))


def _product(region: Region, node: fx.Node, tensors: Tensors, out: TensorRecord) -> Iterator[_Use]:
    left = _tensor(node.args[0], tensors)
    if left is None or not left.shape:
        return
    for argument in node.args:
        weight = parameter_behind(region, argument)
        if weight is not None and weight.numel():
            yield _Use(weight, out.numel * left.shape[-1] / weight.numel())


def _tensor(argument: object, tensors: Tensors) -> TensorRecord | None:
    records = tensors.get(argument, ()) if isinstance(argument, fx.Node) else ()
    return records[0] if len(records) == 1 else None


def parameter_behind(region: Region, argument: object) -> nn.Parameter | None:
    """The parameter that a weight argument is made from, through masks, NSConv and operations on it alone."""
    while isinstance(argument, fx.Node) and argument.op != "get_attr":
        alone = argument.target in (masked_weight, nsconv_weight) or len(argument.all_input_nodes) == 1
        if not alone or argument.op == "placeholder" or not argument.args:
            return None
        argument = argument.args[0]
    weight = region.tensor(argument)
    return weight if isinstance(weight, nn.Parameter) else None
