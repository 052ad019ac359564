"""Read an ONNX file that may come from anywhere, and find the nodes in it that decode weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx.manifest import Manifest

if TYPE_CHECKING:
    import onnx

__all__ = ["decoding_chains", "read_model"]

_LARGEST_FILE_BYTES: Final = 2**31 - 1  # of a protobuf message


def read_model(path: Path) -> tuple["onnx.ModelProto", int]:
    """The model in a file, and the bytes of the file.

    Raises:
        ExportError: A file that is missing, too large, no ONNX or truncated.
    """
    import onnx  # noqa: PLC0415 -- slow to import
    from google.protobuf.message import DecodeError  # noqa: PLC0415 -- comes with onnx

    try:
        nbytes = path.stat().st_size
        if nbytes > _LARGEST_FILE_BYTES:
            raise ExportError(f"{path}: has {nbytes:,} bytes; an ONNX file has at most {_LARGEST_FILE_BYTES:,}")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read: {error}; expected an ONNX file") from error
    try:
        proto = onnx.ModelProto.FromString(data)
    except (DecodeError, RecursionError, MemoryError) as error:
        raise ExportError(
            f"{path}: {len(data):,} bytes that are no ONNX model, or a truncated one: {error!s:.200}"
        ) from error
    if proto.ir_version < 1 or not proto.graph.node:
        raise ExportError(f"{path}: no ONNX model, or a truncated one: it has no version or no graph")
    return proto, len(data)


def decoding_chains(proto: "onnx.ModelProto", manifest: Manifest | None) -> dict[int, str]:
    """Index of each node that only decodes weights -> the tensor that it helps to decode.

    Raises:
        ExportError: A manifest that names other values.
    """
    makers = {name: index for index, node in enumerate(proto.graph.node) for name in node.output}
    inputs = {value.name for value in proto.graph.input}
    chains: dict[int, str] = {}
    for row in manifest.tensors if manifest is not None else ():
        if row.value not in makers:
            raise ExportError(
                f"its manifest says that node outputs hold {row.name!r:.100}, but nothing makes {row.value!r:.100}"
            )
        pending = [makers[row.value]]
        while pending:
            index = pending.pop()
            if index in chains:
                continue
            chains[index] = row.name
            for name in proto.graph.node[index].input:
                if name in inputs:
                    raise ExportError(
                        f"its manifest calls {row.name!r:.100} a weight, but it depends on input {name!r:.100}"
                    )
                if name in makers:
                    pending.append(makers[name])
    return chains
