"""The checks on every supported Python, each in its own environment: `nox`, `nox -s tests-3.12`, `nox -s lint`."""

import nox

nox.options.error_on_missing_interpreters = False


def _install(session: nox.Session) -> None:
    """Install the project with all its extras at the tested versions."""
    session.install("-c", "constraints.txt", "-e", ".[dev,fast,viz]")


@nox.session(python=["3.11", "3.12"])
def tests(session: nox.Session) -> None:
    """Run the tests; what follows `--` goes to pytest."""
    _install(session)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check style and types."""
    _install(session)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
