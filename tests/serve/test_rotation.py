"""Another root key: what was sealed opens, whenever it is cut off, and only while nobody serves."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running_service import serving
from sqlalchemy import insert, select

from steelyard.errors import ConfigError, StorageError
from steelyard.serve import rotation
from steelyard.serve.rotation import rotate_root
from steelyard.store import tables
from steelyard.store.artifacts import Artifacts
from steelyard.store.database import opened
from steelyard.store.secrets import Secrets, open_secrets


def test_the_root_key_changes(
    make_checkpoint: Callable[[str], Path],
    fresh_database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = {"STEELYARD_HOME": str(tmp_path)}
    first = open_secrets(environment)
    options: Any = {"state": tmp_path, "database": fresh_database}
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    once = {"extra_headers": {"Idempotency-Key": "once"}}
    checkpoint = make_checkpoint("tiny")
    with serving(checkpoint, secrets=first, **options) as service:
        client = service.sdk()
        file = client.files.create(file=("a.bin", io.BytesIO(b"content")), purpose="user_data").id
        answer = client.chat.completions.create(**asked, **once)
        with opened(fresh_database) as database, pytest.raises(ConfigError, match="stop it first"):
            rotate_root(database, environment)
        assert open_secrets(environment) == first

    def cut_off(*_: Any, **__: Any) -> Any:
        raise StorageError("the machine dies about here")

    with opened(fresh_database, role="server") as database:
        with monkeypatch.context() as patched:
            patched.setattr(rotation, "_seal_again", cut_off)
            with pytest.raises(StorageError):
                rotate_root(database, environment)
        between = open_secrets(environment)
        assert between.old_root == first.root
        with pytest.raises(ConfigError, match="secrets rotate"):
            _ = between.serving_root
        broken = {"owner": "x", "key": "broken", "fingerprint": "", "created_at": 1, "holder": 0, "answer": b"n" * 40}
        database.write_now(lambda connection: connection.execute(insert(tables.idempotency), broken))
        replace = rotation.replace_secrets
        with monkeypatch.context() as patched:  # the database is done, the file is not
            patched.setattr(rotation, "replace_secrets", cut_off)
            with pytest.raises(StorageError):
                rotate_root(database, environment)
        assert rotation.replace_secrets is replace
        assert rotate_root(database, environment) == 1
        second = open_secrets(environment)
        keys = database.read_now(
            lambda connection: connection.execute(select(tables.idempotency.c.key)).scalars().all()
        )
        assert keys == ["once"], "an answer that opens by no key is forgotten"
        assert second.root == between.root != first.root
        assert second.old_root is None
        assert (second.pepper, second.chain) == (first.pepper, first.chain)
        project = database.read_now(lambda connection: connection.exec_driver_sql("select id from projects").scalar())
        old = Artifacts(str(tmp_path / "artifacts"), first.root, database)
        with pytest.raises(StorageError, match=r"secrets\.json"):
            old.seal(project, b"x")
    with serving(checkpoint, secrets=second, **options) as service:
        client = service.sdk()
        assert client.files.content(file).read() == b"content"
        assert client.chat.completions.create(**asked, **once).id == answer.id


def test_secrets_are_whole_or_refused(tmp_path: Path) -> None:
    environment = {"STEELYARD_HOME": str(tmp_path)}
    found = open_secrets(environment)
    assert isinstance(found, Secrets)
    assert found.serving_root == found.root
    path = tmp_path / "secrets.json"
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="cannot be written"):
        rotation.replace_secrets(found, {"STEELYARD_SECRETS": str(path / "secrets.json")})
