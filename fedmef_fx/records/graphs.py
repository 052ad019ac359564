"""Graphs as plain records: everything that views of a graph show, and nothing that keeps a model alive.

Each view (text, diff, networkx, DOT, JSON) reads these records, so that they agree with one another.
"""

import dataclasses
import math
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["GraphMode", "GraphRecord", "NodeKind", "NodeRecord", "SavedRecord", "TensorRecord"]

GraphMode: TypeAlias = Literal["both", "train", "eval"]


NodeKind = Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]


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
    op: NodeKind
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


def dtype_name(dtype: torch.dtype) -> str:
    """`f32` for torch.float32; torch's own name for types without a short one."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
