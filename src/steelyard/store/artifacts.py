"""Artifacts: files of projects, encrypted, in a local folder or in S3 (any URL that fsspec knows).

An artifact is called by what it holds: HMAC-SHA256 of its content under its project's key. So the same content is
stored once within a project, and a name tells another project nothing. It appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import fsspec.implementations.local
import msgspec
from sqlalchemy import Connection, insert, select

from steelyard.errors import ConfigError, NotFoundError, StorageError, StorageFullError
from steelyard.store import encryption, tables
from steelyard.store.database import Database

FULL = (errno.ENOSPC, errno.EDQUOT)


class Stored(msgspec.Struct, frozen=True):
    """An artifact that was written."""

    name: str
    size: int
    """Of its content, in bytes."""
    sha256: str


class Artifacts:
    """Where artifacts are.

    Args:
        url: a folder, or a URL such as `s3://bucket/prefix`.
        root: the key that wraps the projects' keys.
        database: where those are kept.
        options: of fsspec's file system, such as an endpoint.

    Raises:
        ConfigError: the URL is of an unknown kind, or its package is not installed.
    """

    def __init__(self, url: str, root: bytes, database: Database, **options: Any) -> None:
        self._root, self._database = root, database
        try:
            self._files, self._folder = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"artifacts cannot be kept at '{url}': {error}") from None
        self._local = isinstance(self._files, fsspec.implementations.local.LocalFileSystem)
        self._keys: dict[str, bytes] = {}

    @contextlib.contextmanager
    def writing(self, project: str) -> Iterator[Writer]:
        """Yield a writer; when the block ends without an error, its `stored` says what it became.

        Raises:
            StorageError: it cannot be written; nothing is left of it.
            StorageFullError: there is no room.
        """
        key, aside = self._key(project), f"{project}/.aside-{secrets.token_hex(8)}"
        try:
            with self._failures():
                self._files.makedirs(f"{self._folder}/{project}", exist_ok=True)
                with self._open(aside, "wb") as file:
                    writer = Writer(file, key, project)
                    yield writer
                    writer.finish()
                    if self._local:
                        _sync(file)
                self._rename(aside, f"{project}/{writer.name}")
                writer.stored = Stored(writer.name, writer.size, writer.digest.hexdigest())
        except BaseException:
            with contextlib.suppress(Exception):
                self._files.rm_file(f"{self._folder}/{aside}")
            raise

    def put(self, project: str, content: Iterable[bytes]) -> Stored:
        """Store some content. Raises as `writing` does."""
        with self.writing(project) as writer:
            for piece in content:
                writer.write(piece)
        return writer.stored

    def put_file(self, project: str, path: Path) -> Stored:
        """Store a file. Raises as `writing` does."""
        with path.open("rb") as file:
            return self.put(project, iter(lambda: file.read(encryption.CHUNK), b""))

    def read(self, project: str, name: str) -> Iterator[bytes]:
        """An artifact's content, in pieces.

        Raises:
            NotFoundError: the project has no such artifact.
            DamagedError: it was altered or cut off.
            StorageError: it cannot be read just now.
        """
        key = self._key(project)
        with self._failures():
            try:
                file = self._open(f"{project}/{name}", "rb")
            except FileNotFoundError:
                raise NotFoundError("the stored content is gone") from None
            with file:
                yield from encryption.unseal(file, key, _bound(project))

    def delete(self, project: str, name: str) -> None:
        """Remove an artifact; one that is gone already is fine."""
        with self._failures(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._folder}/{project}/{name}")

    def seal(self, project: str, content: bytes) -> bytes:
        """Something small, for a row of the database."""
        return encryption.seal(self._key(project), content, _bound(project))

    def unseal(self, project: str, sealed: bytes) -> bytes:
        """What `seal` was given.

        Raises:
            DamagedError: it was altered, or is another project's.
        """
        return encryption.unseal_small(self._key(project), sealed, _bound(project))

    def _key(self, project: str) -> bytes:
        if project not in self._keys:
            self._keys[project] = self._database.write_now(lambda connection: self._find_key(connection, project))
        return self._keys[project]

    def _find_key(self, connection: Connection, project: str) -> bytes:
        columns = tables.project_keys.c
        wrapped = connection.execute(select(columns.wrapped).where(columns.project_id == project)).scalar()
        if wrapped is not None:
            return encryption.unwrap(self._root, wrapped, project)
        key = encryption.new_key()
        row = {"project_id": project, "wrapped": encryption.wrap(self._root, key, project)}
        connection.execute(insert(tables.project_keys), row)
        return key

    def _open(self, path: str, mode: str) -> BinaryIO:
        return cast(BinaryIO, self._files.open(f"{self._folder}/{path}", mode))

    def _rename(self, aside: str, path: str) -> None:
        if self._files.exists(f"{self._folder}/{path}"):
            self._files.rm_file(f"{self._folder}/{aside}")  # the same content is there
            return
        self._files.mv(f"{self._folder}/{aside}", f"{self._folder}/{path}")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in FULL:
                raise StorageFullError("the server's disk is full: nothing was stored; try again later") from None
            raise StorageError(f"the artifacts cannot be reached just now: {error.strerror or error}") from None


class Writer:
    """Takes an artifact's content as it comes."""

    stored: Stored
    """What it became, once it is there."""

    def __init__(self, file: BinaryIO, key: bytes, project: str) -> None:
        self._sealer = encryption.Sealer(file, key, _bound(project))
        self._hmac, self.digest, self.size = hmac.new(key, digestmod=hashlib.sha256), hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        """Some more of it."""
        self._sealer.write(content)
        self._hmac.update(content)
        self.digest.update(content)
        self.size += len(content)

    def finish(self) -> None:
        """That was all."""
        self._sealer.finish()

    @property
    def name(self) -> str:
        """What content like this is called in this project."""
        return self._hmac.hexdigest()


def _bound(project: str) -> str:
    """What a data key is bound to: the project. Names follow from contents, which are known only at the end."""
    return f"object of {project}"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
