"""Capturing a region whose weights are packed: they are dense while it lasts, and the same objects afterwards."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from fedmef_fx.config import Config
from fedmef_fx.errors import CaptureError
from fedmef_fx.graph.emit import recompile, regions_in
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.passes.pack_weights import pack_again, unpack_weights
from fedmef_fx.sparse_model.masked_parameter import bitmap_name
from fedmef_fx.sparse_model.prunable import PrunableParameter
from fedmef_fx.sparse_model.transformation import Transformation

__all__ = ["dense_weights"]


class _Packed(NamedTuple):
    """A packed weight.

    Attributes:
        owner: The module that holds it.
        leaf: Its name there.
        parameter: The active values.
        bitmap: Which they are.
    """

    owner: nn.Module
    leaf: str
    parameter: nn.Parameter
    bitmap: Tensor


@contextlib.contextmanager
def dense_weights(module: nn.Module, config: Config, captured: list[Region]) -> Iterator[None]:
    """A block in which the packed weights of a module and the graphs of its layers are dense.

    Args:
        module: The module.
        config: Of the transformation.
        captured: Gains in the block the regions that are captured; they read packed weights afterwards. It is empty
            then if they cannot.

    Raises:
        CaptureError: A weight that no layer reads by a graph of its own.
    """
    packed = list(_packed(module))
    if not packed:
        yield
        return
    shapes = _shapes(module)
    layers = Program(
        module, [region for region in regions_in(module) if region.role != "region"], Transformation(config)
    )
    paths = {id(child): path for path, child in module.named_modules()}
    for weight in packed:
        if id(weight.parameter) not in shapes:
            raise CaptureError(f"no layer shows the shape of {weight.leaf}")
        name = ".".join(filter(None, (paths[id(weight.owner)], weight.leaf)))
        shape = shapes[id(weight.parameter)]
        row = PrunableParameter(name, Tensor(*shape).numel(), tier="graph", packed_shape=shape)
        layers.transformation.prunable[name] = row
    unpack_weights(layers)
    recompile(module)
    try:
        yield
    finally:
        refused = pack_again(Program(module, [*layers.regions, *captured], layers.transformation))
        if refused:
            captured.clear()  # Python runs instead
            pack_again(layers)
        for weight in packed:
            weight.owner._parameters[weight.leaf] = weight.parameter
            weight.owner._buffers[bitmap_name(weight.leaf)] = weight.bitmap
        recompile(module)


def _packed(module: nn.Module) -> Iterator[_Packed]:
    for child in module.modules():
        for leaf, parameter in child._parameters.items():
            bitmap = child._buffers.get(bitmap_name(leaf))
            if parameter is not None and bitmap is not None:
                yield _Packed(child, leaf, parameter, bitmap)


def _shapes(module: nn.Module) -> dict[int, tuple[int, ...]]:
    """Dense shapes by identity of the packed parameter, as the graphs of layers have them."""
    shapes = {}
    for region in regions_in(module):
        for graph in region.graphs.values():
            for node in graph.nodes:
                if "packed_shape" in node.kwargs:
                    shapes[id(region.tensor(node.args[2]))] = tuple(node.kwargs["packed_shape"])
    return shapes
