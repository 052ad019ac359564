"""Where the parts of a group stand: rows, columns and lanes, found without knowing how large a part is drawn.

1. Row: the longest way from the group's entry, so that every value flows downwards.
2. Column 0: the longest chain through the group, found backwards from its last part. What stands beside it takes the
   first column that is free in its row, its predecessor's if that is one.
3. A value that skips rows goes straight down if the column of its source or target is free on the way, otherwise in a
   lane of its own beside the columns. Lanes are shared by values that never run side by side.

The page gives every row the height of its highest part and every column the width of its widest, so a part that opens
or closes moves others and changes no order. The method is that of Sugiyama, Tagawa and Toda (1981), without its search
for few crossings: modules have few parts, and the longest chain is what readers look for.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from fedmef_fx.inspection.page.hierarchy import Box, Group

__all__ = ["ENTRY", "EXIT", "Edge", "Flow", "Placement", "names_in", "plan"]

ENTRY: Final = -1
"""In place of a member's index: the upper edge of the group, where values come in."""

EXIT: Final = -2
"""The lower edge of the group, where values leave."""


@dataclasses.dataclass(frozen=True, slots=True)
class Edge:
    """A value that flows between two parts of a group.

    Attributes:
        source: Index of a member, or `ENTRY`.
        target: Index of a member, or `EXIT`.
        column: The column in which it goes down past other rows; None where it passes none.
        lane: The lane in which it does so instead.
    """

    source: int
    target: int
    column: int | None = None
    lane: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """The places in a group.

    Attributes:
        cells: Row and column of each member.
        edges: Values between members, from the entry and to the exit.
        columns: Number of columns.
        lanes: Number of lanes.
    """

    cells: tuple[tuple[int, int], ...]
    edges: tuple[Edge, ...]
    columns: int
    lanes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Flow:
    """What the boxes of a graph read, in both directions.

    Attributes:
        inputs: Box -> the boxes that it reads.
        users: Box -> the boxes that read it.
    """

    inputs: Mapping[str, Sequence[str]]
    users: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, inputs: Mapping[str, Sequence[str]]) -> "Flow":
        """From one direction."""
        users: dict[str, list[str]] = {name: [] for name in inputs}
        for name, sources in inputs.items():
            for source in sources:
                users[source].append(name)
        return cls(inputs, users)


def names_in(member: Box | Group) -> Iterator[str]:
    """The boxes of a member, at any depth."""
    if isinstance(member, Box):
        yield member.name
        return
    for inner in member.members:
        yield from names_in(inner)


def plan(
    members: Sequence[Box | Group], flow: Flow | None, names: Callable[[Box | Group], Iterable[str]] = names_in
) -> Placement:
    """Give the members of a group their places.

    Args:
        members: In order of execution.
        flow: What reads what; None where nothing is known about that: one stands below the other then, without edges.
        names: What a member is called in the flow, or what it holds.
    """
    if flow is None:
        return Placement(tuple((row, 0) for row in range(len(members))), (), 1, 0)
    pairs = _pairs(members, flow, names)
    rows = _rows(len(members), pairs)
    columns = _columns(rows, pairs)
    edges, lanes = _routes(rows, columns, pairs)
    return Placement(tuple(zip(rows, columns, strict=True)), edges, max(columns, default=0) + 1, lanes)


def _pairs(
    members: Sequence[Box | Group], flow: Flow, names: Callable[[Box | Group], Iterable[str]]
) -> list[tuple[int, int]]:
    """Edges between members, each once; those that leave or enter the group end at its edges.

    A value that goes back up, to a module that is called again, has no edge: members stand where they first run.
    """
    place = {name: index for index, member in enumerate(members) for name in names(member)}
    pairs: dict[tuple[int, int], None] = {}
    for name, index in place.items():
        for source in flow.inputs.get(name, ()):
            pairs[place.get(source, ENTRY), index] = None
        if any(user not in place for user in flow.users.get(name, ())):
            pairs[index, EXIT] = None
    return [pair for pair in pairs if pair[0] < pair[1] or pair[1] == EXIT]


def _rows(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    rows = [0] * count
    for source, target in sorted(pairs):  # by source, whose own row is final then: members are in order of execution
        if source >= 0 and target >= 0:
            rows[target] = max(rows[target], rows[source] + 1)
    return rows


def _columns(rows: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[int]:
    sources: dict[int, list[int]] = {}
    for source, target in pairs:
        if source >= 0:
            sources.setdefault(target, []).append(source)
    columns = [-1] * len(rows)
    taken: set[tuple[int, int]] = set()
    at = max(range(len(rows)), key=lambda index: (rows[index], index), default=-1)
    while at >= 0:
        columns[at] = 0
        taken.add((rows[at], 0))
        at = max(sources.get(at, ()), key=lambda index: (rows[index], -index), default=-1)
    for index, row in enumerate(rows):
        if columns[index] >= 0:
            continue
        wished = [columns[source] for source in sources.get(index, ()) if columns[source] > 0]
        free = (column for column in (*wished, *range(1, len(rows) + 1)) if (row, column) not in taken)
        columns[index] = next(free)
        taken.add((row, columns[index]))
    return columns


def _routes(
    rows: Sequence[int], columns: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> tuple[tuple[Edge, ...], int]:
    taken = set(zip(rows, columns, strict=True))
    last = max(rows, default=-1)
    edges: list[Edge] = []
    ends: list[int] = []  # of each lane: the row above which it is in use
    spans = [((rows[s] if s >= 0 else -1), (rows[t] if t >= 0 else last + 1), s, t) for s, t in pairs]
    for top, bottom, source, target in sorted(spans):
        between = range(top + 1, bottom)
        if not between:
            edges.append(Edge(source, target))
            continue
        wished = [columns[index] for index in (target, source) if index >= 0] or [0]
        column = next((c for c in wished if all((row, c) not in taken for row in between)), None)
        if column is not None:
            edges.append(Edge(source, target, column=column))
            taken.update((row, column) for row in between)
            continue
        lane = next((index for index, end in enumerate(ends) if end <= top), len(ends))
        ends[lane : lane + 1] = [bottom]
        edges.append(Edge(source, target, lane=lane))
    return tuple(edges), len(ends)
