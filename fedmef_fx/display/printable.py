"""Text from outside made fit to be shown: names of modules, parameters and files may hold anything."""

__all__ = ["shortened", "visible"]


def visible(text: str) -> str:
    """Text in one line and without control characters: what cannot be printed is written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str, *, longest: int) -> str:
    """Text of at most so many characters; the middle is left out, because both ends of a path tell something."""
    if len(text) <= longest:
        return text
    tail = (longest - 3) // 2
    return f"{text[: longest - 3 - tail]}...{text[len(text) - tail :]}"
