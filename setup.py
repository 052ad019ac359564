"""What pyproject.toml cannot say: a long description without links that lead nowhere outside the repository."""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).resolve().parent / "README.md"
WHERE_FILES_ARE = "Paths such as `docs/guide.md` name files of the source distribution."
_FENCE = "```"
# [text](target) or ![text](target), where the target is a path: no address, no place on the same page.
_LINK_TO_A_FILE = re.compile(r"!?\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<path>[^)\s]+)\)")


def long_description(readme: str) -> str:
    """The README for a page that lies elsewhere than the files it links to, as a package index shows it.

    Args:
        readme: Markdown.

    Returns:
        The same text, where links to files name the path instead: the source distribution holds the files, and no
        public address does. Addresses, places on the page and code blocks are unchanged.
    """
    parts = readme.split(_FENCE)
    parts[::2] = (_LINK_TO_A_FILE.sub(r"\g<text> (`\g<path>`)", part) for part in parts[::2])
    return _FENCE.join(parts)


if __name__ == "__main__":
    setup(
        long_description=f"{long_description(README.read_text(encoding='utf-8'))}\n{WHERE_FILES_ARE}\n",
        long_description_content_type="text/markdown",
    )
