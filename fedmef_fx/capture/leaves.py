"""Leaves: regions of a single convolution or linear layer."""

from collections import Counter
from collections.abc import Iterator
from typing import Final

import torch
from torch import fx, nn

from fedmef_fx.capture.symbolic import capture_graphs
from fedmef_fx.capture.tracer import BaseTracer
from fedmef_fx.graph.compiled import original_class
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.program import Region
from fedmef_fx.graph.signature import AnyTensors
from fedmef_fx.records.graphs import GraphMode

__all__ = ["leaf_regions"]

_LAYERS: Final = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


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
        if not _is_plain_layer(module) or id(module) in owners:
            continue
        if id(module) in inside and (not fallbacks or id(module._parameters["weight"]) in tied):
            continue  # the mask of a tied weight stands beside one of its layers only
        graphs = _layer_graphs(module)
        role = "fallback" if id(module) in inside else "leaf"
        yield Region(path, module, graphs, AnyTensors(frozenset({"input"})), role=role)  # type: ignore[arg-type]


def _held_twice(model: nn.Module) -> set[int]:
    """Identities of the parameters that several modules hold."""
    held = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {identity for identity, number in held.items() if number > 1}


def _layer_graphs(module: nn.Module) -> dict[GraphMode, fx.Graph]:
    """The graph of a plain layer, which needs none of what `capture_graphs` guards against."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # has an optional argument
        return capture_graphs(module)
    tracer = BaseTracer()
    tracer.prepare(module)
    graph = tracer.trace(module)
    for node in graph.nodes:
        node.type = None
    return {"both": graph}


def _is_plain_layer(module: nn.Module) -> bool:
    """A convolution or linear layer as torch.nn defines it, with its own parameter as weight."""
    bases = original_class(module).__mro__
    kind = next((base for base in bases if base in _LAYERS), None)
    if isinstance(module, torch.jit.ScriptModule):
        return False
    weight = module._parameters.get("weight")
    if kind is None or weight is None or has_user_hooks(module) or nn.parameter.is_lazy(weight):
        return False
    own = {name for base in bases[: bases.index(kind)] for name in vars(base)}
    return not own & {"forward", "_conv_forward"}
