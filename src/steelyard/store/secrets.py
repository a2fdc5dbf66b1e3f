"""The server's own secrets: what keys are peppered with, what chains are keyed with, what wraps the keys of artifacts.

They are in one file beside the database, never in it: who copies the database has no use for it.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from steelyard.atomic import file_aside
from steelyard.errors import ConfigError

HOME_VARIABLE = "STEELYARD_HOME"
SECRETS_VARIABLE = "STEELYARD_SECRETS"
MAX_BYTES = 1 << 16
LENGTH = 32


class Secrets(msgspec.Struct, frozen=True):
    """32 random bytes each."""

    pepper: bytes
    """Of API keys: what the database keeps of one is an HMAC under it."""
    chain: bytes
    """Of the ledger's and the audit log's hash chains."""
    root: bytes
    """Wraps the keys that artifacts are encrypted with."""
    old_root: bytes | None = None
    """The one before, while it is taken out of use."""

    def __repr__(self) -> str:
        return "Secrets(...)"

    @property
    def serving_root(self) -> bytes:
        """The root key, for a server.

        Raises:
            ConfigError: another one is being taken: the database has keys of both.
        """
        if self.old_root is not None:
            raise ConfigError("the root key is just being changed: end that by `steelyard secrets rotate`")
        return self.root

    @classmethod
    def make(cls) -> Secrets:
        """Fresh ones."""
        return cls(new_secret(), new_secret(), new_secret())


def new_secret() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(LENGTH)


def home(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of what a server remembers: `STEELYARD_HOME`, or `~/.local/share/steelyard`."""
    named = environment.get(HOME_VARIABLE)
    return Path(named) if named else Path.home() / ".local/share/steelyard"


def open_secrets(environment: Mapping[str, str] = os.environ) -> Secrets:
    """The secrets in the file `STEELYARD_SECRETS`, or `secrets.json` in `home`; made at the first start.

    Raises:
        ConfigError: the file cannot be read or made, others may read it, or it is broken.
    """
    path = _path(environment)
    try:
        if not path.exists():
            _create(path, msgspec.json.encode(Secrets.make()))
        return _read(path)
    except OSError as error:
        raise ConfigError(
            f"the server's secrets cannot be kept in '{path}' ({error.strerror}): set {HOME_VARIABLE} to a folder of"
            " your own"
        ) from None


def replace_secrets(changed: Secrets, environment: Mapping[str, str] = os.environ) -> None:
    """Write changed secrets in the place of the old ones: those or these are there, whatever happens.

    Raises:
        ConfigError: they cannot be written.
    """
    path = _path(environment)
    try:
        with file_aside(path, 0o600) as file:
            file.write(msgspec.json.encode(changed))
    except OSError as error:
        raise ConfigError(f"the server's secrets cannot be written to '{path}' ({error.strerror})") from None


def _path(environment: Mapping[str, str]) -> Path:
    named = environment.get(SECRETS_VARIABLE)
    return Path(named) if named else home(environment) / "secrets.json"


def _create(path: Path, content: bytes) -> None:
    """Write a file that nobody else may read; one that appears meanwhile is left alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        Path(aside).unlink()


def _read(path: Path) -> Secrets:
    with path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise ConfigError(f"'{path}' holds secrets and others may read it: chmod 600 it, and think of new ones")
        content = file.read(MAX_BYTES + 1)
    try:
        found = msgspec.json.decode(content, type=Secrets)
    except msgspec.MsgspecError:
        found = None
    if found is None or any(len(value) != LENGTH for value in msgspec.structs.astuple(found) if value is not None):
        raise ConfigError(f"'{path}' is no file of secrets, or was damaged: put it back from your backup")
    return found
