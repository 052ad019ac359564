"""What the command line says before it does anything, without waiting for torch; and completion in shells."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fedmef_fx import __version__
from fedmef_fx.cli import COMMANDS, app
from tests.cli.program import invoke

PROGRAM = [sys.executable, "-m", "fedmef_fx"]
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "sklearn")
WITHOUT = f"""
import sys
from fedmef_fx.cli import main
try:
    main()
finally:
    print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
"""


def _run(*arguments: str, program: list[str] = PROGRAM, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # noqa: S603 -- our own code
        [*program, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], [], ["nonsense"], ["--show-completion"]])
def test_the_first_answers_do_not_wait_for_torch(arguments: list[str]) -> None:
    result = _run(*arguments, program=[sys.executable, "-c", WITHOUT])
    assert result.stderr.splitlines()[-1].strip() == "loaded:"


def test_short_and_long_help_are_the_same_and_name_every_command() -> None:
    short, long = (_run(option).stdout for option in ("-h", "--help"))
    assert short == long
    for name, purpose in COMMANDS.items():
        assert f"{name} " in short
        assert purpose in short, "whole at 80 columns"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_short_help(name: str) -> None:
    result = invoke(name, "-h")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")


def test_the_module_runs_as_a_program() -> None:
    result = _run("--version")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, __version__, "")
    assert _run("nonsense").returncode == 2


@pytest.mark.parametrize(
    ("words", "count", "expected"),
    [
        ("fedmef-fx ", 1, list(COMMANDS)),
        ("fedmef-fx inspect --vi", 2, ["--view"]),
        ("fedmef-fx inspect --view t", 3, ["text", "table"]),
        ("fedmef-fx export mobile", 2, ["mobilenet_v2"]),
        ("fedmef-fx train --method fedm", 3, ["fedmef"]),
    ],
)
def test_a_shell_completes_commands_options_and_choices(words: str, count: int, expected: list[str]) -> None:
    asked = {"_FEDMEF_FX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    result = CliRunner().invoke(app, [], prog_name="fedmef-fx", env=asked)
    assert result.stdout.split() == expected


def test_the_program_completes() -> None:
    result = _run(_FEDMEF_FX_COMPLETE="complete_bash", COMP_WORDS="fedmef-fx in", COMP_CWORD="1")
    assert result.stdout.split() == ["inspect"]
