"""Where a node of a graph comes from: the pass that made it, and the module and layer that own it."""

from typing import Any

from torch import fx, nn

from fedmef_fx.graph.program import Region
from fedmef_fx.graph.sites import is_site
from fedmef_fx.module_tree import join

__all__ = ["layer_of", "module_of", "provenance", "set_provenance"]


_META = "fedmef_fx"


def set_provenance(node: fx.Node, *, by: str, origin: str) -> None:
    """Record which pass made a node and from which node, module or parameter."""
    node.meta[_META] = {"pass": by, "origin": origin}


def provenance(node: fx.Node) -> tuple[str, str] | None:
    """The pass that made a node and what it was made from; None for nodes of the original graph."""
    entry = node.meta.get(_META)
    return (entry["pass"], entry["origin"]) if entry else None


def module_of(region: Region, node: fx.Node) -> str:
    """The module of the original model that a node belongs to.

    A packing site belongs to the first layer that reads the packed copy. Otherwise by rank: the module called, or the
    one that has the parameter; the module whose forward was traced here; for nodes that passes made the layer whose
    parameter they read, then the module that they were made from; the region's owner where none of these is there.
    """
    if is_site(node):
        reader = next((user for user in node.users if _parameters(region, user)), None)
        return region.path if reader is None else module_of(region, reader)
    if node.op == "get_attr":
        return region.full_name(str(node.target).rpartition(".")[0])
    if node.op == "call_module":
        return region.full_name(str(node.target))
    stack: Any = node.meta.get("nn_module_stack")
    if stack:
        return join(region.path, next(reversed(stack)))
    origin = (provenance(node) or ("", ""))[1]
    read = _parameters(region, node)
    # A layer that took over a bias of another one belongs to its weight, or to what it was made from.
    weights = [target for target, parameter in read if parameter.dim() > 1]
    if not weights and _is_module(region, origin):
        return origin
    for target in (*weights, *(target for target, _ in read)):
        return region.full_name(target.rpartition(".")[0])
    return region.path


def layer_of(region: Region, node: fx.Node) -> str:
    """`module_of`; an operation without parameters in the forward of the region's owner itself goes by its own name."""
    module = module_of(region, node)
    if module != region.path or _parameters(region, node):
        return module
    origins = provenance(node)
    return region.full_name(origins[1] if origins is not None else node.name)


def _parameters(region: Region, node: fx.Node) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a node reads, with their names in the region."""
    read = ((str(source.target), region.tensor(source)) for source in node.all_input_nodes)
    return [(target, tensor) for target, tensor in read if isinstance(tensor, nn.Parameter)]


def _is_module(region: Region, origin: str) -> bool:
    if not origin:
        return False
    try:
        return isinstance(region.attribute(origin.removeprefix(f"{region.path}.")), nn.Module)
    except AttributeError:
        return False
