"""An ONNX file as a page: its own nodes in modules, its tensors with codec, density and bytes."""

from os import PathLike
from pathlib import Path

from fedmef_fx.export.onnx.file_records import FileInspection, FileNode
from fedmef_fx.inspection.page.data import PageContent
from fedmef_fx.inspection.page.page import write_page
from fedmef_fx.inspection.table import LayerRow, Table
from fedmef_fx.records.graphs import GraphRecord, NodeRecord

__all__ = ["write_onnx_page"]


def write_onnx_page(
    found: FileInspection, path: str | PathLike[str], *, title: str | None = None, command: str | None = None
) -> None:
    """Write a page about an ONNX file.

    Nodes that only decode weights are left out; what they decode is shown in the boxes that read it.

    Args:
        found: What `fedmef_fx.inspect_onnx` returned.
        path: Of the page, e.g. `model.html`.
        title: Its heading; None for the name of the file.
        command: The command line that writes the page, which shows it.

    Raises:
        ConfigError: The page cannot be written.
    """
    rows = tuple(
        LayerRow(tensor.name, tensor.shape, tensor.numel, tensor.numel if tensor.active is None else tensor.active)
        for tensor in found.tensors
    )
    content = PageContent(
        title=title or Path(found.path).name,
        after=(GraphRecord("", "both", _nodes(found)),),
        layers=Table(rows),
        stored={tensor.name: (tensor.codec, tensor.nbytes) for tensor in found.tensors},
        notices=[f"{label}: {text}" for label, text in found.summary()],
        command=command,
    )
    write_page(path, content)


def _nodes(found: FileInspection) -> tuple[NodeRecord, ...]:
    """Inputs, tensors that are read, nodes, and one output of all that nothing reads."""
    own = [node for node in found.nodes if not node.decodes]
    made = {value for node in found.nodes for value in node.outputs}
    read = [value for node in own for value in node.inputs if value]
    stored = {tensor.name for tensor in found.tensors}
    entries = [value for value in dict.fromkeys(read) if value not in made and value not in stored]
    names = _Names()
    source = {value: names.unique(value) for value in entries}
    records = [NodeRecord(source[value], "placeholder", value) for value in entries]
    weights = {}
    for tensor in dict.fromkeys(name for node in own for name in node.weights):
        weights[tensor] = names.unique(tensor)
        records.append(NodeRecord(weights[tensor], "get_attr", tensor, module=tensor.rpartition(".")[0]))
    for node in own:
        name = names.unique(node.name)
        records.append(_record(node, name, source, weights))
        source |= dict.fromkeys(node.outputs, name)
    results = [value for node in own for value in node.outputs if value and value not in set(read)]
    reached = tuple(dict.fromkeys(source[value] for value in results))
    records.append(NodeRecord(names.unique("output"), "output", "output", ", ".join(results), reached))
    return tuple(records)


def _record(node: FileNode, name: str, source: dict[str, str], weights: dict[str, str]) -> NodeRecord:
    reads = (*(source[value] for value in node.inputs if value in source), *(weights[w] for w in node.weights))
    return NodeRecord(
        name,
        "call_function",
        node.op,
        ", ".join(node.inputs),
        tuple(dict.fromkeys(reads)),
        module=node.module,
        origin=node.fx_node or None,
    )


class _Names:
    """Names that nothing else has: files may use one several times, and for nodes and values alike."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, name: str) -> str:
        """The name, or the name with a number."""
        free = name = name or "(no name)"
        number = 1
        while free in self._taken:
            number += 1
            free = f"{name} ({number})"
        self._taken.add(free)
        return free
