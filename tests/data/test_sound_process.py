"""Recordings that are not trusted, decoded in a process of their own: what `audio.read` says, within limits."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from steelyard.data import sound_process
from steelyard.data.audio import Recording, read
from steelyard.data.sound_process import REFUSED, TOO_LONG

SOURCES = Path(sound_process.__file__).parents[2]


def decoded(content: bytes, seconds: int = 60) -> tuple[int, str, bytes]:
    """Exit code, complaint and samples."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as made:
        given.write(content)
        given.seek(0)
        command = [sys.executable, "-P", "-m", "steelyard.data.sound_process", str(seconds)]
        ended = subprocess.run(
            command, stdin=given, stdout=made, stderr=subprocess.PIPE, env={"PYTHONPATH": str(SOURCES)}, check=False
        )
        made.seek(0)
        return ended.returncode, ended.stderr.decode(), made.read()


def noise(kind: str, rate: int, seconds: float = 2.3, channels: int = 2) -> bytes:
    made, draw = io.BytesIO(), np.random.default_rng(0)
    with soundfile.SoundFile(made, "w", rate, channels, format=kind) as file:
        for _ in range(10):
            file.write(0.2 * draw.standard_normal((int(rate * seconds / 10), channels)))
    return made.getvalue()


@pytest.mark.parametrize(
    ("kind", "rate"), [("WAV", 44_100), ("FLAC", 96_000), ("OGG", 22_050), ("MP3", 48_000), ("WAV", 16_000)]
)
def test_samples_are_those_that_are_learnt_from(kind: str, rate: int, tmp_path: Path) -> None:
    content = noise(kind, rate)
    path = tmp_path / "a"
    path.write_bytes(content)
    expected = read(Recording(path=path, text=None, file=path)).numpy()
    code, complaint, samples = decoded(content)
    assert (code, complaint) == (0, "")
    assert np.array_equal(np.frombuffer(samples, np.float32), expected)


def test_a_small_file_of_much_silence_is_bounded() -> None:
    """An hour in some hundred KB is refused by what its header says, and by what is there if that lies."""
    made = io.BytesIO()
    soundfile.write(made, np.zeros(8000 * 3500), 8000, format="FLAC")
    content = bytearray(made.getvalue())
    assert len(content) < 1 << 20
    code, complaint, samples = decoded(bytes(content))
    assert (code, samples) == (TOO_LONG, b"")
    assert "longer than 1 minutes" in complaint
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 10, 0])  # that it has some 2,560 samples
    _, _, samples = decoded(bytes(content))
    assert len(samples) <= 61 * 16_000 * 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        b"OggS" + b"\0" * 200,
        b"fLaC" + b"\xff" * 200,
        b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f",
        noise("WAV", 8000)[:44],
        bytes(range(256)) * 40,
    ],
)
def test_what_is_no_recording_is_refused(content: bytes) -> None:
    code, complaint, samples = decoded(content)
    assert (code, samples) == (REFUSED, b"")
    assert "no sound" in complaint or "empty" in complaint
    assert "\n" not in complaint


def test_samples_that_are_no_numbers_are_refused() -> None:
    made = io.BytesIO()
    soundfile.write(made, np.array([0.1, np.nan, 0.2]), 16_000, format="WAV", subtype="FLOAT")
    assert decoded(made.getvalue())[0] == REFUSED


def test_a_wav_that_is_cut_off_is_what_is_there() -> None:
    code, _, samples = decoded(noise("WAV", 16_000, channels=1)[: 44 + 3200])
    assert (code, len(samples)) == (0, 1600 * 4)


def test_no_change_of_bytes_gets_out_of_the_limits() -> None:
    draw = np.random.default_rng(1)
    whole = {kind: noise(kind, 8000, 0.5, 1) for kind in ("WAV", "FLAC", "OGG", "MP3")}
    for content in whole.values():
        for _ in range(8):
            changed = bytearray(content)
            for place in draw.integers(0, min(300, len(changed)), 6).tolist():
                changed[place] = int(draw.integers(256))
            code, _, samples = decoded(bytes(changed))
            assert code in (0, REFUSED, TOO_LONG) or code < 0
            assert len(samples) <= 61 * 16_000 * 4


def test_it_can_open_no_file() -> None:
    """Once it is confined."""
    script = (
        "import sys; from steelyard.data import sound_process\n"
        "sound_process.limit(1)\n"
        "try: open('/etc/hostname')\n"
        "except OSError: sys.exit(7)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(SOURCES)}, check=False)
    assert ended.returncode == 7
