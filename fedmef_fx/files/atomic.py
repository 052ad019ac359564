"""Write a file whole or not at all: an old file stays unchanged until the new one is complete on disk."""

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fedmef_fx.errors import FedmefError

__all__ = ["check_target", "replacing", "usable_folder"]


def check_target(path: str | os.PathLike[str], *, error: Callable[[str], FedmefError]) -> Path:
    """Find out whether a file can be written, before the work to make it is done.

    Args:
        path: The file to be; symbolic links are followed.
        error: Makes the exception of a message when it cannot be written.

    Returns:
        The path without links.
    """
    try:
        target = Path(path).resolve()
        folder = target.parent
        if target.is_dir():
            raise error(f"{path}: is a directory; expected the name of a file, e.g. {target / 'model'}")
        if not folder.is_dir():
            raise error(f"{path}: there is no directory {folder}; create it first: mkdir -p {folder}")
        # To root every directory is writable, also one whose owner took all write permissions away.
        if not folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
            raise error(f"{path}: the directory {folder} is read-only; expected one that can be written")
        with tempfile.TemporaryFile(dir=folder):  # without a name, so that it is gone when the process is killed
            pass
    except (OSError, ValueError) as cause:  # ValueError: a zero byte in the name
        raise error(f"{path}: cannot be written: {cause}; expected a file name in a writable directory") from cause
    return target


def usable_folder(path: str | os.PathLike[str], *, error: Callable[[str], FedmefError]) -> Path:
    """Make a folder for files if it is missing, and find out whether files can be put there.

    Args:
        path: The folder; those above it are made, too.
        error: Makes the exception of a message when it cannot be used.

    Returns:
        The folder.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as cause:
        raise error(f"{folder}: is a file; expected a directory, or a name that nothing has yet") from cause
    except (OSError, ValueError) as cause:  # ValueError: a zero byte in the name
        raise error(f"{folder}: cannot be made: {cause}; expected a directory that can be written") from cause
    check_target(folder / "file", error=error)
    return folder


@contextlib.contextmanager
def replacing(target: Path, *, error: Callable[[str], FedmefError]) -> Iterator[Path]:
    """A block that makes a file; the file takes its name when the block ends without an exception.

    Args:
        target: The file to be, as `check_target` returned it.
        error: Makes the exception from a message, instead of an OSError such as a full disk.

    Yields:
        A path in the same directory to write to. It is gone when the block fails, and `target` is as it was.
    """
    temporary = _temporary(target)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as cause:
        raise error(f"{target}: could not be written: {cause}; a file of that name is as it was") from cause
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut: it is in the folder, which is written by itself."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows, which has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
