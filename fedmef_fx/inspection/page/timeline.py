"""Memory over one training step, as the page draws it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["MemoryPair", "Timeline"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Bytes by category at moments of one training step, in order of time.

    Attributes:
        moments: What had just run at each moment, e.g. the path of a module.
        phases: Name of each phase and the index of its first moment: `(("forward", 0), ("backward", 61))`.
        categories: Category -> its bytes at each moment; drawn on top of one another in this order.
    """

    moments: tuple[str, ...]
    phases: tuple[tuple[str, int], ...]
    categories: Mapping[str, tuple[int, ...]]

    @property
    def totals(self) -> tuple[int, ...]:
        """Bytes of all categories at each moment."""
        return tuple(map(sum, zip(*self.categories.values(), strict=True)))

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "moments": list(self.moments),
            "phases": [list(phase) for phase in self.phases],
            "categories": [[name, list(counts)] for name, counts in self.categories.items()],
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPair:
    """The timelines of a model and of its original.

    Attributes:
        after: Of the model.
        before: Of the original; None where it was not measured.
    """

    after: Timeline
    before: Timeline | None = None
