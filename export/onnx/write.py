"""Write: from an ONNX graph to a sealed file, and a second file for weights beyond what one file holds.

A protobuf message holds less than 2 GiB. Where a model is larger, its large tensors go to `<name>-<digest>.data` next
to it, one after another, as ONNX's external data. The name holds the digest of the content, so that writing a model
anew never changes the data of the old one: whatever fails, the old pair stays as it was. The metadata entry
`fedmef_fx.data` says how many bytes the second file has, and their SHA-256.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from onnx import ModelProto, TensorProto

from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx.digest import DATA_KEY, DIGEST_BYTES, data_of, seal
from fedmef_fx.export.onnx.manifest import Manifest, write_manifest
from fedmef_fx.files.atomic import replacing

__all__ = ["LARGEST_FILE_BYTES", "needs_second_file", "stored_bytes", "total_bytes", "written"]

LARGEST_FILE_BYTES: Final = 2**31 - 1  # of a protobuf message
_GRAPH_BYTES: Final = 2**24  # set aside for everything but large tensors
_LARGE_TENSOR_BYTES: Final = 1024


def needs_second_file(tensor_bytes: int) -> bool:
    """Whether tensors of so many bytes leave too little room for the graph in one file."""
    return tensor_bytes > LARGEST_FILE_BYTES - _GRAPH_BYTES


def stored_bytes(proto: ModelProto) -> int:
    """Bytes of the tensors of a graph: of the file, up to its nodes and names."""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


def total_bytes(target: Path) -> int:
    """Size of a file that was written, and of its second file where it has one."""
    data = _data_file(target)
    return target.stat().st_size + (data.stat().st_size if data is not None else 0)


@contextlib.contextmanager
def written(proto: ModelProto, manifest: Manifest, target: Path) -> Iterator[Path]:
    """A block in which a graph stands in a temporary file, which takes its name when the block ends well.

    Args:
        proto: The graph; gains the manifest, and loses its tensors where they go to a second file.
        manifest: What it says about itself.
        target: The file to be.

    Yields:
        The temporary file, next to the second one if there is one.

    Raises:
        ExportError: Writing failed; files that were there are as they were.
    """
    write_manifest(proto, manifest)
    before = _data_file(target)
    data = _write_data(proto, target) if needs_second_file(stored_bytes(proto)) else None
    try:
        with replacing(target, error=_error) as temporary:
            temporary.write_bytes(seal(proto.SerializeToString(deterministic=True)))
            yield temporary
    except BaseException:
        if data is not None and data != before:
            data.unlink(missing_ok=True)
        raise
    if before is not None and before != data:
        before.unlink(missing_ok=True)


def _error(message: str) -> ExportError:
    return ExportError(f"export_onnx: {message}")


def _data_file(target: Path) -> Path | None:
    """The second file of an exported model that stands at a path already."""
    try:
        if not target.is_file() or target.stat().st_size < DIGEST_BYTES:
            return None
        content = target.read_bytes()
        if DATA_KEY.encode() not in content:
            return None
        data = data_of(ModelProto.FromString(content))
    except Exception:  # whatever else is there is no exported model, and gets replaced
        return None
    return None if data is None else target.parent / data.location


def _write_data(proto: ModelProto, target: Path) -> Path:
    """Move the large tensors of a graph to a second file."""
    large = [t for t in proto.graph.initializer if len(t.raw_data) >= _LARGE_TENSOR_BYTES]
    digest, size = hashlib.sha256(), 0
    for tensor in large:
        digest.update(tensor.raw_data)
        size += len(tensor.raw_data)
    location = f"{target.stem}-{digest.hexdigest()[:12]}.data"
    with replacing(target.parent / location, error=_error) as temporary, temporary.open("wb") as file:
        for tensor in large:
            file.write(tensor.raw_data)
    offset = 0
    for tensor in large:
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        offset += length
    document = {"location": location, "bytes": size, "sha256": digest.hexdigest()}
    proto.metadata_props.add(key=DATA_KEY, value=json.dumps(document, separators=(",", ":")))
    return target.parent / location
