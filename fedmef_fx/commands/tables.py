"""Tables on a console."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmef_fx.graph.recording import visible

__all__ = ["show_table"]


def show_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    numbers: frozenset[int] = frozenset(),
) -> None:
    """Print a table.

    Args:
        console: Where.
        headings: One per column.
        rows: Cells as text; nothing in them is interpreted.
        title: Above the table.
        numbers: Columns to align on the right.
    """
    if title is not None:
        console.print(Text(visible(title)))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print(table)
