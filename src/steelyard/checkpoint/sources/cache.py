"""The cache on disk: downloaded blobs by their digest, checkpoints by their id, and which source gave which.

    blobs/sha256/<hex>                 what was downloaded, verified
    checkpoints/<12 hex of id>/<Name>  whole checkpoints
    sources/<hex>.json                 source -> checkpoint folder
    staging/<random>                   work in progress; removed at the end, or a day after a crash
    locks/<hex>                        one lock per source, so that two pulls of it do the work once

Knows nothing of where bytes come from or what a model is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from steelyard.atomic import write_file
from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError

STALE_SECONDS = 24 * 3600

Report = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes done, and the bytes in all (None if unknown)."""


def default_cache() -> Path:
    """`$STEELYARD_CACHE`, else `steelyard` in `$XDG_CACHE_HOME`, else `~/.cache/steelyard`."""
    if chosen := os.environ.get("STEELYARD_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "steelyard"


@dataclass(frozen=True)
class Cache:
    """A cache at `root`; folders in it are made when first needed."""

    root: Path

    def blob(self, sha256: str) -> Path:
        """Where the blob with this digest lies, or will lie."""
        return self.root / "blobs" / "sha256" / sha256

    @contextlib.contextmanager
    def lock(self, subject: str) -> Iterator[None]:
        """Hold the lock of `subject` against other threads and processes; the system frees it if this one dies."""
        path = self.root / "locks" / _key(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """An empty folder on the cache's own file system, removed at the end. Also removes what crashes left."""
        staging = self.root / "staging"
        staging.mkdir(parents=True, exist_ok=True)
        for left in staging.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=staging))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def find(self, source: str, stamp: str) -> Path | None:
        """The checkpoint that `source` gave when its `stamp` was this one, if it is still whole (by its manifest)."""
        try:
            entry = json.loads(self._entry(source).read_bytes())
            folder = self.root / "checkpoints" / entry["folder"]
            known = manifest.read(folder)
            whole = known.id == entry["id"] and all((folder / name).is_file() for name in known.files)
            return folder if whole and entry["stamp"] == stamp else None
        except (OSError, ValueError, KeyError, TypeError, CheckpointError):
            return None

    def adopt(self, staged: Path) -> Path:
        """Move a finished checkpoint to its place by id and return it; one that is there and whole is kept."""
        identity = manifest.read(staged).id.removeprefix("sha256:")
        place = self.root / "checkpoints" / identity[:12] / staged.name
        with self.lock(str(place)):
            if place.exists():
                try:
                    manifest.verify(place)
                    return place
                except CheckpointError:
                    shutil.rmtree(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            staged.rename(place)
        return place

    def remember(self, source: str, stamp: str, folder: Path) -> None:
        """Note that `source`, with this stamp, gave the checkpoint in `folder`."""
        where = folder.relative_to(self.root / "checkpoints").as_posix()
        entry = {"source": source, "stamp": stamp, "folder": where, "id": manifest.read(folder).id}
        write_file(self._entry(source), json.dumps(entry, indent=2) + "\n")

    def _entry(self, source: str) -> Path:
        return self.root / "sources" / f"{_key(source)}.json"


def _key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
