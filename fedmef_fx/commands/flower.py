"""`fedmef-fx flower new DIR`: a Flower app of this project: ServerApp, ClientApp and what both share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedmef_fx.commands.command import AsJson, Result, command
from fedmef_fx.commands.flower_app import files_of
from fedmef_fx.errors import ConfigError
from fedmef_fx.files.atomic import replacing, usable_folder

__all__ = ["flower"]


class Action(StrEnum):
    """What to do."""

    NEW = "new"


@command
def flower(
    *,
    action: Annotated[Action, typer.Argument(help="new: write an app.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where; made if it is missing.")],
    as_json: AsJson = False,
) -> Result:
    """Write a Flower app: a ServerApp and a ClientApp that train digits, to put a model and data of your own into.

    Its README.md has the commands that run it: simulated, on this machine, with TLS and authentication of nodes.
    """
    del action, as_json
    files = files_of(directory.resolve().name)
    there = [name for name in files if (directory / name).exists()]
    if there:
        raise ConfigError(
            f"{directory}: has {', '.join(there)} already; expected a directory without: files stay as they are"
        )
    for name, text in files.items():
        path = directory / name
        usable_folder(path.parent, error=ConfigError)
        with replacing(path, error=ConfigError) as temporary:
            temporary.write_text(text, encoding="utf-8")
    data = {"directory": str(directory), "files": sorted(files)}
    return Result(data, lambda console: _show(console, directory, sorted(files)))


def _show(console: Console, directory: Path, files: list[str]) -> None:
    del console
    for name in files:
        typer.echo(str(directory / name))
    typer.echo(f"How to run it: {directory / 'README.md'}")
