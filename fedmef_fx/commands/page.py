"""`--html` and `--open`: what a command found out as a page."""

import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fedmef_fx.commands.command import Result
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.errors import ConfigError

__all__ = ["Opens", "Page", "page_result"]

Page = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page to look around in; it opens in any browser."),
]
Opens = Annotated[bool, typer.Option("--open", help="Open the page of --html in the browser.")]


def page_result(path: Path | None, write: Callable[[Path], None], *, opens: bool) -> Result:
    """Write a page and say where it is.

    Args:
        path: Of the file.
        write: Writes it.
        opens: Whether to open it.

    Raises:
        ConfigError: No path, or the file cannot be written.
    """
    if path is None:
        raise ConfigError("--open: got no page to open; name its file with --html: --html page.html --open")
    write(path)
    if opens:
        webbrowser.open(path.resolve().as_uri())
    size = path.stat().st_size
    return Result(
        {"path": str(path), "bytes": size}, lambda console: console.print(Text(f"{path}: {shown_bytes(size)}"))
    )
