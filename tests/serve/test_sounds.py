"""Recordings on their way through the server: nothing stays of them, whatever becomes of who decodes them."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import psutil
import pytest

from spoken import sound_file, spoken
from steelyard.errors import RateLimitError, RequestError, StorageError, StorageFullError
from steelyard.serve import sounds
from steelyard.serve.sounds import MOST_HELD, Samples, Sounds, writing


async def decoded(made: Sounds, content: bytes) -> Samples:
    with made.file() as recording:
        recording.write(content)
        recording.flush()
        return await made.decode(recording, "one")


def children() -> list[str]:
    return [line for child in psutil.Process().children(True) for line in child.cmdline() if "sound_process" in line]


def test_samples_are_read_in_pieces_and_no_file_is_left(tmp_path: Path) -> None:
    samples = asyncio.run(decoded(Sounds(tmp_path / "clear"), sound_file(spoken("abc"), rate=8000)))
    assert samples.count == 2 * len(spoken("abc"))
    whole = samples.piece(0, samples.count)
    assert len(whole) == 4 * samples.count
    assert samples.piece(0, 1000) + samples.piece(1000, samples.count) == whole
    assert list((tmp_path / "clear").iterdir()) == []
    assert (tmp_path / "clear").stat().st_mode & 0o077 == 0


def test_a_decoder_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "WALL_SECONDS", 0.01)
    with pytest.raises(RequestError, match="too much to decode"):
        asyncio.run(decoded(Sounds(tmp_path), sound_file(spoken("abc"))))
    assert children() == []


def test_who_leaves_takes_his_decoder_with_him(tmp_path: Path) -> None:
    async def leave() -> None:
        made = Sounds(tmp_path)
        for _ in range(3):  # more than there may be at once: each gives its place back
            decoding = asyncio.create_task(decoded(made, sound_file(spoken("abc"))))
            await asyncio.sleep(0.05)
            decoding.cancel()
            await asyncio.gather(decoding, return_exceptions=True)
            assert children() == []
        assert (await decoded(made, sound_file(spoken("abc")))).count

    asyncio.run(leave())


def test_a_project_holds_so_many(tmp_path: Path) -> None:
    made = Sounds(tmp_path)
    held = [made.held("one") for _ in range(MOST_HELD)]
    for one in held:
        one.__enter__()
    with pytest.raises(RateLimitError), made.held("one"):
        pass
    with made.held("other"):
        pass
    held[0].__exit__(None, None, None)
    with made.held("one"):
        pass


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageFullError), (errno.EIO, StorageError)])
def test_a_disk_that_does_not_take_it(number: int, kind: type[StorageError]) -> None:
    with pytest.raises(kind, match="cannot be kept"), writing():
        raise OSError(number, "it does not go")
