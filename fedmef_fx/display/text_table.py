"""Tables as plain text, for terminals, logs and tests."""

from collections.abc import Sequence
from typing import Final

from fedmef_fx.display.printable import shortened, visible

__all__ = ["format_count", "text_table"]

_LONGEST_CELL: Final = 100


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: frozenset[int] = frozenset()) -> str:
    """Columns of text, two spaces apart.

    Args:
        headings: One per column.
        rows: Cells as text, as many per row as there are headings.
        left: Columns to align on the left; the others are numbers.
    """
    table = [[shortened(visible(cell), longest=_LONGEST_CELL) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, table))


def format_count(count: float) -> str:
    """A count with three significant digits: 999, 1.23k, 45.6M."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"
