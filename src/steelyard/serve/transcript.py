"""A transcript as it grows from piece to piece of a recording: its text, when what was said, as subtitles.

Knows outputs of engines and texts; nothing of HTTP.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from steelyard.infer.request import Output
from steelyard.infer.sound import SOUND_RATE, Word
from steelyard.serve.protocol.transcriptions import TranscriptSegment

SEEK = SOUND_RATE // 100
PAUSE, LONGEST, CHARACTERS = 0.7, 6.0, 84
"""A subtitle of words ends at a pause of so many seconds, and has at most so many seconds and characters."""


class Cue(NamedTuple):
    """A subtitle."""

    start: float
    end: float
    text: str


@dataclass
class Transcript:
    """What was said so far."""

    text: str = ""
    segments: list[TranscriptSegment] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    _raw: str = ""

    def add(self, output: Output, first: int, samples: int) -> str:
        """Take in what was said in a piece; returns what that adds to the text.

        Args:
            output: of the piece.
            first: samples before it.
            samples: of it.
        """
        assert output.heard is not None, "whoever hears says so"
        begin, end = first / SOUND_RATE, (first + samples) / SOUND_RATE
        told = len(self.text)
        self._raw += output.text
        self.text = self._raw.strip()  # what ends with spaces is told once more follows
        content = output.text.encode()
        self.segments.append(
            TranscriptSegment(
                len(self.segments),
                first // SEEK,
                round(begin, 3),
                round(end, 3),
                output.text,
                output.tokens,
                0.0,
                output.heard.average_logprob,
                len(content) / len(zlib.compress(content)),
                output.heard.no_speech,
            )
        )
        for word in output.heard.words or ():
            self.words.append(Word(word.word, round(begin + word.start, 3), round(begin + word.end, 3)))
        return self.text[told:]

    def cues(self) -> list[Cue]:
        """Subtitles: of words where their times are known, else of pieces."""
        if self.words:
            return list(_of_words(self.words))
        return [Cue(one.start, one.end, one.text.strip()) for one in self.segments if one.text.strip()]

    def srt(self) -> str:
        """In SubRip's format."""
        blocks = (
            f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{_line(cue.text)}\n"
            for number, cue in enumerate(self.cues(), 1)
        )
        return "\n".join(blocks)

    def vtt(self) -> str:
        """In WebVTT's format."""
        blocks = (f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{_line(cue.text)}\n" for cue in self.cues())
        return "\n".join(["WEBVTT\n", *blocks])


def _of_words(words: list[Word]) -> Iterator[Cue]:
    begun: list[Word] = []
    for word in words:
        if begun:
            size = sum(len(one.word) + 1 for one in begun) + len(word.word)
            if word.start - begun[-1].end > PAUSE or word.end - begun[0].start > LONGEST or size > CHARACTERS:
                yield _cue(begun)
                begun = []
        begun.append(word)
    if begun:
        yield _cue(begun)


def _cue(words: list[Word]) -> Cue:
    return Cue(words[0].start, words[-1].end, " ".join(word.word for word in words))


def _line(text: str) -> str:
    """One line, without what both formats take for a time."""
    return " ".join(text.split()).replace("-->", "→")


def _clock(seconds: float, point: str) -> str:
    thousandths = round(1000 * seconds)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"
