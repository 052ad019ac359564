"""How an activation is kept, as a node: sites of few bits, results that are kept by what makes them, and recomputation.

One handle per tensor serves everything that reads it.
"""

import operator
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import fx
from torch.fx.node import Argument

from fedmef_fx.graph.operators import Norm, named
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Region
from fedmef_fx.graph.sites import add_site
from fedmef_fx.ops.keeping import KeepActivation, recomputed, remasked
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.noise_site import NoiseSite
from fedmef_fx.ops.norms import compressed_norm
from fedmef_fx.ops.smooth import compressed_activation, compressed_result
from fedmef_fx.packing.bit_planes import Bits
from fedmef_fx.packing.noise import noise_key
from fedmef_fx.records.graphs import GraphMode

__all__ = ["add_keeping_site", "add_noise_site", "handle_of", "noise_seed"]

_Recipe: TypeAlias = tuple[Callable[..., Any], tuple[Argument, ...], dict[str, Argument]]


def handle_of(region: Region, x: fx.Node, *, by: str) -> fx.Node | None:
    """The node that says how x is kept anyway, None where it is not.

    1. x has a `KeepActivation` site.
    2. x is the result of `compressed_result`, which keeps it.
    3. x is computed from a kept tensor at little cost: it is computed again, by a `recomputed` node that is made here.
    4. x is a masked weight, which is made again from what the model holds (`remasked`).

    Args:
        region: The region of the graph.
        x: An activation.
        by: Name of the pass that asks.
    """
    for user in x.users:
        if isinstance(region.module(user), KeepActivation):
            return user
    if x.target is operator.getitem and x.args[1] == 0 and getattr(x.args[0], "target", None) is compressed_result:
        return _kept_result(x, by=by)
    recipe = _recipe(x)
    if recipe is None:
        return None
    op, args, kwargs = recipe
    for user in args[0].users if isinstance(args[0], fx.Node) else ():
        if user.target is op and user.args == args and user.kwargs == kwargs:
            return user
    with x.graph.inserting_after(x):
        node = x.graph.call_function(op, args, kwargs)
    set_provenance(node, by=by, origin=x.name)
    return node


def add_keeping_site(region: Region, mode: GraphMode, x: fx.Node, *, by: str, bits: Bits = 8) -> fx.Node:
    """Keep x in few bits, from where it is made."""
    name = x.name if mode == "both" else f"{x.name}_{mode}"
    target = add_site(region, name, KeepActivation(bits, seed=noise_seed(region, name)))
    with x.graph.inserting_after(x):
        node = x.graph.call_module(target, (x,))
    set_provenance(node, by=by, origin=x.name)
    return node


def add_noise_site(region: Region, mode: GraphMode, node: fx.Node, *, by: str) -> fx.Node:
    """A node that gives the key of the noise with which a node's result is rounded."""
    name = node.name if mode == "both" else f"{node.name}_{mode}"
    target = add_site(region, name, NoiseSite(noise_seed(region, name)))
    with node.graph.inserting_before(node):
        key = node.graph.call_module(target)
    set_provenance(key, by=by, origin=node.name)
    return key


def noise_seed(region: Region, name: str, seed: int = 0) -> int:
    """What tells the noise of one place in a model from that of others."""
    return noise_key(seed, zlib.crc32(region.full_name(name).encode()))


def _kept_result(x: fx.Node, *, by: str) -> fx.Node:
    pair = x.args[0]
    assert isinstance(pair, fx.Node)  # noqa: S101 -- handle_of has looked at it
    for user in pair.users:
        if user.target is operator.getitem and user.args[1] == 1:
            return user
    with x.graph.inserting_after(x):
        node = x.graph.call_function(operator.getitem, (pair, 1))
    set_provenance(node, by=by, origin=pair.name)
    return node


def _recipe(x: fx.Node) -> _Recipe | None:
    """The node that stands for computing x again: target, arguments, options."""
    if x.target is masked_weight:
        return remasked, x.args, {}
    if x.target not in (compressed_activation, compressed_norm) or not isinstance(x.args[1], fx.Node):
        return None
    kept, options = x.args[1], dict(x.kwargs)
    if x.target is compressed_activation:
        return recomputed, (kept,), options
    function = str(options.pop("function"))
    row = named(function)
    if not isinstance(row, Norm) or not row.is_recomputed:
        return None
    args = (kept, options[row.size_in_op], *x.args[2:4], options["eps"])
    return recomputed, args, {"function": function}
