"""Decodes one image that is not trusted: `python -m steelyard.data.image_process CHANNELS SIDE < image > pixels`.

What is written are `CHANNELS * SIDE * SIDE` bytes. Whatever the image is, this process can read it and nothing else,
and is bounded: its processor time by a signal, its memory by an address space, files and processes by limits of zero.
It ends with 0, or says in one line on its standard error why not.
"""

from __future__ import annotations

import io
import os
import resource
import sys

from steelyard.data import picture
from steelyard.errors import ArtifactError, LargePictureError

REFUSED, TOO_LARGE = 2, 3
"""Exit codes: it is no image; it has too many pixels."""
CPU_SECONDS = 10
MEMORY = 256 << 20
MOST_PIXELS = 16 << 20
MOST_BYTES = 8 << 20


def limit() -> None:
    """Confine this process from here on: `MEMORY` more bytes than it has now, no further file or process."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    for kind, value in ((resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def main(channels: int, side: int) -> int:
    """Decode; returns the exit code."""
    _import_readers(channels)
    limit()
    os.nice(10)  # engines go first
    try:
        content = sys.stdin.buffer.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            return _refuse(TOO_LARGE, f"is over {MOST_BYTES >> 20} MB")
        sys.stdout.buffer.write(picture.fitted(content, channels, side, MOST_PIXELS).tobytes())
        sys.stdout.buffer.flush()
    except LargePictureError as error:
        return _refuse(TOO_LARGE, str(error))
    except ArtifactError as error:
        return _refuse(REFUSED, str(error))
    except MemoryError:
        return _refuse(REFUSED, f"needs over {MEMORY >> 20} MB to be decoded")
    return 0


def _import_readers(channels: int) -> None:
    """No file can be opened later: decode something of every kind now."""
    from PIL import Image

    for kind in picture.FORMATS:
        file = io.BytesIO()
        Image.new("RGB", (2, 2)).save(file, kind)
        picture.fitted(file.getvalue(), channels, 1)


def _refuse(code: int, reason: str) -> int:
    sys.stderr.write(" ".join(reason.split())[:300])
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
