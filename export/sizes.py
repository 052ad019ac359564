"""Sizes that vary in a file besides the batch: their names, what they are multiples of, the range they may have."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Final

__all__ = ["Sizes", "VaryingSize", "read_sizes", "suggested_sizes"]

_TEXT: Final = re.compile(r"(?:([1-9]\d*)\*)?([^\W\d]\w*)")
_SUGGESTED_MULTIPLE: Final = re.compile(r"(\w+) = (?:(\d+)\*)?([^\W\d]\w*)")
_SUGGESTED_RANGE: Final = re.compile(r"\w+ = Dim\('(\w+)'(?:, min=(\d+))?(?:, max=(\w+))?\)")
_SUGGESTED_CONSTANT: Final = re.compile(r"(\w+) = (\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class VaryingSize:
    """A size that varies.

    Attributes:
        name: Sizes of one name vary together.
        multiple: What it is a multiple of: 32 for "32*height".
        least: The smallest number of multiples.
        most: The largest; None for any.
        traced: How many multiples an example for tracing has at least: sizes 0 and 1 are taken for constants.
    """

    name: str
    multiple: int = 1
    least: int = 1
    most: int | None = None
    traced: int = 2

    @property
    def text(self) -> str:
        """As `dynamic_sizes` has it: "length" or "32*height"."""
        return self.name if self.multiple == 1 else f"{self.multiple}*{self.name}"

    def grown(self, size: int, by: int, least: int) -> int:
        """A size that has `by` multiples more, and at least `least` of them."""
        multiples = max(size // self.multiple + by, least)
        return self.multiple * (multiples if self.most is None else min(multiples, self.most))

    def limits(self) -> str:
        """What it may be, in words; empty for anything."""
        parts = [f"a multiple of {self.multiple}"] if self.multiple > 1 else []
        # torch.export takes 0 and 1 for constants, of which the file knows nothing.
        parts += [f"at least {self.least * self.multiple}"] if self.least > 2 else []
        parts += [] if self.most is None else [f"at most {self.most * self.multiple}"]
        return ", ".join(parts)


Sizes = Mapping[str, Mapping[int, VaryingSize]]


def read_sizes(texts: Mapping[str, Mapping[int, str]]) -> dict[str, dict[int, VaryingSize | None]]:
    """Read the sizes of `dynamic_sizes`, by argument and dimension; None for a text that is no size."""
    return {argument: {dim: _read(text) for dim, text in dims.items()} for argument, dims in texts.items()}


def _read(text: object) -> VaryingSize | None:
    found = _TEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None or found[2] == "batch":
        return None
    return VaryingSize(found[2], int(found[1] or 1))


def suggested_sizes(sizes: Sizes, message: str) -> Sizes | None:
    """Sizes as torch.export's error suggests: multiples, equal sizes, ranges, constants.

    Returns:
        None where it suggests nothing for these sizes, or what no size here can be.
    """
    _, _, listed = message.partition("Suggested fixes:\n")
    lines = [line.strip() for line in listed.split("\n\n")[0].splitlines() if line.strip()]
    names = {size.name for dims in sizes.values() for size in dims.values()}
    ranges = {found[1]: _range(found) for line in lines if (found := _SUGGESTED_RANGE.fullmatch(line))}
    roots: dict[str, tuple[str, int]] = {}
    constants: set[str] = set()
    for line in lines:
        if found := _SUGGESTED_CONSTANT.fullmatch(line):
            constants.add(found[1])
        elif found := _SUGGESTED_MULTIPLE.fullmatch(line):
            roots[found[1]] = (found[3], int(found[2] or 1))
        elif not _SUGGESTED_RANGE.fullmatch(line):
            return None  # such as 32*_height - 16
    if not names & (roots.keys() | constants | ranges.keys()) or (roots.keys() | constants) - names:
        return None

    def better(size: VaryingSize) -> VaryingSize:
        root, multiple = roots.get(size.name, (size.name, 1))
        least, most = ranges.get(root, (size.least, size.most) if root == size.name else (1, None))
        name = root if root in names else size.name
        return VaryingSize(name, size.multiple * multiple, max(least, 1), most, max(size.traced // multiple, 2))

    kept = {
        argument: {dim: better(size) for dim, size in dims.items() if size.name not in constants}
        for argument, dims in sizes.items()
    }
    result = {argument: dims for argument, dims in kept.items() if dims}
    return None if result == sizes else result


def _range(found: re.Match[str]) -> tuple[int, int | None]:
    return int(found[2] or 1), int(found[3]) if (found[3] or "").isdigit() else None
