"""The manifest: what an exported file says about its own weights, for tools that read it.

It stands in the model's `metadata_props` under the key `fedmef_fx.tensors`, as JSON:

    {"version": 1, "weights": "packed", "quantize": null,
     "columns": ["name", "value", "shape", "codec", "active", "bytes", "node"],
     "rows": [["layer1.0.conv1.weight", "w3", [64, 64, 3, 3], "rice3/float32", 3686, 17012, "conv2d_1"], ...]}

One row per tensor that is stored encoded, in the order of the file; one that has no row is an ordinary initializer.
A dense file has no rows. `docs/onnx.md` describes the fields for readers without fedmef_fx.
"""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any, Final

from fedmef_fx.errors import ExportError

if TYPE_CHECKING:
    import onnx

__all__ = ["MANIFEST_KEY", "Manifest", "ManifestTensor", "read_manifest", "write_manifest"]

MANIFEST_KEY: Final = "fedmef_fx.tensors"
_VERSION: Final = 1
_LONGEST: Final = 50_000_000  # characters


@dataclasses.dataclass(frozen=True, slots=True)
class ManifestTensor:
    """A tensor that the file stores encoded.

    Attributes:
        name: Of the parameter it comes from.
        value: Name of the decoded tensor in the graph: the output of the last node that decodes it.
        shape: Its shape.
        codec: "<positions>/<values>". Positions are "gap<k>", "rice<k>", "bitmap" or "dense" (every element is
            stored), values "float32", "float32-e<k><k>..." (exponents coded in levels of k bits), "float16",
            "int16" (times a scale per slice of dimension 0) or "int8".
        active: Elements whose value is stored.
        bytes: What the file stores for it: positions, values and scales, without names and nodes.
        node: The node of the traced model that reads it first; empty where that is not known.
    """

    name: str
    value: str
    shape: tuple[int, ...]
    codec: str
    active: int
    bytes: int
    node: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Active share, 0 to 1."""
        return self.active / self.numel if self.numel else 0.0


_COLUMNS: Final = tuple(field.name for field in dataclasses.fields(ManifestTensor))


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What a file says about how it was exported.

    Attributes:
        weights: The option of that name of `export_onnx`.
        quantize: Likewise.
        tensors: Those that are stored encoded.
    """

    weights: str
    quantize: str | None
    tensors: tuple[ManifestTensor, ...]


def write_manifest(proto: "onnx.ModelProto", manifest: Manifest) -> None:
    """Put a manifest into a model's metadata, in place of one that is there."""
    rows = [[getattr(tensor, column) for column in _COLUMNS] for tensor in manifest.tensors]
    document = {
        "version": _VERSION,
        "weights": manifest.weights,
        "quantize": manifest.quantize,
        "columns": _COLUMNS,
        "rows": rows,
    }
    kept = [(entry.key, entry.value) for entry in proto.metadata_props if entry.key != MANIFEST_KEY]
    proto.ClearField("metadata_props")
    for key, value in (*kept, (MANIFEST_KEY, json.dumps(document, separators=(",", ":")))):
        proto.metadata_props.add(key=key, value=value)


def read_manifest(proto: "onnx.ModelProto") -> Manifest | None:
    """The manifest of a model.

    Args:
        proto: Any ONNX model.

    Returns:
        The manifest; None where the model has none, so was not written by `export_onnx`.

    Raises:
        ExportError: A manifest that is damaged, or of a later version.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == MANIFEST_KEY), None)
    if text is None:
        return None
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"{len(text):,} characters")
        return _read(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportError(
            f"its metadata {MANIFEST_KEY!r} is no manifest of version {_VERSION}: {type(error).__name__}: "
            f"{error!s:.200}; the file is damaged or from another version of fedmef_fx: export the model again"
        ) from error


def _read(document: Any) -> Manifest:
    if document["version"] != _VERSION:
        raise ValueError(f"version {document['version']!r}")
    columns = document["columns"]
    tensors = tuple(_tensor(dict(zip(columns, row, strict=True))) for row in document["rows"])
    weights, quantize = document["weights"], document["quantize"]
    if not isinstance(weights, str) or not isinstance(quantize, str | None):
        raise TypeError(f"weights {weights!r}, quantize {quantize!r}")
    return Manifest(weights, quantize, tensors)


def _tensor(fields: dict[str, Any]) -> ManifestTensor:
    stored = ManifestTensor(**{name: fields[name] for name in _COLUMNS})
    if not isinstance(stored.shape, list):
        raise TypeError(f"shape {stored.shape!r}")
    numbers = (*stored.shape, stored.active, stored.bytes)
    texts = (stored.name, stored.value, stored.codec, stored.node)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"row of {stored.name!r}: {numbers}")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"row {texts!r}")
    if stored.active > stored.numel:
        raise ValueError(f"row of {stored.name!r}: {stored.active} active elements in {stored.shape}")
    return dataclasses.replace(stored, shape=tuple(stored.shape))
