"""Leaves: regions of a single convolution or linear layer."""

from collections.abc import Iterator
from typing import Final

import torch
from torch import nn

from fedmef_fx.capture.symbolic import capture_graphs
from fedmef_fx.graph.compiled import original_class
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.program import Region
from fedmef_fx.graph.signature import AnyTensors

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
    skipped = {identity for identity, region in inside.items() if not (fallbacks and region.may_run_python)}
    for path, module in model.named_modules():
        if not _is_plain_layer(module) or id(module) in owners or id(module) in skipped:
            continue
        graphs = capture_graphs(module)
        role = "fallback" if id(module) in inside else "leaf"
        yield Region(path, module, graphs, AnyTensors(frozenset({"input"})), role=role)  # type: ignore[arg-type]


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
