"""Python code in a process of its own that need not import torch anew, which takes a fresh one two seconds.

It is forked from a process that has imported torch and nothing of this project. What torch reads of the environment
when it is imported, such as OMP_NUM_THREADS, is read already; hashes of strings are those of the process before it.
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Reads jobs as lines of JSON from its input, one after the other, and answers each with the exit code of its child.
_SERVER = """
import json, os, sys, traceback
import numpy, torch, torch._dynamo, torch.distributed

jobs, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
torch.set_num_threads(1)

def run(job):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv, sys.path[:] = ["-c", *job["arguments"]], job["path"]
    code = 0
    try:
        exec(compile(job["code"], "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in jobs:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    _, status = os.waitpid(child, 0)
    os.write(answers, b"%d\\n" % os.waitstatus_to_exitcode(status))
"""
_server: "subprocess.Popen[bytes] | None" = None


def run(
    code: str,
    *arguments: str,
    folder: Path,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    terminal: str | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run code as `python -c` does.

    Args:
        code: Python code; its `sys.path` is that of this process.
        arguments: Of the code, for `sys.argv`.
        folder: Where what it prints may lie.
        cwd: The folder that it runs in.
        environment: Variables that it sees besides those of this process.
        terminal: Where it prints its errors; a file by default, whose content is returned.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    everything = {**os.environ, **(environment or {})}
    stdout, stderr = folder / "forked.stdout", folder / "forked.stderr"
    job = {
        "code": code,
        "arguments": arguments,
        "cwd": str(cwd),
        "environment": everything,
        "path": ["", str(ROOT), *sys.path],
        "stdout": str(stdout),
        "stderr": terminal or str(stderr),
    }
    jobs, answers = _pipes()
    jobs.write(json.dumps(job).encode() + b"\n")
    jobs.flush()
    exit_code = int(answers.readline())
    errors = "" if terminal else stderr.read_text(encoding="utf-8")
    return subprocess.CompletedProcess(["python", *arguments], exit_code, stdout.read_text(encoding="utf-8"), errors)


def run_in_two(function: Callable[..., None], *arguments: Any, folder: Path) -> None:
    """Call a function of a test's module in two processes at once, with their rank and the arguments.

    Args:
        function: What stands in its module by its name.
        arguments: What `repr` writes as Python code, and paths, which arrive as text.
        folder: Where what they print may lie.
    """
    values = tuple(str(value) if isinstance(value, Path) else value for value in arguments)
    code = (
        f"import torch, {function.__module__} as tests\n"
        f"torch.multiprocessing.start_processes(tests.{function.__name__}, {values!r}, nprocs=2, start_method='fork')"
    )
    done = run(code, folder=folder)
    assert done.returncode == 0, done.stderr


def _pipes() -> tuple[IO[bytes], IO[bytes]]:
    global _server  # noqa: PLW0603 -- one for all tests of a process
    if _server is None:
        command = [sys.executable, "-c", _SERVER]
        _server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
        atexit.register(_end, _server)
    assert _server.stdin is not None
    assert _server.stdout is not None
    return _server.stdin, _server.stdout


def _end(server: "subprocess.Popen[bytes]") -> None:
    server.communicate()
