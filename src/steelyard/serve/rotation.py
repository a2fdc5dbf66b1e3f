"""Another root key: whatever the old one has sealed is sealed by the new one. Contents stay as they are.

The file of secrets holds both keys until the database is done, so a rotation that was cut off is gone on with by the
next one; no server starts meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

import msgspec
from sqlalchemy import Connection, delete, select, update

from steelyard.errors import ConfigError, DamagedError
from steelyard.serve.idempotency import sealed_name
from steelyard.store import encryption, tables
from steelyard.store.database import Database
from steelyard.store.secrets import Secrets, new_secret, open_secrets, replace_secrets


def rotate_root(database: Database, environment: Mapping[str, str] = os.environ) -> int:
    """Take a new root key; returns how many projects' keys it wraps.

    Raises:
        ConfigError: a server or a worker uses the database, or the secrets cannot be written.
        DamagedError: something opens by neither key; nothing is changed in the database.
    """
    if not database.write_now(database.is_alone):
        raise ConfigError("a server or a worker uses this database: stop it first, and start it again afterwards")
    secrets = open_secrets(environment)
    if secrets.old_root is None:
        secrets = msgspec.structs.replace(secrets, root=new_secret(), old_root=secrets.root)
        replace_secrets(secrets, environment)
    count = database.write_now(partial(_seal_again, secrets=secrets))
    replace_secrets(msgspec.structs.replace(secrets, old_root=None), environment)
    return count


def _seal_again(connection: Connection, secrets: Secrets) -> int:
    keys, answers = tables.project_keys, tables.idempotency
    rows = connection.execute(select(keys)).all()
    for row in rows:
        wrapped = _renewed(secrets, row.wrapped, row.project_id)
        connection.execute(update(keys).where(keys.c.project_id == row.project_id).values(wrapped=wrapped))
    for row in connection.execute(select(answers).where(answers.c.answer.is_not(None))).all():
        mine = (answers.c.owner == row.owner, answers.c.key == row.key)
        try:
            answer = _renewed(secrets, row.answer, sealed_name(row.owner, row.key))
        except DamagedError:  # it is of use for a day at most
            connection.execute(delete(answers).where(*mine))
            continue
        connection.execute(update(answers).where(*mine).values(answer=answer))
    return len(rows)


def _renewed(secrets: Secrets, sealed: bytes, name: str) -> bytes:
    """Sealed by the root key of now, whichever had sealed it."""
    assert secrets.old_root is not None
    try:
        content = encryption.unseal_small(secrets.old_root, sealed, name)
    except DamagedError:
        content = encryption.unseal_small(secrets.root, sealed, name)
    return encryption.seal(secrets.root, content, name)
