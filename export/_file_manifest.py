"""Read what an exported file says about its encoded tensors: metadata that anybody may have written."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any, Final

from fedmef_fx.errors import ExportError

if TYPE_CHECKING:
    import onnx

__all__ = ["EncodedRow", "FileManifest", "file_manifest"]

_KEY: Final = "fedmef_fx.tensors"
_VERSION: Final = 1
_LONGEST_BYTES: Final = 50_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedRow:
    """A tensor that the file stores encoded.

    Attributes:
        name: Of the parameter it comes from.
        value: Name of the decoded tensor in the graph.
        shape: Its shape.
        codec: How positions and values are stored, e.g. `rice3/float32`; shown as it stands.
        active: Elements whose value is stored.
        bytes: What the file stores for it.
        node: The node of the traced model that reads it first; empty where that is not known.
    """

    name: str
    value: str
    shape: tuple[int, ...]
    codec: str
    active: int
    bytes: int
    node: str


@dataclasses.dataclass(frozen=True, slots=True)
class FileManifest:
    """What the metadata of a file says.

    Attributes:
        weights: The option of `export_onnx`.
        quantize: Likewise.
        rows: The encoded tensors.
    """

    weights: str
    quantize: str | None
    rows: tuple[EncodedRow, ...]


_COLUMNS: Final = tuple(field.name for field in dataclasses.fields(EncodedRow))


def file_manifest(proto: "onnx.ModelProto") -> FileManifest | None:
    """The manifest in a model's metadata; None where there is none.

    Raises:
        ExportError: A manifest that cannot be read.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == _KEY), None)
    if text is None:
        return None
    try:
        if len(text) > _LONGEST_BYTES:
            raise ValueError(f"{len(text):,} characters")
        return _read(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportError(
            f"its metadata {_KEY!r} is no manifest of version {_VERSION}: {type(error).__name__}: {error!s:.200}; the "
            "file is damaged or from another version of fedmef_fx: export the model again"
        ) from error


def _read(document: Any) -> FileManifest:
    if document["version"] != _VERSION:
        raise ValueError(f"version {document['version']!r}")
    columns = document["columns"]
    rows = tuple(_row(dict(zip(columns, row, strict=True))) for row in document["rows"])
    weights, quantize = document["weights"], document["quantize"]
    if not isinstance(weights, str) or not isinstance(quantize, str | None):
        raise TypeError(f"weights {weights!r}, quantize {quantize!r}")
    return FileManifest(weights, quantize, rows)


def _row(fields: dict[str, Any]) -> EncodedRow:
    row = EncodedRow(**{name: fields[name] for name in _COLUMNS})
    if not isinstance(row.shape, list):
        raise TypeError(f"shape {row.shape!r}")
    numbers, texts = (*row.shape, row.active, row.bytes), (row.name, row.value, row.codec, row.node)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"row of {row.name!r}: {numbers}")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"row {texts!r}")
    if row.active > math.prod(row.shape):
        raise ValueError(f"row of {row.name!r}: {row.active} active elements in {row.shape}")
    return dataclasses.replace(row, shape=tuple(row.shape))
