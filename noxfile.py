"""The checks on every supported Python, each in its own environment: `nox`, `nox -s tests-3.12`, `nox -s floors`.

Interpreters that the machine lacks are skipped. What follows `--` goes to pytest: `nox -s floors -- -m 'not slow'`.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nox

nox.options.error_on_missing_interpreters = False

OLDEST = "3.11"
PYTHONS = (OLDEST, "3.12", "3.13", "3.14")
PROJECT = Path(__file__).resolve().parent / "pyproject.toml"
# Everything that a test may import: one that misses its package is skipped, and would hold nothing.
ALL = ".[dev,viz,bench,slim]"


def floors(project: Mapping[str, Any]) -> list[str]:
    """The direct dependencies, extras included, each pinned to the oldest version that pyproject.toml allows.

    Args:
        project: The table `[project]` of pyproject.toml.

    Returns:
        Lines such as `numpy==1.26`, sorted.

    Raises:
        ValueError: A requirement has no floor, says more than a floor, or contradicts another one.
    """
    pins: dict[str, str] = {}
    for requirement in _requirements(project):
        parts = re.fullmatch(r"(?P<name>[\w.-]+)(?:\[[\w,-]+\])?>=(?P<floor>[\w.]+)", requirement)
        if parts is None:
            raise ValueError(f"pyproject.toml: got {requirement!r}; expected 'name>=version', the version being tested")
        if pins.setdefault(parts["name"], parts["floor"]) != parts["floor"]:
            raise ValueError(f"pyproject.toml: {parts['name']}: got {requirement!r}, elsewhere >={pins[parts['name']]}")
    return sorted(f"{name}=={floor}" for name, floor in pins.items())


def _requirements(project: Mapping[str, Any]) -> Iterator[str]:
    """All requirements but those on the project's own extras."""
    for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from (text for text in requirements if not text.startswith(f"{project['name']}["))


def _test(session: nox.Session) -> None:
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests at the tested versions."""
    session.install("-c", "constraints.txt", "-e", ALL)
    _test(session)


@nox.session(python=OLDEST, name="floors")
def run_at_floors(session: nox.Session) -> None:
    """Run the tests with every direct dependency at exactly the oldest version that pyproject.toml allows."""
    pins = Path(session.create_tmp()) / "floors.txt"
    lines = floors(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"])
    # typer has no click of its own before 0.26, and warns of what click 8.5 is about to take away.
    pins.write_text("\n".join([*lines, "click<8.5"]) + "\n", encoding="utf-8")
    session.install("-c", str(pins), "-e", ALL)
    _test(session)


@nox.session(python=OLDEST)
def newest(session: nox.Session) -> None:
    """Run the tests with what an installation without constraints brings today, the newest torch above all."""
    session.install("--upgrade", "-e", ALL)
    _test(session)


@nox.session(python=OLDEST)
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install("-c", "constraints.txt", "-e", ALL)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
