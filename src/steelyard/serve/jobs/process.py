"""The process of a run: `steelyard ...` in a folder of its own, with nothing to know and the lowest priority.

It sees neither database nor secret nor key; where memory runs out the kernel takes it first, before the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from steelyard.errors import SteelyardError

POLL_SECONDS = 0.3
GRACE_SECONDS = 30
"""Between SIGTERM, at which a run saves its state, and SIGKILL."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "STEELYARD_CACHE", "STEELYARD_KERNELS", "LD_LIBRARY_PATH")
INTERRUPTED = 130
PLACES = 20
"""Lines of a run's traceback that go to the server's log, if it ends without a word."""

_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # found before the fork
log = logging.getLogger("steelyard.jobs")


async def start(folder: Path, arguments: Sequence[str], threads: int) -> Process:
    """Start the command line with these arguments in a folder; what it prints as a log is in `process.log` there."""
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    with (folder / "process.log").open("ab") as printed:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "steelyard", *arguments),
            cwd=folder,
            env={**environment, "OMP_NUM_THREADS": str(threads)},
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=printed,
            start_new_session=True,
            preexec_fn=partial(_humble, os.getpid()),
        )


async def attend(
    process: Process, folder: Path, wanted: Callable[[], Awaitable[bool]]
) -> tuple[int, SteelyardError | None]:
    """Wait for a run's end; its exit code, and what it complains of, where it ended by itself.

    Args:
        process: as `start` made it.
        folder: likewise.
        wanted: asked again and again; once it says no, the run is told to save its state and end.
    """
    assert process.stdout is not None
    output, ended = asyncio.create_task(process.stdout.read()), asyncio.create_task(process.wait())
    ending: asyncio.Task[None] | None = None
    try:
        while not ended.done():
            await asyncio.wait({ended}, timeout=POLL_SECONDS)
            if not await wanted() and ending is None:
                ending = asyncio.create_task(end(process))
    except BaseException:
        await asyncio.shield(ending or asyncio.create_task(end(process)))  # told once: a second signal kills
        raise
    code = await ended
    return code, _complaint(await output, folder) if code > 0 and code != INTERRUPTED else None


async def end(process: Process) -> None:
    """Let a run save its state and end; kill it if it does not."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), GRACE_SECONDS)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _humble(parent: int) -> None:
    """In the run's process, before it becomes one: everything else goes first, and nothing outlives its parent."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died just before
            os._exit(1)
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # of Linux
        Path("/proc/self/oom_score_adj").write_text("1000")


def _complaint(output: bytes, folder: Path) -> SteelyardError:
    """What the command line said of an error, in its last line."""
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        return SteelyardError(str(json.loads(output.splitlines()[-1])["error"]["message"]))
    with contextlib.suppress(OSError):
        printed = (folder / "process.log").read_text(errors="replace").splitlines()
        places = [line for line in printed if line.startswith("  File ")][-PLACES:]
        kind = printed[-1].partition(":")[0] if printed else "nothing"
        log.error("the run of %s ended with %s:\n%s", folder.name, kind, "\n".join(places))  # no text of a row's
    return SteelyardError("an error that is not yours: the server's log has it under the job's id")
