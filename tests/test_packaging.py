"""The built distributions hold what the repository holds, and the two linked packages have one import name each."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

from fedmef_fx.native.compile_library import find_compiler

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
# Only for those who work in the repository; an installation or a test of the sdist needs none of it.
NOT_IN_SDIST = (".ci/", ".gitignore")
# Where the linked packages really lie, e.g. {"passes": "fedmef_fx.passes"}.
PACKAGE_OF_FOLDER = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}


def _run(*command: str, cwd: Path, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(  # noqa: S603  # fixed commands
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def repository_files() -> list[str]:
    """Every file that git tracks or would track."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a git checkout: the list of tracked files is what the wheel is compared with")
    listed = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    # A tracked file may be deleted in the working tree; a link to a folder still is one entry.
    return sorted({name for name in listed.split("\0") if name and (ROOT / name).exists()})


class Distributions(NamedTuple):
    """The names of the files in an sdist, without its top folder, and in the wheel that was built from it."""

    sdist: set[str]
    wheel: set[str]
    tag: str


@pytest.fixture(scope="module")
def distributions(repository_files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """What an sdist and a wheel hold, the wheel built from the sdist, as an installer does it that finds no wheel.

    The build runs in a copy: it leaves an egg-info folder behind, and would read one that lies around in the clone.
    """
    source = tmp_path_factory.mktemp("source")
    for name in repository_files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    output = tmp_path_factory.mktemp("dist")
    # Without isolation, because that would download setuptools; and without optimising kernels that nobody runs.
    compiler = find_compiler()
    environment = dict(os.environ)
    if compiler is not None and os.name == "posix":
        quick = tmp_path_factory.mktemp("compiler") / "cc"
        quick.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" -O0\n', encoding="utf-8")
        quick.chmod(0o755)
        environment["CC"] = str(quick)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    _run(*build, cwd=output, environment=environment)
    (sdist,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    with tarfile.open(sdist) as packed, zipfile.ZipFile(wheel) as archive:
        files = {name.partition("/")[2] for name in packed.getnames()}
        return Distributions(files, set(archive.namelist()), wheel.stem.split("-", 2)[2])


@pytest.fixture(scope="module")
def wheel_files(distributions: Distributions) -> set[str]:
    return distributions.wheel


def _installed_name(path: str) -> str | None:
    """Where a Python file of the repository lies in the wheel; None if it is not part of the package."""
    folder, *rest = PurePosixPath(path).parts
    if folder == "fedmef_fx":
        return path
    if folder in PACKAGE_OF_FOLDER:
        return "/".join([*PACKAGE_OF_FOLDER[folder].split("."), *rest])
    return None


@pytest.mark.slow
def test_wheel_holds_exactly_the_modules_of_the_repository(repository_files: list[str], wheel_files: set[str]) -> None:
    expected = {_installed_name(path) for path in repository_files if path.endswith(".py")} - {None}
    assert {name for name in wheel_files if name.endswith(".py")} == expected


@pytest.mark.slow
def test_wheel_holds_what_the_page_is_made_of(repository_files: list[str], wheel_files: set[str]) -> None:
    suffixes = (".js", ".css", ".html")
    expected = {_installed_name(path) for path in repository_files if path.endswith(suffixes)} - {None}
    assert expected
    assert {name for name in wheel_files if name.endswith(suffixes)} == expected


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["fedmef_fx/py.typed", ".dist-info/licenses/LICENSE", ".dist-info/entry_points.txt"])
def test_wheel_holds(suffix: str, wheel_files: set[str]) -> None:
    assert any(name.endswith(suffix) for name in wheel_files)


@pytest.mark.slow
def test_one_wheel_serves_every_python(distributions: Distributions) -> None:
    assert distributions.tag.startswith("py3-none-")
    assert distributions.tag != "py3-none-any"
    if find_compiler() is not None:
        assert "fedmef_fx/native/kernels_baseline.so" in distributions.wheel


@pytest.mark.slow
def test_sdist_holds_the_repository(repository_files: list[str], distributions: Distributions) -> None:
    links = {package.replace(".", "/") for package in PACKAGE_OF_FOLDER.values()}  # the folders themselves are there
    expected = {name for name in repository_files if name not in links and not name.startswith(NOT_IN_SDIST)}
    assert {"docs/guide.md", "tests/conftest.py", "CITATION.cff"} <= expected
    assert expected - distributions.sdist == set()


def test_every_package_is_listed(repository_files: list[str]) -> None:
    modules = [name for path in repository_files if path.endswith(".py") and (name := _installed_name(path))]
    packages = {".".join(PurePosixPath(name).parent.parts) for name in modules}
    assert set(SETUPTOOLS["packages"]) == packages


@pytest.mark.parametrize("package", PACKAGE_OF_FOLDER.values())
def test_links_lead_to_the_mapped_folders(package: str) -> None:
    link = ROOT.joinpath(*package.split("."))
    if (ROOT / "PKG-INFO").exists():
        pytest.skip("an sdist holds no links: what is installed from it finds the folders by pyproject.toml's mapping")
    assert link.resolve() == ROOT / SETUPTOOLS["package-dir"][package]


@pytest.mark.parametrize(("folder", "package"), PACKAGE_OF_FOLDER.items())
def test_linked_package_imports_under_one_name_only(folder: str, package: str) -> None:
    # In a process of its own: here a failed import would leave its traces in sys.modules.
    _run(sys.executable, "-c", f"import {package}", cwd=ROOT)
    with pytest.raises(AssertionError, match=f"ImportError: import {package}, not {folder}"):
        _run(sys.executable, "-c", f"import {folder}", cwd=ROOT)
