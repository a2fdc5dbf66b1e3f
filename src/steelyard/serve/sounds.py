"""Recordings that somebody has sent: taken in as a file, decoded by a process of their own, read a piece at a time.

Neither file has a name, and both are gone with who holds them, whatever happens to this process. They lie where other
things lie clear for a while (see `files.py`). Nothing of a recording is parsed here, and only pieces of it are held.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from steelyard.data import sound_process
from steelyard.data.sound_process import FULL, REFUSED, TOO_LONG
from steelyard.errors import (
    PayloadTooLargeError,
    RateLimitError,
    RequestError,
    SteelyardError,
    StorageError,
    StorageFullError,
)
from steelyard.infer.sound import SAMPLE_BYTES
from steelyard.serve.turns import Turns

MOST_BYTES = 25 << 20
"""Of a recording as it is sent."""
MOST_SECONDS = 1500
"""How long it may last."""
DECODERS = 2
"""Processes at once."""
WALL_SECONDS = 60.0
"""What a decoder may take; its processor time is bounded by itself."""
MOST_HELD, MOST_IN_ALL = 8, 32
"""Recordings of a project, and of all together, that are taken in or heard at once."""
MOST_COMPLAINT = 400
_PACKAGES = str(Path(sound_process.__file__).parents[2])


@dataclass(frozen=True)
class Samples:
    """A recording, decoded: float32 of 16 kHz."""

    file: BinaryIO
    count: int

    def piece(self, first: int, count: int) -> bytes:
        """Some of them, from the disk."""
        return os.pread(self.file.fileno(), count * SAMPLE_BYTES, first * SAMPLE_BYTES)


class Sounds:
    """Takes recordings in and has them decoded.

    Args:
        folder: where their files lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._decoders = folder, Turns(DECODERS)
        self._held: Counter[str] = Counter()

    @contextlib.contextmanager
    def held(self, project: str) -> Iterator[None]:
        """While a project's recording is here.

        Raises:
            RateLimitError: as many of its recordings are here as may be.
        """
        if self._held[project] >= MOST_HELD:
            raise RateLimitError(f"{MOST_HELD} recordings of this project are being heard: send this one later")
        if self._held.total() >= MOST_IN_ALL:
            raise RateLimitError("as many recordings are being heard as may be at once: send this one later")
        self._held[project] += 1
        try:
            yield
        finally:
            self._held[project] -= 1
            if not self._held[project]:
                del self._held[project]

    def file(self) -> BinaryIO:
        """A new file without a name.

        Raises:
            StorageError: there can be none.
        """
        with writing():
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return tempfile.TemporaryFile(dir=self._folder)

    async def decode(self, recording: BinaryIO, project: str) -> Samples:
        """The samples of a project's recording, which then is not needed any more.

        Raises:
            RequestError: it is no recording, or too long a one.
            StorageError: there is no room for its samples.
        """
        made = await asyncio.to_thread(self.file)
        async with self._decoders.place(project):
            recording.seek(0)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "steelyard.data.sound_process", str(MOST_SECONDS)),
                stdin=recording,
                stdout=made,
                stderr=asyncio.subprocess.PIPE,
                cwd="/",
                start_new_session=True,
                env={"PYTHONPATH": _PACKAGES, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            assert process.stderr is not None
            try:
                async with asyncio.timeout(WALL_SECONDS):
                    complaint = await process.stderr.read(MOST_COMPLAINT)
                    code = await process.wait()
            except TimeoutError:
                code, complaint = -1, b""
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if code != 0:
            raise _refusal(code, complaint.decode("utf-8", "replace"))
        return Samples(made, os.fstat(made.fileno()).st_size // SAMPLE_BYTES)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """While a recording's file is made or written.

    Raises:
        StorageError: it cannot be.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = StorageFullError if full else StorageError
        raise kind(f"the recording cannot be kept while it is heard: {error.strerror}") from None


def _refusal(code: int, complaint: str) -> SteelyardError:
    if code == TOO_LONG:
        return PayloadTooLargeError(f"the file {complaint}", param="file", code="audio_too_long")
    if code == FULL:
        return StorageFullError(f"the recording cannot be kept while it is heard: {complaint}")
    if code == REFUSED:
        return RequestError(f"the file {complaint}", param="file", code="invalid_audio")
    reason = "the file takes too much to decode: send it as WAV, or part it"
    return RequestError(reason, param="file", code="invalid_audio")
