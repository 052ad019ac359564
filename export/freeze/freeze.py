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
from typing import NamedTuple, get_args

import torch
from torch import fx, nn

from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.export.freeze.batch_norm import TakenIn, fold_batch_norms
from fedmef_fx.export.freeze.computed_weights import compute_weights
from fedmef_fx.export.freeze.layer_calls import call_layers
from fedmef_fx.export.freeze.own_class import BatchNorms, in_own_class, normalized_layers
from fedmef_fx.export.freeze.plain_ops import restore_plain_ops
from fedmef_fx.export.freeze.plain_results import restore_plain_results
from fedmef_fx.export.freeze.restore import restore_called_layers, restore_model, strip
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

__all__ = ["freeze", "frozen_graph"]

_PACKAGE = "fedmef_fx"
_CONSTANT = "fedmef_constant_"


def freeze(model: nn.Module, *, batch_norms: BatchNorms = "fold") -> nn.Module:
    """Make a plain inference module of a transformed model: masks, NSConv and BatchNorm folded, no fedmef ops.

    The result is an ordinary module of the original's class: its own forward runs nn.Conv2d, nn.Linear and the like,
    whose weights are folded; tied weights stay tied. A convolution with a bias stands for one and its BatchNorm, which
    becomes nn.Identity. What takes the original takes it, too: torch.jit, quantisation, methods of its class. Not
    preserved: train mode behaviour.

    Args:
        model: A transformed model, in any mode; it does not change.
        batch_norms: "fold" them into the layers before them; "keep" them there, where they normalise nothing, so that
            the result's `state_dict` loads into the original architecture.

    Returns:
        A module in eval mode that computes what `model.eval()` computes, up to float rounding of what is folded. It can
        be copied and pickled. Where the original's forward does not compute what the model does - passes of your own,
        graphs edited by hand, layers that are functions, sums that `residual="rescale"` scales and no layer can take
        over - the result is a torch.fx GraphModule that calls the same layers, whose BatchNorms are folded; without
        fedmef_fx it can be read unless it returns a cache. Where no graph runs the model, BatchNorms stay.

    Raises:
        ConfigError: `model` was not made by `fedmef_fx.transform`, or an unknown choice.
        ExportError: An operation that has no plain form.

    Example:
        >>> import fedmef_fx
        >>> sparse = fedmef_fx.transform(torch.nn.Sequential(torch.nn.Linear(8, 4)), fedmef_fx.Config(density=0.5))
        >>> plain = freeze(sparse)
        >>> plain
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
        >>> int((plain[0].weight != 0).sum())
        16
    """
    if batch_norms not in get_args(BatchNorms):
        raise ConfigError(f"freeze: batch_norms={batch_norms!r}; expected one of {get_args(BatchNorms)}")
    folded = _folded(model)
    if isinstance(folded, nn.Module):
        return folded
    strip(folded.region.owner)
    ordinary = in_own_class(folded.region, folded.graph, folded.batch_norms, batch_norms=batch_norms)
    if ordinary is not None:
        return ordinary
    call_layers(folded.region, folded.graph)
    return _as_graph_module(folded)


def frozen_graph(model: nn.Module) -> nn.Module:
    """`freeze`, as a graph of functions over named weights: the form that exporters read.

    Returns:
        A GraphModule where a graph runs the model; otherwise what `freeze` returns.
    """
    folded = _folded(model)
    return folded if isinstance(folded, nn.Module) else _as_graph_module(folded)


class _Folded(NamedTuple):
    """The eval graph of a copy of the model, whose weights are folded."""

    region: Region
    graph: fx.Graph
    batch_norms: dict[str, TakenIn]
    class_name: str


def _folded(model: nn.Module) -> "_Folded | nn.Module":
    """The folded graph, or the plain module where no graph runs the model."""
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
    return _fold(program, whole, class_name=f"Frozen{name}")


def _runs_the_model(region: Region) -> bool:
    """Whether a graph takes the arguments of the model's forward and runs all of it."""
    return not region.path and region.role == "region" and region.by_name and region.has_mode(training=False)


@torch.no_grad()
def _fold(program: Program, region: Region, *, class_name: str) -> _Folded:
    """Fold the eval graph of a region and the weights of its owner in place."""
    restore_called_layers(program, region)
    graph = region.graph_for(training=False)
    inference = Region(region.path, region.owner, {"both": graph}, region.signature)
    for node in graph.find_nodes(op="call_module"):
        compute_weights(region.owner.get_submodule(str(node.target)))
    FunctionalizeWeights().run(Program(program.model, [inference], program.transformation))
    restore_plain_ops(inference, graph)
    restore_plain_results(inference, graph)
    fold_weights(inference, graph)
    batch_norms = normalized_layers(inference, graph) | fold_batch_norms(inference, graph)
    erase_unread(graph)
    _refuse_leftovers(inference, graph)
    return _Folded(inference, graph, batch_norms, class_name)


def _as_graph_module(folded: _Folded) -> fx.GraphModule:
    # GraphModule takes along only what the graph refers to.
    clean = _clean_copy(folded.region, folded.graph)
    return fx.GraphModule(folded.region.owner, clean, class_name=folded.class_name).eval()


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
