"""Decodes one recording that is not trusted: `python -m steelyard.data.sound_process SECONDS < recording > samples`.

Both are files. What is written is float32 in the machine's order, 16 kHz. Whatever the recording is, this process can
read it and nothing else, and is bounded: its processor time by a signal, its memory by an address space, what it writes
by a size, files and processes by limits of zero. It ends with 0, or says in one line on its standard error why not.
"""

from __future__ import annotations

import errno
import os
import resource
import sys

from steelyard.data import sound
from steelyard.errors import ArtifactError, ConfigError, LongSoundError

REFUSED, TOO_LONG, FULL = 2, 3, 4
"""Exit codes: it is no recording; it is too long a one; there is no room for its samples."""
CPU_SECONDS = 20
MEMORY = 128 << 20
SAMPLE_BYTES = 4


def limit(seconds: int) -> None:
    """Confine this process from here on: `MEMORY` more bytes than it has now, no further file or process."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    for kind, value in ((resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    most = (seconds + 1) * sound.RATE * SAMPLE_BYTES
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def main(seconds: int) -> int:
    """Decode; returns the exit code."""
    import soundfile  # noqa: F401  (no file can be opened later)
    import soxr

    soxr.ResampleStream(44_100, sound.RATE, 1, dtype="float32")
    limit(seconds)
    os.nice(10)  # engines go first
    try:
        for piece in sound.pieces(0, seconds):
            rest = memoryview(piece.tobytes())
            while rest:
                rest = rest[os.write(1, rest) :]
    except LongSoundError as error:
        return _refuse(TOO_LONG, str(error))
    except (ArtifactError, ConfigError) as error:
        return _refuse(REFUSED, str(error))
    except MemoryError:
        return _refuse(REFUSED, f"needs over {MEMORY >> 20} MB to be decoded")
    except OSError as error:
        if error.errno == errno.EFBIG:
            return _refuse(TOO_LONG, f"is longer than {seconds // 60} minutes: part it")
        return _refuse(FULL, error.strerror or "cannot be written")
    return 0


def _refuse(code: int, reason: str) -> int:
    sys.stderr.write(" ".join(reason.split())[:300])
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
