"""Where a node of a graph comes from: the pass that made it, and the module and layer that own it."""

from typing import Any

from torch import fx, nn

from fedmef_fx.graph.program import Region
from fedmef_fx.module_tree import join

__all__ = ["layer_of", "module_path", "provenance", "set_provenance"]


_META = "fedmef_fx"


def set_provenance(node: fx.Node, *, by: str, origin: str) -> None:
    """Record which pass made a node and from which node, module or parameter."""
    node.meta[_META] = {"pass": by, "origin": origin}


def provenance(node: fx.Node) -> tuple[str, str] | None:
    """The pass that made a node and what it was made from; None for nodes of the original graph."""
    entry = node.meta.get(_META)
    return (entry["pass"], entry["origin"]) if entry else None


def module_path(region: Region, node: fx.Node) -> str:
    """The module whose forward made a node; nodes that passes made follow what they read."""
    if node.op == "get_attr":
        return region.full_name(str(node.target).rpartition(".")[0])
    if node.op == "call_module":
        return region.full_name(str(node.target))
    stack = node.meta.get("nn_module_stack")
    if stack:
        return join(region.path, next(reversed(stack)))
    origin = (provenance(node) or ("", ""))[1]
    read = [argument for argument in node.all_input_nodes if isinstance(region.tensor(argument), nn.Parameter)]
    # A layer that took over a bias of another one belongs to its weight, or to what it was made from.
    weights = [argument for argument in read if (tensor := region.tensor(argument)) is not None and tensor.dim() > 1]
    if not weights and _is_module(region, origin):
        return origin
    for argument in (*weights, *read):
        return region.full_name(str(argument.target).rpartition(".")[0])
    return region.path


def _is_module(region: Region, origin: str) -> bool:
    if not origin:
        return False
    try:
        return isinstance(region.attribute(origin.removeprefix(f"{region.path}.")), nn.Module)
    except AttributeError:
        return False


_SITES = "fedmef_sites"


def _is_site(node: fx.Node) -> bool:
    return node.op == "call_module" and _SITES in str(node.target).split(".")


def layer_of(region: Region, node: fx.Node) -> str:
    """The module of the original model that a node does the work of, as well as can be told.

    By rank: the module whose parameter the node reads; for a packing site the first layer that reads the packed copy;
    the module called; what the node was made from; the module whose forward was traced here; the node's own name.
    """
    if _is_site(node):
        reader = next((user for user in node.users if _parameter(region, user)), None)
        return layer_of(region, reader) if reader is not None else _origin(region, node)
    owner = _parameter(region, node)
    return region.full_name(owner.rpartition(".")[0]) if owner else _origin(region, node)


def _parameter(region: Region, node: fx.Node) -> str:
    """The first parameter that a node reads."""
    tensors = ((str(source.target), region.tensor(source)) for source in node.all_input_nodes)
    return next((target for target, tensor in tensors if isinstance(tensor, nn.Parameter)), "")


def _origin(region: Region, node: fx.Node) -> str:
    made = provenance(node)
    stack: Any = node.meta.get("nn_module_stack") or {}
    traced = [str(path) for path, *_ in stack.values()] if isinstance(stack, dict) else []
    if made is not None:
        return region.full_name(made[1])
    return region.full_name(traced[-1] if traced and traced[-1] else node.name)
