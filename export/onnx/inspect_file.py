"""`inspect_onnx`: look into an ONNX file without running it.

The file may come from anywhere: sizes that it claims are compared with the bytes that it has before anything is
counted, no other file is opened, and nothing that it says is executed.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx.file_records import FileInspection, FileNode, FileTensor
from fedmef_fx.export.onnx.manifest import Manifest, read_manifest
from fedmef_fx.export.onnx.read import decoding_chains, read_model

if TYPE_CHECKING:
    import onnx

__all__ = ["inspect_onnx"]

_STANDARD_DOMAINS: Final = ("", "ai.onnx")
_MOST_DIMS: Final = 64

# Short name of an element type, and the numpy type of its raw bytes; None where zeros cannot be counted in it.
_TYPES: Final[dict[int, tuple[str, str | None]]] = {
    1: ("f32", "<f4"),
    2: ("u8", "u1"),
    3: ("i8", "i1"),
    4: ("u16", "<u2"),
    5: ("i16", "<i2"),
    6: ("i32", "<i4"),
    7: ("i64", "<i8"),
    8: ("string", None),
    9: ("bool", "u1"),
    10: ("f16", "<f2"),
    11: ("f64", "<f8"),
    12: ("u32", "<u4"),
    13: ("u64", "<u8"),
    14: ("c64", "<c8"),
    15: ("c128", "<c16"),
    16: ("bf16", None),
    21: ("u4", None),
    22: ("i4", None),
}


def inspect_onnx(path: str | os.PathLike[str]) -> FileInspection:
    """Look into an ONNX file: which tensors it stores how, and which module and traced node each of its nodes is.

    Args:
        path: Any ONNX file; those that `export_onnx` wrote say more about themselves.

    Returns:
        Tensors with codec, density and bytes, and nodes.

    Raises:
        ExportError: A file that is missing, no ONNX, damaged, or whose description of itself cannot be right.
    """
    proto, nbytes = read_model(Path(path))
    try:
        manifest = read_manifest(proto)
        chains = decoding_chains(proto, manifest)
        tensors = tuple(_tensors(proto, manifest, chains))
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error
    claimed = sum(tensor.nbytes for tensor in tensors)
    return FileInspection(
        path=str(path),
        nbytes=nbytes,
        opset=max((entry.version for entry in proto.opset_import if entry.domain in _STANDARD_DOMAINS), default=0),
        producer=" ".join(part for part in (proto.producer_name, proto.producer_version) if part),
        weights=manifest.weights if manifest is not None else "",
        quantize=manifest.quantize if manifest is not None else None,
        tensors=tensors,
        nodes=tuple(_nodes(proto, manifest, chains)),
        notices=tuple(_notices(proto, manifest, missing_bytes=claimed - nbytes)),
    )


def _tensors(proto: "onnx.ModelProto", manifest: Manifest | None, chains: Mapping[int, str]) -> Iterable[FileTensor]:
    readers: dict[str, list[str]] = defaultdict(list)
    pieces: dict[str, int] = defaultdict(int)  # initializer -> readers that decode
    for index, node in enumerate(proto.graph.node):
        for name in node.input:
            if index in chains:
                pieces[name] += 1
            else:
                readers[name].append(_node_name(node, index))
    for row in manifest.tensors if manifest is not None else ():
        module = row.name.rpartition(".")[0]
        dtype = "f16" if row.codec.endswith("/float16") else "f32"
        yield FileTensor(
            row.name, row.shape, dtype, row.codec, row.active, row.bytes, tuple(readers[row.value]), module
        )
    for tensor in proto.graph.initializer:
        if pieces[tensor.name] and not readers[tensor.name]:
            continue  # counts for what it encodes
        yield _initializer(tensor, tuple(readers[tensor.name]))


def _initializer(tensor: "onnx.TensorProto", readers: tuple[str, ...]) -> FileTensor:
    shape = tuple(tensor.dims)
    if len(shape) > _MOST_DIMS or any(size < 0 for size in shape):
        raise ExportError(f"initializer {tensor.name!r:.100} claims the shape {list(shape)!s:.100}")
    dtype, raw = _TYPES.get(tensor.data_type, ("?", None))
    module = tensor.name.rpartition(".")[0]
    if tensor.data_location == type(tensor).EXTERNAL:
        return FileTensor(tensor.name, shape, dtype, "external", None, 0, readers, module)
    stored = FileTensor(tensor.name, shape, dtype, "dense", None, len(tensor.raw_data), readers, module)
    if not tensor.HasField("raw_data"):
        return _typed(tensor, stored)
    if raw is None:
        return stored
    values = np.dtype(raw)
    if stored.numel * values.itemsize != len(tensor.raw_data):
        raise ExportError(
            f"initializer {tensor.name!r:.100} claims {dtype}{list(shape)!s:.100}, but has {len(tensor.raw_data):,} "
            "bytes: the file is damaged"
        )
    active = int(np.count_nonzero(np.frombuffer(tensor.raw_data, values)))
    return FileTensor(tensor.name, shape, dtype, "dense", active, len(tensor.raw_data), readers, module)


def _typed(tensor: "onnx.TensorProto", stored: FileTensor) -> FileTensor:
    """A tensor whose elements stand in a repeated field of their type, as many as there are."""
    fields = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")
    filled = [getattr(tensor, name) for name in fields if len(getattr(tensor, name))]
    if not filled or stored.dtype not in ("f32", "f64", "i8", "u8", "i16", "u16", "i32", "i64", "u64", "bool"):
        if not filled and stored.numel:
            raise ExportError(f"initializer {tensor.name!r:.100} claims {stored.numel:,} elements and has none")
        return stored
    (values,) = filled[:1]
    if len(values) != stored.numel:
        raise ExportError(
            f"initializer {tensor.name!r:.100} claims {stored.numel:,} elements and has {len(values):,}: the file is "
            "damaged"
        )
    width = np.dtype(dict(_TYPES.values())[stored.dtype] or "u1").itemsize
    active = sum(1 for value in values if value)
    return FileTensor(
        stored.name, stored.shape, stored.dtype, "dense", active, width * len(values), stored.readers, stored.module
    )


def _nodes(proto: "onnx.ModelProto", manifest: Manifest | None, chains: Mapping[int, str]) -> Iterable[FileNode]:
    rows = manifest.tensors if manifest is not None else ()
    names = {row.value: row.name for row in rows}
    sizes = {row.value: len(row.shape) for row in rows}
    traced = {row.value: row.node for row in rows}
    pieces = {name for index in chains for name in proto.graph.node[index].input}
    for tensor in proto.graph.initializer:
        if tensor.name not in pieces:
            names[tensor.name], sizes[tensor.name] = tensor.name, len(tensor.dims)
    outputs = {value.name for value in proto.graph.output}
    for index, node in enumerate(proto.graph.node):
        if index in chains:
            yield FileNode(
                _node_name(node, index), _op(node), tuple(node.input), tuple(node.output), decodes=chains[index]
            )
            continue
        read = [name for name in node.input if name in names]
        owners = [names[name] for name in sorted(read, key=lambda name: -sizes[name]) if "." in names[name]]
        # Files that keep their names call a value as the traced node is called; outputs have names of their own.
        own = next((name for name in node.output if name not in outputs), "") if node.name else ""
        yield FileNode(
            _node_name(node, index),
            _op(node),
            tuple(node.input),
            tuple(node.output),
            tuple(names[name] for name in read),
            owners[0].rpartition(".")[0] if owners else "",
            own or next((traced[name] for name in read if traced.get(name)), ""),
        )


def _node_name(node: "onnx.NodeProto", index: int) -> str:
    return node.name or f"{node.op_type}_{index}"


def _op(node: "onnx.NodeProto") -> str:
    return node.op_type if node.domain in _STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"


def _notices(proto: "onnx.ModelProto", manifest: Manifest | None, *, missing_bytes: int) -> Iterable[str]:
    if manifest is None and proto.producer_name != "pytorch":
        yield "it has no manifest of fedmef_fx: names of modules are those of its initializers"
    available = {value.name for value in (*proto.graph.input, *proto.graph.initializer)} | {""}
    available |= {value.values.name for value in proto.graph.sparse_initializer}
    for index, node in enumerate(proto.graph.node):
        missing = [name for name in node.input if name not in available]
        if missing:
            yield f"node {_node_name(node, index)} reads {missing[0]}, which nothing before it makes: it cannot run"
        available |= set(node.output)
    external = sum(tensor.data_location == type(tensor).EXTERNAL for tensor in proto.graph.initializer)
    if external:
        yield f"{external} tensors stand in another file, which was not opened: bytes and density are not known"
    if missing_bytes > 0 and not external:
        yield f"its manifest claims {missing_bytes:,} bytes of tensors more than the whole file has"
