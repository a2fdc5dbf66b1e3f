"""How much memory runs may take: what the machine has, what it has left, and whether one more fits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

MARGIN = 1 << 30
"""Bytes that stay free for the server and its engines."""
PAGE = 4096
GIGABYTE = 1e9


def total() -> int | None:
    """Bytes that this machine, or its container, has in all; None where it does not say."""
    found = [_meminfo("MemTotal"), _number(Path("/sys/fs/cgroup/memory.max"))]
    return min((bytes for bytes in found if bytes is not None), default=None)


def available() -> int | None:
    """Bytes that can be had without swapping; None where the machine does not say."""
    found = [_meminfo("MemAvailable")]
    limit, taken = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and taken is not None:
        found.append(limit - taken + _reclaimable())
    return min((bytes for bytes in found if bytes is not None), default=None)


def resident(pid: int) -> int:
    """Bytes that a process has now; 0 for one that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return 0


def fits(wanted: int, running: Iterable[tuple[int, int]], free: int | None) -> bool:
    """Whether a run that takes `wanted` bytes can start.

    Args:
        wanted: bytes, by estimate.
        running: of each run there is, the bytes that it was let in for, and those that it has by now.
        free: bytes that are available now; None: nobody knows, so everything fits.
    """
    promised = sum(max(0, estimate - taken) for estimate, taken in running)
    return free is None or wanted + promised + MARGIN <= free


def _meminfo(name: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _reclaimable() -> int:
    """Bytes of a container's page cache that the kernel takes back when they are wanted."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or `max`
        return None
