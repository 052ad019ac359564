"""What a pass did and refused, and the report of a pipeline."""

import dataclasses
from collections.abc import Iterator

__all__ = ["PassReport", "PassResult", "Refusal"]


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Something a pass could have rewritten and did not.

    Attributes:
        where: Node, module or parameter name.
        reason: Why.
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass did.

    Attributes:
        name: The pass with its options, e.g. `insert-masks{density=0.1}`.
        rewrites: Names of the nodes or parameters that were rewritten.
        refusals: What was not, and why.
        seconds: Wall-clock time of the pass, verification excluded.
        notices: What came out otherwise than one might expect, such as a density that was rounded.
    """

    name: str
    rewrites: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    seconds: float = 0.0
    notices: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the pass changed anything."""
        return bool(self.rewrites)

    def __str__(self) -> str:
        head = f"{self.name}: {len(self.rewrites)} rewritten, {len(self.refusals)} refused, {self.seconds * 1e3:.0f} ms"
        notices = [f"  notice: {notice}" for notice in self.notices]
        return "\n".join([head, *(f"  refused {refusal}" for refusal in self.refusals), *notices])


@dataclasses.dataclass(frozen=True, slots=True)
class PassReport:
    """The results of a pipeline, in order."""

    results: tuple[PassResult, ...]

    def __iter__(self) -> Iterator[PassResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, name: str) -> PassResult:
        """The result of a pass by its name without options."""
        for result in self.results:
            if result.name.partition("{")[0] == name:
                return result
        raise KeyError(f"no pass {name!r}; passes: {', '.join(r.name for r in self.results)}")

    def __str__(self) -> str:
        return "\n".join(map(str, self.results))
