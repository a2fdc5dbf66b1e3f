"""A run's folder: its configuration, log, metrics and lock. Knows nothing of what runs.

run.json         the full configuration, as it was resolved; makes the folder a run's
log.txt          one line per event
metrics.jsonl    one object per measured step
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from pathlib import Path
from typing import IO, Any

from steelyard.atomic import sweep, write_file
from steelyard.errors import ConfigError

CONFIG = "run.json"
# All that a run puts into its folder. --fresh removes these and nothing else.
FILES = (CONFIG, ".lock", "log.txt", "metrics.jsonl", "report.html")
ENTRIES = (*FILES, "state", "best", "last", "checkpoints", "tokenizer", "prepared", "teacher.safetensors")


class Run:
    """A folder that one process at a time runs in.

    Args:
        folder: made if it is not there; what is there must be empty or a run's.
        config: plain values; a run that was begun with another configuration is refused, once it has done a step.
        defaults: of keys that an earlier version's run did not record.

    Raises:
        ConfigError: a folder of something else, another configuration (the first differing key is named), or another
            process is in it.
    """

    def __init__(self, folder: Path, config: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
        self.folder = folder
        if not (folder / CONFIG).is_file() and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"'{folder}' is not empty and is no run's folder: name another output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"cannot make the run's folder '{folder}': {error.strerror}") from None
        try:
            _take(self._lock, folder)
            self._begin(json.loads(json.dumps(config)), json.loads(json.dumps(defaults or {})))
        except BaseException:
            self.close()
            raise

    def _begin(self, config: dict[str, Any], defaults: dict[str, Any]) -> None:
        """Record the configuration, or compare it with the recorded one; newer keys had their defaults then."""
        path = self.folder / CONFIG
        if not path.is_file() or not (self.metrics() or any(self.folder.glob("state/*"))):
            write_file(path, json.dumps(config, indent=2) + "\n")
            return
        try:
            begun = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise ConfigError(f"'{path}' is damaged: choose another output, or --fresh to start over") from None
        key = _first_difference(_filled(begun, defaults), config)
        if key is not None:
            raise ConfigError(
                f"'{self.folder}' holds a run with another '{key}': choose another output, or --fresh to start over"
            )

    def log(self, message: str) -> None:
        """Add a line to log.txt."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def measure(self, **values: Any) -> None:
        """Add an object to metrics.jsonl; `step` is one of its values."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All objects of metrics.jsonl; a line that a kill cut short is left out."""
        return read_metrics(self.folder)

    def rewind(self, step: int) -> None:
        """Forget what was measured after `step`: it will be measured again."""
        kept = [json.dumps(values) + "\n" for values in self.metrics() if values.get("step", 0) <= step]
        write_file(self.folder / "metrics.jsonl", "".join(kept))

    def close(self) -> None:
        """Let others in."""
        self._lock.close()


def clear(folder: Path) -> None:
    """Remove what a run left in its folder, and the folder if nothing else is in it. One that is not there is fine.

    Raises:
        ConfigError: the folder is not a run's, or another process is in it.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"'{folder}' is not a run's folder: --fresh will not empty it")
    with (folder / ".lock").open("w") as lock:
        _take(lock, folder)
        for name in ENTRIES:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        sweep(folder)
    if not any(folder.iterdir()) and folder.resolve() != Path.cwd():
        folder.rmdir()


def _take(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"another process is running in '{folder}'") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All objects of a run's metrics.jsonl; lines that are none are left out."""
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            found.append(values)
    return found


def _filled(values: Any, defaults: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(defaults, dict):
        return values
    return {**defaults, **{key: _filled(value, defaults.get(key)) for key, value in values.items()}}


def _first_difference(old: Any, new: Any, path: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found is not None:
                return found
        return None
    return None if old == new else path
