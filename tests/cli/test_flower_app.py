"""`fedmef-fx flower new`: files that are what they claim to be, and nothing that is there is overwritten."""

import ast
import tomllib
from pathlib import Path

import pytest

from tests.cli.program import invoke, json_of


@pytest.mark.parametrize(
    ("name", "package"), [("my-app", "my_app"), ("2 Apps!", "app_2_apps"), ("flwr", "flwr_app"), ("...", "app")]
)
def test_a_new_app(name: str, package: str, tmp_path: Path) -> None:
    directory = tmp_path / name if name != "..." else tmp_path / "___"
    files = json_of("flower", "new", str(directory))["files"]
    assert sorted(files) == sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    for path in directory.rglob("*.py"):
        ast.parse(path.read_text())
    project = tomllib.loads((directory / "pyproject.toml").read_text())
    components = project["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": f"{package}.server_app:app", "clientapp": f"{package}.client_app:app"}
    assert (directory / package / "task.py").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    directory = tmp_path / "app"
    directory.mkdir()
    (directory / "README.md").write_text("mine")
    result = invoke("flower", "new", str(directory))
    assert result.exit_code == 1
    assert "README.md already" in result.stderr
    assert [path.name for path in directory.iterdir()] == ["README.md"]


def test_what_is_not_there_is_usage(tmp_path: Path) -> None:
    assert invoke("flower", "old", str(tmp_path)).exit_code == 2
