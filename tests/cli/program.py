"""Ways to run the command line: in this process, for its JSON, and as a program."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from typing import Any

import jsonschema
from typer.testing import CliRunner, Result

from fedmef_fx.cli import app
from fedmef_fx.commands.json_schema import output_schema

PROGRAM = [sys.executable, "-c", "from fedmef_fx.cli import main; main()"]


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
    program = subprocess.Popen(  # noqa: S603  # a fixed program
        [*PROGRAM, *arguments], env={**os.environ, "TERM": "xterm-256color"}, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux tells that the other side is closed
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    stdout, _ = program.communicate()
    return stdout, shown, program.returncode


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """The program as a shell starts it, with pipes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(  # noqa: S603  # a fixed program
        [*PROGRAM, *arguments], env={**kept, **environment}, capture_output=True, check=False
    )
