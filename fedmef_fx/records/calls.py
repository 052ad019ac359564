"""Which modules Python called, in which order, and whose results each one read: a plain record."""

import dataclasses

__all__ = ["CallRecord"]


@dataclasses.dataclass(frozen=True, slots=True)
class CallRecord:
    """What one call of a model did outside its graphs.

    Attributes:
        order: Paths of the called modules, by their first call.
        flows: Pairs of a path whose result reached another path, computed with in between or not; as the first of a
            pair "" is the model's own input, as the second its result.
    """

    order: tuple[str, ...]
    flows: tuple[tuple[str, str], ...]
