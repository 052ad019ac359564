"""Graphs as plain records: everything that views of a graph show, and nothing that keeps a model alive.

Each view (text, diff, networkx, DOT, JSON) reads these records, so that they agree with one another.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, fx, nn

from fedmef_fx.display.printable import visible
from fedmef_fx.graph.program import GraphMode, Program, Region, join, provenance
from fedmef_fx.sparse_model.masks import MaskedParameter, is_transformed, masked_parameters

if TYPE_CHECKING:
    from fedmef_fx.inspection.shapes import Observation

__all__ = ["GraphRecord", "NodeRecord", "Operation", "SavedRecord", "TensorRecord", "record_graphs", "visible"]

Operation = Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]

_DTYPES: Final = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRecord:
    """Shape and type of a tensor.

    Attributes:
        shape: Sizes.
        dtype: Short name: `f32`, `i64`, `bool`, ...
    """

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorRecord":
        """The record of a tensor."""
        return cls(tuple(tensor.shape), dtype_name(tensor.dtype))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, slots=True)
class SavedRecord:
    """Memory that a node keeps between forward and backward.

    Attributes:
        codec: How it is stored: "dense", "packed values", "bitmap", or what else its operation announced.
        nbytes: Its size.
        counted_at: The earlier node that keeps the same memory and where it counts, with its graph where that is
            another one, `region/name`; empty where it counts here.
    """

    codec: str
    nbytes: int
    counted_at: str = ""

    def __str__(self) -> str:
        return f"{self.codec} of %{self.counted_at}" if self.counted_at else f"{self.nbytes} B {self.codec}"


@dataclasses.dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node of a graph.

    Attributes:
        name: Unique in its graph.
        op: Kind of node, as in torch.fx.
        target: What it reads or calls: full name of a parameter, buffer or module, name of a function or method,
            name of an input; "output" for the output.
        arguments: Arguments as text, without parentheses.
        inputs: Names of the nodes that it reads, each once, in the order of its arguments.
        tensors: The tensors of its value: one, several for a tuple of tensors, none where they are not known.
        density: Active share of a masked parameter that it reads; None for anything else.
        made_by: The pass that made it; None for nodes of the original graph.
        origin: The node, module or parameter it was made from; None for nodes of the original graph.
        module: Path of the module it belongs to, as far as that is known; "" is the whole model.
        saved: What it keeps for backward; None where that was not measured.
    """

    name: str
    op: Operation
    target: str
    arguments: str = ""
    inputs: tuple[str, ...] = ()
    tensors: tuple[TensorRecord, ...] = ()
    density: float | None = None
    made_by: str | None = None
    origin: str | None = None
    module: str = ""
    saved: tuple[SavedRecord, ...] | None = None

    @property
    def saved_bytes(self) -> int | None:
        """Bytes that count at this node; None where they were not measured."""
        return None if self.saved is None else sum(saved.nbytes for saved in self.saved if not saved.counted_at)


@dataclasses.dataclass(frozen=True, slots=True)
class GraphRecord:
    """One graph of a model.

    Attributes:
        region: Path of the traced module; "" is the whole model.
        mode: The mode in which it runs: "train", "eval" or "both".
        nodes: In the order in which they run.
    """

    region: str
    mode: GraphMode
    nodes: tuple[NodeRecord, ...]

    @property
    def label(self) -> str:
        """What tells it from the model's other graphs; empty for the only graph of a whole model."""
        mode = "" if self.mode == "both" else self.mode
        return ", ".join(part for part in (self.region, mode) if part)


def record_graphs(program: Program, observation: "Observation | None" = None) -> tuple[GraphRecord, ...]:
    """The records of every graph of a program.

    Args:
        program: The program; it is only read. It may be on its way through the passes.
        observation: What example inputs showed.
    """
    densities = _densities(program)
    saved = _saved_records(program, observation) if observation is not None else {}
    tensors = observation.tensors if observation is not None else {}
    return tuple(
        GraphRecord(
            region.path,
            mode,
            tuple(_record_node(region, n, tensors.get(n, ()), densities, saved.get(n)) for n in graph.nodes),
        )
        for region, mode, graph in program.graphs()
    )


def _densities(program: Program) -> dict[int, float]:
    """Active share by identity of the masked parameter."""
    facts = None if is_transformed(program.model) else program.facts  # on its way through the passes
    entries: Mapping[str, MaskedParameter] = masked_parameters(program.model, facts=facts)
    return {id(entry.parameter): entry.active / max(entry.numel, 1) for entry in entries.values()}


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
        module=_module_path(region, node),
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


def _module_path(region: Region, node: fx.Node) -> str:
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


def _arguments(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"default={_value(node.args[0])}" if node.args else ""
    if node.op == "output":
        return _value(node.args[0])
    given = [_value(argument) for argument in node.args]
    return ", ".join([*given, *(f"{key}={_value(value)}" for key, value in node.kwargs.items())])


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


def dtype_name(dtype: torch.dtype) -> str:
    """`f32` for torch.float32; torch's own name for types without a short one."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
