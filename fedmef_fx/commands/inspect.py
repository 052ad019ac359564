"""`fedmef-fx inspect`: what a transformation does to a model."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from torch import nn

import fedmef_fx
from fedmef_fx.commands.command import AsJson, Result, command
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.commands.models import Checkpoint, InputShape, ModelName, build_model, example_input, transformed
from fedmef_fx.commands.page import Opens, Page, page_result
from fedmef_fx.commands.reports import show_coverage, show_passes
from fedmef_fx.commands.tables import show_table
from fedmef_fx.config import Config
from fedmef_fx.inspection import Inspection
from fedmef_fx.inspection import inspect as inspect_model

__all__ = ["inspect"]


class View(StrEnum):
    """What to look at."""

    TEXT = "text"
    TABLE = "table"
    DIFF = "diff"
    PASSES = "passes"
    COVERAGE = "coverage"
    DOT = "dot"


@command
@takes_config()
def inspect(
    *,
    model: ModelName,
    view: Annotated[
        View,
        typer.Option(
            help="text: the graph, one line a node. table: weights, density and operations per layer. diff: graph "
            "before and after. passes: what each pass did and refused, with reasons. coverage: where each weight is "
            "rewritten. dot: for Graphviz."
        ),
    ] = View.TEXT,
    original: Annotated[bool, typer.Option("--original", help="Look at the model before the transformation.")] = False,
    html: Page = None,
    opens: Opens = False,
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Show the graph of a model after the transformation: text, table, difference, DOT, JSON, a page."""
    before = build_model(model, seed=config.seed)
    x = example_input(model, input_shape)
    after = before if original else transformed(before, config, checkpoint=checkpoint)
    inspection = inspect_model(after, None if x is None else (x,))
    if html is not None or opens:
        return page_result(inspection, html, title=model, original=None if original else before, opens=opens)
    return Result(inspection.to_json(), lambda console: _show(console, view, inspection, after=after, before=before))


def _show(console: Console, view: View, inspection: Inspection, *, after: nn.Module, before: nn.Module) -> None:
    match view:
        case View.TEXT:
            typer.echo(str(inspection))
        case View.DIFF:
            typer.echo(inspection.diff(before))
        case View.DOT:
            typer.echo(inspection.to_dot())
        case View.TABLE:
            headings, rows = inspection.table().cells()
            words = {"parameter", "shape", "tier", "reason"}
            numbers = frozenset(i for i, heading in enumerate(headings) if heading not in words)
            show_table(console, headings, rows, numbers=numbers)
        case View.PASSES:
            show_passes(console, inspection.passes)
        case View.COVERAGE:
            show_coverage(console, fedmef_fx.coverage(after))
