"""Wall-clock seconds of the stages of an export."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Final

from fedmef_fx.display.stages import stage

__all__ = ["Clock"]

_LOGGER: Final = logging.getLogger(__name__)


class Clock:
    """Seconds by stage, in the order of the stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block that is one stage."""
        start = time.perf_counter()
        with stage(_LOGGER, f"export: {name}"):
            yield
        self.seconds[name] = time.perf_counter() - start
