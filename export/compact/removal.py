"""Decide which channels leave, and take them out of parameters and graph.

A unit of tied channels leaves when none of them is kept for good and, wherever a layer mixes them into others, they
contribute nothing: they are zero there, no living output has a weight for them, or they are a constant that the layer's
bias can take over. Each departure may silence more channels, before it and after it, so that this is repeated until
nothing changes. No tensor loses all its channels.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fedmef_fx.export.compact.constant_rules import can_fold
from fedmef_fx.export.compact.constants import Constants
from fedmef_fx.export.compact.ties import Exit, IntArray, Ties, channels_in
from fedmef_fx.export.freeze.weights import add_parameter, readers
from fedmef_fx.graph.operations import operation_of
from fedmef_fx.graph.operators import operator_of

__all__ = ["Decision", "decide", "remove"]

_LAST = "it is the last channel that is left there"


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What leaves and why the rest does not.

    Attributes:
        gone: Channel -> whether it leaves.
        reasons: Channel -> why its unit stays.
        constants: The constants of what stays, with what is folded into biases.
    """

    gone: NDArray[np.bool_]
    reasons: dict[int, str]
    constants: Constants


def decide(ties: Ties) -> Decision:
    """Find the units that can leave; see the module docstring."""
    units = ties.units()
    number = int(units.max(initial=-1)) + 1
    kept_for: dict[int, str] = {}
    for channel, reason in ties.anchors.items():
        kept_for.setdefault(int(units[channel]), reason)
    left = np.zeros(number, dtype=np.bool_)
    constants = Constants(ties, np.zeros(ties.count, dtype=np.bool_))
    while True:
        constants.update()
        used_at: dict[int, str] = dict(kept_for)
        blocked = np.zeros(number, dtype=np.bool_)
        blocked[list(kept_for)] = True
        for exit_ in ties.exits:
            used = units[exit_.channels[constants.is_used(exit_)]]
            blocked[used] = True
            for unit in set(used.tolist()):
                used_at.setdefault(
                    unit, f"{exit_.node.name} reads them, or what is tied to them, and not all of it is zero"
                )
        leaving = ~blocked & ~left
        for channels in _axes(ties):
            mine = units[channels]
            if len(mine) and (left | leaving)[mine].all():
                last = int(mine[leaving[mine].argmax()])
                leaving[last] = False
                kept_for.setdefault(last, _LAST)
        if not leaving.any():
            break
        for exit_ in ties.exits:
            _fold(constants, exit_, leaving[units[exit_.channels]])
        left |= leaving
        constants.gone = left[units]
    return Decision(left[units], {c: used_at.get(int(u), "") for c, u in enumerate(units) if not left[u]}, constants)


def _axes(ties: Ties) -> Iterator[IntArray]:
    for _, dims in ties.parameters.values():
        yield from channels_in(dims)
    for state in ties.dims.values():
        yield from channels_in(state)


def _fold(constants: Constants, exit_: Exit, leaving: NDArray[np.bool_]) -> None:
    """Note what constant channels contribute to a layer that they leave."""
    if exit_.kind != "weights" or not leaving.any() or not can_fold(constants.ties, exit_.node):
        return
    known = constants.of(*exit_.reads[0])
    if known is None:
        return
    sums, _ = constants.layer(exit_.node, operation_of(constants.ties.region, exit_.node))
    # NaN: a channel that varies, and leaves because no living output has a weight for it.
    added = sums @ np.where(leaving & ~np.isnan(known), known, 0.0)
    if added.any():
        constants.folded[exit_.node] = constants.folded.get(exit_.node, np.zeros(len(added))) + added


@torch.no_grad()
def remove(ties: Ties, decision: Decision, graph: fx.Graph) -> None:
    """Take the channels out, in place: biases, numbers in the graph, then parameters and buffers."""
    for node, added in decision.constants.folded.items():
        _write_bias(ties, node, added)
    for node in list(graph.nodes):
        _renumber(ties, decision.gone, node)
    _cut(ties, decision.gone)


def _write_bias(ties: Ties, node: fx.Node, added: Any) -> None:
    region, graph = ties.region, node.graph
    options = operation_of(region, node).options
    bias, weight = options.get("bias"), options["weight"]
    old, kernel = region.tensor(bias), region.tensor(weight)
    assert kernel is not None  # noqa: S101 -- its rule has seen it
    value = torch.from_numpy(added) + (0.0 if old is None else old.double())
    value = value.to(kernel.dtype)
    if old is not None and len(readers(region, graph, old)) == 1:
        old.copy_(value)
        return
    path = str(weight.target).rpartition(".")[0]
    name = add_parameter(region, f"{path}.bias" if path else "bias", value)
    with graph.inserting_before(node):
        read = graph.get_attr(name)
    node.args = (*node.args[:2], read, *node.args[3:])
    node.kwargs = {key: item for key, item in node.kwargs.items() if key != "bias"}
    rows = ties.of(node)[_channel(ties, node, kernel)]
    new = region.tensor(read)
    assert new is not None  # noqa: S101 -- just registered
    ties.parameters[id(new)] = new, (rows if len(new) > 1 else None,)


def _channel(ties: Ties, node: fx.Node, kernel: Tensor) -> int:
    return len(ties.of(node)) - (kernel.dim() - 2) - 1


def _left(gone: NDArray[np.bool_], channels: IntArray | None) -> int | None:
    """How many channels a dimension keeps; None where it keeps all."""
    if channels is None or not gone[channels].any():
        return None
    return int((~gone[channels]).sum())


def _renumber(ties: Ties, gone: NDArray[np.bool_], node: fx.Node) -> None:
    """Correct the sizes that stand in the graph."""
    operation = operation_of(ties.region, node)
    if operation.kind == "conv" and node in ties.groups:
        inputs = ties.groups[node]
        groups = int(operation.options["groups"])
        alive = int((~gone[inputs.reshape(groups, -1)[:, 0]]).sum())
        _set_argument(node, "groups", alive, place=6)
    elif operation.kind in ("reshape", "expand"):
        _resize_view(ties, gone, node)
    elif operation.kind == "split":
        _resize_parts(ties, gone, node, operation.options)
    elif operation.kind in ("size", "getitem"):
        _keep_size(ties, gone, node)


def _set_argument(node: fx.Node, name: str, value: Any, *, place: int) -> None:
    if len(node.args) > place:
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def _resize_view(ties: Ties, gone: NDArray[np.bool_], node: fx.Node) -> None:
    sizes = [_left(gone, channels) for channels in ties.of(node)]
    if node.op == "call_module" or all(size is None for size in sizes):
        return
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name not in ("view", "reshape", "expand", "unflatten"):
        return
    if name == "unflatten":
        dim = int(node.args[1]) % len(ties.shape(node.args[0]))  # type: ignore[arg-type]  # the dimension
        given = list(node.args[2])  # type: ignore[arg-type]  # the sizes
        node.update_arg(2, tuple(_new_size(size, sizes[dim + i]) for i, size in enumerate(given)))
        return
    nested = len(node.args) == 2 and isinstance(node.args[1], tuple | list)
    given = list(node.args[1]) if nested else list(node.args[1:])  # type: ignore[arg-type]  # a tuple
    if not given:  # by keyword
        given = list(node.kwargs.get("shape") or node.kwargs.get("size"))  # type: ignore[arg-type]
        node.kwargs = {}
    new = tuple(_new_size(size, left) for size, left in zip(given, sizes, strict=True))
    node.args = (node.args[0], new) if nested or not isinstance(node.target, str) else (node.args[0], *new)


def _new_size(given: Any, left: int | None) -> Any:
    return given if left is None or given == -1 else left


def _resize_parts(ties: Ties, gone: NDArray[np.bool_], node: fx.Node, options: dict[str, Any]) -> None:
    dim = options.get("dim", 0)
    states: Any = ties.dims[node]
    cut: list[Any] = [state[dim] for state in states]
    if all(_left(gone, channels) is None for channels in cut):
        return
    sizes = [int((~gone[channels]).sum()) for channels in cut]
    node.op, node.target = "call_function", torch.split  # chunk gives equal parts only
    node.args, node.kwargs = (node.args[0] if node.args else options["input"], sizes, dim), {}


def _keep_size(ties: Ties, gone: NDArray[np.bool_], node: fx.Node) -> None:
    """A size that is read stays the number it was: scales and other shapes are computed from it."""
    source: Any = node.args[0]
    entry: Any = node.args[1] if len(node.args) > 1 else None
    if operation_of(ties.region, node).kind == "getitem":
        if operation_of(ties.region, source).kind != "size":
            return
        source = source.args[0]
    if not isinstance(entry, int):
        return
    dims = ties.of(source)
    if _left(gone, dims[entry]) is not None:
        size = ties.shape(source)[entry]
        for user in list(node.users):
            user.args = fx.map_arg(user.args, lambda n: size if n is node else n)
            user.kwargs = fx.map_arg(user.kwargs, lambda n: size if n is node else n)
        node.graph.erase_node(node)


def _cut(ties: Ties, gone: NDArray[np.bool_]) -> None:
    """Shrink parameters and buffers, under all their names."""
    new: dict[int, Tensor] = {}
    for key, (tensor, dims) in ties.parameters.items():
        value = tensor.detach()
        for dim, channels in enumerate(dims):
            if _left(gone, channels) is not None:
                value = value.index_select(dim, torch.from_numpy(np.flatnonzero(~gone[channels])).to(value.device))
        if value.shape != tensor.shape:
            is_parameter = isinstance(tensor, nn.Parameter)
            new[key] = (
                nn.Parameter(value.clone(), requires_grad=tensor.requires_grad) if is_parameter else value.clone()
            )
    for module in ties.region.owner.modules():
        for held in (module._parameters, module._buffers):
            for leaf, found in list(held.items()):
                if found is not None and id(found) in new:
                    held[leaf] = new[id(found)]  # type: ignore[assignment]  # of the same kind
        row = operator_of(type(module))
        for size, name, dim in () if row is None else row.sizes:
            tensor = getattr(module, name)
            if tensor is not None:
                setattr(module, size, tensor.shape[dim])
