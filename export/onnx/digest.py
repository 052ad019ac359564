"""A digest at the end of an exported file, so that a file that was damaged is found out before it gives wrong numbers.

ONNX files are protobuf messages, which may be written in pieces: the last piece of an exported file is the metadata
entry `fedmef_fx.sha256`, the SHA-256 of all bytes before it in hexadecimal. It has always the same length, so that

    body, digest = data[:-86], data[-64:]       # 22 bytes of tags, lengths and the key stand between them
    assert hashlib.sha256(body).hexdigest().encode() == digest

checks a file without any library. A tool that rewrites the model writes another order, and the digest fails: the
file is then no longer the one whose parity was checked.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    import onnx

__all__ = ["DATA_KEY", "DIGEST_BYTES", "DIGEST_KEY", "DataFile", "check_digest", "data_of", "seal", "verify_onnx"]

DIGEST_KEY: Final = "fedmef_fx.sha256"
DATA_KEY: Final = "fedmef_fx.data"
_HEX: Final = 64
# Field 14 of ModelProto is metadata_props, of StringStringEntryProto 1 is the key and 2 the value; wire type 2.
_ENTRY: Final = bytes([0x0A, len(DIGEST_KEY)]) + DIGEST_KEY.encode() + bytes([0x12, _HEX])
_PREFIX: Final = bytes([0x72, len(_ENTRY) + _HEX]) + _ENTRY
DIGEST_BYTES: Final = len(_PREFIX) + _HEX


@dataclasses.dataclass(frozen=True, slots=True)
class DataFile:
    """The second file of a model that one file cannot hold.

    Attributes:
        location: Its name, in the directory of the model.
        bytes: Its size.
        sha256: Of its content, in hexadecimal.
    """

    location: str
    bytes: int
    sha256: str


def data_of(proto: "onnx.ModelProto") -> DataFile | None:
    """The second file of a model, None where it has none.

    Raises:
        ExportError: Metadata that is damaged, or names a file elsewhere.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == DATA_KEY), None)
    if text is None:
        return None
    try:
        data = DataFile(**json.loads(text))
        if Path(data.location).name != data.location or type(data.bytes) is not int:
            raise ValueError(f"location {data.location!r}, bytes {data.bytes!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"metadata {DATA_KEY!r} names no file next to the model: {error}; export it again") from error
    return data


def seal(body: bytes) -> bytes:
    """A serialized model without a digest, with one."""
    return body + _PREFIX + hashlib.sha256(body).hexdigest().encode()


def check_digest(data: bytes, *, where: str) -> None:
    """Find out whether the bytes of a file are those that were exported.

    Raises:
        ExportError: They are not, or never had a digest.
    """
    prefix, digest = data[-DIGEST_BYTES:-_HEX], data[-_HEX:]
    if prefix != _PREFIX:
        raise ExportError(
            f"{where}: got no digest at the end of the file ({len(data):,} bytes); it is truncated, was rewritten "
            "by another tool, or was not exported by fedmef_fx: export the model again, or copy the file again"
        )
    actual = hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).hexdigest()
    if actual.encode() != digest:
        raise ExportError(
            f"{where}: the file has digest {actual[:12]}..., expected {digest[:12].decode(errors='replace')}...; it "
            "was damaged or changed since it was exported: copy it again, or export the model again"
        )


def verify_onnx(path: str | os.PathLike[str]) -> Manifest:
    """Check that a file is, bit for bit, what `export_onnx` wrote, and say what it stores.

    Args:
        path: The file.

    Returns:
        The manifest.

    Raises:
        ExportError: A file that cannot be read, is truncated, damaged or changed, or is not from `export_onnx`.

    Example:
        >>> import tempfile, torch, fedmef_fx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model, path = torch.nn.Linear(8, 4), f"{folder}/model.onnx"
        ...     _ = fedmef_fx.export_onnx(model, path, example_inputs=(torch.randn(2, 8),))
        ...     verify_onnx(path).weights
        'dense'
    """
    where = f"verify_onnx: {path}"
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ExportError(f"{where}: cannot be read: {error}; expected a file that export_onnx wrote") from error
    check_digest(data, where=where)
    import onnx  # noqa: PLC0415 -- only exports need it

    try:
        proto = onnx.ModelProto.FromString(data)
    except Exception as error:  # the parser's errors have no other common base
        raise ExportError(f"{where}: is no ONNX model: {error}; export the model again") from error
    _check_data(Path(path), data_of(proto), where=where)
    manifest = read_manifest(proto)
    if manifest is None:
        raise ExportError(f"{where}: has no manifest; expected a file that export_onnx wrote")
    return manifest


def _check_data(path: Path, data: DataFile | None, *, where: str) -> None:
    if data is None:
        return
    file = path.resolve().parent / data.location
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            size = opened.tell()
    except OSError as error:
        raise ExportError(f"{where}: its second file cannot be read: {error}; copy both files") from error
    if size != data.bytes or digest != data.sha256:
        raise ExportError(
            f"{where}: {data.location} has {size:,} bytes with digest {digest[:12]}..., expected {data.bytes:,} bytes "
            f"with digest {data.sha256[:12]}...; copy it again, or export the model again"
        )
