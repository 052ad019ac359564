"""Tables that benchmarks write into pages of the docs, so that no figure is typed by hand."""

import re
from pathlib import Path

__all__ = ["fill"]


def fill(page: Path, name: str, text: str) -> None:
    """Put a text between `<!-- NAME -->` and `<!-- end of NAME -->`, in place of what is there.

    Args:
        page: A Markdown file that has both marks once.
        name: Of the place.
        text: Markdown.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    content = page.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"{page}: expected the marks {begin} and {end} once each, in this order")
    place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    filled = f"{begin}\n\n{text.strip()}\n\n{end}"
    page.write_text(place.sub(lambda _: filled, content), encoding="utf-8")
