"""What all commands share: output for people or machines, errors as exit codes, progress bars on a terminal only.

A command is a function that returns a `Result`. While it runs, all that libraries print goes to stderr, so that stdout
holds the result and nothing else. Exit codes: 0 success, 1 an error that was reported, 2 wrong usage, 130 interrupted.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NoReturn, ParamSpec

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.spinner import Spinner
from rich.text import Text

from fedmef_fx.display.stages import watching_stages
from fedmef_fx.errors import FedmefError
from fedmef_fx.graph.recording import visible

__all__ = ["AsJson", "ProgressBar", "Result", "command", "progress_bar", "showing_stages"]

P = ParamSpec("P")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")]

_WIDTH_WITHOUT_TERMINAL = 160  # so that rows of tables stay lines in a file


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command found out.

    Attributes:
        data: For machines: what `--json` prints.
        show: For people: prints on a console.
        is_success: Whether the command's exit code is 0.
    """

    data: Mapping[str, Any] | str
    show: Callable[[Console], None]
    is_success: bool = True


def command(function: Callable[P, Result]) -> Callable[P, None]:
    """Make a function that returns a `Result` a command; one of its options has to be `as_json: AsJson`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = function(*args, **kwargs)
            _print(result, as_json=bool(kwargs["as_json"]))
        except KeyboardInterrupt as error:
            _fail(f"interrupted: {error}" if str(error) else "interrupted", code=130)
        except BrokenPipeError:
            raise  # the reader has gone: typer ends quietly
        except (FedmefError, OSError) as error:
            _fail(f"error: {error}", code=1)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise  # a bug, whose traceback is wanted
            _fail(f"error: not enough memory: {error}; expected smaller inputs, batches or models", code=1)
        if not result.is_success:
            raise typer.Exit(1)

    return call


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch's allocator for the CPU has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _print(result: Result, *, as_json: bool) -> None:
    if as_json:
        text = result.data if isinstance(result.data, str) else json.dumps(result.data, indent=2, allow_nan=False)
        typer.echo(text)
    else:
        result.show(_console())


def _fail(message: str, *, code: int) -> NoReturn:
    """Leave with a message in one line."""
    typer.echo(visible(message.replace("\n", " ")), err=True)
    raise typer.Exit(code)


def _console() -> Console:
    return Console(
        width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False, markup=False, emoji=False
    )


class ProgressBar:
    """A bar on stderr that `progress_bar` opened."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self._bar, self._task = bar, task

    def reach(self, step: int, note: str = "") -> None:
        """So many steps are done; the note says how the last one went."""
        self._bar.update(self._task, completed=step, note=note)


@contextlib.contextmanager
def showing_stages() -> Iterator[None]:
    """What happens, as a line on stderr that is gone afterwards, where that is a terminal; nothing elsewhere."""
    console = Console(stderr=True, emoji=False, highlight=False, markup=False)
    if not console.is_terminal:
        yield
        return
    spinner = Spinner("dots")

    def show(what: str) -> None:
        spinner.update(text=Text(visible(what)))
        line.refresh()

    with Live(spinner, console=console, transient=True) as line, watching_stages(show):
        yield


@contextlib.contextmanager
def progress_bar(title: str, *, steps: int) -> Iterator[ProgressBar]:
    """A progress bar on stderr where that is a terminal, and nothing at all elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True, emoji=False)
    bar = Progress(
        *columns, TextColumn("{task.fields[note]}", markup=False), console=console, disable=not console.is_terminal
    )
    # A disabled bar that is started and stopped prints an empty line in some versions of rich.
    with bar if console.is_terminal else contextlib.nullcontext():
        yield ProgressBar(bar, bar.add_task(title, total=steps, note=""))
