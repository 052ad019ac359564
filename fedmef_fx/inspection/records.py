"""Graphs as plain records: everything that views of a graph show, and nothing that keeps a model alive.

Each view (text, diff, networkx, DOT, JSON) reads these records, so that they agree with one another.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, fx, nn

from fedmef_fx.model import MaskedParameter, is_transformed, masked_parameters
from fedmef_fx.program import GraphMode, Program, Region, join, provenance

__all__ = ["GraphRecord", "NodeRecord", "Operation", "TensorRecord", "record_graphs", "visible"]

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


def record_graphs(
    program: Program, tensors: Mapping[fx.Node, tuple[TensorRecord, ...]] | None = None
) -> tuple[GraphRecord, ...]:
    """The records of every graph of a program.

    Args:
        program: The program; it is only read.
        tensors: What example inputs showed about the values of nodes, see `shapes.observe_tensors`.
    """
    densities = _densities(program.model)
    return tuple(
        GraphRecord(
            region.path,
            mode,
            tuple(_record_node(region, node, (tensors or {}).get(node, ()), densities) for node in graph.nodes),
        )
        for region, mode, graph in program.graphs()
    )


def _densities(model: nn.Module) -> dict[int, float]:
    """Active share by identity of the masked parameter."""
    entries: Mapping[str, MaskedParameter] = masked_parameters(model) if is_transformed(model) else {}
    return {id(entry.parameter): entry.active / max(entry.numel, 1) for entry in entries.values()}


def _record_node(
    region: Region, node: fx.Node, tensors: tuple[TensorRecord, ...], densities: Mapping[int, float]
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
    for argument in node.all_input_nodes:
        if isinstance(region.tensor(argument), nn.Parameter):
            return region.full_name(str(argument.target).rpartition(".")[0])
    origin = (provenance(node) or ("", ""))[1]
    return origin if _is_module(region, origin) else region.path


def _is_module(region: Region, origin: str) -> bool:
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


def visible(text: str) -> str:
    """Text in one line and without control characters: what cannot be printed is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
