"""Freeze where Python still runs: the model becomes what it was, with its sparse weights stored plainly.

For calls that no graph serves, a transformed model runs the original forward over its layers, so masks and NSConv hold
in the layers themselves. Freezing makes that permanent:

1. A weight with an NSConv kernel -> the kernel without gain (g * b / sqrt(s)), and the layer loses its bias, which
   BatchNorm cancelled. Its BatchNorm keeps gain and shift, and gets statistics that normalise nothing.
2. Masked weights are 0 where masked already; masks, hooks, packing sites and graphs go, classes return.
3. Weights that layers compute before each call are computed once (`export/freeze/computed_weights.py`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fedmef_fx.errors import ExportError
from fedmef_fx.export.freeze.computed_weights import compute_weights
from fedmef_fx.graph.emit import restore_classes
from fedmef_fx.graph.operators import operator_of
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.sites import SITES
from fedmef_fx.ops.nsconv import KernelForm, nsconv_kernel
from fedmef_fx.ops.scale_and_shift import ScaleAndShift
from fedmef_fx.passes._nsconv_layers import StoredKernel, stored_kernels
from fedmef_fx.sparse_model.masks import mask_name
from fedmef_fx.sparse_model.state_dicts import forget_load_hooks
from fedmef_fx.sparse_model.transformation import CHILD_NAME, transformation_of

__all__ = ["forget_constants", "restore_called_layers", "restore_model", "strip"]

_CONSTANT = "fedmef_constant_"


@torch.no_grad()
def restore_model(program: Program) -> nn.Module:
    """Turn a transformed model back into a plain one, in place; see the module docstring.

    Raises:
        ExportError: An NSConv that exists in a graph only, so that the plain layers would compute something else.
    """
    model, layers = program.model, [region for region in program.regions if region.role != "region"]
    plain = {id(weight) for region in layers for weight, _ in _kernels(region)}
    for region in program.regions:
        for weight, kernel in _kernels(region):
            if id(weight) not in plain:
                raise ExportError(
                    f"freeze: node {region.full_name(kernel.node.name)!r} has a kernel that its layer has not, and "
                    'Python may call the layer; transform the model with Config(normalization="keep")'
                )
    for region in layers:
        _store_kernels(region)
    strip(model)
    forget_constants(model)
    compute_weights(model.eval())
    return model


def strip(model: nn.Module) -> None:
    """Take away all that a transformation added to a model but constants of its graphs, in place."""
    for name, prunable in transformation_of(model).prunable.items():
        if prunable.masked:
            path, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(path), mask_name(leaf))
        for dependent in prunable.channels.dependents if prunable.masked and prunable.channels else ():
            path, _, leaf = dependent.rpartition(".")
            model.get_submodule(path)._buffers.pop(mask_name(leaf), None)
    restore_classes(model)
    for module in model.modules():
        if isinstance(module, ScaleAndShift):
            module.restore()
    forget_load_hooks(model)
    for module in list(model.modules()):
        _strip(module)


def _kernels(region: Region) -> Iterator[tuple[nn.Parameter, StoredKernel]]:
    """The parameters of a region that are read through NSConv, with the kernels."""
    for graph in region.graphs.values():
        for kernel in stored_kernels(graph):
            yield region.owner.get_parameter(str(kernel.weight.target)), kernel


def _store_kernels(region: Region) -> None:
    """Write the kernels of a layer, or neutral statistics into a BatchNorm that only scales and shifts."""
    owner: Any = region.owner
    row = operator_of(type(owner))
    if row is not None and row.kind == "batch_norm":
        owner.running_mean = torch.zeros(owner.num_features)
        owner.running_var = torch.full((owner.num_features,), 1.0 - owner.eps)
        owner.to(next(owner.parameters()))
        return
    for weight, kernel in _kernels(region):
        mask = None if kernel.mask is None else region.tensor(kernel.mask)
        form = KernelForm(**kernel.options)
        gain = weight.new_ones(form.rows(weight).shape[0])
        weight.copy_(nsconv_kernel(weight, gain, mask, form))
        owner.register_parameter("bias", None)


@torch.no_grad()
def restore_called_layers(program: Program, region: Region) -> None:
    """Make the layers that a region's graphs call as modules plain, in place: hooks or other layers stand between."""
    called = {id(region.module(node)) for graph in region.graphs.values() for node in graph.nodes}
    for layer in program.regions:
        if layer is not region and id(layer.owner) in called:
            _store_kernels(layer)
            restore_classes(layer.owner)


def _strip(module: nn.Module) -> None:
    """Take away what a transformation added to a module."""
    for child in (CHILD_NAME, SITES):
        if child in module._modules:
            delattr(module, child)


def forget_constants(model: nn.Module) -> None:
    """Take away the constants that captures found in Python, which its code makes itself, in place."""
    for module in model.modules():
        for name in [name for name in module._buffers if name.startswith(_CONSTANT)]:
            delattr(module, name)
