"""Compiling the kernels: with the compiler that is there, one from the index where there is none, and without any."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fedmef_fx.native import library
from fedmef_fx.native.compile_library import REASON, CompilationError, compile_libraries, find_compiler, library_name

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _looks_anew():
    find_compiler.cache_clear()
    yield
    find_compiler.cache_clear()


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler --fast")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_the_reason_is_kept(tmp_path: Path) -> None:
    (tmp_path / library_name("avx2")).touch()  # of an earlier time
    with pytest.raises(CompilationError, match=r"found neither \$CC, cc, gcc nor clang"):
        compile_libraries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [REASON]
    code = (
        "import json, torch; from fedmef_fx.native import why_missing; from fedmef_fx.packing import backend;"
        "print(json.dumps([backend().name, backend().pack(torch.ones(3), 0.5)[1].tolist(), why_missing()]))"
    )
    environment = os.environ | {library.FOLDER_VARIABLE: str(tmp_path)}
    environment.pop("FEDMEF_FX_BACKEND", None)
    ran = subprocess.run(  # noqa: S603  # our own code
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    name, values, reason = json.loads(ran.stdout)
    assert (name, values) == ("numpy", [1.0, 1.0, 1.0])
    assert "no C compiler" in reason


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *trial*) exit 0;; esac\necho out of luck >&2\nexit 1\n', encoding="utf-8"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(CompilationError, match="out of luck"):
        compile_libraries(tmp_path / "made")
    assert "out of luck" in (tmp_path / "made" / REASON).read_text(encoding="utf-8")


@pytest.mark.parametrize("editable", [True, False])
def test_a_compiler_is_asked_for_only_where_there_is_none(
    editable: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    hooks = runpy.run_path(str(ROOT / "wheel_backend.py"))
    required = hooks["get_requires_for_build_editable" if editable else "get_requires_for_build_wheel"]
    if find_compiler() is not None:
        assert not any("ziglang" in each for each in required())
    request.getfixturevalue("_no_compiler")
    assert any("ziglang" in each for each in required())


def test_a_library_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.why_missing():
        pytest.skip("there is no library")
    compiled = Path(library.__file__).parent / library_name("baseline")
    (tmp_path / library_name("baseline")).write_bytes(compiled.read_bytes())
    monkeypatch.setenv(library.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(library, "_ABI", -1)
    library._load.cache_clear()
    try:
        assert "was compiled from other sources" in str(library.why_missing())
    finally:
        library._load.cache_clear()


def test_something_that_is_no_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / library_name("baseline")).write_bytes(b"no library")
    monkeypatch.setenv(library.FOLDER_VARIABLE, str(tmp_path))
    library._load.cache_clear()
    try:
        assert "cannot be loaded" in str(library.why_missing())
    finally:
        library._load.cache_clear()
