"""Artifacts: what is stored comes back, what was touched does not; in a folder and in S3 (a real server process)."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.errors import ConfigError, DamagedError, NotFoundError, StorageError
from steelyard.store import encryption
from steelyard.store.artifacts import Artifacts
from steelyard.store.database import Database, opened, sqlite_url

ROOT = b"r" * 32
SIZES = (0, 1, encryption.CHUNK - 1, encryption.CHUNK, encryption.CHUNK + 1, 3 * encryption.CHUNK + 5)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The endpoint of an S3 server of its own."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with opened(sqlite_url(tmp_path / "db")) as database:
        yield database


@pytest.fixture(params=["folder", "s3"])
def artifacts(
    request: pytest.FixtureRequest, tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> Artifacts:
    if request.param == "folder":
        return Artifacts(str(tmp_path / "artifacts"), ROOT, database)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    endpoint = request.getfixturevalue("s3")
    options = {"key": "x", "secret": "y", "client_kwargs": {"endpoint_url": endpoint}}
    made = Artifacts(f"s3://bucket{random.randrange(1 << 40)}/prefix", ROOT, database, **options)
    made._files.mkdir(made._folder.partition("/")[0])
    return made


@pytest.mark.parametrize("size", SIZES)
def test_what_is_stored_comes_back(artifacts: Artifacts, size: int) -> None:
    content = os.urandom(size)
    stored = artifacts.put("proj", [content[:7], content[7:]])
    assert stored.size == size
    assert b"".join(artifacts.read("proj", stored.name)) == content
    assert artifacts.put("proj", [content]) == stored, "once within a project"
    elsewhere = artifacts.put("other", [content])
    assert elsewhere.name != stored.name, "a name tells another project nothing"
    with pytest.raises(NotFoundError):
        list(artifacts.read("other", stored.name))
    artifacts.delete("proj", stored.name)
    artifacts.delete("proj", stored.name)
    with pytest.raises(NotFoundError):
        list(artifacts.read("proj", stored.name))


def test_what_fails_leaves_nothing(artifacts: Artifacts) -> None:
    def broken() -> Iterator[bytes]:
        yield os.urandom(2 << 20)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        artifacts.put("proj", broken())
    assert [path for path in artifacts._files.find(artifacts._folder) if "aside" in path] == []


def test_every_change_is_found(tmp_path: Path, database: Database) -> None:
    artifacts = Artifacts(str(tmp_path / "artifacts"), ROOT, database)
    content = os.urandom(2 * encryption.CHUNK + 100)
    stored = artifacts.put("proj", [content])
    path = tmp_path / "artifacts/proj" / stored.name
    sealed = path.read_bytes()
    assert content[:100] not in sealed
    seeded, chunk, header = (
        random.Random(3),
        encryption.CHUNK + encryption.TAG,
        len(encryption.MAGIC) + encryption.WRAPPED,
    )
    changed = [sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :] for place in range(header)]
    for _ in range(50):
        place = seeded.randrange(len(sealed))
        changed.append(sealed[:place] + bytes([sealed[place] ^ (1 << seeded.randrange(8))]) + sealed[place + 1 :])
    changed += [sealed[:length] for length in (0, 5, header, header + chunk, header + 2 * chunk, len(sealed) - 1)]
    changed += [sealed + b"x", sealed[:header] + sealed[header + chunk : header + 2 * chunk] + sealed[header:]]
    for other in changed:
        path.write_bytes(other)
        with pytest.raises(DamagedError):
            list(artifacts.read("proj", stored.name))
    path.write_bytes(sealed)
    assert b"".join(artifacts.read("proj", stored.name)) == content
    (tmp_path / "artifacts/other").mkdir()
    (tmp_path / "artifacts/other" / stored.name).write_bytes(sealed)
    with pytest.raises(DamagedError):
        list(artifacts.read("other", stored.name))


def test_another_root_key_opens_nothing(tmp_path: Path, database: Database) -> None:
    artifacts = Artifacts(str(tmp_path / "artifacts"), ROOT, database)
    stored = artifacts.put("proj", [b"hello"])
    with pytest.raises(StorageError, match=r"secrets\.json"):
        list(Artifacts(str(tmp_path / "artifacts"), b"n" * 32, database).read("proj", stored.name))


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=300), name=st.text(max_size=10), place=st.integers(0, 400))
def test_small_things_are_sealed_to_their_name(content: bytes, name: str, place: int) -> None:
    key = encryption.new_key()
    sealed = encryption.seal(key, content, name)
    assert encryption.unseal_small(key, sealed, name) == content
    altered = bytearray(sealed)
    altered[place % len(sealed)] ^= 1
    for wrong in ((key, bytes(altered), name), (key, sealed, name + "x"), (encryption.new_key(), sealed, name)):
        with pytest.raises(DamagedError):
            encryption.unseal_small(*wrong)


def test_an_unknown_kind_of_place_is_said(database: Database) -> None:
    with pytest.raises(ConfigError, match="cannot be kept"):
        Artifacts("nonsense://x", ROOT, database)
