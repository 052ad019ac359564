"""A file is replaced whole or not at all."""

from pathlib import Path

import pytest

from fedmef_fx.errors import DataError
from fedmef_fx.files.atomic import check_target, replacing, usable_folder


def test_a_block_that_ends_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("old")

    with replacing(target, error=DataError) as path:
        path.write_text("new")
        assert target.read_text() == "old"

    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("raised", "seen"), [(ValueError("broken"), ValueError), (OSError("disk full"), DataError)])
def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path, raised: Exception, seen: type[Exception]) -> None:
    target = tmp_path / "model"
    target.write_text("old")

    def fail_halfway() -> None:
        with replacing(target, error=DataError) as path:
            path.write_text("half")
            raise raised

    with pytest.raises(seen, match=str(raised)):
        fail_halfway()

    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_is_checked_before_the_work(tmp_path: Path) -> None:
    assert check_target(tmp_path / "model", error=DataError) == (tmp_path / "model").resolve()
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="is a directory"):
        check_target(tmp_path, error=DataError)
    with pytest.raises(DataError, match="mkdir -p"):
        check_target(tmp_path / "missing" / "model", error=DataError)
    with pytest.raises(DataError, match="cannot be written"):
        check_target("zero\0byte", error=DataError)


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert usable_folder(folder, error=DataError) == folder
    assert usable_folder(str(folder), error=DataError) == folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "said"), [("file", "is a file"), ("file/x", "cannot be made"), ("\0", "cannot be made")]
)
def test_a_folder_that_cannot_be_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=said):
        usable_folder(tmp_path / name, error=DataError)
    assert (tmp_path / "file").read_text() == ""


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir(mode=0o555)
    with pytest.raises(DataError, match="read-only"):
        usable_folder(folder, error=DataError)
