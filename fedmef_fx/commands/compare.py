"""`fedmef-fx compare`: two checkpoints or two rounds of a federated run side by side."""

from typing import Annotated

import typer
from rich.console import Console

from fedmef_fx.commands.command import AsJson, Result, command
from fedmef_fx.commands.invocation import command_line
from fedmef_fx.commands.page import Opens, Page, page_result
from fedmef_fx.commands.tables import show_table
from fedmef_fx.inspection.comparison import Comparison
from fedmef_fx.inspection.comparison import compare as compare_states

__all__ = ["compare"]


@command
def compare(
    *,
    before: Annotated[
        str,
        typer.Argument(
            metavar="BEFORE",
            help="A checkpoint that `fedmef-fx train` or `save` wrote, a round of `train --keep-rounds`, or the folder "
            "of a run, which stands for its newest round.",
        ),
    ],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="Another one of the same architecture.")],
    html: Page = None,
    opens: Opens = False,
    as_json: AsJson = False,
) -> Result:
    """Compare two checkpoints: overlap of the masks, weights grown and pruned, distance of the weights."""
    comparison = compare_states(before, after)
    if html is not None or opens:
        return page_result(html, lambda path: comparison.to_html(path, command=command_line()), opens=opens)
    return Result(comparison.to_json(), lambda console: _show(console, comparison))


def _show(console: Console, comparison: Comparison) -> None:
    headings, rows = comparison.cells()
    title = "; ".join(comparison.notes())
    show_table(console, headings, rows, title=title, numbers=frozenset(range(1, len(headings))))
