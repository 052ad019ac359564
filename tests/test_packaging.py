"""The built distributions hold what the repository holds, and the two linked packages have one import name each."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
# Where the linked packages really lie, e.g. {"passes": "fedmef_fx.passes"}.
PACKAGE_OF_FOLDER = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}


def _run(*command: str, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)  # noqa: S603  # fixed commands
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


@pytest.fixture(scope="module")
def wheel_files(repository_files: list[str], tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel that was built from an sdist, as an installer does it that finds no wheel.

    The build runs in a copy: it leaves an egg-info folder behind, and would read one that lies around in the clone.
    """
    source = tmp_path_factory.mktemp("source")
    for name in repository_files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    output = tmp_path_factory.mktemp("dist")
    # Without isolation, because that would download setuptools; torch depends on it, so it is installed.
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source), cwd=output)
    assert len(list(output.glob("*.tar.gz"))) == 1
    (wheel,) = output.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


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


def test_every_package_is_listed(repository_files: list[str]) -> None:
    modules = [name for path in repository_files if path.endswith(".py") and (name := _installed_name(path))]
    packages = {".".join(PurePosixPath(name).parent.parts) for name in modules}
    assert set(SETUPTOOLS["packages"]) == packages


@pytest.mark.parametrize("package", PACKAGE_OF_FOLDER.values())
def test_links_lead_to_the_mapped_folders(package: str) -> None:
    link = ROOT.joinpath(*package.split("."))
    assert link.resolve() == ROOT / SETUPTOOLS["package-dir"][package]


@pytest.mark.parametrize(("folder", "package"), PACKAGE_OF_FOLDER.items())
def test_linked_package_imports_under_one_name_only(folder: str, package: str) -> None:
    # In a process of its own: here a failed import would leave its traces in sys.modules.
    _run(sys.executable, "-c", f"import {package}", cwd=ROOT)
    with pytest.raises(AssertionError, match=f"ImportError: import {package}, not {folder}"):
        _run(sys.executable, "-c", f"import {folder}", cwd=ROOT)
