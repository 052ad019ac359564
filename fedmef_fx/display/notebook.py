"""HTML fragments for notebooks: what `_repr_html_` of tables, reports and histories return.

A fragment is complete in itself: inline styles in the notebook's own colours, no script, nothing from a network. All
text is escaped, so that no name can end an element or start one.
"""

import html
from collections.abc import Collection, Sequence
from typing import Final

from fedmef_fx.display.printable import shortened, visible

__all__ = ["fragment", "html_table", "preformatted"]

_LONGEST_CELL: Final = 200
_CELL: Final = "padding:0.15em 0.8em 0.15em 0;border-bottom:1px solid rgba(128,128,128,0.35)"


def html_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = frozenset(), caption: str = ""
) -> str:
    """A table as an HTML fragment.

    Args:
        headings: One per column.
        rows: Cells as text, as many per row as there are headings; nothing in them is interpreted.
        left: Columns to align on the left; the others are numbers.
        caption: Above the table.
    """
    above = f'<caption style="text-align:left;caption-side:top">{escaped(caption)}</caption>' if caption else ""
    head = "".join(_cell("th", heading, is_left=index in left) for index, heading in enumerate(headings))
    body = "".join(
        f"<tr>{''.join(_cell('td', cell, is_left=index in left) for index, cell in enumerate(row))}</tr>"
        for row in rows
    )
    return (
        '<table style="border-collapse:collapse;font-variant-numeric:tabular-nums">'
        f"{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def preformatted(lines: str, *, summary: str) -> str:
    """Lines of text that open below a summary, as an HTML fragment."""
    text = "\n".join(map(escaped, lines.splitlines()))
    style = "overflow:auto;max-height:40em;white-space:pre"
    return f'<details><summary>{escaped(summary)}</summary><pre style="{style}">{text}</pre></details>'


def fragment(*parts: str) -> str:
    """Fragments below one another."""
    return f"<div>{''.join(parts)}</div>"


def escaped(text: str) -> str:
    """Text for an HTML element or a quoted attribute, in one line and without control characters."""
    return html.escape(visible(text), quote=True)


def _cell(kind: str, text: str, *, is_left: bool) -> str:
    align = "left" if is_left else "right"
    return f'<{kind} style="text-align:{align};{_CELL}">{escaped(shortened(text, longest=_LONGEST_CELL))}</{kind}>'
