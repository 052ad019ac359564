"""`fedmef-fx`: the command line."""

from typing import Annotated

import typer

from fedmef_fx import __version__
from fedmef_fx.commands.bench import bench
from fedmef_fx.commands.compare import compare
from fedmef_fx.commands.compare_methods import compare_methods
from fedmef_fx.commands.demo import demo
from fedmef_fx.commands.doctor import doctor
from fedmef_fx.commands.export import export
from fedmef_fx.commands.inspect import inspect
from fedmef_fx.commands.memory import memory
from fedmef_fx.commands.train import train
from fedmef_fx.commands.unpack import unpack
from fedmef_fx.commands.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedmef-fx",
    help="FedMef for any PyTorch model: sparse federated training in little memory, and ONNX for the edge.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # what is not a FedmefError is a bug, whose traceback is wanted as it is
    rich_markup_mode=None,
)
for _command in (demo, train, compare_methods, export, verify, unpack, inspect, compare, memory, bench, doctor):
    app.command()(_command)


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
    app()
