"""Images that somebody has sent, decoded by a process of their own: nothing of them is parsed here."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from steelyard.data import image_process
from steelyard.data.image_process import REFUSED, TOO_LARGE
from steelyard.errors import PayloadTooLargeError, RequestError, SteelyardError
from steelyard.infer.request import Sees
from steelyard.serve.turns import Turns

DECODERS = 2
"""Processes at once."""
WALL_SECONDS = 30.0
MOST_COMPLAINT = 400
_PACKAGES = str(Path(image_process.__file__).parents[2])


class Pictures:
    """Has images decoded."""

    def __init__(self) -> None:
        self._decoders = Turns(DECODERS)

    async def decode(self, content: bytes, sees: Sees, project: str, param: str) -> bytes:
        """The pixels of a project's image, as a model sees them.

        Raises:
            RequestError: it is no image; the field is named.
            PayloadTooLargeError: it has too many pixels.
        """
        async with self._decoders.place(project):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "steelyard.data.image_process", str(sees.channels), str(sees.side)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd="/",
                start_new_session=True,
                env={"PYTHONPATH": _PACKAGES, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            try:
                async with asyncio.timeout(WALL_SECONDS):
                    pixels, complaint = await process.communicate(content)
            except TimeoutError:
                pixels, complaint = b"", b""
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if process.returncode != 0 or len(pixels) != sees.channels * sees.side**2:
            raise _refusal(process.returncode, complaint[:MOST_COMPLAINT].decode("utf-8", "replace"), param)
        return pixels


def _refusal(code: int | None, complaint: str, param: str) -> SteelyardError:
    if code == TOO_LARGE:
        return PayloadTooLargeError(f"'{param}' {complaint}: send it smaller", param=param, code="image_too_large")
    if code == REFUSED:
        return RequestError(f"'{param}' {complaint}", param=param, code="invalid_image")
    reason = f"'{param}' takes too much to decode: send it smaller, as PNG"
    return RequestError(reason, param=param, code="invalid_image")
