"""`fedmef-fx verify`: whether an exported file is, bit for bit, what was exported."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import fedmef_fx
from fedmef_fx.commands.command import AsJson, Result, command
from fedmef_fx.commands.tables import show_table

__all__ = ["verify"]


@command
def verify(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX file that `export` wrote.")],
    as_json: AsJson = False,
) -> Result:
    """Check an exported file against the digest in it, and list what it stores encoded."""
    manifest = fedmef_fx.verify_onnx(file)
    size = file.stat().st_size
    data = {"path": str(file), "bytes": size, "is_intact": True, **dataclasses.asdict(manifest)}
    rows = [
        (t.name, "x".join(map(str, t.shape)), t.codec, f"{t.density:.3f}", f"{t.bytes:,}") for t in manifest.tensors
    ]

    def show(console: Console) -> None:
        stored = manifest.weights if manifest.quantize is None else f"{manifest.weights}, {manifest.quantize}"
        console.print(f"{file} is intact: {size:,} bytes, weights {stored}")
        if rows:
            headings = ("tensor", "shape", "codec", "density", "bytes")
            show_table(console, headings, rows, numbers=frozenset({3, 4}))

    return Result(data, show)
