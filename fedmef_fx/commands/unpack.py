"""`fedmef-fx unpack`: the dense form of an exported file, for tools that want weights as constants."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import fedmef_fx
from fedmef_fx.commands.command import AsJson, Result, command

__all__ = ["unpack"]


@command
def unpack(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX file that `export` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The dense file to write.")],
    as_json: AsJson = False,
) -> Result:
    """Write the dense form of a packed file: every weight a plain tensor, with the bits that it decodes to."""
    unpacked = fedmef_fx.unpack_onnx(file, output)
    data = {
        "path": str(unpacked.path),
        "bytes": unpacked.bytes,
        "packed_bytes": unpacked.packed_bytes,
        "tensors": list(unpacked.tensors),
    }

    def show(console: Console) -> None:
        console.print(
            f"{output}: {unpacked.bytes:,} bytes, of {unpacked.packed_bytes:,} packed; {len(unpacked.tensors)} tensors "
            "unpacked"
        )

    return Result(data, show)
