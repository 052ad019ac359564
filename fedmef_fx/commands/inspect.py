"""`fedmef-fx inspect`: what a transformation does to a model."""

from enum import StrEnum
from typing import Annotated, Final

import typer
from rich.console import Console
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx.commands.arguments import CheckpointOption, InputShape, Passes, build_model, example_input, transformed
from fedmef_fx.commands.command import AsJson, Result, command
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.commands.invocation import command_line
from fedmef_fx.commands.page import Opens, Page, page_result
from fedmef_fx.commands.reports import show_coverage, show_passes
from fedmef_fx.commands.tables import show_table
from fedmef_fx.config import Config
from fedmef_fx.display.printable import visible
from fedmef_fx.export.onnx.file_records import FileInspection
from fedmef_fx.inspection import Inspection
from fedmef_fx.inspection import inspect as inspect_model
from fedmef_fx.inspection.onnx_page import write_onnx_page
from fedmef_fx.measure.memory import MemoryReport, memory
from fedmef_fx.models import REFERENCE_MODELS

__all__ = ["inspect"]

_FILE_SUFFIX: Final = ".onnx"

ModelNameOrFile = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"{', '.join(REFERENCE_MODELS)}, package.module:callable, which is imported from the current directory or "
        f"as installed and called without arguments; or a file, *{_FILE_SUFFIX}.",
    ),
]


class InspectView(StrEnum):
    """What to look at."""

    TEXT = "text"
    TABLE = "table"
    DIFF = "diff"
    PASSES = "passes"
    COVERAGE = "coverage"
    DOT = "dot"


@command
@takes_config()
def inspect(  # noqa: PLR0913 -- each is an option of the command line
    *,
    model: ModelNameOrFile,
    view: Annotated[
        InspectView,
        typer.Option(
            help="text: the graph, one line a node. table: weights, density and operations per layer. diff: graph "
            "before and after. passes: what each pass did and refused, with reasons. coverage: where each weight is "
            "rewritten. dot: for Graphviz."
        ),
    ] = InspectView.TEXT,
    print_after: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="Print the graphs after this pass on stderr; may be repeated."),
    ] = None,
    print_after_all: Annotated[
        bool, typer.Option("--print-after-all", help="Print the graphs after every pass on stderr.")
    ] = False,
    stop_after: Annotated[str | None, typer.Option(metavar="PASS", help="Run no pass after this one.")] = None,
    original: Annotated[bool, typer.Option("--original", help="Look at the model before the transformation.")] = False,
    html: Page = None,
    opens: Opens = False,
    with_memory: Annotated[
        bool, typer.Option("--memory", help="Measure a training step for the page's memory timeline; takes seconds.")
    ] = False,
    checkpoint: CheckpointOption = None,
    passes: Passes = None,
    input_shape: InputShape = None,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Show the graph of a model after the transformation: text, table, diff, DOT, JSON, a page; or an ONNX file."""
    if model.endswith(_FILE_SUFFIX):
        if passes:
            raise typer.BadParameter("no passes run on an ONNX file; expected a model", param_hint="--passes")
        if html is not None or opens:
            found = fedmef_fx.inspect_onnx(model)
            return page_result(html, lambda path: write_onnx_page(found, path, command=command_line()), opens=opens)
        return _inspect_file(model, view)
    if original and passes:
        raise typer.BadParameter("--original shows the model before all passes", param_hint="--passes")
    before = build_model(model, seed=config.seed)
    x = example_input(model, input_shape)
    after = before
    if not original:
        wanted = "all" if print_after_all else tuple(print_after or ())
        after = transformed(
            before,
            config,
            checkpoint=checkpoint,
            passes=passes,
            print_after=wanted,
            stop_after=stop_after,
            printer=_print_text,
        )
    inspection = inspect_model(after, None if x is None else (x,))
    if html is not None or opens:
        compared = None if original else before
        step, step_before = _steps(after, compared, x) if with_memory else (None, None)
        return page_result(
            html,
            lambda path: inspection.to_html(
                path,
                title=model,
                original=compared,
                memory=step,
                memory_before=step_before,
                command=command_line(),
            ),
            opens=opens,
        )
    compared = before if as_json and x is not None and not original else None
    return Result(
        inspection.to_json(compared), lambda console: _show(console, view, inspection, after=after, before=before)
    )


def _steps(model: nn.Module, original: nn.Module | None, x: Tensor | None) -> tuple[MemoryReport, MemoryReport | None]:
    """What a training step takes, after and before the transformation."""
    if x is None:
        raise typer.BadParameter("a step needs an input; expected --input with a shape", param_hint="--memory")
    before = None if original is None else memory(original, (x,), optimizer="sgd-momentum")
    return memory(model, (x,), optimizer="sgd-momentum"), before


def _inspect_file(path: str, view: InspectView) -> Result:
    if view not in (InspectView.TEXT, InspectView.TABLE):
        raise typer.BadParameter(f"got {view.value}; expected text or table for an ONNX file", param_hint="--view")
    inspection = fedmef_fx.inspect_onnx(path)
    return Result(inspection.to_json(), lambda console: _show_file(console, view, inspection))


def _show_file(console: Console, view: InspectView, inspection: FileInspection) -> None:
    if view is InspectView.TEXT:
        typer.echo(str(inspection))
        return
    show_table(console, ("", ""), inspection.summary())
    console.print()
    headings, rows = inspection.cells()
    show_table(console, headings, rows, numbers=frozenset(range(len(headings))) - inspection.words())
    console.print()
    show_table(console, *inspection.node_cells())


def _print_text(text: str) -> None:
    typer.echo(text, err=True)


def _show(console: Console, view: InspectView, inspection: Inspection, *, after: nn.Module, before: nn.Module) -> None:
    match view:
        case InspectView.TEXT:
            typer.echo(str(inspection))
        case InspectView.DIFF:
            typer.echo(inspection.diff(before))
        case InspectView.DOT:
            typer.echo(inspection.to_dot())
        case InspectView.TABLE:
            table = inspection.table(None if after is before or not inspection.has_example else before)
            headings, rows = table.cells()
            show_table(console, headings, rows, numbers=frozenset(range(len(headings))) - table.words())
            for notice in inspection.notices:
                console.print(visible(notice))
        case InspectView.PASSES:
            show_passes(console, inspection.passes)
        case InspectView.COVERAGE:
            show_coverage(console, fedmef_fx.coverage(after))
