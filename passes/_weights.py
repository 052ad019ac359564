"""Which parameters are weights: what convolutions, linear layers and matrix products multiply with.

A weight is read directly, through views, or as the only variable part of a computation such as a weight norm. Code
that no graph shows is known from the modules of torch.nn that it calls, and from a recording of an example call.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from fedmef_fx.graph.nodes import is_layer, source_of_weight
from fedmef_fx.graph.operators import Operator, bound, operator_of
from fedmef_fx.graph.program import Program, Region

__all__ = [
    "embedded",
    "is_depthwise",
    "is_factor",
    "keeps_zeros",
    "layer_path",
    "opaque_weights",
    "output_weights",
    "reaches_output",
    "reading_regions",
]

_REPARAMETRIZED: Final = ("weight_orig", "weight_v")  # torch.nn.utils.prune and spectral_norm, weight_norm


def reading_regions(program: Program) -> dict[int, Region]:
    """The best region that reads each weight that graphs read, by identity of the parameter."""
    found: dict[int, Region] = {}
    for region, _, graph in program.graphs():
        if region.role == "fallback" and program.is_one_graph:
            continue  # forward reads what the graph shows, and opaque modules the rest
        for parameter in _weights_of(region, graph):
            known = found.get(id(parameter))
            if known is None or (region.role == "region" and known.role != "region"):
                found[id(parameter)] = region
    return found


def _weights_of(region: Region, graph: fx.Graph) -> Iterator[nn.Parameter]:
    for node in graph.nodes:
        for argument in _weight_arguments(node):
            target = source_of_weight(region, argument)
            if target is not None:
                yield region.owner.get_parameter(target)
            elif isinstance(argument, fx.Node):
                yield from _computed_from(region, argument)


def _weight_arguments(node: fx.Node) -> list[Any]:
    if node.op not in ("call_function", "call_method"):
        return []
    row = operator_of(node.target)
    if row is None or not row.weights or row.plain is not None:
        return []
    if row.weights == ("*",):
        return list(node.all_input_nodes)
    given = bound(node)
    return [given.get(argument) for argument in row.weights]


def _computed_from(region: Region, node: fx.Node) -> list[nn.Parameter]:
    """The largest parameters that a weight is computed from, if it is computed from the model alone."""
    parameters: dict[int, nn.Parameter] = {}
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op in ("placeholder", "call_module"):
            return []
        if current.op == "get_attr":
            found = region.tensor(current)
            if isinstance(found, nn.Parameter):
                parameters[id(found)] = found
        waiting += current.all_input_nodes
    size = max((p.numel() for p in parameters.values()), default=0)
    return [p for p in parameters.values() if p.numel() == size and p.dim() > 1]


def opaque_weights(program: Program) -> set[str]:
    """Names of the weights that modules or Python code use where no graph shows it."""
    called = _called_modules(program)
    found = {name for name in program.products if program.model.get_parameter(name).dim() > 1}
    for path, module in program.model.named_modules():
        row = operator_of(type(module))
        if row is None or not row.weights or not (called is None or id(module) in called):
            continue
        prefix = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1 and ("weight" in leaf or leaf in _REPARAMETRIZED):
                found.add(prefix + leaf)
        if parametrize.is_parametrized(module):
            found |= {f"{prefix}parametrizations.{rest}" for rest in _originals(module)}
    return found


def _originals(module: nn.Module) -> Iterator[str]:
    """The parameters behind a module's parametrized tensors, where they have the shape of the tensor itself."""
    for name, stack in module.parametrizations.items():  # type: ignore[union-attr,operator]  # a ModuleDict
        shape = _computed(stack).shape
        for leaf, parameter in stack._parameters.items():
            if parameter is not None and parameter.shape == shape and parameter.dim() > 1:
                yield f"{name}.{leaf}"


def _called_modules(program: Program) -> set[int] | None:
    """Modules that graphs call and what they hold; None where Python code may call any."""
    if not program.is_one_graph and not _covers_model(program):
        return None
    called = [region.module(node) for region, _, graph in program.graphs() for node in graph.nodes]
    return {id(child) for module in called if module is not None for child in module.modules()}


def _covers_model(program: Program) -> bool:
    return any(region.owner is program.model and region.role == "region" for region in program.regions)


def keeps_zeros(program: Program, name: str) -> bool:
    """Whether a weight of a parametrized module is 0 where its parameter is 0."""
    path, _, leaf = name.rpartition(".")
    stack = program.model.get_submodule(path)
    if not isinstance(stack, parametrize.ParametrizationList):
        return True
    original = stack._parameters[leaf]
    assert original is not None  # noqa: S101 -- the name comes from named_parameters
    zeroed = torch.arange(original.numel(), device=original.device).reshape(original.shape) % 3 == 0
    try:
        stack._parameters[leaf] = nn.Parameter(original.detach().masked_fill(zeroed, 0.0))
        weight = _computed(stack)
        return weight.shape == zeroed.shape and not weight[zeroed].any()
    finally:
        stack._parameters[leaf] = original


def is_factor(program: Program, name: str) -> bool:
    """Whether a weight is computed from a parameter and a larger one, such as from weight norm's magnitudes."""
    path, _, leaf = name.rpartition(".")
    owner = program.model.get_submodule(path)
    if isinstance(owner, parametrize.ParametrizationList):
        return _computed(owner).shape != program.model.get_parameter(name).shape
    hooks = owner._forward_pre_hooks.values()
    return any(isinstance(hook, WeightNorm) and leaf == f"{hook.name}_g" for hook in hooks)


def _computed(stack: nn.Module) -> Tensor:
    """The weight of a parametrization, in eval mode: in train mode some change their buffers (spectral norm)."""
    training = stack.training
    stack.eval()
    try:
        with torch.no_grad():
            weight: Tensor = stack()
        return weight
    finally:
        stack.train(training)


def layer_path(path: str) -> str:
    """The module that a parametrization belongs to, by its path; other paths as they are."""
    return path.partition(".parametrizations.")[0]


def embedded(program: Program) -> set[int]:
    """Identities of the parameters that embeddings look up."""
    modules = program.model.modules()
    found = {id(module.weight) for module in modules if _looks_up(operator_of(type(module)))}
    for region, _, graph in program.graphs():
        for node in graph.nodes:
            if node.op == "call_function" and _looks_up(operator_of(node.target)):
                target = source_of_weight(region, bound(node).get("weight"))
                if target is not None:
                    found.add(id(region.owner.get_parameter(target)))
    return found


def _looks_up(row: Operator | None) -> bool:
    return row is not None and row.kind == "embedding"


def output_weights(program: Program) -> set[int]:
    """Identities of the weights whose layers make what the model returns; empty where no graph shows it."""
    found: set[int] = set()
    for region, _, graph in program.graphs():
        for node in graph.nodes if not region.path and region.role == "region" else ():
            target = source_of_weight(region, node.args[1]) if is_layer(node) and reaches_output(node) else None
            if target is not None:
                found.add(id(region.owner.get_parameter(target)))
    return found


def reaches_output(layer: fx.Node) -> bool:
    """Whether a layer's channels get to the output unmixed."""
    waiting, seen = list(layer.users), set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "output":
            return True
        if is_layer(node) and not is_depthwise(node):
            continue
        waiting += node.users
    return False


def is_depthwise(node: fx.Node) -> bool:
    """Whether a layer is a convolution in groups."""
    return int(bound(node).get("groups", 1)) > 1
