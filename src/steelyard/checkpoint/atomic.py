"""Files and folders that appear whole or not at all: written aside, fsynced, renamed.

Knows nothing of what it writes. A crash at any point leaves the old content or the new, never a mixture;
what it can leave behind is a hidden `.aside-*` entry, which `sweep` removes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

ASIDE = ".aside-"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def file_aside(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f"{ASIDE}{path.name}-", dir=path.parent)
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
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
    """Yield an empty folder that becomes `path`, replacing it, when the block ends without an error."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{ASIDE}{path.name}-", dir=path.parent))
    try:
        yield aside
        for folder, _, files in os.walk(aside):
            for name in files:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        aside.chmod(0o755)
        if path.exists():
            # rename(2) cannot replace a folder that is not empty: the old one steps aside first.
            old = Path(tempfile.mkdtemp(prefix=f"{ASIDE}old-{path.name}-", dir=path.parent))
            path.rename(old / path.name)
            aside.rename(path)
            shutil.rmtree(old)
        else:
            aside.rename(path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def sweep(folder: Path) -> None:
    """Remove what interrupted writes left in `folder`. Only for a folder that nobody else is writing to."""
    for entry in folder.glob(f"{ASIDE}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
