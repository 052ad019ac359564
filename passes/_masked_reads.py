"""Masked weights are read through their masks, for `InsertMasks` and graphs that are captured later."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import fx, nn

from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.sparse_model.masks import mask_name

__all__ = ["BareRead", "bare_reads", "read_through_mask"]


class BareRead(NamedTuple):
    """A node that reads a masked parameter, with users that do not take the mask.

    Attributes:
        node: The node.
        mask: Target of the mask.
        name: The parameter's name in the model.
        users: The users without the mask.
    """

    node: fx.Node
    mask: str
    name: str
    users: frozenset[fx.Node]


def bare_reads(region: Region, graph: fx.Graph, names: dict[int, str], model: nn.Module) -> Iterator[BareRead]:
    """The reads of masked parameters in a graph that do not go through the mask.

    Args:
        region: The region of the graph.
        graph: The graph.
        names: Identity of each masked parameter -> its name in the model.
        model: The model.
    """
    paths = {id(module): path for path, module in region.owner.named_modules()}
    for node in graph.find_nodes(op="get_attr"):
        name = names.get(id(region.tensor(node)))
        if name is None:
            continue
        owner, _, leaf = name.rpartition(".")
        local = paths.get(id(model.get_submodule(owner)))
        if local is None:
            continue  # tied to a parameter outside the region, where the mask is: its gradient is masked instead
        mask = f"{local}.{mask_name(leaf)}" if local else mask_name(leaf)
        users = frozenset(user for user in node.users if not _takes(user, mask))
        if users:
            yield BareRead(node, mask, name, users)


def _takes(user: fx.Node, mask: str) -> bool:
    return any(x.op == "get_attr" and x.target == mask for x in user.all_input_nodes)


def read_through_mask(read: BareRead, *, by: str) -> None:
    """Put `masked_weight` between a parameter and those that read it without its mask.

    Args:
        read: From `bare_reads`.
        by: The pass, for provenance.
    """
    graph = read.node.graph
    with graph.inserting_after(read.node):
        mask = graph.get_attr(read.mask)
    with graph.inserting_after(mask):
        masked = graph.call_function(masked_weight, (read.node, mask))
    read.node.replace_all_uses_with(masked, delete_user_cb=read.users.__contains__)
    for new in (mask, masked):
        set_provenance(new, by=by, origin=read.name)
