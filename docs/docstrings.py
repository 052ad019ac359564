"""Reads this project's docstrings for the reference: a section `Example:` holds a session, as `Examples:` does."""

import re
from typing import Any

import griffe


class Sessions(griffe.Extension):
    """Names the section as griffe knows it, so that graphs in it are not taken for links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for everything that has a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
