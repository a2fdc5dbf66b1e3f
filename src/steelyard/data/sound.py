"""Sound files as samples of 16 kHz in one channel, bounded, a piece at a time: WAV, FLAC, OGG and MP3.

libsndfile decodes, soxr resamples (extra `audio`). However long a recording is, one piece of it is held. Imports no
torch: `sound_process.py` has only this.
"""

# S samples

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from steelyard.errors import ArtifactError, ConfigError, LongSoundError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RATE = 16_000
MAX_SECONDS = 3600
MOST_RATE = 96_000
"""Of a recording as long as that; a shorter one may have up to `HIGHEST_RATE`."""
LOWEST_RATE, HIGHEST_RATE = 1000, 384_000
CHANNELS = 16
BLOCK = 1 << 18
"""Frames of all channels that are held at a time."""
FORMATS = ("WAV", "FLAC", "OGG", "MP3", "WAVEX")
ENDINGS = (".wav", ".flac", ".ogg", ".mp3")


def pieces(source: BinaryIO | int, most_seconds: int = MAX_SECONDS) -> Iterator[NDArray[np.float32]]:
    """Samples `[S]`, -1 to 1, the mean of all channels, in pieces of any length.

    Args:
        source: a file, or the descriptor of one, that can be read anywhere.
        most_seconds: how long the recording may be.

    Raises:
        ArtifactError: it is of no known format, empty or damaged; its message goes on after the recording's name.
        LongSoundError: it says that it is longer.
        ConfigError: the libraries are not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError:
        raise ConfigError("recordings need two libraries more: pip install 'steelyard[audio]'") from None
    try:
        with soundfile.SoundFile(source, closefd=False) as opened:
            if opened.format not in FORMATS:
                raise ArtifactError(f"is {opened.format}; known: {', '.join(ENDINGS)}")
            rate = opened.samplerate
            if not LOWEST_RATE <= rate <= HIGHEST_RATE or opened.channels > CHANNELS:
                raise ArtifactError(f"has {rate} samples a second and {opened.channels} channels, which is strange")
            if opened.frames > most_seconds * min(rate, MOST_RATE):
                raise LongSoundError(f"is longer than {most_seconds // 60} minutes, or of a strange rate: part it")
            resampled = soxr.ResampleStream(rate, RATE, 1, dtype="float32")
            empty = True
            # A header can promise anything: what is there is read piece by piece.
            for block in opened.blocks(BLOCK, dtype="float32", always_2d=True):
                mono = block.mean(1)
                if not np.isfinite(mono).all():
                    raise ArtifactError("is empty or damaged")
                empty = empty and not len(mono)
                yield resampled.resample_chunk(mono.clip(-1, 1))
            if empty:
                raise ArtifactError("is empty or damaged")
            yield resampled.resample_chunk(np.zeros(0, np.float32), last=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise ArtifactError(f"is no sound that is known here: {error}") from None
