"""Looking at a model between the passes: print its graphs after some of them, stop after one."""

import difflib
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Final, Literal

from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.pipeline import Pass
from fedmef_fx.graph.program import Program
from fedmef_fx.graph.recording import record_graphs
from fedmef_fx.graph.text import graph_text
from fedmef_fx.records.passes import PassResult

__all__ = ["CAPTURE", "PassObserver"]

CAPTURE: Final = "capture"
"""The step before the first pass."""

AfterPass = Callable[[Pass, Program, PassResult], None]


class PassObserver:
    """Prints graphs after passes, and says which passes run.

    Args:
        passes: Names of the passes that were asked for, in order.
        print_after: After which of them to print, `CAPTURE` included, or "all".
        stop_after: The last one to run; None for all.
        printer: Called with each text; None prints on stderr.

    Attributes:
        number: How many of the passes run.
        runs_all: Whether nothing stops them.

    Raises:
        ConfigError: A name that is no pass of this configuration, or a pass to print after that comes after the stop.
    """

    def __init__(
        self,
        passes: Sequence[str],
        *,
        print_after: Collection[str] | Literal["all"] = (),
        stop_after: str | None = None,
        printer: Callable[[str], object] | None = None,
    ) -> None:
        steps = [CAPTURE, *passes]
        if isinstance(print_after, str) and print_after != "all":
            print_after = (print_after,)
        wanted = steps if print_after == "all" else list(print_after)
        for option, names in (("print_after", wanted), ("stop_after", [] if stop_after is None else [stop_after])):
            for name in names:
                _check(option, name, steps)
        last = len(steps) if stop_after is None else steps.index(stop_after) + 1
        self.number, self.runs_all = last - 1, stop_after is None
        for name in wanted if print_after != "all" else ():
            if name not in steps[:last]:
                raise ConfigError(
                    f"transform: print_after={name!r} comes after stop_after={stop_after!r}, so never runs"
                )
        self._wanted = frozenset(wanted)
        self._print = printer or _to_stderr
        self._before: str | None = None

    def after(self, name: str, program: Program) -> None:
        """Print a program if it is wanted after this step."""
        if name in self._wanted:
            text = graph_text(record_graphs(program))
            changed = " (changed nothing)" if text == self._before else ""
            self._print(f"# after {name}{changed}\n{text}\n")
            self._before = text
        else:
            self._before = None

    def beside(self, check: AfterPass) -> AfterPass:
        """A callback of a pipeline that prints and then checks: what breaks an invariant is still seen."""

        def after_pass(step: Pass, program: Program, result: PassResult) -> None:
            self.after(step.name, program)
            check(step, program, result)

        return after_pass


def _check(option: str, name: str, steps: Sequence[str]) -> None:
    if name not in steps:
        close = difflib.get_close_matches(str(name), steps, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"transform: {option}: got {name!r}; expected a pass of this configuration: {', '.join(steps)}{hint}"
        )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
