"""`fedmef-fx inspect --html`: an inspection as a page."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text
from torch import nn

from fedmef_fx.commands.command import Result
from fedmef_fx.errors import ConfigError
from fedmef_fx.inspection import Inspection

__all__ = ["Opens", "Page", "page_result"]

Page = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Write a page: graph, masks, weights, costs, refusals. It opens in any browser."
    ),
]
Opens = Annotated[bool, typer.Option("--open", help="Open the page of --html in the browser.")]


def page_result(
    inspection: Inspection, path: Path | None, *, title: str, original: nn.Module | None, opens: bool
) -> Result:
    """Write a page and say where it is.

    Args:
        inspection: What it shows.
        path: Of the file.
        title: Its heading.
        original: The model before the transformation.
        opens: Whether to open it.

    Raises:
        ConfigError: No path, or the file cannot be written.
    """
    if path is None:
        raise ConfigError(
            "--open: got no page to open; name its file: fedmef-fx inspect MODEL --html model.html --open"
        )
    inspection.to_html(path, title=title, original=original)
    if opens:
        webbrowser.open(path.resolve().as_uri())
    size = path.stat().st_size
    return Result(
        {"html": str(path), "bytes": size}, lambda console: console.print(Text(f"{path}: {size / 1e6:.2f} MB"))
    )
