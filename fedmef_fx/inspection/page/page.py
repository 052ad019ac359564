"""One file: the document, the style and the script of a page, closed against what names may hold.

Everything that comes from a model stands in one JSON document, in which no character can end a script element; the
script puts it into the page as text. The content security policy allows this script and this style by their hashes,
pictures from inside the file, and nothing else: no network, no other script, no form, no frame.
"""

import base64
import functools
import hashlib
import html
import json
import re
from importlib import resources
from os import PathLike
from typing import Any, Final

from fedmef_fx.errors import ConfigError
from fedmef_fx.files.atomic import check_target, replacing
from fedmef_fx.inspection.page.data import PageContent, page_document

__all__ = ["page_html", "write_page"]

_SCRIPTS: Final = (
    "dom.js",
    "format.js",
    "marks.js",
    "graph.js",
    "minimap.js",
    "movable.js",
    "canvas.js",
    "pan.js",
    "weights.js",
    "figures.js",
    "panel.js",
    "overview.js",
    "charts.js",
    "tables.js",
    "sections.js",
    "search.js",
    "theme.js",
    "keys.js",
    "links.js",
    "main.js",
)
_ESCAPES: Final = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_LONGEST_TITLE: Final = 200


def write_page(path: str | PathLike[str], content: PageContent) -> None:
    """Write a page; the file is either the old one or complete.

    Args:
        path: Of the file, e.g. `model.html`.
        content: What it shows.

    Raises:
        ConfigError: The file cannot be written.
    """
    target = check_target(path, error=ConfigError)
    text = page_html(content)
    with replacing(target, error=ConfigError) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page_html(content: PageContent) -> str:
    """A page as text."""
    style, script = _style(), _script()
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    title = content.title if len(content.title) <= _LONGEST_TITLE else f"{content.title[:_LONGEST_TITLE]}..."
    parts = {
        "policy": html.escape(policy),
        "title": html.escape(f"{title} - fedmef_fx"),
        "style": style,
        "script": script,
        "document": _embedded(page_document(content)),
    }
    pieces = _source("page.html").split("%%")  # text, name, text, name, ..., text
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _embedded(document: dict[str, Any]) -> str:
    """JSON that can stand in a script element and in a JavaScript program: no character of it means anything there."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate is a valid Python string and no valid file; JSON's own escape of it is both.
    return text.translate(_ESCAPES).encode("utf-8", "backslashreplace").decode("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@functools.cache
def _style() -> str:
    return _without_comments(_source("page.css"))


@functools.cache
def _script() -> str:
    """The script's parts as one function, so that it leaves nothing in the page's global scope."""
    body = "\n".join(_without_comments(_source(f"js/{name}")) for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{body}}})();\n'


def _without_comments(source: str) -> str:
    """A source without indentation and without lines that are comments: a tenth of a page would be nothing else."""
    source = re.sub(r"^ */\*.*?\*/\n", "", source, flags=re.MULTILINE | re.DOTALL)
    lines = (line.strip() for line in source.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


@functools.cache
def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
