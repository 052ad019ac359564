"""Ways to run the command line: in this process, for its JSON, and as a program."""

import json
import os
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from fedmef_fx.cli import app

PROGRAM = [sys.executable, "-c", "from fedmef_fx.cli import main; main()"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def json_of(*arguments: str) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """The program as a shell starts it, with pipes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(  # noqa: S603  # a fixed program
        [*PROGRAM, *arguments], env={**kept, **environment}, capture_output=True, check=False
    )
