"""Files and folders that appear whole or not at all: written aside, fsynced, renamed.

Knows nothing of what it writes. A crash at any point leaves the old content or the new, never a mixture;
what it can leave behind is a hidden `.aside-*` entry, which `sweep` removes. Only where the system cannot exchange
two folders in one call is there a moment without either; `sweep` puts the old one back then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

ASIDE = ".aside-"
OLD = f"{ASIDE}old-"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Let two entries take each other's place in one atomic step; False where the system cannot (renameat2)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    return done == 0


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Errors of the block name `path`, not the entry aside that nobody has heard of."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def file_aside(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends without an error.

    Args:
        path: where it will be.
        mode: who may read it then; until then we alone may.

    Raises:
        OSError: it cannot be written there, at once if `path` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with _blaming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=ASIDE, dir=path.parent)
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        aside.replace(path)
        _fsync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`, whole or not at all."""
    with file_aside(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path`, replacing a folder there, when the block ends without an error.

    Raises:
        OSError: it cannot be written there, at once if `path` is a file.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    with _blaming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=path.parent))
    try:
        yield aside
        for folder, _, files in os.walk(aside):
            for name in files:
                Path(folder, name).chmod(0o644)
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        aside.chmod(0o755)
        if not path.exists():
            aside.rename(path)
        elif _exchange(aside, path):
            shutil.rmtree(aside)
        else:
            _replace(aside, path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _replace(aside: Path, path: Path) -> None:
    """Put `aside` in the place of the folder `path`. rename(2) replaces only empty ones: the old one goes first."""
    old = Path(tempfile.mkdtemp(prefix=OLD, dir=path.parent))
    path.rename(old / path.name)
    try:
        aside.rename(path)
    except BaseException:
        (old / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Remove what interrupted writes left in `folder`. Only for a folder that nobody else is writing to."""
    for old in folder.glob(f"{OLD}*/*"):
        if not (folder / old.name).exists():  # the crash came before the new one was in its place
            old.rename(folder / old.name)
    for entry in folder.glob(f"{ASIDE}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
