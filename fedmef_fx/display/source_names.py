"""Name files of Python code without the folders of the machine: reasons end up in pages that people send on."""

import re
from pathlib import Path
from typing import Final

__all__ = ["source_name", "with_source_names"]

# An absolute path of a Python file: between double quotes, where it may hold spaces, or up to the next separator.
_PATH: Final = re.compile(
    r"""(?<=")(?:[A-Za-z]:)?[/\\][^"\n]*\.py\b"""
    r"""|(?<![\w./\\])(?:[A-Za-z]:)?[/\\][^\s"':,;()]*\.py\b"""
)


def source_name(file: str) -> str:
    """The name of a source file that holds on every machine.

    Args:
        file: As tracebacks name it: an absolute path, or what stands for code without a file (`<stdin>`).

    Returns:
        The path from the outermost package that the file is in, or the bare name of a file that is in none.

    Example:
        >>> source_name(torch.nn.modules.conv.__file__)
        'torch/nn/modules/conv.py'
    """
    path = Path(file)
    if not path.is_absolute():
        return file
    name = path.name
    for folder in path.parents:
        if not (folder / "__init__.py").is_file():
            break
        name = f"{folder.name}/{name}"
    return name


def with_source_names(text: str) -> str:
    """A text in which every absolute path of a Python file has become its `source_name`."""
    return _PATH.sub(lambda match: source_name(match[0]), text)
