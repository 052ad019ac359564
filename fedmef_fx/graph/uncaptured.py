"""Calls that no graph serves yet, without capturing one for them."""

import contextlib
import functools
from collections.abc import Iterator

from torch import nn

from fedmef_fx.graph.dispatch import tables_in

__all__ = ["capturing_nothing_more"]


@contextlib.contextmanager
def capturing_nothing_more(model: nn.Module) -> Iterator[None]:
    """A block in which calls that no graph serves yet run the original forward over the layers with their masks.

    That computes what a graph for them would, at no price of a capture. Where passes of the caller's own may have
    changed what graphs compute, or a graph that is to serve all calls was dropped, it would not: these are captured.
    """
    held = [
        (table, table.attempts)
        for _, table in tables_in(model)
        if not table.serves_all
        and isinstance(table.extend, functools.partial)  # what captures, with what it is told
        and not table.extend.keywords.get("passes")
    ]
    for table, _ in held:
        table.attempts = 0
    try:
        yield
    finally:
        for table, attempts in held:
            table.attempts = attempts
