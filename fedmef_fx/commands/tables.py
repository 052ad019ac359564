"""Tables on a console: columns where they fit without splitting a word, else one paragraph per row."""

import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmef_fx.graph.recording import visible

__all__ = ["show_table"]

_GAP = 3
"""Columns between two columns of a table."""
_INDENT = 2


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
    shown = [[visible(cell) for cell in row] for row in rows]
    widths = _widths([headings, *shown], room=console.width)
    if widths is None:
        _show_paragraphs(console, headings, shown)
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        justify = "right" if index in numbers else "left"
        table.add_column(heading, justify=justify, width=width, overflow="fold")  # type: ignore[arg-type]
    for row in shown:
        table.add_row(*map(Text, row))
    console.print(table)


def _widths(lines: Sequence[Sequence[str]], *, room: int) -> list[int] | None:
    """Widths of columns, as wide as their cells or narrower, but never than a word; None where they do not fit."""
    columns = list(zip(*lines, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    least = [max(max(map(cell_len, cell.split(" "))) for cell in column) for column in columns]
    room -= _GAP * (len(columns) - 1)
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda index: (widths[index] - least[index], widths[index]))
        widths[widest] -= min(sum(widths) - room, max((widths[widest] - least[widest] + 1) // 2, 1))
    return widths


def _show_paragraphs(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Each row as its first cell, and below it the others with their headings."""
    for row in rows:
        first, *rest = row
        named = [
            f"{heading}: {cell}" if heading else cell for heading, cell in zip(headings[1:], rest, strict=True) if cell
        ]
        for text, indent in ((first, 0), (", ".join(named), _INDENT)):
            lines = textwrap.wrap(
                text,
                max(console.width, 2 * _INDENT),
                initial_indent=" " * indent,
                subsequent_indent=" " * (indent + _INDENT),
                break_long_words=False,
                break_on_hyphens=False,
            )
            for line in lines:
                console.print(Text(line), soft_wrap=True)
