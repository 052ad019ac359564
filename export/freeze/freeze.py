"""Freeze: from a transformed model to a plain inference module that knows torch only.

Stages, each on a copy of the eval graph
1. Weights that layers compute before each call are computed once (`export/freeze/computed_weights.py`), and layers
   become functional calls on their weights (`FunctionalizeWeights`, also for ignored layers).
2. Runtime ops turn back into torch functions; packing sites and dropout go (`export/freeze/plain_ops.py`).
3. Masked weights and NSConv kernels are computed once and become plain weights (`export/freeze/weights.py`).
4. A BatchNorm that was kept is folded into the layer before it (`export/freeze/batch_norm.py`).
5. What the graph no longer refers to - masks, gains, unused layers - stays behind.

The residual factor 1 / sqrt(2) stays a multiplication: folding it into the branches would round differently, and the
branch of an identity shortcut has no weights to take it.

Where no graph runs the whole model, its Python code stays and the weights are stored plainly
(`export/freeze/restore.py`).
"""

import copy

import torch
from torch import fx, nn

from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.export.freeze.batch_norm import fold_batch_norms
from fedmef_fx.export.freeze.computed_weights import compute_weights
from fedmef_fx.export.freeze.plain_ops import restore_plain_ops
from fedmef_fx.export.freeze.plain_results import restore_plain_results
from fedmef_fx.export.freeze.restore import restore_called_layers, restore_model
from fedmef_fx.export.freeze.weights import erase_unread, fold_weights
from fedmef_fx.graph.dispatch import forget_later_hooks
from fedmef_fx.graph.emit import program_of
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.module_tree import uncompiled_model
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.pack_weights import unpack_weights
from fedmef_fx.sparse_model.gradient_masks import forget_gradient_masks
from fedmef_fx.sparse_model.masks import apply_masks
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["freeze"]

_PACKAGE = "fedmef_fx"
_CONSTANT = "fedmef_constant_"


def freeze(model: nn.Module) -> nn.Module:
    """Make a plain inference module of a transformed model: masks, NSConv and BatchNorm folded, no fedmef ops.

    Parameters keep their names where they still exist; tied weights stay tied. Not preserved: train mode behaviour,
    container and block modules (their parameters stay under the same names), unused layers, hooks on the model itself.

    Args:
        model: A transformed model, in any mode; it does not change.

    Returns:
        A module in eval mode that computes what `model.eval()` computes, up to float rounding of the folded
        BatchNorms. It can be copied and pickled, and read back where fedmef_fx is not installed, unless it returns a
        cache: torch.fx cannot read graphs with other objects than tuples, dictionaries and dataclasses. A GraphModule
        where a graph runs the model; otherwise a module of the original classes, with sparse weights.

    Raises:
        ConfigError: `model` was not made by `fedmef_fx.transform`.
        ExportError: An operation that has no plain form.

    Example:
        >>> import fedmef_fx
        >>> sparse = fedmef_fx.transform(torch.nn.Sequential(torch.nn.Linear(8, 4)), fedmef_fx.Config(density=0.5))
        >>> plain = freeze(sparse)
        >>> int((plain.get_parameter("0.weight") != 0).sum())
        16
    """
    model = uncompiled_model(model)
    if not is_transformed(model):
        raise ConfigError(
            f"freeze: {type(model).__name__} is not a transformed model; expected the result of "
            "fedmef_fx.transform(model). A plain model needs no freezing: fedmef_fx.export_onnx takes it as it is"
        )
    duplicate = copy.deepcopy(model).eval()
    apply_masks(duplicate)
    forget_gradient_masks(duplicate)  # a module with hooks would not be folded
    forget_later_hooks(duplicate)
    program = program_of(duplicate)
    unpack_weights(program)
    whole = next((region for region in program.regions if _runs_the_model(region)), None)
    if whole is None:
        return restore_model(program)
    name = str(getattr(model, "_graphmodule_cls_name", type(model).__name__)).removeprefix("Transformed")
    return _freeze_region(program, whole, class_name=f"Frozen{name}")


def _runs_the_model(region: Region) -> bool:
    """Whether a graph takes the arguments of the model's forward and runs all of it."""
    return not region.path and region.role == "region" and region.by_name and region.has_mode(training=False)


@torch.no_grad()
def _freeze_region(program: Program, region: Region, *, class_name: str) -> fx.GraphModule:
    """Fold the eval graph of a region in place, and leave the rest of its owner behind."""
    restore_called_layers(program, region)
    graph = region.graph_for(training=False)
    inference = Region(region.path, region.owner, {"both": graph})
    for node in graph.find_nodes(op="call_module"):
        compute_weights(region.owner.get_submodule(str(node.target)))
    FunctionalizeWeights().run(Program(program.model, [inference], program.transformation))
    restore_plain_ops(inference, graph)
    restore_plain_results(inference, graph)
    fold_weights(inference, graph)
    fold_batch_norms(inference, graph)
    erase_unread(graph)
    _refuse_leftovers(inference, graph)
    # GraphModule takes along only what the graph refers to.
    return fx.GraphModule(region.owner, _clean_copy(inference, graph), class_name=class_name).eval()


def _refuse_leftovers(region: Region, graph: fx.Graph) -> None:
    for node in graph.nodes:
        module = region.module(node)
        if module is not None and type(module).__module__.startswith(f"{_PACKAGE}.ops"):
            op = type(module).__qualname__
        elif callable(node.target) and str(getattr(node.target, "__module__", "")).startswith(_PACKAGE):
            op = getattr(node.target, "__qualname__", repr(node.target))
        else:
            continue
        raise ExportError(
            f"freeze: node {region.full_name(node.name)!r} calls {op}, which has no plain form here; expected only "
            "operations that fedmef_fx.passes insert"
        )


def _clean_copy(region: Region, graph: fx.Graph) -> fx.Graph:
    """The graph without tracer, annotations, provenance and stack traces, which refer to this package or to paths."""
    clean = fx.Graph()
    clean.output(clean.graph_copy(graph, {}))
    clean.set_codegen(copy.deepcopy(graph._codegen))
    for node in clean.nodes:
        node.meta = {}
        node.type = None
        if node.op == "get_attr" and str(node.target).startswith(_CONSTANT):
            plain = str(node.target).removeprefix("fedmef_")
            while hasattr(region.owner, plain) and getattr(region.owner, plain) is not region.tensor(node):
                plain += "_"
            setattr(region.owner, plain, region.tensor(node))
            node.target = plain
        if node.name.startswith("fedmef"):
            node._rename(node.name.removeprefix("fedmef_"))
    return clean
