"""Ways to run the command line: in this process, for its JSON, and as a program."""

import contextlib
import json
import os
import pty
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from fedmef_fx.cli import app
from fedmef_fx.commands.json_schema import output_schema
from tests import forked

PROGRAM = "from fedmef_fx.cli import main; main()"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def json_of(*arguments: str) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    jsonschema.validate(found, output_schema(arguments[0]))
    return found


def on_terminal(*arguments: str) -> tuple[bytes, bytes, int]:
    """The program with a terminal for stderr: what it prints, what the terminal shows, its exit code."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # how Linux tells that the other side is closed
            while chunk := os.read(ours, 4096):
                shown.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with tempfile.TemporaryDirectory() as folder:
        done = forked.run(
            PROGRAM,
            *arguments,
            folder=Path(folder),
            cwd=Path.cwd(),
            environment={"TERM": "xterm-256color"},
            terminal=os.ttyname(theirs),
        )
    os.close(theirs)
    reader.join()
    os.close(ours)
    return done.stdout.encode(), bytes(shown), done.returncode


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """The program as a shell starts it, with pipes."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("FORCE_COLOR", "NO_COLOR"):
            patch.delenv(name, raising=False)
        done = forked.run(PROGRAM, *arguments, folder=Path(folder), cwd=Path.cwd(), environment=environment)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.encode(), done.stderr.encode())
