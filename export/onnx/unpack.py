"""`unpack_onnx`: the dense form of a packed file, for tools that want weights as constants."""

import dataclasses
import os
from pathlib import Path

from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx.digest import data_of, verify_onnx
from fedmef_fx.export.onnx.manifest import Manifest
from fedmef_fx.export.onnx.read import decoding_chains, read_model
from fedmef_fx.files.atomic import check_target

__all__ = ["UnpackedFile", "unpack_onnx"]


@dataclasses.dataclass(frozen=True, slots=True)
class UnpackedFile:
    """A file that was written.

    Attributes:
        path: Where.
        bytes: Its size, a second file included.
        packed_bytes: Size of the file that it was made from.
        tensors: Parameters that were stored encoded.
    """

    path: Path
    bytes: int
    packed_bytes: int
    tensors: tuple[str, ...]


def unpack_onnx(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> UnpackedFile:
    """Write the dense form of an exported file: every weight a plain tensor, equal bit for bit to what it decodes to.

    Args:
        source: A file that `export_onnx` wrote, of any storage.
        target: The file to write, whole or not at all.

    Raises:
        ExportError: A source that is damaged, changed, not from `export_onnx` or in two files, one whose decoders are
            not what its manifest says, or a target that cannot be written.

    Example:
        >>> import tempfile, torch, fedmef_fx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model, path = torch.nn.Linear(64, 64), f"{folder}/packed.onnx"
        ...     _ = fedmef_fx.export_onnx(model, path, example_inputs=(torch.randn(2, 64),), weights="packed")
        ...     unpack_onnx(path, f"{folder}/dense.onnx").path.name
        'dense.onnx'
    """
    destination = check_target(target, error=_error)
    manifest = verify_onnx(source)
    from fedmef_fx.export.onnx.fold import folded, put_in_place  # noqa: PLC0415 -- imports onnx and onnxruntime
    from fedmef_fx.export.onnx.write import total_bytes, written  # noqa: PLC0415 -- imports onnx

    try:
        proto, packed_bytes = read_model(Path(source))
        if data_of(proto) is not None:
            raise ExportError("its weights stand in a second file; unpack_onnx takes models of one file")
        decoding_chains(proto, manifest)
        constants = folded(proto, manifest)
    except ExportError as error:
        raise ExportError(f"unpack_onnx: {source}: {error}") from error
    put_in_place(proto, constants, {row.value: row.name for row in manifest.tensors})
    with written(proto, Manifest("dense", manifest.quantize, ()), destination):
        pass
    tensors = tuple(row.name for row in manifest.tensors)
    return UnpackedFile(destination, total_bytes(destination), packed_bytes, tensors)


def _error(message: str) -> ExportError:
    return ExportError(f"unpack_onnx: {message}")
