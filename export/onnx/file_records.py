"""What an ONNX file holds, as records: tensors with codec, density and bytes, and nodes with where they come from."""

import dataclasses
import json
import math
from typing import Any, Final

from fedmef_fx.display.notebook import fragment, html_table, preformatted
from fedmef_fx.display.printable import shortened, visible
from fedmef_fx.display.text_table import format_count, text_table

__all__ = ["FileInspection", "FileNode", "FileTensor"]

SCHEMA: Final = "fedmef-fx/onnx-file"
SCHEMA_VERSION: Final = 1

_TENSOR_HEADINGS: Final = ("tensor", "shape", "type", "codec", "elements", "active", "density", "bytes", "read by")
_TENSOR_WORDS: Final = frozenset({0, 1, 2, 3, 8})
_NODE_HEADINGS: Final = ("node", "op", "module", "traced as", "weights")
_LONGEST: Final = 200


@dataclasses.dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor that a file stores.

    Attributes:
        name: Of the parameter it comes from, or of the initializer.
        shape: Its sizes, as the file claims them.
        dtype: Type of its elements in the graph, e.g. `f32`; "?" where it is not known.
        codec: "dense" for an ordinary initializer, "external" for one whose data stands in another file, otherwise
            what the manifest says.
        active: Elements that are not 0, for an encoded tensor those whose value is stored; None where not known.
        nbytes: What the file stores for it, without names and nodes.
        readers: Names of the nodes that read it, decoded.
        module: Path of the module whose parameter it is; empty for what is no parameter.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    active: int | None
    nbytes: int
    readers: tuple[str, ...] = ()
    module: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def density(self) -> float | None:
        """Active share, 0 to 1; None where it is not known."""
        if self.active is None:
            return None
        return self.active / self.numel if self.numel else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class FileNode:
    """A node of the graph.

    Attributes:
        name: Its name, or `op_index` where the file has none.
        op: Type of operator, with its domain if that is not the standard one.
        inputs: Names of the values that it reads.
        outputs: Names of the values that it makes.
        weights: Names of the stored tensors that it reads, decoded.
        module: Path of the module whose weights it reads; empty where it reads none.
        fx_node: The node of the traced torch.fx graph that it was translated from; empty where it is not known.
        decodes: The tensor that it helps to decode; empty for a node of the model itself.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    module: str = ""
    fx_node: str = ""
    decodes: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class FileInspection:
    """An ONNX file, looked into without running it; `str()` gives one line per node of the model.

    Attributes:
        path: The file.
        nbytes: Its size.
        opset: Version of the standard operators.
        producer: What wrote it.
        weights: How weights are stored, as `export_onnx` was told; empty for files without a manifest.
        quantize: Likewise.
        tensors: What it stores.
        nodes: Its graph, nodes that decode weights included.
        notices: What is odd about it.
    """

    path: str
    nbytes: int
    opset: int
    producer: str
    weights: str
    quantize: str | None
    tensors: tuple[FileTensor, ...]
    nodes: tuple[FileNode, ...]
    notices: tuple[str, ...] = ()

    @property
    def tensor_bytes(self) -> int:
        """What the file stores for its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def decoding_nodes(self) -> int:
        """Number of nodes that only decode weights."""
        return sum(bool(node.decodes) for node in self.nodes)

    def summary(self) -> list[tuple[str, str]]:
        """The file in a few words, as label and text."""
        stored = ", ".join(filter(None, (self.weights or "as they stand: the file has no manifest", self.quantize)))
        own = len(self.nodes) - self.decoding_nodes
        rest = self.nbytes - self.tensor_bytes
        rows = [
            ("file", self.path),
            ("size", f"{self.nbytes:,} bytes: tensors {self.tensor_bytes:,}, graph and names {max(rest, 0):,}"),
            ("weights", stored),
            ("graph", f"{own} nodes, {self.decoding_nodes} more that decode weights; opset {self.opset}"),
            ("producer", self.producer or "unknown"),
        ]
        return [(label, shortened(visible(text), longest=_LONGEST)) for label, text in rows] + [
            ("notice", shortened(visible(notice), longest=_LONGEST)) for notice in self.notices
        ]

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows of the tensors as text, the total last."""
        rows = [_tensor_cells(tensor) for tensor in self.tensors]
        elements, active = sum(t.numel for t in self.tensors), [t.active for t in self.tensors]
        total = None if any(count is None for count in active) else sum(count or 0 for count in active)
        density = "-" if total is None else f"{total / elements if elements else 1.0:.4f}"
        counts = (format_count(elements) if elements > 10**15 else str(elements), "-" if total is None else str(total))
        rows.append(("total", "", "", "", *counts, density, str(self.tensor_bytes), ""))
        return _TENSOR_HEADINGS, rows

    def words(self) -> frozenset[int]:
        """Columns of `cells` that hold words."""
        return _TENSOR_WORDS

    def table(self) -> str:
        """The tensors as a table of text."""
        headings, rows = self.cells()
        return text_table(headings, rows, left=_TENSOR_WORDS)

    def node_cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows of the nodes of the model: where each comes from."""
        own = (node for node in self.nodes if not node.decodes)
        return _NODE_HEADINGS, [(n.name, n.op, n.module, n.fx_node, ", ".join(n.weights)) for n in own]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        fields = dataclasses.asdict(self)
        for tensor, record in zip(fields["tensors"], self.tensors, strict=True):
            tensor["density"] = record.density
        return {"schema": SCHEMA, "version": SCHEMA_VERSION, "tensor_bytes": self.tensor_bytes, **fields}

    def to_json(self) -> str:
        """Everything as JSON text in ASCII; `<` is written as an escape, so that it can stand inside HTML."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False).replace("<", "\\u003c")

    def __str__(self) -> str:
        lines = [f"# {label}: {text}" for label, text in self.summary()]
        return "\n".join([*lines, *(_node_line(node) for node in self.nodes if not node.decodes)])

    def _repr_html_(self) -> str:
        headings, rows = self.cells()
        node_headings, node_rows = self.node_cells()
        return fragment(
            html_table(("", ""), self.summary(), left={0, 1}),
            html_table(headings, rows, left=_TENSOR_WORDS, caption="tensors"),
            html_table(node_headings, node_rows, left=range(5), caption="nodes"),
            preformatted(str(self), summary="graph"),
        )


def _tensor_cells(tensor: FileTensor) -> tuple[str, ...]:
    return (
        tensor.name,
        "x".join(map(str, tensor.shape)),
        tensor.dtype,
        tensor.codec,
        str(tensor.numel) if tensor.numel < 10**15 else format_count(tensor.numel),
        "-" if tensor.active is None else str(tensor.active),
        "-" if tensor.density is None else f"{tensor.density:.4f}",
        str(tensor.nbytes),
        ", ".join(tensor.readers),
    )


def _node_line(node: FileNode) -> str:
    facts = [f"%{node.fx_node}"] if node.fx_node else []
    facts += [f"@{node.module}"] if node.module else []
    line = f"{', '.join(node.outputs)} = {node.op}({', '.join(node.inputs)})"
    return visible(f"{line}  # {' '.join(facts)}" if facts else line)
