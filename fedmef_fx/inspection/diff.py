"""The difference between two versions of a graph, as unified text."""

import difflib

__all__ = ["text_diff"]


def text_diff(before: str, after: str, *, context: int = 3) -> str:
    """A unified diff of two graph texts.

    Args:
        before: Text of the original graphs.
        after: Text of the graphs now.
        context: Unchanged lines shown around each change.

    Returns:
        Lines that start with "-", "+" or " " below a heading; empty when the texts are equal.
    """
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), fromfile="original", tofile="model", n=context, lineterm=""
    )
    return "\n".join(lines)
