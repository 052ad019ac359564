"""Passes and the pipeline that runs, verifies and reports them.

A pass is a frozen dataclass: its fields are its options. It changes a `Program` in place and returns a `PassResult`
that tells truthfully what it rewrote and what it refused to rewrite, with the reason.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from fedmef_fx.display.stages import stage
from fedmef_fx.errors import FedmefError, PassError
from fedmef_fx.records.passes import PassReport, PassResult

if TYPE_CHECKING:
    from fedmef_fx.graph.program import Program

__all__ = ["Pass", "Pipeline", "describe"]

_LOGGER: Final = logging.getLogger(__name__)


class Pass(Protocol):
    """One rewrite of a program. Implementations are frozen dataclasses; their fields are their options."""

    name: ClassVar[str]

    def run(self, program: "Program") -> PassResult:
        """Rewrite the program in place; refuse with a reason what cannot be rewritten."""
        ...


def describe(step: Pass) -> str:
    """A pass with its options: `insert-masks{density=0.1, allocation='erk'}`; `graph/pass_text.py` reads it back."""
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(step) if dataclasses.is_dataclass(step) else ()
    shown = ", ".join(f"{f.name}={_literal(getattr(step, f.name))}" for f in fields if f.init)
    return f"{step.name}{{{shown}}}" if shown else step.name


def _literal(value: object) -> str:
    """A value as a Python literal; a type as the text that stands for it in `Config.ignore`."""
    if isinstance(value, type):
        return repr(f"type:{value.__module__}.{value.__qualname__}")
    if type(value) is tuple:
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind.__repr__(value)  # of a subclass, such as numpy.float64, the plain number
    if callable(value) and hasattr(value, "__qualname__"):  # the same text in every process
        return repr(f"{value.__module__}.{value.__qualname__}")
    return repr(value)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Passes in order; after each one `after_pass` is called (verifying, printing, timing).

    Attributes:
        passes: The passes.
        after_pass: Called with the pass, the program and the result; raises to stop.
    """

    passes: Sequence[Pass]
    after_pass: Callable[[Pass, "Program", PassResult], None] | None = None

    def run(self, program: "Program") -> PassReport:
        """Run every pass on a program, in place.

        Raises:
            PassError: A pass failed in a way of its own; the message names it and the cause is chained.
        """
        results = []
        for step in self.passes:
            start = time.perf_counter()
            try:
                with stage(_LOGGER, f"transform: {step.name}"):
                    result = step.run(program)
            except FedmefError:
                raise
            except Exception as error:
                raise PassError(f"pass {step.name}: {type(error).__name__}: {error}") from error
            if not isinstance(result, PassResult):
                raise PassError(f"pass {step.name}: run returned {type(result).__name__}; expected a PassResult")
            result = dataclasses.replace(result, name=describe(step), seconds=time.perf_counter() - start)
            results.append(result)
            _LOGGER.info("%s: %d rewritten, %d refused", step.name, len(result.rewrites), len(result.refusals))
            for refusal in result.refusals:
                _LOGGER.debug("%s refused %s: %s", step.name, refusal.where, refusal.reason)
            if self.after_pass is not None:
                self.after_pass(step, program, result)
        return PassReport(tuple(results))
