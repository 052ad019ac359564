"""Stages of what takes a while, told to the logger `fedmef_fx`: programs log them, the command line shows the last one.

`logging.getLogger("fedmef_fx")` and the loggers below it say at level INFO what was done, at DEBUG what begins and what
was refused, and at WARNING what went wrong and was dealt with. Nothing is printed unless the application asks for it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

__all__ = ["LOGGER", "stage", "watching_stages"]

LOGGER: Final = "fedmef_fx"
_STAGE: Final = "fedmef_stage"
"""Attribute of records that say what begins."""


@contextlib.contextmanager
def stage(logger: logging.Logger, what: str) -> Iterator[None]:
    """A block that is one stage.

    Args:
        logger: Of the module.
        what: What happens, e.g. "export: convert".
    """
    logger.debug("%s", what, extra={_STAGE: what})
    start = time.perf_counter()
    yield
    logger.debug("%s: %.2f s", what, time.perf_counter() - start)


@contextlib.contextmanager
def watching_stages(show: Callable[[str], None]) -> Iterator[None]:
    """A block in which each stage that begins is shown.

    Args:
        show: Called with what happens.
    """
    logger, handler = logging.getLogger(LOGGER), _Shower(show)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    propagates, logger.propagate = logger.propagate, logger.propagate and level != logging.NOTSET
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


class _Shower(logging.Handler):
    """Hands over what begins."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        what = getattr(record, _STAGE, None)
        if isinstance(what, str):
            self._show(what)
