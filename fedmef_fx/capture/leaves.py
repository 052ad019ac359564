"""Leaves: regions of a single convolution or linear layer."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx, nn

from fedmef_fx.capture.symbolic import capture_graphs
from fedmef_fx.capture.tracer import BaseTracer
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.nodes import operator_of_module
from fedmef_fx.graph.operators import Layer
from fedmef_fx.graph.program import Region, Role
from fedmef_fx.graph.signature import AnyTensors
from fedmef_fx.records.graphs import GraphMode

__all__ = ["is_plain_layer", "layer_region", "leaf_regions"]


def leaf_regions(model: nn.Module, regions: list[Region], *, fallbacks: bool) -> Iterator[Region]:
    """Regions of single layers.

    Args:
        model: The model.
        regions: Its larger regions.
        fallbacks: Whether layers inside a region get one too.
    """
    inside = {id(module): region for region in regions for module in region.owner.modules()}
    owners = {id(region.owner) for region in regions}
    tied = _held_twice(model)
    for path, module in model.named_modules():
        if not is_plain_layer(module) or id(module) in owners:
            continue
        if id(module) in inside and (not fallbacks or id(module._parameters["weight"]) in tied):
            continue  # the mask of a tied weight stands beside one of its layers only
        yield layer_region(module, path, role="fallback" if id(module) in inside else "leaf")


def layer_region(module: nn.Module, path: str, *, role: Role) -> Region:
    """The region of a plain layer; see `is_plain_layer`."""
    return Region(path, module, _layer_graphs(module), AnyTensors(frozenset({"input"})), role=role)


def _held_twice(model: nn.Module) -> set[int]:
    """Identities of the parameters that several modules hold."""
    held = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {identity for identity, number in held.items() if number > 1}


def _layer_graphs(module: nn.Module) -> dict[GraphMode, fx.Graph]:
    """The graph of a plain layer, which needs none of what `capture_graphs` guards against."""
    row = operator_of_module(module)
    if isinstance(row, Layer) and row.transposed:  # has an optional argument
        return capture_graphs(module)
    tracer = BaseTracer(autowrap_modules=())  # replacing each function of `math` takes longer than the rest
    tracer.prepare(module)
    graph = tracer.trace(module)
    for node in graph.nodes:
        node.type = None
    return {"both": graph}


def is_plain_layer(module: nn.Module) -> bool:
    """A convolution or linear layer as torch.nn defines it, with its own parameter as weight."""
    row = operator_of_module(module)
    if isinstance(module, torch.jit.ScriptModule):
        return False
    weight = module._parameters.get("weight")
    if not isinstance(row, Layer) or not row.functions or weight is None:
        return False
    return not has_user_hooks(module) and not nn.parameter.is_lazy(weight)
