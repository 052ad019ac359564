"""A file is replaced whole or not at all."""

from pathlib import Path

import pytest

from fedmef_fx.errors import DataError
from fedmef_fx.files.atomic import check_target, replacing


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
