"""The frozen model in its own class: its Python forward over layers that hold the folded weights.

Rules
1. Factors of residual sums move into layers (`export/freeze/factors.py`), and layers are modules again
   (`export/freeze/layer_calls.py`).
2. A BatchNorm that a layer has taken in becomes nn.Identity; one of a subclass, which computes more, the sequence of
   its children.

Whether the forward then computes what the frozen graph does is not assumed: it is traced, and the trace compared with
the graph (`export/freeze/same_graph.py`). Passes of the user, edits by hand and functional layers can make them differ;
then a graph is all that serves.
"""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmef_fx.capture import capture_graphs, neutral_surroundings
from fedmef_fx.errors import CaptureError
from fedmef_fx.export.freeze.batch_norm import TakenIn
from fedmef_fx.export.freeze.computed_weights import compute_weights
from fedmef_fx.export.freeze.factors import absorb_factors
from fedmef_fx.export.freeze.layer_calls import call_layers
from fedmef_fx.export.freeze.restore import forget_constants
from fedmef_fx.export.freeze.same_graph import is_same_graph
from fedmef_fx.graph.nodes import layers
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.scale_and_shift import ScaleAndShift

__all__ = ["BatchNorms", "in_own_class", "normalized_layers"]

BatchNorms: TypeAlias = Literal["fold", "keep"]


def normalized_layers(region: Region, graph: fx.Graph) -> dict[str, TakenIn]:
    """The BatchNorms whose shift a layer reads, because it has a normalised kernel, by their paths."""
    pairs: dict[str, TakenIn] = {}
    for layer in layers(graph):
        weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
        if isinstance(weight, fx.Node) and isinstance(bias, fx.Node) and weight.op == bias.op == "get_attr":
            path = str(bias.target).rpartition(".")[0]
            if isinstance(region.owner.get_submodule(path), _BatchNorm | ScaleAndShift):
                name = str(weight.target).rpartition(".")[0]
                pairs[path] = TakenIn(name, getattr(region.owner.get_submodule(name), "bias", None) is not None)
    return pairs


@torch.no_grad()
def in_own_class(
    region: Region, graph: fx.Graph, folded: Mapping[str, TakenIn], *, batch_norms: BatchNorms
) -> nn.Module | None:
    """Make a frozen model of its own class.

    Args:
        region: Its owner is the model, which has lost all of this package but the values of its weights. It does not
            change.
        graph: What it is to compute: a folded eval graph.
        folded: Where BatchNorms went, by their paths.
        batch_norms: Whether these BatchNorms go, or stay and normalise nothing.

    Returns:
        A copy in eval mode; None where its forward does not compute what the graph does.
    """
    model, wanted = copy.deepcopy(region.owner), fx.Graph()
    wanted.output(wanted.graph_copy(graph, {}))
    region = dataclasses.replace(region, owner=model, graphs={"both": wanted})
    if not absorb_factors(region, wanted):
        return None
    call_layers(region, wanted)
    if any(str(node.target).rpartition(".")[0] in folded for node in wanted.find_nodes(op="get_attr")):
        return None  # a layer that is a function reads what a BatchNorm holds
    norms = {path: model.get_submodule(path) for path in folded}
    for path, norm in norms.items():
        _replace(model, path, _without_norm(norm))
    if not _computes(region, wanted):
        return None
    forget_constants(model)
    compute_weights(model)
    if batch_norms == "keep":
        for path, norm in norms.items():
            _shift(norm, model.get_submodule(folded[path].layer), keeps_bias=folded[path].had_bias)
            _replace(model, path, norm)
    return model.eval()


def _without_norm(norm: nn.Module) -> nn.Module:
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children).eval() if children else nn.Identity().eval()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another one, under all its names."""
    old = model.get_submodule(path)
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = module


def _computes(region: Region, wanted: fx.Graph) -> bool:
    """Whether the Python forward of a region's owner does what a graph does."""
    model = region.owner
    given = {str(node.target).lstrip("*") for node in wanted.find_nodes(op="placeholder")}
    try:
        with neutral_surroundings(model):
            traces = capture_graphs(model, given=None if region.signature is None else dict.fromkeys(given))
        return is_same_graph(region, wanted, traces.get("both") or traces["eval"])
    except CaptureError:
        return False


def _shift(norm: Any, layer: Any, *, keeps_bias: bool) -> None:
    """Let a BatchNorm add the bias of the layer before it instead, and normalise nothing."""
    bias = layer.bias
    assert isinstance(bias, nn.Parameter)  # noqa: S101 -- folding has made it
    norm.running_mean = torch.zeros_like(bias)
    norm.running_var = torch.full_like(bias, 1.0 - norm.eps)
    if norm.affine:
        norm.weight, norm.bias = nn.Parameter(torch.ones_like(bias)), nn.Parameter(bias.detach().clone())
    else:  # only its mean can shift
        norm.weight, norm.bias, norm.running_mean = None, None, -bias.detach()
    layer.bias = nn.Parameter(torch.zeros_like(bias)) if keeps_bias else None
