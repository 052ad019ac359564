"""`fedmef-fx`: the command line.

What names the commands and says what they are for is here, so that help, version and completion start without torch. A
command's own module, which needs it, is imported when the command runs or its options are asked for.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from fedmef_fx import __version__
from fedmef_fx.commands.invocation import remember

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: Final = {
    "demo": "Train a small federation, export it, check the file.",
    "train": "Train a model, federated and sparse, or go on with a run.",
    "compare-methods": "Run federated methods on the same clients, side by side.",
    "fit": "Make a pretrained model fit a size in bytes and a time.",
    "export": "Write a transformed or a trained model as an ONNX file.",
    "verify": "Check an exported file against the digest in it.",
    "unpack": "Write a packed ONNX file as a plain, dense one.",
    "inspect": "Show what a transformation did, or an ONNX file.",
    "compare": "Compare two checkpoints, or two rounds of a federation.",
    "memory": "Measure or predict what a training step takes.",
    "bench": "Time the transformation, a training step, a file.",
    "flower": "Write a Flower app that trains on many machines.",
    "doctor": "Check the installation, or what becomes of a model.",
}
"""Name of each command, which is that of its function and module, and what it is for."""

_SETTINGS: Final = {"help_option_names": ["--help", "-h"]}


class _Commands(TyperGroup):
    """Commands whose modules are imported when they are used."""

    _lists_only = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        remember(ctx.info_name, args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        if self._lists_only:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name])
        name = cmd_name.replace("-", "_")
        function = getattr(importlib.import_module(f"fedmef_fx.commands.{name}"), name)
        alone = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
        alone.command(cmd_name, context_settings=dict(_SETTINGS))(function)
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with self._listing():
            super().format_commands(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        with self._listing():
            return super().shell_complete(ctx, incomplete)

    @contextlib.contextmanager
    def _listing(self) -> Iterator[None]:
        """A block that asks for names and purposes of commands alone."""
        self._lists_only = True
        try:
            yield
        finally:
            self._lists_only = False


app = typer.Typer(
    name="fedmef-fx",
    cls=_Commands,
    help="FedMef for any PyTorch model: sparse federated training in little memory, and ONNX for the edge.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # what is not a FedmefError is a bug, whose traceback is wanted as it is
    rich_markup_mode=None,
    context_settings=dict(_SETTINGS),
)


def _print_version(is_asked_for: bool) -> None:
    if is_asked_for:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """FedMef for any PyTorch model: sparse federated training in little memory, and ONNX for the edge."""


def main() -> None:
    """Run the command line, and leave with its exit code."""
    app(prog_name="fedmef-fx")
