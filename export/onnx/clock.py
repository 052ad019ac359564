"""Wall-clock seconds of the stages of an export."""

import contextlib
import time
from collections.abc import Iterator

__all__ = ["Clock"]


class Clock:
    """Seconds by stage, in the order of the stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block that is one stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
