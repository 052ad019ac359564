"""Graphs as plain records: everything that views of a graph show, and nothing that keeps a model alive.

Each view (text, diff, networkx, DOT, JSON) reads these records, so that they agree with one another.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fedmef_fx.display.printable import visible
from fedmef_fx.graph.origin import module_of, provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.records.calls import CallRecord
from fedmef_fx.records.graphs import GraphRecord, NodeRecord, SavedRecord, TensorRecord, dtype_name
from fedmef_fx.sparse_model.masks import MaskedParameter
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["KeptStorage", "Observation", "record_graphs", "visible"]


@dataclasses.dataclass(frozen=True, slots=True)
class KeptStorage:
    """A piece of memory that a node keeps for backward.

    Attributes:
        number: The same for the same memory, within one call of the model.
        codec: "dense", or what the maker of a buffer announced: "packed values", "bitmap", ...
        nbytes: All its bytes, also where only a view of it was saved.
    """

    number: int
    codec: str
    nbytes: int


def record_graphs(program: Program, observation: "Observation | None" = None) -> tuple[GraphRecord, ...]:
    """The records of every graph of a program.

    Args:
        program: The program; it is only read. It may be on its way through the passes.
        observation: What example inputs showed.
    """
    shown = list(program.graphs())
    if program.is_one_graph:  # forward calls no other
        shown = [entry for entry in shown if entry[0].role != "fallback"]
    densities = _densities(program)
    saved = _saved_records(program, observation) if observation is not None else {}
    tensors = observation.tensors if observation is not None else {}
    return tuple(
        GraphRecord(
            region.path,
            mode,
            tuple(_record_node(region, n, tensors.get(n, ()), densities, saved.get(n)) for n in graph.nodes),
        )
        for region, mode, graph in shown
    )


def _densities(program: Program) -> dict[int, float]:
    """Active share by identity of the masked parameter."""
    transformation = None if is_transformed(program.model) else program.transformation  # on its way through the passes
    parameters: Mapping[str, MaskedParameter] = masked_parameters(program.model, transformation=transformation)
    return {id(parameter.parameter): parameter.active / max(parameter.numel, 1) for parameter in parameters.values()}


def _saved_records(program: Program, observation: "Observation") -> dict[fx.Node, tuple[SavedRecord, ...]]:
    """What each node of the measured graphs keeps."""
    counted: dict[int, tuple[fx.Graph, str, str]] = {}  # number of a storage -> graph, label, node that keeps it first
    found = {}
    for region, mode, graph in program.graphs():
        label = GraphRecord(region.path, mode, ()).label
        for node in graph.nodes if graph in observation.measured else ():
            records = []
            for storage in observation.kept.get(node, ()):
                first, where, name = counted.setdefault(storage.number, (graph, label, node.name))
                elsewhere = name if first is graph else f"{where}/{name}"
                is_here = first is graph and name == node.name
                records.append(SavedRecord(storage.codec, storage.nbytes, "" if is_here else elsewhere))
            found[node] = tuple(records)
    return found


def _record_node(
    region: Region,
    node: fx.Node,
    tensors: tuple[TensorRecord, ...],
    densities: Mapping[int, float],
    saved: tuple[SavedRecord, ...] | None,
) -> NodeRecord:
    tensor = region.tensor(node)
    made_by, origin = provenance(node) or (None, None)
    return NodeRecord(
        name=node.name,
        op=node.op,  # type: ignore[arg-type]  # torch.fx types it as str; these are its values
        target=_target(region, node),
        arguments=_arguments(node),
        inputs=tuple(argument.name for argument in node.all_input_nodes),
        tensors=tensors if tensor is None else (TensorRecord.of(tensor),),
        density=None if tensor is None else densities.get(id(tensor)),
        made_by=made_by,
        origin=origin,
        module=module_of(region, node),
        saved=saved,
    )


def _target(region: Region, node: fx.Node) -> str:
    if node.op in ("get_attr", "call_module"):
        return region.full_name(str(node.target))
    if callable(node.target):
        return _function_name(node.target)
    return str(node.target)


def _function_name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _arguments(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"default={_value(node.args[0])}" if node.args else ""
    if node.op == "output":
        return _value(node.args[0])
    arguments = [_value(argument) for argument in node.args]
    return ", ".join([*arguments, *(f"{key}={_value(value)}" for key, value in node.kwargs.items())])


def _value(value: object) -> str:
    """An argument as text that is the same in every process."""
    match value:
        case fx.Node():
            return f"%{value.name}"
        case torch.Size() | list():
            return f"[{', '.join(map(_value, value))}]"
        case tuple():
            return f"({', '.join(map(_value, value))}{',' if len(value) == 1 else ''})"
        case dict():
            return f"{{{', '.join(f'{_value(key)}: {_value(item)}' for key, item in value.items())}}}"
        case slice():
            parts = (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
            return ":".join("" if part is None else _value(part) for part in parts)
        case torch.dtype():
            return dtype_name(value)
        case None | bool() | int() | float() | complex() | str() | torch.device():
            return visible(repr(value))
        case _ if value is Ellipsis:
            return "..."
        case _ if callable(value):
            return _function_name(value)
        case _:
            return f"<{type(value).__name__}>"


@dataclasses.dataclass(slots=True)
class Observation:
    """What running the graphs on example inputs showed; empty without.

    Attributes:
        tensors: Per node the tensors of its value, in order; an empty tuple for a value without tensors.
        kept: Per node what it keeps for backward; nodes that keep nothing are left out.
        kept_outside: What Python between the graphs keeps.
        measured: The graphs for which `kept` was measured.
        calls: What flowed between modules that Python calls; None for one graph, and where that is not known.
        notices: What could not be measured, and why.
    """

    tensors: dict[fx.Node, tuple[TensorRecord, ...]] = dataclasses.field(default_factory=dict)
    kept: dict[fx.Node, tuple[KeptStorage, ...]] = dataclasses.field(default_factory=dict)
    kept_outside: tuple[KeptStorage, ...] = ()
    measured: set[fx.Graph] = dataclasses.field(default_factory=set)
    calls: CallRecord | None = None
    notices: list[str] = dataclasses.field(default_factory=list)
